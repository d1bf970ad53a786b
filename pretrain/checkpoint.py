"""Checkpoint folders: written whole or not at all, verified before they are read, the old ones cleared away.

    <run>/checkpoints/latest                    the name of the newest complete checkpoint
    <run>/checkpoints/step_00000100/config.yaml     resolved configuration
                                    state.json      step, layout, versions
                                    tokenizer.json  the tokenizer of the data
                                    rng/rank_00000.pt   random generators of each rank
                                    engine/...      the engine's own shards, one or more of each rank
                                    complete.json   size and SHA-256 of every file above, written last

A checkpoint grows in `.step_....partial` and gets its name, by an atomic rename, once its marker is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import CheckpointConfig, Config
from pretrain.parallel import World, barrier, gather_objects

FORMAT = "manyheads-checkpoint-1"
MARKER = "complete.json"
ENGINE_FOLDER = "engine"
WEIGHTS = (
    "mp_rank_00_model_states.pt"  # DeepSpeed's name for what the first data-parallel rank writes; it holds the whole model
)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. All else (learning rate, data order) follows from `step` and the config."""

    step: int
    world_size: int
    zero_stage: int


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, world: World) -> None:
        self.folder = run_folder / "checkpoints"
        self.world = world

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in self.folder.glob(f"step_*/{MARKER}"))

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, config: Config, state: TrainState, tokenizer: Path, save_engine: Callable[[Path], list[Path]]) -> Path:
        """Write one checkpoint; every rank calls it. `save_engine` writes this rank's shards below a folder and lists them.

        Raises UserError on every rank when any rank could not write; older checkpoints are then untouched.
        """
        final = self.path(state.step)
        partial = self.folder / f".{final.name}.partial"
        failure: str | None = None
        hashes: dict[str, dict[str, Any]] = {}
        if self.world.is_main:
            failure = _attempt(lambda: _make_partial(partial, config, state, tokenizer))
        failure = next((text for text in gather_objects(failure) if text), None)
        if failure is None:
            failure = _attempt(lambda: hashes.update(self._write_own(partial, save_engine)))
            reports = gather_objects((failure, hashes))
            failure = next((text for text, _ in reports if text), None)
        if failure is None and self.world.is_main:
            files = {name: entry for _, part in reports for name, entry in part.items()}
            failure = _attempt(lambda: self._finish(partial, final, files))
        failure = next((text for text in gather_objects(failure) if text), None)
        if failure is not None:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            kept = f"step {self.steps()[-1]} is still complete" if self.steps() else "there is no earlier one"
            raise UserError(f"{final}: the checkpoint could not be saved ({failure}); {kept}")
        return final

    def _write_own(self, partial: Path, save_engine: Callable[[Path], list[Path]]) -> dict[str, dict[str, Any]]:
        """This rank's shards and generators (the main rank's common files too), hashed: {name: {bytes, sha256}}."""
        rng = partial / "rng" / f"rank_{self.world.rank:05d}.pt"
        written = save_engine(partial)
        _write_tensors(rng, _rng_state(self.world))
        common = [partial / name for name in ("config.yaml", "state.json", "tokenizer.json")] if self.world.is_main else []
        return {str(path.relative_to(partial)): _fingerprint(path) for path in [*common, rng, *written]}

    def _finish(self, partial: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
        write_text(partial / MARKER, json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)  # the same step saved again after a resume
        partial.rename(final)
        _sync_folder(self.folder)
        write_text(self.folder / "latest", final.name + "\n")

    def clear_old(self, policy: CheckpointConfig) -> None:
        """Keep the last `keep_last` and every checkpoint whose step is a multiple of `keep_every`; the main rank deletes."""
        if not self.world.is_main:
            return
        for step in self.steps()[: -policy.keep_last]:
            if policy.keep_every is None or step % policy.keep_every:
                doomed = self.path(step)
                (doomed / MARKER).unlink()  # first of all: half a deleted checkpoint is no checkpoint
                shutil.rmtree(doomed)

    def find(self, resume: str) -> Path | None:
        """The folder that `--resume` names: `auto` is the newest complete checkpoint of this run, None if there is none."""
        if resume != "auto":
            return Path(resume)
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def restore(self, folder: Path, config: Config, tokenizer: Path, load_engine: Callable[[Path], None]) -> TrainState:
        """Verify `folder`, check that it fits this run, load engine and generators; every rank calls it."""
        problems = gather_objects(_attempt(lambda: verify(folder) if self.world.is_main else None))
        if problems[0]:
            raise UserError(problems[0])
        state = read_state(folder)
        _check_fit(folder, state, config, tokenizer, self.world)
        load_engine(folder)
        _restore_rng(folder / "rng" / f"rank_{self.world.rank:05d}.pt", self.world)
        barrier()
        return state


def verify(folder: Path) -> None:
    """Every file that the marker names is there, of the right size and hash. Raises UserError naming the first that is not."""
    marker = read_marker(folder)
    for name, expected in marker["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, {expected['bytes']} were written (truncated?)")
        if _fingerprint(path) != expected:
            raise UserError(f"{path}: its content is not what was written (corrupt)")


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint; UserError for any other folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT:
            raise UserError(f"{folder}: format {marker['format']!r} is not supported; known: {FORMAT}")
        if not all(
            Path(name).parts and ".." not in Path(name).parts and not Path(name).is_absolute() for name in marker["files"]
        ):
            raise UserError(f"{folder / MARKER}: names files outside the checkpoint")
    except FileNotFoundError:
        raise UserError(f"{folder}: not a complete checkpoint of manyheads (no {MARKER})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MARKER}: not a marker of manyheads ({type(error).__name__})") from error
    return marker


def read_state(folder: Path) -> TrainState:
    try:
        return TrainState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'}: cannot be read ({error})") from error


def read_config(folder: Path) -> Config:
    """The resolved configuration a checkpoint was written with."""
    read_marker(folder)
    return load_config(folder / "config.yaml", world_size=read_state(folder).world_size)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights of a checkpoint by name, on the CPU, without an engine."""
    return load_tensors(folder / ENGINE_FOLDER / WEIGHTS)["module"]


def load_tensors(path: Path, safe_classes: Sequence[type] = ()) -> Any:
    """One file of tensors in plain containers, read to the CPU with `weights_only`: no code of the file's runs.

    `safe_classes` may stand in it too. Raises UserError for anything else.
    """
    try:
        with torch.serialization.safe_globals(list(safe_classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as tensors ({reason})") from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; what went wrong as text, so that ranks can agree on it before anyone raises."""
    try:
        action()
    except (OSError, RuntimeError, UserError) as error:
        return str(error) or type(error).__name__
    return None


def _make_partial(partial: Path, config: Config, state: TrainState, tokenizer: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "rng").mkdir(parents=True)
    (partial / ENGINE_FOLDER).mkdir()
    write_text(partial / "config.yaml", to_yaml(config))
    write_text(partial / "state.json", json.dumps(asdict(state)))
    write_text(partial / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))


def _check_fit(folder: Path, state: TrainState, config: Config, tokenizer: Path, world: World) -> None:
    then, now = read_config(folder).model.model_dump(), config.model.model_dump()
    other = [f"model.{key}: {then[key]!r} there, {now[key]!r} here" for key in now if then[key] != now[key]]
    if other:
        raise UserError(f"{folder}: a checkpoint of another model\n  " + "\n  ".join(other))
    if (folder / "tokenizer.json").read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"{folder}: trained with another tokenizer than {tokenizer}; prepare the data with --tokenizer of the former"
        )
    if (state.world_size, state.zero_stage) != (world.size, config.parallel.zero_stage):
        raise UserError(
            f"{folder}: written by {state.world_size} processes with zero_stage {state.zero_stage}; "
            f"this run has {world.size} and {config.parallel.zero_stage}: both must be equal to resume"
        )
    if state.step > config.training.steps:
        raise UserError(f"{folder}: stands at step {state.step}, beyond training.steps ({config.training.steps})")


def _rng_state(world: World) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _restore_rng(path: Path, world: World) -> None:
    state = load_tensors(path)
    try:
        torch.set_rng_state(state["cpu"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], world.device)
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no state of random generators for this device ({error})") from error


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
