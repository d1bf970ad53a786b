"""The result of a vote as a file, `<run>/gha/election.json`: launch/prune.py reads which heads stay."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from configs.durable import write_text
from configs.errors import UserError
from data_pipeline.read.manifest import file_record
from model.gha.voting import Election, LayerElection
from pretrain.checkpoints.folder import MARKER


@dataclass(frozen=True)
class ElectionFile:
    """Content of the file."""

    format: Literal["manyheads-election-1"]
    checkpoint: str  # path of the checkpoint whose heads were voted on
    checkpoint_sha256: str  # of its complete.json, which has the hashes of all its files
    election: Election


def write_election(path: Path, election: Election, checkpoint: Path) -> None:
    """Create or replace `path` atomically; its folder must exist. UserError if it cannot be written."""
    sha256 = file_record(checkpoint / MARKER).sha256
    content = ElectionFile("manyheads-election-1", str(checkpoint), sha256, election)
    try:
        write_text(path, json.dumps(asdict(content), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_election(path: Path) -> ElectionFile:
    """What `write_election` wrote; UserError for anything else."""
    try:
        found = TypeAdapter(ElectionFile).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: does not exist; a vote writes it: --gha.stage=vote --resume=auto") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name}: " for name in [".".join(map(str, first["loc"]))] if name)
        raise UserError(f"{path}: not an election of manyheads, or damaged ({place}{first['msg']})") from error
    for fault in _faults(found.election):
        raise UserError(f"{path}: is damaged ({fault})")
    return found


def _faults(election: Election) -> Iterator[str]:
    for name, least in (("step", 0), ("ballots", 1), ("heads_per_group", 1), ("groups", 1)):
        if getattr(election, name) < least:
            yield f"{name} is {getattr(election, name)}, below {least}"
    if not election.layers:
        yield "it has no layers"
    for number, layer in enumerate(election.layers):
        for fault in _layer_faults(election, layer):
            yield f"layer {number}: {fault}"


def _layer_faults(election: Election, layer: LayerElection) -> Iterator[str]:
    heads, stay = len(election.layers[0].labels), election.groups * election.heads_per_group
    if not len(layer.labels) == len(layer.scores) == heads:
        yield f"{len(layer.labels)} labels and {len(layer.scores)} scores of {heads} heads"
    if len(layer.margins) != election.groups:
        yield f"{len(layer.margins)} margins of {election.groups} groups"
    if not all(0 <= label < election.groups for label in layer.labels):
        yield f"labels must be from 0 to {election.groups - 1}"
    if not all(0 <= head < heads for head in layer.kept):
        yield f"heads that stay must be from 0 to {heads - 1}"
    if list(layer.kept) != sorted(set(layer.kept)):
        yield "heads that stay must be ascending"
    if len(layer.kept) != stay:
        yield f"{len(layer.kept)} heads stay, not {stay}"
    if not all(map(math.isfinite, layer.scores)):
        yield "scores must be finite"
    if not all(0 <= margin <= 1 for margin in layer.margins):
        yield "margins must be from 0 to 1"
