"""What a person sees: header, lines or a bar, time left; one rank speaks."""

from __future__ import annotations

import io
import json
import logging
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.manifest import FileRecord, Manifest, SplitRecord, read_manifest
from model.build import build_model
from model.huggingface.stock import find_stock
from pretrain.distributed.layout import Layout
from pretrain.report import progress as module
from pretrain.report.progress import Progress, SpokenLog, header
from tests.helpers import write_run

ONE, OTHER = Layout(), Layout(1, 2, 1, 2)


def configuration(folder: Path, *overrides: str, world_size: int = 1) -> Config:
    return load_config(write_run(folder, Path("data")), overrides, world_size=world_size).resolved(300)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its first number is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def report(progress: Progress, step: int, terms: dict[str, float] | None = None, mfu: float | None = None) -> None:
    hfu = None if mfu is None else mfu + 0.1
    progress.step(step, 2.34567, terms or {}, 0.0012345, 1.239, 12345.6, mfu, hfu)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 300 columns."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("LINES", "50")


def test_a_line_has_all_figures(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(configuration(tmp_path, "--training.steps=1000"), ONE, 0)
    clock[0] += 5
    report(progress, 2, {"gha": 0.5, "other": 0.25}, mfu=0.4567)
    assert capsys.readouterr().out == (
        "step    2/1000 | loss 2.3457 | gha 0.5000 | other 0.2500 | lr 1.23e-03 | grad 1.24 | 12,346 tok/s | MFU 45.7% | "
        "HFU 55.7% | left 0:41:35\n"  # 998 steps of 2.5 seconds
    )
    report(progress, 1000)
    assert capsys.readouterr().out == "step 1000/1000 | loss 2.3457 | lr 1.23e-03 | grad 1.24 | 12,346 tok/s | left 0:00:00\n"


def test_time_left_follows_from_the_steps_of_this_process(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(configuration(tmp_path, "--training.steps=10"), ONE, first_step=4)
    for step, seconds, left in ((5, 3.0, "0:00:15"), (6, 7.0, "0:00:20"), (7, 1.0, "0:00:11")):
        clock[0] += seconds
        report(progress, step)
        assert capsys.readouterr().out.endswith(f"| left {left}\n")


@pytest.mark.parametrize(
    ("every", "first_step", "expected"),
    [(1, 0, [1, 2, 3, 4, 5, 6, 7]), (3, 0, [1, 3, 6, 7]), (3, 3, [4, 6, 7]), (100, 0, [1, 7]), (7, 5, [6, 7])],
)
def test_lines_every_n_steps_and_at_both_ends(
    tmp_path: Path, every: int, first_step: int, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, "--training.steps=7", f"--logging.every_steps={every}")
    progress = Progress(config, ONE, first_step)
    for step in range(first_step + 1, 8):
        report(progress, step)
    assert [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()] == expected


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(configuration(tmp_path), OTHER, 0)
    progress.say("something")
    report(progress, 1)
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("wide")
def test_other_ranks_have_no_bar_on_a_terminal(tmp_path: Path) -> None:
    with redirect_stdout(Terminal()) as terminal:
        progress = Progress(configuration(tmp_path), OTHER, 0)
        progress.say("something")
        report(progress, 1)
        progress.close()
    assert terminal.getvalue() == ""


@pytest.mark.usefixtures("wide")
def test_a_terminal_gets_a_bar_that_begins_where_the_run_resumes(tmp_path: Path) -> None:
    with redirect_stdout(Terminal()) as terminal:
        progress = Progress(configuration(tmp_path), ONE, first_step=4)
        assert "4/6" in terminal.getvalue()
        report(progress, 5, {"gha": 0.5}, mfu=0.4567)
        progress.say("a line of its own")
        report(progress, 6)
        progress.close()
    shown = terminal.getvalue()
    assert "\na line of its own\n" in shown.replace("\r", "\n")
    assert "loss=2.3457, gha=0.5000, lr=1.23e-03, grad=1.24, tok/s=12,346, MFU=45.7%, HFU=55.7%" in shown
    assert "6/6" in shown
    assert "step 5/6" not in shown
    assert shown.endswith("\n")  # closed


def test_what_is_logged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("test")
    logger.addHandler(SpokenLog(Progress(configuration(tmp_path), ONE, 0)))
    logger.debug("too much")
    logger.info("kernel %s", "math")
    assert capsys.readouterr().out == "kernel math\n"


def test_a_silent_rank_says_its_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("test")
    logger.addHandler(SpokenLog(Progress(configuration(tmp_path), Layout(rank=1, world_size=2), 0)))
    logger.info("kernel math")
    logger.warning("kernels fail")
    assert capsys.readouterr() == ("", "rank 1: kernels fail\n")


def manifest() -> Manifest:
    file = FileRecord(1, "f")
    splits = {name: SplitRecord(number, 10 * number, 1, file, file) for name, number in (("train", 1234), ("valid", 5))}
    return Manifest(1, "1", 0, {}, [], {}, "t", 300, 0, "uint16", file, splits)


def lines(config: Config, layout: Layout = ONE, first_step: int = 0) -> dict[str, str]:
    """What a header says, by the names of its lines."""
    return {line[:7].strip(): line[8:] for line in header(config, layout, [manifest()], first_step).splitlines()}


def test_header_of_a_run(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    sizes = {name: parameter.numel() for name, parameter in build_model(config.model).named_parameters()}
    total, attention = sum(sizes.values()), sum(size for name, size in sizes.items() if ".attention." in name)
    assert header(config, ONE, [manifest()], 0).splitlines() == [
        f"run     {tmp_path}/run",
        "model   mhe_add, 2 layers × 16, 8 heads × 4, position learned",
        f"params  {total / 1e6:.2f} M, attention {attention / 1e6:.2f} M ({attention / total:.1%})",
        "layout  1 × CPU, DP 1, deepspeed ZeRO 1, fp32, batch 8 = 1 × 4 × 2",
        "data    data: 1,234 documents, 12,340 tokens; sequence 16",
        "to go   6 steps × 128 = 768 tokens",
        f"export  native only: {find_stock(config.model).reason}",
    ]


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("decay: 0.999", "exponential, decay 0.999; {:.1f} MiB on each rank"),
        ("last: 5", "of the last 5 saves; {:.1f} MiB on each rank, in host memory"),
    ],
)
def test_header_names_the_average_and_what_it_takes(tmp_path: Path, average: str, expected: str) -> None:
    config = configuration(
        tmp_path, f"--training.average={{{average}}}", "--checkpoint.every_steps=1", "--model.hidden_size=256"
    )
    values = sum(parameter.numel() for parameter in build_model(config.model).parameters())
    copies = 5 if "last" in average else 1
    assert lines(config)["average"] == expected.format(4 * copies * values / 2**20)
    two = Layout(0, 2, 0, 2)
    assert lines(config, two)["average"] == expected.format(4 * copies * values / 2 / 2**20)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["hidden_size=32"], "stock (gpt_bigcode, 1 head of keys and values), gguf or native"),
        (
            ["hidden_size=32", "attention=mha"],
            "stock (gpt2, 8 heads of keys and values), gguf or native",
        ),
        ([], "native only: num_heads × head_dim (8 × 4) must be at most hidden_size (16), and head_dim must"),
        (["position=rope"], "native only: no stock model embeds heads after the rotation; train with"),
        (["attention=sha", "hidden_size=32", "position=alibi"], "native only: mpt"),
    ],
)
def test_header_names_the_stock_form_or_the_field_in_its_way(tmp_path: Path, overrides: list[str], expected: str) -> None:
    config = configuration(tmp_path, *(f"--model.{override}" for override in overrides))
    assert lines(config)["export"].startswith(expected)


def test_header_names_another_objective_than_the_next_token(tmp_path: Path) -> None:
    assert "learns" not in lines(configuration(tmp_path))
    assert lines(configuration(tmp_path, "--training.objective=spans"))["learns"] == "spans, in rows of 18 tokens"


def test_header_names_sets_and_how_much_of_each_is_measured(tmp_path: Path, prepared: Path) -> None:
    split = read_manifest(prepared).splits["valid"]
    size = (split.tokens - 1) // 16
    shown = f"{prepared}: {split.documents:,} documents, {size:,} samples"
    for samples, measured in ((size - 1, f"; {size - 1:,} are measured"), (size, "")):
        sets = f"--validation.sets={{a: {prepared}, b: {prepared}}}"
        config = configuration(tmp_path, sets, f"--validation.samples={samples}", "--data.sequence_length=16")
        assert f"sets    a: {shown}{measured}\n        b: {shown}{measured}" in header(config, ONE, [manifest()], 0)


def test_header_names_sources_that_are_not_validated(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "b")
    content = json.loads((tmp_path / "b" / "manifest.json").read_text())
    del content["splits"]["valid"]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(content))
    sources = f"--data.sources=[{{path: {prepared}, weight: 1, name: a}}, {{path: {tmp_path}/b, weight: 1}}]"
    config = configuration(tmp_path, "--data.path=null", sources, "--data.sequence_length=16")
    shown = header(config, ONE, [manifest(), manifest()], 0)
    assert f"\nsets    a: {prepared}: " in shown
    assert "\n        no split valid: b\n" in shown


def test_header_of_a_resumed_run_counts_what_is_left(tmp_path: Path) -> None:
    assert lines(configuration(tmp_path), first_step=4)["to go"] == "2 steps × 128 = 256 tokens"


@pytest.mark.parametrize(
    ("overrides", "layout", "expected"),
    [
        ([], Layout(world_size=4), "4 × CPU, DP 4, deepspeed ZeRO 1, fp32, batch 8 = 4 × 1 × 2"),
        (
            ["--parallel.tensor=2", "--parallel.pipeline=2", "--training.precision=bf16"],
            Layout(world_size=8, sizes={"tensor": 2, "pipeline": 2}),
            "8 × CPU, TP 2 × PP 2 × DP 2, deepspeed ZeRO 1, bf16, batch 8 = 2 × 2 × 2",
        ),
        (
            ["--parallel.zero_stage=2", "--parallel.cpu_offload=true"],
            ONE,
            "1 × CPU, DP 1, deepspeed ZeRO 2, CPU offload, fp32, batch 8 = 1 × 4 × 2",
        ),
    ],
)
def test_header_names_the_layout(tmp_path: Path, overrides: list[str], layout: Layout, expected: str) -> None:
    assert lines(configuration(tmp_path, *overrides, world_size=layout.world_size), layout)["layout"] == expected


@pytest.mark.parametrize(
    ("attention", "sequence", "expected"),
    [
        ("mhe_add", "false", "sequence parallel: off; shared projection: weights gathered"),
        ("mhe_add", "true", "sequence parallel: on; shared projection: weights gathered"),
        ("mha", "true", "sequence parallel: on; shared projection: none"),
    ],
)
def test_header_names_what_tensor_parallel_ranks_share(tmp_path: Path, attention: str, sequence: str, expected: str) -> None:
    overrides = [f"--model.attention={attention}", "--parallel.tensor=2", f"--parallel.sequence={sequence}"]
    config = configuration(tmp_path, *overrides, world_size=2)
    assert lines(config, Layout(world_size=2, sizes={"tensor": 2}))["tensor"] == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stage=constrain", "groups=4", "feature_map=output"], "4 groups by output maps, α 0.03, β 0.01"),
        (
            ["stage=constrain", "groups=4", "alpha=0.5", "beta=2", "end_step=5"],
            "4 groups by value maps, α 0.5, β 2 until step 5",
        ),
        (["stage=constrain", "max_groups=5"], "2 to 5 groups by value maps, α 0.03, β 0.01"),
        (["stage=vote", "groups=4"], "4 groups by value maps if there are none yet; 1 heads of each are elected"),
        (
            ["stage=schedule", "groups=4", "vote_at_step=3"],
            "4 groups by value maps, α 0.03, β 0.01; heads are elected and the others pruned at step 3",
        ),
    ],
)
def test_header_says_what_becomes_of_heads(tmp_path: Path, overrides: list[str], expected: str) -> None:
    config = configuration(tmp_path, "--model.attention=mha", *(f"--gha.{override}" for override in overrides))
    assert lines(config)["gha"] == expected


@pytest.mark.parametrize(("batches", "expected"), [("3", "3"), ("null", "an epoch of")])
def test_header_of_a_vote_trains_nothing(tmp_path: Path, batches: str, expected: str) -> None:
    config = configuration(tmp_path, "--gha.stage=vote", "--gha.groups=4", f"--gha.vote_batches={batches}")
    assert lines(config)["to go"] == f"a vote: {expected} batches, nothing is trained"
