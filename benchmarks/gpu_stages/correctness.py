"""Stage correctness: attention kernels in bf16 against the papers' formulas in float64, from the same bf16 inputs.

The error is the largest relative one of the heads and of all gradients, by norm; a gradient counts as a hundredth of the heads'
norm at least, since that of MHE-ADD's e^K is exactly zero. Torch's error is that of its own kernel on Q, K and V of all heads,
written out in bf16, without gradients that are exactly zero. A kernel passes if its error is at most LIMIT and at most RATIO
times torch's.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_contenders import Contender, NotHereError, Shape, build, refuse_fallback, upstream
from benchmarks.gpu_stages.stages import Case, Options, Row, SkippedError
from benchmarks.gpu_stages.timing import need_package, nvidia_smi
from model.positions.masks import AttentionMask

LIMIT = 0.03
RATIO = 3.0
ZERO = 1e-8  # of the heads' norm: what rounding in float64 leaves of a gradient that is zero
LEAST = 2.0**-9  # torch's error counts as this at least: half the distance of bf16 numbers
KERNELS = (
    ("mha", "sdpa"),
    ("mha", "math"),
    ("mqa", "sdpa"),
    ("mhe_add", "sdpa"),
    ("mhe_add", "math"),
    ("mhe_add", "shared_scores"),
    ("mhe_mul", "sdpa"),
    ("mhe_mul", "math"),
)
MASKS = ("causal", "alibi", "documents")


def cases(options: Options) -> list[Case]:
    """A reference is computed once for all kernels of a variant, which therefore follow each other."""
    lengths, widths = ((33,), (8,)) if options.tiny else ((33, 4096), (16, 32, 64))
    variants = dict.fromkeys(variant for variant, _ in KERNELS)
    found = [Case("compile", partial(compile_kernels, options, widths, lengths))]
    for head_dim, tokens, mask, variant in product(widths, lengths, MASKS, variants):
        shape = shape_of(options, head_dim, tokens, mask)
        for _, kernel in (pair for pair in KERNELS if pair[0] == variant):
            name = f"{variant} by {kernel}, d {head_dim}, T {tokens}, {mask}"
            found.append(Case(name, partial(compare, variant, kernel, mask, shape)))
    return found


def shape_of(options: Options, head_dim: int, tokens: int, mask: str) -> Shape:
    """Two sequences; 16 heads, so that the kernels of the other stages are compiled here."""
    heads = 4 if options.tiny else 16
    position = "alibi" if mask == "alibi" else "none"
    return Shape(heads, heads * head_dim, tokens, 2, "bfloat16", position, True, options.device)


def mask_of(shape: Shape, mask: str) -> AttentionMask:
    """Documents of unequal lengths, some within one tile of a kernel."""
    if mask != "documents":
        return AttentionMask()
    draw = torch.Generator().manual_seed(3)
    starts_BT = torch.rand(shape.batch, shape.tokens, generator=draw) < 8 / shape.tokens
    return AttentionMask(documents_BT=starts_BT.int().cumsum(1).to(shape.device))


def compile_kernels(options: Options, widths: Sequence[int], lengths: Sequence[int]) -> Iterator[Row]:
    """Compile Triton's kernels in several processes at once: one alone would take minutes for all.

    A GPU that only one process may open leaves no choice.
    """
    if options.device != "cuda":
        raise SkippedError("needs a GPU")
    need_package("triton")
    jobs = [(shape_of(options, *each), each[2]) for each in product(widths, lengths, ("causal", "documents"))]
    workers = 1 if exclusive() else min(len(jobs), len(os.sched_getaffinity(0)))
    if workers == 1:
        done = sum(map(run_once, jobs))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            done = sum(pool.map(run_once, jobs))
    yield {"configurations": done, "processes": workers}


def exclusive() -> bool:
    """Whether only one process at a time may open a GPU, as far as nvidia-smi knows."""
    return "exclusive" in (nvidia_smi("compute_mode") or "").lower()


def run_once(job: tuple[Shape, str]) -> bool:
    shape, mask = job
    build("mhe_add", "shared_scores", shape, mask_of(shape, mask)).once("fwd_bwd")
    torch.cuda.synchronize()
    refuse_fallback("shared_scores", shape.device, shape.dtype, shape.head_dim)
    return True


def compare(variant: str, kernel: str, mask: str, shape: Shape) -> Iterator[Row]:
    """One kernel. Torch's own may refuse a problem; then only LIMIT counts."""
    try:
        found = results(build(variant, kernel, shape, mask_of(shape, mask)))
    except NotHereError as why:
        raise SkippedError(str(why)) from None
    refuse_fallback(kernel, shape.device, shape.dtype, shape.head_dim)
    wanted, torch_error = reference(variant, mask, shape)
    error = worst(found, wanted)
    bound = LIMIT if torch_error is None else min(LIMIT, RATIO * max(torch_error, LEAST))
    row = {"variant": variant, "kernel": kernel, "head_dim": shape.head_dim, "tokens": shape.tokens, "mask": mask}
    yield row | {"heads": shape.heads, "error_size": error, "torch_error": torch_error, "ok": error <= bound}


@lru_cache(maxsize=1)
def reference(variant: str, mask: str, shape: Shape) -> tuple[list[Tensor], float | None]:
    """Heads and gradients in float64, and the error of torch's own kernel."""
    given = build(variant, "math", shape, mask_of(shape, mask))
    leaves = [leaf.detach().double().requires_grad_() for leaf in given.leaves]
    heads_SBW = formula(variant, leaves, shape, mask_of(shape, mask))
    upstream_SBW = upstream(heads_SBW.shape, torch.bfloat16, heads_SBW.device).double()
    wanted = gradients(heads_SBW, leaves, upstream_SBW)
    own = "sdpa" if variant == "mha" else "sdpa_expanded"
    try:
        found = results(build(variant, own, shape, mask_of(shape, mask)))
    except RuntimeError:
        return wanted, None
    pairs = [
        (one, exact) for one, exact in zip(found, wanted, strict=True) if float(exact.norm()) > ZERO * float(wanted[0].norm())
    ]
    return wanted, worst(*zip(*pairs, strict=True))


def formula(variant: str, leaves: Sequence[Tensor], shape: Shape, mask: AttentionMask) -> Tensor:
    """softmax(scale · Q_i K_iᵀ − m_i · distance) V_i of every head, (S, B, N·D)."""

    def heads_of(x_TBF: Tensor, parts: int) -> tuple[Tensor, ...]:
        """A projection whose heads hold `parts` vectors each → (B, heads, T, D) of each part."""
        return x_TBF.unflatten(-1, (-1, parts, shape.head_dim)).permute(3, 1, 2, 0, 4).unbind()

    embedded = variant.startswith("mhe_")
    q_BNTD, k_BNTD, v_BNTD = heads_of(leaves[0], 3) if embedded else (*heads_of(leaves[0], 1), *heads_of(leaves[1], 2))
    if embedded:
        e_query, e_key, e_value = (e_ND[:, None] for e_ND in leaves[1:])
        added = variant == "mhe_add"
        pairs = ((q_BNTD, e_query), (k_BNTD, e_key), (v_BNTD, e_value))
        q_BNTD, k_BNTD, v_BNTD = (x + e if added else x * (1 + e) for x, e in pairs)
    scores_BNTT = q_BNTD @ k_BNTD.transpose(2, 3) * shape.head_dim**-0.5
    place_T = torch.arange(shape.tokens, device=shape.device)
    distance_TT = place_T[:, None] - place_T
    if shape.position == "alibi":  # powers of two for powers of two of heads, as Press et al. 2022
        slopes_N = 2.0 ** (-8.0 / shape.heads * torch.arange(1, shape.heads + 1, device=shape.device, dtype=torch.float64))
        scores_BNTT = scores_BNTT - slopes_N[:, None, None] * distance_TT
    hidden = distance_TT < 0
    if mask.documents_BT is not None:
        hidden = hidden | (mask.documents_BT[:, None, :, None] != mask.documents_BT[:, None, None, :])
    heads_BNTD = scores_BNTT.masked_fill(hidden, -torch.inf).softmax(-1) @ v_BNTD
    return heads_BNTD.permute(2, 0, 1, 3).flatten(2)


def results(contender: Contender) -> list[Tensor]:
    heads_SBW: Tensor = contender.run()
    return gradients(heads_SBW, contender.leaves, upstream(heads_SBW.shape, heads_SBW.dtype, heads_SBW.device))


def gradients(heads_SBW: Tensor, leaves: Sequence[Tensor], upstream_SBW: Tensor) -> list[Tensor]:
    """The heads, then the gradient of each leaf, zero where it has none."""
    found: Any = torch.autograd.grad(heads_SBW, leaves, upstream_SBW, allow_unused=True)
    return [heads_SBW.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error, by norm; infinite where something is not a number."""
    least = 1e-2 * float(wanted[0].norm())
    errors = [
        float((one.double() - exact).norm()) / max(float(exact.norm()), least) for one, exact in zip(found, wanted, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")
