"""Logits with one block in memory at a time, of our model or a stock architecture, to compare models of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.build import build_model
from model.huggingface.fold import Make, Read


def our_logits(config: ModelConfig, read: Read, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, S, vocab) of our model, from its parameters by name; attention uses the math kernel."""
    config = config.model_copy(update={"attention_kernel": "math"})
    with torch.device("meta"):
        model: Any = build_model(config)
    makes = {name: lambda name=name: read(name) for name, _ in model.named_parameters()}
    return _streamed(model, "blocks", makes, dtype, lambda: model.logits(tokens_BS))


def stock_logits(settings: Any, blocks: str, makes: Mapping[str, Make], tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, S, vocab) of a transformers model, from functions that make its tensors, by name.

    `settings` is its configuration, `blocks` the path of its list of layers. In float64 its norms and rotary tables, which
    transformers computes in float32, are computed in float64.
    """
    from transformers import AutoModelForCausalLM

    none = copy.deepcopy(settings)
    none.num_hidden_layers = 0
    shell = AutoModelForCausalLM.from_config(none)
    none.num_hidden_layers = (
        settings.num_hidden_layers
    )  # the shell's own configuration; some models read it to run their layers
    with torch.device("meta"):
        unsharded = AutoModelForCausalLM.from_config(settings)
    parent, _, name = blocks.rpartition(".")
    setattr(shell.get_submodule(parent), name, unsharded.get_submodule(blocks))
    if dtype == torch.float64:
        for module in shell.modules():
            _widen(module)
    options = {"attention_mask": torch.ones_like(tokens_BS), "use_cache": False}
    return _streamed(shell, blocks, makes, dtype, lambda: shell(tokens_BS, **options).logits)


def _streamed(
    shell: nn.Module, blocks: str, makes: Mapping[str, Make], dtype: torch.dtype, run: Callable[[], Tensor]
) -> Tensor:
    """What `run` makes with `shell`, whose list `blocks` is on the meta device; the modules around it may be, too."""
    resident = {name: make().to(dtype) for name, make in makes.items() if not name.startswith(f"{blocks}.")}
    found = shell.load_state_dict(resident, strict=False, assign=True)
    tie: Any = getattr(shell, "tie_weights", lambda: None)
    tie()
    if found.unexpected_keys:
        raise ValueError(f"the model has no {found.unexpected_keys[0]}")
    for number, block in shell.get_submodule(blocks).named_children():
        prefix = f"{blocks}.{number}."
        of_block = {name.removeprefix(prefix): make for name, make in makes.items() if name.startswith(prefix)}
        block.register_forward_pre_hook(lambda module, _, of_block=of_block: _fill(module, of_block, dtype))
        block.register_forward_hook(lambda module, *_: module.to("meta") and None)
    missing = [name for name, value in shell.named_parameters() if value.is_meta and not name.startswith(f"{blocks}.")]
    if missing:
        raise ValueError(f"nothing makes {missing[0]}")
    shell.eval()
    with torch.inference_mode():
        return run()


def _fill(block: nn.Module, makes: Mapping[str, Make], dtype: torch.dtype) -> None:
    block.load_state_dict({name: make().to(dtype) for name, make in makes.items()}, assign=True)


def _widen(module: nn.Module) -> None:
    """Make a norm or a rotary table compute in the type of its input."""
    kind = type(module).__name__
    if kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        module.forward = MethodType(_rms_norm, module)
    elif kind.endswith("RotaryEmbedding"):
        module.forward = MethodType(_rotary, module)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _rotary(tables: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    theta, width = tables.config.rope_parameters["rope_theta"], 2 * tables.inv_freq.shape[0]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    angles = (position_ids[..., None].to(x.dtype) * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()
