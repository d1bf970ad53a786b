"""Results of a study as a table on the terminal. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from pretrain.report.plot import compact
from pretrain.studies.collected import Fit
from pretrain.studies.findings import matched
from pretrain.studies.groups import Group, Part
from pretrain.studies.pool import Member
from pretrain.studies.spread import Spread
from pretrain.studies.wording import difference_words, figure, law_words

WIDTH = 100  # columns of the terminal
_NAME = 25
_LISTED = 24  # groups across parts
_COLUMNS = ("runs", "params", "KV B", "freedom", "tok/s", "GiB", "loss ± sd")
_WIDTHS = (4, 7, 6, 7, 7, 5, 15, 16)


def terminal(part: Part, fits: Sequence[Fit]) -> Iterator[str]:
    """Lines of at most WIDTH columns: counts, the groups at their best learning rates, failures, laws."""
    yield f"{part.name}  {part.counts()}"
    if part.tuned:
        yield _line("", (*_COLUMNS, f"− {part.compared_to}"))
        for group in part.tuned:
            yield from _named(group.label, [*_own_cells(group, part.loss(group)), difference_words(part.compared(group))])
        yield from _notes(part)
    for run in part.runs:
        if run.error:
            yield _within(f"  {run.status} {run.name}: {' '.join(run.error.split())}")
    for fit in fits:
        yield from _wrapped(law_words(fit))


def across(members: Sequence[Member]) -> Iterator[str]:
    """Lines of groups of several parts, those with the lowest loss first."""
    yield f"across parts, {figure(members[0].group, 'tokens')} tokens of the same text"
    yield _line("", (*_COLUMNS, "− lowest"))
    for member in members[:_LISTED]:
        above = member.above(members[0]) if member is not members[0] else None
        yield from _named(member.label, [*_own_cells(member.group, member.loss), difference_words(above)])
    if len(members) > _LISTED:
        yield f"and {len(members) - _LISTED} more with a higher loss, in the page"
    for line in matched(members):
        yield from _wrapped(line)


def _notes(part: Part) -> Iterator[str]:
    place = part.common("tokens")
    kind = "validation loss" if part.held_out else "training loss of the last steps"
    yield f"  {kind}; ± sd: over seeds; after − {part.compared_to} ± is the half of a 95 % interval"
    ends = {run.measured.tokens for run in part.finished if run.measured}
    if place and len(ends) > 1:
        yield f"  runs have different tokens; loss at {compact(place)} tokens is in the page, the CSV and the JSON"
    edges = [group.label for group in part.tuned if part.at_edge(group)]
    if edges:
        yield _within(f"  best learning rate at the edge of those tried: {'; '.join(edges)}")


def _own_cells(group: Group, loss: Spread | None) -> list[str]:
    return [
        str(len(group.runs)),
        *(figure(group, name) for name in ("parameters", "kv_bytes", "query_freedom", "tokens_per_second", "memory_gib")),
        "–" if loss is None else f"{loss.mean:.4f}" + (" ± " + f"{loss.deviation:.4f}" if loss.deviation is not None else ""),
    ]


def _named(label: str, cells: Sequence[str]) -> Iterator[str]:
    """A line, or two where the label is long."""
    if len(label) >= _NAME:
        yield _within(label)
        label = ""
    yield _line(label, cells)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _within(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _wrapped(line: str) -> Iterator[str]:
    yield from textwrap.wrap(line, WIDTH, subsequent_indent="    ", initial_indent="  ")
