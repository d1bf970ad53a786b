"""MHE as the self-attention of megatron-core's own GPTModel; docs/megatron.md shows its use.

`with_mhe` changes one of Megatron's layer specs; `mhe_self_attention_spec` makes its attention. The layers are those of
model/parallel/tensor.py, built on the model's own TransformerConfig and process groups: sequence parallelism, recomputation,
pipeline stages and distributed checkpoints are Megatron's. Options of Megatron that MHE does not support are rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from pydantic import ValidationError
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.registry import attention_class, attention_names, attention_variant
from model.costs.communication import Gather
from model.faults import model_faults
from model.parallel.tensor import TensorParallelLayers
from model.positions.positions import Positions

ATTENTIONS = [name for name in attention_names() if attention_variant(name).megatron]

# Fields of TransformerConfig that change what attention computes or how it runs: the one value that MHE supports, and why.
ALLOWED: dict[str, tuple[Any, str]] = {
    "attention_dropout": (0.0, "the kernels of MHE have no attention dropout (hidden_dropout works)"),
    "context_parallel_size": (1, "a rank needs the keys of the full sequence"),
    "multi_latent_attention": (False, "MHE takes its place"),
    "experimental_attention_variant": (None, "MHE takes its place"),
    "qk_layernorm": (False, "MHE has no norm of queries and keys"),
    "qk_l2_norm": (False, "MHE has no norm of queries and keys"),
    "qk_clip": (False, "MHE does not keep its scores"),
    "log_max_attention_logit": (False, "MHE does not keep its scores"),
    "attention_output_gate": (False, "MHE has no gate"),
    "softmax_scale": (None, "scores are scaled by 1 / sqrt(kv_channels)"),
    "softmax_type": ("vanilla", "there are no attention sinks"),
    "window_size": (None, "every token sees all earlier ones"),
    "rotary_interleaved": (False, "channel c turns with c + kv_channels / 2"),
    "mrope_section": (None, "all channels turn with one position"),
    "yarn_rotary_scaling_factor": (None, "YaRN scales scores"),
    "no_rope_freq": (None, "all layers rotate or none"),
    "fp8": (None, "MHE computes in params_dtype"),
    "fp4": (None, "MHE computes in params_dtype"),
    "enable_autocast": (False, "MHE computes in params_dtype"),
    "batch_invariant_mode": (False, "the kernels of MHE are not batch invariant"),
    "cuda_graph_impl": ("none", "MHE is not captured in CUDA graphs"),
    "delay_wgrad_compute": (False, "weight gradients come with the backward pass"),
    "overlap_moe_expert_parallel_comm": (False, "it takes a layer's attention apart"),
    "fine_grained_activation_offloading": (False, "MHE's activations stay where they are"),
    "cpu_offloading": (False, "MHE's activations stay where they are"),
    "inference_fuse_tp_communication": (False, "this is for training"),
    "init_model_with_meta_device": (False, "head embeddings are filled when they are made"),
}


def mhe_self_attention_spec(
    attention: str = "mhe_add",
    *,
    num_seeds: int = 1,
    embedding_position: str = "after",
    key_embedding: bool = True,
    attention_kernel: str = "auto",
    mhe_gather: Gather = "weights",
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
) -> ModuleSpec:
    """A ModuleSpec for the `self_attention` of a layer. Nothing is checked before Megatron builds it.

    `attention`: mhe_add or mhe_mul. `num_seeds`, `embedding_position`, `key_embedding` and `attention_kernel` are the fields
    of ModelConfig (docs/configuration.md). `mhe_gather`: what tensor-parallel ranks gather so that each has all outputs of the
    shared projection: its weights, which moves fewer bytes unless a rank has very few tokens, or its activations.
    """
    options = {
        "attention": attention,
        "num_seeds": num_seeds,
        "embedding_position": embedding_position,
        "key_embedding": key_embedding,
        "attention_kernel": attention_kernel,
        "mhe_gather": mhe_gather,
        "attn_mask_type": attn_mask_type,
    }
    return ModuleSpec(module=MHESelfAttention, params=options)


def with_mhe(
    spec: ModuleSpec | TransformerBlockSubmodules,
    attention: str = "mhe_add",
    *,
    input_layernorm: ModuleSpec | type | None = None,
    **options: Any,
) -> ModuleSpec | TransformerBlockSubmodules:
    """A copy of one of Megatron's layer specs, or block specs, whose self-attention is MHE; the mask's type is kept.

    `options` are those of `mhe_self_attention_spec`. `input_layernorm` replaces the layer's. Transformer Engine's specs need
    it: they normalise inside the projection that MHE replaces. ValueError if it is missing, or if `spec` has no self-attention
    or one with norms of queries and keys.
    """
    spec = copy.deepcopy(spec)
    layers = (spec.layer_specs or []) if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        parts = layer.submodules
        replaced = getattr(parts, "self_attention", IdentityOp)
        if replaced is IdentityOp:
            raise ValueError("spec: its layers must have a self_attention")
        for norm in ("q_layernorm", "k_layernorm"):
            if getattr(getattr(replaced, "submodules", None), norm, None) not in (None, IdentityOp):
                raise ValueError(f"{norm}: MHE has no norm of queries and keys; make the spec with qk_layernorm=False")
        mask_type = getattr(replaced, "params", {}).get("attn_mask_type", AttnMaskType.causal)
        parts.self_attention = mhe_self_attention_spec(attention, **{"attn_mask_type": mask_type, **options})
        if input_layernorm is not None:
            parts.input_layernorm = input_layernorm
        if parts.input_layernorm is IdentityOp:
            raise ValueError(
                "input_layernorm: this spec normalises inside the attention's projection, which MHE replaces; give the norm, "
                "with Transformer Engine input_layernorm=TENorm"
            )
        # It would name the norm in checkpoints after a layer that MHE replaces.
        parts.sharded_state_dict_keys_map.pop("input_layernorm.", None)
    return spec


class MHESelfAttention(MegatronModule):
    """A drop-in for Megatron's SelfAttention in a TransformerLayer; `attention` has the parameters of model/attention/mhe.py.

    Megatron builds it like its own. ValueError, naming the field, for anything unsupported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        layer_number: int = 1,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,  # megatron-core 0.19 passes it; it names layers in its logs
        *,
        attention: str = "mhe_add",
        num_seeds: int = 1,
        embedding_position: str = "after",
        key_embedding: bool = True,
        attention_kernel: str = "auto",
        mhe_gather: Gather = "weights",
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = groups.tp
        ranks = groups.tp.size()
        options = {
            "attention": attention,
            "num_seeds": num_seeds,
            "embedding_position": embedding_position,
            "key_embedding": key_embedding,
            "attention_kernel": attention_kernel,
        }
        faults = list(unsupported(config, ranks, attn_mask_type, num_seeds))
        if attention not in ATTENTIONS:
            faults.append(f"attention = {attention!r}: must be {' or '.join(ATTENTIONS)}")
        if mhe_gather not in ("weights", "activations"):
            faults.append(f"mhe_gather = {mhe_gather!r}: must be 'weights' or 'activations'")
        if faults:
            raise ValueError("\n".join(faults))
        self.model_config = model_config(config, options)
        layers = TensorParallelLayers(
            config, groups.tp, mhe_gather, initialize=config.init_method, initialize_out=config.output_layer_init_method
        )
        self.sequence_ranks = ranks if layers.sequence else 1
        self.attention = attention_class(self.model_config)(self.model_config, layers, layer_number - 1)
        self._place_head_embeddings()

    def _place_head_embeddings(self) -> None:
        """Set type, device and initial values of the parameters that are not in Megatron's layers.

        They are drawn from the default generator, which is in the same state on all tensor-parallel ranks, so that replicas are
        equal, and advances from layer to layer.
        """
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        for parameter in self.attention.parameters(recurse=False):
            parameter.data = parameter.data.to(device, self.config.params_dtype)
            if self.config.perform_initialization:
                nn.init.normal_(parameter, std=self.config.init_method_std)

    def forward(
        self, x_SBH: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """(S, B, H) → (S, B, H), and None as the bias, which is already added; with sequence parallelism (S/t, B, H) each.

        `attention_mask` is not read: the mask is causal, as in Megatron's own flash attention. `rotary_pos_emb`: RoPE's angles
        (S, 1, 1, kv_channels) of all tokens, or None. ValueError for anything else that Megatron may pass.
        """
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name}: MHE's attention in Megatron trains on full sequences without it; it must be None")
        length = x_SBH.shape[0] * self.sequence_ranks
        positions = Positions(length, rotary=self._rotary(rotary_pos_emb, length), dtype=x_SBH.dtype, device=x_SBH.device)
        return self.attention(x_SBH, positions), None

    def _rotary(self, angles: Tensor | None, length: int) -> dict[int, tuple[Tensor, Tensor]] | None:
        """By kv_channels: cos and sin, (S, kv_channels/2) each, of Megatron's angles, which have every channel pair twice."""
        if angles is None:
            if self.model_config.embedding_position == "before":
                raise ValueError("embedding_position = 'before': GPTModel must have position_embedding_type='rope'")
            return None
        width = self.model_config.head_width
        if angles.shape[-1] != width:
            raise ValueError(
                f"rotary_percent: all {width} kv_channels must turn, rotary_percent=1.0 and kv_channels even; "
                f"the angles are {tuple(angles.shape)}"
            )
        if angles.shape != (length, 1, 1, width):
            raise ValueError(
                f"rotary_pos_emb: must be {(length, 1, 1, width)}, the same for all sequences: {tuple(angles.shape)}"
            )
        half_TD = angles[:, 0, 0, : width // 2]
        return {width: (half_TD.cos(), half_TD.sin())}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the parameters for distributed checkpoints: projections sharded, the rest replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        prefix = f"{prefix}attention."
        tensors: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            dict(self.attention.named_parameters(recurse=False)),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, child in self.attention.named_children():
            of_child: Callable[..., dict[str, Any]] = child.sharded_state_dict
            tensors.update(of_child(f"{prefix}{name}.", sharded_offsets, metadata))
        return tensors


def model_config(config: TransformerConfig, options: dict[str, Any]) -> ModelConfig:
    """What our attention reads, from Megatron's configuration and the options of the spec. ValueError where they do not fit."""
    try:
        ours = ModelConfig(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_attention_heads,
            head_dim=config.kv_channels,
            bias=config.add_bias_linear,
            position="rope" if options["embedding_position"] == "before" else "none",  # otherwise the forward pass sees it
            **options,
        )
    except ValidationError as error:
        raise ValueError(str(error)) from None  # Megatron re-raises what it catches, and pydantic's errors do not survive that
    faults = [*ours.faults(), *model_faults({"model": ours})]
    if faults:
        raise ValueError("\n".join(str(fault) for fault in faults))
    return ours


def unsupported(config: TransformerConfig, ranks: int, attn_mask_type: AttnMaskType, seeds: int = 1) -> Iterator[str]:
    """What MHE does not support of Megatron's configuration on this many tensor-parallel ranks: field, value, allowed value."""
    for field, (allowed, why) in ALLOWED.items():
        value = getattr(config, field, allowed)
        if value != allowed:
            yield f"{field} = {value!r}: must be {allowed!r} with MHE: {why}"
    heads, width = config.num_attention_heads, config.kv_channels
    if attn_mask_type != AttnMaskType.causal:
        yield f"attn_mask_type = {attn_mask_type}: must be causal with MHE"
    if config.num_query_groups not in (None, heads):
        yield f"num_query_groups = {config.num_query_groups}: must be None or num_attention_heads ({heads}); MHE has one group"
    if config.add_qkv_bias and not config.add_bias_linear:
        yield "add_qkv_bias = True: MHE's projections all have a bias or none; must be add_bias_linear (False)"
    columns = 3 * seeds * width
    sizes = [size for size in range(1, heads + 1) if heads % size == 0 and columns % size == 0]
    sizes = [size for size in sizes if size % seeds == 0 or seeds % size == 0]
    if ranks not in sizes:
        whole = "" if seeds == 1 else f", and num_seeds ({seeds}) or be a multiple of it"
        yield (
            f"tensor_model_parallel_size = {ranks}: must divide num_attention_heads ({heads}) and {3 * seeds} * kv_channels "
            f"({columns}){whole}: {', '.join(map(str, sizes))}"
        )
