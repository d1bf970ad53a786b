"""A step that is skipped leaves no trace, on any engine: what one rank alone has seen keeps all ranks from stepping."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.objectives.base import WeightedSum
from tests.helpers import free_port, launched_as, losses_of, run_ranks

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout
    from tests.helpers import Opener

SAMPLES, MICRO, VOCABULARY = 8, 2, 36
RATES = (1e-4, 2e-4, 3e-4, 2e-4, 1e-4)  # by the number of the step, also after one that is skipped
REFUSED = 3  # the step that is not accepted although its numbers are finite
SPARED = ("query_embedding", "key_embedding", "value_embedding")  # by weight decay, beside vectors
FSDP = {"backend": "fsdp"}


@dataclass(frozen=True)
class Case:
    """One layout and what happens on one of its ranks: `fault` of step `bad` in micro-batch `micro`."""

    parallel: dict[str, Any]
    fault: str
    bad: int = 1
    micro: int = 0
    precision: str = "fp32"
    clipping: float = 1.0


CASES: dict[int, dict[str, Case]] = {
    1: {
        "ZeRO 0": Case({"zero_stage": 0}, "gradient", micro=3),
        "ZeRO 2, bf16, offload": Case({"zero_stage": 2, "cpu_offload": True}, "gradient", precision="bf16"),
        "ZeRO 3, offload": Case({"zero_stage": 3, "cpu_offload": True}, "term", micro=2),
        "FSDP, bf16, offload": Case({**FSDP, "cpu_offload": True}, "gradient", bad=0, precision="bf16"),
    },
    2: {
        "ZeRO 0": Case({"zero_stage": 0}, "term", bad=0),
        "ZeRO 1": Case({"zero_stage": 1}, "gradient", micro=1),
        "ZeRO 1, bf16": Case({"zero_stage": 1}, "loss", bad=0, precision="bf16"),
        "ZeRO 2": Case({"zero_stage": 2}, "loss", micro=1, clipping=0.0),
        "ZeRO 2, bf16": Case({"zero_stage": 2}, "gradient", micro=1, precision="bf16", clipping=0.0),
        "ZeRO 3": Case({"zero_stage": 3}, "gradient", bad=0, micro=1),
        "ZeRO 3, bf16": Case({"zero_stage": 3}, "loss", precision="bf16"),
        "PP 2, ZeRO 0": Case({"pipeline": 2, "zero_stage": 0}, "gradient", bad=0),
        "PP 2, bf16": Case({"pipeline": 2}, "gradient", micro=3, precision="bf16"),
        "TP 2": Case({"tensor": 2, "sequence": True}, "loss", micro=3),
        "FSDP": Case(FSDP, "gradient", micro=1, clipping=0.0),
        "FSDP, TP 2": Case({**FSDP, "tensor": 2, "sequence": True}, "gradient"),
    },
    4: {
        "ZeRO 3, TP 2": Case({"zero_stage": 3, "tensor": 2}, "gradient", micro=1),
        "PP 2 × DP 2": Case({"pipeline": 2}, "loss", micro=1),
        "PP 2 × TP 2, bf16": Case({"pipeline": 2, "tensor": 2}, "term", precision="bf16"),
        "FSDP, 2 replicas": Case({**FSDP, "replicate": 2}, "loss"),
    },
}


def config_of(case: Case) -> Config:
    parallel = dict(case.parallel)
    values = {
        "run": {"folder": "nowhere"},
        "data": {"path": "nowhere", "sequence_length": 12},
        "model": {
            "attention": "mhe_add",
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "head_dim": 4,
            "max_position_embeddings": 12,
        },
        "backend": parallel.pop("backend", "deepspeed"),
        "parallel": parallel,
        "training": {
            "steps": len(RATES),
            "global_batch_size": SAMPLES,
            "micro_batch_size": MICRO,
            "precision": case.precision,
            "gradient_clipping": case.clipping,
        },
        "optimizer": {"lr": 1e-3},
    }
    return Config.model_validate(values).resolved(VOCABULARY)


def tokens_of(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (SAMPLES, 13), generator=torch.Generator().manual_seed(step))


@functools.cache
def reference(precision: str, clipping: float, bad: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step that is taken, by plain torch: all samples at once, one process."""
    config = config_of(Case(FSDP, "none"))
    model, copy = DecoderLM(config.model), DecoderLM(config.model)
    copy = copy.bfloat16() if precision == "bf16" else copy
    init_weights(model, config.run.seed)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(SPARED)]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(SPARED)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    figures = []
    for step, rate in enumerate(RATES):
        if step in (bad, REFUSED):
            continue
        copy.load_state_dict(model.state_dict())
        copy.zero_grad()
        loss = losses_of(copy, tokens_of(step)[:, :-1], tokens_of(step)[:, 1:]).mean()
        loss.backward()
        for parameter, copied in zip(model.parameters(), copy.parameters(), strict=True):
            assert copied.grad is not None
            parameter.grad = copied.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        figures.append((loss.item(), norm.item()))
    return figures


class Fault:
    """Spoils one micro-batch of one rank, by what only that rank knows of."""

    def __init__(self, backend: Any, layout: Layout, case: Case) -> None:
        self.case, self.armed, self.passes = case, False, 0
        at_first_stage = case.fault != "loss"
        self.here = layout.rank == (0 if at_first_stage and layout.size("pipeline") > 1 else layout.world_size - 1)
        if case.fault == "loss":
            self.loss = backend.objective.loss
            backend.objective.loss = self.spoil_loss
            return
        for name, module in backend.module.named_modules():
            if name.endswith("token_embedding"):
                module.register_forward_hook(functools.partial(self.spoil, backend.layers.auxiliary))

    def arm(self, step: int) -> None:
        self.armed, self.passes = step == self.case.bad, 0

    def now(self) -> bool:
        self.passes += 1
        return self.armed and self.here and self.passes == self.case.micro + 1

    def spoil_loss(self, *arguments: Any) -> WeightedSum:
        """An infinite constant: the gradient that follows from it is finite."""
        total = self.loss(*arguments)
        return WeightedSum(total.loss + math.inf, total.weight) if self.now() else total

    def spoil(self, auxiliary: Any, _module: Any, _inputs: Any, out: Any) -> Any:
        if self.case.fault == "term":  # of no gradient, either; all ranks add one
            return auxiliary.add(out, "term", torch.tensor(math.inf if self.now() else 0.0))
        if self.now():  # reaches the gradients of the embeddings only
            out.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), math.nan))
        return out


def snapshot(backend: Any) -> dict[str, Tensor]:
    """All that this rank holds of weights, masters and optimizer."""
    state = backend.state()
    held = {f"{part.kind} {part.name} {part.offset}": part.tensor.clone() for part in state.parts}
    held |= {f"{name} {number}": value.clone() for name, values in state.scalars.items() for number, value in enumerate(values)}
    for name, parameter in backend.module.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter).detach()
        held[f"own {name}"] = (own.to_local() if hasattr(own, "to_local") else own).clone()
    return held


class Asks:
    """Accepts steps whose gradients are finite, unless it `refuses`; notes the norm and the mean of all ranks' losses."""

    def __init__(self, layout: Layout, refuses: bool) -> None:
        self.layout, self.refuses = layout, refuses
        self.asked: list[tuple[float, float]] = []

    def __call__(self, grad_norm: float, loss: Callable[[], float]) -> bool:
        (mean,) = mean_over_ranks([loss()], self.layout.device)
        self.asked.append((grad_norm, mean))
        return math.isfinite(grad_norm) and not self.refuses


def train(opened: Opener, case: Case) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step that was taken; those that were skipped changed nothing on this rank."""
    from pretrain.build import make_backend

    config, figures = config_of(case), []
    with opened(config.parallel) as layout:
        before = snapshot(make_backend(config, layout)) if case.bad == 0 else {}
        backend: Any = make_backend(config, layout)
        fault = Fault(backend, layout, case)
        for step, rate in enumerate(RATES):
            fault.arm(step)
            own_BS = tokens_of(step).chunk(layout.size("data"))[layout.coordinate("data")]
            if step and step in (case.bad, REFUSED):
                before = snapshot(backend)  # not before the first step: it makes the optimizer's state
            batches = [Batch(part[:, :-1], part[:, 1:]) for part in own_BS.split(MICRO)]
            asks = Asks(layout, refuses=step == REFUSED)
            result = backend.train_step(batches, rate, asks)
            (loss,) = mean_over_ranks([result.loss], layout.device)
            assert asks.asked == [(result.grad_norm, pytest.approx(loss, rel=1e-6, nan_ok=True))], (step, asks.asked, result)
            assert result.skipped == (step in (case.bad, REFUSED)), (step, result)
            if not result.skipped:
                figures.append((loss, result.grad_norm))
                continue
            after = snapshot(backend)
            assert after.keys() == before.keys()
            assert [name for name in before if not torch.equal(before[name], after[name])] == []
            assert math.isfinite(result.grad_norm) == (step == REFUSED)
            assert math.isfinite(loss) == (step == REFUSED or case.fault == "gradient"), loss
    return figures


def train_all(rank: int, ranks: int, port: int, folder: Path) -> None:
    with launched_as(rank, ranks, port) as opened:
        found = {name: train(opened, case) for name, case in CASES[ranks].items()}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, ranks: int) -> None:
    run_ranks(train_all, ranks, ranks, free_port(), tmp_path, seconds=250)
    for name, figures in json.loads((tmp_path / "found.json").read_text()).items():
        case = CASES[ranks][name]
        expected = torch.tensor(reference(case.precision, case.clipping, case.bad))
        found = torch.tensor([tuple(step) for step in figures])
        loss, norm = (2e-3, 2e-2) if case.precision == "bf16" else (2e-6, 4e-6)
        torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=loss, atol=0, msg=f"{name}: {found} {expected}")
        torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=norm, atol=0, msg=f"{name}: {found} {expected}")
