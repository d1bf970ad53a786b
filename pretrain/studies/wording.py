"""Figures of studies in few characters. Torch-free."""

from __future__ import annotations

from pretrain.report.plot import compact
from pretrain.studies.collected import Fit
from pretrain.studies.groups import Group
from pretrain.studies.laws import Refused
from pretrain.studies.spread import Difference


def figure(group: Group, name: str) -> str:
    """A mean in few characters."""
    found = group.figures.get(name)
    return "–" if found is None else compact(round(found.mean, 3))


def difference_words(found: Difference | None) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ± {found.half:.4f}" if found.half < 10 else " ± wide"
    return f"{found.mean:+.4f}".replace("-", "−") + half


def law_words(fit: Fit) -> str:
    """A law and its verdict, or why there is none."""
    law, name = fit.law, f"L({fit.what}) of {fit.series}"
    if isinstance(law, Refused):
        return f"{name}: {law.verdict}"
    return f"{name}: {law.floor:.3f} + {law.scale:.3g} {fit.what}^−{law.slope:.3f}; {law.verdict}"
