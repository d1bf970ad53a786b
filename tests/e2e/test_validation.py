"""Validation sets and tasks as a user meets them: their figures, what is said of bad files, and lm-eval's figures."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.loader import Batch
from data_pipeline.read.task_file import encode_task, read_items
from data_pipeline.read.task_loader import TaskLoader
from pretrain.inference import load_model
from pretrain.interop.model_card import origin_of
from pretrain.loop.task_scores import log_probabilities
from pretrain.objectives.base import WeightedSum
from pretrain.objectives.registry import make_objective
from tests.helpers import BIN, ROOT, environment, metrics, numbers, run, train, write_run, write_text_files

TASKS = ROOT / "examples/tasks"
LENGTH = 40  # shorter than many questions


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """Text that the run does not train on, with its tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    texts = write_text_files(folder / "texts", documents=8, seed=5)
    prepare(
        PrepareOptions(inputs=(str(texts),), output=folder / "data", split=(0, 1, 0), tokenizer=prepared / "tokenizer.json")
    )
    return folder / "data"


def first_questions(folder: Path, count: int) -> Path:
    path = folder / "task.jsonl"
    lines = [json.loads(line) for line in (TASKS / "docstrings.jsonl").read_text().splitlines()[:count]]
    shortened = [line | {"choices": [choice[:10] for choice in line["choices"]]} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in shortened))
    return path


def test_sets_and_tasks_have_curves_of_their_own(tmp_path: Path, prepared: Path, other: Path) -> None:
    """The run's own split has the figures of a run that names no sets, on two processes and on one."""
    config = write_run(tmp_path, prepared)
    plain = train(config, f"--run.folder={tmp_path / 'plain'}")
    sets = f"--validation.sets={{own: {prepared}, other: {other}}}"
    task = [f"--validation.tasks={{docs: {first_questions(tmp_path, 5)}}}", "--validation.tasks_every_steps=0"]
    overrides = ["--logging.tensorboard=true", "--data.sequence_length=16", sets, *task]
    result = run(["launch/pretrain.py", "--config", str(config), *overrides], processes=2)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")

    own = numbers(lines, "step", "validation/own/loss", "validation/own/bits_per_byte", "validation/own/samples")
    alone = numbers(plain, "step", "validation/loss", "validation/bits_per_byte", "validation/samples")
    assert [pytest.approx(figures, rel=1e-5) for figures in alone] == own
    assert len(own) == 2
    for mean, first, second in numbers(lines, *(f"validation{name}/loss" for name in ("", "/own", "/other"))):
        assert mean == pytest.approx((first + second) / 2, rel=1e-12)
        assert first != second
    assert [step for step, _ in numbers(lines, "step", "tasks/docs/acc")] == [6]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    figures = [f"validation/{name}{figure}" for name in ("", "own/", "other/") for figure in ("loss", "bits_per_byte")]
    for name in [*figures, "tasks/docs/acc", "tasks/docs/acc_bytes"]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line], name
    said = [line for line in result.stdout.splitlines() if line.startswith("step 6: ")]
    assert [line.partition(":")[2].partition(" ")[2].rpartition(" loss")[0] for line in said[:3]] == [
        "validation of own:",
        "validation of other:",
        "validation",
    ]
    assert re.fullmatch(r"step 6: task docs: acc \d\.\d{4}, acc_bytes \d\.\d{4}", said[3])

    afterwards: dict[str, Any] = {}
    samples = load_config(tmp_path / "run/config.yaml").validation.samples
    for more in (["--samples", str(samples)], ["--tasks"]):
        evaluated = run(["launch/evaluate.py", str(tmp_path / "run"), "--json", str(tmp_path / "figures.json"), *more])
        assert evaluated.returncode == 0, evaluated.stderr
        afterwards |= json.loads((tmp_path / "figures.json").read_text())
    last = {name: value for line in lines if line["step"] == 6 for name, value in line.items()}
    for name in ("own/loss", "own/bits_per_byte", "other/loss", "other/perplexity"):
        assert afterwards[name] == pytest.approx(last[f"validation/{name}"], rel=1e-5)
    assert [afterwards[f"tasks/docs/{figure}"] for figure in ("acc", "acc_bytes")] == [
        last[f"tasks/docs/{figure}"] for figure in ("acc", "acc_bytes")
    ]
    assert "own/unigram_loss" in afterwards
    assert "other/unigram_loss" not in afterwards  # it has no text for training
    card = origin_of(tmp_path / "run/checkpoints/step_00000006", load_config(tmp_path / "run/config.yaml")).lines
    assert card["tasks docs acc"] == f"{last['tasks/docs/acc']:.4g}"
    assert "task    docs: 5 questions, 20 choices, guessing gives 0.2500; 5 longer than" in result.stdout


def test_bad_files_are_listed_with_all_other_faults(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    lines = ['{"context": "a", "choices": [" b", " c"]}', '{"context": ', '{"context": "", "choices": [" b"], "answer": 0}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty.jsonl").touch()
    tasks = f"--validation.tasks={{bad: {tmp_path / 'bad.jsonl'}, empty: {tmp_path / 'empty.jsonl'}}}"
    arguments = [tasks, f"--validation.sets={{none: {tmp_path / 'none'}}}", "--training.steps=0"]
    result = run(["launch/pretrain.py", "--config", str(config), *arguments])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    wanted = [
        "6 faults",
        "--training.steps=0",
        f"validation.sets.none = '{tmp_path}/none': no such folder",
        f"validation.tasks.bad = '{tmp_path}/bad.jsonl': line 1: has no answer",
        "line 2: is not valid JSON",
        "line 3: choices is",
        f"validation.tasks.empty = '{tmp_path}/empty.jsonl': is empty",
    ]
    assert [text for text in wanted if text not in result.stderr] == []


def test_a_choice_that_cannot_be_scored_ends_all_ranks_with_one_line(tmp_path: Path, prepared: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"context": "a", "choices": [" cat" * 9, " b"], "answer": 0}))
    arguments = ["--config", str(write_run(tmp_path, prepared)), f"--validation.tasks={{docs: {path}}}"]
    result = run(["launch/pretrain.py", *arguments, "--data.sequence_length=8"], processes=2)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {path}: line 1: choice 0 has 9 tokens; at most data.sequence_length (8)"]
    assert "Traceback" not in result.stderr


def test_the_shipped_tasks_are_sound_and_in_the_shipped_configuration() -> None:
    named = load_config(str(ROOT / "configs/validation_cpu.yaml"), world_size=2).validation.tasks
    assert sorted(Path(path).name for path in named.values()) == sorted(path.name for path in TASKS.glob("*.jsonl"))
    for path in named.values():
        items = read_items(ROOT / path)
        assert len(items) == 64
        assert {len(set(item.choices)) for item in items} == {4}
        assert all(choice[0] == " " != choice[1] for item in items for choice in item.choices)
        assert {item.answer for item in items} == {0, 1, 2, 3}


LM_EVAL_TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""


def lm_eval(folder: Path, model: Path, file: Path) -> tuple[dict[str, Any], list[float]]:
    """lm-eval's figures of a task's file for an exported model, and the log-probability of every choice."""
    (folder / "tasks").mkdir()
    (folder / "tasks/choices.yaml").write_text(LM_EVAL_TASK.replace("FILE", str(file)))
    arguments = f"pretrained={model},dtype=float32,max_length={LENGTH},trust_remote_code=True"
    command = ["run", "--model", "hf", "--model_args", arguments, "--device", "cpu", "--batch_size", "8", "--log_samples"]
    where = ["--include_path", str(folder / "tasks"), "--tasks", "choices", "--output_path", str(folder / "out")]
    switches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    result = subprocess.run(
        [str(BIN / "lm_eval"), *command, *where], env=environment() | switches, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    [found], [samples] = ((folder / "out").rglob(name) for name in ("results_*.json", "samples_*.jsonl"))
    answered = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    logs = [float(log) for sample in answered for log, _ in sample["filtered_resps"]]
    return json.loads(found.read_text())["results"]["choices"], logs


def our_logs(run_folder: Path, file: Path) -> list[float]:
    """Those of the run's checkpoint."""
    loaded = load_model(run_folder)
    objective = make_objective(loaded.config)
    task = encode_task("choices", file, loaded.tokenizer, LENGTH)

    def loss(batch: Batch) -> WeightedSum:
        return objective.loss_of(loaded.model, objective.examples(batch), loaded.model.layers, loaded.device)

    logs = log_probabilities(loss, TaskLoader(task, LENGTH, 5, 0, 1), loaded.device)
    assert logs is not None
    return logs


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_scores_are_those_of_lm_eval_for_the_exported_model(tmp_path: Path, prepared: Path) -> None:
    """Questions of all kinds: spaces at the end of a context, no context, longer than the model reads, words that go on."""
    lines = [json.loads(line) for path in sorted(TASKS.glob("*.jsonl")) for line in path.read_text().splitlines()[:24]]
    for number, line in enumerate(lines):
        if number % 4 == 1:  # the space is the context's
            line["context"], line["choices"] = line["context"] + " ", [choice[1:] for choice in line["choices"]]
        elif number % 4 == 2:
            line["context"] = ""
        elif number % 4 == 3:  # the choice goes on with the context's last word
            line["context"], line["choices"] = line["context"] + " ", [choice[1:] for choice in line["choices"]]
            line["context"] += line["choices"][0][:2]
        line["choices"] = [choice[: 10 + (7 * place + number) % 15] for place, choice in enumerate(line["choices"])]
        line["context"] = line["context"][:: 1 if number % 2 else 4]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = ["--training.steps=30", f"--data.sequence_length={LENGTH}", f"--validation.tasks={{choices: {path}}}"]
    config = write_run(tmp_path, prepared)
    # An export has no rows beyond the tokenizer's; those that fill up our vocabulary have a share of the probability.
    options = ["--model.vocab_size=300", "--parallel.pipeline=2"]
    result = run(["launch/pretrain.py", "--config", str(config), *overrides, *options], processes=2)
    assert result.returncode == 0, result.stderr
    assert re.search(r"task    choices: 48 questions, 192 choices, guessing gives 0.2500; [1-9]\d* longer", result.stdout)
    ours = numbers(metrics(tmp_path / "run"), "tasks/choices/acc", "tasks/choices/acc_bytes")[-1]
    assert run(["launch/export.py", str(tmp_path / "run"), str(tmp_path / "exported")]).returncode == 0
    theirs, logs = lm_eval(tmp_path, tmp_path / "exported", path)
    assert our_logs(tmp_path / "run", path) == pytest.approx(logs, abs=2e-4)
    assert theirs["acc,none"] != theirs["acc_bytes,none"]
    assert ours == (pytest.approx(theirs["acc,none"], abs=1e-9), pytest.approx(theirs["acc_bytes,none"], abs=1e-9))
