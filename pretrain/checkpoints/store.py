"""Checkpoint folders: written whole or not at all, verified before they are read, the old ones cleared away.

    <run>/checkpoints/latest                    the name of the newest complete checkpoint, for people and scripts
    <run>/checkpoints/step_00000100/config.yaml     resolved configuration
                                    state.json      step, layout, data
                                    tokenizer.json  the tokenizer of the data
                                    rng/rank_00000.pt   random generators of each rank
                                    engine/...      the engine's own shards, one or more of each rank (docs/checkpoints.md)
                                    complete.json   size and SHA-256 of every file above, written last

A checkpoint grows in `.step_....partial` and gets its name, by an atomic rename, once its marker is on disk. A *portable* one
(pretrain/checkpoints/portable.py) has no generators and one file in engine/, from which runs of any layout go on.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from configs.durable import sync, write_text
from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import CheckpointConfig, Config
from data_pipeline.read.manifest import TOKENIZER, FileRecord, file_record
from model.attention.registry import attention_faults
from model.registry import model_faults
from pretrain.backends.registry import engine_faults
from pretrain.distributed.collectives import barrier, gather_objects, together
from pretrain.distributed.layout import Layout
from pretrain.optim.registry import optimizer_faults

Content = TypeVar("Content")
MARKER, CONFIG, STATE = "complete.json", "config.yaml", "state.json"
ENGINE_FOLDER, WHOLE_FILE = "engine", "whole.safetensors"  # the one file in engine/ of a portable checkpoint
COMMON_FILES = (CONFIG, STATE, TOKENIZER)  # these and its weights (pretrain/checkpoints/weights.py) are all that a model needs


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. All else (learning rate, data order) follows from `step` and the config."""

    step: NonNegativeInt
    world_size: PositiveInt
    data_sha256: str  # of the manifest of the data


@dataclass(frozen=True)
class Marker:
    """Content of complete.json."""

    format: Literal["manyheads-checkpoint-1"]
    files: dict[str, FileRecord]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, layout: Layout) -> None:
        self.folder = run_folder / "checkpoints"
        self.layout = layout

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        folders = (path.parent.name for path in self.folder.glob(f"*/{MARKER}"))
        return sorted(int(name.removeprefix("step_")) for name in folders if re.fullmatch(r"step_\d{8,}", name))

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step; None if there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, config: Config, state: TrainState, tokenizer: str, save_engine: Callable[[Path], list[Path]]) -> Path:
        """Write one checkpoint; every rank calls it. `save_engine` writes this rank's shards below a folder and lists them.

        Raises UserError on every rank when any rank could not write; older checkpoints are then untouched.
        """
        final = self.path(state.step)
        partial = self.folder / f".{final.name}.partial"
        files: dict[str, FileRecord] = {}

        def write_own() -> None:
            for name in self._write_own(partial, save_engine):
                files[name] = file_record(partial / name)

        def finish() -> None:
            self._finish(partial, final, {name: record for part in gathered for name, record in part.items()})

        try:
            together(lambda: _make_partial(partial, config, state, tokenizer), main_only=True)
            together(write_own)
            gathered = gather_objects(files)
            together(finish, main_only=True)
        except UserError as error:
            if self.layout.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(final, error) from None
        return final

    def save_portable(self, config: Config, state: TrainState, tokenizer: str, write_whole: Callable[[Path], object]) -> Path:
        """`save` by one process, whatever group it is in: `write_whole` writes WHOLE_FILE, and there are no generators."""
        final = self.path(state.step)
        partial = self.folder / f".{final.name}.partial"
        try:
            _make_partial(partial, config, state, tokenizer)
            write_whole(partial / ENGINE_FOLDER / WHOLE_FILE)
            names = (*COMMON_FILES, f"{ENGINE_FOLDER}/{WHOLE_FILE}")
            self._finish(partial, final, {name: file_record(partial / name) for name in names})
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(final, error) from None
        return final

    def _not_saved(self, final: Path, error: Exception) -> UserError:
        newest = self.newest()
        kept = f"{newest} is still complete" if newest else "there is no earlier one"
        return UserError(f"{final}: the checkpoint could not be saved ({error}); {kept}")

    def _write_own(self, partial: Path, save_engine: Callable[[Path], list[Path]]) -> list[str]:
        """Write this rank's shards and generators; the names of all files that it vouches for."""
        written = save_engine(partial)
        rng = _rng_name(self.layout.rank)
        (partial / rng).parent.mkdir(exist_ok=True)
        torch.save(_rng_state(self.layout), partial / rng)
        sync(partial / rng)
        common = COMMON_FILES if self.layout.is_main else ()
        return [*common, rng, *(str(path.relative_to(partial)) for path in written)]

    def _finish(self, partial: Path, final: Path, files: dict[str, FileRecord]) -> None:
        write_text(partial / MARKER, json.dumps(asdict(Marker("manyheads-checkpoint-1", files)), indent=1))
        for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync(folder)
        replaced = self.folder / f".{final.name}.replaced"  # the same step saved before
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(self.folder)
        write_text(self.folder / "latest", final.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)

    def clear_old(self, policy: CheckpointConfig) -> None:
        """Keep the last `keep_last` and every checkpoint whose step is a multiple of `keep_every`; the main rank deletes."""
        if not self.layout.is_main:
            return
        for step in self.steps()[: -policy.keep_last]:
            if policy.keep_every is None or step % policy.keep_every:
                doomed = self.path(step)
                try:
                    (doomed / MARKER).unlink()  # first of all: half a deleted checkpoint is no checkpoint
                    shutil.rmtree(doomed)
                except OSError as error:
                    print(f"warning: {doomed}: cannot be deleted ({error.strerror})", file=sys.stderr, flush=True)

    def clear_remains(self) -> None:
        """Delete what killed processes left: partial checkpoints and half-deleted ones; the main rank deletes, before a run."""
        if self.layout.is_main:
            half_deleted = (path for path in self.folder.glob("step_*") if not (path / MARKER).exists())
            for path in (*self.folder.glob(".step_*"), *half_deleted):
                shutil.rmtree(path, ignore_errors=True)

    def find(self, resume: str) -> Path | None:
        """The folder that `--resume` names: `auto` is this run's newest checkpoint, None if it has none yet.

        UserError when this run's folder already has later checkpoints than that: they would be mixed with the new ones.
        """
        if resume == "auto":
            return self.newest()
        folder = newest_checkpoint(Path(resume))
        step = read_state(folder).step
        later = [other for other in self.steps() if other > step]
        if later:
            raise UserError(
                f"{self.folder}: holds checkpoints of later steps ({', '.join(map(str, later))}) than {folder}; "
                "delete them, or choose another --run.folder"
            )
        return folder

    def check(self, folder: Path, config: Config, data_sha256: str, tokenizer: str) -> TrainState:
        """That `folder` fits this run and is undamaged; every rank calls it and verifies its share of the files.

        UserError on every rank when one finds a fault.
        """
        marker = read_marker(folder)
        self._verify(folder, COMMON_FILES)
        state = read_state(folder)
        _check_fit(folder, state, config, data_sha256, tokenizer)
        shards = [path for path in (folder / ENGINE_FOLDER).rglob("*") if path.is_file()]
        _vouched(folder, marker, [str(path.relative_to(folder)) for path in shards])
        self._verify(folder, sorted(marker.files)[self.layout.rank :: self.layout.world_size])
        return state

    def _verify(self, folder: Path, names: Sequence[str]) -> None:
        """`verify` of this rank's names; the error of any rank says where the run could go on instead."""
        try:
            together(lambda: verify(folder, names))
        except UserError as error:
            earlier = [step for step in self.steps() if self.path(step) != folder]
            hint = f"; delete it, and --resume=auto goes on from step {earlier[-1]}" if earlier else ""
            raise UserError(f"{error}{hint}") from None

    def restore(self, folder: Path, state: TrainState, load_engine: Callable[[Path], None]) -> None:
        """Load engine and generators of a checked folder; every rank calls it.

        Generators stay as they are when none were written, or by another number of processes. UserError on every rank when one
        fails.
        """
        together(lambda: load_engine(folder))
        if state.world_size == self.layout.world_size and not is_portable(folder):
            together(lambda: _restore_rng(folder / _rng_name(self.layout.rank), self.layout))
        barrier()


def newest_checkpoint(path: Path) -> Path:
    """`path` itself, or, if it is a run's folder, the newest checkpoint in it. UserError when that has none."""
    if not (path / "checkpoints").is_dir():
        if (path / "metrics.jsonl").exists():
            raise UserError(f"{path}: a run that has no checkpoint yet")
        return path
    newest = CheckpointStore(path, Layout.from_environment()).newest()
    if newest is None:
        raise UserError(f"{path}: holds no complete checkpoint")
    return newest


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """The named files, by default all of the marker, have the size and hash written there; UserError names the first not to."""
    marker = read_marker(folder)
    names = list(marker.files if names is None else names)
    _vouched(folder, marker, names)
    for name in names:
        path, expected = folder / name, marker.files[name]
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint")
        found = file_record(path)
        if found.bytes != expected.bytes:
            raise UserError(f"{path}: has {found.bytes} bytes, {expected.bytes} were written (truncated?)")
        if found != expected:
            raise UserError(f"{path}: its content is not what was written (corrupt)")


def read_marker(folder: Path) -> Marker:
    """The marker of a complete checkpoint; UserError for any other folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    if not (folder / MARKER).exists():
        raise UserError(f"{folder}: not a complete checkpoint of manyheads (no {MARKER})")
    marker = _read_json(folder / MARKER, Marker)
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in marker.files):
        raise UserError(f"{folder / MARKER}: names files outside the checkpoint")
    _vouched(folder, marker, COMMON_FILES)
    return marker


def is_portable(folder: Path) -> bool:
    """Whether runs of any layout go on from this checkpoint."""
    return (folder / ENGINE_FOLDER / WHOLE_FILE).exists()


def _vouched(folder: Path, marker: Marker, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in marker.files]
    if missing:
        raise UserError(f"{folder / MARKER}: does not vouch for {', '.join(missing)}")


def read_state(folder: Path) -> TrainState:
    read_marker(folder)
    return _read_json(folder / STATE, TrainState)


def read_config(folder: Path) -> Config:
    """The resolved configuration a checkpoint was written with."""
    checks = [model_faults, attention_faults, engine_faults, optimizer_faults]
    return load_config(folder / CONFIG, checks=checks, world_size=read_state(folder).world_size)


def load_tensors(path: Path, safe_classes: Sequence[type] = (), mapped: bool = False) -> Any:
    """One file of tensors in plain containers, read to the CPU with `weights_only`: no code of the file's runs.

    `safe_classes` may stand in it too. `mapped`: tensors are read when they are used. Raises UserError for anything else.
    """
    try:
        with torch.serialization.safe_globals(list(safe_classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as tensors ({reason})") from error


def _read_json(path: Path, kind: type[Content]) -> Content:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error


def _make_partial(partial: Path, config: Config, state: TrainState, tokenizer: str) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / ENGINE_FOLDER).mkdir(parents=True)
    write_text(partial / CONFIG, to_yaml(config))
    write_text(partial / STATE, json.dumps(asdict(state)))
    write_text(partial / TOKENIZER, tokenizer)


def _check_fit(folder: Path, state: TrainState, config: Config, data_sha256: str, tokenizer: str) -> None:
    """What a run may not change when it goes on: the model, what orders the data; how a model is cut unless it is portable.

    The number of data-parallel ranks may change.
    """
    then, now = _fixed_fields(read_config(folder)), _fixed_fields(config)
    if not is_portable(folder):
        then, now = {**then, **_layout(read_config(folder))}, {**now, **_layout(config)}
    other = [f"{key}: {then[key]!r} there, {now[key]!r} here" for key in now if then[key] != now[key]]
    if (folder / TOKENIZER).read_bytes() != tokenizer.encode():
        other.append(
            f"another tokenizer than that of {config.data.path}; prepare the data with --tokenizer {folder / TOKENIZER}"
        )
    elif state.data_sha256 != data_sha256:
        other.append(f"other data than {config.data.path} (its manifest differs)")
    if other:
        raise UserError(f"{folder}: a checkpoint that this run cannot go on from\n  " + "\n  ".join(other))
    if state.step > config.training.steps:
        raise UserError(f"{folder}: stands at step {state.step}, beyond training.steps ({config.training.steps})")


def _fixed_fields(config: Config) -> dict[str, object]:
    model = config.model.model_dump(exclude={"attention_kernel"})  # changes nothing but rounding and speed
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "run.seed": config.run.seed,
        "data.sequence_length": config.data.sequence_length,
        "training.global_batch_size": config.training.global_batch_size,
    }


def _layout(config: Config) -> dict[str, object]:
    """How a model is cut, and which ranks share random numbers."""
    return {
        "training.precision": config.training.precision,
        "backend": config.backend,
        "parallel.zero_stage": config.parallel.zero_stage if config.backend == "deepspeed" else None,
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.sequence": config.parallel.sequence and config.parallel.tensor > 1,
    }


def _rng_name(rank: int) -> str:
    return f"rng/rank_{rank:05d}.pt"


def _rng_state(layout: Layout) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if layout.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(layout.device)
    return state


def _restore_rng(path: Path, layout: Layout) -> None:
    state = load_tensors(path)
    try:
        torch.set_rng_state(state["cpu"])
        if layout.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], layout.device)
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no state of random generators for this device ({error})") from error
