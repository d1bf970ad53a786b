"""Autograd functions whose passes communicate between tensor-parallel ranks, where megatron-core has none that fits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class GatheredLinear(torch.autograd.Function):
    """x Wᵀ + b on every rank from the shards of [W | b]; each rank's incoming gradient is a part of the sum."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, shard: Tensor, has_bias: bool, group: dist.ProcessGroup) -> Tensor:
        gathered, _ = _gathered(shard, group)
        weight, bias = unpacked(gathered, has_bias)
        ctx.save_for_backward(x_SBH, weight)
        ctx.has_bias, ctx.group, ctx.rows = has_bias, group, shard.shape[0]
        return F.linear(x_SBH, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_SBH, weight = ctx.saved_tensors
        d_out_SBD = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d_out_SBD, group=ctx.group)
        first = ctx.group.rank() * ctx.rows
        own_D = d_out_SBD[..., first : first + ctx.rows].flatten(0, -2)
        d_weight = own_D.t() @ x_SBH.flatten(0, -2)
        d_shard = packed(d_weight, own_D.sum(0) if ctx.has_bias else None)
        return d_out_SBD @ weight, d_shard, None, None


class Joint(torch.autograd.Function):
    """Several layers on one hidden state, like Megatron's column-parallel layer, with one collective for all.

    `parameters` are weight and bias of each linear layer; their outputs come first, then, if `channels` are given, those
    channels of the hidden state itself. Weights are not concatenated into one layer: autograd would keep the copy until the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SBH: Tensor, group: dist.ProcessGroup, sequence: bool, channels: slice | None, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x_SBH, *weights)
        ctx.group, ctx.sequence, ctx.channels = group, sequence, channels
        all_SBH = _gathered(x_SBH, group)[0] if sequence else x_SBH
        pairs: Any = zip(weights, biases, strict=True)
        outputs = [F.linear(all_SBH, weight, bias) for weight, bias in pairs]
        return (*outputs, all_SBH[..., channels].clone()) if channels is not None else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_SBH, *weights = ctx.saved_tensors
        all_SBH, gathering = _gathered(x_SBH, ctx.group, wait=False) if ctx.sequence else (x_SBH, None)
        rows = [gradient.flatten(0, -2) for gradient in gradients]
        d_all = rows[0] @ weights[0]
        for row, weight in zip(rows[1:], weights[1:], strict=False):
            d_all.addmm_(row, weight)
        if ctx.channels is not None:
            d_all[:, ctx.channels] += rows[-1]
        if gathering is not None:
            gathering.wait()
        # Megatron's order: the sum of x's gradient overlaps with computing those of the weights.
        summing = None
        if ctx.sequence:
            d_x = torch.empty_like(x_SBH)
            summing = dist.reduce_scatter_tensor(d_x, d_all.view_as(all_SBH), group=ctx.group, async_op=True)
        else:
            d_x = d_all.view_as(x_SBH)
            if ctx.group.size() > 1:
                summing = dist.all_reduce(d_x, group=ctx.group, async_op=True)
        columns = all_SBH.flatten(0, -2)
        of_parameters: list[Tensor | None] = []
        for number, row in enumerate(rows[: len(weights)]):
            of_parameters += [row.t() @ columns, row.sum(0) if ctx.needs_input_grad[5 + 2 * number] else None]
        if summing is not None:
            summing.wait()
        return d_x, None, None, None, *of_parameters


def _gathered(rows: Tensor, group: dist.ProcessGroup, wait: bool = True) -> tuple[Tensor, Any]:
    """The rows (tokens, outputs of a weight) of all ranks, and, without `wait`, the handle to wait for."""
    out = rows.new_empty((group.size() * rows.shape[0], *rows.shape[1:]))
    return out, dist.all_gather_into_tensor(out, rows.contiguous(), group=group, async_op=not wait)


def packed(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[weight | bias], to communicate both at once."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def unpacked(both: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    return (both[:, :-1], both[:, -1]) if has_bias else (both, None)


class ExchangeHeads(torch.autograd.Function):
    """All columns (F) of this rank's heads (n) → a share of the columns of all heads, in rank order."""

    @staticmethod
    def forward(ctx: Any, x_BNF: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts_RBNF = x_BNF.unflatten(-1, (group.size(), -1)).movedim(-2, 0).contiguous()
        exchanged_RBNF = torch.empty_like(parts_RBNF)
        dist.all_to_all_single(exchanged_RBNF, parts_RBNF, group=group)
        return exchanged_RBNF.movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts_RBNF = gradients[0].unflatten(1, (ctx.group.size(), -1)).movedim(1, 0).contiguous()
        exchanged_RBNF = torch.empty_like(parts_RBNF)
        dist.all_to_all_single(exchanged_RBNF, parts_RBNF, group=ctx.group)
        return exchanged_RBNF.movedim(0, -2).flatten(-2), None


class DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        flat = torch.cat([gradient.to(wide).flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        summed = (part.view_as(gradient).to(gradient.dtype) for part, gradient in zip(parts, gradients, strict=True))
        return (None, *summed)


def sum_gradients(group: dist.ProcessGroup, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
    """The parameters themselves; their gradients are summed over `group`, in float32 or wider and in one call."""
    summed: tuple[Tensor, ...] = _SumGradients.apply(group, *parameters)
    return summed
