"""Turn text into a folder with tokenizer, token files in Megatron's indexed format, token counts and manifest.

A first pass over the input collects the text that trains the tokenizer; a given tokenizer skips it. The second pass encodes
blocks of the input in several processes, each into a file. The folder is made of these files. The same input and options give
the same bytes, whatever the number of workers or of machines, and however often the command was killed and run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from configs.durable import write_text
from configs.errors import UserError
from data_pipeline.folder import SHARD, check_output
from data_pipeline.prepare.assemble import Recipe, assemble, tool_version
from data_pipeline.prepare.blocks import BLOCK_FORMAT, Block, BlockFile, Skips, cut_blocks
from data_pipeline.prepare.documents import ReadOptions, Skipped
from data_pipeline.prepare.files import is_address
from data_pipeline.prepare.minhash import Resemblance
from data_pipeline.prepare.pieces import PIECE_BYTES
from data_pipeline.prepare.pool import in_order
from data_pipeline.prepare.progress import ByteProgress
from data_pipeline.prepare.sources import find_sources
from data_pipeline.prepare.splitting import Sample
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.prepare.tokenizer_files import check_conversion
from data_pipeline.prepare.unfinished import Unfinished, unfinished
from data_pipeline.prepare.work import Encoding, Reading, Sampling, Training, block_file
from data_pipeline.read.manifest import TOKENIZER, Manifest

AGREEMENT_CHARACTERS = 500_000  # of the user's own text, for which tiktoken must give the ids of tokenizers
_LONGEST = 20_000  # characters of one document in it


@dataclass(frozen=True)
class PrepareOptions:
    inputs: tuple[str, ...]
    output: Path
    vocab_size: int = 8192
    tokenizer: Path | None = None  # if given, none is trained
    tiktoken_pattern: str | None = None  # how a tiktoken file splits words, if that is not known
    special_tokens: tuple[str, ...] = ()  # added as the last ids
    split: tuple[float, float, float] = (96, 2, 2)
    workers: int = 0  # processes; 0: all in this one
    read: ReadOptions = field(default_factory=ReadOptions)
    seed: int = 1234
    tokenizer_bytes: int = 32_000_000  # most text the tokenizer is trained on
    overwrite: bool = False
    deduplicate: bool = False
    near_duplicates: float | None = None  # documents at least so similar to an earlier one are left out
    shard: tuple[int, int] | None = None  # this machine's number, from 1, and how many there are


@dataclass(frozen=True)
class Summary:
    manifest: Manifest | None  # None of a shard
    skips: Skips
    engine: str  # the library that encoded
    vocab_size: int
    blocks: tuple[int, int]  # those that this command is for, and all of the input
    text_bytes: int  # encoded by this command, without what an earlier one did
    encode_seconds: float  # duration of the second pass: read and encode
    keeps_lines: bool  # whether the tokenizer tells line ends from spaces


def prepare(options: PrepareOptions) -> Summary:
    """Write `options.output`. UserError for unusable input, a split without documents, or a folder that cannot be written."""
    try:
        check_output(options.output, options.overwrite)
    except UserError:
        Unfinished(options.output, {}).tidy_up()
        raise
    sources = tuple(find_sources(options.inputs))
    resemblance = None if options.near_duplicates is None else Resemblance.of(options.near_duplicates)
    given = None
    if options.tokenizer is not None:
        given = Tokenizer.load(options.tokenizer, options.tiktoken_pattern, options.special_tokens)
    reading = Reading(sources, options.read, options.split, options.seed)
    if options.tokenizer is not None and given is not None:
        check_conversion(options.tokenizer, given.encode, _own_text(reading))
    recipe = Recipe(sources, options.read, options.split, options.seed, options.deduplicate, resemblance)
    with unfinished(options.output, identity(options, recipe, given), options.overwrite) as folder:
        tokenizer = given or _trained(folder, reading, options)
        write_text(folder.path / TOKENIZER, tokenizer.text)
        fast = tokenizer.engine == "tiktoken" and tokenizer.agrees_on(_own_text(reading))
        started = monotonic()
        encoding = Encoding(reading, folder.blocks, tokenizer.text, fast, resemblance)
        size, numbers, blocks = _encode(encoding, options)
        seconds = monotonic() - started
        files = [block_file(folder.blocks, number) for number in numbers]
        if options.shard is not None:
            manifest, skips = None, _skips_of(files, options.read)
            write_text(folder.path / SHARD, json.dumps({"blocks": blocks, "recipe": recipe_tree(recipe)}) + "\n")
            folder.place_all(options.overwrite)
        else:
            manifest, skips = assemble(folder.new_folder(), files, recipe, tokenizer)
            folder.place_finished(options.overwrite)
    engine = "tiktoken" if fast else "tokenizers"
    keeps_lines = "\n" in tokenizer.decode(tokenizer.encode("a\nb"))
    return Summary(manifest, skips, engine, tokenizer.vocab_size, (len(files), blocks), size, seconds, keeps_lines)


def identity(options: PrepareOptions, recipe: Recipe, given: Tokenizer | None) -> dict[str, Any]:
    """What decides the bytes of every block and of the output, in the form in which it is compared with earlier commands'."""
    files = [[[_printable(file.path), file.size, _changed(file.path)] for file in source.files] for source in recipe.sources]
    trained = {"vocab_size": options.vocab_size, "bytes": options.tokenizer_bytes, "special": options.special_tokens}
    return {
        "input files": files,
        **_by_option(recipe_tree(recipe)),
        "tokenizer": trained if given is None else given.sha256,
        "shard": options.shard,
        "version": [tool_version(), PIECE_BYTES, BLOCK_FORMAT],
    }


def _by_option(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `recipe_tree` gave, by the options of the command, which messages name."""
    fields = {name: value for name, value in tree.items() if name not in ("sources", "read")} | tree["read"]
    return {"--input": tree["sources"]} | {f"--{name.replace('_', '-')}": value for name, value in fields.items()}


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """What `merge` must know of the command, beside the blocks."""
    return {
        "sources": [[_printable(source.path), source.kind] for source in recipe.sources],
        "read": asdict(recipe.read),
        "split": recipe.split,
        "seed": recipe.seed,
        "deduplicate": recipe.deduplicate,
        "near_duplicates": None if recipe.resemblance is None else asdict(recipe.resemblance),
    }


def _printable(path: str) -> str:
    """A path may hold bytes that are not UTF-8; JSON may not."""
    return path.encode(errors="backslashreplace").decode()


def _changed(path: str) -> int:
    """When a local file was last changed, in nanoseconds."""
    return 0 if is_address(path) or not Path(path).exists() else Path(path).stat().st_mtime_ns


def _trained(folder: Unfinished, reading: Reading, options: PrepareOptions) -> Tokenizer:
    """Train on a sample of the train split; an earlier command may have done so."""
    known = folder.path / TOKENIZER
    if known.is_file():
        return Tokenizer.load(known)
    sample = Sample(options.tokenizer_bytes, options.deduplicate)

    def tasks() -> Iterator[tuple[Block, int]]:
        for block in cut_blocks(reading.sources, reading.options):
            yield block, sample.bound

    with ByteProgress("read") as progress, closing(in_order(Sampling(reading), tasks(), options.workers)) as results:
        for size, found in results:
            progress.advance(size)
            sample.add(found)
    training = Training(options.vocab_size, options.seed, options.special_tokens)
    with closing(in_order(training, [sample.texts()], min(1, options.workers))) as trained:
        return Tokenizer(next(trained), TOKENIZER)


def _own_text(reading: Reading) -> Iterator[str]:
    """Documents from the beginning of the input, in short."""
    left = AGREEMENT_CHARACTERS
    for block in cut_blocks(reading.sources, reading.options):
        for record in reading.records(block):
            if isinstance(record.text, Skipped):
                continue
            text = record.text[: min(_LONGEST, left)]
            left -= len(text)
            yield text
            if left <= 0:
                return


def _encode(encoding: Encoding, options: PrepareOptions) -> tuple[int, list[int], int]:
    """Encode all blocks of this command that have no file yet: bytes of text, numbers of its blocks, blocks of the input."""
    numbers: list[int] = []
    blocks = 0
    number, machines = options.shard or (1, 1)

    def tasks() -> Iterator[Block]:
        nonlocal blocks
        for block in cut_blocks(encoding.reading.sources, encoding.reading.options):
            blocks += 1
            if block.number % machines == number - 1:
                numbers.append(block.number)
                if not block_file(encoding.folder, block.number).exists():
                    yield block

    done = 0
    with ByteProgress("encode") as progress, closing(in_order(encoding, tasks(), options.workers)) as results:
        for size in results:
            progress.advance(size)
            done += size
    return done, numbers, blocks


def _skips_of(files: list[BlockFile], read: ReadOptions) -> Skips:
    skips = Skips.of(read.reasons())
    for file in files:
        skips.extend(file.skips())
    return skips
