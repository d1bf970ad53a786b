"""SQuAD as spans of tokens: windows of a context after the question, the span with the best logits, exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.common import load

LONGEST_ANSWER = 30  # tokens
OVERLAP = 0.25  # of the context's tokens in neighbouring windows
NO_ANSWER = 0  # the first position, the target of a window without the answer


@dataclass(frozen=True)
class Window:
    """Question, line break and a part of the context, as ids."""

    row: int  # of the data set
    first: int  # position of the context's first token
    ids: list[int]
    offsets: list[tuple[int, int]]  # characters of the context of each token from `first` on


def span_class(folder: Path, trust_remote_code: bool) -> Any:
    """A class whose `from_pretrained` puts a span head on the folder's decoder: transformers' own on the architecture's base.

    Not AutoModelForQuestionAnswering: there is none for gpt_bigcode, starcoder2 and our own class, and llama's looks for the
    decoder under other names than a causal model saves it, so it would start from random weights.
    """
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_layers import GenericForQuestionAnswering

    config = load(folder, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        decoder = type(AutoModel.from_config(config, trust_remote_code=trust_remote_code))
    base: Any = next(parent for parent in decoder.__mro__ if parent.__name__.endswith("PreTrainedModel"))
    AutoModel.register(base.config_class, decoder, exist_ok=True)  # each Auto class re-imports code from a folder
    name = f"{decoder.__name__.removesuffix('Model')}ForQuestionAnswering"  # transformers finds the loss by this name
    return type(
        name, (GenericForQuestionAnswering, base), {"base_model_prefix": base.base_model_prefix, "__module__": __name__}
    )


def make_windows(tokenizer: Any, rows: Sequence[dict[str, Any]], length: int) -> list[Window]:
    """Every row as one or more windows of at most `length` tokens; the question keeps at most half of them."""
    windows = []
    for number, row in enumerate(rows):
        question = tokenizer(row["question"].strip() + "\n")["input_ids"][-(length // 2) :]
        context = tokenizer(row["context"], return_offsets_mapping=True)
        ids, offsets = context["input_ids"], context["offset_mapping"]
        room = length - len(question)
        step = max(1, room - int(OVERLAP * room))
        for start in range(0, max(1, len(ids) - room + step), step):
            part = slice(start, start + room)
            windows.append(Window(number, len(question), question + ids[part], offsets[part]))
    return windows


def answer_positions(window: Window, answers: dict[str, list[Any]]) -> tuple[int, int]:
    """First and last token of the first answer; NO_ANSWER twice if the window does not hold all of it."""
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    first = next((n for n, (a, b) in enumerate(window.offsets) if a <= start < b), None)
    last = next((n for n, (a, b) in enumerate(window.offsets) if a < end <= b), None)
    if first is None or last is None:
        return NO_ANSWER, NO_ANSWER
    return window.first + first, window.first + last


def best_answers(
    windows: Sequence[Window], start_WS: np.ndarray, end_WS: np.ndarray, rows: Sequence[dict[str, Any]]
) -> list[str]:
    """For each row, the text of the span with the largest sum of logits in any of its windows."""
    best: dict[int, tuple[float, str]] = {}
    for window, start_S, end_S in zip(windows, start_WS, end_WS, strict=True):
        inside = slice(window.first, window.first + len(window.offsets))
        sum_SS = start_S[inside, None] + end_S[None, inside]
        order_SS = np.subtract.outer(np.arange(len(sum_SS)), np.arange(len(sum_SS)))  # start - end
        sum_SS = np.where((order_SS <= 0) & (order_SS > -LONGEST_ANSWER), sum_SS, -np.inf)
        first, last = np.unravel_index(int(sum_SS.argmax()), sum_SS.shape)
        value = float(sum_SS[first, last])
        if window.row not in best or value > best[window.row][0]:
            text = rows[window.row]["context"][window.offsets[first][0] : window.offsets[last][1]]
            best[window.row] = value, text.strip()
    return [best[number][1] for number in range(len(rows))]


def squad_scores(predicted: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """SQuAD's own measures (arXiv 1606.05250): the best over a row's answers, averaged over rows, from 0 to 1."""
    answers = [row["answers"]["text"] for row in rows]
    exact = [max(normal(text) == normal(true) for true in all_true) for text, all_true in zip(predicted, answers, strict=True)]
    f1 = [max(word_f1(text, true) for true in all_true) for text, all_true in zip(predicted, answers, strict=True)]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def normal(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def word_f1(predicted: str, true: str) -> float:
    found, wanted = normal(predicted), normal(true)
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return float(found == wanted)
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
