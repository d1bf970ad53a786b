"""How attention is computed: which kernel, how many key heads, which precision. test_variants.py has the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import ModelConfig
from model.attention import kernels
from model.attention.kernels import attend, choose
from model.attention.mhe import HEAD_EMBEDDINGS, MHEMul
from model.positions.masks import AttentionMask
from model.positions.positions import Positions
from tests.needs import needs
from tests.unit.model.attention.layers import assert_equals_formula, hidden, layer_of, positions_of

POSITIONS = [("none", "after"), ("alibi", "after"), ("rope", "after"), ("rope", "before")]
CASES = [
    (name, position, embedding_position)
    for name in ("mha", "mqa", "gqa", "mhe_add", "mhe_mul")
    for position, embedding_position in POSITIONS
    if embedding_position == "after" or name.startswith("mhe")
]


def model_config(attention: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "attention": attention,
        "hidden_size": 20,
        "num_layers": 1,
        "num_heads": 6,
        "head_dim": 8,
        "vocab_size": 11,
        "position": "none",
    }
    return ModelConfig(**fields | needs(attention) | changes)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
def test_before_and_after_are_different_models(name: str) -> None:
    outs = []
    for embedding_position in ("before", "after"):
        config = model_config(name, position="rope", embedding_position=embedding_position)
        outs.append(layer_of(config)(hidden(config), positions_of(config, 7)))
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("position", "embedding_position"), POSITIONS)
def test_key_embedding_of_add_has_a_gradient_only_if_rotated(position: str, embedding_position: str) -> None:
    config = model_config("mhe_add", position=position, embedding_position=embedding_position)
    layer = layer_of(config)
    layer(hidden(config), positions_of(config, 7)).square().sum().backward()
    grad = layer.get_parameter("key_embedding").grad
    assert grad is not None
    assert (grad.abs().max() > 1e-6) == (embedding_position == "before")
    assert embedding_position == "before" or torch.equal(grad, torch.zeros_like(grad))


class Operations(TorchDispatchMode):
    """Records every operator below autograd, and the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[tuple[str, list[torch.Size]]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if "attention" in func.__name__:
            self.attention.append((func.__name__, [arg.shape for arg in args if isinstance(arg, Tensor)]))
        tensors = [part for part in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(part, Tensor)]
        self.largest = max([self.largest, *(part.untyped_storage().nbytes() // part.element_size() for part in tensors)])
        return out


@pytest.mark.parametrize(("name", "position", "embedding_position"), CASES)
def test_runs_on_the_flash_kernel_with_its_own_number_of_key_heads(name: str, position: str, embedding_position: str) -> None:
    config = model_config(name, position=position, embedding_position=embedding_position)
    layer, x_SBH = layer_of(config, torch.float32), hidden(config, dtype=torch.float32)
    with Operations() as operations:
        layer(x_SBH, positions_of(config, 7, dtype=torch.float32)).sum().backward()
    heads = {"mha": 6, "gqa": 2}.get(name, 1)
    width = 16 if embedding_position == "before" else 8
    assert [kind.split(".")[0] for kind, _ in operations.attention] == [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ]
    for kind, shapes in operations.attention:
        q, k, v = shapes[1:4] if "backward" in kind else shapes[:3]
        assert q == (2, 6, 7, width)
        assert k == v == (2, heads, 7, width)


def test_mhe_memory_does_not_grow_with_the_square_of_the_sequence() -> None:
    config = model_config("mhe_add", position="rope", embedding_position="before", num_heads=4, head_dim=2)
    length = 512
    layer, x_SBH = layer_of(config, torch.float32), hidden(config, length, torch.float32)
    with Operations() as operations:
        layer(x_SBH, positions_of(config, length, dtype=torch.float32)).sum().backward()
    assert operations.largest < length * length


@pytest.mark.parametrize(("position", "embedding_position"), [("none", "after"), ("rope", "after"), ("rope", "before")])
def test_bf16_keeps_the_multiplied_embeddings_of_usual_size(position: str, embedding_position: str) -> None:
    """The systematic error of bf16 must be small compared with the effect of embeddings of N(0, 0.02)."""
    config = model_config("mhe_mul", position=position, embedding_position=embedding_position, head_dim=64)
    rounded, exact, plain = (layer_of(config) for _ in range(3))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in HEAD_EMBEDDINGS:
            embedding = (torch.randn(6, 64, generator=generator) * 0.02).bfloat16()
            rounded.get_parameter(name).copy_(embedding)
            exact.get_parameter(name).copy_(embedding)
            plain.get_parameter(name).zero_()
    length = 4096
    x_BKSD = torch.randn(1, 1, length, 64, generator=generator).bfloat16()
    layers = [(rounded.bfloat16(), torch.bfloat16), (exact.float(), torch.float32), (plain.float(), torch.float32)]
    for step in ("query_features", "head_outputs"):
        outs = []
        for layer, dtype in layers:
            assert isinstance(layer, MHEMul)
            x, own = x_BKSD.to(dtype), layer.own_rows()
            if step == "query_features":
                out = layer.query_features(x, own, positions_of(config, length, dtype=dtype))
            else:
                out = layer.head_outputs(x, own)
            outs.append(out.detach().double())
        # Regression over tokens averages out the rounding of single outputs.
        factors = [((out - outs[2]) * outs[2]).sum(dim=2) / outs[2].square().sum(dim=2) for out in outs]
        error, effect = (factors[0] - factors[1]).square().mean().sqrt(), factors[1].square().mean().sqrt()
        assert effect > 0.015
        assert error < 0.05 * effect, (step, error, effect)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(5, 5, 1), (1, 5, 2), (3, 5, 1), (1, 1, 4), (3, 5, 4)])
def test_attend_is_causal_attention_of_the_last_queries(queries: int, keys: int, kv_heads: int, kernel: str) -> None:
    q = torch.randn(1, 4, queries, 6, dtype=torch.float64)
    k, v = torch.randn(1, kv_heads, keys, 6, dtype=torch.float64), torch.randn(1, kv_heads, keys, 3, dtype=torch.float64)
    out = attend(q, k, v, Positions(queries, keys - queries), scale=0.3, kernel=kernel)
    for head in range(4):
        group = head // (4 // kv_heads)
        for row in range(queries):
            seen = keys - queries + row + 1
            weights = (k[0, group, :seen] @ q[0, head, row] * 0.3).softmax(0)
            torch.testing.assert_close(out[0, head, row], weights @ v[0, group, :seen])


@pytest.mark.parametrize("width", [6, 4])
def test_values_are_copied_only_where_they_are_narrower_than_keys(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    seen: list[Tensor] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend((k, v))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = torch.randn(1, 4, 5, 6), torch.randn(1, 1, 5, 6), torch.randn(1, 1, 5, width)
    assert attend(q, k, v, Positions(5), scale=0.3).shape == (1, 4, 5, width)
    assert seen[0].data_ptr() == k.data_ptr()
    assert (seen[1].data_ptr() == v.data_ptr()) == (width == 6)


@pytest.mark.parametrize("name", ["mqa", "gqa", "mhe_add", "mhe_mul"])
@pytest.mark.parametrize(("position", "embedding_position"), [("alibi", "after"), ("rope", "after"), ("rope", "before")])
def test_repeated_key_heads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, position: str, embedding_position: str
) -> None:
    monkeypatch.setattr(kernels, "reads_grouped_heads", lambda *_: False)  # as on CUDA with float32 or a mask
    config = model_config(name, position=position, embedding_position=embedding_position if name.startswith("mhe") else "after")
    with Operations() as operations:
        layer_of(config)(hidden(config), positions_of(config, 7))
    ((_, shapes),) = operations.attention
    assert [shape[1] for shape in shapes[:3]] == [6, 6, 6]
    assert_equals_formula(config)


def choice(wanted: str = "auto", **changes: Any) -> str:
    facts: dict[str, Any] = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "heads": 64,
        "queries": 128,
        "keys": 128,
        "head_dim": 16,
    }
    return choose(wanted, **{"shares_scores": True} | facts | changes).kernel


def test_auto_takes_shared_scores_where_they_exist_and_pay() -> None:
    assert choice() == choice(dtype=torch.bfloat16) == choice(dtype=torch.float64) == "shared_scores"
    assert choice(shares_scores=False) == "sdpa"
    assert choice(queries=1, keys=100_000) == "sdpa"
    assert [choice(heads=heads) for heads in (15, 16)] == ["sdpa", "shared_scores"]
    assert [choice(queries=queries) for queries in (63, 64)] == ["sdpa", "shared_scores"]
    assert choice(dtype=torch.float16) == "sdpa"
    assert choice(device=torch.device("meta")) == "sdpa"
    assert [choice(name, heads=1) for name in ("math", "sdpa", "shared_scores")] == ["math", "sdpa", "shared_scores"]


def test_shared_scores_are_refused_where_heads_have_their_own() -> None:
    with pytest.raises(ValueError, match="scores of their own"):
        choice("shared_scores", shares_scores=False)


def test_auto_logs_each_choice_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    kernels._announce.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(3):
            choice()
            choice(queries=1)
            choice("math")
    assert caplog.messages == [
        "attention kernel shared_scores: one softmax matrix serves all heads",
        "attention kernel sdpa: fewer than 64 queries, as when generating",
    ]


@pytest.mark.parametrize(("name", "heads"), [("mhe_add", []), ("mhe_mul", [(6, 1)]), ("mqa", [(6, 1)]), ("mha", [(6, 6)])])
def test_only_mhe_add_needs_no_attention_operator_of_torch(name: str, heads: list[tuple[int, int]]) -> None:
    config, length = model_config(name), 512
    with Operations() as operations, torch.no_grad():
        layer_of(config, torch.float32)(
            hidden(config, length, torch.float32), positions_of(config, length, dtype=torch.float32)
        )
    assert [(shapes[0][1], shapes[1][1]) for _, shapes in operations.attention] == heads


@pytest.mark.parametrize(("window", "least"), [(1, 2), (3, 2), (3, 5), (6, 1)])
@pytest.mark.parametrize(("offset", "key_heads"), [(0, 2), (4, 4), (1, 1)])
def test_blocks_of_a_window_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, window: int, least: int, offset: int, key_heads: int
) -> None:
    """Several blocks, the last one shorter; tokens before the first query; documents, slopes and padding; gradients, too."""
    monkeypatch.setattr(kernels, "FEWEST_IN_BLOCK", least)
    documents_BT = torch.tensor([[0] * 6 + [1] * 8, [0] * 9 + [2] * 5])
    valid_BT = torch.ones(2, 14, dtype=torch.bool).index_fill(1, torch.tensor([0, 7]), False)
    slopes = torch.tensor([0.1, 0.5, 0.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(2, heads, 14, 8, generator=generator, dtype=torch.float64) for heads in (4, key_heads, key_heads)]
    for mask in (AttentionMask(window=window), AttentionMask(True, valid_BT, documents_BT, window)):
        positions = Positions(14 - offset, offset, None, None if mask.is_plain else slopes, mask, torch.float64)
        found = []
        for kernel in ("sdpa", "math"):
            q, k, v = (x.clone().requires_grad_() for x in drawn)
            out = attend(q[:, :, offset:], k, v, positions, scale=0.3, kernel=kernel)
            out.backward(drawn[0][:, :, offset:].flip(0))
            found.append([out, q.grad, k.grad, v.grad])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("offset", [0, 4])
def test_blocks_of_capped_scores_equal_the_formula(monkeypatch: pytest.MonkeyPatch, window: int | None, offset: int) -> None:
    """Several blocks, recomputed in the backward pass."""
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 2 * 4 * 14 * 3)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(2, heads, 14, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    sinks = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    positions, found = Positions(14 - offset, offset, mask=AttentionMask(window=window), dtype=torch.float64), []
    for kernel in ("sdpa", "math"):
        q, k, v, sinks_N1 = (x.clone().requires_grad_() for x in (*drawn, sinks))
        out = attend(q[:, :, offset:], k, v, positions, scale=0.3, kernel=kernel, sinks_N1=sinks_N1, softcap=1.2)
        out.backward(drawn[0][:, :, offset:].flip(0))
        found.append([out, q.grad, k.grad, v.grad, sinks_N1.grad])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_capped_scores_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 2 * 64 * 16)
    q, kept = torch.randn(1, 2, 64, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):  # type: ignore[func-returns-value]
        attend(q, q, q, Positions(64), scale=1.0, softcap=2.0)
    assert kept
    assert max(shape.numel() for shape in kept) <= q.numel()


def test_a_window_has_no_scores_of_keys_beyond_it() -> None:
    """Blocks of max(window, 128) queries see as many keys and the window before: 512 · 256 of 512² scores."""
    q = torch.randn(1, 2, 512, 8)
    with Operations() as operations:
        attend(q, q, q, Positions(512, mask=AttentionMask(window=100)), scale=1.0)
    sizes = [(shapes[0][2], shapes[1][2]) for _, shapes in operations.attention]
    assert sizes == [(128, 128), (128, 256), (128, 256), (128, 256)]


def test_fewer_key_heads_than_threads_are_repeated_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_threads", lambda: 4)
    q_BNSD = torch.zeros(2, 6, 5, 8)
    assert [kernels.reads_grouped_heads(q_BNSD, key_heads, None) for key_heads in (1, 2, 6)] == [False, True, True]
    with torch.no_grad():
        assert kernels.reads_grouped_heads(q_BNSD, 1, None)


@pytest.mark.parametrize(("position", "embedding_position"), POSITIONS)
@pytest.mark.parametrize("kernel", ["sdpa", "shared_scores"])
def test_an_idle_key_embedding_can_be_left_out(position: str, embedding_position: str, kernel: str) -> None:
    """Outputs of mhe_add are the same to the bit wherever e^K is not rotated."""
    if embedding_position == "before" and kernel == "shared_scores":
        pytest.skip("with rotated embeddings every head has its own scores")
    changes = {"position": position, "embedding_position": embedding_position, "attention_kernel": kernel}
    config, config_without = model_config("mhe_add", **changes), model_config("mhe_add", key_embedding=False, **changes)
    layer, without = layer_of(config), layer_of(config_without)
    assert set(dict(layer.named_parameters())) - set(dict(without.named_parameters())) == {"key_embedding"}
    without.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "key_embedding"})
    outs = [one(hidden(config), positions_of(config, 7)) for one in (layer, without)]
    assert torch.equal(*outs) == (embedding_position == "after")


@pytest.mark.parametrize("kernel", ["auto", "shared_scores"])
@pytest.mark.parametrize(("position", "length"), [("none", 7), ("alibi", 7), ("none", 400)])
def test_compiles_without_a_graph_break(kernel: str, position: str, length: int) -> None:
    """`auto` takes torch's kernel at 7 tokens and shared scores at 400."""
    config = model_config("mhe_add", attention_kernel=kernel, position=position)
    layer, x_SBH, positions = layer_of(config), hidden(config, length), positions_of(config, length)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for one in (layer, compiled):
        layer.zero_grad()
        one(x_SBH, positions).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_attend_refuses_what_it_cannot_compute() -> None:
    q, k = torch.randn(1, 4, 5, 6), torch.randn(1, 1, 5, 6)
    with pytest.raises(ValueError, match="attention_kernel flash: known: auto, math, sdpa, shared_scores"):
        attend(q, k, k, Positions(5), scale=0.3, kernel="flash")
    with pytest.raises(ValueError, match="scores of their own"):
        attend(q, k, k, Positions(5), scale=0.3, kernel="shared_scores")
