"""What MHE in megatron-core's models rejects, and how it changes a spec; tests/dist/test_megatron_spec.py trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.megatron import transformer_config


class Groups:
    """A stub of process groups of `ranks` ranks, with what the checks read."""

    def __init__(self, ranks: int) -> None:
        self.tp = SimpleNamespace(size=lambda: ranks, rank=lambda: 0)


def build(ranks: int = 1, spec: Any = None, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from model.megatron.spec import mhe_self_attention_spec

    config = transformer_config(1)
    for name, value in changes.items():
        setattr(config, name, value)
    spec = spec or mhe_self_attention_spec(**(options or {}))
    return build_module(spec, config=config, layer_number=1, pg_collection=Groups(ranks))


REFUSED: dict[str, Any] = {
    "attention_dropout": 0.1,
    "context_parallel_size": 2,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "qk_clip": True,
    "log_max_attention_logit": True,
    "attention_output_gate": True,
    "softmax_scale": 1.0,
    "softmax_type": "learnable",
    "window_size": (4, 0),
    "rotary_interleaved": True,
    "mrope_section": [1, 1, 1],
    "yarn_rotary_scaling_factor": 4.0,
    "no_rope_freq": [1, 0],
    "fp8": "hybrid",
    "fp4": "e2m1",
    "enable_autocast": True,
    "batch_invariant_mode": True,
    "cuda_graph_impl": "local",
    "delay_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "fine_grained_activation_offloading": True,
    "cpu_offloading": True,
    "inference_fuse_tp_communication": True,
    "init_model_with_meta_device": True,
    "num_query_groups": 2,
    "kv_channels": 0,
}


@pytest.mark.parametrize("field", REFUSED)
def test_refuses_what_mhe_cannot_do(field: str) -> None:
    name = "head_dim" if field == "kv_channels" else field
    with pytest.raises(ValueError, match=name):
        build(**{field: REFUSED[field]})


def test_every_refused_field_is_one_of_megatrons_and_tested() -> None:
    from model.megatron.spec import ALLOWED

    fields = set(vars(transformer_config(1)))
    assert set(ALLOWED) - fields == {"yarn_rotary_scaling_factor"}  # Megatron adds it to configurations that need it
    assert set(ALLOWED) <= set(REFUSED)


def test_refuses_a_spec_with_norms_of_queries_and_keys() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from model.megatron.spec import with_mhe

    with pytest.raises(ValueError, match="q_layernorm: it is not passed on"):
        with_mhe(get_gpt_layer_local_spec(qk_layernorm=True))


def test_refuses_biases_of_the_projection_alone() -> None:
    with pytest.raises(ValueError, match="add_qkv_bias"):
        build(add_qkv_bias=True, add_bias_linear=False)
    build(add_qkv_bias=True, add_bias_linear=True)


def test_refuses_heads_and_channels_that_ranks_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size = 3: .*heads \(8\) .*\(18\): 1, 2"):
        build(ranks=3)
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size = 2: .* 3 \* kv_channels \(15\): 1 "):
        build(ranks=2, kv_channels=5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"attention": "mha"}, "attention = 'mha'"),
        ({"mhe_gather": "auto"}, "mhe_gather"),
        ({"embedding_position": "beside"}, "embedding_position"),
        ({"attention_kernel": "fast"}, "attention_kernel"),
        ({"attention": "mhe_mul", "attention_kernel": "shared_scores"}, "attention_kernel"),
        ({"embedding_position": "before", "attention_kernel": "shared_scores"}, "attention_kernel"),
    ],
)
def test_refuses_wrong_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build(options=options)


@pytest.mark.parametrize(
    "name",
    [
        "inference_context",
        "inference_params",
        "packed_seq_params",
        "attention_bias",
        "rotary_pos_cos",
        "rotary_pos_sin",
        "rotary_pos_cos_sin",
        "sequence_len_offset",
        "key_value_states",
    ],
)
def test_refuses_what_megatron_may_pass(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build()(torch.zeros(4, 1, 32), **{name: object()})


def test_refuses_rotations_of_another_kind() -> None:
    x_SBH = torch.zeros(4, 2, 32)
    with pytest.raises(ValueError, match="rotary_percent"):
        build()(x_SBH, rotary_pos_emb=torch.zeros(4, 1, 1, 4))
    with pytest.raises(ValueError, match="rotary_pos_emb"):
        build()(x_SBH, rotary_pos_emb=torch.zeros(4, 2, 1, 6))
    with pytest.raises(ValueError, match="rotary_pos_emb"):
        build()(x_SBH, rotary_pos_emb=torch.zeros(5, 1, 1, 6))
    with pytest.raises(ValueError, match="position_embedding_type='rope'"):
        build(options={"embedding_position": "before"})(x_SBH)


def test_changes_a_copy_of_the_spec() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from model.megatron.spec import MHESelfAttention, with_mhe

    spec = get_gpt_layer_local_spec()
    block = with_mhe(TransformerBlockSubmodules(layer_specs=[spec, spec], layer_norm=IdentityOp), "mhe_mul")
    assert [layer.submodules.self_attention.module for layer in block.layer_specs] == [MHESelfAttention] * 2
    assert block.layer_norm is IdentityOp
    assert spec.submodules.self_attention.module is SelfAttention
    assert spec.submodules.sharded_state_dict_keys_map == get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map

    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    with pytest.raises(ValueError, match="attn_mask_type"):
        build(spec=with_mhe(spec).submodules.self_attention)
    spec.submodules.input_layernorm = IdentityOp  # as in Transformer Engine's specs
    with pytest.raises(ValueError, match="input_layernorm"):
        with_mhe(spec)
    assert with_mhe(spec, input_layernorm=nn.LayerNorm).submodules.input_layernorm is nn.LayerNorm
    spec.submodules.self_attention = IdentityOp
    with pytest.raises(ValueError, match="self_attention"):
        with_mhe(spec)
