"""launch/checkpoint.py as a user meets it, and a checkpoint read without this project's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoints.unsharded import load_state
from tests.helpers import ROOT, command, environment, run
from tests.unit.pretrain.checkpoints.layouts import values, write_checkpoint

TOOL = "launch/checkpoint.py"
OPTIONS = {
    "ls": [],
    "verify": [],
    "diff": ["--top"],
    "show": ["--slice"],
    "merge": ["--output", "--shares"],
    "copy": ["--overwrite"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_names_every_option_and_fits_100_columns(name: str) -> None:
    result = run([TOOL, name, "--help"], variables={"COLUMNS": "100"})
    assert result.returncode == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    optional = [option for option in OPTIONS[name] if option != "--output"]
    assert all(option in result.stdout for option in OPTIONS[name])
    assert result.stdout.count("(default: ") == len(optional) + (name == "show")  # of TENSOR, too


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["none"],
        ["ls"],
        ["diff", "runs/a"],
        ["diff", "runs/a", "runs/b", "--top", "0"],
        ["show", "runs/a", "--slice", "0"],
        ["merge", "runs/a", "--output", "runs/m"],
        ["merge", "runs/a", "runs/b"],
        ["merge", "runs/a", "runs/b", "--output", "runs/m", "--shares", "1"],
        ["merge", "runs/a", "runs/b", "--output", "runs/m", "--shares", "1,0"],
        ["merge", "runs/a", "runs/b", "--output", "runs/m", "--shares", "1,nan"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run([TOOL, *arguments])
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{none}"], "{none}: no such folder"),
        (["ls", "{tmp}/empty"], "{tmp}/empty: holds no checkpoints"),
        (["verify", "{none}"], "{none}: no such checkpoint folder"),
        (["verify", "{tmp}/" + 300 * "a"], "{tmp}/" + 300 * "a" + "/checkpoints: File name too long"),
        (["show", "{run}", "model/embeding"], "{folder}: has no tensor 'model/embeding'; did you mean model/embedding?"),
        (["merge", "{run}", "{run}", "--output", "{run}"], "{run}: already exists and is not empty"),
        (["merge", "{run}", "{run}", "--output", "s3://b/c"], "s3://b/c: is not on a file system"),
        (["copy", "{run}", "{run}"], "{run}: already exists; name a new folder"),
        (["copy", "{run}", "{folder}"], "{folder}: is the checkpoint itself; name another folder"),
        (["copy", "{run}", "nonsense://b/c"], "nonsense://b/c: no storage (Protocol not known: nonsense)"),
        (["ls", "abfs://b/c"], "abfs://b/c: needs a package that is not installed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = write_checkpoint(tmp_path / "run", "unsharded", values())
    (tmp_path / "empty").mkdir()
    names = {"none": tmp_path / "none", "tmp": tmp_path, "run": tmp_path / "run", "folder": folder}
    result = run([TOOL, *(text.format(**names) for text in arguments)])
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {message.format(**names)}")
    assert len(result.stderr.splitlines()) == 1


def test_diff_has_the_exit_statuses_of_diff(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    second = write_checkpoint(tmp_path / "b", "unsharded", values(), "--optimizer.lr=0.5", f"--run.folder={tmp_path / 'a'}")
    same, other, wrong = (run([TOOL, "diff", str(first), str(path)]) for path in (first, second, tmp_path / "none"))
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    assert (other.returncode, other.stdout) == (1, "config.yaml  optimizer.lr: 0.01, 0.5\n")
    assert (wrong.returncode, wrong.stderr) == (2, f"error: {tmp_path / 'none'}: no such checkpoint folder\n")


def test_verify_names_all_faults_and_loads_no_torch(finished: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-X", "importtime", TOOL, "verify", str(finished.with_suffix(""))]
    result = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "/checkpoints/step_00000003: undamaged, " in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported
    assert "torch" not in imported
    folder = write_checkpoint(tmp_path / "run", "zero on 4", values())
    for name in ("tokenizer.json", "engine/rank_00001.safetensors"):
        os.truncate(folder / name, 1)
    damaged = run([TOOL, "verify", str(tmp_path / "run")])
    assert damaged.returncode == 1
    assert len(damaged.stdout.splitlines()) == 3
    assert f"{folder}: 2 faults, " in damaged.stdout


def test_a_merged_run_evaluates_generates_and_exports(finished: Path, tmp_path: Path) -> None:
    own = str(finished.with_suffix(""))
    merged = run([TOOL, "merge", own, own, "--output", str(tmp_path / "merged")])
    assert merged.stdout == f"written {tmp_path}/merged/checkpoints/step_00000003\n", merged.stderr
    figures = [run(["launch/evaluate.py", path]).stdout.splitlines()[1:] for path in (own, str(tmp_path / "merged"))]
    named = [[line for line in of_one if line.startswith("weights ")] for of_one in figures]
    assert [line.split(maxsplit=1)[1] for (line,) in named] == ["trained", "merged from 2 checkpoints"]
    rest = [[line for line in of_one if not line.startswith("weights ")] for of_one in figures]
    assert rest[0] == rest[1]
    assert any(line.startswith("loss ") for line in figures[0])
    texts = [
        run(["launch/generate.py", path, "--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "9"]).stdout
        for path in (own, str(tmp_path / "merged"))
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the cat")
    exported = run(["launch/export.py", str(tmp_path / "merged"), str(tmp_path / "exported")])
    assert exported.returncode == 0, exported.stderr
    resumed = run(["launch/pretrain.py", "--config", str(tmp_path / "merged/config.yaml"), "--resume=auto"])
    assert resumed.returncode == 1
    assert "holds an average of weights and no optimizer's state" in resumed.stderr
    assert "Traceback" not in resumed.stderr


def test_commands_that_only_read_file_systems_say_how_to_copy(finished: Path, tmp_path: Path) -> None:
    more = {"generate": ["--prompt", "a"], "export": [str(tmp_path / "out")]}
    calls = [[f"launch/{name}.py", "s3://b/run", *more.get(name, [])] for name in ("evaluate", "generate", "export", "prune")]
    calls.append(["launch/pretrain.py", "--config", str(finished), "--resume=s3://b/run", f"--run.folder={tmp_path / 'new'}"])
    for arguments in calls:
        result = run(arguments)
        assert result.returncode == 1
        assert result.stderr == (
            "error: s3://b/run: is not on a file system; `python launch/checkpoint.py copy` copies checkpoints from and to it\n"
        )


def test_a_checkpoint_is_read_without_this_projects_code(finished: Path, tmp_path: Path) -> None:
    folder = finished.with_suffix("") / "checkpoints/step_00000003"
    example = (ROOT / "examples/read_checkpoint.py").read_text(encoding="utf-8")
    (tmp_path / "read.py").write_text(example)
    program = command([str(tmp_path / "read.py"), str(folder)])
    result = subprocess.run(program, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    said = {line.split()[0]: float(line.split()[-1]) for line in result.stdout.splitlines()}
    tensors = {part.key: part.tensor.double().numpy() for part in load_state(folder).parts}
    assert said == {key: pytest.approx(np.linalg.norm(tensor), rel=1e-5) for key, tensor in tensors.items()}
    assert {key.partition("/")[0] for key in said} == {"model", "exp_avg", "exp_avg_sq"}
    sharded = write_checkpoint(tmp_path / "run", "zero on 4", values())
    shown = subprocess.run([*program[:-1], str(sharded), "model/norm"], capture_output=True, text=True, timeout=60)
    assert shown.stdout == f"{values()['model']['norm'].numpy()}\n"
    index = json.loads((sharded / "engine/index.json").read_text())
    assert len(index["tensors"]["model/embedding"]["parts"]) == 4
