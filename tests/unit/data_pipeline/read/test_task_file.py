"""Task files: what they may hold, what is said of the others, and how texts are divided into context and choice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import DataConfig, ValidationConfig
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.task_file import Item, encode_pair, encode_task, read_items, task_faults
from launch.common import CHECKS

GOOD = {"context": "a", "choices": [" b", " c"], "answer": 0}


def written(folder: Path, *lines: object) -> Path:
    """A file of these lines; what is no text is written as JSON."""
    path = folder / "task.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def faults(path: Path) -> list[str]:
    found = list(task_faults({"validation": ValidationConfig(tasks={"docs": str(path)})}))
    assert all((fault.key, fault.value) == ("validation.tasks.docs", str(path)) for fault in found)
    return [fault.allowed for fault in found]


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (without("answer"), "has no answer; it must be the index of the right choice, from 0 to 1"),
        (GOOD | {"answer": 2}, "answer is 2; it must be the index of the right choice, from 0 to 1"),
        (GOOD | {"answer": -1}, "answer is -1; it must be the index"),
        (GOOD | {"answer": "0"}, 'answer is "0"; it must be the index'),
        (GOOD | {"answer": True}, "answer is true; it must be the index"),
        (without("choices"), "has no choices; it must be a list of at least two texts, none of them empty"),
        (GOOD | {"choices": []}, "choices is []; it must be a list of at least two texts"),
        (GOOD | {"choices": [" b"]}, 'choices is [" b"]; it must be a list of at least two texts'),
        (GOOD | {"choices": [" b", ""]}, 'choices is [" b", ""]; it must be a list of at least two texts'),
        (GOOD | {"choices": [" b", 3]}, 'choices is [" b", 3]; it must be a list of at least two texts'),
        (without("context"), "has no context; it must be text, which may be empty"),
        (GOOD | {"context": None}, "context is null; it must be text"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}', 'context is "\\ud800"; it must be text'),
        ('{"context": "a",', "is not valid JSON: Expecting property name"),
        ("[" * 100_000, "is not valid JSON"),
        ([1], "must be an object such as"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: object, reason: str) -> None:
    path = written(tmp_path, GOOD, line, GOOD)
    (found,) = faults(path)
    assert found.startswith(f"line 2: {reason}")
    assert len(found) < 200
    with pytest.raises(UserError) as caught:
        read_items(path)
    assert str(caught.value) == f"{path}: {found}"


def test_the_first_lines_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    found = faults(written(tmp_path, *([without("answer")] * 6)))
    assert [text[:7] for text in found[:3]] == ["line 1:", "line 2:", "line 3:"]
    assert found[3:] == ["and 3 more lines cannot be used"]


def test_files_without_any_line(tmp_path: Path) -> None:
    assert faults(written(tmp_path)) == ["is empty; it needs a line for each question"]
    assert faults(written(tmp_path, "", "  ")) == ["is empty; it needs a line for each question"]
    assert faults(tmp_path / "none") == ["no such file"]
    assert faults(tmp_path) == ["cannot be read: Is a directory"]
    (tmp_path / "task.jsonl").write_bytes(b'{"context": "\xff"}\n')
    assert faults(tmp_path / "task.jsonl") == ["line 1: is not UTF-8 text"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert faults(path) == []
    assert len(read_items(path)) == 1


def test_blank_lines_and_other_keys_are_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD | {"id": 7}, "", GOOD | {"context": "", "answer": 1})
    assert faults(path) == []
    assert read_items(path) == [Item(1, "a", [" b", " c"], 0), Item(3, "", [" b", " c"], 1)]


@pytest.mark.parametrize(("packing", "refused"), [("concatenate", 0), ("documents", 2), ("best_fit", 2)])
def test_a_model_that_learns_no_first_tokens_needs_contexts(tmp_path: Path, packing: str, refused: int) -> None:
    path = written(tmp_path, GOOD | {"context": ""}, GOOD, GOOD | {"context": " \n"})
    data = DataConfig(path="data", sequence_length=8, packing=packing)  # type: ignore[arg-type]
    found = list(task_faults({"data": data, "validation": ValidationConfig(tasks={"docs": str(path)})}))
    assert [fault.allowed.partition(", but")[0] for fault in found] == ["line 1: has no context", "line 3: has no context"][
        :refused
    ]


def test_commands_check_the_files() -> None:
    assert task_faults in CHECKS


@pytest.fixture(scope="module")
def encoder(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.json")


@pytest.mark.parametrize(
    ("context", "choice", "before", "scored"),
    [
        ("the cat", " sat", "the cat", " sat"),
        ("the cat ", "sat", "the cat", " sat"),
        ("the cat \n", "sat", "the cat", " \nsat"),
        ("", "sat", None, "sat"),
        ("  ", "sat", None, "  sat"),
    ],
)
def test_spaces_at_the_end_of_a_context_belong_to_the_choice(
    encoder: Tokenizer, context: str, choice: str, before: str | None, scored: str
) -> None:
    found = encode_pair(encoder, context, choice)
    expected = [encoder.end_of_document] if before is None else encoder.encode(before)
    assert found == (expected, encoder.encode(scored))


@pytest.mark.parametrize(("choice", "rest"), [("end", ""), ("end to one", " to one")])
def test_a_word_that_goes_on_is_divided_by_the_number_of_the_contexts_tokens(
    encoder: Tokenizer, choice: str, rest: str
) -> None:
    """`attend` is a token, `att` is none; the model reads the context as it is encoded alone."""
    both, att = encoder.encode(" attend"), encoder.encode(" att")
    assert both != att
    skipped = len(att) - len(both)
    assert encode_pair(encoder, "heads att", choice) == (encoder.encode("heads att"), encoder.encode(rest)[skipped:])


def test_pairs_are_divided_as_lm_eval_divides_them(encoder: Tokenizer) -> None:
    """With text in which words often go on from the context to the choice."""
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]

    class Theirs:
        backend = "causal"
        tok_encode = staticmethod(encoder.encode)

    parts = ["the", " cat", " att", "end", "s", " ", "\n", "hea", "ds", " wh", "ile", "\u00a0", "é", "."]
    draw, unlike = random.Random(5), 0
    for _ in range(300):
        context, choice = ("".join(draw.choices(parts, k=draw.randrange(1, 5))) for _ in range(2))
        if context.strip():
            theirs = TemplateLM._encode_pair(Theirs(), context, choice)
            assert encode_pair(encoder, context, choice) == theirs
            unlike += encoder.encode(context + choice)[: len(theirs[0])] != theirs[0]
    assert unlike > 5, "hardly a word goes on"


def test_a_choice_without_a_token_of_its_own_is_an_error(tmp_path: Path, encoder: Tokenizer) -> None:
    path = written(tmp_path, GOOD, {"context": "heads att", "choices": [" one", "end"], "answer": 0})
    with pytest.raises(UserError) as caught:
        encode_task("docs", path, encoder, 16)
    assert str(caught.value) == f"{path}: line 2: choice 1 has no token of its own: separate it by a space"


def test_long_contexts_lose_their_beginning_and_are_counted(tmp_path: Path, encoder: Tokenizer) -> None:
    sizes = (3, 8, 9, 30)  # of a model that reads 8 tokens, which predict 8 others
    lines = [{"context": "the" + " cat" * (size - 1), "choices": [" sat", " on"], "answer": 0} for size in sizes]
    task = encode_task("docs", written(tmp_path, *lines), encoder, 8)
    the, cat, *ends = (encoder.encode(word) for word in ("the", " cat", " sat", " on"))
    assert [len(end) for end in ends] == [3, 1]
    wholes = [[*the, *cat * (size - 1)] for size in sizes]
    assert [row.tokens for row in task.rows] == [(whole + end)[-9:] for whole in wholes for end in ends]
    assert [row.scored for row in task.rows] == [3, 1] * 4
    assert (task.name, task.cut, len(task.items)) == ("docs", sum(len(whole) + 3 > 9 for whole in wholes), 4)
    assert 0 < task.cut < 4


def test_a_choice_that_the_model_cannot_read_is_an_error(tmp_path: Path, encoder: Tokenizer) -> None:
    path = written(tmp_path, {"context": "the", "choices": [" cat" * 8, " cat" * 9], "answer": 0})
    with pytest.raises(UserError) as caught:
        encode_task("docs", path, encoder, 8)
    assert str(caught.value) == f"{path}: line 1: choice 1 has 9 tokens; at most data.sequence_length (8)"
