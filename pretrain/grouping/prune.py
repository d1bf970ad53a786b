"""From a checkpoint and an election to a pruned checkpoint and the configuration that trains it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.durable import write_text
from configs.errors import UserError
from configs.load import SECTIONS, to_yaml
from configs.schema import Config, ModelConfig, cross_faults
from data_pipeline.read.manifest import file_record
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.gha.pruning import prune_config, prune_heads
from model.gha.voting import Election
from model.parallel.faults import tensor_faults
from pretrain.checkpoints.folder import (
    CHECKPOINTS,
    CONFIG,
    MARKER,
    TrainState,
    newest_checkpoint,
    read_config,
    read_marker,
    read_state,
    read_tokenizer,
    verify,
)
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.unsharded import load_state
from pretrain.grouping.election import read_election
from pretrain.grouping.origin import ORIGIN, PRUNED, write_origin
from pretrain.grouping.report.outcome import update_report

ELECTION = "gha/election.json"  # in a run's folder: the result of a vote
# What a killed process may have left in an output folder.
_UNFINISHED = {CONFIG, f".{CONFIG}.tmp", ORIGIN, f".{ORIGIN}.tmp", CHECKPOINTS}


def prune(checkpoint: Path, election: Election, output: Path, tensor: int | None = None) -> Path:
    """Write `output`/config.yaml and a checkpoint whose model has the elected heads. Returns the checkpoint's folder.

    Runs in one process, with memory for two copies of weights, averages and optimizer state. `tensor` replaces parallel.tensor
    for the run that resumes from it. UserError if the election does not fit or `output` cannot be written.
    """
    verify(checkpoint)
    run = checkpoint.resolve().parent.parent
    config, train = read_config(checkpoint), read_state(checkpoint)
    _check_election(checkpoint, election, train, config.model)
    kept = [layer.kept for layer in election.layers]
    pruned, world_size = _pruned_config(config, prune_config(config.model, kept), output, tensor, train.world_size)
    _check_layout(pruned, world_size, election)
    _check_output(output)
    state = load_state(checkpoint)
    left = {kind: prune_heads(config.model, tensors, kept) for kind, tensors in state.by_kind().items()}
    tokenizer = read_tokenizer(checkpoint)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / CONFIG, to_yaml(pruned))
        write_origin(output, run, election.step)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    pruned_state = State.unsharded(left, {name: values[0] for name, values in state.scalars.items()})
    store, train = CheckpointStore(output), replace(train, world_size=world_size)
    saved = store.save_alone(pruned, train, tokenizer, pruned_state)
    update_report(run, election.step, pruned)
    return saved


def prune_run(path: Path, election_file: Path | None, output: Path | None, tensor: int | None) -> tuple[Path, Path]:
    """Prune `path`, a run's folder (the checkpoint that was voted on) or a checkpoint. Returns both checkpoints' folders."""
    is_run = (path / CHECKPOINTS).is_dir()
    if not is_run:
        read_marker(path)  # UserError if it is no checkpoint
    run = path if is_run else path.resolve().parent.parent
    found = read_election(election_file or run / ELECTION)
    election, checkpoint = found.election, path
    if is_run:
        checkpoint = CheckpointStore(path).path(election.step)
        if not checkpoint.is_dir():
            raise UserError(
                f"{checkpoint}: does not exist, but the election is of step {election.step}; "
                f"the newest is {newest_checkpoint(path)}"
            )
    if file_record(checkpoint / MARKER).sha256 != found.checkpoint_sha256:
        raise UserError(f"{checkpoint}: the election belongs to another checkpoint, {found.checkpoint}")
    return checkpoint, prune(checkpoint, election, output or run / PRUNED, tensor)


def savings_table(before: ModelConfig, after: ModelConfig) -> str:
    """`figures` as a table."""
    lines = [f"{'':<26}  {'before':>16}  {'after':>16}  saved"]
    lines += [f"{name:<26}  {old:>16,}  {new:>16,}  {1 - new / old:.1%}" for name, old, new in figures(before, after)]
    return "\n".join(lines)


def figures(before: ModelConfig, after: ModelConfig) -> list[tuple[str, int, int]]:
    """What pruning saves: name, before, after."""
    old, new = parameters(before), parameters(after)
    return [
        ("heads of a layer", before.num_heads, after.num_heads),
        ("parameters, attention", old["attention"], new["attention"]),
        ("parameters, model", sum(old.values()), sum(new.values())),
        ("KV cache, bytes of a token", kv_cache_bytes_per_token(before), kv_cache_bytes_per_token(after)),
    ]


def _check_election(checkpoint: Path, election: Election, state: TrainState, model: ModelConfig) -> None:
    layers, heads = len(election.layers), len(election.layers[0].labels)
    for name, of_election, of_checkpoint in (
        ("step", election.step, state.step),
        ("num_layers", layers, model.num_layers),
        ("num_heads", heads, model.num_heads),
    ):
        if of_election != of_checkpoint:
            raise UserError(
                f"{checkpoint}: has {name} {of_checkpoint}, the election {of_election}: it belongs to another checkpoint"
            )


def _pruned_config(config: Config, model: ModelConfig, output: Path, tensor: int | None, world_size: int) -> tuple[Config, int]:
    """The configuration of the run that resumes, and its number of processes: as many data-parallel ranks as before."""
    parallel = config.parallel if tensor is None else config.parallel.model_copy(update={"tensor": tensor})
    pruned = config.model_copy(
        update={
            "model": model,
            "run": config.run.model_copy(update={"folder": str(output)}),
            "gha": config.gha.model_copy(update={"stage": "off"}),
            "parallel": parallel,
        }
    )
    return pruned, world_size // config.parallel.tensor * parallel.tensor


def _check_layout(config: Config, world_size: int, election: Election) -> None:
    """UserError if the layout cannot share out the heads that stay."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    if faults := [*tensor_faults(sections), *cross_faults(sections, world_size)]:
        tensor, heads = config.parallel.tensor, len(election.layers[0].labels)
        fitting = [n for n in range(1, heads) if n * election.groups < heads and n * election.groups % tensor == 0]
        hint = (
            f"a vote with gha.heads_per_group {' or '.join(map(str, fitting))}" if fitting else "a vote with other gha.groups"
        )
        raise UserError(
            f"the heads that stay do not fit the layout: {'; '.join(map(str, faults))}. "
            f"{hint} leaves heads for parallel.tensor {tensor}; --tensor takes another number of ranks"
        )


def _check_output(output: Path) -> None:
    """UserError unless `output` is empty or holds only what a killed `prune` left."""
    try:
        others = sorted({path.name for path in output.iterdir()} - _UNFINISHED) if output.exists() else []
    except OSError as error:
        raise UserError(f"{output}: cannot be used as a folder ({error.strerror})") from error
    if steps := CheckpointStore(output).steps():
        raise UserError(
            f"{output}: holds a run already, at step {max(steps)}; resume it with --config {output / CONFIG} --resume=auto, "
            "delete it, or choose another --output"
        )
    if others:
        raise UserError(f"{output}: is not empty ({others[0]}); choose another --output")
