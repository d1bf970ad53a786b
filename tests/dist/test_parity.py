"""Layouts equal one process of plain torch, step by step: the core of benchmarks/parity.py, and what only pipelines do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.parity import LAYOUTS, Layout, Row, Step, compare, load, measure, one_process, run_layout

STEPS = 6
CORE = [
    "ZeRO 3 × 2, offload, recompute",
    "ZeRO 3 × 2, bf16",
    "PP 2, by time",
    "PP 2, ZeRO 0",
    "TP 2 × PP 2, SP",
    "TP 2 × ZeRO 3 × 2, SP",
]


@pytest.mark.parametrize("name", CORE)
def test_a_layout_equals_one_process(prepared: Path, name: str) -> None:
    variants = ["mha", "mhe_add"] if LAYOUTS[name].ranks == 2 else ["mhe_add"]  # two cores run four ranks slowly
    rows = list(measure([name], variants, prepared, STEPS))
    assert [(row.variant, row.term) for row in rows] == [*((variant, False) for variant in variants), ("mhe_add", True)]
    for row in rows:
        assert row.equal, row


# What a stage must know beside the hidden states, and what ties stages together.
PIPELINES = {
    "rope, untied, documents": (
        "model.position=rope",
        "model.tie_embeddings=false",
        "model.attend_across_documents=false",
        "model.end_of_document=0",
    ),
    "alibi, tied, recompute": ("model.position=alibi", "training.recompute_activations=true"),
    "documents, tensor": (
        "tensor=2",
        "model.attend_across_documents=false",
        "model.end_of_document=0",
        "model.activation=swiglu",
        "model.norm=rmsnorm",
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_see_what_one_process_sees(tmp_path: Path, prepared: Path, name: str) -> None:
    settings = PIPELINES[name]
    of_model = tuple(text for text in settings if "." in text)
    ranks = 4 if "tensor=2" in settings else 2
    expected = one_process(load(prepared, tmp_path, STEPS, "mhe_add", Layout(1, of_model)), term=False)
    (found,) = run_layout(Layout(ranks, ("pipeline=2", *settings)), prepared, STEPS, [("mhe_add", False)])
    loss, grad_norm = compare(found, expected)
    assert loss < 1e-6, (found, expected)
    assert grad_norm < 2e-6, (found, expected)


def test_the_test_term_is_part_of_loss_and_gradient(prepared: Path) -> None:
    """Else rows with it would be equal for want of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load(prepared, Path(folder), 2, "mhe_add", LAYOUTS["FSDP 2"])
        plain, term = (one_process(config, wanted) for wanted in (False, True))
    assert all(with_term.loss > without.loss + 1e-3 for without, with_term in zip(plain, term, strict=True))
    assert all(abs(with_term.grad_norm / without.grad_norm - 1) > 1e-3 for without, with_term in zip(plain, term, strict=True))


def test_differences_are_seen() -> None:
    expected = [Step(2.0, 1.0), Step(1.0, 4.0)]
    loss, grad_norm = compare([Step(2.0, 1.0), Step(1.0 + 1e-5, 4.0 - 4e-5)], expected)
    assert (loss, grad_norm) == (pytest.approx(1e-5), pytest.approx(1e-5))
    assert not Row("PP 2", 2, "fp32", "mha", False, 2, loss, 0.0).equal
    assert not Row("PP 2", 2, "fp32", "mha", False, 2, 0.0, grad_norm).equal
    assert Row("PP 2", 2, "fp32", "mha", False, 2, 5e-7, 5e-7).equal
