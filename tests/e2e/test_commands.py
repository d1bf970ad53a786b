"""The commands as a user meets them: what they print, what they refuse, how they end.

Each command really starts here, in test_prune.py or in test_readme.py; most tests run it in forked processes, which have
imported everything.
"""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.load import load_config
from data_pipeline.read.dataset import TokenDataset
from model.decoder import DecoderLM
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.unsharded import load_weights
from tests.helpers import ROOT, command, environment, forked, metrics, run, start, train, wait_until, write_run
from tests.random_checkpoint import random_checkpoint
from tests.ranks import Ranks, run_script

COMMANDS = [f"launch/{name}.py" for name in ("prepare", "pretrain", "evaluate", "generate", "prune", "export")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_fits_100_columns(name: str) -> None:
    result = subprocess.run(
        [*command([name]), "--help"], env=environment() | {"COLUMNS": "100"}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    assert "default" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_errors_exit_with_2(name: str) -> None:
    result = run([name, "--no-such-option"], "python")
    assert result.returncode == 2
    assert "usage:" in result.stderr


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("evaluate", "torchrun"), *((name, "forked") for name in ("checkpoint", "generate", "prune", "export"))],
)
def test_commands_for_one_process_refuse_more(name: str, launcher: str) -> None:
    more = {"generate": ["--prompt", "a"], "export": ["runs/none/exported"]}
    result = run([f"launch/{name}.py", "runs/none", *more.get(name, [])], launcher, 2)
    assert result.returncode == 1
    assert "error: this command runs in one process" in result.stderr


def test_a_run_shows_header_lines_and_writes_figures(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    result = run(["launch/pretrain.py", "--config", str(config), "--logging.tensorboard=true"], processes=2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["run", "model", "params", "layout", "data"]
    assert lines[0].endswith(f" {tmp_path / 'run'}")
    total = sum(p.numel() for p in DecoderLM(load_config(config).resolved(300).model).parameters())
    assert f"{total / 1e6:.2f} M, attention" in lines[2]
    assert "to go   6 steps × 128 = 768 tokens" in result.stdout
    steps = [line for line in lines if line.startswith("step") and "tok/s" in line]
    assert len(steps) == 6  # one rank speaks
    assert all(part in steps[0] for part in ("loss ", "lr ", "grad ", "tok/s", "left "))
    assert "\r" not in result.stdout

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    written = metrics(tmp_path / "run")
    for tag, name in {
        "loss": "loss",
        "optimizer/learning_rate": "learning_rate",
        "optimizer/grad_norm": "grad_norm",
        "speed/tokens": "tokens",
        "speed/step_seconds": "seconds",
        "speed/tokens_per_second": "tokens_per_second",
        "speed/memory_gib": "memory_gib",
        "validation/loss": "validation/loss",
        "validation/perplexity": "validation/perplexity",
        "validation/bits_per_byte": "validation/bits_per_byte",
    }.items():
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in written if name in line], name
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(config, ["--logging.tensorboard=true"]).resolved(300)


def test_mfu_is_shown_where_the_peak_is_given(tmp_path: Path, prepared: Path) -> None:
    lines = train(write_run(tmp_path, prepared), "--logging.peak_tflops=0.001", "--training.steps=3")
    from model.costs.flops import flops_per_token

    per_token = flops_per_token(load_config(tmp_path / "run.yaml").resolved(300).model, 16)
    for line in lines:
        if "mfu" in line:
            assert line["mfu"] == pytest.approx(line["tokens_per_second"] * per_token / 1e9)
    assert any("mfu" in line for line in lines)


def run_on_terminal(terminal: str, *arguments: str) -> None:
    os.dup2(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), 1)
    run_script(str(ROOT), *arguments)


def test_a_terminal_gets_a_bar(tmp_path: Path, prepared: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    arguments = (os.ttyname(theirs), "launch/pretrain.py", "--config", str(write_run(tmp_path, prepared)))
    with Ranks(run_on_terminal, [environment() | {"COLUMNS": "100"}], [arguments]) as ranks:
        shown = b""
        while ranks.statuses() == [None] or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
        assert ranks.statuses() == [0], ranks.report()
    os.close(theirs)
    text = shown.decode()
    assert "6/6" in text
    assert "loss=" in text
    assert "validation loss" in text


def test_ctrl_c_on_one_process_saves_and_ends_well(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    process = start(["launch/pretrain.py", "--config", str(config), "--training.steps=100000"])
    written = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: written.exists() and len(written.read_text().splitlines()) >= 3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "resume with --resume=auto" in output
    assert "Traceback" not in errors
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*/complete.json")
    assert int(checkpoint.parent.name.removeprefix("step_")) == metrics(tmp_path / "run")[-1]["step"]


def test_a_signal_during_validation_saves_at_once(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    slow = [
        "--validation.every_steps=1",
        "--validation.samples=null",
        "--data.sequence_length=1",
        "--training.micro_batch_size=1",
    ]
    with forked(["launch/pretrain.py", "--config", str(config), *slow]) as ranks:
        written = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: written.exists() and len(written.read_text().splitlines()) == 1)
        ranks.send_signal(0, signal.SIGTERM)  # one training step is written, its validation of some seconds has begun
        assert ranks.wait(60) is None, ranks.report()  # a job that a batch system ends is not a failed one
        output = ranks.output(0)
    assert "stopped at step 1" in output
    assert "validation loss" not in output
    assert (tmp_path / "run" / "checkpoints" / "step_00000001" / "complete.json").exists()


def test_evaluate_equals_a_loop_over_the_split(tmp_path: Path, finished: Path) -> None:
    run_folder = finished.with_suffix("")
    result = run(
        ["launch/evaluate.py", str(run_folder), "--split", "test", "--batch-size", "3", "--json", str(tmp_path / "e.json")]
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "e.json").read_text())

    config = load_config(run_folder / "config.yaml")
    model = DecoderLM(config.model)
    model.load_state_dict(load_weights(run_folder / "checkpoints" / "step_00000003"))
    data = TokenDataset(config.data.parts[0].path, "test", 16)
    data.prepare_range(0, data.samples_per_epoch)
    samples = torch.stack([torch.from_numpy(data.sample(number)) for number in range(data.samples_per_epoch)])
    with torch.no_grad():
        logits = model.double().logits(samples[:, :-1])
    labels = samples[:, 1:]
    loss = -logits.log_softmax(-1).gather(-1, labels[..., None]).mean().item()
    counts = np.load(Path(config.data.parts[0].path) / "token_counts.npy") + 1.0
    unigram = -np.log(counts / counts.sum())[labels.numpy()].mean()
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(Path(config.data.parts[0].path) / "tokenizer.json"))
    # The text is ASCII, so no character is cut between two rows.
    size = sum(len(tokenizer.decode(row.tolist(), skip_special_tokens=True).encode()) for row in labels)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["unigram_loss"] == pytest.approx(unigram, rel=1e-6)
    assert figures["tokens"] == labels.numel()
    assert figures["bytes"] == size
    assert figures["bits_per_byte"] == pytest.approx(loss * labels.numel() / math.log(2) / size, rel=1e-5)
    assert f"{figures['loss']:.4f}" in result.stdout


def test_commands_use_an_average_on_request_and_say_so(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    train(config, "--training.steps=3", "--training.average.decay=0.5", "--validation.every_steps=0")
    folder, checkpoint, label = (
        str(tmp_path / "run"),
        tmp_path / "run/checkpoints/step_00000003",
        "exponential average, decay 0.5",
    )
    figures = {}
    for which in ("trained", "average"):
        evaluated = run(["launch/evaluate.py", folder, "--json", str(tmp_path / which), "--weights", which])
        assert evaluated.returncode == 0, evaluated.stderr
        figures[which] = json.loads((tmp_path / which).read_text())
    assert [figures[which]["weights"] for which in ("trained", "average")] == ["trained", label]
    assert figures["average"]["loss"] != figures["trained"]["loss"]
    text = run(["launch/generate.py", folder, "--prompt", "the", "--max-new-tokens", "2", "--weights", "average"])
    assert text.stderr == f"weights {label}, {checkpoint}\n"
    exported = run(["launch/export.py", folder, str(tmp_path / "out"), "--weights", "average"])
    assert exported.stdout.splitlines()[1] == f"weights {label}"
    assert (
        f"| weights | {label}; losses of the run are those of its trained weights |" in (tmp_path / "out/README.md").read_text()
    )
    reader, weights = Reader(checkpoint / "engine"), load_file(tmp_path / "out/model.safetensors")
    found = [name for name in weights if name.endswith("token_embedding.weight")]
    assert torch.equal(weights[found[0]], reader.read("average", "token_embedding.weight")[: weights[found[0]].shape[0]])


@pytest.mark.parametrize("factor", [math.nan, 1e38])
def test_a_diverged_checkpoint_is_one_error(tmp_path: Path, factor: float) -> None:
    folder = random_checkpoint(tmp_path, factor=factor)
    message = r"error: .*/run/checkpoints/step_00000003: its \w+ are not finite: its training diverged; take an earlier "
    for arguments in (["generate", "--prompt", "a"], ["generate", "--prompt", "a", "--temperature", "0"]):
        result = run([f"launch/{arguments[0]}.py", str(folder), *arguments[1:]])
        assert (result.returncode, result.stdout) == (1, "")
        assert re.match(message, result.stderr), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_generate_repeats_with_its_seed_and_is_greedy_at_temperature_0(finished: Path) -> None:
    arguments = ["launch/generate.py", str(finished.with_suffix("")), "--prompt", "the cat", "--max-new-tokens", "8"]
    texts = [run([*arguments, *more]) for more in (["--seed", "1"], ["--seed", "1"], ["--temperature", "0"], ["--top-k", "1"])]
    assert all(text.returncode == 0 and text.stdout.startswith("the cat") for text in texts), texts
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stderr == f"weights trained, {finished.with_suffix('')}/checkpoints/step_00000003\n"
    assert texts[2].stdout == texts[3].stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch/evaluate.py", "{run}", "--data", "{nowhere}"], "no such folder"),
        (["launch/evaluate.py", "{nowhere}"], "no such checkpoint folder"),
        (["launch/evaluate.py", "{run}", "--json", "{nowhere}/a.json"], "nowhere/a.json: no such folder; make it, or name"),
        (["launch/evaluate.py", "{run}", "--weights", "average"], "step_00000003: holds no average of the weights"),
        (["launch/generate.py", "{run}", "--prompt", "a\udcffb"], "not valid Unicode"),
        (["launch/evaluate.py", "docs"], "docs: not a complete checkpoint of manyheads"),
        (["launch/evaluate.py", "{empty}"], "holds no complete checkpoint"),
        (["launch/evaluate.py", "{run}", "--data", "{other}"], "prepared with another tokenizer than the checkpoint's"),
        (["launch/generate.py", "{run}", "--prompt", "the " * 40], "with learned positions fewer than 16 leave room for more"),
        (["launch/generate.py", "{nowhere}", "--prompt", "x"], "no such checkpoint folder"),
        (["launch/pretrain.py", "--config", "{nowhere}"], "cannot be read: No such file or directory"),
        (["launch/pretrain.py", "--config", "{config}", "--model.attention=mhx"], "--model.attention=mhx: known: "),
        (
            ["launch/pretrain.py", "--config", "{config}", "--data.path={nowhere}"],
            "no such folder; launch/prepare.py makes one",
        ),
        (["launch/pretrain.py", "--config", "{config}", "--data.path={truncated}"], "train.bin has 100 bytes"),
        (
            ["launch/pretrain.py", "--config", "{config}", "--data.path={foreign}"],
            "tokenizer.json is not the one the tokens were made with",
        ),
        (
            ["launch/pretrain.py", "--config", "{config}", "--data.sequence_length=100000"],
            "--data.sequence_length=100000: at most",
        ),
        (["launch/pretrain.py", "--config", "{config}", "--optimizer.lr=1e38"], "--optimizer.lr=1e38: must be at most 100"),
        (
            ["launch/pretrain.py", "--config", "{config}", "--run.folder=/proc/run"],
            "run.folder = '/proc/run': cannot be written",
        ),
        (
            ["launch/pretrain.py", "--config", "{config}", "--resume=auto", "--data.path={other}"],
            "another tokenizer than that of",
        ),
    ],
)
def test_a_users_mistake_is_one_clear_error(
    tmp_path: Path, finished: Path, prepared: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name in ("truncated", "foreign"):
        shutil.copytree(prepared, tmp_path / name, ignore=shutil.ignore_patterns("index"))
    os.truncate(tmp_path / "truncated" / "train.bin", 100)
    with (tmp_path / "foreign" / "tokenizer.json").open("a") as file:
        file.write("\n")
    if any("{other}" in argument for argument in arguments):
        other = run(
            [
                "launch/prepare.py",
                "--input",
                str(prepared.parent / "texts"),
                "--output",
                str(tmp_path / "other"),
                "--split",
                "70,20,10",
                "--vocab-size",
                "290",
            ]
        )
        assert other.returncode == 0, other.stderr
    names = {name: tmp_path / name for name in ("nowhere", "empty", "truncated", "foreign", "other")}
    values = {**names, "run": finished.with_suffix(""), "config": finished}
    result = run([argument.format(**values) for argument in arguments])
    assert result.returncode == 1, result.stdout + result.stderr
    assert expected in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


def test_a_training_sample_is_shown(finished: Path) -> None:
    import tokenizers

    shown = run(["launch/prepare.py", "inspect", str(finished), "--sample", "21", "--training.skip_samples=[[8, 16]]"])
    assert shown.returncode == 0, shown.stderr
    head, _, text = shown.stdout.partition("\n\n")
    assert head.splitlines()[0] == "sample    21, taken in step 2 (from_step 1)"
    assert [line.split()[0] for line in head.splitlines()] == ["sample", "source", "place", "documents", "tokens"]
    data = TokenDataset(load_config(finished).data.parts[0].path, "train", 16, load_config(finished).run.seed)
    data.prepare_range(21, 22)
    tokenizer = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    assert text == tokenizer.decode(data.sample(21).tolist(), skip_special_tokens=False) + "\n"
    wide = run(["launch/prepare.py", "inspect", str(finished), "--sample", "0", "--parallel.tensor=2"])
    assert wide.returncode == 0, wide.stderr
    wrong = run(["launch/prepare.py", "inspect", str(finished), "--sample", "0", "--data.path=nowhere"])
    assert (wrong.returncode, "--data.path=nowhere: no such folder" in wrong.stderr) == (1, True)
    assert run(["launch/prepare.py", "inspect", str(finished)]).returncode == 2
