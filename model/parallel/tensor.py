"""Layers sharded over tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053), on megatron-core's layers and groups.

Heads, MLP channels and the vocabulary are sharded. Without sequence parallelism every rank holds the hidden states of all
tokens; with it (Korthikanti et al. 2022, arXiv 2205.05198) norms, dropout and residuals see a shard of the sequence, S/t.
Some replicated parameters get only a part of their gradient on each rank (head embeddings; with sequence parallelism norms,
output biases, position embeddings). The backward pass sums the parts, so that gradients are complete before an optimizer or
engine sees them. docs/tensor_parallel.md lists all communication; model/costs/communication.py counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.costs.communication import Gather
from model.layers import Layers
from model.parallel import megatron_cpu
from model.parallel.sharding import Spec

megatron_cpu.install()

Initialize = Callable[[Tensor], Any]


def parallel_config(size: int, sequence: bool) -> ModelParallelConfig:
    """megatron-core's description of a layout. Weights are left uninitialised: init_weights sets them."""
    return ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence and size > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class TensorParallelLayers(Layers):
    """Makes one rank's shards. `group` is the tensor-parallel process group; megatron-core's cross-entropy needs its own.

    `gather`: what ranks gather for the projections that all heads read (sha, mhe_*): `activations`, of which each rank computes
    some columns of q, k and v, or `weights`. `initialize` and `initialize_out` fill weights if `config` says that layers
    initialise themselves.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        group: dist.ProcessGroup,
        gather: Gather,
        initialize: Initialize = nn.init.normal_,
        initialize_out: Initialize = nn.init.normal_,
    ) -> None:
        super().__init__()
        self.config, self.group, self.gather = config, group, gather
        self.rank, self.size = group.rank(), group.size()
        self.sequence = config.sequence_parallel and self.size > 1
        self.initialize, self.initialize_out = initialize, initialize_out

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return Column(self, in_features, out_features, bias)

    def key_value(self, in_features: int, heads: int, width: int, bias: bool) -> nn.Module:
        if heads % self.size == 0:
            return Column(self, in_features, heads * width, bias)
        return FewHeads(self, in_features, heads, width, bias)

    def shared(self, in_features: int, seeds: int, width: int, bias: bool) -> nn.Module:
        if seeds % self.size == 0 and seeds > 1:
            return Column(self, in_features, seeds * width, bias)
        return Shared(self, in_features, seeds, width, bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return Row(self, in_features, out_features, bias)

    def own_channels(self) -> nn.Module:
        return OwnChannels()

    def project(self, x_SBH: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Gathers x, or sums its gradient, once for all layers that have weights."""
        joined = [linear for linear in linears if isinstance(linear, Column)]
        channels = self.own(x_SBH.shape[-1]) if len(joined) < len(linears) else None
        parameters = [parameter for linear in joined for parameter in linear.own_parameters()]
        outputs = list(_Joint.apply(x_SBH, self.group, self.sequence, channels, *parameters))
        own_channels_SBD: Any = outputs.pop() if channels is not None else None
        remaining = iter(outputs)
        return tuple(next(remaining) if isinstance(linear, Column) else own_channels_SBD for linear in linears)

    def norm(self, config: ModelConfig) -> nn.Module:
        return SequenceParallelNorm(self, config) if self.sequence else super().norm(config)

    def own(self, count: int) -> slice:
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def own_heads(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        """Each rank has the gradients of its own heads only, so summing gathers them; one call for all parameters."""
        rows_NPD = scatter_to_sequence_parallel_region(torch.stack(parameters, dim=1), group=self.group)
        return tuple(rows.contiguous() for rows in rows_NPD.unbind(1))

    def exchange_heads(self, x_BNF: Tensor) -> Tensor:
        exchanged: Tensor = _ExchangeHeads.apply(F.pad(x_BNF, (0, -x_BNF.shape[-1] % self.size)), self.group)
        return exchanged

    def sum_parts(self, x: Tensor) -> Tensor:
        summed: Tensor = reduce_from_tensor_model_parallel_region(x, group=self.group)
        return summed

    def part_of_sum(self, x: Tensor) -> Tensor:
        part: Tensor = _DivideGradient.apply(x, self.size)
        return part

    def own_tokens(self, x_SBH: Tensor) -> Tensor:
        own: Tensor = scatter_to_sequence_parallel_region(x_SBH, group=self.group) if self.sequence else x_SBH
        return own

    def embedding(self, rows: int, width: int) -> Any:
        return VocabularyEmbedding(self, rows, width)

    def output(self, width: int, rows: int) -> Any:
        return Column(self, width, rows, bias=False, padding=self.padding(rows))

    def own_logits(self, x_SBH: Tensor, weight_VH: Tensor, vocab_size: int) -> Tensor:
        """(S, B, V/t); −inf for padding rows of the weight."""
        logits_SBV: Tensor
        (logits_SBV,) = _Joint.apply(x_SBH, self.group, self.sequence, None, weight_VH, None)
        rows = weight_VH.shape[0]
        if (self.rank + 1) * rows > vocab_size:
            logits_SBV[..., max(0, vocab_size - self.rank * rows) :] = -math.inf
        return logits_SBV

    def logits(self, own_SBV: Tensor, vocab_size: int) -> Tensor:
        all_SBV: Tensor = gather_from_tensor_model_parallel_region(own_SBV, group=self.group)
        return super().logits(all_SBV[..., :vocab_size], vocab_size)

    def losses(self, own_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        losses_SB: Tensor = vocab_parallel_cross_entropy(own_SBV, labels_BS.t().contiguous())
        return losses_SB.t()

    def padding(self, vocab_size: int) -> int:
        """Rows to add to a vocabulary to make it divisible by the number of ranks."""
        return -vocab_size % self.size


class _Plain:
    """A Megatron layer without its additions to state dicts, so that parameters have the same names as on one rank."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def declare(self: Any, partition: dict[str, Spec]) -> None:
        """Declare how the layer's own parameters are sharded."""
        self._load_state_dict_pre_hooks.clear()
        self.partition = partition
        for name in partition:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.tensor_model_parallel = True  # tells Megatron's own training to count it on every rank


class Column(_Plain, ColumnParallelLinear):
    """Some outputs of a linear layer, for all tokens. `padding` extra outputs make the shards equal."""

    def __init__(self, layers: TensorParallelLayers, in_features: int, out_features: int, bias: bool, padding: int = 0) -> None:
        super().__init__(
            in_features,
            out_features + padding,
            config=layers.config,
            init_method=layers.initialize,
            bias=bias,
            tp_group=layers.group,
        )
        spec = Spec(0, layers.size, padding)
        self.declare({"weight": spec, "bias": spec})

    def forward(self, x_SBH: Tensor) -> Tensor:
        own_SBD: Tensor = super().forward(x_SBH)[0]
        return own_SBD

    def own_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the outputs that this rank computes."""
        return self.weight, self.bias


class FewHeads(Column):
    """Keys and values of fewer heads than ranks: each rank stores 1/t of the weight and gathers it for the one head it reads.

    Ranks that read the same head each have a part of its gradient; the gather's backward pass, a reduce-scatter, sums them.
    """

    def __init__(self, layers: TensorParallelLayers, in_features: int, heads: int, width: int, bias: bool) -> None:
        super().__init__(layers, in_features, heads * width, bias)
        first = layers.rank * heads // layers.size * width
        self.rows = slice(first, first + width)

    def forward(self, x_SBH: Tensor) -> Tensor:
        (own_SBD,) = _Joint.apply(x_SBH, self.tp_group, self.sequence_parallel, None, *self.own_parameters())
        return own_SBD

    def own_parameters(self) -> tuple[Tensor, Tensor | None]:
        gathered = gather_from_sequence_parallel_region(packed(self.weight, self.bias), group=self.tp_group)
        return unpacked(gathered[self.rows], self.bias is not None)


class Shared(Column):
    """A projection that heads of several ranks read: 1/t of the weight on each rank, all outputs gathered, for all tokens.

    A rank keeps the columns of the one seed that its heads read. With gathered weights and without sequence parallelism, every
    rank computes the complete gradient of x. Column parallelism would sum over ranks a tensor as wide as x; here it is only
    as wide as the output. (Megatron's other layers would not gain: their outputs are as wide as x.)
    """

    def __init__(self, layers: TensorParallelLayers, in_features: int, seeds: int, width: int, bias: bool) -> None:
        super().__init__(layers, in_features, seeds * width, bias)
        self.gather = layers.gather
        first = layers.rank * seeds // layers.size * width
        self.columns = slice(first, first + width)

    def forward(self, x_SBH: Tensor) -> Tensor:
        out_SBD: Tensor
        if self.gather == "activations":
            out_SBD = all_gather_last_dim_from_tensor_parallel_region(super().forward(x_SBH), group=self.tp_group)
        elif self.sequence_parallel:
            gathered = gather_from_sequence_parallel_region(packed(self.weight, self.bias), group=self.tp_group)
            own_SBD = F.linear(x_SBH, *unpacked(gathered, self.bias is not None))
            out_SBD = gather_from_sequence_parallel_region(own_SBD, group=self.tp_group)
        else:
            out_SBD = _GatheredLinear.apply(x_SBH, packed(self.weight, self.bias), self.bias is not None, self.tp_group)
        return out_SBD[..., self.columns]


class _GatheredLinear(torch.autograd.Function):
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


class _Joint(torch.autograd.Function):
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


class Row(_Plain, RowParallelLinear):
    """Some inputs of a linear layer; the results of all ranks are summed, then the bias is added."""

    def __init__(self, layers: TensorParallelLayers, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            config=layers.config,
            init_method=layers.initialize_out,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=layers.group,
        )
        self.declare({"weight": Spec(1, layers.size)})
        if bias:
            self.bias.sequence_parallel = False  # its gradient is summed here, not by Megatron's finalize_model_grads

    def forward(self, own_SBD: Tensor) -> Tensor:
        out_SBH, bias = super().forward(own_SBD)
        if bias is None:
            return out_SBH
        return out_SBH + (sum_gradients(self.tp_group, bias)[0] if self.sequence_parallel else bias)


class OwnChannels(nn.Module):
    """A placeholder for the hidden state's channels of this rank's heads, for all tokens; `project` returns them."""


class SequenceParallelNorm(nn.Module):
    """A norm of this rank's tokens; the gradients of weight and bias are summed over ranks."""

    def __init__(self, layers: TensorParallelLayers, config: ModelConfig) -> None:
        super().__init__()
        self.group, self.kind, self.epsilon = layers.group, config.norm, config.norm_epsilon
        for name, parameter in Layers.norm(layers, config).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x_SBH: Tensor) -> Tensor:
        parameters = sum_gradients(self.group, *self.parameters())
        norm: Callable[..., Tensor] = F.layer_norm if self.kind == "layernorm" else F.rms_norm
        return norm(x_SBH, x_SBH.shape[-1:], *parameters, eps=self.epsilon)


class VocabularyEmbedding(_Plain, VocabParallelEmbedding):
    """Token ids (B, S) → hidden states (S, B, H), or (S/t, B, H) with sequence parallelism, from a shard of the rows."""

    def __init__(self, layers: TensorParallelLayers, rows: int, width: int) -> None:
        padding = layers.padding(rows)
        super().__init__(
            rows + padding,
            width,
            init_method=layers.initialize,
            reduce_scatter_embeddings=layers.sequence,
            config=layers.config,
            tp_group=layers.group,
        )
        self.declare({"weight": Spec(0, layers.size, padding)})

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_SBH: Tensor = super().forward(tokens_BS if self.reduce_scatter_embeddings else tokens_BS.t().contiguous())
        return x_SBH


def packed(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[weight | bias], to communicate both at once."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def unpacked(both: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    return (both[:, :-1], both[:, -1]) if has_bias else (both, None)


class _ExchangeHeads(torch.autograd.Function):
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


class _DivideGradient(torch.autograd.Function):
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
