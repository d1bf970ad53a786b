"""What a part of a study shows, in sentences that each say how certain they are. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.costs.solve import TOLERANCE
from pretrain.studies.groups import Group, Key, Part
from pretrain.studies.pool import Member
from pretrain.studies.spread import Difference
from pretrain.studies.wording import difference_words

MOST_LABELS = 5  # of an axis, or groups of other parts, that are told of
MATCHED = {"parameters": "parameters", "flops": "flops_per_token", "kv_bytes": "kv_bytes"}  # figures by costs of a match


def findings(part: Part) -> Iterator[str]:
    known = [(loss.mean, group) for group in part.tuned if (loss := part.loss(group))]
    if not known:
        return
    known.sort(key=lambda pair: pair[0])
    yield _lowest(part, [group for _, group in known])
    yield from _against_mha(part)
    yield from _of_heads(part)
    yield from _of_labels(part)
    edges = [group.label for group in part.tuned if part.at_edge(group)]
    if edges:
        yield f"The best learning rate is the lowest or highest tried, so a better one may lie beyond: {'; '.join(edges)}."


def _lowest(part: Part, groups: list[Group]) -> str:
    first = part.loss(groups[0])
    assert first is not None
    said = f"Lowest loss: {groups[0].label}, {first.words()}."
    if len(groups) > 1 and (away := part.against(groups[1], groups[0])):
        said += f" The next, {groups[1].label}, is {difference_words(away)} above: {_certainty(away)}."
    return said


def matched(members: Sequence[Member]) -> Iterator[str]:
    """How groups that were matched in cost differ from those of other parts that cost the same."""
    for member in members:
        cost = (member.group.runs[0].match or {}).get("cost")
        if cost not in MATCHED:
            continue
        others = [one for one in members if one.part is not member.part and _costs_the_same(member, one, MATCHED[cost])]
        found = [(other.label, away) for other in others if (away := member.above(other)) is not None]
        found.sort(key=lambda pair: pair[1].half is None)  # those of several seeds first
        told = [f"{label}: {difference_words(away)} ({_certainty(away)})" for label, away in found[:MOST_LABELS]]
        if told:
            name = cost.replace("kv_bytes", "bytes of cache")
            yield f"{member.label} minus what has as many {name}, {'; '.join(told)}."


def _costs_the_same(one: Member, other: Member, figure: str) -> bool:
    own, theirs = one.group.figures[figure].mean, other.group.figures[figure].mean
    return abs(own - theirs) <= TOLERANCE * max(own, theirs)


def _against_mha(part: Part) -> Iterator[str]:
    """How far the groups of each series are from mha with as many heads; and the same of those with as many parameters."""
    for equal in (False, True):
        series: dict[str, list[Difference]] = {}
        for group in part.tuned:
            reference = part.reference(group, "mha")
            if reference is None or reference is group or (equal and not part.same_parameters(group, reference)):
                continue
            if away := part.against(group, reference):
                series.setdefault(group.without("rate", "heads", "size") or part.name, []).append(away)
        if series:
            scope = "At parameters equal to those of mha, within 0.5 %, loss minus its" if equal else "Loss minus that of mha"
            told = "; ".join(f"{name} {_range(found)}" for name, found in series.items())
            yield f"{scope}, with as many heads: {told}."


def _range(found: list[Difference]) -> str:
    """One difference with its interval; of several the lowest and the highest, and how many are separated from zero."""
    if len(found) == 1:
        return f"{difference_words(found[0])} ({_certainty(found[0])})"
    low, high = (f"{pick(one.mean for one in found):+.4f}".replace("-", "−") for pick in (min, max))
    if all(one.half is None for one in found):
        return f"{low} to {high} (one seed)"
    higher, lower = (sum(one.separated and (one.mean > 0) == above for one in found) for above in (True, False))
    counts = [f"higher in {higher} of {len(found)}"] * (higher > 0) + [f"lower in {lower} of {len(found)}"] * (lower > 0)
    return f"{low} to {high} ({', '.join(counts) or f'separated in none of {len(found)}'})"


def _of_labels(part: Part) -> Iterator[str]:
    """What the labels of each axis of few change against its first one, all else equal."""
    for axis in part.axes("other", *(("variant",) if part.compared_to == "lowest" else ())):
        labels = list(dict.fromkeys(label for group in part.tuned if (label := group.label_of(axis)) is not None))
        told = []
        for label in labels[1:MOST_LABELS]:
            pairs = [
                (one, other) for one in part.tuned for other in part.tuned if _replaces(one, other, axis, label, labels[0])
            ]
            found = [away for one, other in pairs if (away := part.against(one, other)) is not None]
            if found:
                told.append(f"{label} minus {labels[0]} {_range(found)}")
        if told:
            yield f"{axis.rpartition('.')[2]}, all else equal: {'; '.join(told)}."


def _replaces(one: Group, other: Group, axis: str, label: str, by: str) -> bool:
    """Whether two groups differ in the label of this axis alone."""
    own, theirs = dict(one.rest("rate")), dict(other.rest("rate"))
    return own.pop(axis, None) == label and theirs.pop(axis, None) == by and own == theirs


def _of_heads(part: Part) -> Iterator[str]:
    """What more heads change, from the fewest to the most of each series."""
    series: dict[Key, list[Group]] = {}
    for group in part.tuned if part.axes("heads") else ():
        series.setdefault(group.rest("rate", "heads"), []).append(group)
    told = []
    for groups in series.values():
        few, many = min(groups, key=lambda group: group.heads), max(groups, key=lambda group: group.heads)
        if few.heads < many.heads and (away := part.against(many, few)):
            name = many.without("rate", "heads") or part.name
            told.append(f"{name} {difference_words(away)} from {few.heads} to {many.heads} ({_certainty(away)})")
    if told:
        yield f"More heads change the loss by: {'; '.join(told)}."


def _certainty(away: Difference) -> str:
    if away.half is None:
        return "one seed"
    return "separated" if away.separated else "not separated"
