"""The stages of benchmarks/gpu.py by name: the only place that lists them, and what they share. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # figures, or one of `error` and `skipped` with the reason as text


@dataclass(frozen=True)
class Options:
    """What the stages are told."""

    device: str  # cuda or cpu
    tiny: bool
    folder: Path  # for files that are deleted at the end


@dataclass(frozen=True)
class Case:
    """One measurement of a stage. `run` yields its rows; an exception becomes a row with `error`."""

    name: str
    run: Callable[[], Iterable[Row]]


class SkippedError(Exception):
    """Why a case has no meaning on this machine."""


@dataclass(frozen=True)
class Stage:
    """`target` gives the cases for `Options`, as "module:function".

    `seconds` is the time limit of the stage, `case_seconds` that of one case. `decides`: the command fails if one of its rows
    is wrong or missing.
    """

    name: str
    target: str
    seconds: float
    case_seconds: float
    decides: bool = False


def _stage(name: str, seconds: float, case_seconds: float, decides: bool = False) -> Stage:
    return Stage(name, f"benchmarks.gpu_stages.{name}:cases", seconds, case_seconds, decides)


STAGES = (  # at most ten minutes in total
    _stage("machine", 40, 30),
    _stage("correctness", 100, 80, decides=True),
    _stage("resume", 50, 30, decides=True),
    _stage("attention", 110, 40),
    _stage("training", 205, 60),
    _stage("decoding", 40, 20),
    _stage("fp8", 55, 45),
)
