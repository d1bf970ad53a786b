"""The contenders of benchmarks/attention.py: one attention layer computed by different kernels, checked against the formula."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from benchmarks.arguments import variant_fields
from model.attention.faults import may_share_scores

if TYPE_CHECKING:
    import torch

    from configs.schema import ModelConfig
    from model.positions.masks import AttentionMask

WRITTEN_OUT = ("mha", "mqa", "mhe_add", "mhe_mul")  # those whose heads benchmarks write out by the papers' formulas
BACKENDS = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION"}
KERNELS = ("auto", "math", "sdpa", "shared_scores", "sdpa_expanded", "flex", *BACKENDS)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


class NotHereError(Exception):
    """Why a contender does not exist or cannot run on this machine."""


class WrongError(Exception):
    """How far a contender's results are from the formula."""


class FellBackError(Exception):
    """That torch's operators ran in the place of the Triton kernels."""


@dataclass(frozen=True)
class Shape:
    """One problem size."""

    heads: int
    width: int
    tokens: int
    batch: int
    dtype: str
    position: str
    causal: bool
    device: str

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class Contender:
    """A variant computed by a kernel: `run()` returns (S, B, N·D) from `leaves`, the layer's projections and parameters."""

    variant: str
    kernel: str
    shape: Shape
    config: ModelConfig
    run: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    chosen: str
    passes: tuple[str, ...] = ("fwd", "fwd_bwd")

    def once(self, which: str) -> None:
        """One timed run."""
        import torch

        if which == "fwd":
            with torch.no_grad():
                self.run()
        else:
            out = self.run()
            torch.autograd.grad(out, self.leaves, upstream(out.shape, out.dtype, out.device), allow_unused=True)

    def cuda_peak_bytes(self, which: str) -> int:
        """The most memory that one run holds on a GPU beyond its inputs."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.once(which)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@cache
def upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The gradient that a backward pass starts from, drawn once for each shape."""
    import torch

    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def build(variant: str, kernel: str, shape: Shape, mask: AttentionMask | None = None) -> Contender:
    """A contender whose inputs have unit variance and whose head embeddings have standard deviation 0.02.

    `variant`: a name, and fields of its own: mhe_add:num_seeds=4. `mask`: by default that of `shape.causal`. Raises
    NotHereError if the kernel does not apply to the variant or the device, or the variant not to the shape.
    """
    import torch

    from model.attention.registry import attention_variant, rotary_widths
    from model.positions.masks import AttentionMask
    from model.positions.positions import make_positions

    own_kernel = kernel if kernel in ("auto", "math", "shared_scores") else "sdpa"
    config = config_of(variant, shape, own_kernel)
    _refuse(config, variant, kernel, shape)
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    draw = torch.Generator(device).manual_seed(0)  # on the device: a CPU takes seconds for the inputs of a large problem

    def leaf(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=draw, device=device) * std).to(dtype).requires_grad_()

    declared = attention_variant(config.pattern[0]).projections(config)
    projected = {
        name: leaf(shape.tokens, shape.batch, one.parts * one.width) for name, one in declared.items() if one.kind != "expand"
    }
    seen, widths = mask or AttentionMask(shape.causal), rotary_widths(config)
    positions = make_positions(config, shape.tokens, 0, dtype, device, seen, rotary_widths=widths)
    module = _module(config, leaf, device, dtype)
    leaves = [*projected.values(), *module.parameters()]
    run = _way(kernel, projected, module, positions, shape)
    return Contender(variant, kernel, shape, config, run, leaves, _chosen(config, shape) if kernel == "auto" else kernel)


def config_of(variant: str, shape: Shape, kernel: str) -> ModelConfig:
    """The configuration of the layer. Raises NotHereError if there can be none."""
    from pydantic import ValidationError

    from configs.schema import ModelConfig
    from model.attention.usual import needed
    from model.faults import model_faults

    sizes = {"hidden_size": shape.width, "num_layers": 1, "num_heads": shape.heads, "position": shape.position}
    name, fields = variant_fields(variant)
    try:
        config = ModelConfig.model_validate({"attention": name, **sizes, "attention_kernel": kernel, **fields})
    except ValidationError as error:
        raise NotHereError(one_line(error)) from error
    config = config.model_copy(update=needed(config))
    faults = model_faults({"model": config})
    if faults and not (kernel == "shared_scores" and faults[0].key == "model.attention_kernel"):
        raise NotHereError(str(faults[0]))
    return config


def _refuse(config: ModelConfig, variant: str, kernel: str, shape: Shape) -> None:
    if kernel == "shared_scores" and not may_share_scores(config):
        raise NotHereError("only the heads of mhe_add share their scores")
    if kernel in ("sdpa_expanded", "flex") and variant not in WRITTEN_OUT:
        raise NotHereError(f"written for {', '.join(WRITTEN_OUT)} only")
    if kernel == "sdpa_expanded" and variant == "mha":
        raise NotHereError("its heads have their own keys and values")
    if kernel in BACKENDS and shape.device == "cpu":
        raise NotHereError("a CUDA backend")


def _module(config: ModelConfig, leaf: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """The attention module without the projections of hidden states; what else it has is drawn by `leaf`."""
    import torch
    from torch import nn

    from model.attention.registry import attention_class
    from model.layers import Layers

    class NoLinears(Layers):
        def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
            return nn.Identity()

        def key_value(self, in_features: int, heads: int, width: int, bias: bool) -> nn.Module:
            return nn.Identity()

        def shared(self, in_features: int, seeds: int, width: int, bias: bool) -> nn.Module:
            return nn.Identity()

        def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
            return nn.Identity()

    module = attention_class(config)(config, NoLinears()).to(device, dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:  # projections of latents keep unit variance; head embeddings are small
                std = parameter.shape[1] ** -0.5 if name.endswith(".weight") else 0.02
                parameter.copy_(leaf(*parameter.shape, std=std))
    return module


def _chosen(config: ModelConfig, shape: Shape) -> str:
    """The kernel that `auto` takes."""
    import torch

    from model.attention.kernels import choose

    if not may_share_scores(config):
        return "sdpa"
    heads = shape.heads // config.num_seeds
    sizes: dict[str, Any] = {"heads": heads, "head_dim": shape.head_dim, "queries": shape.tokens, "keys": shape.tokens}
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    return choose("auto", shares_scores=True, device=device, dtype=dtype, **sizes).kernel


def _way(kernel: str, projected: Any, module: Any, positions: Any, shape: Shape) -> Callable[[], Any]:
    """The function that computes all heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model.attention.kernels import attend
    from model.heads import merge_heads

    def qkv() -> list[Any]:
        return [module.split_queries(projected, positions), *module.split_keys_values(projected, positions)]

    if kernel == "flex":
        return _flex(qkv, module, positions, shape)
    if kernel == "sdpa_expanded":

        def expanded() -> Any:
            q, k, v = qkv()
            q_BNSD, k_BNSD, v_BNSD = written_out(q, k, v, module, shape.heads)
            return merge_heads(attend(q_BNSD, k_BNSD, v_BNSD, positions, scale=module.scale, kernel="sdpa"))

        return expanded
    forced = partial(sdpa_kernel, getattr(SDPBackend, BACKENDS[kernel])) if kernel in BACKENDS else nullcontext
    module.project = lambda *_: projected

    def run() -> Any:
        with forced():
            return module(None, positions)

    return run


def written_out(q: Any, k: Any, v: Any, module: Any, heads: int) -> list[Any]:
    """Q, K and V of all heads, materialized by the formulas of the papers."""
    own = module.own_rows()
    if not own:
        return [x.expand(-1, heads, -1, -1).contiguous() for x in (q, k, v)]
    e_query, e_key, e_value = (e_ND[:, None] for e_ND in own.values())
    pairs = ((q, e_query), (k, e_key), (v, e_value))
    return [x + e for x, e in pairs] if type(module).__name__ == "MHEAdd" else [x * (1 + e) for x, e in pairs]


def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, to be compiled for one contender and size.

    In one cache, more than 8 of them would reach torch's limit, past which fullgraph fails instead of running uncompiled.
    """
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if "isolate_recompiles" in signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    else:  # before torch 2.13
        torch._dynamo.config.recompile_limit = sys.maxsize
    compiled: Callable[..., Any] = torch.compile(flex_attention, **options)
    return compiled


def _flex(qkv: Callable[[], list[Any]], module: Any, positions: Any, shape: Shape) -> Callable[[], Any]:
    """FlexAttention, compiled. MHE-ADD passes its key bias as a score modification; other variants materialize all heads."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    from model.heads import merge_heads

    compiled = _compiled_flex()
    mask, slopes = None, positions.slopes_N
    if shape.causal:
        mask = create_block_mask(lambda b, h, t, j: t >= j, None, None, shape.tokens, shape.tokens, shape.device)
    shares = type(module).__name__ == "MHEAdd"

    def run() -> Any:
        if shape.device == "cpu" and torch.is_grad_enabled():
            # Raised here because the compiler, once it has failed, runs the function uncompiled from then on.
            raise NotImplementedError("FlexAttention has no backward pass on CPUs")
        bias, (q, k, v) = None, qkv()
        if shares:
            bias = torch.einsum("nd,btd->bnt", module.query_embedding, k[:, 0]) * shape.head_dim**-0.5
            tensors = [x.expand(-1, shape.heads, -1, -1) for x in (q, k, v)]
        else:
            tensors = written_out(q, k, v, module, shape.heads)
        if not torch.is_grad_enabled():
            tensors = [x.detach() for x in tensors]  # on CPUs it rejects tensors that require gradients

        def modify(score: Any, b: Any, h: Any, t: Any, j: Any) -> Any:
            score = score if bias is None else score + bias[b, h, j]
            return score if slopes is None else score - slopes[h] * (t - j)

        score_mod = modify if bias is not None or slopes is not None else None
        out = compiled(tensors[0], tensors[1], tensors[2], block_mask=mask, score_mod=score_mod)
        return merge_heads(module.head_outputs(out, module.own_rows()) if shares else out)

    return run


def check(contender: Contender) -> None:
    """Compare with the formula at a small size. Raises NotHereError if the contender cannot run, WrongError if it is wrong."""
    import torch

    small = Shape(**{**vars(contender.shape), "tokens": min(contender.shape.tokens, 640)})
    # `chosen` instead of `auto`, which may choose a different kernel at the small size than at the timed one.
    found, wanted = (build(contender.variant, kernel, small) for kernel in (contender.chosen, "math"))
    results = []
    for one in (found, wanted):
        try:
            with torch.no_grad():
                values = [one.run()]
        except Exception as error:  # of any library, such as a compiler's own
            raise NotHereError(one_line(error)) from error
        try:
            out = one.run()
            values += torch.autograd.grad(out, one.leaves, upstream(out.shape, out.dtype, out.device), allow_unused=True)
        except Exception:
            contender.passes = ("fwd",)
        results.append(values)
    nothing = torch.zeros((), device=small.device)
    for a, b in zip(*results, strict=len(contender.passes) == 2):
        exact = nothing if b is None else b
        off, size = float(((nothing if a is None else a) - exact).norm()), float(exact.norm())
        if not off <= TOLERANCE[small.dtype] * max(size, 1e-2 * float(results[1][0].norm())):
            raise WrongError(f"off by {off:.2e} of {size:.2e}")
    if contender.chosen == "shared_scores" and falls_back(small.device, small.dtype, small.head_dim):
        raise NotHereError("its Triton kernels failed, torch's operators would be measured")


def falls_back(device: str, dtype: str, head_dim: int) -> bool:
    """Whether shared scores run on torch's operators where Triton kernels should. Only a run before shows that they fail."""
    import torch

    from model.attention.shared_scores.operator import runs_on_triton

    place = torch.empty(0, device=device).device  # with its number
    return expects_triton(device) and not runs_on_triton(place, getattr(torch, dtype), head_dim)


def expects_triton(device: str) -> bool:
    """On CPUs torch's operators are the kernel that is meant."""
    return device == "cuda"


def refuse_fallback(kernel: str, device: str, dtype: str, head_dim: int) -> None:
    """After a run by `kernel`: raises FellBackError if torch's operators have taken over."""
    if kernel == "shared_scores" and falls_back(device, dtype, head_dim):
        raise FellBackError(f"torch's operators ran, the Triton kernels do not: {dtype}, head_dim {head_dim}")


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100]}" if lines else type(error).__name__


def failed(contender: Contender, error: str, which: str) -> dict[str, Any]:
    """The row of a contender without figures; the fault is printed, too."""
    print(f"{contender.variant} by {contender.kernel} failed: {error}", file=sys.stderr)
    sizes = {**vars(contender.shape), "head_dim": contender.shape.head_dim}
    return {"variant": contender.variant, "kernel": contender.kernel, "pass": which, **sizes, "error": error}


def contenders(
    shape: Shape, variants: list[str], kernels: list[str], said: set[str], wrong: list[dict[str, Any]]
) -> Iterator[Contender]:
    """Contenders that exist here and are correct; why each of the others is left out is printed once.

    The rows of those whose results are wrong are added to `wrong`.
    """
    import torch

    for variant in variants:
        for kernel in kernels:
            try:
                contender = build(variant, kernel, shape)
                check(contender)
            except (NotHereError, torch.OutOfMemoryError) as error:
                text = f"left out: {variant} by {kernel}: {error}"
                if text not in said:
                    print(text, file=sys.stderr)
                said.add(text)
                continue
            except WrongError as error:
                wrong += [failed(contender, f"wrong, {error}", which) for which in contender.passes]
                continue
            if len(contender.passes) == 1:
                print(f"{variant} by {kernel}: forward only, its backward pass does not run here", file=sys.stderr)
            yield contender
