"""Scores of tasks: against log-probabilities in float64 of each text by itself, and by hand."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.loader import Batch
from data_pipeline.read.task_file import Item, Row, Task, encode_task
from data_pipeline.read.task_loader import TaskLoader
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.loop.task_scores import TaskScores, in_words, log_probabilities, scores
from pretrain.objectives.base import WeightedSum
from pretrain.objectives.registry import make_objective
from tests.helpers import metrics, write_run
from tests.unit.pretrain.loop.engine import ONE_STEP, Loop

CPU = torch.device("cpu")


def item(answer: int, *choices: str) -> Item:
    return Item(1, "", list(choices), answer)


def test_the_likeliest_choice_counts_and_the_likeliest_for_its_bytes() -> None:
    items = [item(0, "ab", "abcd"), item(1, "ab", "abcd"), item(2, "é", "e", "ee")]
    logs = [-3.0, -4.0, -3.0, -4.0, -4.0, -3.0, -3.9]
    # Of two bytes, four, two, four; then two (é), one, two: -2, -3, -1.95 for each byte.
    assert scores(items, logs) == {"acc": 1 / 3, "acc_bytes": 2 / 3}


def test_of_equal_choices_the_first_counts() -> None:
    assert scores([item(0, "a", "b"), item(1, "a", "b")], [-1.0] * 4) == {"acc": 0.5, "acc_bytes": 0.5}


def test_a_task_is_described_in_a_line() -> None:
    task = Task("docs", [item(0, "a", "b"), item(0, "a", "b", "c", "d")], [Row([1], 1)] * 6, cut=1)
    expected = "docs: 2 questions, 6 choices, guessing gives 0.3750"
    assert in_words(task, 64) == f"{expected}; 1 longer than data.sequence_length (64) lose their beginning"
    assert in_words(Task("docs", task.items, task.rows, 0), 64) == expected


QUESTIONS: list[dict[str, Any]] = [
    {"context": "the cat", "choices": [" sat on a mat", " ran", " attend"], "answer": 0},
    {"context": "many heads ", "choices": ["attend to one key", "ran home"], "answer": 1},
    {"context": "", "choices": ["the cat", "dogs"], "answer": 1},
    {"context": "to one key while dogs ran home the cat sat on a mat and" * 3, "choices": [" many heads", " the"], "answer": 0},
]


@pytest.mark.parametrize("across", [True, False])
def test_log_probabilities_equal_those_of_each_text_by_itself_in_float64(tmp_path: Path, prepared: Path, across: bool) -> None:
    """Two data-parallel ranks in turn, in batches of three rows; the independent computation has one text and no filling."""
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    options = [f"--model.attend_across_documents={str(across).lower()}", "--model.init_std=0.5", "--data.sequence_length=32"]
    config = load_config(write_run(tmp_path, prepared), options).resolved(tokenizer.vocab_size, tokenizer.end_of_document)
    model, objective = DecoderLM(config.model).eval(), make_objective(config)
    init_weights(model, 3)
    model.double()
    task = encode_task("docs", path, tokenizer, 32)
    assert task.cut == 1

    def loss(batch: Batch) -> WeightedSum:
        return objective.loss_of(model, objective.examples(batch), model.layers, CPU)

    shares = [log_probabilities(loss, TaskLoader(task, 32, 3, rank, 2), CPU) for rank in range(2)]
    found = [sum(pair) for pair in zip(*(share for share in shares if share is not None), strict=True)]

    expected = []
    for line in QUESTIONS:
        spaces = len(line["context"]) - len(line["context"].rstrip())
        before = tokenizer.encode(line["context"][: len(line["context"]) - spaces]) or [tokenizer.end_of_document]
        for choice in line["choices"]:
            own = tokenizer.encode(" " * spaces + choice)
            tokens = torch.tensor((before + own)[-33:])
            with torch.no_grad():
                logs = model.logits(tokens[None, :-1]).log_softmax(-1)[0, -len(own) :]
            expected.append(float(logs[torch.arange(len(own)), torch.tensor(own)].sum()))
    assert found == pytest.approx(expected, rel=1e-12)
    assert len({round(value, 6) for value in found}) == len(found)


def loaders(*names: str) -> list[TaskLoader]:
    """Tasks of one question with rows [0, 1] and [0, 3]; to the engine of these tests the loss of a label is the label."""
    tasks = [Task(name, [item(0, "abc", "d")], [Row([0, 1], 1), Row([0, 3], 1)], 0) for name in names]
    return [TaskLoader(task, 4, 2, 0, 1) for task in tasks]


def scored(folder: Path) -> list[int]:
    return [int(line["step"]) for line in metrics(folder / "run") if "tasks/docs/acc" in line]


@pytest.mark.parametrize(("every_steps", "expected"), [(2, [2, 4, 5]), (0, [5]), (7, [5])])
def test_scores_every_n_steps_and_after_the_last(tmp_path: Path, every_steps: int, expected: list[int]) -> None:
    Loop(tmp_path, "--training.steps=5", hooks=[TaskScores(loaders("docs"), every_steps)]).trainer.run()
    assert scored(tmp_path) == expected


def test_scores_are_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[TaskScores(loaders("docs", "code"), 0)]).trainer.run()
    expected = {f"tasks/{name}/{figure}": 1.0 for name in ("docs", "code") for figure in ("acc", "acc_bytes")}
    assert metrics(tmp_path / "run")[-1] == {"step": 1, **expected}
    shown = [line for line in capsys.readouterr().out.splitlines() if "task" in line]
    assert shown == [
        "task    docs: 1 questions, 2 choices, guessing gives 0.5000",
        "task    code: 1 questions, 2 choices, guessing gives 0.5000",
        "step 1: task docs: acc 1.0000, acc_bytes 1.0000",
        "step 1: task code: acc 1.0000, acc_bytes 1.0000",
    ]


def test_a_signal_in_the_second_task_leaves_no_scores_of_the_first(tmp_path: Path) -> None:
    loop = Loop(tmp_path, "--training.steps=5", hooks=[TaskScores(loaders("docs", "code"), 1)])
    loop.stop_by(signal.SIGTERM, at=3)  # 1: a step, 2: docs, 3: code
    assert loop.trainer.run() == signal.SIGTERM
    assert scored(tmp_path) == []


def test_a_log_probability_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path, *ONE_STEP, hooks=[TaskScores(loaders("docs"), 0)])
    loop.engine.eval_loss = lambda batch: WeightedSum(torch.tensor([1.0, math.nan]).double(), 1.0)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^step 1: log-probabilities of the task docs that are not finite: training diverged"):
        loop.trainer.run()
