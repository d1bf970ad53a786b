"""Turn text into a tokenizer and token files: `python launch/prepare.py --input stdlib --output data/stdlib`.

`prepare.py merge SHARD… --output FOLDER` makes one folder of what several machines have prepared with --shard, and
`prepare.py check PATH…` checks the content of prepared folders, and of all that a run's configuration names;
`prepare.py inspect CONFIG --sample N` prints a sample of a run. Each has its own --help.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import os
import re
import signal
from collections.abc import Callable, Sequence
from functools import partial

from configs.errors import UserError
from configs.load import ConfigError, load_config, smallest_world
from configs.schema.training import LAST_SAMPLE, MaskedConfig, SpansConfig
from configs.words import counted
from data_pipeline.faults import data_faults
from data_pipeline.prepare.blocks import Skips
from data_pipeline.prepare.check import check_folders
from data_pipeline.prepare.documents import DOCUMENT_UNITS, ReadOptions
from data_pipeline.prepare.fast_encoding import PATTERNS
from data_pipeline.prepare.merge import merge
from data_pipeline.prepare.minhash import LOWEST, SHINGLE
from data_pipeline.prepare.prepare import PrepareOptions, Summary, prepare
from data_pipeline.prepare.sources import Source, find_sources
from data_pipeline.prepare.tokenizer import SMALLEST_VOCABULARY
from data_pipeline.read.manifest import SPLITS, Manifest
from launch.common import CHECKS, number, run_command, whole_number

VOCAB_SIZE = 8192
TOKENIZER_MEGABYTES = 32
NAMED = 5  # files that are left out


def split_ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if len(ratios) != len(SPLITS) or not all(0 <= ratio < 1e9 for ratio in ratios) or sum(ratios) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers TRAIN,VALID,TEST, none negative, one above 0")
    return ratios


def shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})/([1-9]\d{0,4})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4 to 4/4")
    return int(found[1]), int(found[2])


def special_tokens(text: str) -> tuple[str, ...]:
    """The names of the special tokens that objectives look for by default."""
    names: list[str] = []
    for part in text.split(","):
        sentinels = re.fullmatch(r"spans:([1-9]\d{0,3})", part)
        if part == "mask":
            names.append(MaskedConfig.model_fields["token"].default)
        elif sentinels:
            names += [SpansConfig.model_fields["sentinel"].default.format(number) for number in range(int(sentinels[1]))]
        else:
            raise argparse.ArgumentTypeError(f"{text!r} is not mask, spans:N (N from 1 to 9999) or mask,spans:N")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a part twice")
    return tuple(names)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="'stdlib' (the sources of Python's standard library), .txt, .jsonl, .json, .parquet or .arrow files (text and "
        "JSON also as .gz, .bz2, .xz, .zst), a folder or a pattern of these, a folder written by Hugging Face save_to_disk, "
        "an address that fsspec knows, such as s3://bucket/folder, or a data set of the hub as "
        "'hub:OWNER/NAME?name=CONFIG&split=SPLIT' (&streaming=no downloads it first)",
    )
    output_help = "folder to create; it appears only once it is complete"
    add("--output", required=True, type=Path, metavar="FOLDER", default=argparse.SUPPRESS, help=output_help)
    add("--overwrite", action="store_true", help="replace prepared data at --output, and discard unfinished work beside it")
    add_tokenizer(parser)
    add_documents(parser)
    add(
        "--split",
        type=split_ratios,
        default="96,2,2",
        metavar="T,V,T",
        help="shares of train, valid, test by document; 0: none",
    )
    add("--seed", type=whole_number(0), default=1234, metavar="N", help="which documents go to which split")
    cores = len(os.sched_getaffinity(0))
    workers_help = "processes that read and encode; any number, same output"
    add("--workers", type=whole_number(1, 1024), default=cores, metavar="N", help=workers_help)
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do the I-th of N shares, on one of N machines that see the same input; `prepare.py merge` joins them",
    )
    arguments = parser.parse_args(words)
    if arguments.split[0] == 0 and arguments.tokenizer is None:
        parser.error("argument --split: a tokenizer is trained on TRAIN: make it above 0, or name a tokenizer with --tokenizer")
    smallest = SMALLEST_VOCABULARY + len(arguments.special_tokens)
    if arguments.tokenizer is None and arguments.vocab_size < smallest:
        parser.error(f"argument --vocab-size: {arguments.vocab_size}, but with these --special-tokens at least {smallest}")
    return arguments


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--vocab-size",
        type=whole_number(SMALLEST_VOCABULARY),
        default=VOCAB_SIZE,
        metavar="N",
        help="ids of the byte-level BPE that is trained on the train split, with --special-tokens",
    )
    tokenizer.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="to use instead of training: a tokenizer.json, a folder of transformers with one, a tiktoken file "
        "or a SentencePiece model",
    )
    parser.add_argument(
        "--special-tokens",
        type=special_tokens,
        default=(),
        metavar="mask,spans:N",
        help="add what objectives need, as the last ids: the mask token, N sentinels, or both (default: none)",
    )
    pattern_help = "how a tiktoken file splits words; not needed for those of OpenAI, Llama 3 and Qwen"
    parser.add_argument("--tiktoken-pattern", choices=sorted(PATTERNS), help=pattern_help)
    parser.add_argument(
        "--tokenizer-megabytes",
        type=whole_number(1),
        default=TOKENIZER_MEGABYTES,
        metavar="MB",
        help="most text the tokenizer is trained on, spread over all documents",
    )


def add_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    unit_help = "what one document of a .txt is; paragraphs end at blank lines"
    add("--document", choices=DOCUMENT_UNITS, default="file", help=unit_help)
    text_help = "field or column with the text of all but .txt; a.b is field b of the object in field a"
    add("--text-field", default="text", metavar="NAME", help=text_help)
    add("--id-field", metavar="NAME", help="field or column that names a document in messages")
    add("--min-characters", type=whole_number(0), default=0, metavar="N", help="skip shorter documents")
    add("--max-characters", type=whole_number(1), metavar="N", help="skip longer documents")
    add("--deduplicate", action="store_true", help="keep only the first of documents with equal text")
    near_help = f"skip documents that resemble an earlier one: at least this share of all runs of {SHINGLE} words is in both"
    add("--near-duplicates", type=number(LOWEST, 1), metavar="X", help=f"{near_help}, such as 0.8")


def make(words: Sequence[str]) -> None:
    arguments = parse_arguments(words)
    for source in find_sources(arguments.input):
        say_what_is_left_out(source)
    read = ReadOptions(
        arguments.document,
        arguments.text_field,
        arguments.id_field,
        arguments.min_characters,
        arguments.max_characters,
    )
    options = PrepareOptions(
        inputs=tuple(arguments.input),
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        tiktoken_pattern=arguments.tiktoken_pattern,
        special_tokens=arguments.special_tokens,
        split=arguments.split,
        workers=arguments.workers,
        read=read,
        seed=arguments.seed,
        tokenizer_bytes=arguments.tokenizer_megabytes * 1_000_000,
        overwrite=arguments.overwrite,
        deduplicate=arguments.deduplicate,
        near_duplicates=arguments.near_duplicates,
        shard=arguments.shard,
    )
    report(prepare(options), options)


def say_what_is_left_out(source: Source) -> None:
    if source.left_out:
        named = ", ".join(source.left_out[:NAMED]) + (" …" if len(source.left_out) > NAMED else "")
        count = counted(len(source.left_out), "file")
        print(f"--input {source.path}: {count} of other kinds left out: {named}", file=sys.stderr)


def report(summary: Summary, options: PrepareOptions) -> None:
    if summary.manifest is not None:
        report_splits(summary.manifest)
    report_skips(summary.skips)
    fewer = options.tokenizer is None and summary.vocab_size < options.vocab_size
    print(f"tokenizer: {summary.vocab_size:,} ids{' (too little text for more)' if fewer else ''}, run by {summary.engine}")
    if not summary.keeps_lines:
        print("           it turns line ends into spaces: code and lists lose their lines (docs/data.md)")
    megabytes = summary.text_bytes / 1e6
    rate = megabytes / summary.encode_seconds
    print(f"encoded {megabytes:,.1f} MB at {rate:.1f} MB/s with {options.workers} workers")
    if options.shard is not None:
        own, machines = options.shard
        print(f"shard {own} of {machines}: {summary.blocks[0]:,} of {summary.blocks[1]:,} blocks")
    print(f"written to {options.output}")


def report_skips(skips: Skips) -> None:
    print("skipped:   " + "\n           ".join(skips.lines()))


def report_splits(manifest: Manifest) -> None:
    print(f"{'split':<6} {'documents':>12} {'tokens':>16} {'bytes/token':>12}")
    for name, split in manifest.splits.items():
        print(f"{name:<6} {split.documents:>12,} {split.tokens:>16,} {split.text_bytes / split.tokens:>12.3f}")


def merge_shards(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="prepare.py merge",
        description="Join what N machines have prepared with --shard 1/N to N/N: the same bytes as of one machine.",
    )
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD", help="the --output folders of all N commands")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared data at --output (default: refuse)")
    arguments = parser.parse_args(words)
    manifest, skips = merge(arguments.shards, arguments.output, arguments.overwrite)
    report_splits(manifest)
    report_skips(skips)
    print(f"written to {arguments.output}")


def check(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="prepare.py check",
        description="Check prepared folders: all files by their hashes, tokenizer, ids, documents, counts, room for indices. "
        "Of the configuration of a run, all that the run checks before it starts, and all folders that it names. "
        "--section.field=value overrides fields of it. All faults are named; the exit status is 1 if there are any.",
    )
    paths_help = "folders written by prepare.py, or YAML files of runs"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=paths_help)
    overrides, others = divided(words)
    arguments, rest = parser.parse_known_args(others)
    faults, folders = 0, dict.fromkeys(path for path in arguments.paths if not path.is_file())
    configs = [path for path in arguments.paths if path.is_file()]
    refuse(parser, [*rest, *([] if configs else overrides)])
    for path in configs:
        world_size = smallest_world(str(path), overrides)
        try:
            config, found = load_config(str(path), overrides, CHECKS, world_size), []
        except ConfigError as error:
            config, found = load_config(str(path), overrides, world_size=world_size), error.faults
        faults += say(str(path), list(map(str, found)))
        named = [*(source.path for source in config.data.parts), *config.validation.sets.values()]
        folders |= dict.fromkeys(Path(folder) for folder in named if Path(folder).is_dir())  # of others the run's faults tell
    for folder, reasons in check_folders(folders):
        faults += say(str(folder), reasons)
    if faults:
        raise UserError(f"{counted(faults, 'fault')} found")


def say(name: str, faults: Sequence[str]) -> int:
    print("\n  ".join([f"{name}:", *faults]) if faults else f"{name}: sound", flush=True)
    return len(faults)


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides such as --data.path=DATA, and all else. (argparse takes one with a space in its value for a path.)"""
    overrides = [word for word in words if re.match(r"--(\w+\.\w[^=]*|backend)=", word)]
    return overrides, [word for word in words if word not in overrides]


def refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End with an error for arguments that are no overrides, or have no configuration to override."""
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (an override is written --section.field=value)")


def inspect(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="prepare.py inspect",
        description="Print a training sample of a run: which step takes it, its source, documents and text. "
        "--section.field=value overrides fields of CONFIG.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    sample = whole_number(0, LAST_SAMPLE)
    parser.add_argument("--sample", required=True, type=sample, metavar="N", help="its number, as in skipped_samples")
    overrides, others = divided(words)
    arguments, rest = parser.parse_known_args(others)
    refuse(parser, rest)
    world_size = smallest_world(arguments.config, overrides)
    config = load_config(arguments.config, overrides, checks=[partial(data_faults, splits=["train"])], world_size=world_size)
    from data_pipeline.prepare.inspect import inspected  # imports torch: only once the configuration is sound

    print(inspected(config, arguments.sample))


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"check": check, "inspect": inspect, "merge": merge_shards}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up as Ctrl-C does
    words = sys.argv[1:]
    if words and words[0] in SUBCOMMANDS:
        SUBCOMMANDS[words[0]](words[1:])
    else:
        make(words)


if __name__ == "__main__":
    run_command(main)
