"""Votes by hand, and which election files are accepted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from model.gha.voting import Ballots, Election, LayerElection
from pretrain.grouping.election import ElectionFile, read_election, write_election


def fan(*groups: Sequence[float]) -> Tensor:
    """G_NN of heads in a separate plane for each group, at these angles in degrees."""
    maps = [
        [0.0] * 2 * group
        + [math.cos(math.radians(angle)), math.sin(math.radians(angle))]
        + [0.0] * 2 * (len(groups) - 1 - group)
        for group, angles in enumerate(groups)
        for angle in angles
    ]
    x_NF = torch.tensor(maps, dtype=torch.float64)
    return x_NF @ x_NF.T


def held(
    ballots: list[Tensor], labels: list[list[int]], groups: int, ballot: Literal["votes", "scores"] = "votes", stay: int = 1
) -> Election:
    """The election of ballots (L, N, N)."""
    counted = Ballots(torch.tensor(labels), groups, ballot, "continuous")
    for G_LNN in ballots:
        counted.add(G_LNN)
    return counted.elect(step=7, feature_map="value", heads_per_group=stay)


# Heads 0, 1, 2 in one group, 3, 4 in the other. Heads at 0°, 30°, 60° have their centre at 30°: the one in the middle wins. Two
# heads are equally near to their centre: the first wins.
LABELS = [0, 0, 0, 1, 1]
MIDDLE_0, MIDDLE_1 = fan([30, 0, 60], [0, 40])[None], fan([0, 30, 60], [20, 80])[None]
COS_30 = math.cos(math.radians(30))


def test_votes_by_hand() -> None:
    election = held([MIDDLE_0, MIDDLE_1, MIDDLE_1, MIDDLE_1], [LABELS], 2)
    assert election == Election(
        step=7,
        feature_map="value",
        ballot="votes",
        ballots=4,
        heads_per_group=1,
        groups=2,
        layers=(LayerElection(tuple(LABELS), scores=(1, 3, 0, 4, 0), kept=(1, 3), margins=(0.5, 1.0)),),
    )


def test_scores_by_hand() -> None:
    """Head 1 has cos 0° three times and cos 30° once, head 0 the other way round; the second group has cos 20° and cos 30°."""
    (layer,) = held([MIDDLE_0, MIDDLE_1, MIDDLE_1, MIDDLE_1], [LABELS], 2, "scores").layers
    two = math.cos(math.radians(20)) + 3 * COS_30
    assert layer.scores == pytest.approx((1 + 3 * COS_30, 3 + COS_30, 4 * COS_30, two, two), abs=1e-12)
    assert layer.kept == (1, 3)
    assert layer.margins == pytest.approx(((3 + COS_30 - 1 - 3 * COS_30) / (3 + COS_30), 0), abs=1e-12)


def test_the_categorical_score_is_a_probability() -> None:
    """All heads of a group at its centre and the groups at right angles: p = e^10 / (e^10 + 1)."""
    counted = Ballots(torch.tensor([LABELS]), 2, "scores", "categorical")
    for _ in range(3):
        counted.add(fan([0, 0, 0], [0, 0])[None])
    assert counted.totals_LN.tolist() == [pytest.approx([3 * math.exp(10) / (math.exp(10) + 1)] * 5)]


def test_of_equal_heads_the_first_is_voted_for_and_kept() -> None:
    """Two ballots, one for each of heads 1 and 2: a tie of votes. Equal maps: ties of η in every ballot."""
    middle_2 = fan([0, 60, 30], [0, 40])[None]
    (layer,) = held([middle_2, MIDDLE_1], [LABELS], 2).layers
    assert (layer.scores, layer.kept, layer.margins) == ((0, 1, 1, 2, 0), (1, 3), (0, 1))
    (layer,) = held([torch.ones(1, 4, 4, dtype=torch.float64)] * 3, [[1, 0, 1, 0]], 2).layers
    assert (layer.scores, layer.kept, layer.margins) == ((3, 3, 0, 0), (0, 1), (1, 1))


def test_two_heads_for_each_group() -> None:
    """The margin is that of the second head over the third, by 1 vote to 0 of 3; in the second group all are kept."""
    (layer,) = held([MIDDLE_0, MIDDLE_1, MIDDLE_1], [LABELS], 2, stay=2).layers
    assert (layer.scores, layer.kept) == ((1, 2, 0, 3, 0), (0, 1, 3, 4))
    assert layer.margins == pytest.approx((1 / 3, 1))


def counted_out(labels: list[int], totals: list[float], groups: int, ballots: int, stay: int) -> LayerElection:
    """The result of these totals of scores in one layer."""
    counted = Ballots(torch.tensor([labels]), groups, "scores", "continuous")
    counted.totals_LN, counted.count = torch.tensor([totals], dtype=torch.float64), ballots
    return counted.elect(step=1, feature_map="output", heads_per_group=stay).layers[0]


def test_places_are_filled_from_all_groups() -> None:
    """Groups fill 5 of 8 places: heads 1, 8; 0; 3, 6. Of the others 7 is best, then 2; 4 and 5 are equal."""
    labels, totals = [1, 0, 2, 2, 2, 0, 2, 0, 0], [5.0, 9, 4, 6, 3, 3, 7, 8, 8.5]
    layer = counted_out(labels, totals, groups=4, ballots=10, stay=2)
    assert layer.kept == (0, 1, 2, 3, 4, 6, 7, 8)
    assert layer.margins == pytest.approx(((8 - 3) / 8, 1, 1, 0))  # 7 before 5; all of groups 1 and 2; nobody of group 3
    assert counted_out(labels, totals, groups=3, ballots=10, stay=2).kept == (0, 1, 3, 6, 7, 8)
    assert counted_out(labels, totals, groups=3, ballots=10, stay=1).kept == (0, 1, 6)
    assert counted_out([1] * 5 + [0] * 4, totals, groups=2, ballots=10, stay=1).kept == (1, 8)


def test_margins_are_shares() -> None:
    assert counted_out([0, 0, 1, 1], [2.0, -1, -1, -2], 2, 10, 1).margins == (1, 0)


def test_places_of_a_small_group_go_to_the_best_of_the_layer() -> None:
    """Group 1 has only head 3, group 2 none: of the 6 places 3 are filled by groups, 3 by the best others."""
    ballots = [fan(angles, [0])[None] for angles in ([30, 0, 60, 90, 120, 150], [0, 30, 60, 90, 120, 150])]
    # The centre of six heads 30° apart is at 75°: those at 60° and 90° are nearest, the first of them wins by number.
    labels = [[0, 0, 0, 0, 0, 0, 1]]
    (layer,) = held(ballots, labels, 3, "scores", stay=2).layers
    assert [head for head in range(7) if head not in layer.kept] == [5]  # in the first ballot heads 0 and 1 change places
    assert layer.margins[1:] == (1, 0)
    (layer,) = held(ballots, labels, 3, "votes", stay=2).layers
    assert sum(layer.scores) == 4
    assert layer.scores[6] == 2
    rest = [head for head in range(6) if not layer.scores[head]]
    assert set(layer.kept) == {head for head in range(7) if layer.scores[head]} | set(rest[: 6 - 7 + len(rest)])


def test_layers_are_elected_apart() -> None:
    """Two layers as one election, and each alone."""
    both = torch.cat([MIDDLE_0, MIDDLE_1])
    labels = [LABELS, [1, 0, 0, 1, 0]]
    election = held([both, both], labels, 2)
    for layer in range(2):
        assert election.layers[layer] == held([both[[layer]]] * 2, [labels[layer]], 2).layers[0]
    assert election.layers[0].kept == (0, 3)


def test_scores_below_zero_have_no_margin() -> None:
    """Opposite maps have no centre; rounding errors must not yield a margin."""
    x_NF = torch.tensor([[1.0, 2], [-1, -2], [3, 1]], dtype=torch.float64)
    (layer,) = held([(x_NF @ x_NF.T)[None]], [[0, 0, 1]], 2, "scores").layers
    assert layer.margins == (0, 1)


@pytest.mark.parametrize("ballot", ["votes", "scores"])
def test_votes_do_not_depend_on_the_order_of_ballots(ballot: Literal["votes", "scores"]) -> None:
    draw = torch.Generator().manual_seed(0)
    x_BLNF = torch.randn(9, 3, 8, 5, generator=draw, dtype=torch.float64)
    ballots = list(x_BLNF @ x_BLNF.transpose(-1, -2))
    labels = torch.randint(3, (3, 8), generator=draw).tolist()
    there, back = held(ballots, labels, 3, ballot, 2), held(ballots[::-1], labels, 3, ballot, 2)
    assert [layer.kept for layer in there.layers] == [layer.kept for layer in back.layers]
    assert all(len(layer.kept) == 6 for layer in there.layers)


def test_what_cannot_be_voted_on() -> None:
    counted = Ballots(torch.tensor([LABELS]), 2, "votes", "continuous")
    with pytest.raises(ValueError, match="there are no ballots"):
        counted.elect(1, "value", 1)
    counted.add(MIDDLE_0)
    with pytest.raises(ValueError, match="3 heads of each of 2 groups of 5 heads"):
        counted.elect(1, "value", 3)
    with pytest.raises(UserError, match="ballot 2: the heads' feature maps are not finite"):
        counted.add(MIDDLE_0 * math.nan)
    assert counted.count == 1


@pytest.fixture
def election() -> Election:
    both = torch.cat([MIDDLE_0, MIDDLE_1])
    return held([both] * 3, [LABELS, [1, 0, 0, 1, 2]], 3, "scores")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder whose marker has a hash."""
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    (folder / "complete.json").write_text("{}")
    return folder


def test_file_round_trip(election: Election, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gha/election.json"
    path.parent.mkdir()
    path.write_text("what was there before")
    write_election(path, election, checkpoint)
    assert [file.name for file in path.parent.iterdir()] == ["election.json"]
    sha256 = hashlib.sha256(b"{}").hexdigest()
    assert read_election(path) == ElectionFile("manyheads-election-1", str(checkpoint), sha256, election)
    content = json.loads(path.read_text())
    assert content["format"] == "manyheads-election-1"
    assert content["election"]["layers"][0]["kept"] == list(election.layers[0].kept)


def test_no_folder_to_write_to(election: Election, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/election\.json: cannot be written \(No such file or directory\)"):
        write_election(tmp_path / "absent" / "election.json", election, checkpoint)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def of_layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change fields of the second layer."""
    return lambda content: content["election"]["layers"][1].update(changes)


def of_election(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["election"].update(changes)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda c: c.update(format="manyheads-election-2"), "format: .*'manyheads-election-1'"),
    "no format": (lambda c: c.pop("format"), "format: Field required"),
    "no checkpoint": (lambda c: c.pop("checkpoint_sha256"), "checkpoint_sha256: Field required"),
    "no election": (lambda c: c.pop("election"), "election: Field required"),
    "no kept": (lambda c: c["election"]["layers"][1].pop("kept"), "election.layers.1.kept: Field required"),
    "no layers": (of_election(layers=[]), "it has no layers"),
    "step as text": (of_election(step="7"), "election.step: .*valid integer"),
    "step below zero": (of_election(step=-1), "step is -1, below 0"),
    "no ballots": (of_election(ballots=0), "ballots is 0, below 1"),
    "no heads per group": (of_election(heads_per_group=0), "heads_per_group is 0, below 1"),
    "no groups": (of_election(groups=0), "groups is 0, below 1"),
    "unknown map": (of_election(feature_map="keys"), "election.feature_map: "),
    "unknown ballot": (of_election(ballot="acclamation"), "election.ballot: "),
    "other heads per group": (of_election(heads_per_group=2), "layer 0: 3 heads stay, not 6"),
    "fewer groups": (of_election(groups=2), "layer 0: 3 margins of 2 groups"),
    "half a head": (of_layer(kept=[0, 1.5, 2]), "election.layers.1.kept.1: .*valid integer"),
    "another count": (of_layer(kept=[0, 1]), "layer 1: 2 heads stay, not 3"),
    "head out of range": (of_layer(kept=[0, 1, 5]), "layer 1: heads that stay must be from 0 to 4"),
    "head below zero": (of_layer(kept=[-1, 1, 2]), "layer 1: heads that stay must be from 0 to 4"),
    "a head twice": (of_layer(kept=[0, 1, 1]), "layer 1: heads that stay must be ascending"),
    "out of order": (of_layer(kept=[2, 1, 3]), "layer 1: heads that stay must be ascending"),
    "label out of range": (of_layer(labels=[0, 1, 2, 3, 0]), "layer 1: labels must be from 0 to 2"),
    "label below zero": (of_layer(labels=[0, 1, 2, -1, 0]), "layer 1: labels must be from 0 to 2"),
    "fewer labels": (of_layer(labels=[0, 1, 2, 0]), "layer 1: 4 labels and 5 scores of 5 heads"),
    "another number of heads": (of_layer(labels=[0, 1, 2, 0], scores=[0.0] * 4), "layer 1: 4 labels and 4 scores of 5 heads"),
    "fewer scores": (of_layer(scores=[1.0]), "layer 1: 5 labels and 1 scores of 5 heads"),
    "scores not finite": (of_layer(scores=[1.0, 2.0, 3.0, math.nan, 0.0]), "layer 1: scores must be finite"),
    "fewer margins": (of_layer(margins=[1.0]), "layer 1: 1 margins of 3 groups"),
    "margin above one": (of_layer(margins=[0.0, 1.5, 1.0]), "layer 1: margins must be from 0 to 1"),
    "margin not a number": (of_layer(margins=[0.0, math.nan, 1.0]), "layer 1: margins must be from 0 to 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, election: Election, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "election.json"
    write_election(path, election, checkpoint)
    edit, message = DAMAGE[damage]
    change(path, edit)
    with pytest.raises(UserError, match=message) as raised:
        read_election(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_other_files_are_refused(election: Election, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "election.json"
    with pytest.raises(UserError, match=r"election\.json: does not exist; a vote writes it: --gha\.stage=vote"):
        read_election(path)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_election(tmp_path)
    write_election(path, election, checkpoint)
    valid = path.read_bytes()
    for content in (b"", b"[]", b"no JSON", b"\xff\xfe\x00", valid[:-20], b"null"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not an election of manyheads, or damaged") as raised:
            read_election(path)
        assert "\n" not in str(raised.value)
