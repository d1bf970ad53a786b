"""The Triton kernels of shared scores against explicit softmax in float64.

On a GPU they run compiled. Elsewhere Triton's interpreter runs them, which must be set before Triton is imported: each test
then runs in a forked process that sets it (see tests/ranks.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from importlib.metadata import version
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.shared_scores import operator as shared_scores
from model.attention.shared_scores import triton_calls
from model.attention.shared_scores.triton_calls import Tiles
from model.positions.alibi import alibi_slopes
from model.positions.masks import AttentionMask
from tests.ranks import run_forked

CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
DIRECT = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
SMALL = Tiles(rows=32, keys=16, columns=32, backward_rows=16, key_rows=16, backward_columns=32, segment=2, warps=4)
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1"}
NAMES = ("heads", "dq", "dk", "dv", "de_query", "de_value")

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


def interpretable() -> bool:
    """False where the interpreter makes numbers of arrays with one element, as it did before Triton 3.7: NumPy 2.4 does not."""
    triton, numpy = ([int(number) for number in version(name).split(".")[:2]] for name in ("triton", "numpy"))
    return triton >= [3, 7] or numpy < [2, 4]


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs here on a GPU, otherwise in a process with Triton's interpreter."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        if DIRECT:
            test(**arguments)
        elif not interpretable():
            pytest.skip("Triton's interpreter does not run with this NumPy")
        else:
            run_forked(_by_name, 1, test.__name__, arguments, environment=INTERPRETED, seconds=100)

    return needs_triton(run)


def _by_name(rank: int, name: str, arguments: dict[str, Any]) -> None:
    """In a forked process, where DIRECT is true."""
    globals()[name](**arguments)


@dataclass
class Problem:
    """Inputs of one call; `slopes`, `valid` and `documents` as the kernels take them."""

    q_BSD: Tensor
    k_BTD: Tensor
    v_BTD: Tensor
    e_query_ND: Tensor
    e_value_ND: Tensor
    slopes_N: Tensor | None = None
    valid_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    causal: bool = True

    @property
    def scale(self) -> float:
        return self.q_BSD.shape[2] ** -0.5

    def inputs(self) -> list[Tensor]:
        return [self.q_BSD, self.k_BTD, self.v_BTD, self.e_query_ND, self.e_value_ND]

    def forward(self, tiles: Tiles | None = SMALL) -> tuple[Tensor, Tensor]:
        masks = (self.slopes_N, self.valid_BT, self.documents_BT)
        tensors = (self.q_BSD, self.k_BTD, self.v_BTD, self.e_query_ND, self.e_value_ND)
        return triton_calls.forward(*tensors, *masks, self.scale, self.causal, tiles=tiles)

    def backward(self, d_heads_SBND: Tensor, results: tuple[Tensor, Tensor], tiles: Tiles | None) -> tuple[Tensor, ...]:
        masks = (self.slopes_N, self.valid_BT, self.documents_BT)
        tensors = (self.q_BSD, self.k_BTD, self.v_BTD, self.e_query_ND, self.e_value_ND)
        return triton_calls.backward(d_heads_SBND, *tensors, *masks, *results, self.scale, self.causal, tiles=tiles)

    def visible_BST(self) -> Tensor:
        queries, keys = self.q_BSD.shape[1], self.k_BTD.shape[1]
        visible = torch.ones(self.q_BSD.shape[0], queries, keys, dtype=torch.bool, device=self.q_BSD.device)
        if self.causal:
            visible = visible.tril(keys - queries)
        if self.valid_BT is not None:
            visible = visible & self.valid_BT[:, None, :]
        if self.documents_BT is not None:
            visible = visible & (self.documents_BT[:, keys - queries :, None] == self.documents_BT[:, None, :])
        return visible

    def alibi_NST(self, dtype: torch.dtype) -> Tensor:
        queries, keys = self.q_BSD.shape[1], self.k_BTD.shape[1]
        place = torch.arange(keys, device=self.q_BSD.device)
        slopes_N = torch.zeros(len(self.e_query_ND)) if self.slopes_N is None else self.slopes_N
        return -slopes_N.to(place.device, dtype)[:, None, None] * (place[keys - queries :, None] - place)


def problem(
    queries: int,
    keys: int,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    embedding: float = 0.3,
    alibi: bool = False,
    batch: int = 2,
    **masks: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(7)
    shapes = [(batch, queries, width), (batch, keys, width), (batch, keys, width), (heads, width), (heads, width)]
    tensors = [
        torch.randn(shape, generator=generator) * size for shape, size in zip(shapes, (1, 1, 1, embedding, 0.3), strict=True)
    ]
    slopes_N = torch.tensor(alibi_slopes(heads), device=DEVICE) if alibi else None
    q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND = (x.to(DEVICE, dtype) for x in tensors)
    return Problem(q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND, slopes_N, **masks)


def padding(batch: int, keys: int) -> Tensor:
    """Padding: a random fifth of the keys, the first ones and a full tile."""
    valid_BT = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) > 0.2
    valid_BT[:, :3] = valid_BT[:, 16:32] = False
    return valid_BT.to(DEVICE)


def documents(batch: int, keys: int) -> Tensor:
    ends = torch.tensor([[keys // 3], [keys // 2]])[:batch]
    return (torch.arange(keys) >= ends).long().to(DEVICE)


def explicit(x: Problem, inputs: list[Tensor]) -> Tensor:
    """Heads (S, B, N, D) by the definition, one head after the other."""
    q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND = inputs
    visible_BST, alibi_NST = x.visible_BST(), x.alibi_NST(q_BSD.dtype)
    heads = []
    for i in range(len(e_query_ND)):
        scores_BST = x.scale * (q_BSD + e_query_ND[i]) @ k_BTD.transpose(1, 2) + alibi_NST[i]
        exps_BST = (scores_BST - scores_BST.masked_fill(~visible_BST, -1e9).amax(2, keepdim=True)).clamp(
            max=0
        ).exp() * visible_BST
        heads.append(exps_BST / exps_BST.sum(2, keepdim=True).clamp(min=1e-300) @ v_BTD + e_value_ND[i])
    return torch.stack(heads, 2).transpose(0, 1)


def fused(x: Problem, inputs: list[Tensor]) -> Tensor:
    """The same through torch's scaled dot product attention, every head with its own queries."""
    q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND = inputs
    visible_B1ST = x.visible_BST()[:, None]
    seen_B1S1 = visible_B1ST.any(3, keepdim=True)
    bias = x.alibi_NST(torch.float32)[None].masked_fill(~visible_B1ST & seen_B1S1, -math.inf).to(q_BSD.dtype)
    q_BNSD = q_BSD[:, None] + e_query_ND[:, None]
    k_BNTD, v_BNTD = (y[:, None].expand(-1, len(e_query_ND), -1, -1) for y in (k_BTD, v_BTD))
    heads_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNTD, v_BNTD, attn_mask=bias, scale=x.scale)
    return (torch.where(seen_B1S1, heads_BNSD, 0) + e_value_ND[:, None]).permute(2, 0, 1, 3)


def upstream(heads_SBND: Tensor) -> Tensor:
    return torch.randn(heads_SBND.shape, generator=torch.Generator().manual_seed(11)).to(heads_SBND.device, torch.bfloat16)


def by_autograd(function: Any, x: Problem, dtype: torch.dtype) -> list[Tensor]:
    inputs = [y.to(dtype).detach().requires_grad_() for y in x.inputs()]
    heads_SBND = function(x, inputs)
    return [heads_SBND.detach(), *torch.autograd.grad(heads_SBND, inputs, upstream(heads_SBND).to(dtype))]


def by_kernels(x: Problem, tiles: Tiles | None = SMALL) -> list[Tensor]:
    heads_SBND, lse_SBN = x.forward(tiles)
    assert heads_SBND.is_contiguous()
    assert lse_SBN.dtype == torch.float32
    d_heads_SBND = upstream(heads_SBND).to(heads_SBND.dtype)
    gradients = x.backward(d_heads_SBND, (heads_SBND, lse_SBN), tiles)
    assert [y.dtype for y in gradients] == [y.dtype for y in x.inputs()]
    return [heads_SBND, *gradients]


def magnitudes(x: Problem) -> list[Tensor]:
    """The sums that make heads and gradients, over the absolute values of their terms: what rounding is relative to."""
    q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND = (y.double() for y in x.inputs())
    heads, visible_BST = [], x.visible_BST()
    dS_BST, dv_BTD, de_query = torch.zeros_like(visible_BST, dtype=torch.float64), torch.zeros_like(v_BTD), []
    d_heads_SBND = upstream(q_BSD.new_empty(q_BSD.shape[1], q_BSD.shape[0], *e_query_ND.shape)).double()
    for i, alibi_ST in enumerate(x.alibi_NST(torch.float64)):
        scores_BST = x.scale * (q_BSD + e_query_ND[i]) @ k_BTD.mT + alibi_ST
        weights_BST = scores_BST.masked_fill(~visible_BST, -1e9).softmax(2) * visible_BST
        d_head_BSD = d_heads_SBND[:, :, i].transpose(0, 1).abs()
        heads.append(weights_BST @ v_BTD.abs() + e_value_ND[i].abs())
        d_weights_BST = d_head_BSD @ v_BTD.abs().mT
        own_BST = weights_BST * (d_weights_BST + (weights_BST * d_weights_BST).sum(2, keepdim=True))
        dS_BST, dv_BTD = dS_BST + own_BST, dv_BTD + weights_BST.mT @ d_head_BSD
        de_query.append(x.scale * (own_BST @ k_BTD.abs()).sum((0, 1)))
    dk_BTD = dS_BST.mT @ (q_BSD.abs() + e_query_ND.abs().amax(0))
    heads_SBND, de_value_ND = torch.stack(heads, 2).transpose(0, 1), d_heads_SBND.abs().sum((0, 1))
    return [heads_SBND, x.scale * dS_BST @ k_BTD.abs(), x.scale * dk_BTD, dv_BTD, torch.stack(de_query), de_value_ND]


def assert_accurate(x: Problem, tiles: Tiles | None = SMALL) -> list[Tensor]:
    """Heads and gradients, which are returned, have at most twice the error of torch's attention in the same type.

    Rounding of terms is added: one in bfloat16, in float32 those of exponents up to 64 from the reference.
    """
    dtype = x.q_BSD.dtype
    rounding = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    exact, sizes, results = by_autograd(explicit, x, torch.float64), magnitudes(x), by_kernels(x, tiles)
    for name, *tensors in zip(NAMES, results, by_autograd(fused, x, dtype), exact, sizes, strict=True):
        assert tensors[0].isfinite().all(), name
        parts = [y.double().unbind(-2) if name in ("heads", "de_query", "de_value") else [y.double()] for y in tensors]
        for ours, theirs, truth, size in zip(*parts, strict=True):
            assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + rounding * size.norm(), name
    return results


def test_without_a_gpu_only_the_interpreter_makes_triton_available() -> None:
    assert triton_calls.is_available(torch.device(DEVICE)) == (TRITON and DIRECT)


@runs_kernels
def test_triton_is_available_where_kernels_run() -> None:
    assert triton_calls.is_available(torch.device(DEVICE))


@runs_kernels
@pytest.mark.parametrize(
    ("width", "heads", "dtype"),
    [
        *[(width, heads, torch.float32) for width, heads in product((1, 3, 8, 16, 64), (1, 5, 16)) if (width + heads) % 2],
        *[(width, 5, torch.bfloat16) for width in (1, 3, 64)],
    ],
)
def test_widths_and_numbers_of_heads(width: int, heads: int, dtype: torch.dtype) -> None:
    tiles = Tiles(rows=32, keys=16, columns=4 * width, backward_rows=32, key_rows=32, backward_columns=4 * width, segment=2)
    assert_accurate(problem(21, 37, heads, width, dtype, alibi=heads == 5, batch=1), tiles)


@runs_kernels
@pytest.mark.parametrize(
    ("causal", "padded", "packed", "alibi"),
    [options for options in product([True, False], repeat=4) if sum(options) % 2 == 0],  # all triples of values
)
def test_masks(causal: bool, padded: bool, packed: bool, alibi: bool) -> None:
    masks: dict[str, Any] = {
        "valid_BT": padding(2, 45) if padded else None,
        "documents_BT": documents(2, 45) if packed else None,
    }
    assert_accurate(problem(29, 45, 3, 8, alibi=alibi, causal=causal, **masks))


@runs_kernels
@pytest.mark.parametrize(
    ("embedding", "dtype", "masked"),
    [
        (12.0, torch.bfloat16, True),
        (40.0, torch.float32, True),
        (150.0, torch.float32, False),
        (150.0, torch.bfloat16, True),
        pytest.param(12.0, torch.float32, False, marks=pytest.mark.thorough),
        pytest.param(40.0, torch.bfloat16, False, marks=pytest.mark.thorough),
        pytest.param(150.0, torch.float32, True, marks=pytest.mark.thorough),
    ],
)
def test_biases_beyond_what_a_reference_allows(embedding: float, dtype: torch.dtype, masked: bool) -> None:
    """Key biases over ±30, ±100 and ±400: segments, then tiles, then no reference at all is safe.

    With the thorough cases every pair of size, type and masks; heads computed alone with masks in both types.
    """
    if masked:
        x = problem(29, 45, 5, 8, dtype, embedding=embedding, alibi=True, valid_BT=padding(2, 45), causal=False)
    else:
        x = problem(37, 53, 5, 8, dtype, embedding=embedding, batch=1)
    assert_accurate(x)


@runs_kernels
def test_some_heads_of_a_group_beyond_their_range() -> None:
    x = problem(45, 61, 8, 4, batch=1)
    x.e_query_ND[2::3] *= 300
    assert_accurate(x)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_with_many_heads(dtype: torch.dtype) -> None:
    assert_accurate(
        problem(100, 100, 128, 2, dtype, alibi=True, batch=1), Tiles(rows=64, keys=32, columns=256, backward_columns=256)
    )


@runs_kernels
@pytest.mark.thorough
def test_alibi_over_long_distances() -> None:
    """Slopes times distances of thousands: numbers near the diagonal keep their precision."""
    x = problem(20, 2000, 3, 4, alibi=True, batch=1)
    x.slopes_N = torch.tensor([0.9, 0.06, 0.004], device=DEVICE)
    assert_accurate(x, Tiles(rows=32, keys=64, columns=16, backward_rows=32, key_rows=32, backward_columns=16))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [True, False])
def test_attention_sink(dtype: torch.dtype, alibi: bool) -> None:
    """Every query's scores have a dominant maximum at the first token."""
    x = problem(45, 45, 4, 8, dtype, alibi=alibi, batch=1)
    x.q_BSD[..., 0] = 9
    x.k_BTD[:, 0, 0] = 20
    assert_accurate(x)


@runs_kernels
@pytest.mark.parametrize("embedding", [0.3, 150.0])
def test_queries_that_see_no_key(embedding: float) -> None:
    valid_BT = torch.ones(2, 37, dtype=torch.bool, device=DEVICE)
    valid_BT[0, :20] = False
    valid_BT[1] = False
    x = problem(37, 37, 3, 8, valid_BT=valid_BT, embedding=embedding)
    heads_SBND, dq_BSD, *_ = assert_accurate(x)
    assert torch.equal(heads_SBND[:, 1], x.e_value_ND.expand(37, -1, -1))
    assert x.forward()[1][:20, 0].isposinf().all()
    assert not dq_BSD[0, :20].any()
    assert not dq_BSD[1].any()


@runs_kernels
def test_views_and_wide_embeddings() -> None:
    """q, k and v as columns of one projection, embeddings in float32 beside bfloat16."""
    qkv_BTX = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    x = problem(24, 24, 5, 8)
    x.q_BSD, x.k_BTD, x.v_BTD = qkv_BTX.split(8, dim=2)
    y = Problem(x.q_BSD.clone(), x.k_BTD.clone(), x.v_BTD.clone(), x.e_query_ND, x.e_value_ND)
    for ours, same, truth in zip(by_kernels(x), by_kernels(y), by_autograd(explicit, x, torch.float64), strict=True):
        assert torch.equal(ours, same)
        assert (ours - truth).norm() <= 1e-2 * truth.norm()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_tiles(dtype: torch.dtype) -> None:
    assert_accurate(problem(70, 140, 9, 16, dtype, batch=1, alibi=True), tiles=None)


@runs_kernels
@pytest.mark.thorough
def test_results_do_not_depend_on_tiles() -> None:
    x = problem(40, 61, 5, 8, documents_BT=documents(2, 61))
    other = Tiles(
        **{f.name: getattr(SMALL, f.name) for f in fields(Tiles)} | {"rows": 16, "keys": 32, "columns": 64, "segment": 8}
    )
    for one, another in zip(by_kernels(x), by_kernels(x, other), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=2e-5)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_operator_on_these_kernels_equals_that_on_blocks(dtype: torch.dtype, tolerance: float) -> None:
    """Arguments, saved tensors and gradients are passed correctly, with ALiBi, documents and padding."""
    x = problem(40, 50, 5, 8, dtype, alibi=True, valid_BT=padding(2, 50), documents_BT=documents(2, 50))
    results = []
    for on_triton in (True, False):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in x.inputs()]
        mask = AttentionMask(True, x.valid_BT, x.documents_BT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_scores, "runs_on_triton", lambda *_, answer=on_triton: answer)
            out = shared_scores.shared_scores(*leaves, scale=x.scale, slopes_N=x.slopes_N, mask=mask)
            results.append([out, *torch.autograd.grad(out.float().cos().sum(), leaves)])
    for name, one, another in zip(NAMES, *results, strict=True):
        assert (one.float() - another.float()).norm() <= tolerance * another.float().norm(), name


@runs_kernels
def test_other_types_and_widths_are_refused() -> None:
    for wrong, fault in ((problem(4, 4, 2, 8, torch.float64), "float64"), (problem(4, 4, 2, 300), "head_dim 300")):
        with pytest.raises(ValueError, match=fault):
            wrong.forward()
