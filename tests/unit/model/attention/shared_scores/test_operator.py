"""The shared-scores kernel: against the formula in float64, against torch on numerically hard inputs, and its guarantees."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.attention.shared_scores import blocks
from model.attention.shared_scores.operator import shared_scores
from model.positions.alibi import alibi_slopes
from model.positions.masks import AttentionMask

NAMES = ("heads", "dq", "dk", "dv", "de_query", "de_value")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    queries: int, keys: int, heads: int, width: int, size: float = 0.3, batch: int = 2, dtype: torch.dtype = torch.float64
) -> Inputs:
    """q, k, v of unit size and head embeddings of `size`."""
    draw = torch.Generator().manual_seed(queries * 1000 + keys + heads + width)
    shapes = [(batch, queries, width), (batch, keys, width), (batch, keys, width), (heads, width), (heads, width)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    tensors[3] *= size
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_query: Tensor,
    e_value: Tensor,
    slopes: Tensor | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """MHE-ADD head by head, (S, B, N, D); e^K is left out, which softmax cannot see."""
    mask = mask or AttentionMask()
    (batch, queries, width), keys = q.shape, k.shape[1]
    outs = []
    for b, head in itertools.product(range(batch), range(len(e_query))):
        scores = (q[b] + e_query[head]) @ k[b].T / math.sqrt(width)
        t, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
        if slopes is not None:
            scores = scores - slopes[head].to(scores.dtype) * (t - j)
        visible = torch.ones(queries, keys, dtype=torch.bool)
        if mask.causal:
            visible = visible & (j <= t)
        if mask.valid_BT is not None:
            visible = visible & mask.valid_BT[b]
        if mask.documents_BT is not None:
            visible = visible & (mask.documents_BT[b][t] == mask.documents_BT[b][j])
        sees = visible.any(1, keepdim=True)
        weights = scores.masked_fill(~visible & sees, -math.inf).softmax(1) * sees
        outs.append(weights @ v[b] + e_value[head])
    return torch.stack(outs).view(batch, len(e_query), queries, width).permute(2, 0, 1, 3)


def results(run: Any, tensors: Inputs) -> list[Tensor]:
    """Output and gradients, in float64."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, upstream))]


def assert_equals_formula(tensors: Inputs, slopes: Tensor | None = None, mask: AttentionMask | None = None) -> None:
    scale = tensors[0].shape[2] ** -0.5
    actual = results(partial(shared_scores, scale=scale, slopes_N=slopes, mask=mask), tensors)
    expected = results(partial(formula, slopes=slopes, mask=mask), tensors)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture(params=["usual", "tiny"])
def tile_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual tiles, or tiles so small that every loop of the kernel iterates even with a few tokens."""
    if request.param == "tiny":
        sizes = {"KEY_TILE": 24, "FULL_ROWS": 16, "DIAGONAL_ROWS": 8, "SMALLEST_TILE": 4, "TILES": (12, 4)}
        for name, size in sizes.items():
            monkeypatch.setattr(blocks, name, size)


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (50, 50), (33, 60), (1, 40)])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [0.3, 30.0, 300.0])  # of embeddings: one reference, several, heads by themselves
def test_equals_the_formula(queries: int, keys: int, width: int, causal: bool, size: float) -> None:
    assert_equals_formula(inputs(queries, keys, 5, width, size), mask=AttentionMask(causal))


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [0.3, 300.0])
@pytest.mark.parametrize("steep", [1, 40])
def test_alibi(causal: bool, size: float, steep: float) -> None:
    slopes = torch.tensor(alibi_slopes(6), dtype=torch.float64) * steep
    assert_equals_formula(inputs(60, 70, 6, 4, size), slopes, AttentionMask(causal))


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [0.3, 30.0, 300.0])
@pytest.mark.parametrize("alibi", [True, False])
def test_padding_and_documents(causal: bool, size: float, alibi: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    valid = torch.rand(2, 70, generator=draw) > 0.4
    valid[0, :30], valid[1, 40:] = False, False  # left and right padding; the first queries of row 0 see nothing
    documents = torch.tensor([[0] * 25 + [1] * 3 + [2] * 42, [5] * 70])
    slopes = torch.tensor(alibi_slopes(6), dtype=torch.float64) if alibi else None
    for mask in (
        AttentionMask(causal, valid_BT=valid),
        AttentionMask(causal, documents_BT=documents),
        AttentionMask(causal, valid_BT=valid, documents_BT=documents),
    ):
        assert_equals_formula(inputs(60, 70, 6, 4, size), slopes, mask)


def test_long_sequences_with_the_usual_tiles() -> None:
    for width, size in ((4, 0.3), (2, 100.0)):
        assert_equals_formula(inputs(1100, 1234, 3, width, size, batch=1))


def test_heads_are_grouped_by_the_range_of_their_biases() -> None:
    keys = 1024
    k_DT = torch.linspace(0, 1, keys)[None]  # biases rise evenly, so a range is proportional to the number of keys
    e_ND = torch.tensor([[1.0], [200.0], [60.0], [900.0], [1e5], [-1.0]])
    found = [(part.heads, part.tile, part.alone) for part in blocks.plan(torch.zeros(1, 8), k_DT, e_ND, None)]
    assert [(tile, alone) for _, tile, alone in found] == [(None, False), (256, False), (64, False), (None, True)]
    assert str(found[0][0]) == str(torch.tensor([0, 2, 5]))
    assert [heads for heads, *_ in found[1:]] == [slice(1, 2), slice(3, 4), slice(4, 5)]


def as_torch_attention(slopes: Tensor | None, mask: AttentionMask) -> Any:
    """The same heads as multi-query attention by torch's fused kernel."""

    def run(q: Tensor, k: Tensor, v: Tensor, e_query: Tensor, e_value: Tensor) -> Tensor:
        queries, keys = q.shape[1], k.shape[1]
        bias = None
        if slopes is not None:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf).to(q.dtype)[None]
        many_k, many_v = (x[:, None].expand(-1, len(e_query), -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q[:, None] + e_query[:, None], many_k, many_v, attn_mask=bias, is_causal=bias is None and mask.causal
        )
        return (out + e_value[:, None]).permute(2, 0, 1, 3)

    return run


def spread_biases(size: float, dtype: torch.dtype) -> Inputs:
    """Embeddings scaled until the key biases span ±size."""
    q, k, v, e_query, e_value = inputs(300, 300, 12, 16, 1.0, batch=1, dtype=torch.float64)
    bias = (e_query @ k[0].T / 4).detach()
    with torch.no_grad():
        e_query *= size / bias.abs().max()
    return tuple(x.detach().to(dtype).requires_grad_() for x in (q, k, v, e_query, e_value))  # type: ignore[return-value]


def sink(height: float, dtype: torch.dtype) -> Inputs:
    """Every query's score of the first key lies about `height` above the others."""
    tensors = inputs(300, 300, 12, 16, 0.5, batch=1, dtype=torch.float64)
    with torch.no_grad():
        tensors[0][:, :, 0] += 10
        tensors[1][:, 0, 0] += height / 2.5
    return tuple(x.detach().to(dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]


def error(actual: Tensor, exact: Tensor, size: float = 0.0) -> float:
    return float((actual - exact).norm().detach() / max(float(exact.detach().norm()), size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "biases ±20", "biases ±200", "sink 6", "sink 60", "alibi"])
def test_no_less_exact_than_torch_where_numbers_are_hard(case: str, dtype: torch.dtype) -> None:
    slopes = torch.tensor(alibi_slopes(12)) if case == "alibi" else None
    if case in ("plain", "alibi"):
        tensors = inputs(700, 700, 12, 16, 0.1, batch=1, dtype=dtype)
    else:
        tensors = sink(float(case[5:]), dtype) if "sink" in case else spread_biases(float(case[8:]), dtype)
    mask = AttentionMask()
    exact = results(partial(formula, slopes=slopes, mask=mask), tuple(x.double() for x in tensors))  # type: ignore[arg-type]
    ours = results(partial(shared_scores, scale=0.25, slopes_N=slopes, mask=mask), tensors)
    theirs = results(as_torch_attention(slopes, mask), tensors)
    # Under a strong sink the gradients of q and k vanish: what rounding leaves of them is measured beside that of v.
    size, slack = (float(exact[3].norm()), 2e-6) if case == "sink 60" else (0.0, 1e-7)
    for name, a, b, wanted in zip(NAMES, ours, theirs, exact, strict=True):
        assert torch.isfinite(a).all(), name
        ours_off, theirs_off = error(a, wanted, size), error(b, wanted, size)
        assert ours_off <= 2 * theirs_off + slack, (name, ours_off, theirs_off)


@pytest.mark.parametrize("content", [0.02, 3.0])
def test_alibi_with_128_heads_at_4096_tokens(content: float) -> None:
    """The gradient covers only some heads and the last rows, so that the formula in float64 is affordable."""
    length, heads, rows = 4096, [0, 1, 17, 40, 64, 90, 127], 96
    slopes = torch.tensor(alibi_slopes(128))
    tensors = inputs(length, length, 128, 8, content, batch=1, dtype=torch.float32)
    upstream = torch.zeros(length, 1, 128, 8)
    upstream[-rows:, :, heads] = torch.randn(rows, 1, len(heads), 8, generator=torch.Generator().manual_seed(3))
    out = shared_scores(*tensors, scale=8**-0.5, slopes_N=slopes)
    assert torch.isfinite(out).all()
    ours = [out[-rows:, :, heads], *torch.autograd.grad(out, tensors, upstream)]

    def last_rows(run: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        q, k, v, e_query, e_value = leaves
        out = run(q[:, -rows:], k, v, e_query[heads], e_value[heads])
        return [out, *torch.autograd.grad(out, leaves, upstream[-rows:, :, heads].to(dtype))]

    exact = last_rows(partial(formula, slopes=slopes[heads]), torch.float64)
    theirs = last_rows(as_torch_attention(slopes[heads], AttentionMask()), torch.float32)
    for name, a, b, wanted in zip(NAMES, ours, theirs, exact, strict=True):
        assert torch.isfinite(a).all(), name
        assert error(a.double(), wanted) <= 2 * error(b.double(), wanted) + 1e-7, name


class Allocations(TorchDispatchMode):
    """The size of every tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        out = func(*args, **kwargs or {})
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in before:
                self.sizes.append(part.untyped_storage().nbytes() // part.element_size())
        return out


@pytest.mark.parametrize("alibi", [False, True])
def test_memory_holds_neither_scores_nor_keys_nor_values_of_every_head(alibi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the heads themselves and, temporarily, their product with the gradient are as large as n·T·d."""
    monkeypatch.setattr(blocks, "SPACE", blocks.Workspace())
    length, heads, width = 2048, 64, 4
    q, k, v, e_query, e_value = (x.detach() for x in inputs(length, length, heads, width, 0.1, batch=1, dtype=torch.float32))
    slopes = torch.tensor(alibi_slopes(heads)) if alibi else None
    largest = heads * length * width
    with Allocations() as forward:
        out, lse = blocks.forward(q, k, v, e_query, e_value, slopes, AttentionMask(), 0.5)
    with Allocations() as backward:
        blocks.backward(out, q, k, v, e_query, e_value, slopes, AttentionMask(), 0.5, out, lse)
    assert sorted(size for size in forward.sizes if size >= largest) == [largest]
    assert sum(size >= largest for size in backward.sizes) <= (1 if not alibi else 3)  # a product for each group of heads
    assert max(forward.sizes + backward.sizes) == largest


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_heads() -> None:
    def kept(heads: int) -> int:
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        tensors = inputs(256, 256, heads, 512 // heads, 0.1, batch=1, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            shared_scores(*tensors, scale=0.3)
        return sum(saved.values())

    assert kept(64) <= 1.1 * kept(8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    tensors = [torch.ones(2, 5, 4, dtype=dtype)] * 3 + [torch.ones(3, 4, dtype=dtype)] * 2
    with pytest.raises(TypeError, match=f"shared scores need float32 or bfloat16, not {dtype}"):
        shared_scores(*tensors, scale=0.5)


def test_autocast_computes_in_its_type() -> None:
    tensors = inputs(40, 40, 4, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = shared_scores(*tensors, scale=0.3)
    assert out.dtype == torch.bfloat16
    rounded = [x.to(torch.bfloat16) for x in tensors]
    assert torch.equal(out, shared_scores(*rounded, scale=0.3))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in tensors)
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="float16"):
        shared_scores(*tensors, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_after_generating_in_the_same_thread(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory allocated in inference mode must also work in training."""
    monkeypatch.setattr(blocks, "SPACE", blocks.Workspace())
    tensors = inputs(40, 40, 4, 8, dtype=dtype)
    for _ in range(2):
        with torch.inference_mode():
            generated = shared_scores(*tensors, scale=0.3)
        out = shared_scores(*tensors, scale=0.3)
        assert torch.equal(out, generated)
        out.sum().backward()


def test_values_and_gradients_of_a_thousand_stay_finite() -> None:
    tensors = spread_biases(200, torch.float32)
    with torch.no_grad():
        tensors[2].mul_(1e3)
    out = shared_scores(*tensors, scale=0.25)
    gradients = torch.autograd.grad(out, tensors, torch.full_like(out, 1e3))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (1, lambda x: x[:1], ValueError, r"k has the shape \(1, 5, 4\); with q \(2, 5, 4\) it must be \(2, 5, 4\)"),
        (2, lambda x: x[:, :4], ValueError, r"v has the shape \(2, 4, 4\)"),
        (1, lambda x: x[:, :4], ValueError, "5 queries and 4 keys"),
        (4, lambda x: x[:1], ValueError, r"e_value has the shape \(1, 4\)"),
        (2, lambda x: x.half(), TypeError, "q, k and v must have one type"),
    ],
)
def test_what_does_not_fit_is_refused(place: int, change: Any, error: type[Exception], message: str) -> None:
    tensors = list(inputs(5, 5, 3, 4, dtype=torch.float32))
    tensors[place] = change(tensors[place])
    with pytest.raises(error, match=message):
        shared_scores(*tensors, scale=0.5)


def test_masks_that_do_not_fit_are_refused() -> None:
    tensors = inputs(5, 5, 3, 4)
    with pytest.raises(ValueError, match=r"mask\.documents has the shape"):
        shared_scores(*tensors, scale=0.5, mask=AttentionMask(documents_BT=torch.zeros(2, 9, dtype=torch.int64)))
    with pytest.raises(TypeError, match=r"valid_BT must be bool, not torch\.int64"):
        AttentionMask(valid_BT=torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"documents_BT must be int32 or int64, not torch\.float32"):
        AttentionMask(documents_BT=torch.ones(2, 5))


def test_recomputed_in_the_backward_pass() -> None:
    tensors = inputs(40, 40, 4, 8)
    plain = results(partial(shared_scores, scale=0.3), tensors)
    again = results(lambda *x: checkpoint(partial(shared_scores, scale=0.3), *x, use_reentrant=False), tensors)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_compiled_without_a_graph_break() -> None:
    tensors = inputs(40, 40, 4, 8, dtype=torch.float32)

    def model(*x: Tensor) -> Tensor:
        return shared_scores(*x, scale=0.3).sin()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, tensors), results(model, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_passes_torchs_own_checks(dtype: torch.dtype) -> None:
    q, k, v, e_query, e_value = inputs(9, 9, 3, 4, dtype=dtype)
    transposed = torch.stack([q, k, v]).transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_()
    for tensors in ([q, k, v], list(transposed)):  # as a layer's own, and as views with other strides
        arguments = (*tensors, e_query, e_value, None, None, None, 0.5, True)
        torch.library.opcheck(torch.ops.manyheads.shared_scores.default, arguments)
