"""Gram matrices equal products of the feature maps themselves, and so do gradients; nothing of size n·T² is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.registry import attention_class, attention_names, attention_variant
from model.gha import gram
from model.gha.constraint import TERM, HeadConstraint
from model.layers import Layers
from model.positions.masks import AttentionMask
from model.positions.positions import Positions, make_positions
from tests.needs import needs

B, S, N, D = 2, 12, 6, 4
LAYERS = Layers()


def equal_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of a scalar in which every entry has a different weight."""
    weights = torch.randn(N, N, dtype=torch.float64)
    results = []
    for function in (found, expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad((weights * value).sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)


def product(maps_BNF: Tensor) -> Tensor:
    """(B, N, …) → X Xᵀ of each head's maps over the batch."""
    flat = maps_BNF.transpose(0, 1).flatten(1)
    return flat @ flat.T


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_value_maps() -> None:
    torch.manual_seed(0)
    v, e = random(B, 1, S, D), random(N, D)
    equal_with_gradients(lambda v, e: gram.added_value_gram(v, e, LAYERS), lambda v, e: product(v + e[:, None]), v, e)
    equal_with_gradients(
        lambda v, e: gram.multiplied_value_gram(v, e, LAYERS), lambda v, e: product(v * (1 + e[:, None])), v, e
    )
    equal_with_gradients(lambda v: gram.value_gram(v, LAYERS), product, random(B, N, S, D))


def test_output_maps() -> None:
    torch.manual_seed(0)
    heads = random(S, B, N * D)
    split = lambda x: x.view(S, B, N, D).permute(1, 2, 0, 3)  # noqa: E731
    equal_with_gradients(lambda x: gram.output_gram(x, D, LAYERS), lambda x: product(split(x)), heads)


def attention_maps(q: Tensor, k: Tensor, positions: Positions, rows: list[int]) -> Tensor:
    """The weights of some queries, by the formula."""
    scores = q @ k.repeat_interleave(N // k.shape[1], dim=1).transpose(2, 3) * 0.3
    if positions.slopes_N is not None:
        distance = torch.arange(S)[:, None] - torch.arange(S)
        scores = scores - positions.slopes_N[:, None, None] * distance
    visible = torch.ones(S, S, dtype=torch.bool).tril() if positions.mask.causal else torch.ones(S, S, dtype=torch.bool)
    if positions.mask.documents_BT is not None:
        documents = positions.mask.documents_BT
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)[:, :, rows]


@pytest.mark.parametrize("rows", [0, 4, 5])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "documents"])
def test_attention_maps(monkeypatch: pytest.MonkeyPatch, rows: int, blocks: bool, position: str, mask: str) -> None:
    torch.manual_seed(0)
    if blocks:
        monkeypatch.setattr(gram, "BLOCK", B * N * S * 3)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1, 2, 2]]) if mask == "documents" else None
    config = ModelConfig(hidden_size=N * D, num_layers=1, num_heads=N, head_dim=D, position=position)  # type: ignore[arg-type]
    seen = AttentionMask(causal=mask != "bidirectional", documents_BT=documents)
    positions = make_positions(config, S, 0, torch.float64, torch.device("cpu"), seen)
    chosen = {0: list(range(S)), 4: [2, 5, 8, 11], 5: [1, 3, 6, 8, 11]}[rows]
    equal_with_gradients(
        lambda q, k: gram.attention_gram(
            lambda chosen_R: q[:, :, chosen_R], k, positions, heads=N, scale=0.3, rows=rows, layers=LAYERS
        ),
        lambda q, k: product(attention_maps(q, k, positions, chosen)),
        random(B, N, S, D),
        random(B, 2, S, D),
    )


def test_a_padded_query_that_sees_nothing_counts_for_nothing() -> None:
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :3] = False
    config = ModelConfig(hidden_size=N * D, num_layers=1, num_heads=N, head_dim=D, position="none")
    positions = make_positions(config, S, 0, torch.float64, torch.device("cpu"), AttentionMask(valid_BT=valid))
    weights = gram.attention_weights(random(B, N, S, D), random(B, N, S, D), positions, torch.arange(S), 0.3)
    assert (weights[0, :, :3] == 0).all()
    torch.testing.assert_close(weights[0, :, 3:].sum(-1), torch.ones(N, S - 3, dtype=torch.float64))


def test_all_attention_weights_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 64
    monkeypatch.setattr(gram, "BLOCK", B * N * length * 4)
    config = ModelConfig(hidden_size=N * D, num_layers=1, num_heads=N, head_dim=D, position="none")
    positions = make_positions(config, length, 0, torch.float32, torch.device("cpu"))
    q, k = (torch.randn(B, N, length, D, requires_grad=True) for _ in range(2))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = gram.attention_gram(lambda rows_R: q[:, :, rows_R], k, positions, heads=N, scale=0.5, rows=0, layers=LAYERS)
    total.sum().backward()
    assert kept
    assert max(kept) <= B * N * length * 4 < B * N * length * length
    assert q.grad is not None


@pytest.mark.parametrize(
    ("variant", "feature_map"), [(name, kind) for name in attention_names() for kind in attention_variant(name).maps]
)
def test_a_layer_adds_its_term_and_its_matrix_once(variant: str, feature_map: str) -> None:
    """Also with recomputed activations; passes without gradient are ignored unless they vote."""
    torch.manual_seed(0)
    config = ModelConfig(attention=variant, hidden_size=16, num_layers=1, num_heads=N, head_dim=D, **needs(variant))
    layers = Layers()
    attention = attention_class(config)(config, layers)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    constraint = HeadConstraint(layers, D, feature_map, "continuous", attention_rows=4)
    attention.constraint = constraint
    positions = make_positions(config, S, 0, torch.float32, torch.device("cpu"))
    x = torch.randn(S, B, 16, requires_grad=True)
    plain = attention(x, positions)
    plain.sum().backward()
    without = x.grad
    assert constraint.take().shape == (N, N)
    assert not layers.auxiliary.take()
    constraint.labels_N, constraint.groups = torch.tensor([0, 0, 1, 1, 2, 2]), 3
    constraint.alpha, constraint.beta = 0.5, 0.25
    x.grad = None
    out = torch.utils.checkpoint.checkpoint(attention, x, positions, use_reentrant=False)
    assert torch.equal(out, plain)
    out.sum().backward()
    gram_NN = constraint.take()
    assert torch.linalg.eigvalsh(gram_NN).min() > -1e-4 * gram_NN.diagonal().max()
    term = layers.auxiliary.take()[TERM]
    torch.testing.assert_close(term.float(), constraint.loss(gram_NN, constraint.labels_N, 3, 0.5, 0.25).float())
    assert without is not None
    assert x.grad is not None
    assert not torch.allclose(x.grad, without)
    with torch.no_grad():
        attention(x, positions)
        assert not constraint._observed
        constraint.training = False
        attention(x, positions)
    torch.testing.assert_close(constraint.take(), gram_NN)
