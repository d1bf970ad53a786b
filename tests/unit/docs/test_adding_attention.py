"""docs/adding_attention.md is followed to the letter in a copy of the project."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import BIN, ROOT, environment

PAGE = (ROOT / "docs/adding_attention.md").read_text(encoding="utf-8")
STEPS = dict(re.findall(r"^\*\*`([^`]+)`\*\*,[^\n]*:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
CLASS, REGISTRY, FORMULA = "model/attention/gated.py", "model/attention/registry.py", "tests/reference.py"
CONFIG = """
run: {folder: runs/gated}
model: {attention: mqa_gated, hidden_size: 24, num_layers: 2, num_heads: 4, position: rope, dropout: 0.0}
data: {path: data, sequence_length: 8}
training: {steps: 1, global_batch_size: 1, micro_batch_size: 1}
"""
PROGRAM = """
import torch
from configs.load import load_config
from model.costs.parameters import parameters
from model.faults import model_faults
from model.initialization import init_weights
from model.decoder import DecoderLM

config = load_config("gated.yaml", checks=[model_faults]).resolved(tokenizer_size=50).model
model = DecoderLM(config).double()
init_weights(model, seed=1)
assert sum(parameters(config).values()) == sum(parameter.numel() for parameter in model.parameters())
tokens_BS = torch.arange(18).view(2, 9)
model.layers.losses(model(tokens_BS[:, :-1]), tokens_BS[:, 1:]).mean().backward()
assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
cache = model.new_cache(batch_size=2, capacity=9)
with torch.no_grad():
    parts = [model.logits(part_BS, cache=cache) for part_BS in tokens_BS.split([6, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(tokens_BS), rtol=0, atol=1e-12)
"""
EXPORT = """
from configs.schema import ModelConfig
from model.huggingface.stock import find_stock
from model.huggingface.native import native_refusal

config = ModelConfig(attention="mqa_gated", hidden_size=24, num_layers=2, num_heads=4, position="rope")
print(find_stock(config).reason, native_refusal(config), sep="\\n")
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed of the project, with the steps of the page done."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "configs", "data_pipeline", "launch", "model", "pretrain", "tests/unit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (FORMULA, "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / CLASS).write_text(STEPS[CLASS], encoding="utf-8")
    registry = (folder / REGISTRY).read_text(encoding="utf-8")
    entries = registry.index("\n}\n", registry.index("\n_VARIANTS = {\n")) + 1
    (folder / REGISTRY).write_text(registry[:entries] + STEPS[REGISTRY] + registry[entries:], encoding="utf-8")
    with (folder / FORMULA).open("a", encoding="utf-8") as file:
        file.write("\n\n" + STEPS[FORMULA])
    return folder


def execute(folder: Path, *arguments: str) -> str:
    result = subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_two_files_of_the_product_and_the_formula_are_all(followed: Path) -> None:
    assert list(STEPS) == [CLASS, REGISTRY, FORMULA]
    assert not (ROOT / CLASS).exists()
    execute(followed, str(BIN / "ruff"), "format", "--check", "--no-cache", *STEPS)
    execute(followed, str(BIN / "ruff"), "check", "--no-cache", *STEPS)


def test_a_configuration_builds_trains_and_generates_with_it(followed: Path) -> None:
    (followed / "gated.yaml").write_text(CONFIG, encoding="utf-8")
    execute(followed, sys.executable, "-c", PROGRAM)


def test_the_tests_take_it_in_unchanged(followed: Path) -> None:
    ((_, *arguments),) = (shlex.split(line) for line in re.findall(r"^```bash\n(.*)\n```$", PAGE, re.MULTILINE))
    summary = execute(followed, sys.executable, *arguments, "-p", "no:cacheprovider").splitlines()[-1]
    assert re.match(r"([3-9]\d) passed, \d+ deselected in", summary), summary


def test_export_says_what_the_variant_lacks(followed: Path) -> None:
    stock, native = execute(followed, sys.executable, "-c", EXPORT).splitlines()
    assert stock == "no stock model computes model.attention: mqa_gated"
    assert "mqa_gated is not among CHOICES in model/huggingface/configuration_manyheads.py" in native
    assert "`configuration_manyheads.py`" in PAGE
