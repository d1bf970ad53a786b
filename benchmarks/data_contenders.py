"""launch/prepare.py beside `datasets.map` with tokenizers, and one call of tokenizers a document: speed and peak memory.

Each contender is a command that turns the same .jsonl into uint16 ids with the same tokenizer; their ids must be equal. English
are help topics and docstrings, code the sources of installed packages. Chinese, if asked for, is a text of your own; on Debian:

    apt-get download manpages-zh && dpkg -x manpages-zh_*.deb zh
    find zh -path '*zh_CN*' -name '*.gz' | sort | xargs zcat | grep -v "^[.']" > zh.txt

Contenders run in turns. CPU seconds, of all processes of a command, are hardly changed by other work on the machine; wall-clock
seconds are. The memory of all processes together (PSS) is read ten times a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.prepare import peak_memory
from benchmarks.texts import prose
from data_pipeline.prepare.tokenizer import train
from launch.common import whole_number

PROJECT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 16384
SAMPLE = 1_000_000  # characters of each text that the tokenizer is trained on
DOCUMENT = 3000  # characters of a document of Chinese
FIGURES = ("wall_megabytes_a_second", "cpu_megabytes_a_second", "peak_megabytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=whole_number(1), default=32, help="size of each text (default: 32)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="rounds of each contender (default: 3)")
    parser.add_argument("--processes", type=whole_number(1), default=2, help="of prepare.py and of datasets (default: 2)")
    parser.add_argument("--chinese", type=Path, metavar="FILE", help="Chinese text, see above (default: none)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of each text and contender; what is measured is printed as it comes, a row of JSON for each command."""
    size = arguments.megabytes * 1_000_000
    texts = {"English": prose(size), "code": list(code(size))}
    if arguments.chinese is not None:
        texts["Chinese"] = list(parts(arguments.chinese.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(train([text for some in texts.values() for text in sample(some)], VOCAB_SIZE))
        measured: list[dict[str, Any]] = []
        for name, documents in texts.items():
            source = folder / f"{name}.jsonl"
            written = write(source, documents, size)
            for _ in range(arguments.rounds):
                measured += measure(name, source, written, tokenizer, folder, arguments.processes)
    return summary(measured)


def code(size: int) -> Iterator[str]:
    """Sources of the standard library and of installed packages."""
    for place in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(Path(place).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if size > 0 and text.strip():
                size -= len(text)
                yield text


def parts(text: str) -> Iterator[str]:
    """Documents of about DOCUMENT characters, cut between lines."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + DOCUMENT)
        stop = len(text) if stop < 0 else stop + 1
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop


def sample(documents: list[str]) -> list[str]:
    """Documents of about SAMPLE characters in total, from everywhere."""
    return documents[:: -(-sum(map(len, documents)) // SAMPLE)]


def write(path: Path, documents: list[str], size: int) -> float:
    """Write the documents as JSON lines, again and again with a number before them until they are `size` bytes; megabytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for turn in count():
            for text in documents:
                numbered = f"{turn} {text}" if turn else text
                file.write(json.dumps({"text": numbered}, ensure_ascii=False) + "\n")
                written += len(numbered.encode())
                if written >= size:
                    return written / 1e6
    raise AssertionError


def measure(
    text: str, source: Path, megabytes: float, tokenizer: Path, folder: Path, processes: int
) -> Iterator[dict[str, Any]]:
    """One round: each contender once."""
    python, ids = sys.executable, [folder / "datasets.bin", folder / "loop.bin"]
    ours = ["--input", source, "--tokenizer", tokenizer, "--output", folder / "out", "--split", "1,0,0", "--overwrite"]
    commands: dict[str, list[object]] = {
        "prepare.py": [python, PROJECT / "launch/prepare.py", *ours, "--workers", processes],
        "datasets.map": [python, PROJECT / "benchmarks/bare_datasets.py", source, tokenizer, ids[0], processes],
        "one call a document": [python, PROJECT / "benchmarks/bare_encode.py", source, tokenizer, ids[1]],
    }
    for name, command in commands.items():
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        peak = peak_memory(process)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"error: {name} ended with status {process.returncode}: {process.stderr.read().decode()}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        figures = (megabytes / seconds, megabytes / cpu, peak / 1e6)
        row = {"text": text, "megabytes": megabytes, "contender": name} | dict(zip(FIGURES, figures, strict=True))
        print(json.dumps(row), flush=True)
        yield row
    if len({file.read_bytes() for file in (folder / "out" / "train.bin", *ids)}) > 1:
        raise SystemExit(f"error: contenders do not give the same ids of {text}")


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, and how many times the speed and the memory of prepare.py they are."""
    found: list[dict[str, Any]] = []
    for text in dict.fromkeys(row["text"] for row in measured):
        for contender in dict.fromkeys(row["contender"] for row in measured):
            these = [row for row in measured if (row["text"], row["contender"]) == (text, contender)]
            row = {"text": text, "megabytes": these[0]["megabytes"], "contender": contender, "rounds": len(these)}
            row |= {figure: median(one[figure] for one in these) for figure in FIGURES}
            ours = row if contender == "prepare.py" else next(one for one in found if one["text"] == text)
            ratios = {f"of_prepare_{figure}": row[figure] / ours[figure] for figure in FIGURES}
            found.append(row | ratios)
    return found
