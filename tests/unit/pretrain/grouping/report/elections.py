"""Elections that tests of the report share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from model.gha.voting import BallotKind, Ballots, Election, LayerElection


def config(attention: str = "mha", heads: int = 8, layers: int = 2, backend: str = "deepspeed", **gha: Any) -> Config:
    model = {"attention": attention, "hidden_size": 64, "num_layers": layers, "num_heads": heads, "head_dim": 6}
    sections = {
        "run": {"folder": "runs/one"},
        "model": model,
        "data": {"path": "data", "sequence_length": 32},
        "training": {"steps": 10, "global_batch_size": 1, "micro_batch_size": 1},
        "gha": gha,
    }
    return Config.model_validate({"backend": backend, **sections}).resolved(tokenizer_size=100)


def voted(
    layers: int, heads: int, groups: int, heads_per_group: int = 1, ballot: BallotKind = "votes", count: int = 20
) -> tuple[Election, Tensor]:
    """An election over random maps, and the sum of their Gram matrices."""
    generator = torch.Generator().manual_seed(layers * heads + groups)
    labels_LN = torch.stack([torch.randperm(heads, generator=generator) % groups for _ in range(layers)])
    centres_LCX = torch.randn(layers, groups, 30, generator=generator, dtype=torch.float64)
    ballots, total_LNN = Ballots(labels_LN, groups, ballot, "continuous"), torch.zeros(layers, heads, heads).double()
    for _ in range(count):
        noise_LNX = torch.randn(layers, heads, 30, generator=generator, dtype=torch.float64)
        maps_LNX = noise_LNX + torch.stack(
            [centres_CX[labels_N] for centres_CX, labels_N in zip(centres_LCX, labels_LN, strict=True)]
        )
        gram_LNN = maps_LNX @ maps_LNX.transpose(1, 2)
        ballots.add(gram_LNN)
        total_LNN += gram_LNN
    return ballots.elect(7, "value", heads_per_group), total_LNN


def one_layer(labels: Sequence[int], scores: Sequence[float], kept: Sequence[int], **changes: Any) -> Election:
    """An election of one layer; margins, which pages work out themselves, are left at 0."""
    groups = max(labels) + 1
    layer = LayerElection(tuple(labels), tuple(map(float, scores)), tuple(kept), (0.0,) * groups)
    fields: dict[str, Any] = {
        "step": 7,
        "feature_map": "output",
        "ballot": "votes",
        "ballots": 100,
        "heads_per_group": len(kept) // groups,
    }
    return Election(**fields | {"groups": groups} | changes, layers=(layer,))
