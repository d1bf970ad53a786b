"""Layouts equal one process of plain torch, step by step: what benchmarks/parity.py measures, and what only pipelines do."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import parity
from benchmarks.parity import LAYOUTS, LIMITS, Layout, Row, Step, compare, load, measure, one_process, train_rank
from configs.schema import Config
from data_pipeline.read.dataset import TokenDataset
from model.decoder import DecoderLM
from model.initialization import init_weights
from tests.helpers import free_port, losses_of, run_ranks

STEPS = 4
RATES = (1e-4, 2e-4, 3e-4, 3e-4)  # three steps of warmup, then the cosine's first
SPARED = ("query_embedding", "key_embedding", "value_embedding", "sink")  # by weight decay, beside vectors
ALONE = {precision: Layout(1, ("backend=fsdp",), precision) for precision in LIMITS}
CORE = [
    "ZeRO 3 × 2, offload, recompute",
    "ZeRO 3 × 2, bf16",
    "PP 2, by time",
    "PP 2, ZeRO 0",
    "TP 2 × ZeRO 3 × 2, SP",
]
ON_FOUR = ["TP 2 × PP 2, SP"]


def reference(config: Config, term: bool = False) -> list[Step]:
    """Plain torch, 8 samples at once; with `term`, 10 times the mean square of each block's output is part of the loss.

    In bf16, the model is a bf16 copy of the fp32 weights at each step, and so are its gradients.
    """
    model, copy = DecoderLM(config.model), DecoderLM(config.model)
    copy = copy.bfloat16() if config.training.precision == "bf16" else copy
    init_weights(model, config.run.seed)
    squares: list[Tensor] = []
    for block in copy.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: squares.append(10 * out.float().square().mean()))
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(SPARED)]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(SPARED)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    data = TokenDataset(config.data.parts[0].path, "train", 32, config.run.seed)
    data.prepare_range(0, 8 * STEPS)
    steps = []
    for step in range(STEPS):
        copy.load_state_dict(model.state_dict())
        samples = torch.stack([torch.from_numpy(data.sample(number)) for number in range(8 * step, 8 * step + 8)])
        loss = losses_of(copy, samples[:, :-1], samples[:, 1:]).mean()
        loss = loss + torch.stack(squares).sum() if term else loss
        squares.clear()
        copy.zero_grad()
        loss.backward()
        for parameter, copied in zip(model.parameters(), copy.parameters(), strict=True):
            assert copied.grad is not None
            parameter.grad = copied.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
        steps.append(Step(loss.item(), norm.item()))
    return steps


@functools.cache
def expected_steps(data: Path, precision: str, variant: str, term: bool) -> list[Step]:
    with tempfile.TemporaryDirectory() as folder:
        return reference(load(data, Path(folder), STEPS, variant, ALONE[precision]), term)


def trained(layout: Layout, data: Path, cases: Sequence[tuple[str, bool]]) -> list[list[Step]]:
    """The steps of every case (variant, with the test term) on forked ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(train_rank, layout.ranks, free_port(), layout, data, Path(folder), STEPS, cases)
        return [[Step(*step) for step in reports] for reports in json.loads(Path(folder, "found.json").read_text())]


@pytest.mark.parametrize("name", [*CORE, *(pytest.param(name, marks=pytest.mark.thorough) for name in ON_FOUR)])
def test_a_layout_equals_one_process(prepared: Path, name: str) -> None:
    layout = LAYOUTS[name]
    cases = [("mha", False)] * (name == CORE[0]) + [("mhe_add", True)]  # engines know no variant
    for case, found in zip(cases, trained(layout, prepared, cases), strict=True):
        loss, grad_norm = compare(found, expected_steps(prepared, layout.precision, *case))
        limits = (1e-3, 2e-2) if layout.precision == "bf16" else (1e-6, 2e-6)
        assert loss < limits[0], (case, loss)
        assert grad_norm < limits[1], (case, grad_norm)


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
    expected = reference(load(prepared, tmp_path, STEPS, "mhe_add", Layout(1, of_model)))
    (found,) = trained(Layout(ranks, ("pipeline=2", *settings)), prepared, [("mhe_add", False)])
    loss, grad_norm = compare(found, expected)
    assert loss < 1e-6, (found, expected)
    assert grad_norm < 2e-6, (found, expected)


MIXED = "[mhe_add, mla, diff_v2, tpa]"
SWITCHES = (
    *("model.query_rank=6", "model.key_rank=2", "model.value_rank=2", "model.latent_dim=16", "model.rope_dim=4"),
    *("model.position=rope", "model.output_gate=head", "model.sliding_window=7", "model.attention_sinks=true"),
)
ENGINES = {
    "pipeline by time": ("pipeline=2", "pipeline_balance=time"),
    "FSDP, tensor, recompute": ("backend=fsdp", "tensor=2", "sequence=true", "training.recompute_activations=true"),
    "ZeRO 3": ("zero_stage=3",),
}


@pytest.mark.parametrize("name", ENGINES)
def test_layers_of_other_attention_with_switches(tmp_path: Path, prepared: Path, name: str) -> None:
    expected = reference(load(prepared, tmp_path, STEPS, MIXED, Layout(1, SWITCHES)))
    (found,) = trained(Layout(2, (*ENGINES[name], *SWITCHES)), prepared, [(MIXED, False)])
    loss, grad_norm = compare(found, expected)
    assert loss < 1e-6, (found, expected)
    assert grad_norm < 2e-6, (found, expected)


def test_the_test_term_is_part_of_loss_and_gradient(prepared: Path) -> None:
    """Else rows with it would be equal for want of it."""
    plain, term = (expected_steps(prepared, "fp32", "mhe_add", wanted) for wanted in (False, True))
    assert all(with_term.loss > without.loss + 1e-3 for without, with_term in zip(plain, term, strict=True))
    assert all(abs(with_term.grad_norm / without.grad_norm - 1) > 1e-3 for without, with_term in zip(plain, term, strict=True))


@pytest.mark.parametrize(("precision", "term"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_the_benchmark_has_the_same_reference(tmp_path: Path, prepared: Path, precision: str, term: bool) -> None:
    config = load(prepared, tmp_path, STEPS, "mhe_add", ALONE[precision])
    assert max(compare(one_process(config, term), expected_steps(prepared, precision, "mhe_add", term))) < 1e-7


def test_the_benchmark_measures_rows(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forked(work: Callable[..., None], ranks: int, *arguments: Any, seconds: float) -> None:
        run_ranks(work, ranks, free_port(), *arguments, seconds=seconds)

    monkeypatch.setattr(parity, "run_ranks", forked)
    rows = list(measure(["FSDP 2", "PP 2, bf16"], ["mha", "mhe_add"], prepared, steps=2))
    cases = [("mha", False), ("mhe_add", False), ("mhe_add", True)]
    assert [(row.layout, row.variant, row.term) for row in rows] == [
        (layout, *case) for layout in ("FSDP 2", "PP 2, bf16") for case in cases
    ]
    for row in rows:
        assert row.equal, row


def test_differences_are_seen() -> None:
    expected = [Step(2.0, 1.0), Step(1.0, 4.0)]
    loss, grad_norm = compare([Step(2.0, 1.0), Step(1.0 + 1e-5, 4.0 - 4e-5)], expected)
    assert (loss, grad_norm) == (pytest.approx(1e-5), pytest.approx(1e-5))
    assert not Row("PP 2", 2, "fp32", "mha", False, 2, loss, 0.0).equal
    assert not Row("PP 2", 2, "fp32", "mha", False, 2, 0.0, grad_norm).equal
    assert Row("PP 2", 2, "fp32", "mha", False, 2, 5e-7, 5e-7).equal
