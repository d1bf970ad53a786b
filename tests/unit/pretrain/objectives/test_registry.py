"""Which models learn what, and what the faults of an objective say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import ConfigError, load_config
from data_pipeline.faults import data_faults
from model.registry import model_kind, model_kinds
from pretrain.objectives.registry import _OBJECTIVES, make_objective, objective_faults, objective_names
from tests.helpers import ROOT, resolved, write_run

CHECKS = (objective_faults, data_faults)


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, checks=CHECKS, world_size=1)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("kind", model_kinds())
def test_every_kind_of_model_has_an_objective(kind: str) -> None:
    assert model_kind(kind).causal in {entry.causal for entry in _OBJECTIVES.values()}


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_has_a_class(tmp_path: Path, masked_data: Path, name: str, bidirectional_kind: str) -> None:
    kind = "decoder" if _OBJECTIVES[name].causal else bidirectional_kind
    path, overrides = write_run(tmp_path, masked_data), [f"--training.objective={name}", f"--model.kind={kind}"]
    load_config(path, overrides, checks=CHECKS, world_size=1)
    objective = make_objective(resolved(path, overrides, world_size=1))
    assert f"{type(objective).__module__}:{type(objective).__name__}" == _OBJECTIVES[name].target


def test_models_that_see_too_much_or_too_little(tmp_path: Path, masked_data: Path, bidirectional_kind: str) -> None:
    path = write_run(tmp_path, masked_data)
    (fault,) = faults_of(path, "--training.objective=masked")
    assert fault == "training.objective = 'masked': a decoder sees no later tokens; it learns next_token, spans"
    (fault,) = faults_of(path, f"--model.kind={bidirectional_kind}")
    assert fault == "training.objective = 'next_token': a bidirectional sees later tokens; it learns masked"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective=guess"], "training.objective = 'guess': known: next_token, masked, spans"),
        (["masked.share=0.3"], "training.masked.share = 0.3: only objective masked has it; set it to 0.15"),
        (["masked.random=0.3"], "training.masked.random = 0.3: at most 1 - replaced (0.2)"),
        (["spans.share=0.3"], "training.spans.share = 0.3: only objective spans has it; set it to 0.15"),
        (
            ["objective=spans", "spans.sentinel=<extra_id>"],
            "training.spans.sentinel = '<extra_id>': needs {} where the number is, such as <|sentinel_{}|>",
        ),
    ],
)
def test_options(tmp_path: Path, masked_data: Path, overrides: list[str], expected: str) -> None:
    assert expected in faults_of(write_run(tmp_path, masked_data), *(f"--training.{override}" for override in overrides))


@pytest.mark.parametrize("override", ["data.packing=documents", "model.attend_across_documents=false"])
def test_spans_read_a_sample_as_one_text(tmp_path: Path, masked_data: Path, override: str) -> None:
    (fault,) = faults_of(write_run(tmp_path, masked_data), "--training.objective=spans", f"--{override}")
    wanted = "reads a sample as one text; take data.packing concatenate and model.attend_across_documents null"
    assert fault == f"training.objective = 'spans': {wanted}"


def test_tokens_that_the_tokenizer_lacks(tmp_path: Path, prepared: Path, bidirectional_kind: str) -> None:
    path = write_run(tmp_path, prepared)
    masked = ["--training.objective=masked", f"--model.kind={bidirectional_kind}"]
    (fault,) = faults_of(path, *masked)
    add = "prepare the data with --special-tokens (docs/objectives.md), or name one that it has"
    why = f"{prepared}: its tokenizer.json has no special token <|mask|>; {add}"
    assert fault == f"training.masked.token = '<|mask|>': {why}"
    spans = ["--training.objective=spans", "--training.spans.mean_length=1"]
    (fault,) = faults_of(path, *spans)
    assert "training.spans.sentinel = '<|sentinel_{}|>': " in fault
    assert "has no special token <|sentinel_0|> to <|sentinel_1|> (2 of 2); prepare the data with --special-tokens" in fault
    for overrides in (masked, spans):
        with pytest.raises(UserError, match="has no special token"):  # where nobody checked, as for another folder's data
            make_objective(resolved(path, overrides, world_size=1))
    load_config(path, [*masked, "--training.masked.token=<|endoftext|>"], checks=CHECKS, world_size=1)


def test_tasks_are_continuations(tmp_path: Path, masked_data: Path) -> None:
    path, tasks = write_run(tmp_path, masked_data), "--validation.tasks={quiz: quiz.jsonl}"
    (fault,) = faults_of(path, "--training.objective=spans", tasks)
    assert fault.startswith("validation.tasks = {'quiz': 'quiz.jsonl'}: only with training.objective next_token, not spans")
    load_config(path, [tasks], checks=CHECKS, world_size=1)


def test_rows_of_spans_have_to_fit(tmp_path: Path, masked_data: Path) -> None:
    path, spans = write_run(tmp_path, masked_data), "--training.objective=spans"
    assert resolved(path, [spans], world_size=1).model.max_position_embeddings == 16 + 2
    (fault,) = faults_of(path, spans, "--model.max_position_embeddings=17")
    wanted = "at most model.max_position_embeddings (17), which the 18 tokens of a row with its sentinels exceed"
    assert fault == f"data.sequence_length = 16: {wanted}"


def test_faults_need_no_torch() -> None:
    program = "import sys, pretrain.objectives.registry; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
