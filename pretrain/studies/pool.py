"""Groups of several parts that may be compared: of the same data, tokens and validation. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from pretrain.studies.groups import Group, Part
from pretrain.studies.spread import Difference, Spread, difference


@dataclass(frozen=True)
class Member:
    """A group of a part, at its best learning rate, with its final loss."""

    part: Part
    group: Group
    loss: Spread

    @property
    def label(self) -> str:
        """Such as embeddings: add, num_seeds 4."""
        return self.part.name if self.group.label == self.part.name else f"{self.part.name}: {self.group.label}"

    def above(self, other: Member) -> Difference | None:
        """Its loss minus that of another."""
        values, others = (member.group.by_seed(member.part.final) for member in (self, other))
        return difference(values, others) if values and others else None


def pools(parts: Sequence[Part]) -> Iterator[list[Member]]:
    """Members of two parts or more that had the same text, tokens and validation, those with the lowest loss first."""
    found: dict[Hashable, list[Member]] = {}
    for part in parts:
        for group in part.tuned:
            if loss := part.loss(group):
                found.setdefault(_same(part, group), []).append(Member(part, group, loss))
    for members in found.values():
        if len({member.part.name for member in members}) > 1:
            yield sorted(members, key=lambda member: member.loss.mean)


def _same(part: Part, group: Group) -> Hashable:
    config = group.runs[0].config
    assert config is not None
    training, validation = config.training, config.validation
    tokens = training.steps * training.global_batch_size * config.data.sequence_length
    measured = (part.held_out, repr(validation.sets), validation.samples, training.objective)
    return (tokens, repr(config.data), *measured)
