"""benchmarks/gpu.py: its rehearsal, stages that fail in every way, the table of a full run, and what is counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import verdict
from benchmarks.gpu_stages import correctness, training
from benchmarks.gpu_stages.runner import Rows, StageRun
from benchmarks.gpu_stages.stages import STAGES, Case, Options, Row, SkippedError, Stage
from benchmarks.gpu_stages.table import COLUMNS, page
from configs.targets import load_target
from tests.helpers import run, run_ranks

pytestmark = pytest.mark.timeout(320)
LINES = 60


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], str]:
    """Rows and output of the rehearsal."""
    path = tmp_path_factory.mktemp("gpu") / "rows.json"
    result = run(["benchmarks/gpu.py", "--device", "cpu", "--tiny", "--patience", "9", "--json", str(path)], timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text()), result.stdout


def test_the_rehearsal_measures_what_a_cpu_can(rehearsal: tuple[list[Row], str]) -> None:
    rows, output = rehearsal
    assert not [row for row in rows if "error" in row]
    assert {row["skipped"].partition(":")[0] for row in rows if "skipped" in row} == {"needs a GPU"}
    by_stage = {stage.name: [row for row in rows if row["stage"] == stage.name] for stage in STAGES}
    assert all(by_stage[name][-1]["seconds"] > 0 for name in by_stage)
    assert sum(row.get("ok", False) for row in by_stage["correctness"]) == 3 * len(correctness.KERNELS)
    assert [row["ok"] for row in by_stage["resume"] if "ok" in row] == [True] * 3
    assert {row["pass"] for row in by_stage["attention"] if "pass" in row} == {"fwd", "fwd_bwd"}
    trained = {(row["engine"], row["compile"]): row for row in by_stage["training"] if "top" in row}
    assert set(trained) == {("fsdp", False), ("fsdp", True), ("zero 1", False)}
    assert trained["fsdp", True]["graphs"] >= 1
    assert all(row["tokens_per_second"] > 0 and len(row["top"]) == 5 for row in trained.values())
    assert {row["format"] for row in by_stage["decoding"] if "format" in row} == {"ours", "stock", "native"}
    table = output[output.index("\n\n") + 2 :].splitlines()
    assert len(table) <= LINES
    assert max(map(len, table)) <= COLUMNS


def cases_in_all_ways(options: Options) -> list[Case]:
    def good() -> Iterator[Row]:
        yield {"figure": 1}

    def fails() -> Iterator[Row]:
        yield {"figure": 2}
        raise RuntimeError("out of\nmemory")

    def skips() -> Iterator[Row]:
        raise SkippedError("needs a GPU")

    def dies() -> Iterator[Row]:
        yield {"figure": 3}
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def hangs() -> Iterator[Row]:
        child = subprocess.Popen(["sleep", "60"])
        (options.folder / "child").write_text(str(child.pid))
        time.sleep(60)
        yield {}

    ways = (good, fails, skips, dies, hangs)
    return [Case(way.__name__, way) for way in ways] + [Case("last", good)]


def cases_that_hang(options: Options) -> list[Case]:
    def hangs() -> Iterator[Row]:
        time.sleep(60)
        yield {}

    return [Case("first", hangs), Case("second", hangs)]


def no_cases(options: Options) -> list[Case]:
    raise ImportError("no such library")


def stages_that_fail(rank: int, folder: Path) -> None:
    rows, options = Rows(folder / "rows.json"), Options("cpu", True, folder)
    for target, seconds, case_seconds in ((cases_in_all_ways, 60, 2), (cases_that_hang, 3, 30), (no_cases, 60, 30)):
        stage = Stage(target.__name__, f"{__name__}:{target.__name__}", seconds, case_seconds)
        StageRun(stage, options, rows.add, folder / "log", multiprocessing.get_context("fork")).run()


def test_no_stage_or_case_stops_the_next(tmp_path: Path) -> None:
    run_ranks(stages_that_fail, 1, tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    found = [(row["case"], row.get("figure") or row.get("skipped") or row["error"]) for row in rows if "case" in row]
    assert found == [
        ("good", 1),
        ("fails", 2),
        ("fails", "RuntimeError: out of memory"),
        ("skips", "needs a GPU"),
        ("dies", 3),
        ("dies", "the process ended by SIGKILL: --- dies"),
        ("hangs", "over the case's 2 s"),
        ("last", 1),
        ("first", "over the stage's 3 s"),
        ("second", "not reached: over the stage's 3 s"),
    ]
    assert [row for row in rows if "case" not in row] == [
        {"stage": "no_cases", "error": "the process ended with status 1: ImportError: no such library"}
    ]
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or ") Z" in child.read_text()  # killed with the process that started it


def test_only_stages_that_decide_fail_the_command() -> None:
    good: list[Row] = [{"stage": "correctness", "ok": True}, {"stage": "training", "error": "out of memory"}]
    good += [{"stage": "resume", "skipped": "deepspeed is not installed"}]
    assert verdict(STAGES, good) == 0
    assert verdict(STAGES, [*good, {"stage": "correctness", "ok": False}]) == 1
    assert verdict(STAGES, [*good, {"stage": "resume", "error": "not reached"}]) == 1


def test_limits_add_up_to_ten_minutes() -> None:
    assert sum(stage.seconds for stage in STAGES) <= 600
    assert all(stage.case_seconds < stage.seconds for stage in STAGES)


@pytest.mark.parametrize("failing", [None, *(stage.name for stage in STAGES), "all"])
def test_the_table_of_a_full_run_is_one_page(failing: str | None, rehearsal: tuple[list[Row], str], tmp_path: Path) -> None:
    """Figures of the rehearsal in the place of a GPU's, or errors as long as they come."""
    rows: list[Row] = []
    for stage in STAGES:
        usual = [row for row in rehearsal[0] if row["stage"] == stage.name and "case" in row and "skipped" not in row]
        for case in load_target(stage.target)(Options("cuda", False, tmp_path)):
            like = [row for row in usual if row["case"] == case.name] or usual[-1:] or [{"skipped": "needs a GPU"}]
            if failing in (stage.name, "all"):
                like = [{"error": "e" * 300}]
            elif stage.name == "attention":
                like = [row | {"heads": int(case.name.split()[-2])} for row in usual[-2:]]
            rows += [row | {"stage": stage.name, "case": case.name} for row in like]
    lines = page(rows).splitlines()
    assert len(lines) + 2 <= LINES
    assert max(map(len, lines)) <= COLUMNS


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = correctness.shape_of(Options("cpu", True, Path()), 8, 33, "causal")
    exact = correctness.results

    def off(contender: Any) -> Any:
        heads, *gradients = exact(contender)
        return [heads, *gradients[:-1], gradients[-1] * (1.1 if contender.kernel == "shared_scores" else 1)]

    assert next(correctness.compare("mhe_add", "shared_scores", "causal", shape))["ok"]
    monkeypatch.setattr(correctness, "results", off)
    assert not next(correctness.compare("mhe_add", "shared_scores", "causal", shape))["ok"]
    assert next(correctness.compare("mhe_add", "sdpa", "causal", shape))["ok"]


def test_numbers_that_are_none_are_wrong() -> None:
    assert correctness.worst([torch.tensor([float("nan")])] * 2, [torch.ones(1)] * 2) == float("inf")


def test_every_way_to_train_is_a_configuration() -> None:
    """On a GPU nothing would be seen of a mistake before minutes of other stages."""
    for options in (Options("cuda", False, Path()), Options("cpu", True, Path())):
        for variant, kernel, engine, compiles in training.WAYS:
            config = training.configured(options, variant, kernel, engine, compiles)
            assert (config.model.attention, config.model.attention_kernel) == (variant, kernel)
            assert config.training.compile == compiles
            assert config.training.precision == "bf16"
            assert (config.model.num_layers == 22) != options.tiny


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "--device cuda: torch finds no CUDA device; --device cpu --tiny is the rehearsal"),
        (["--device", "cpu"], "--device cpu: only with --tiny; the sizes are those of a GPU"),
        (["--stages", "speed"], "--stages speed: known: machine, correctness"),
    ],
)
def test_mistakes(wrong: list[str], message: str) -> None:
    result = run(["benchmarks/gpu.py", *wrong])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
