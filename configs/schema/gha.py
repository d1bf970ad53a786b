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
        description="constrain: group heads and constrain them while training; vote: do not train, let batches vote on which "
        "heads to keep; schedule: constrain, vote, prune heads, continue training (docs/gha.md)",
    )
    feature_map: Literal["value", "attention", "output"] = Field(
        "value",
        description="What heads are compared by: values, attention weights, or outputs before the projection",
    )
    groups: int | None = Field(
        None, ge=2, le=2**10, description="Groups of heads in each layer; null: chosen by silhouette at the first grouping"
    )
    max_groups: int = Field(8, ge=2, le=2**10, description="Largest number of groups tried when groups is null")
    regroup_every: int = Field(1, ge=1, le=10**9, description="Steps between groupings; 1: every batch, as in the paper")
    gram_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay factor of the running Gram matrices per step; 0: groups depend on the last batch only",
    )
    loss: Literal["continuous", "categorical"] = Field(
        "continuous",
        description="continuous: cosines to and between group centres; categorical: a classifier of heads into groups",
    )
    alpha: float = Field(
        0.03, ge=0, le=1e6, description="Weight of similarity within groups; the constraint is a mean over layers"
    )
    beta: float = Field(0.01, ge=0, le=1e6, description="Weight of dissimilarity between groups")
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps over which alpha and beta rise from zero")
    end_step: int | None = Field(
        None, ge=1, le=10**9, description="Step after which heads are no longer constrained; null: never, or the vote"
    )
    attention_rows: int = Field(
        16,
        ge=0,
        le=2**24,
        description="feature_map attention: how many evenly spaced queries of each sequence are compared; 0: all",
    )
    converged_shift: float | None = Field(
        None,
        ge=1e-9,
        le=2,
        description="schedule: vote once the mean shift of group centres has been below this; null: at vote_at_step",
    )
    converged_groupings: int = Field(
        100, ge=1, le=10**9, description="schedule: for this many consecutive groupings after alpha and beta have risen"
    )
    vote_at_step: int | None = Field(None, ge=1, le=10**9, description="schedule: vote after this step at the latest")
    vote_batches: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Batches that vote, one ballot each; null: one epoch; in a mixture the samples of an epoch of each source",
    )
    ballot: Literal["votes", "scores"] = Field(
        "votes",
        description="votes: a batch gives one vote to the best head of each group; scores: it gives every head its score",
    )
    heads_per_group: int = Field(1, ge=1, le=2**10, description="Heads kept for each group")

    def faults(self) -> Iterator[Fault]:
        if self.end_step is not None and self.end_step <= self.warmup_steps:
            yield Fault("end_step", self.end_step, f"must be above warmup_steps ({self.warmup_steps})")
        if self.stage == "schedule" and self.vote_at_step is None:
            yield Fault("vote_at_step", None, "stage schedule needs it: the step after which it votes at the latest")
