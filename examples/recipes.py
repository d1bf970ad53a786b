"""Tasks that finetune_classification.py knows: where the data is, which columns hold text, what is measured.

All of GLUE (arXiv 1804.07461) except its diagnostic set `ax`, which has no training part. Of SuperGLUE (arXiv 1905.00537) the
tasks that choose a label: not `record`, which asks for an entity of the text, nor the diagnostics `axb` and `axg`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    dataset: str  # name on the hub
    name: str  # of its configuration
    columns: tuple[str, ...]  # in the order in which the model reads them; the last is never truncated
    labels: tuple[str, ...]  # label 0, 1, …; none: a number is predicted
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)


GLUE, SUPERGLUE, SQUAD = "nyu-mll/glue", "aps/super_glue", "rajpurkar/squad"
PAIR, PREMISE = ("sentence1", "sentence2"), ("premise", "hypothesis")
ENTAILED, BINARY = ("entailment", "not_entailment"), ("False", "True")
THREE = ("entailment", "neutral", "contradiction")
MATCHED = ("validation_matched", "validation_mismatched")


def _superglue(name: str, columns: tuple[str, ...], labels: tuple[str, ...], *metrics: str) -> Recipe:
    return Recipe(SUPERGLUE, name, columns, labels, metrics or ("accuracy",))


TASKS = {
    "cola": Recipe(GLUE, "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Recipe(GLUE, "sst2", ("sentence",), ("negative", "positive")),
    "mrpc": Recipe(GLUE, "mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Recipe(GLUE, "stsb", PAIR, (), ("pearson", "spearman")),
    "qqp": Recipe(GLUE, "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": Recipe(GLUE, "mnli", PREMISE, THREE, validation=MATCHED),
    "qnli": Recipe(GLUE, "qnli", ("sentence", "question"), ENTAILED),
    "rte": Recipe(GLUE, "rte", PAIR, ENTAILED),
    "wnli": Recipe(GLUE, "wnli", PAIR, ("not_entailment", "entailment")),
    "boolq": _superglue("boolq", ("passage", "question"), BINARY),
    "cb": _superglue("cb", PREMISE, ("entailment", "contradiction", "neutral"), "accuracy", "macro_f1"),
    "copa": _superglue("copa", ("premise", "question", "choice1", "choice2"), ("choice1", "choice2")),
    "multirc": _superglue("multirc", ("paragraph", "question", "answer"), BINARY, "f1", "exact_questions"),
    "superglue_rte": _superglue("rte", PREMISE, ENTAILED),
    "wic": _superglue("wic", ("sentence1", "sentence2", "word"), BINARY),
    "wsc": _superglue("wsc", ("text", "span1_text", "span2_text"), BINARY),
    "squad": Recipe(SQUAD, "plain_text", ("context", "question"), ()),
}


def score(recipe: Recipe, predicted_B: np.ndarray, true_B: np.ndarray, rows: Rows) -> dict[str, float]:
    """The task's metrics; `predicted_B` and `true_B` are labels, or numbers where the recipe has no labels."""
    return {metric: float(METRICS[metric](predicted_B, true_B, rows)) for metric in recipe.metrics}


def _exact_questions(predicted_B: np.ndarray, true_B: np.ndarray, rows: Rows) -> float:
    """Share of MultiRC's questions for which every answer is classified correctly."""
    right: dict[tuple[str, str], bool] = defaultdict(lambda: True)
    for row, predicted, true in zip(rows, predicted_B, true_B, strict=True):
        right[row["paragraph"], row["question"]] &= bool(predicted == true)
    return sum(right.values()) / len(right)


def _sklearn(name: str, **options: Any) -> Callable[[np.ndarray, np.ndarray, Rows], float]:
    def measure(predicted_B: np.ndarray, true_B: np.ndarray, rows: Rows) -> float:
        from sklearn import metrics

        return getattr(metrics, name)(true_B, predicted_B, **options)

    return measure


def _scipy(name: str) -> Callable[[np.ndarray, np.ndarray, Rows], float]:
    """A correlation: nan where one side is constant."""

    def measure(predicted_B: np.ndarray, true_B: np.ndarray, rows: Rows) -> float:
        from scipy import stats

        return getattr(stats, name)(predicted_B, true_B).statistic

    return measure


METRICS = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0),
    "macro_f1": _sklearn("f1_score", average="macro", zero_division=0),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _scipy("pearsonr"),
    "spearman": _scipy("spearmanr"),
    "exact_questions": _exact_questions,
}
