"""Runs on a stream: resumed on another number of ranks they are one run, and damage ends all ranks with the same error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from pretrain.inference import evaluate_checkpoint
from tests.helpers import TINY_RUN, metrics, numbers, run, train
from tests.unit.data_pipeline.stream.by_hand import json_lines, texts, write

STREAM = "{{input: [{0}], tokenizer: {1}, shards: 4, shuffle_documents: 5, workers: 2}}"


@pytest.fixture
def config(tmp_path: Path, prepared: Path) -> Path:
    """A run of six steps on five compressed files."""
    (tmp_path / "texts").mkdir()
    for number in range(5):
        write(tmp_path / "texts" / f"{number}.jsonl.zst", texts(12, number))
    path = tmp_path / "run.yaml"
    stream = f"{STREAM.format(tmp_path / 'texts', prepared)}, packing: documents"
    tiny = TINY_RUN.replace("samples: 5", f"samples: 5, sets: {{held_out: {prepared}}}")
    path.write_text(f"run: {{folder: {tmp_path / 'run'}}}\ndata: {{stream: {stream}, sequence_length: 16}}\n{tiny}")
    return path


def test_a_run_resumes_on_other_ranks_with_the_next_token(tmp_path: Path, prepared: Path, config: Path) -> None:
    command = ["launch/pretrain.py", "--config", str(config), "--checkpoint.every_steps=3"]
    result = run(command, processes=2)
    assert result.returncode == 0, result.stderr
    whole = metrics(tmp_path / "run")
    assert "end_of_document: 0" in (tmp_path / "run" / "config.yaml").read_text()
    assert "5 files (0.0 MB) in 4 streams, 2 workers a rank, blocks of 5 shuffled; sequence 16\n" in result.stdout
    names = ("step", "loss", "grad_norm")
    resumed = run([*command, "--resume=step:3"], processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(metrics(tmp_path / "run"), *names) == numbers(whole, *names)
    alone = train(config, "--resume=step:3")
    found, wanted = (torch.tensor(numbers(lines, *names)) for lines in (alone, whole))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)
    read = ("step", "data/documents", "data/bytes", "data/epochs")
    assert numbers(alone, *read) == numbers(whole, *read)
    assert numbers(whole, *read)[-1][1] > 4
    assert len(numbers(whole, "validation/held_out/loss")) == 2
    with pytest.raises(UserError, match=r"trained on a stream; name a prepared folder with --data"):
        evaluate_checkpoint(tmp_path / "run", None, "train", 2, 2)
    assert evaluate_checkpoint(tmp_path / "run", None, "valid", 2, 2)["held_out/tokens"] == 32
    assert evaluate_checkpoint(tmp_path / "run", str(prepared), "valid", 2, 2)["tokens"] == 32


def test_damage_that_one_rank_reads_ends_all_and_mended_text_goes_on(tmp_path: Path, config: Path) -> None:
    (tmp_path / "texts" / "1.jsonl.zst").unlink()
    sound = json_lines([*texts(12, longest=6), *texts(40)])
    damaged = tmp_path / "texts" / "1.jsonl"
    damaged.write_bytes(json_lines(texts(12, longest=6)) + b"{broken\n")
    result = run(["launch/pretrain.py", "--config", str(config), "--checkpoint.every_steps=1"], processes=2)
    assert result.returncode == 1
    assert f"error: {damaged}:13: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    before = numbers(metrics(tmp_path / "run"), "step", "loss")
    damaged.write_bytes(sound)
    mended = run(["launch/pretrain.py", "--config", str(config), "--resume=auto"])
    assert mended.returncode == 0, mended.stderr
    assert "stream  files have other sizes than when the checkpoint was saved" in mended.stdout
    after = numbers(metrics(tmp_path / "run"), "step", "loss")
    assert 1 <= len(before) < len(after) == 6
    whole = numbers(train(config, f"--run.folder={tmp_path / 'whole'}"), "step", "loss")
    torch.testing.assert_close(torch.tensor(after), torch.tensor(whole), rtol=2e-5, atol=1e-6)
