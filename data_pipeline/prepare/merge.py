"""Join the shards that several machines have prepared into one folder, byte-identical to what one machine prepares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.folder import SHARD, check_output
from data_pipeline.prepare.assemble import Recipe, assemble
from data_pipeline.prepare.blocks import Skips
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.minhash import Resemblance
from data_pipeline.prepare.sources import Source
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.prepare.unfinished import BLOCKS, IDENTITY, unfinished
from data_pipeline.prepare.work import block_file
from data_pipeline.read.manifest import TOKENIZER, Manifest


def merge(shards: Sequence[Path], output: Path, overwrite: bool) -> tuple[Manifest, Skips]:
    """Write `output`. UserError unless `shards` are all of one input, each once."""
    check_output(output, overwrite)
    found = {shard: _read(shard) for shard in shards}
    _check_together(found)
    first = found[shards[0]]
    machines = len(shards)
    by_number = {tree["shard"][0]: shard for shard, tree in found.items()}
    files = [block_file(by_number[number % machines + 1] / BLOCKS, number) for number in range(first["blocks"])]
    missing = [file.path for file in files if not file.exists()]
    if missing:
        raise UserError(f"{missing[0]}: is missing, and {len(missing) - 1} other blocks; copy the shard again")
    tokenizer = Tokenizer.load(shards[0] / TOKENIZER)
    with unfinished(output, {"merge of": [str(shard) for shard in shards]}, overwrite) as folder:
        manifest, skips = assemble(folder.new_folder(), files, _recipe(first), tokenizer)
        folder.place_finished(overwrite)
    return manifest, skips


def _read(shard: Path) -> dict[str, Any]:
    """What a shard says of itself."""
    try:
        identity = json.loads((shard / IDENTITY).read_bytes())
        return {**identity, **json.loads((shard / SHARD).read_bytes()), "tokenizer": Tokenizer.load(shard / TOKENIZER).sha256}
    except OSError as error:
        raise UserError(f"{shard}: is no shard that launch/prepare.py --shard has written ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{shard}: is damaged; copy it again") from error


def _check_together(found: dict[Path, dict[str, Any]]) -> None:
    """UserError unless the shards are of one input, with the same options and tokenizer, and none is missing or twice there."""
    first = next(iter(found))
    for shard, tree in found.items():
        for key in ("recipe", "tokenizer", "version", "blocks", "input files"):
            if _comparable(tree, key) != _comparable(found[first], key):
                raise UserError(f"{shard}: differs from {first} in: {key}; prepare all shards from the same input and options")
    machines = found[first]["shard"][1]
    numbers = sorted(tree["shard"][0] for tree in found.values())
    if any(tree["shard"][1] != machines for tree in found.values()) or numbers != list(range(1, machines + 1)):
        given = ", ".join(f"{tree['shard'][0]}/{tree['shard'][1]}" for tree in found.values())
        raise UserError(f"merge needs the shards 1/{machines} to {machines}/{machines}, each once; given: {given}")


def _comparable(tree: dict[str, Any], key: str) -> Any:
    """Without the times at which files were changed: each machine may have its own copies."""
    return [[file[:2] for file in files] for files in tree[key]] if key == "input files" else tree[key]


def _recipe(tree: dict[str, Any]) -> Recipe:
    recipe = tree["recipe"]
    sources = tuple(Source(path, kind, ()) for path, kind in recipe["sources"])
    near = recipe["near_duplicates"]
    return Recipe(
        sources,
        ReadOptions(**recipe["read"]),
        tuple(recipe["split"]),
        recipe["seed"],
        recipe["deduplicate"],
        None if near is None else Resemblance(**near),
    )
