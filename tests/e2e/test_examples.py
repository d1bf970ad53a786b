"""The examples on tiny random models in exported form, offline: fine-tuning with LoRA, classification, spans, lm-eval."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import BIN, ROOT, environment, run
from tests.random_checkpoint import random_checkpoint

LORA, CLASSIFY, MAKE_TASK = "finetune_lora.py", "finetune_classification.py", "lm_eval/make_task.py"
MAKE_TASKS = "tasks/make_tasks.py"
TARGETS = {
    "manyheads": {"qkv", "out", "up", "down"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt_bigcode": {"c_attn", "c_proj", "c_fc"},
}
SHORT = ["--batch-size", "8", "--max-length", "96"]


def execute(folder: Path, script: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a script that runs in a folder, offline."""
    switches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    result = run([str(script), *arguments], folder=folder, variables=switches)
    return result.returncode, result.stderr


def execute_all(folder: Path, *commands: Sequence[str]) -> list[tuple[int, str]]:
    """Exit status and standard error of each example."""
    return [execute(folder, ROOT / "examples" / name, *arguments) for name, *arguments in commands]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported folders, by architecture."""
    from pretrain.interop.export import export

    folder = tmp_path_factory.mktemp("models")
    size = ["--data.sequence_length=192", "--model.init_std=0.2", "--model.ffn_hidden_size=64"]
    llama = ["norm=rmsnorm", "activation=swiglu", "position=rope", "embedding_position=before", "key_embedding=false"]
    settings = {"llama": [*llama, "tie_embeddings=false"], "gpt_bigcode": ["attention=mhe_mul"], "manyheads": ["position=rope"]}
    for name, fields in settings.items():
        overrides = [*size, *(f"--model.{field}" for field in fields)]
        source = random_checkpoint(folder, *overrides, vocabulary=600, noise=0.02, name=f"{name}_run")
        export(source, folder / name, "auto", 10**9, None, len)
        assert json.loads((folder / name / "config.json").read_text())["model_type"] == name
    return folder


def write(folder: Path, task: str, parts: Sequence[str], rows: Iterable[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    """The same rows for each part."""
    rows, place = list(rows), folder / task
    place.mkdir()
    if suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = ["\t".join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]]
    for part in parts:
        (place / f"{part}{suffix}").write_text("\n".join(lines) + "\n")
    return place


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_lora_learns_and_merging_changes_no_logits(tmp_path: Path, models: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in inspect.getsource(textwrap).split("\n\n")))
    options = ["--block", "64", "--steps", "30", "--learning-rate", "3e-2", "--rank", "4", "--merge", "--data", str(text)]
    trust = {"manyheads": True}
    commands = [[LORA, str(models / name), "--output", str(tmp_path / name), *options] for name in TARGETS]
    commands[0].append("--trust-remote-code")
    assert [status for status, _ in execute_all(tmp_path, *commands)] == [0, 0, 0]
    for name, layers in TARGETS.items():
        out = tmp_path / name
        figures = results(out)
        assert figures["held_out_loss_after"] < figures["held_out_loss_before"] - 0.2

        code = {"trust_remote_code": trust.get(name, False)}
        base = AutoModelForCausalLM.from_pretrained(models / name, **code)
        adapted: Any = PeftModel.from_pretrained(base, out / "adapter").eval()
        assert {name.rpartition(".")[2] for name in adapted.peft_config["default"].target_modules} == layers
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", **code).eval()
        ids = AutoTokenizer.from_pretrained(out / "merged")("def wrap(text, width=70):", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            with_adapter = adapted(input_ids=ids).logits
            with adapted.disable_adapter():
                without = adapted(input_ids=ids).logits
            torch.testing.assert_close(merged(input_ids=ids).logits, with_adapter, atol=1e-4, rtol=1e-4)
        assert (with_adapter - without).abs().max() > 0.1


WORDS = ["good fine film", "bad awful film"]


def folders_of_tasks(folder: Path) -> dict[str, Path]:
    """Task → a folder of examples in its own format."""
    both, mnli_parts = ("train", "validation"), ("train", "validation_matched", "validation_mismatched")
    sst2 = ({"sentence": WORDS[n % 2], "label": 1 - n % 2} for n in range(32))
    stsb = ({"sentence1": WORDS[n % 2], "sentence2": '"a', "label": n % 2 * 2.5} for n in range(16))
    mnli = ({"premise": "a b", "hypothesis": f"c{n}", "label": n % 3} for n in range(24))
    boolq = ({"passage": "long " * 200, "question": WORDS[n % 2], "label": n % 2 == 1} for n in range(16))
    return {
        "sst2": write(folder, "sst2", both, sst2),
        "stsb": write(folder, "stsb", both, stsb, ".tsv"),
        "mnli": write(folder, "mnli", mnli_parts, mnli),
        "boolq": write(folder, "boolq", both, boolq),
        "squad": write(folder, "squad", both, squad_rows()),
    }


def test_local_folders_in_the_formats_of_glue_superglue_and_squad(tmp_path: Path, models: Path) -> None:
    folders = folders_of_tasks(tmp_path)
    steps = {"sst2": "30", "stsb": "4", "mnli": "4", "boolq": "60", "squad": "60"}
    commands = []
    for task, data in folders.items():
        out = ["--task", task, "--data", str(data), "--output", str(tmp_path / "out" / task), "--learning-rate", "1e-2"]
        commands.append([CLASSIFY, str(models / "gpt_bigcode"), *out, "--steps", steps[task], *SHORT])
    llama, squad = str(models / "llama"), commands[-1][2:6]
    commands.append([CLASSIFY, llama, *squad, "--output", str(tmp_path / "llama"), "--steps", "2", *SHORT])
    docs = ["--task", "docs", "--output", str(tmp_path / "docs"), "--steps", "2", "--limit", "64"]
    commands.append([CLASSIFY, llama, *docs, *SHORT])
    for command, (status, errors) in zip(commands, execute_all(tmp_path, *commands), strict=True):
        assert status == 0, f"{command}\n{errors}"

    found = {task: results(tmp_path / "out" / task) for task in folders}
    assert found["sst2"]["validation_accuracy"] == 1.0  # one of two words tells the label
    assert found["sst2"]["validation_majority_accuracy"] == 0.5
    assert found["boolq"]["validation_accuracy"] == 1.0  # the question is at the end of a text that is cut
    assert -1 <= found["stsb"]["validation_spearman"] <= 1
    assert found["mnli"].keys() >= {"validation_matched_accuracy", "validation_mismatched_accuracy"}
    assert found["squad"]["validation_exact_match"] > 0.5  # of 6 rows with two windows each
    assert results(tmp_path / "llama")["validation_rows"] == 6
    assert 0 < results(tmp_path / "docs")["validation_majority_accuracy"] <= 1
    assert_transformers_loads(tmp_path / "out" / "sst2")


def assert_transformers_loads(saved: Path) -> None:
    """Transformers itself loads the classifier, and rows of a padded batch get the logits that they get alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    texts = [WORDS[0], "a much longer text about a " + WORDS[1]]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert model.config.id2label[int(together[0].argmax())] == "positive"


def squad_rows() -> list[dict[str, Any]]:
    """Contexts of two windows with the answer at different places."""
    filler, rows = "The river flows to the sea. ", []
    for number in range(6):
        before = filler * number + "The capital was "
        answers = {"text": ["Scone"], "answer_start": [len(before)]}
        rows.append({"context": f"{before}Scone. {filler * 5}", "question": "What was the capital?", "answers": answers})
    return rows


def test_squad_measures_and_windows() -> None:
    from examples.spans import Window, answer_positions, best_answers, squad_scores

    rows = [{"context": "in the old Scone", "answers": {"text": ["the old Scone!", "Perth"]}}]
    assert squad_scores(["old scone"], rows) == {"exact_match": 1.0, "f1": 1.0}
    assert squad_scores(["old Perth"], rows) == {
        "exact_match": 0.0,
        "f1": pytest.approx(2 / 3),
    }  # Perth: precision 1/2, recall 1
    assert squad_scores(["river"], rows) == {"exact_match": 0.0, "f1": 0.0}

    import numpy as np

    window = Window(row=0, first=2, ids=[9, 9, 1, 2, 3, 4], offsets=[(0, 2), (2, 6), (6, 10), (10, 16)])
    assert answer_positions(window, {"text": ["the old"], "answer_start": [3]}) == (3, 4)
    assert answer_positions(window, {"text": ["elsewhere"], "answer_start": [30]}) == (0, 0)
    start_WS, end_WS = np.zeros((1, 6)), np.zeros((1, 6))
    start_WS[0, [0, 4]], end_WS[0, [3, 5]] = [99, 5], [6, 4]  # position 0 is no context; 4 to 3 would run backwards
    assert best_answers([window], start_WS, end_WS, rows) == ["old Scone"]


def test_mistakes_end_with_one_line(tmp_path: Path, models: Path) -> None:
    model, out = str(models / "llama"), ["--output", str(tmp_path / "out")]
    wrong = write(tmp_path, "wrong", ["train", "validation"], [{"text": "a", "label": 1}])
    label = write(tmp_path, "label", ["train", "validation"], [{"sentence": "a", "label": "great"}])
    write(tmp_path, "good", ["train", "validation"], [{"sentence": "a", "label": 1}])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train.jsonl").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text("{no json\n")
    unanswered = write(
        tmp_path, "v2", ["train", "validation"], [squad_rows()[0] | {"answers": {"text": [], "answer_start": []}}]
    )
    shutil.copytree(models / "llama", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    sst2 = [CLASSIFY, model, *out, "--task", "sst2", "--data"]
    cases = [
        ([LORA, str(tmp_path / "none"), "--data", "docs", *out], "no such folder"),
        ([LORA, str(tmp_path), "--data", "docs", *out], "has no config.json"),
        ([LORA, model, "--data", "docs", "--output", str(wrong)], "exists already"),
        ([LORA, model, "--data", str(tmp_path / "none"), *out], "no such file or folder"),
        ([LORA, model, "--data", str(tmp_path / "lines.jsonl"), *out], "lines.jsonl:2: has no field 'text'"),
        ([LORA, model, "--data", str(tmp_path / "short.txt"), *out], "two are needed"),
        ([LORA, model, "--data", "docs", *out, "--block", "999"], "at most 192 tokens"),
        ([*sst2, str(tmp_path / "none")], "no such folder"),
        ([*sst2, str(wrong)], "train has no column sentence; --task sst2 needs label, sentence"),
        ([*sst2, str(label)], "label 'great': must be 0 or negative, 1 or positive"),
        ([*sst2, str(empty)], "train.jsonl: is empty"),
        ([*sst2, str(tmp_path / "broken")], "cannot be read"),
        ([CLASSIFY, model, *out, "--task", "squad", "--data", str(unanswered)], "at least one answer"),
        ([CLASSIFY, str(tmp_path / "cut"), *sst2[2:], str(tmp_path / "good")], "cut: transformers cannot load it"),
        ([*sst2, "hub"], "cannot be read"),  # no network
    ]
    usage = [[CLASSIFY, model, *out, "--task", "poetry"], [CLASSIFY, model, *out, "--task", "sst2"], [LORA, model]]
    ended = execute_all(tmp_path, *(command for command, _ in cases), *usage)
    for (command, message), (status, errors) in zip(cases, ended, strict=False):
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) == (1, 1), f"{command}\n{errors}"
        assert message in lines[0]
        assert "Traceback" not in errors
    for status, errors in ended[len(cases) :]:
        assert status == 2
        assert "usage:" in errors
    assert not (tmp_path / "out").exists()


def test_help_gives_every_default() -> None:
    for name in (LORA, CLASSIFY, MAKE_TASK, MAKE_TASKS):
        command = [sys.executable, str(ROOT / "examples" / name), "--help"]
        text = subprocess.run(
            command, env=environment() | {"COLUMNS": "100"}, capture_output=True, text=True, check=True
        ).stdout
        assert "(default: " in text
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.thorough
def test_tasks_are_made_from_the_documentation_of_this_python(tmp_path: Path) -> None:
    """The shipped ones are in tests/e2e/test_validation.py."""
    from data_pipeline.read.task_file import read_items

    made = []
    for folder in (tmp_path / "once", tmp_path / "twice"):
        assert execute(tmp_path, ROOT / "examples" / MAKE_TASKS, "--questions", "8", "--output", str(folder))[0] == 0
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert {name: len(read_items(tmp_path / "once" / name)) for name in made[0]} == {
        "docstrings.jsonl": 8,
        "language_reference.jsonl": 8,
    }


@pytest.mark.thorough
def test_lm_eval_runs_the_tasks(tmp_path: Path, models: Path) -> None:
    assert execute(tmp_path, ROOT / "examples" / MAKE_TASK, "--questions", "8")[0] == 0
    questions = [json.loads(line) for line in (tmp_path / "data/lm_eval/endings.jsonl").read_text().splitlines()]
    assert len(questions) == 8
    assert all(len(set(question["endings"])) == 4 for question in questions)
    assert len({question["right"] for question in questions}) > 1

    options = f"--model hf --model_args pretrained={models / 'llama'},dtype=float32 --device cpu --limit 2 --output_path out"
    tasks = ["--include_path", str(ROOT / "examples/lm_eval"), "--tasks", "docs_endings,docs_perplexity"]
    status, errors = execute(tmp_path, BIN / "lm_eval", "run", *options.split(), *tasks)
    assert status == 0, errors
    [file] = (tmp_path / "out").rglob("results_*.json")
    figures = json.loads(file.read_text())["results"]
    assert 0 <= figures["docs_endings"]["acc,none"] <= 1
    # An untrained model of 600 tokens takes about log2(600) = 9.2 bits a token, of more than one byte.
    assert 1 < figures["docs_perplexity"]["bits_per_byte,none"] < 9.2


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps({"text": f"one\u2028two {number}"}, ensure_ascii=False) for number in range(3)),
        "\ufeff" + "\r\n\r\n".join(json.dumps({"text": f"line {number}"}) for number in range(3)),
        '{"text": "a", "id": ' + "9" * 5000 + "}\n\n",
    ],
)
def test_lora_reads_json_lines_as_prepare_does(tmp_path: Path, content: str) -> None:
    from data_pipeline.prepare.documents import ReadOptions
    from data_pipeline.prepare.sources import find_sources
    from examples.finetune_lora import read_texts

    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8", newline="")
    (source,) = find_sources([str(tmp_path)])
    expected = [
        json.loads(line, parse_int=float)["text"] for line in content.removeprefix("\ufeff").split("\n") if line.strip()
    ]
    assert list(read_texts(tmp_path)) == list(source.documents(ReadOptions())) == expected
