"""launch/export.py as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.inference import generate_text, load_model
from tests.helpers import run


def test_a_run_becomes_a_folder_of_transformers(finished: Path, tmp_path: Path) -> None:
    folder, output = finished.with_suffix(""), tmp_path / "exported"
    result = run(["launch/export.py", str(folder), str(output), "--max-shard-size", "4KiB"])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        f"reads   {folder}/checkpoints/step_00000003",
        "weights trained",
        "format  native, manyheads, 8 heads, 16 cached values of a token",
    ]
    assert lines[-2] == f"written {output}"
    assert len(list(output.glob("model-*.safetensors"))) > 2
    tokenizer = AutoTokenizer.from_pretrained(output)
    model: Any = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    inputs = tokenizer(tokenizer.bos_token + "the cat", return_tensors="pt")
    with torch.inference_mode():
        (ids,) = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = generate_text(load_model(folder), "the cat", max_new_tokens=6, temperature=0, top_k=None, top_p=None, seed=0)
    assert text == "".join(ours)
    report = json.loads((output / "equivalence.json").read_text())
    assert report["float64"]["largest"] < 1e-12


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing", "OUT"], 1, "error: nothing: no such checkpoint folder"),
        (["RUN", "RUN"], 1, "already exists and is not empty"),
        (["RUN", "OUT", "--format", "onnx"], 2, "invalid choice: 'onnx' (choose from"),
        (["RUN", "OUT", "--max-shard-size", "5"], 2, "argument --max-shard-size: 5: a number and B, KB, MB"),
    ],
)
def test_mistakes(finished: Path, tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    places = {"RUN": str(finished.with_suffix("")), "OUT": str(tmp_path / "out")}
    result = run(["launch/export.py", *(places.get(argument, argument) for argument in arguments)])
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
