"""What differs between two checkpoints of any layouts: configuration, state of the run, each tensor. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from configs.load import flat_fields
from data_pipeline.prepare.progress import ByteProgress
from pretrain.checkpoints.folder import CONFIG, ENGINE_FOLDER, STATE, read_config, read_marker, read_state
from pretrain.checkpoints.storage import Place
from pretrain.checkpoints.tools.tensors import Array, Figures, Tensors
from pretrain.checkpoints.tools.words import shape_words, table


@dataclass(frozen=True)
class Differs:
    """A tensor that is in both checkpoints with the same shape."""

    key: str
    shape: tuple[int, ...]
    absolute: float  # norm of the difference
    relative: float  # of that of the first checkpoint's tensor
    largest: float  # of a single value


def diff(first: Place, second: Place, top: int | None) -> list[str]:
    """What differs, as lines for people; empty if nothing does. At most `top` tensors of each kind."""
    lines = [*_facts(first, second), *_files(first, second)]
    before, after = Tensors(first / ENGINE_FOLDER), Tensors(second / ENGINE_FOLDER)
    lines += _unlike(before, after, top)
    both = sorted(key for key, entry in before.index.tensors.items() if _like(after, key, entry.shape))
    with ByteProgress("compare", 2 * sum(before.bytes(key) for key in both)) as progress:
        for kind in sorted({key.partition("/")[0] for key in both}):
            of_kind = [key for key in both if key.partition("/")[0] == kind]
            compared = [compare(before, after, key, progress) for key in of_kind]
            lines += _ranked(kind, [differs for differs in compared if differs.absolute != 0], len(of_kind), top)
    return lines


def compare(before: Tensors, after: Tensors, key: str, progress: ByteProgress) -> Differs:
    """One tensor of both; a block of rows of each is in memory at a time."""
    old, difference = Figures(), Figures()
    for (_, a), (_, b) in zip(before.blocks(key), after.blocks(key), strict=True):
        old.add(a)
        difference.add(np.abs(_wide(b) - _wide(a)))
        progress.advance(2 * a.nbytes)
    relative = difference.norm / old.norm if old.norm else np.inf
    return Differs(key, before.index.tensors[key].shape, difference.norm, relative, difference.greatest)


def _wide(block: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return block.astype(np.float64)


def _facts(first: Place, second: Place) -> Iterator[str]:
    """Fields of config.yaml and state.json."""
    configs = [dict(flat_fields(read_config(folder, checks=()))) for folder in (first, second)]
    states = [asdict(read_state(folder)) for folder in (first, second)]
    for state in states:
        state |= {f"scalars.{name}": value for name, value in state.pop("scalars").items()}
        merged = state.pop("merged")
        state["weights"] = " + ".join(f"{one['weight']:.6g} × {one['checkpoint']}" for one in merged) or "trained"
    for file, (old, new) in ((CONFIG, configs), (STATE, states)):
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                yield f"{file}  {name}: {old.get(name)!r}, {new.get(name)!r}"


def _files(first: Place, second: Place) -> Iterator[str]:
    """Files that hold neither tensors nor what `_facts` compares, by their hashes."""
    before, after = (
        {
            name: record
            for name, record in read_marker(folder).files.items()
            if name not in (CONFIG, STATE) and not name.startswith(f"{ENGINE_FOLDER}/")
        }
        for folder in (first, second)
    )
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}  {_where(name in before, name in after)}"


def _unlike(before: Tensors, after: Tensors, top: int | None) -> Iterator[str]:
    """Tensors that cannot be compared."""
    old, new = before.index.tensors, after.index.tensors
    found: dict[str, list[str]] = {}
    for key in sorted(old.keys() | new.keys()):
        if key not in old or key not in new:
            found.setdefault(key.partition("/")[0], []).append(f"{key}  {_where(key in old, key in new)}")
        elif old[key].shape != new[key].shape:
            shapes = f"{shape_words(old[key].shape)}, {shape_words(new[key].shape)}"
            found.setdefault(key.partition("/")[0], []).append(f"{key}  {shapes}")
    for lines in found.values():
        yield from lines[:top]
        yield from _more(len(lines) - len(lines[:top]))


def _where(first: bool, second: bool) -> str:
    return "differs" if first and second else f"only in the {'first' if first else 'second'}"


def _like(after: Tensors, key: str, shape: tuple[int, ...]) -> bool:
    entry = after.index.tensors.get(key)
    return entry is not None and entry.shape == shape


def _ranked(kind: str, compared: list[Differs], count: int, top: int | None) -> list[str]:
    """The largest relative differences first; what is no number before all others."""
    if not compared:
        return []
    compared.sort(key=lambda differs: (not np.isnan(differs.relative), -differs.relative))
    rows = [
        [differs.key, shape_words(differs.shape), *(f"{x:.6g}" for x in (differs.absolute, differs.relative, differs.largest))]
        for differs in compared[:top]
    ]
    return [
        "",
        f"{kind}: {len(compared)} of {count} tensors differ",
        *table(["tensor", "shape", "|A-B|", "|A-B|/|A|", "largest"], rows, right="|A-B| |A-B|/|A| largest").splitlines(),
        *_more(len(compared) - len(rows)),
    ]


def _more(count: int) -> list[str]:
    return [f"and {count:,} more; --top shows more"] if count else []
