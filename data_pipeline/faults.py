"""What is wrong with the data of a configuration: cheap checks, before torch is imported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from configs.schema import DataConfig, Fault, ModelConfig, RunConfig, Section, TrainingConfig, ValidationConfig
from data_pipeline.mix.plan import Plan
from data_pipeline.read.bounds import Bounds
from data_pipeline.read.manifest import TOKENIZER, Manifest, manifest_or_reason, manifest_sha256, read_manifest
from data_pipeline.read.open_files import lacking_files
from data_pipeline.read.orders import Wanted, order_faults
from data_pipeline.read.sound import folder_faults, sampled

Found = dict[str, tuple[str, Manifest]]  # field → folder and manifest of a source that can be read
Orders = list[
    tuple[str, Wanted, Manifest]
]  # field of a folder, and the samples that the run takes of a split whose files are sound


def data_faults(sections: Mapping[str, Section], splits: Sequence[str] = ("train", "valid")) -> list[Fault]:
    """Faults of `data` and `validation.sets`, checked against those `sections` that are valid by themselves.

    Every source needs the split `train`, and one of them each of the others; `valid` is not needed where sets are named. Reads
    small files whole, and of large ones a sample.
    """
    data, model, training, run = (sections.get(name) for name in ("data", "model", "training", "run"))
    if not isinstance(data, DataConfig) or list(data.faults()):
        return []
    validation = sections.get("validation")
    sets = validation.sets if isinstance(validation, ValidationConfig) else {}
    splits = [split for split in splits if split != "valid" or not sets]
    keys = ["data.path"] if data.path is not None else [f"data.sources[{number}].path" for number in range(len(data.sources))]
    faults: list[Fault] = []
    found: Found = {}
    orders: Orders = []
    for key, source in zip(keys, data.parts, strict=True):
        manifest = manifest_or_reason(Path(source.path))
        if isinstance(manifest, str):
            faults.append(Fault(key, source.path, manifest))
            continue
        found[key] = source.path, manifest
        has = [split for split in splits if split == "train" or manifest.has(split) or len(keys) == 1]
        own = [Fault(key, source.path, reason) for reason in folder_faults(source.path, manifest, has)]
        own += _split_faults(key, source.path, manifest, has, data)
        faults += own
        if not own:
            seeds = {"train": run.seed if isinstance(run, RunConfig) else None}
            orders += _orders(key, source.path, manifest, {split: seeds.get(split, 0) for split in has}, data)
    faults += _faults_between(found, splits, complete=len(found) == len(keys))
    if not faults and found and isinstance(training, TrainingConfig) and data.max_epochs is not None:
        faults += _epoch_faults(data, training)
    if isinstance(model, ModelConfig) and found:
        manifests = [manifest for _, manifest in found.values()]
        largest = max(manifest.vocab_size for manifest in manifests)
        faults += model_faults(model, largest, manifests[0].end_of_document)
    first = next(iter(found.values()), None)
    for name, path in sets.items():
        own = list(_set_faults(name, path, data, first))
        faults += own
        if not own:
            orders += _orders(f"validation.sets.{name}", path, read_manifest(path), {"valid": 0}, data)
    if reason := lacking_files(len(orders)):
        faults.append(Fault("data.sources", len(data.parts), reason))
    return [*faults, *_index_faults(orders), *_disk_faults(orders)]


def model_faults(model: ModelConfig, vocab_size: int, end_of_document: int) -> Iterator[Fault]:
    """What of the model does not fit the tokenizer, which has this size and this id."""
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        yield Fault("model.vocab_size", model.vocab_size, f"at least the tokenizer's size ({vocab_size}), or null")
    if model.end_of_document not in (None, end_of_document):
        yield Fault("model.end_of_document", model.end_of_document, f"the tokenizer's ({end_of_document}), or null")


def _orders(key: str, folder: str, manifest: Manifest, seeds: Mapping[str, int | None], data: DataConfig) -> Orders:
    """What the run takes of the splits of a sound folder, whose seeds are known."""
    length, packing = data.sequence_length, data.packing
    return [
        (key, Wanted.of(Path(folder), split, length, seed, packing), manifest)
        for split, seed in seeds.items()
        if seed is not None
    ]


def _index_faults(orders: Orders) -> Iterator[Fault]:
    """Of the orders of samples that earlier runs have left and this one reads."""
    for key, wanted, manifest in orders:
        lengths = Bounds.of(wanted.folder / f"{wanted.split}.idx", manifest.splits[wanted.split].documents).lengths
        for place in wanted.there():
            try:
                reasons = [
                    f"is damaged ({reason}); delete it, it is built again" for reason in order_faults(place, lengths, sampled)
                ]
            except OSError as error:
                reasons = [f"cannot be read: {error.strerror}"]
            if place.is_dir():  # else another run has just deleted it
                yield from (Fault(key, str(wanted.folder), f"index/{place.name} {reason}") for reason in reasons)


def _disk_faults(orders: Orders) -> Iterator[Fault]:
    """Rank 0 writes an index of the first epoch where there is none."""
    needed: dict[int, list[tuple[str, Path, int]]] = {}  # by disk
    for key, wanted, manifest in orders:
        if not wanted.there():
            disk = wanted.folder.stat().st_dev
            needed.setdefault(disk, []).append((key, wanted.folder, wanted.bytes(manifest)))
    for parts in needed.values():
        (key, folder, _), bytes_needed = parts[0], sum(size for *_, size in parts)
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            room = f"its disk has {free / 1e6:,.1f} MB left, the order of samples in index/ needs {bytes_needed / 1e6:,.1f} MB"
            yield Fault(key, str(folder), f"{room}; free some")


def _set_faults(name: str, folder: str, data: DataConfig, source: tuple[str, Manifest] | None) -> Iterator[Fault]:
    """Faults of the validation set `name`; `source` is one that the run trains on, if there is one that can be read."""
    key, manifest, length = f"validation.sets.{name}", manifest_or_reason(Path(folder)), data.sequence_length
    if isinstance(manifest, str):
        yield Fault(key, folder, manifest)
        return
    for reason in folder_faults(folder, manifest, ["valid"]):
        yield Fault(key, folder, reason)
    if source is not None and manifest.tokenizer_sha256 != source[1].tokenizer_sha256:
        reason = f"prepared with another tokenizer than {source[0]}"
        yield Fault(key, folder, f"{reason}; prepare it with --tokenizer {source[0]}/{TOKENIZER}")
    if not manifest.has("valid"):
        yield Fault(key, folder, "has no documents in split valid; give it a share in --split of launch/prepare.py")
    elif (tokens := manifest.splits["valid"].tokens) <= length and data.packing != "best_fit":
        reason = f"its split valid has {tokens} tokens, too few for data.sequence_length ({length}) + 1"
        yield Fault(key, folder, f"{reason}; prepare more text")


def _split_faults(key: str, folder: str, manifest: Manifest, splits: Sequence[str], data: DataConfig) -> Iterator[Fault]:
    length = data.sequence_length
    for split in splits:
        if not manifest.has(split):
            yield Fault(key, folder, f"has no documents in split {split}; give it a share in --split of launch/prepare.py")
        elif (tokens := manifest.splits[split].tokens) <= length and data.packing != "best_fit":
            where = "" if key == "data.path" else f" of {folder}"
            reason = f"at most {tokens - 1}: split {split}{where} has {tokens} tokens; or prepare more text"
            yield Fault("data.sequence_length", length, reason)


def _faults_between(found: Found, splits: Sequence[str], complete: bool) -> Iterator[Fault]:
    """What keeps sources from being mixed."""
    if len(found) < 2:
        return
    (first, one), *_ = found.values()
    known: dict[str, str] = {}  # the tokens of a train split → whose they are
    for key, (folder, manifest) in found.items():
        if (manifest.tokenizer_sha256, manifest.end_of_document) != (one.tokenizer_sha256, one.end_of_document):
            reason = f"prepared with another tokenizer than {first}; prepare it with --tokenizer {first}/{TOKENIZER}"
            yield Fault(key, folder, reason)
        tokens = manifest.splits["train"].bin.sha256 if manifest.has("train") else manifest_sha256(folder)
        if tokens in known:
            reason = f"has the same text as {known[tokens]}, whose samples would come twice; give that one more weight"
            yield Fault(key, folder, reason)
        known.setdefault(tokens, folder)
    for split in splits:
        if complete and not any(manifest.has(split) for _, manifest in found.values()):
            yield Fault("data.sources", list(found), f"none has documents in split {split}; give one a share in --split")


def _epoch_faults(data: DataConfig, training: TrainingConfig) -> Iterator[Fault]:
    for use in Plan.of(data, training).usage(training.steps):
        if data.max_epochs is not None and use.epochs > data.max_epochs:
            often = f"{use.label} would be used {use.epochs:.2f} times in {training.steps:,} steps"
            yield Fault("data.max_epochs", data.max_epochs, f"{often}; give it less weight, or train fewer steps")
