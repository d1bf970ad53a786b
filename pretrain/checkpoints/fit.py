"""What a run may not change when it resumes from a checkpoint, and what a change of layout costs."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.mix.order import SampleOrder
from data_pipeline.mix.plan import shares_by_step
from data_pipeline.read.manifest import TOKENIZER
from data_pipeline.read.packed import samples_per_epoch
from pretrain.checkpoints.folder import TrainState
from pretrain.engines import engine


def check_fit(folder: Path, written: Config, state: TrainState, config: Config, data_sha256: str, tokenizer: str) -> None:
    """That a run of `config` on this data can resume from `folder`, which a run of `written` wrote, on any layout.

    Model, optimizer and order of samples must be the same.

    UserError lists all that differs.
    """
    if state.merged:
        raise UserError(
            f"{folder}: holds an average of weights and no optimizer's state, so that no run can resume from it; "
            "evaluate, generate or export it"
        )
    then, now = _fixed_fields(written), _fixed_fields(config)
    other = [f"{key}: {then[key]!r} there, {now[key]!r} here" for key in now if then[key] != now[key]]
    other += _other_samples(written, config, state.step)
    if (folder / TOKENIZER).read_bytes() != tokenizer.encode():
        here, again = config.data.tokenizer, "name as data.stream.tokenizer"
        if not config.data.streams:
            here, again = f"that of {config.data.parts[0].path}", "prepare the data with --tokenizer"
        other.append(f"another tokenizer than {here}; {again} {folder / TOKENIZER}")
    elif written.data.streams or config.data.streams:
        other += _other_stream(written, state, config, data_sha256)
    else:
        other += _other_data(written, state, config, data_sha256.split(","))
    if other:
        raise UserError(f"{folder}: a checkpoint that this run cannot resume from\n  " + "\n  ".join(other))
    if state.step > config.training.steps:
        raise UserError(f"{folder}: stands at step {state.step}, beyond training.steps ({config.training.steps})")


def same_layout(written: Config, state: TrainState, config: Config, world_size: int) -> bool:
    """Whether each rank does what it did in the run of `written`, so that its random generators fit."""
    return state.world_size == world_size and _layout(written) == _layout(config)


def _fixed_fields(config: Config) -> dict[str, object]:
    model = config.model.model_dump(exclude={"attention_kernel"})  # changes nothing but rounding and speed
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "optimizer.kind": config.optimizer.kind,
        "run.seed": config.run.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.packing": config.data.packing,
        "training.global_batch_size": config.training.global_batch_size,
    }


def _other_samples(then: Config, now: Config, step: int) -> list[str]:
    """What is wrong if `training.skip_samples` asks for other samples in the first `step` steps, which have been taken."""
    ranges = [config.training.skip_samples for config in (then, now)]
    taken, wanted = (SampleOrder(left_out).numbers(0, step * then.training.global_batch_size) for left_out in ranges)
    if taken == wanted:
        return []
    there, here = ranges
    return [f"training.skip_samples: {there} there, {here} here; it may change from sample {taken[-1][1]}, the next one, on"]


def _other_stream(written: Config, state: TrainState, config: Config, sha256: str) -> list[str]:
    """What is wrong if a stream is not that of the checkpoint, or only one of the two runs streams its data."""
    if not (written.data.streams and config.data.streams):
        streamed, other = ("there", "here") if written.data.streams else ("here", "there")
        return [f"data: streamed {streamed} (data.stream), prepared {other}"]
    fixed = ("input", "text_field", "document", "shards", "shuffle_documents")
    then, now = ({name: getattr(run.data.stream, name) for name in fixed} for run in (written, config))
    found = [f"data.stream.{name}: {then[name]!r} there, {now[name]!r} here" for name in fixed if then[name] != now[name]]
    if not found and state.data_sha256.partition(",")[0] != sha256.partition(",")[0]:  # the files' names; not their sizes
        found = [f"data.stream.input: {', '.join(config.data.stream.input)} has other files than there"]
    return found


def _other_data(written: Config, state: TrainState, config: Config, sha256: list[str]) -> list[str]:
    """What is wrong if the sources, or their shares in the steps that have been taken, are not those of the checkpoint."""
    here, own = dict(zip(sha256, config.data.parts, strict=True)), state.data_sha256.split(",")
    both = (written.data, config.data)
    by_epochs = any(data.parts[0].epochs or any(phase.epochs for phase in data.schedule) for data in both)

    def size(sha: str) -> int:
        return samples_per_epoch(here[sha].path, config.data) if by_epochs and sha in here else 1

    def taken(run: Config, of: list[str]) -> list[tuple[int, list[tuple[str, float]]]]:
        shares = shares_by_step(run.data, list(map(size, of)))
        return [
            (step, [(sha, share) for sha, share in zip(of, of_step, strict=True) if share])
            for step, of_step in shares.items()
            if step < state.step
        ]

    before = taken(written, own)
    used = {sha for _, shares in before for sha, _ in shares}
    if gone := [source.path for source, sha in zip(written.data.parts, own, strict=True) if sha in used - here.keys()]:
        return [f"other data than {', '.join(gone)} (its manifest differs, or it is no source any more)"]
    if before == taken(config, sha256):
        return []
    return [f"data: other shares of the sources in the first {state.step} steps; change them from there on by data.schedule"]


def _layout(config: Config) -> tuple[object, ...]:
    parallel = config.parallel
    sharding = engine(config.backend).sharding(parallel)
    return sharding, parallel.tensor, parallel.pipeline, parallel.sequence and parallel.tensor > 1
