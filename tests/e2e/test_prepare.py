"""launch/prepare.py as its users run it: killed and run again, stopped, twice at once, on several machines, checked."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment, run, wait_until

# The command with small pieces, so that a few megabytes are many blocks.
SMALL = (
    "import runpy, sys; sys.path.insert(0, '.'); from data_pipeline.prepare import blocks, lines;"
    "blocks.PIECE_BYTES = lines.PIECE_BYTES = 60_000; sys.argv[0] = 'launch/prepare.py';"
    "runpy.run_path('launch/prepare.py', run_name='__main__')"
)
OPTIONS = ("--vocab-size", "400", "--document", "line", "--workers", "2", "--deduplicate")


@contextmanager
def started(*arguments: str, small: bool = True) -> Iterator[subprocess.Popen[str]]:
    script = ["-c", SMALL] if small else ["launch/prepare.py"]
    command = [sys.executable, *script, *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(*arguments: str) -> str:
    with started(*arguments) as process:
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output + errors


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randrange(2, 9))) for _ in range(2000)]
    rows = [" ".join(draw.choice(words) for _ in range(40)) for _ in range(5000)]
    (folder / "text.txt").write_text("\n".join([*rows, *rows[:500]]))
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    finish("--input", str(corpus / "text.txt"), "--output", str(corpus / "whole"), *OPTIONS)
    return corpus / "whole"


def given(whole: Path) -> tuple[str, ...]:
    """OPTIONS with the tokenizer that they train, which spares a pass over the input."""
    return "--tokenizer", str(whole / "tokenizer.json"), *OPTIONS[2:]


def has_blocks(folder: Path, count: int) -> bool:
    return folder.is_dir() and len(list(folder.glob("*.npz"))) >= count


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_killed_and_run_again_gives_the_same_bytes(corpus: Path, whole: Path, tmp_path: Path) -> None:
    command = ("--input", str(corpus / "text.txt"), "--output", str(tmp_path / "out"), *OPTIONS)
    blocks = tmp_path / ".out.partial" / "blocks"
    for enough in (1, 5):
        with started(*command) as process:
            wait_until(partial(has_blocks, blocks, enough))
            process.kill()
    assert 5 <= len(list(blocks.glob("*.npz"))) < 25
    assert not (tmp_path / "out").exists()
    assert f"resuming from {tmp_path}/.out.partial" in finish(*command)
    assert contents(tmp_path / "out") == contents(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_stopped_with_work_done_keeps_it_and_says_so(corpus: Path, whole: Path, tmp_path: Path) -> None:
    command = ("--input", str(corpus / "text.txt"), "--output", str(tmp_path / "out"), *given(whole))
    blocks = tmp_path / ".out.partial" / "blocks"
    with started(*command) as process:
        wait_until(partial(has_blocks, blocks, 2))
        process.send_signal(signal.SIGSTOP)
        second = run(["launch/prepare.py", *command])
        assert second.returncode == 1
        assert f"another command is preparing it now (process {process.pid} on " in second.stderr
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    other = run(["launch/prepare.py", *command, "--seed", "7"])
    assert other.returncode == 1
    assert "holds unfinished work with other inputs or options: --seed; give the same" in other.stderr
    finish(*command)
    assert contents(tmp_path / "out") == contents(whole)


def test_text_without_spaces_stops_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    draw = random.Random(1)
    (tmp_path / "dna.txt").write_text("".join(draw.choices("ACGT", k=10_000_000)))
    with started("--input", str(tmp_path / "dna.txt"), "--output", str(tmp_path / "out"), small=False) as process:
        time.sleep(4)  # reading, training or encoding, by the speed of the machine
        assert process.poll() is None
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - before < 5
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["dna.txt"]


def test_shards_merge_and_check(corpus: Path, whole: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "one", tmp_path / "two"]
    for number, shard in enumerate(shards, start=1):
        text = finish("--input", str(corpus / "text.txt"), "--output", str(shard), *given(whole), "--shard", f"{number}/2")
        assert f"shard {number} of 2: " in text
    merged = run(["launch/prepare.py", "merge", *map(str, shards), "--output", str(tmp_path / "out")])
    assert merged.returncode == 0, merged.stderr
    assert "500 duplicate" in merged.stdout
    assert contents(tmp_path / "out") == contents(whole)
    sound = run(["launch/prepare.py", "check", str(tmp_path / "out"), str(whole)])
    assert (sound.returncode, sound.stdout) == (0, f"{tmp_path}/out: sound\n{whole}: sound\n")
    (tmp_path / "out" / "valid.idx").unlink()
    faulty = run(["launch/prepare.py", "check", str(tmp_path / "out"), str(shards[0]), str(whole)])
    assert faulty.returncode == 1
    assert "valid.idx is missing" in faulty.stdout
    assert "has no manifest.json" in faulty.stdout
    assert faulty.stdout.endswith(f"{whole}: sound\n")
    assert faulty.stderr == "error: 2 faults found\n"


def test_what_is_left_out_and_skipped_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"text": f"some text {number}"}) for number in range(50)]
    (tmp_path / "in" / "a.JSONL").write_text("\n".join([*rows, '{"text": " "}', '{"text": null}']))
    (tmp_path / "in" / "notes.md").write_text("x")
    folders = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = run(["launch/prepare.py", *folders, "--vocab-size", "300", "--split", "8,1,1"])
    assert done.returncode == 0, done.stderr
    assert f"1 file of other kinds left out: {tmp_path}/in/notes.md" in done.stderr
    empty = f"2 empty: {tmp_path}/in/a.JSONL:51, {tmp_path}/in/a.JSONL:52"
    assert f"skipped:   0 not UTF-8\n           {empty}\n" in done.stdout
