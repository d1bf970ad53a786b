"""The group constraint from Gram matrices is that of the papers' formulas on flattened maps, with the same gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from model.gha.losses import categorical, continuous, scores

HEADS, LABELS, GROUPS = 6, [1, 0, 1, 2, 0, 1], 3
ALPHA, BETA = 0.7, 0.3
Inputs = dict[str, Tensor]

# Maps of one layer (N, …) from what they are made of: B 2 sequences of T 5 tokens, heads of width D 4.
MAPS: dict[str, Callable[[Inputs], Tensor]] = {
    "mhe_add values": lambda x: x["v"][None] + x["e"][:, None, None],
    "mhe_mul values": lambda x: x["v"][None] * (1 + x["e"][:, None, None]),
    "mha values": lambda x: x["own_v"],
    "attention": lambda x: attention(x),
    "outputs": lambda x: attention(x) @ x["own_v"],
}


def attention(x: Inputs) -> Tensor:
    """Causal softmax weights of MHA, (N, B, T, T)."""
    future = torch.ones(5, 5).triu(1).bool()
    return (x["q"] @ x["k"].transpose(-1, -2)).masked_fill(future, -math.inf).softmax(-1)


def inputs() -> Inputs:
    draw = torch.Generator().manual_seed(0)
    shapes = {"v": (2, 5, 4), "e": (HEADS, 4), "own_v": (HEADS, 2, 5, 4), "q": (HEADS, 2, 5, 4), "k": (HEADS, 2, 5, 4)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def gram_of(name: str, x: Inputs) -> Tensor:
    """The Gram matrix as the model makes it: for MHE in closed form from v and e."""
    if name == "mhe_add values":
        v, e = x["v"].flatten(0, 1), x["e"]
        along = e @ v.sum(0)
        return v.square().sum() + along[:, None] + along + len(v) * e @ e.T
    if name == "mhe_mul values":
        scales = 1 + x["e"]
        return (scales * x["v"].flatten(0, 1).square().sum(0)) @ scales.T
    flat = MAPS[name](x).flatten(1)
    return flat @ flat.T


def centres_of(maps: Tensor, labels: list[int], groups: int) -> list[Tensor]:
    members = [[x for x, label in zip(maps, labels, strict=True) if label == group] for group in range(groups)]
    return [torch.stack(group).mean(0) for group in members]


def direct_continuous(maps: Tensor, labels: list[int], groups: int, alpha: float, beta: float) -> Tensor:
    centres = centres_of(maps, labels, groups)
    own = [cosine_similarity(x, centres[label], dim=0) for x, label in zip(maps, labels, strict=True)]
    pairs = [cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(centres, 2)]
    return -alpha * torch.stack(own).mean() + (beta * torch.stack(pairs).mean() if pairs else 0)


def direct_categorical(maps: Tensor, labels: list[int], groups: int, alpha: float, beta: float) -> Tensor:
    centres = [z / z.norm() for z in centres_of(maps, labels, groups)]
    own, others = [], []
    for x, label in zip(maps, labels, strict=True):
        exponentials = [torch.exp(10 * (x / x.norm()).dot(z)) for z in centres]
        logs = [torch.log(value / sum(exponentials)) for value in exponentials]
        own.append(logs[label])
        others += [torch.stack([log for group, log in enumerate(logs) if group != label]).mean()] if groups > 1 else []
    return -alpha * torch.stack(own).mean() + (beta * torch.stack(others).mean() if others else 0)


FORMS = [(continuous, direct_continuous), (categorical, direct_categorical)]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("term", "direct"), FORMS, ids=["continuous", "categorical"])
def test_value_and_gradient_are_those_of_the_formula_on_maps(
    name: str, term: Callable[..., Tensor], direct: Callable[..., Tensor]
) -> None:
    ours, wanted = inputs(), inputs()
    value = term(gram_of(name, ours), torch.tensor(LABELS), GROUPS, ALPHA, BETA)
    reference = direct(MAPS[name](wanted).flatten(1), LABELS, GROUPS, ALPHA, BETA)
    torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)
    value.backward()
    reference.backward()
    moved = [key for key, x in wanted.items() if x.grad is not None]
    assert moved
    for key in moved:
        assert wanted[key].grad.abs().max() > 1e-3  # type: ignore[union-attr]
        torch.testing.assert_close(ours[key].grad, wanted[key].grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]])
@pytest.mark.parametrize(("term", "direct"), FORMS, ids=["continuous", "categorical"])
def test_one_group_and_groups_of_one_head(
    labels: list[int], term: Callable[..., Tensor], direct: Callable[..., Tensor]
) -> None:
    ours, wanted, groups = inputs()["own_v"], inputs()["own_v"], max(labels) + 1
    value = term(ours.flatten(1) @ ours.flatten(1).T, torch.tensor(labels), groups, ALPHA, BETA)
    reference = direct(wanted.flatten(1), labels, groups, ALPHA, BETA)
    torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)
    value.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=1e-9)


# By hand. Five maps in three groups:   x0 = (3, 4)   x1 = (3, −4)  |  x2 = (4, 3)  |  x3 = (0, 5)   x4 = (0, 2)
# Centres                               z0 = (3, 0)                 |  z1 = (4, 3)  |  z2 = (0, 3.5)
# Cosines      z0     z1     z2
#         x0   3/5   24/25   4/5        3·4 + 4·3 = 24 of 5·5
#         x1   3/5    0     −4/5        3·4 − 4·3 = 0
#         x2   4/5    1      3/5
#         x3    0    3/5     1          and x4 the same
#         of centres: z0 z1 = 4/5,  z0 z2 = 0,  z1 z2 = 3/5
GOLDEN = torch.tensor([[3, 4], [3, -4], [4, 3], [0, 5], [0, 2]], dtype=torch.float64)
GOLDEN_LABELS = torch.tensor([0, 0, 1, 2, 2])
GOLDEN_COSINES = [[0.6, 0.96, 0.8], [0.6, 0, -0.8], [0.8, 1, 0.6], [0, 0.6, 1], [0, 0.6, 1]]


def test_continuous_by_hand() -> None:
    """Own: (3/5 + 3/5 + 1 + 1 + 1) / 5 = 21/25. Pairs: (4/5 + 0 + 3/5) / 3 = 7/15. −½ · 21/25 + 3/10 · 7/15 = −7/25."""
    found = continuous(GOLDEN @ GOLDEN.T, GOLDEN_LABELS, 3, alpha=0.5, beta=0.3)
    assert found.item() == pytest.approx(-0.28, abs=1e-12)


def test_categorical_by_hand() -> None:
    own, others = 0.0, 0.0
    for cosines, label in zip(GOLDEN_COSINES, GOLDEN_LABELS.tolist(), strict=True):
        total = sum(math.exp(10 * cosine) for cosine in cosines)
        logs = [10 * cosine - math.log(total) for cosine in cosines]
        own += logs[label] / 5
        others += (sum(logs) - logs[label]) / 2 / 5
    found = categorical(GOLDEN @ GOLDEN.T, GOLDEN_LABELS, 3, alpha=0.5, beta=0.3)
    assert found.item() == pytest.approx(-0.5 * own + 0.3 * others, abs=1e-12)


def test_scores_by_hand_of_one_layer_and_of_several() -> None:
    """A second layer has the same heads in another order."""
    order = [4, 2, 0, 3, 1]
    maps_LNF, labels_LN = torch.stack([GOLDEN, GOLDEN[order]]), torch.stack([GOLDEN_LABELS, GOLDEN_LABELS[order]])
    G_LNN = maps_LNF @ maps_LNF.transpose(-1, -2)
    probabilities = [
        math.exp(10 * cosines[label]) / sum(math.exp(10 * cosine) for cosine in cosines)
        for cosines, label in zip(GOLDEN_COSINES, GOLDEN_LABELS.tolist(), strict=True)
    ]
    for eta, wanted in (
        (scores(G_LNN, labels_LN, 3, "continuous"), [0.6, 0.6, 1, 1, 1]),
        (scores(G_LNN, labels_LN, 3, "categorical"), probabilities),
    ):
        assert eta[0].tolist() == pytest.approx(wanted, abs=1e-12)
        assert eta[1].tolist() == pytest.approx([wanted[head] for head in order], abs=1e-12)
    assert scores(G_LNN[1], labels_LN[1], 3, "continuous").tolist() == pytest.approx([1, 1, 0.6, 1, 0.6], abs=1e-12)


@pytest.mark.parametrize("term", [continuous, categorical])
def test_the_term_does_not_depend_on_numbers_of_groups_and_lengths_of_maps(term: Callable[..., Tensor]) -> None:
    x = inputs()["own_v"].detach().flatten(1)
    value = term(x @ x.T, torch.tensor(LABELS), 3, ALPHA, BETA)
    renamed = torch.tensor([2, 0, 1])[torch.tensor(LABELS)]
    for other in (term(x @ x.T, renamed, 3, ALPHA, BETA), term(1e6 * x @ x.T, torch.tensor(LABELS), 3, ALPHA, BETA)):
        torch.testing.assert_close(other, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("term", [continuous, categorical])
def test_the_term_pulls_groups_together_and_apart(term: Callable[..., Tensor]) -> None:
    """Small steps against the gradient: heads come closer to their centres by α, centres farther from each other by β."""
    for alpha, beta, rises in ((1.0, 0.0, True), (0.0, 1.0, False)):
        x = inputs()["own_v"].detach().flatten(1).requires_grad_()
        before = [direct_continuous(x, LABELS, GROUPS, -1, 0).item(), direct_continuous(x, LABELS, GROUPS, 0, 1).item()]
        for _ in range(20):
            (slope,) = torch.autograd.grad(term(x @ x.T, torch.tensor(LABELS), GROUPS, alpha, beta), x)
            x = (x - 5 * slope).detach().requires_grad_()
        after = [direct_continuous(x, LABELS, GROUPS, -1, 0).item(), direct_continuous(x, LABELS, GROUPS, 0, 1).item()]
        assert after[0] > before[0] + 0.01 if rises else after[1] < before[1] - 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["a head", "a group", "all heads", "a centre"])
@pytest.mark.parametrize("term", [continuous, categorical])
def test_zero_maps_are_harmless(term: Callable[..., Tensor], zero: str, dtype: torch.dtype) -> None:
    """A head whose map is zero has no direction: cosine 0. So has a centre of opposite maps, whatever rounding leaves of it."""
    x = inputs()["own_v"].detach().flatten(1).to(dtype)
    if zero == "a centre":
        x[1] = -x[4]
    else:
        x[{"a head": [4], "a group": [1, 4], "all heads": list(range(HEADS))}[zero]] = 0
    x.requires_grad_()
    G = x @ x.T
    if zero == "a centre":  # whose square is below zero by rounding
        rounding = torch.zeros(HEADS, HEADS, dtype=dtype)
        rounding[4, 4] = 3e-7 if dtype == torch.float32 else 1e-9
        G = G * (1 - rounding)
    eta_N = scores(G.detach(), torch.tensor(LABELS), GROUPS, "continuous")
    assert eta_N[4].abs() < (1e-2 if dtype == torch.float32 else 1e-4)
    value = term(G, torch.tensor(LABELS), GROUPS, ALPHA, BETA)
    assert value.isfinite()
    (slope,) = torch.autograd.grad(value, x)
    assert slope.isfinite().all()
    if zero == "all heads":
        assert not slope.any()
    if zero == "a head":
        others = [0, 2, 3, 5]
        (wanted,) = torch.autograd.grad(
            direct_continuous(reference := x.detach().double().requires_grad_(), LABELS, GROUPS, ALPHA, BETA), reference
        )
        if term is continuous:
            torch.testing.assert_close(slope[others].double(), wanted[others], rtol=1e-4, atol=1e-6)


def test_empty_groups_do_not_affect_the_continuous_form() -> None:
    """Except for the number of pairs, 3 instead of 10."""
    x = inputs()["own_v"].detach().flatten(1)
    labels = torch.tensor([0, 3, 4])[torch.tensor(LABELS)]
    found = continuous(x @ x.T, labels, 5, ALPHA, BETA)
    assert found.item() == pytest.approx(direct_continuous(x, LABELS, GROUPS, ALPHA, BETA * 3 / 10).item(), abs=1e-9)
