"""Turn text into a tokenizer and token files: `python launch/prepare.py --input stdlib --output data/stdlib`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import os
import signal
from typing import TYPE_CHECKING

from data_pipeline.folder import check_output
from data_pipeline.prepare.sources import DOCUMENT_UNITS, ReadOptions, find_sources
from data_pipeline.prepare.tokenizer import SMALLEST_VOCABULARY
from data_pipeline.read.manifest import SPLITS
from launch.common import run_command, whole_number

if TYPE_CHECKING:
    from data_pipeline.prepare.prepare import PrepareOptions, Summary

VOCAB_SIZE = 8192
TOKENIZER_MEGABYTES = 32


def split_ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if len(ratios) != len(SPLITS) or not all(0 <= ratio < 1e9 for ratio in ratios) or sum(ratios) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers TRAIN,VALID,TEST, none negative, one above 0")
    return ratios


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="'stdlib' (the sources of Python's standard library), .txt, .jsonl, .jsonl.gz or .parquet files, "
        "a folder of these, or a folder written by Hugging Face save_to_disk",
    )
    output_help = "folder to create; it appears only once it is complete"
    add("--output", required=True, type=Path, metavar="FOLDER", default=argparse.SUPPRESS, help=output_help)
    add("--overwrite", action="store_true", help="replace prepared data at --output")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--vocab-size",
        type=whole_number(SMALLEST_VOCABULARY),
        default=VOCAB_SIZE,
        metavar="N",
        help="ids of the byte-level BPE that is trained on the train split",
    )
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="byte-level BPE tokenizer.json to use instead of training"
    )
    add(
        "--tokenizer-megabytes",
        type=whole_number(1),
        default=TOKENIZER_MEGABYTES,
        metavar="MB",
        help="most text the tokenizer is trained on, spread over all documents",
    )
    add(
        "--split",
        type=split_ratios,
        default="96,2,2",
        metavar="T,V,T",
        help="shares of train, valid, test by document; 0: none",
    )
    add(
        "--document",
        choices=DOCUMENT_UNITS,
        default="file",
        help="what one document of a .txt is; paragraphs end at blank lines",
    )
    add("--text-field", default="text", metavar="NAME", help="field or column with the text of .jsonl, .parquet, Hugging Face")
    add("--seed", type=whole_number(0), default=1234, metavar="N", help="which documents go to which split")
    cores = len(os.sched_getaffinity(0))
    add(
        "--workers", type=whole_number(1, 1024), default=cores, metavar="N", help="threads that encode; any number, same output"
    )
    arguments = parser.parse_args()
    if arguments.split[0] == 0 and arguments.tokenizer is None:
        parser.error("argument --split: a tokenizer is trained on TRAIN: make it above 0, or name a tokenizer with --tokenizer")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up as Ctrl-C does
    check_output(arguments.output, arguments.overwrite)
    find_sources(arguments.input)
    from data_pipeline.prepare.prepare import PrepareOptions, prepare  # imports torch: only once the arguments are sound

    options = PrepareOptions(
        inputs=tuple(arguments.input),
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        split=arguments.split,
        workers=arguments.workers,
        read=ReadOptions(arguments.document, arguments.text_field),
        seed=arguments.seed,
        tokenizer_bytes=arguments.tokenizer_megabytes * 1_000_000,
        overwrite=arguments.overwrite,
    )
    report(prepare(options), options)


def report(summary: "Summary", options: "PrepareOptions") -> None:
    manifest, megabytes = summary.manifest, summary.text_bytes / 1e6
    print(f"{'split':<6} {'documents':>12} {'tokens':>16} {'bytes/token':>12}")
    for name, split in manifest.splits.items():
        print(f"{name:<6} {split.documents:>12,} {split.tokens:>16,} {split.text_bytes / split.tokens:>12.3f}")
    print("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()))
    fewer = options.tokenizer is None and manifest.vocab_size < options.vocab_size
    print(f"tokenizer: {manifest.vocab_size:,} ids{' (too little text for more)' if fewer else ''}")
    rate = megabytes / summary.encode_seconds
    print(f"encoded {megabytes:,.1f} MB at {rate:.1f} MB/s with {options.workers} workers")
    print(f"written to {options.output}")


if __name__ == "__main__":
    run_command(main)
