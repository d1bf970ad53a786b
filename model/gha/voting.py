"""Which heads to keep (V2S, voting to stay, of Grouped Head Attention, arXiv 2305.14380)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.errors import UserError
from model.gha.clustering import one_hot
from model.gha.losses import Loss, scores

BallotKind = Literal["votes", "scores"]
FeatureMap = Literal["value", "attention", "output"]
ROUNDING = 1e-12  # scores that differ by less count as equal, as those of equal heads or of two heads of equal length do


@dataclass(frozen=True)
class LayerElection:
    labels: tuple[int, ...]  # group of each head
    scores: tuple[float, ...]  # of each head, over all ballots: votes, or η summed
    kept: tuple[int, ...]  # heads to keep, ascending
    margins: tuple[float, ...]  # `margin` of each group; 1 if all of its heads are kept, 0 if none is


@dataclass(frozen=True)
class Election:
    """Every layer keeps groups · heads_per_group heads."""

    step: int
    feature_map: FeatureMap
    ballot: BallotKind
    ballots: int
    heads_per_group: int
    groups: int
    layers: tuple[LayerElection, ...]


class Ballots:
    """The votes so far; groups are fixed."""

    def __init__(self, labels_LN: Tensor, groups: int, ballot: BallotKind, loss: Loss) -> None:
        """`ballot`: the head with the highest η of each group gets one vote, or every head gets its η; `loss` defines η."""
        self.labels_LN, self.groups, self.ballot, self.loss = labels_LN, groups, ballot, loss
        self.count = 0
        self.totals_LN = torch.zeros(labels_LN.shape, dtype=torch.float64)

    def add(self, G_LNN: Tensor) -> None:
        """Add one ballot, usually a batch. UserError if its maps are not finite."""
        if not G_LNN.isfinite().all():
            raise UserError(f"ballot {self.count + 1}: the heads' feature maps are not finite; the model has diverged")
        eta_LN = scores(G_LNN.double(), self.labels_LN, self.groups, self.loss)
        self.totals_LN += eta_LN if self.ballot == "scores" else self._votes(eta_LN)
        self.count += 1

    def _votes(self, eta_LN: Tensor) -> Tensor:
        """1 for the head with the highest η of each group, the first one in a tie, else 0."""
        own_LNC = one_hot(self.labels_LN, self.groups, torch.bool)
        eta_LNC = eta_LN[..., None].where(own_LNC, -torch.inf)
        best_LNC = own_LNC & (eta_LNC >= eta_LNC.amax(-2, keepdim=True) - ROUNDING)
        return (best_LNC & (best_LNC.cumsum(-2) == 1)).any(-1).double()

    def elect(self, step: int, feature_map: FeatureMap, heads_per_group: int) -> Election:
        """The result. Every layer keeps the `heads_per_group` best heads of each group, the first ones in a tie.

        Places that smaller groups leave open go to the best of the layer's other heads.
        """
        layers, heads = self.labels_LN.shape
        if not self.count:
            raise ValueError("there are no ballots")
        if not 1 <= self.groups * heads_per_group <= heads:
            raise ValueError(f"{heads_per_group} heads of each of {self.groups} groups of {heads} heads")
        return Election(
            step=step,
            feature_map=feature_map,
            ballot=self.ballot,
            ballots=self.count,
            heads_per_group=heads_per_group,
            groups=self.groups,
            layers=tuple(self._elect_layer(layer, heads_per_group) for layer in range(layers)),
        )

    def _elect_layer(self, layer: int, heads_per_group: int) -> LayerElection:
        labels, totals = self.labels_LN[layer].tolist(), self.totals_LN[layer].tolist()
        means = [round(total / self.count, 12) for total in totals]
        ranked = sorted(range(len(labels)), key=lambda head: -means[head])  # stable: the first one in a tie
        members = [[head for head in ranked if labels[head] == group] for group in range(self.groups)]
        kept = {head for group in members for head in group[:heads_per_group]}
        places = self.groups * heads_per_group - len(kept)
        kept.update([head for head in ranked if head not in kept][:places])
        margins = []
        for group in members:
            stay, go = ([totals[head] for head in group if (head in kept) is stays] for stays in (True, False))
            margins.append(margin(stay[-1], go[0], self.ballot, self.count) if stay and go else float(bool(stay)))
        return LayerElection(tuple(labels), tuple(totals), tuple(sorted(kept)), tuple(margins))


def margin(last: float, first_out: float, ballot: BallotKind, ballots: int) -> float:
    """The lead of a group's last kept head over the first pruned one, from 0 to 1.

    Relative to the number of ballots (votes) or to its own score (scores); 0 if that is not positive.
    """
    scale = float(ballots) if ballot == "votes" else last
    return min(1.0, max(0.0, (last - first_out) / scale)) if scale > 0 else 0.0
