"""Every layout against one process, step by step: `python benchmarks/parity.py --json parity.json`.

One process trains the unsharded model with plain torch: AdamW, clipping, a loop. Each layout trains it on the same samples with
the backend, loader and schedule of launch/pretrain.py, on processes of this machine. Reported is the largest difference of
loss and of gradient norm over all steps, relative to one process. A row with `term` adds a loss term in every block (10 times
the mean square of its output), which must reach the total and the gradient wherever the block runs.

fp32 rows must agree within 1e-6 (loss) and 2e-6 (gradient norm), bf16 rows within 1e-3 and 2e-2; exit status 1 if one does not.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ranks import names_among, one_of, run_ranks
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, ModelConfig
from launch.common import output_file, run_command, whole_number
from model.block import Block
from model.build import build_model
from model.initialization import init_weights
from model.layers import Layers

VARIANTS = ("mha", "mhe_add", "mhe_mul")
TERM, TERM_SCALE = "mean_square", 10.0
LONGEST = 300  # seconds for one layout
LIMITS = {"fp32": (1e-6, 2e-6), "bf16": (1e-3, 2e-2)}
SETTINGS = """
run: {{folder: {folder}}}
data: {{path: {data}, sequence_length: 32}}
model: {{hidden_size: 32, num_layers: 4, num_heads: 16, head_dim: 8}}
training: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 1}}
optimizer: {{lr: 3e-4}}
schedule: {{warmup_steps: {warmup}}}
logging: {{tensorboard: false}}
"""


@dataclass(frozen=True)
class Layout:
    """A layout of a run on `ranks` processes; settings without a section belong to `parallel`. One process has `model`, too."""

    ranks: int
    settings: tuple[str, ...]
    precision: str = "fp32"
    model: tuple[str, ...] = ()


def _deepspeed(ranks: int, stage: int, *settings: str) -> Layout:
    return Layout(ranks, (f"zero_stage={stage}", *settings))


WIDE = ("model.hidden_size=256", "model.head_dim=16", "model.vocab_size=16384")  # 4 million values in the token embedding
LAYOUTS = {
    **{f"ZeRO {stage} × {ranks}": _deepspeed(ranks, stage) for stage in range(4) for ranks in (2, 4)},
    "ZeRO 1 × 2, offload": _deepspeed(2, 1, "cpu_offload=true"),
    "ZeRO 3 × 2, offload, recompute": _deepspeed(2, 3, "cpu_offload=true", "training.recompute_activations=true"),
    "PP 2": _deepspeed(2, 1, "pipeline=2"),
    "PP 2, by time": _deepspeed(2, 1, "pipeline=2", "pipeline_balance=time"),
    "PP 2, ZeRO 0": _deepspeed(2, 0, "pipeline=2"),
    "PP 2 × DP 2": _deepspeed(4, 1, "pipeline=2"),
    "TP 2 × PP 2": _deepspeed(4, 1, "tensor=2", "pipeline=2"),
    "TP 2 × PP 2, SP": _deepspeed(4, 1, "tensor=2", "pipeline=2", "sequence=true"),
    "TP 2 × DP 2": _deepspeed(4, 1, "tensor=2"),
    "TP 2 × ZeRO 3 × 2, SP": _deepspeed(4, 3, "tensor=2", "sequence=true"),
    "FSDP 2": Layout(2, ("backend=fsdp",)),
    "FSDP 4": Layout(4, ("backend=fsdp",)),
    "FSDP 2 × 2 replicas": Layout(4, ("backend=fsdp", "replicate=2")),
    "FSDP 2 × TP 2": Layout(4, ("backend=fsdp", "tensor=2", "sequence=true")),
    "ZeRO 0 × 2, wide": Layout(2, ("zero_stage=0",), model=WIDE),
    "ZeRO 2 × 2, wide": Layout(2, ("zero_stage=2",), model=WIDE),
    "FSDP 2, wide": Layout(2, ("backend=fsdp",), model=WIDE),
    "ZeRO 1 × 2, bf16": Layout(2, ("zero_stage=1",), "bf16"),
    "ZeRO 3 × 2, bf16": Layout(2, ("zero_stage=3",), "bf16"),
    "PP 2, bf16": Layout(2, ("zero_stage=1", "pipeline=2"), "bf16"),
    "FSDP 2, bf16": Layout(2, ("backend=fsdp",), "bf16"),
}


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Row:
    """A layout and a variant: the largest relative differences from one process over all steps."""

    layout: str
    ranks: int
    precision: str
    variant: str
    term: bool
    steps: int
    loss: float
    grad_norm: float

    @property
    def equal(self) -> bool:
        loss, grad_norm = LIMITS[self.precision]
        return self.loss <= loss and self.grad_norm <= grad_norm


def load(data: Path, folder: Path, steps: int, variant: str, layout: Layout) -> Config:
    """The resolved configuration of one run."""
    path = folder / f"parity_{os.getpid()}.yaml"
    path.write_text(SETTINGS.format(folder=folder / "run", data=data, steps=steps, warmup=min(5, steps - 1)), encoding="utf-8")
    prefixed = (text if "." in text or text.startswith("backend=") else f"parallel.{text}" for text in layout.settings)
    overrides = [
        f"--model.attention={variant}",
        f"--training.precision={layout.precision}",
        *(f"--{text}" for text in (*prefixed, *layout.model)),
    ]
    return load_config(path, overrides, world_size=layout.ranks).resolved(_vocab_size(data))


def _vocab_size(data: Path) -> int:
    from data_pipeline.read.manifest import read_manifest

    return read_manifest(data).vocab_size


def one_process(config: Config, term: bool) -> list[Step]:
    """Plain torch, the full batch at once. bf16 as in DeepSpeed and FSDP: a bf16 copy of fp32 weights at each step."""
    from data_pipeline.mix.mixture import training_samples
    from pretrain.optim.groups import build_optimizer
    from pretrain.optim.schedule import learning_rate

    model = build_model(config.model)
    init_weights(model, config.run.seed)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    data = training_samples(config)
    squares: list[Tensor] = []
    compute = build_model(config.model).bfloat16() if config.training.precision == "bf16" else model
    for block in compute.block_modules():
        block.register_forward_hook(lambda _module, _inputs, out: squares.append(out.float().square().mean()))
    batch, steps = config.training.global_batch_size, []
    for step in range(config.training.steps):
        if compute is not model:
            compute.load_state_dict(model.state_dict())
        data.prepare_range(step * batch, (step + 1) * batch)
        samples = torch.stack([torch.from_numpy(data.sample(number)) for number in range(step * batch, (step + 1) * batch)])
        loss = compute.layers.losses(compute(samples[:, :-1]), samples[:, 1:]).mean()
        if term:
            loss = loss + TERM_SCALE * torch.stack(squares).sum()
        squares.clear()
        loss.backward()
        if compute is not model:
            for master, parameter in zip(model.parameters(), compute.parameters(), strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = clip(model, config.training.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(loss.item(), norm))
    return steps


def clip(model: nn.Module, limit: float) -> float:
    """torch.nn.utils.clip_grad_norm_ with the norm in float64: on CPUs torch's own is too small for large tensors."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


@contextmanager
def block_terms(wanted: bool) -> Iterator[None]:
    """Inside, every block adds the test term to the loss through the auxiliary losses of its layers, if `wanted`."""
    build, forward = Block.__init__, Block.forward

    def build_with_layers(self: Block, config: ModelConfig, layers: Layers, number: int = 0) -> None:
        build(self, config, layers, number)
        self.layers = layers  # type: ignore[assignment]

    def forward_with_term(self: Any, *arguments: Any, **options: Any) -> Tensor:
        out_SBH = forward(self, *arguments, **options)
        term = TERM_SCALE * out_SBH.float().square().mean()
        if self.layers.sequence:  # the mean over all tokens; this rank has a shard of them
            from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

            term = reduce_from_tensor_model_parallel_region(term / self.layers.size)
        return self.layers.auxiliary.add(out_SBH, TERM, term)

    if wanted:
        Block.__init__, Block.forward = build_with_layers, forward_with_term  # type: ignore[method-assign]
    try:
        yield
    finally:
        Block.__init__, Block.forward = build, forward  # type: ignore[method-assign]


def train_rank(
    rank: int, port: int, layout: Layout, data: Path, folder: Path, steps: int, cases: Sequence[tuple[str, bool]]
) -> None:
    """One process of a layout: trains every case in turn; the first process writes the results."""
    from data_pipeline.mix.mixture import training_samples
    from data_pipeline.read.loader import TrainLoader
    from pretrain.build import make_backend
    from pretrain.distributed.collectives import mean_over_ranks
    from pretrain.optim.schedule import learning_rate

    parallel = load(data, folder, steps, VARIANTS[0], layout).parallel
    with one_of(layout.ranks, rank, port, parallel) as opened:
        found = []
        for variant, term in cases:
            config = load(data, folder, steps, variant, layout)
            training = config.training
            dataset = training_samples(config)
            sizes = training.global_batch_size, training.micro_batch_size, opened.coordinate("data"), opened.size("data")
            with block_terms(term), TrainLoader(dataset, *sizes, steps=steps) as loader:
                backend = make_backend(config, opened)
                reports = []
                for step in range(steps):
                    result = backend.train_step(loader.step(step), learning_rate(step, config))
                    (loss,) = mean_over_ranks([result.loss], opened.device)
                    reports.append([loss, result.grad_norm])
            found.append(reports)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def run_layout(layout: Layout, data: Path, steps: int, cases: Sequence[tuple[str, bool]]) -> list[list[Step]]:
    """The steps of every case (variant, with the test term), from new processes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(train_rank, layout.ranks, layout, data, Path(folder), steps, cases, seconds=LONGEST)
        return [[Step(*step) for step in reports] for reports in json.loads(Path(folder, "found.json").read_text())]


def compare(found: Sequence[Step], expected: Sequence[Step]) -> tuple[float, float]:
    """The largest relative differences of loss and gradient norm."""
    pairs = list(zip(found, expected, strict=True))
    loss = max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs)
    return loss, max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in pairs)


def measure(
    names: Sequence[str], variants: Sequence[str], data: Path, steps: int, terms: Sequence[bool] = (False, True)
) -> Iterator[Row]:
    """Yield rows of the named layouts without and with the test term; the last variant has it."""
    cases = [(variant, False) for variant in variants if False in terms]
    cases += [(variants[-1], True)] if True in terms else []
    expected: dict[tuple[object, ...], list[Step]] = {}
    torch.set_num_threads(1)
    for name in names:
        layout = LAYOUTS[name]
        for case in cases:
            if (*case, layout.precision, layout.model) not in expected:
                with tempfile.TemporaryDirectory() as folder:
                    alone = Layout(1, ("backend=fsdp",), layout.precision, layout.model)
                    steps_alone = one_process(load(data, Path(folder), steps, case[0], alone), case[1])
                    expected[*case, layout.precision, layout.model] = steps_alone
        for case, found in zip(cases, run_layout(layout, data, steps, cases), strict=True):
            differences = compare(found, expected[*case, layout.precision, layout.model])
            yield Row(name, layout.ranks, layout.precision, *case, steps, *differences)


def line(row: Row) -> str:
    variant = row.variant + (" + term" if row.term else "")
    verdict = "equal" if row.equal else "DIFFERENT"
    return (
        f"{row.layout:<30} {row.ranks:>5}  {row.precision:<5} {variant:<16} {row.loss:>9.1e} {row.grad_norm:>10.1e}  {verdict}"
    )


HEADER = f"{'layout':<30} {'ranks':>5}  {'':<5} {'attention':<16} {'Δ loss':>9} {'Δ norm':>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = "; ".join(LAYOUTS)
    parser.add_argument(
        "--layouts", type=names_among(LAYOUTS), default=list(LAYOUTS), metavar="A;B", help=f"default: all: {every}"
    )
    parser.add_argument("--steps", type=whole_number(1), default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared text; default: the standard library, freshly prepared"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    from data_pipeline.prepare.prepare import PrepareOptions, prepare

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data
        if data is None:
            data = Path(scratch, "data")
            prepare(PrepareOptions(inputs=("stdlib",), output=data, vocab_size=512))
        print(HEADER, flush=True)
        for row in measure(arguments.layouts, VARIANTS, data, arguments.steps):
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        text = ",\n".join(json.dumps(asdict(row)) for row in rows)
        arguments.json.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    different = [row for row in rows if not row.equal]
    if different:
        raise UserError(f"{len(different)} of {len(rows)} rows differ from one process")


if __name__ == "__main__":
    run_command(main)
