"""Grouping heads by Gram matrices gives what scikit-learn and brute force give on the flattened maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from model.gha import clustering

LAYERS = 4


def clouds(heads: int, features: int, groups: int, spread: float, seed: int = 0) -> Tensor:
    """Maps (L, N, F) around some points of a layer, far from the origin."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(LAYERS, groups, features))
    own = points[:, draw.integers(groups, size=heads)]
    return torch.from_numpy(5 + own + spread * draw.normal(size=own.shape))


def gram(x_LNF: Tensor) -> Tensor:
    return x_LNF @ x_LNF.transpose(-1, -2)


def starts(x_LNF: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """The chosen heads as centres: their maps, and their columns for `lloyd`."""
    columns = torch.eye(x_LNF.shape[1], dtype=torch.float64)[:, chosen]
    return x_LNF[:, chosen], columns.expand(len(x_LNF), -1, -1)


def inertia(x_NF: Tensor, labels_N: Tensor) -> float:
    """Squared distances of heads to the means of their groups."""
    return sum(float((x_NF[labels_N == group] - x_NF[labels_N == group].mean(0)).square().sum()) for group in labels_N.unique())


def partition(labels: list[int]) -> set[frozenset[int]]:
    """Groups without their numbers."""
    return {frozenset(i for i, label in enumerate(labels) if label == group) for group in labels}


@pytest.mark.parametrize("iterations", [1, 2, 100])
@pytest.mark.parametrize(
    ("heads", "features", "groups", "spread"),
    [(8, 3, 2, 1.0), (12, 40, 3, 0.3), (16, 5, 8, 1.0), (64, 200, 8, 2.0), (64, 2, 16, 1.0), (9, 30, 9, 0.1)],
)
def test_lloyd_is_that_of_scikit_learn(heads: int, features: int, groups: int, spread: float, iterations: int) -> None:
    x_LNF = clouds(heads, features, groups, spread)
    points_LCF, columns_LNC = starts(x_LNF, list(range(0, heads, heads // groups))[:groups])
    labels_LN = clustering.lloyd(gram(x_LNF), columns_LNC, iterations)
    for x_NF, points_CF, labels_N in zip(x_LNF, points_LCF, labels_LN, strict=True):
        wanted = KMeans(groups, init=points_CF.numpy(), n_init=1, tol=0, max_iter=iterations).fit(x_NF.numpy())
        assert labels_N.tolist() == wanted.labels_.tolist()
        if wanted.n_iter_ < iterations:  # else scikit-learn's inertia is that of centres one step behind its labels
            assert inertia(x_NF, labels_N) == pytest.approx(wanted.inertia_, rel=1e-9)


@pytest.mark.parametrize("chosen", [[0, 0, 3], [5, 5, 5], [2, 2, 1, 1, 0], [7, 7, 7, 7, 7, 7]])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_empty_groups_take_the_farthest_heads_as_in_scikit_learn(chosen: list[int]) -> None:
    x_LNF = clouds(14, 6, 3, 1.0, seed=len(chosen))
    points_LCF, columns_LNC = starts(x_LNF, chosen)
    assert len(clustering.lloyd(gram(x_LNF), columns_LNC, 0).unique()) < len(chosen), "the first step must leave a group empty"
    labels_LN = clustering.lloyd(gram(x_LNF), columns_LNC)
    for x_NF, points_CF, labels_N in zip(x_LNF, points_LCF, labels_LN, strict=True):
        wanted = KMeans(len(chosen), init=points_CF.numpy(), n_init=1, tol=0).fit(x_NF.numpy())
        assert len(partition(labels_N.tolist())) == len(chosen)
        assert partition(labels_N.tolist()) == partition(wanted.labels_.tolist())  # which empty group takes which is open there
        assert inertia(x_NF, labels_N) == pytest.approx(wanted.inertia_, rel=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fewer_maps_than_groups_leave_a_group_empty() -> None:
    """All heads are at their centres: none moves, as in scikit-learn."""
    x_LNF = torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64)
    points_LCF, columns_LNC = starts(x_LNF, [1, 0, 2])
    for iterations in (1, 2, 100):
        labels_N = clustering.lloyd(gram(x_LNF), columns_LNC, iterations)[0]
        wanted = KMeans(3, init=points_LCF[0].numpy(), n_init=1, tol=0, max_iter=iterations).fit(x_LNF[0].numpy())
        assert labels_N.tolist() == wanted.labels_.tolist() == [1, 0, 0]


def test_equally_near_centres_give_the_first() -> None:
    x_LNF = torch.tensor([[[0.0], [2.0], [1.0], [4.0]]], dtype=torch.float64)
    for chosen, wanted in (([0, 1], [0, 1, 0, 1]), ([1, 0], [1, 0, 0, 0])):
        assert clustering.lloyd(gram(x_LNF), starts(x_LNF, chosen)[1], 0).tolist() == [wanted]


def test_kmeans_finds_separate_clouds_whatever_the_seed() -> None:
    draw = torch.Generator().manual_seed(3)
    truth_LN = torch.randint(6, (LAYERS, 48), generator=draw)
    points_LCF = 20 * torch.randn(LAYERS, 6, 30, generator=draw, dtype=torch.float64)
    x_LNF = points_LCF[torch.arange(LAYERS)[:, None], truth_LN]
    G_LNN = gram(x_LNF + 0.1 * torch.randn(x_LNF.shape, generator=draw, dtype=torch.float64))
    for seed in range(10):
        for labels, truth in zip(clustering.kmeans(G_LNN, 6, seed).tolist(), truth_LN.tolist(), strict=True):
            assert partition(labels) == partition(truth)


def test_kmeans_is_as_good_as_that_of_scikit_learn() -> None:
    """On average over seeds, on maps without clear groups, where the initialisation decides."""
    x_LNF = clouds(64, 20, 8, 1.5)
    ours, theirs = [], []
    for seed in range(20):
        for x_NF, labels_N in zip(x_LNF, clustering.kmeans(gram(x_LNF), 8, seed), strict=True):
            ours.append(inertia(x_NF, labels_N))
            theirs.append(KMeans(8, n_init=1, tol=0, random_state=seed).fit(x_NF.numpy()).inertia_)
    assert np.mean(ours) < 1.02 * np.mean(theirs)


def test_start_prefers_far_heads() -> None:
    """One of two clouds is a single head: uniform sampling would start there in one run of 10, by distance in nearly all."""
    x_LNF = clouds(20, 8, 1, 0.01)
    x_LNF[:, 13] += 10
    chosen = torch.stack([clustering.plus_plus(gram(x_LNF), 2, seed) for seed in range(50)])
    assert (chosen == 13).any(-1).double().mean() > 0.99
    assert (chosen[..., 0] != 13).double().mean() > 0.8
    assert len(chosen[..., 0].unique()) > 15


def test_start_takes_no_head_twice() -> None:
    G_LNN = gram(clouds(9, 4, 3, 1.0))
    for seed in range(20):
        assert (clustering.plus_plus(G_LNN, 9, seed).sort(-1).values == torch.arange(9)).all()


def test_same_seed_same_groups_and_another_seed_others() -> None:
    G_LNN = gram(clouds(64, 20, 8, 2.0))
    state = torch.get_rng_state()
    labels_LN = clustering.kmeans(G_LNN, 8, seed=5)
    torch.manual_seed(99)
    assert torch.equal(clustering.kmeans(G_LNN, 8, seed=5), labels_LN)
    assert not torch.equal(clustering.kmeans(G_LNN, 8, seed=6), labels_LN)
    torch.set_rng_state(state)
    clustering.kmeans(G_LNN, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("different", [32, 3])
def test_layers_do_not_depend_on_each_other(different: int) -> None:
    """Nor on when the others end: hard layers need more steps than easy ones and than those with few distinct maps."""
    easy_LNN, hard_LNN = gram(clouds(32, 10, 5, 0.01)), gram(clouds(32, 10, 5, 3.0))
    which = torch.arange(32) % different
    easy_LNN = easy_LNN[:, which][:, :, which]
    among_hard_LNN = hard_LNN.clone()
    among_hard_LNN[2] = easy_LNN[2]
    for seed in range(10):
        easy, hard, among_hard = (clustering.kmeans(G, 5, seed) for G in (easy_LNN, hard_LNN, among_hard_LNN))
        assert torch.equal(among_hard[2], easy[2])
        assert torch.equal(among_hard[[0, 1, 3]], hard[[0, 1, 3]])
        assert torch.equal(clustering.kmeans(hard_LNN[:2], 5, seed), hard[:2])
    same_LNN = hard_LNN[:1].expand(LAYERS, -1, -1)
    assert not (clustering.plus_plus(same_LNN, 5, 0) == clustering.plus_plus(same_LNN, 5, 0)[0]).all()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_heads_end_in_some_groups(value: float) -> None:
    labels_LN = clustering.kmeans(torch.full((2, 6, 6), value, dtype=torch.float64), 3, seed=0)
    assert labels_LN.shape == (2, 6)
    assert 0 <= int(labels_LN.min()) <= int(labels_LN.max()) < 3


def test_more_groups_than_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="7 groups of 6 heads"):
        clustering.kmeans(torch.eye(6, dtype=torch.float64)[None], 7, seed=0)


def test_groups_are_numbered_by_their_first_heads() -> None:
    labels_LN = torch.tensor([[2, 0, 2, 3, 0], [1, 1, 1, 1, 0]])  # group 1 of the first layer, 2 and 3 of the second are empty
    assert clustering.align(labels_LN, None, 4).tolist() == [[0, 1, 0, 2, 1], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7])
def test_alignment_keeps_as_many_heads_as_can_keep_their_group(groups: int) -> None:
    draw = torch.Generator().manual_seed(groups)
    labels_LN, previous_LN = torch.randint(groups, (2, 40, 11), generator=draw)
    aligned_LN = clustering.align(labels_LN, previous_LN, groups)
    numberings_PC = torch.tensor(list(itertools.permutations(range(groups))))
    for labels_N, previous_N, aligned_N in zip(labels_LN, previous_LN, aligned_LN, strict=True):
        assert partition(aligned_N.tolist()) == partition(labels_N.tolist())
        most = (numberings_PC[:, labels_N] == previous_N).sum(-1).max()
        assert (aligned_N == previous_N).sum() == most


def test_alignment_of_many_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    previous_LN = torch.arange(64).repeat(3, 4)
    renamed_LN = torch.stack([torch.randperm(64, generator=draw)[row] for row in previous_LN])
    assert torch.equal(clustering.align(renamed_LN, previous_LN, 64), previous_LN)
    gain = torch.randint(50, (64, 64), generator=draw).tolist()
    columns = clustering.assignment(gain)
    assert sorted(columns) == list(range(64))
    rows, wanted = linear_sum_assignment(gain, maximize=True)
    assert sum(gain[row][column] for row, column in enumerate(columns)) == np.array(gain)[rows, wanted].sum()


def test_membership_averages_groups() -> None:
    M_LNC = clustering.membership(torch.tensor([[0, 2, 0, 2, 2]]), 4, torch.float64)
    third = 1 / 3
    wanted = [[0.5, 0, 0, 0], [0, 0, third, 0], [0.5, 0, 0, 0], [0, 0, third, 0], [0, 0, third, 0]]
    torch.testing.assert_close(M_LNC, torch.tensor([wanted], dtype=torch.float64))
    assert clustering.group_sizes(torch.tensor([[0, 2, 0, 2, 2]]), 4).tolist() == [[2, 0, 3, 0]]


def test_centre_shift() -> None:
    x_LNF = clouds(10, 7, 3, 1.0)
    draw = torch.Generator().manual_seed(0)
    labels_LN, previous_LN = torch.randint(3, (2, LAYERS, 10), generator=draw)
    labels_LN[:, :3] = previous_LN[:, :3] = torch.arange(3)
    found_L = clustering.centre_shift(gram(x_LNF), labels_LN, previous_LN, 3)
    for x_NF, labels_N, previous_N, found in zip(x_LNF, labels_LN, previous_LN, found_L, strict=True):
        moved = [(x_NF[labels_N == j].mean(0) - x_NF[previous_N == j].mean(0)).norm() for j in range(3)]
        assert float(found) == pytest.approx(float(sum(moved) / 3 / x_NF.square().sum(1).mean().sqrt()), rel=1e-9)
    assert clustering.centre_shift(gram(x_LNF), labels_LN, labels_LN, 3).tolist() == [0] * LAYERS
    assert clustering.centre_shift(torch.zeros(LAYERS, 10, 10), labels_LN, previous_LN, 3).tolist() == [0] * LAYERS


def grouped(heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Maps and groups of them, one of which has one head."""
    x_LNF = clouds(heads, 9, groups, 0.7)
    labels_LN = torch.randint(groups - 1, (LAYERS, heads), generator=torch.Generator().manual_seed(heads))
    labels_LN[:, 2] = groups - 1
    return x_LNF, labels_LN


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (12, 4), (40, 7)])
def test_silhouette_is_that_of_scikit_learn(heads: int, groups: int) -> None:
    x_LNF, labels_LN = grouped(heads, groups)
    wanted = [silhouette_score(x.numpy(), labels.numpy()) for x, labels in zip(x_LNF, labels_LN, strict=True)]
    for possible in (groups, groups + 2):  # empty groups change nothing
        assert clustering.silhouette(gram(x_LNF), labels_LN, possible).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (12, 4), (40, 7)])
def test_dunn_by_brute_force(heads: int, groups: int) -> None:
    x_LNF, labels_LN = grouped(heads, groups)
    found = clustering.dunn(gram(x_LNF), labels_LN, groups + 1).tolist()
    for x_NF, labels, value in zip(x_LNF, labels_LN.tolist(), found, strict=True):
        between: list[float] = []
        within: list[float] = []
        for i, j in itertools.combinations(range(heads), 2):
            (within if labels[i] == labels[j] else between).append(float((x_NF[i] - x_NF[j]).norm()))
        assert value == pytest.approx(min(between) / max(within), rel=1e-9)


@pytest.mark.parametrize("labels", [list(range(6)), [0] * 6], ids=["a group for each head", "one group"])
@pytest.mark.parametrize("figure", [clustering.silhouette, clustering.dunn])
def test_figures_without_a_value_are_zero(labels: list[int], figure: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    G_LNN = gram(clouds(6, 4, 2, 1.0))
    assert figure(G_LNN, torch.tensor(labels).expand(LAYERS, -1), 6).tolist() == [0] * LAYERS
    alike_LNN = torch.ones(LAYERS, 6, 6, dtype=torch.float64)
    assert figure(alike_LNN, torch.tensor([0, 1] * 3).expand(LAYERS, -1), 2).tolist() == [0] * LAYERS


def test_homogeneity_and_diversity() -> None:
    x_LNF, labels_LN = grouped(12, 4)
    alike, apart = (figure(gram(x_LNF), labels_LN, 4).tolist() for figure in (clustering.homogeneity, clustering.diversity))
    cosine = torch.nn.functional.cosine_similarity
    for x_NF, labels_N, homogeneity, diversity in zip(x_LNF, labels_LN, alike, apart, strict=True):
        centres = [x_NF[labels_N == group].mean(0) for group in range(4)]
        own = [float(cosine(x, centres[label], dim=0)) for x, label in zip(x_NF, labels_N.tolist(), strict=True)]
        pairs = [float(cosine(a, b, dim=0)) for a, b in itertools.combinations(centres, 2)]
        assert homogeneity == pytest.approx(sum(own) / len(own), rel=1e-9)
        assert diversity == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
    assert clustering.diversity(gram(x_LNF), torch.zeros(LAYERS, 12, dtype=torch.int64), 1).tolist() == [0] * LAYERS


@pytest.mark.parametrize("groups", [2, 4, 7])
def test_number_of_groups_is_that_of_the_clouds(groups: int) -> None:
    x_LNF = clouds(40, 30, groups, 0.05, seed=groups)
    x_LNF[0] = clouds(40, 30, 3, 0.05)[0]  # one layer that disagrees
    assert clustering.choose_groups(gram(x_LNF), 8, seed=0) == groups


def test_of_equally_good_numbers_of_groups_the_least() -> None:
    """Four equal heads: every grouping has silhouette 0."""
    assert clustering.choose_groups(torch.zeros(2, 4, 4, dtype=torch.float64), 3, seed=0) == 2
    with pytest.raises(ValueError, match="5 groups of 4 heads"):
        clustering.choose_groups(gram(clouds(4, 3, 2, 1.0)), 5, seed=0)


def test_angles_of_heads_on_a_circle() -> None:
    """By hand: heads at 0°, 60° and 180° with the first two in a group, whose centre is at 30°."""
    angles = torch.tensor([0, math.pi / 3, math.pi], dtype=torch.float64)
    lengths = torch.tensor([[1.0, 1.0, 7.0]], dtype=torch.float64)
    x_LNF = torch.stack([angles.cos(), angles.sin()], -1)[None] * lengths[..., None]
    labels_LN = torch.tensor([[0, 0, 1]])
    assert clustering.homogeneity(gram(x_LNF), labels_LN, 2).item() == pytest.approx((math.sqrt(3) + 1) / 3)
    assert clustering.diversity(gram(x_LNF), labels_LN, 2).item() == pytest.approx(-math.sqrt(3) / 2)
