"""benchmarks/gpu.py: its rehearsal, stages that fail in every way, the table of a full run, and what is counted."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_contenders
from benchmarks.gpu import verdict
from benchmarks.gpu_stages import attention, correctness, decoding, resume, timing, trainers, training
from benchmarks.gpu_stages.runner import Rows, StageRun
from benchmarks.gpu_stages.stages import STAGES, Case, Options, Row, SkippedError, Stage
from benchmarks.gpu_stages.table import COLUMNS, page
from configs.schema import ModelConfig
from configs.targets import load_target
from model import initialization
from model.attention.shared_scores import operator, triton_calls
from tests.helpers import ROOT, run, run_ranks

pytestmark = pytest.mark.timeout(320)
LINES = 60
PAGE = ROOT / "docs" / "gpu.md"


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
    assert [row["ok"] for row in by_stage["resume"] if "ok" in row] == [True] * 2
    assert {row["pass"] for row in by_stage["attention"] if "pass" in row} == {"fwd", "fwd_bwd"}
    trained = [row for row in by_stage["training"] if "top" in row]
    ways = [(row["engine"], row["compile"]) for row in trained]
    assert ways == [("fsdp", False), ("fsdp", True), ("zero 1", False), ("zero 1", False)]  # DeepSpeed opened twice
    assert trained[1]["graphs"] >= 1
    assert all(row["tokens_per_second"] > 0 and len(row["top"]) == 5 for row in trained)
    assert {row["format"] for row in by_stage["decoding"] if "format" in row} == {"ours", "stock", "native"}
    table = output[output.index("\n\n") + 2 :].splitlines()
    assert len(table) <= LINES
    assert max(map(len, table)) <= COLUMNS


def good() -> Iterator[Row]:
    yield {"figure": 1}


def hangs() -> Iterator[Row]:
    yield {"figure": 4}
    time.sleep(60)


def cases_in_all_ways(options: Options) -> list[Case]:
    def fails() -> Iterator[Row]:
        yield {"figure": 2}
        raise RuntimeError("out of\nmemory")

    def skips() -> Iterator[Row]:
        raise SkippedError("needs a GPU")

    def dies() -> Iterator[Row]:
        child = subprocess.Popen(["sleep", "60"])
        (options.folder / "child").write_text(str(child.pid))
        yield {"figure": 3}
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    return [Case(way.__name__, way) for way in (good, fails, skips, dies)] + [Case("last", good)]


def cases_that_hang(options: Options) -> list[Case]:
    return [Case("hangs", hangs), Case("next", good)]


def no_cases(options: Options) -> list[Case]:
    raise ImportError("no such library")


class OverWhenItHangs(StageRun):
    """A stage whose time is over once its case hangs, however long a loaded machine takes until then."""

    def _take(self, kind: str, value: Any) -> None:
        super()._take(kind, value)
        if value == {"figure": 4}:
            self._deadline = time.monotonic()


def stages_that_fail(rank: int, folder: Path) -> None:
    rows, options, context = Rows(folder / "rows.json"), Options("cpu", True, folder), multiprocessing.get_context("fork")
    for kind, cases, case_seconds in (
        (StageRun, cases_in_all_ways, 60),
        (StageRun, cases_that_hang, 1),
        (OverWhenItHangs, cases_that_hang, 60),
        (StageRun, no_cases, 60),
    ):
        stage = Stage(cases.__name__, f"{__name__}:{cases.__name__}", 60, case_seconds)
        kind(stage, options, rows.add, folder / "log", context).run()


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
        ("last", 1),
        ("hangs", 4),
        ("hangs", "over the case's 1 s"),
        ("next", 1),
        ("hangs", 4),
        ("hangs", "over the stage's 60 s"),
        ("next", "not reached: over the stage's 60 s"),
    ]
    assert [row for row in rows if "case" not in row] == [
        {"stage": "no_cases", "error": "the process ended with status 1: ImportError: no such library"}
    ]
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or ") Z" in child.read_text()  # killed with the process that started it


def test_a_process_that_dies_within_a_message_has_ended(tmp_path: Path) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    os.write(send.fileno(), b"\0\0\0\x64part")  # of 100 bytes
    send.close()
    stage = StageRun(STAGES[0], Options("cpu", True, tmp_path), lambda row: None, tmp_path / "log", None)
    assert stage._follow(receive) is None
    receive.close()


def stages_on_broken_kernels(rank: int, folder: Path) -> None:
    """As on a GPU on which Triton's kernels do not launch. The patches end with this process."""

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("invalid device function")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_supports", lambda *place: True)
        patch.setattr(triton_calls, "forward", fail)
        patch.setattr(attention_contenders, "expects_triton", lambda device: True)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        options = Options("cpu", True, folder)
        shape = correctness.shape_of(options, 8, 33, "causal")
        runs: tuple[Callable[[], object], ...] = (
            lambda: correctness.run_once((shape, "causal")),
            lambda: list(correctness.compare("mhe_add", "shared_scores", "causal", shape)),
            lambda: list(attention.measure("mhe_add", "shared_scores", shape)),
            lambda: list(training.measure(options, "mhe_add", "shared_scores", "fsdp", False)),
            lambda: list(resume.compare(options, "fsdp", "shared_scores")),
        )
        for stage_run in runs:
            operator._failed.clear()  # the stage itself finds out
            with pytest.raises(attention_contenders.FellBackError, match="the Triton kernels do not: bfloat16, head_dim 8"):
                stage_run()
        with pytest.raises(attention_contenders.FellBackError):  # of any run before, if `auto` takes them
            list(decoding.by_us(options, "mhe_add"))


def test_operators_in_the_place_of_kernels_are_an_error(tmp_path: Path) -> None:
    run_ranks(stages_on_broken_kernels, 1, tmp_path)


def test_quick_weights_are_distributed_as_those_of_a_run() -> None:
    config, original = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, bias=True), initialization.initial_value
    names = ("layers.0.attention.out.weight", "layers.0.mlp.up.weight", "layers.0.mlp.up.bias", "layers.0.mlp_norm.weight")
    with trainers.quick_weights("cpu"):
        found = [initialization.initial_value(config, 1, name, torch.Size([1 << 17])) for name in names]
        again = initialization.initial_value(config, 1, names[0], torch.Size([1 << 17]))
    assert initialization.initial_value is original
    assert torch.equal(found[0], again)
    for name, values in zip(names, found, strict=True):
        wanted = original(config, 1, name, values.shape)
        assert float(values.std()) == pytest.approx(float(wanted.std()), rel=0.03)
        assert float(values.mean()) == pytest.approx(float(wanted.mean()), abs=0.001)


def test_every_timed_run_waits_behind_a_filler_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is queued between two events is timed, so only the run may be."""
    queued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.made = len(queued)

        def record(self) -> None:
            queued.append("event")

        def elapsed_time(self, end: object) -> float:
            return 3.0

    class Buffer:
        def zero_(self) -> None:
            queued.append("clear")

    def wait(cycles: int) -> None:
        assert cycles > 0
        queued.append("filler")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queued.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", wait)
    monkeypatch.setattr(timing, "cache_buffer", lambda device: Buffer())
    assert timing.median_seconds(lambda: queued.append("run"), "cuda", repeats=2, warmup=1) == 0.003
    once = ["filler", "clear", "event", "run", "event"]
    assert queued == ["run", "synchronize", "run", "synchronize", *once, *once, "synchronize"]


@pytest.mark.parametrize(("mode", "expected"), [("Default", False), ("Exclusive_Process", True), (None, False)])
def test_a_gpu_for_one_process_is_opened_by_one(mode: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "nvidia_smi", lambda fields: mode)
    monkeypatch.setattr(correctness, "need_package", lambda name: None)
    monkeypatch.setattr(correctness, "run_once", lambda job: True)
    monkeypatch.setattr(correctness, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    row = next(correctness.compile_kernels(Options("cuda", False, Path()), (16,), (33, 4096)))
    assert row == {"configurations": 4, "processes": 1 if expected else 4}


def test_only_stages_that_decide_fail_the_command() -> None:
    good: list[Row] = [{"stage": "correctness", "ok": True}, {"stage": "training", "error": "out of memory"}]
    good += [{"stage": "resume", "skipped": "deepspeed is not installed"}]
    assert verdict(STAGES, good) == 0
    assert verdict(STAGES, [*good, {"stage": "correctness", "ok": False}]) == 1
    assert verdict(STAGES, [*good, {"stage": "resume", "error": "not reached"}]) == 1


def test_the_page_says_the_limits_that_are_set() -> None:
    said = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert [(name, float(seconds)) for name, seconds in said] == [(stage.name, stage.seconds) for stage in STAGES]
    assert sum(float(seconds) for _, seconds in said) <= 600  # ten minutes, as its title says


def test_the_page_lists_every_package_that_the_stages_import() -> None:
    """Those of the image, and those that travel as wheels."""
    section = PAGE.read_text(encoding="utf-8").partition("## A GPU machine without network")[2]
    packages = {"ruamel": "ruamel-yaml", "megatron": "megatron-core", "pydantic_core": "pydantic-core"}
    needed = {packages.get(name, name) for name in outside_imports()}
    assert needed - set(re.findall(r"[\w-]+", section)) == set()
    assert {"torch", "numpy", "psutil", "safetensors", "tqdm", "pydantic"} <= needed


def outside_imports() -> set[str]:
    """Top-level names that the modules of the stages, and all of ours that they import, import of others."""
    waiting = [ROOT / "benchmarks" / "gpu.py", *(ROOT / "benchmarks" / "gpu_stages").glob("*.py")]
    waiting += [ROOT / "pretrain" / "backends" / f"{engine}.py" for engine in ("fsdp", "deepspeed")]
    seen, found = set(waiting), set[str]()
    while waiting:
        for name in imported(waiting.pop()):
            if not (ROOT / name.partition(".")[0]).is_dir():
                found.add(name.partition(".")[0])
            path = ROOT / name.replace(".", "/")  # of a module, or of a name in one
            ours = (path.with_suffix(".py"), path.parent.with_suffix(".py"), path / "__init__.py")
            new = {file for file in ours if file.exists()} - seen
            waiting += new
            seen |= new
    return found - set(sys.stdlib_module_names)


def imported(file: Path) -> Iterator[str]:
    """The modules and names that a file imports when it is imported."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
