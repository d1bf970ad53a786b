"""Does grouping heads help? `python benchmarks/gha_quality.py --json gha_quality.json` trains small models on prose.

Every variant and seed (of initial weights and data order) is trained in these ways, for the same steps and learning rates:

    plain          neither constrained nor pruned
    GHT            heads are grouped and constrained to the end
    GHT-PS         constrained; a vote after step --prune-at, the other heads are pruned, training continues unconstrained
    GHT, random    the same, but random members of each group are kept
    plain, voted   never constrained; grouped by their maps at the vote, pruned, trained further
    plain, random  never constrained; random heads of each layer are kept, trained further

Columns: heads of a layer and parameters of attention at the end; validation loss (nats per token; the same samples for all)
right before pruning, right after it and at the end; perplexity; the final loss minus that of plain, by seeds. ± is the standard
deviation over seeds. Finished runs are kept in FOLDER/results.jsonl; an interrupted benchmark resumes from there.
docs/gha_measured.md explains how to get the text. Further arguments `--section.field=value` change the configuration below.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import contextlib
import gc
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from configs.durable import sync, write_text
from configs.errors import UserError
from configs.load import flat_fields, load_config
from configs.schema import Config
from launch.common import output_file, run_command, whole_number
from model.faults import model_faults
from model.gha.faults import gha_faults

if TYPE_CHECKING:
    from model.gha.voting import Election
    from pretrain.distributed.layout import Layout
    from pretrain.loop.trainer import Trainer

SETTINGS = """
backend: fsdp
run: {{folder: {folder}}}
data: {{path: {data}, sequence_length: 128}}
model: {{hidden_size: 128, num_layers: 4, num_heads: 16, head_dim: 8, position: rope}}
training: {{steps: 600, global_batch_size: 8, micro_batch_size: 8}}
optimizer: {{lr: 3e-3}}
schedule: {{warmup_steps: 50}}
gha: {{stage: vote, feature_map: value, groups: 8, alpha: 0.03, beta: 0.01, vote_batches: 50}}
validation: {{samples: 256}}
checkpoint: {{keep_last: 2}}
logging: {{every_steps: 100, tensorboard: false}}
"""
FIXED = ("run.folder", "run.seed", "model.attention", "gha.stage", "validation.every_steps", "checkpoint.every_steps")
LONGEST = 3600  # seconds for one variant and seed, constrained or not


@dataclass(frozen=True)
class Way:
    """Whether heads are constrained before pruning, and which heads of each layer are kept; None: all."""

    constrained: bool
    keep: Literal["voted", "members", "any"] | None = None


WAYS = {
    "plain": Way(False),
    "GHT": Way(True),
    "GHT-PS": Way(True, "voted"),
    "GHT, random": Way(True, "members"),
    "plain, voted": Way(False, "voted"),
    "plain, random": Way(False, "any"),
}


@dataclass(frozen=True)
class Result:
    """One finished run; losses in nats per token on the fixed validation samples."""

    variant: str
    seed: int
    way: str
    heads: int
    attention_parameters: int
    unpruned_loss: float  # right before pruning
    pruned_loss: float  # right after pruning; the same if no head is pruned
    loss: float  # at the end
    homogeneity: float | None  # of the groups at the vote: mean cosine of a head to its group's centre
    diversity: float | None  # mean cosine of two groups' centres: lower, they differ more
    seconds: float

    @property
    def key(self) -> tuple[str, int, str]:
        return self.variant, self.seed, self.way


def random_election(election: "Election", keep: Literal["members", "any"], seed: int) -> "Election":
    """As many random heads as elected: from each group, with places that small groups leave open filled from all others, or
    from the layer."""
    draw, layers = random.Random(seed), []
    for layer in election.layers:
        order = draw.sample(range(len(layer.labels)), len(layer.labels))
        if keep == "members":
            members = [[head for head in order if layer.labels[head] == group] for group in range(election.groups)]
            first = [head for group in members for head in group[: election.heads_per_group]]
            order = first + [head for head in order if head not in first]
        layers.append(replace(layer, kept=tuple(sorted(order[: len(layer.kept)]))))
    return replace(election, layers=tuple(layers))


class Results:
    """The file of finished runs; processes append complete lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Result]:
        """A line that a killed process left unfinished does not count."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        return [Result(**json.loads(line)) for line in lines if line.endswith("\n")]

    def mend(self) -> None:
        """Drop an unfinished line; nobody may be appending."""
        write_text(self.path, "".join(json.dumps(asdict(result)) + "\n" for result in self.read()))

    def add(self, result: Result) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, (json.dumps(asdict(result)) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        sync(self.path.parent)


def section(config: Config, name: str, **values: object) -> Config:
    return config.model_copy(update={name: getattr(config, name).model_copy(update=values)})


def open_trainer(config: Config, layout: "Layout", folder: Path, checkpoint: Path | None = None) -> "Trainer":
    """A trainer of the run in `folder`, in the state of `checkpoint` or of the run's newest."""
    from pretrain.build import build_trainer, make_resumer

    folder.mkdir(parents=True, exist_ok=True)
    config = section(config, "run", folder=str(folder))
    resumer = make_resumer(config, layout)
    resumer.store.clear_remains()
    return build_trainer(config, layout, resumer.find("auto" if checkpoint is None else str(checkpoint)))


def finish(trainer: "Trainer") -> dict[int, float]:
    """Train to the end; validation losses by step."""
    trainer.run()
    trainer.close()
    lines = (Path(trainer.config.run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["validation/loss"] for line in map(json.loads, lines) if "validation/loss" in line}


def validate(trainer: "Trainer") -> float:
    """The current validation loss."""
    from pretrain.loop.evaluate import evaluate
    from pretrain.loop.hooks import Validation

    (loader,) = trainer.hook(Validation).sets.values()
    result = evaluate(trainer.backend.eval_loss, loader, trainer.layout.device)
    assert result is not None
    return result.loss


def vote(config: Config, layout: "Layout", folder: Path, checkpoint: Path) -> tuple["Election", float, float]:
    """An election of the checkpoint's heads; homogeneity and diversity of its groups on validation samples."""
    from pretrain.grouping.grouping import HeadGrouping
    from pretrain.grouping.vote import hold_election

    trainer = open_trainer(section(config, "gha", stage="vote"), layout, folder, checkpoint)
    election = hold_election(trainer, checkpoint)
    assert election is not None
    validate(trainer)
    grouping = trainer.hook(HeadGrouping)
    figures = grouping.figures(grouping.collect())
    trainer.close()
    return election, float(figures["homogeneity"].mean()), float(figures["diversity"].mean())


def fine_tune(election: "Election", layout: "Layout", folder: Path, checkpoint: Path) -> tuple[Config, float, dict[int, float]]:
    """Prune the heads that are not elected and continue training: the pruned config, its initial loss, and losses by step."""
    from pretrain.checkpoints.folder import read_config
    from pretrain.grouping.prune import prune

    shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was killed
    config = read_config(prune(checkpoint, election, folder))
    trainer = open_trainer(config, layout, folder)
    loss = validate(trainer)
    return config, loss, finish(trainer)


def run_job(rank: int, port: int, config: Config, constrained: bool, ways: Sequence[str], folder: Path) -> None:
    """One process: train a variant and seed, constrained or not, then prune it in those of the `ways` that need it."""
    from benchmarks.ranks import one_of

    own = folder / f"{config.model.attention}-{config.run.seed}-{'constrained' if constrained else 'plain'}"
    own.mkdir(exist_ok=True)
    log = (own / "log.txt").open("a", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), one_of(1, rank, port) as layout:
        for result in _results(config, constrained, ways, own, layout):
            Results(folder / "results.jsonl").add(result)
    shutil.rmtree(own / "checkpoints")


def _results(config: Config, constrained: bool, ways: Sequence[str], own: Path, layout: "Layout") -> Iterator[Result]:
    from model.costs.parameters import parameters
    from pretrain.checkpoints.store import CheckpointStore

    started, prune_at = perf_counter(), config.checkpoint.every_steps
    losses = finish(open_trainer(section(config, "gha", stage="constrain" if constrained else "off"), layout, own))
    checkpoint = CheckpointStore(own).path(prune_at)
    election, homogeneity, diversity = vote(config, layout, own / "vote", checkpoint)
    seconds = perf_counter() - started
    for way in ways:
        keep = WAYS[way].keep
        if keep is None:
            of_way, pruned_loss, ends = config, losses[prune_at], losses
        else:
            gc.collect()  # frees the previous engine, which has reference cycles
            started = perf_counter()
            elected = election if keep == "voted" else random_election(election, keep, config.run.seed)
            of_way, pruned_loss, ends = fine_tune(elected, layout, own / keep, checkpoint)
            seconds = perf_counter() - started
        grouped = keep != "any"
        yield Result(
            config.model.attention_words,
            config.run.seed,
            way,
            of_way.model.num_heads,
            parameters(of_way.model)["attention"],
            losses[prune_at],
            pruned_loss,
            ends[config.training.steps],
            homogeneity if grouped else None,
            diversity if grouped else None,
            seconds,
        )


def jobs(
    config: Config, variants: Sequence[str], seeds: int, ways: Sequence[str], done: Iterable[Result]
) -> Iterator[tuple[Config, bool, list[str]]]:
    """Configuration, whether constrained, and the ways left to run, for every process; seed by seed, for an early table."""
    finished = {result.key for result in done}
    for seed in range(1, seeds + 1):
        for variant in variants:
            own = section(section(config, "model", attention=variant), "run", seed=seed)
            for constrained in (False, True):
                wanted = [way for way in ways if WAYS[way].constrained is constrained]
                if left := [way for way in wanted if (variant, seed, way) not in finished]:
                    yield own, constrained, left


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of a sample; None if there are too few values."""
    return {name: mean(values) if values else None, f"{name}_std": stdev(values) if len(values) > 1 else None}


def summary(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each variant and way: means and standard deviations over seeds; difference to plain over common seeds."""
    by_key = {result.key: result for result in results}
    rows = []
    for variant in dict.fromkeys(key[0] for key in by_key):
        for way in WAYS:
            found = [result for result in by_key.values() if (result.variant, result.way) == (variant, way)]
            if not found:
                continue
            row: dict[str, Any] = {"variant": variant, "way": way, "seeds": len(found), "heads": found[0].heads}
            row["attention_parameters"] = found[0].attention_parameters
            for name in ("unpruned_loss", "pruned_loss", "loss"):
                row |= spread(name, [getattr(result, name) for result in found])
            row |= spread("perplexity", [math.exp(result.loss) for result in found])
            plain = {seed: result.loss for (name, seed, other), result in by_key.items() if (name, other) == (variant, "plain")}
            row |= spread("above_plain", [result.loss - plain[result.seed] for result in found if result.seed in plain])
            rows.append(row)
    return rows


HEADER = (
    f"{'attention':<9} {'way':<14}{'heads':>5} {'attn par.':>9} {'before':>6} {'after pruning':>14} {'end':>14} {'ppl':>6} "
    f"{'less plain':>16}"
)


def plus_minus(row: dict[str, Any], name: str, form: str) -> str:
    value, std = row[name], row[f"{name}_std"]
    return "" if value is None else f"{value:{form}}" + ("" if std is None else f" ± {std:.3f}")


def line(row: dict[str, Any]) -> str:
    pruned, end = plus_minus(row, "pruned_loss", ".3f"), plus_minus(row, "loss", ".3f")
    above = plus_minus(row, "above_plain", "+.4f")
    return (
        f"{row['variant']:<9} {row['way']:<14}{row['heads']:>5} {row['attention_parameters']:>9,} {row['unpruned_loss']:>6.3f} "
        f"{pruned:>14} {end:>14} {row['perplexity']:>6.2f} {above:>16}"
    )


def settle(folder: Path, config: Config) -> None:
    """`folder` belongs to one configuration: UserError if it has results of another."""
    fields = {name: value for name, value in flat_fields(config) if name not in FIXED or name == "checkpoint.every_steps"}
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(fields, indent=1) + "\n")
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in fields if then.get(name) != fields[name]]:
        raise UserError(f"{folder}: holds results of other settings ({', '.join(other)}); choose another --folder")


def prepared(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """The resolved configuration that all runs share."""
    from data_pipeline.read.manifest import read_manifest

    manifest = read_manifest(arguments.data)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "config.yaml"
    write_text(path, SETTINGS.format(folder=json.dumps(str(arguments.folder)), data=json.dumps(str(arguments.data))))
    every = [f"--{name}.every_steps={arguments.prune_at}" for name in ("validation", "checkpoint")]
    config = load_config(path, [*overrides, *every], [model_faults, gha_faults], world_size=1)
    if not config.schedule.warmup_steps < arguments.prune_at < config.training.steps:
        raise UserError(f"--prune-at {arguments.prune_at}: between schedule.warmup_steps and training.steps")
    return config.resolved(manifest.vocab_size, manifest.end_of_document)


def names(known: Iterable[str], text: str, separator: str) -> list[str]:
    found = [name.strip() for name in text.split(separator)]
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"{', '.join(unknown)}: known are {f'{separator} '.join(known)}")
    return found


def run_all(config: Config, variants: Sequence[str], ways: Sequence[str], arguments: argparse.Namespace) -> list[Result]:
    """Run what is not finished, several processes at a time."""
    from benchmarks.ranks import run_ranks

    os.environ["OMP_NUM_THREADS"] = "1"
    results = Results(arguments.folder / "results.jsonl")
    results.mend()
    left = list(jobs(config, variants, arguments.seeds, ways, results.read()))
    with ThreadPoolExecutor(arguments.processes) as pool:
        running = {pool.submit(run_ranks, run_job, 1, *job, arguments.folder, seconds=LONGEST): job for job in left}
        try:
            for number, future in enumerate(as_completed(running), start=1):
                future.result()
                own, constrained, _ = running[future]
                kind = "constrained" if constrained else "plain"
                print(
                    f"{number} of {len(left)}: {own.model.attention}, seed {own.run.seed}, {kind}", file=sys.stderr, flush=True
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    wanted = {(variant, seed, way) for variant in variants for seed in range(1, arguments.seeds + 1) for way in ways}
    return [result for result in results.read() if result.key in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/prose"), metavar="FOLDER", help="prepared text; default: %(default)s")
    add("--folder", type=Path, default=Path("runs/gha_quality"), metavar="FOLDER", help="of the runs; default: %(default)s")
    add("--variants", default="mha,mhe_add,mhe_mul", metavar="A,B", help="default: %(default)s")
    add("--ways", default=";".join(WAYS), metavar="A;B", help="default: all of them: %(default)s")
    add("--seeds", type=whole_number(1), default=3, metavar="N", help="default: %(default)s")
    add("--prune-at", type=whole_number(1), default=420, metavar="STEP", help="vote and prune after it; default: %(default)s")
    add("--processes", type=whole_number(1), default=2, metavar="N", help="at a time, a thread each; default: %(default)s")
    add("--json", type=output_file(".json"), metavar="FILE", help="write settings, summary and all runs there, too")
    arguments, overrides = parser.parse_known_args()
    if unknown := [text for text in overrides if not (text.startswith("--") and "." in text and "=" in text)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    variants = names(("mha", "mhe_add", "mhe_mul"), arguments.variants, ",")
    ways = names(WAYS, arguments.ways, ";")
    config = prepared(arguments, overrides)
    settle(arguments.folder, config)
    results = run_all(config, variants, ways, arguments)
    rows = summary(results)
    print("\n".join([HEADER, *map(line, rows)]))
    if arguments.json:
        runs = [asdict(result) for result in sorted(results, key=lambda result: result.key)]
        content = {"settings": dict(flat_fields(config)), "prune_at": arguments.prune_at, "summary": rows, "runs": runs}
        write_text(arguments.json, json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_command(main)
