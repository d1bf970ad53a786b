"""Margins and doubts of an election by hand."""

from __future__ import annotations

import pytest

from model.gha.voting import BallotKind
from pretrain.grouping.report.decisions import Decision, decisions
from tests.unit.pretrain.grouping.report.elections import one_layer, voted


@pytest.mark.parametrize("ballot", ["votes", "scores"])
@pytest.mark.parametrize("heads_per_group", [1, 2])
def test_margins_are_those_of_the_election(ballot: BallotKind, heads_per_group: int) -> None:
    election, _ = voted(layers=3, heads=16, groups=4, ballot=ballot, heads_per_group=heads_per_group)
    for layer in election.layers:
        assert [decision.margin for decision in decisions(election, layer)] == pytest.approx(layer.margins)


def test_a_margin_is_between_the_last_that_stays_and_the_first_that_goes() -> None:
    election = one_layer(labels=[0, 1, 0, 0, 1, 0], scores=[30, 90, 40, 10, 10, 20], kept=[0, 1, 2, 4])
    assert decisions(election, election.layers[0]) == [
        Decision((2, 0, 5, 3), (2, 0), (5, 3), 0.1, doubtful=True),  # of 100 ballots
        Decision((1, 4), (1, 4), (), 1.0, doubtful=False),
    ]


@pytest.mark.parametrize(("best", "doubtful"), [(50, True), (55, True), (59, True), (60, False), (80, False), (100, False)])
def test_votes_are_doubtful_up_to_two_standard_errors(best: int, doubtful: bool) -> None:
    # Of 100 ballots, 60 to 40: a difference of 0.2 with the standard error √((1 − 0.2²) / 100) = 0.098; 59 to 41: 0.18, 0.0984.
    election = one_layer([0, 0], [best, 100 - best], [0])
    assert decisions(election, election.layers[0])[0].doubtful is doubtful


@pytest.mark.parametrize(("second", "doubtful"), [(79.5, True), (79.0, False)])
def test_scores_are_doubtful_below_a_hundredth(second: float, doubtful: bool) -> None:
    election = one_layer([0, 0], [80, second], [0], ballot="scores")
    assert decisions(election, election.layers[0])[0].doubtful is doubtful
