"""What an election decided: which heads of a group stay, how sure that is, and what pruning the others saves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from configs.schema import Config, ModelConfig
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.gha.pruning import prune_config
from model.gha.voting import Election, LayerElection, margin

DOUBTFUL_SCORE = 0.01  # with summed scores, a lead below this share is doubtful; votes have a standard error instead


@dataclass(frozen=True)
class Decision:
    """A group of a layer: its heads, best first, and how narrowly they were told apart.

    `margin` is the lead of the last head that stays over the first that goes, as a share of ballots (votes) or of its own score
    (scores); 1 where all stay.
    """

    members: tuple[int, ...]
    stays: tuple[int, ...]
    goes: tuple[int, ...]
    margin: float
    doubtful: bool


def after_election(model: ModelConfig, election: Election) -> ModelConfig:
    """The model without the heads that go."""
    return prune_config(model, [layer.kept for layer in election.layers])


def decisions(election: Election, layer: LayerElection) -> list[Decision]:
    """The decisions of a layer, one for each group, in order."""
    found = []
    for group in range(election.groups):
        members = [head for head, label in enumerate(layer.labels) if label == group]
        ranked = sorted(members, key=lambda head: (-layer.scores[head], head))
        stays = tuple(head for head in ranked if head in layer.kept)
        goes = tuple(head for head in ranked if head not in layer.kept)
        lead, doubtful = 1.0, False
        if stays and goes:
            lead, doubtful = _lead(election, layer.scores[stays[-1]], layer.scores[goes[0]])
        found.append(Decision(tuple(ranked), stays, goes, lead, doubtful))
    return found


def savings(config: Config, election: Election) -> dict[str, tuple[int, int]]:
    """Figure → before and after pruning, by the formulas of model/costs."""
    models, length = (config.model, after_election(config.model, election)), config.data.sequence_length

    def pair(values: Iterable[int]) -> tuple[int, int]:
        before, after = values
        return before, after

    return {
        "Heads of a layer": pair(model.num_heads for model in models),
        "Parameters of an attention layer": pair(parameters(model)["attention"] // model.num_layers for model in models),
        "Parameters of the model": pair(sum(parameters(model).values()) for model in models),
        "KV cache, bytes per token (bf16)": pair(kv_cache_bytes_per_token(model) for model in models),
        f"Training FLOPs per token (sequences of {length:,})": pair(flops_per_token(model, length) for model in models),
    }


def _lead(election: Election, last: float, first_out: float) -> tuple[float, bool]:
    """The margin, and whether it is doubtful: for votes, below two standard errors of the difference of two shares."""
    lead = margin(last, first_out, election.ballot, election.ballots)
    if election.ballot == "scores":
        return lead, lead < DOUBTFUL_SCORE
    shares = (last + first_out) / election.ballots
    return lead, lead <= 2 * math.sqrt(max(0.0, shares - lead**2) / election.ballots)
