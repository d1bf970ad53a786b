"""Layers sharded over tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053), on megatron-core's layers and groups.

Heads, MLP channels and the vocabulary are sharded. Without sequence parallelism every rank holds the hidden states of all
tokens; with it (Korthikanti et al. 2022, arXiv 2205.05198) norms, dropout and residuals see a shard of the sequence, S/t.
Some replicated parameters get only a part of their gradient on each rank (head embeddings; with sequence parallelism norms,
output biases, position embeddings). The backward pass sums the parts, so that gradients are complete before an optimizer or
engine sees them. docs/tensor_parallel.md lists all communication; model/costs/communication.py counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from model.layers import Layers, expanded, wide_copy
from model.parallel import megatron_cpu
from model.parallel.communicating import (
    DivideGradient,
    ExchangeHeads,
    GatheredLinear,
    Joint,
    packed,
    sum_gradients,
    unpacked,
)
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

    def expand(self, in_features: int, groups: int, out_features: int, bias: bool) -> nn.Module:
        return OwnExpand(self, in_features, groups, out_features, bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return Row(self, in_features, out_features, bias)

    def own_channels(self) -> nn.Module:
        return OwnChannels()

    def project(self, x_SBH: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Gathers x, or sums its gradient, once for all layers that have weights; `Shared` ones communicate for themselves."""
        rest = self._joint(x_SBH, [linear for linear in linears if not isinstance(linear, Shared)])
        return tuple(linear(x_SBH) if isinstance(linear, Shared) else next(rest) for linear in linears)

    def _joint(self, x_SBH: Tensor, linears: list[nn.Module]) -> Iterator[Tensor]:
        if not linears:
            return
        joined = [linear for linear in linears if isinstance(linear, Column)]
        channels = self.own(x_SBH.shape[-1]) if len(joined) < len(linears) else None
        parameters = [parameter for linear in joined for parameter in linear.own_parameters()]
        outputs = list(Joint.apply(x_SBH, self.group, self.sequence, channels, *parameters))
        own_channels_SBD: Any = outputs.pop() if channels is not None else None
        remaining = iter(outputs)
        for linear in linears:
            yield next(remaining) if isinstance(linear, Column) else own_channels_SBD

    def norm(self, config: ModelConfig) -> nn.Module:
        return SequenceParallelNorm(self, config) if self.sequence else super().norm(config)

    def own(self, count: int) -> slice:
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def own_heads(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        """Each rank has the gradients of its own heads only, so summing gathers them; one call for all parameters."""
        rows_NPD = scatter_to_sequence_parallel_region(torch.stack(parameters, dim=1), group=self.group)
        return tuple(rows.contiguous() for rows in rows_NPD.unbind(1))

    def replicated(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        return sum_gradients(self.group, *parameters) if self.size > 1 else parameters

    def exchange_heads(self, x_BNF: Tensor) -> Tensor:
        exchanged: Tensor = ExchangeHeads.apply(F.pad(x_BNF, (0, -x_BNF.shape[-1] % self.size)), self.group)
        return exchanged

    def sum_parts(self, x: Tensor) -> Tensor:
        summed: Tensor = reduce_from_tensor_model_parallel_region(x, group=self.group)
        return summed

    def part_of_sum(self, x: Tensor) -> Tensor:
        part: Tensor = DivideGradient.apply(x, self.size)
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
        (logits_SBV,) = Joint.apply(x_SBH, self.group, self.sequence, None, weight_VH, None)
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

    def normalizers(self, own_SBV: Tensor) -> Tensor:
        parts_SB = wide_copy(own_SBV).logsumexp(-1)
        highest_SB = parts_SB.detach().clone()
        dist.all_reduce(highest_SB, dist.ReduceOp.MAX, group=self.group)
        own_SB = (
            (parts_SB - highest_SB).exp().clone()
        )  # which is overwritten by the sum; the backward pass of exp needs its own
        return (self.sum_parts(own_SB).log() + highest_SB).t()

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
        (own_SBD,) = Joint.apply(x_SBH, self.tp_group, self.sequence_parallel, None, *self.own_parameters())
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
            out_SBD = GatheredLinear.apply(x_SBH, packed(self.weight, self.bias), self.bias is not None, self.tp_group)
        return out_SBD[..., self.columns]


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


class OwnExpand(nn.Module):
    """The shard of an `Expand`. Nothing is communicated: a rank has the latents, and passes on its part of their gradient."""

    def __init__(self, layers: TensorParallelLayers, in_features: int, groups: int, out_features: int, bias: bool) -> None:
        super().__init__()
        own = out_features // layers.size
        self.groups = max(1, groups // layers.size)
        self.weight = nn.Parameter(torch.empty(own, in_features))
        self.bias = nn.Parameter(torch.empty(own)) if bias else None
        self.partition = {"weight": Spec(0, layers.size), "bias": Spec(0, layers.size)}

    def forward(self, latents: Tensor) -> Tensor:
        return expanded(latents, self.weight, self.bias, self.groups)


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
