"""Section `gha`: grouped heads, their constraint, the vote and the pruning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from configs.schema.base import Fault, Section


class GHAConfig(Section):
    """Grouped Head Attention (arXiv 2305.14380)."""

    stage: Literal["off", "constrain", "vote", "schedule"] = Field(
        "off",
        description="constrain: group heads and constrain them while training; vote: train nothing, let batches vote which "
        "heads stay; schedule: constrain, vote, cut the heads, train on (docs/gha.md)",
    )
    feature_map: Literal["value", "attention", "output"] = Field(
        "value",
        description="What of a head is compared: its values, its attention weights, or its output before the projection",
    )
    groups: int | None = Field(
        None, ge=2, le=2**10, description="Groups of heads in each layer; null: chosen by silhouette at the first grouping"
    )
    max_groups: int = Field(8, ge=2, le=2**10, description="Most groups that are tried where groups is null")
    regroup_every: int = Field(1, ge=1, le=10**9, description="Steps between groupings; 1: at every batch, as the paper does")
    gram_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the running Gram matrices that a step keeps; 0: groups follow the last batch alone",
    )
    loss: Literal["continuous", "categorical"] = Field(
        "continuous", description="Cosines to and between group centres, or a classifier of heads into groups"
    )
    alpha: float = Field(
        0.03, ge=0, le=1e6, description="Weight of likeness within groups; the constraint is a mean over layers"
    )
    beta: float = Field(0.01, ge=0, le=1e6, description="Weight of difference between groups")
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps in which alpha and beta rise from zero")
    end_step: int | None = Field(
        None, ge=1, le=10**9, description="Step after which heads are not constrained any more; null: none, or the vote"
    )
    attention_rows: int = Field(
        16,
        ge=0,
        le=2**24,
        description="feature_map attention: queries of each sequence whose weights are compared, evenly spaced; 0: all",
    )
    converged_shift: float | None = Field(
        None,
        ge=1e-9,
        le=2,
        description="schedule: vote once the mean shift of group centres has been below this; null: at vote_at_step",
    )
    converged_groupings: int = Field(
        100, ge=1, le=10**9, description="schedule: for so many groupings one after the other, once alpha and beta have risen"
    )
    vote_at_step: int | None = Field(None, ge=1, le=10**9, description="schedule: vote after this step at the latest")
    vote_batches: int | None = Field(None, ge=1, le=10**9, description="Batches that vote, a ballot each; null: one epoch")
    ballot: Literal["votes", "scores"] = Field(
        "votes", description="A batch gives the best head of each group one vote, or every head its score"
    )
    heads_per_group: int = Field(1, ge=1, le=2**10, description="Heads that stay for each group")

    def faults(self) -> Iterator[Fault]:
        if self.end_step is not None and self.end_step <= self.warmup_steps:
            yield Fault("end_step", self.end_step, f"must be above warmup_steps ({self.warmup_steps})")
        if self.stage == "schedule" and self.vote_at_step is None:
            yield Fault("vote_at_step", None, "stage schedule needs it: the step after which it votes at the latest")
