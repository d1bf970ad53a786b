"""docs/adding_attention.md is followed to the letter in a copy of the project."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import BIN, ROOT, environment

PAGE = (ROOT / "docs/adding_attention.md").read_text(encoding="utf-8")
# (file, where in it, what is added) of every step
STEPS = re.findall(r"^\*\*`([^`]+)`\*\*,([^\n]*):\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CLASS, REGISTRY, FORMULA = "model/attention/gated.py", "model/attention/entries/baselines.py", "tests/reference.py"
NATIVE = [f"model/huggingface/{name}_manyheads.py" for name in ("configuration", "attention")]
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
from pathlib import Path
from configs.errors import UserError
from model.huggingface import configuration_manyheads
from pretrain.interop.export import export
from tests.random_checkpoint import random_checkpoint

here = Path("exported")
here.mkdir()
for rope in ("learned", "rope"):
    run = random_checkpoint(here, "--model.attention=mqa_gated", f"--model.position={rope}", name=rope)
    print(export(run, here / f"{rope}_out", "auto", 10**9, None, lambda text: None))
try:
    export(run, here / "stock", "stock", 10**9, None, print)
except UserError as error:
    print(error)
configuration_manyheads.CHOICES["attention"] = ("mha",)
try:
    export(run, here / "native", "native", 10**9, None, print)
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed of the project, with the steps of the page done."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "configs", "data_pipeline", "launch", "model", "pretrain", "tests/unit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    helpers = [f"tests/{name}.py" for name in ("helpers", "needs", "ranks", "random_checkpoint")]
    for name in (FORMULA, "pyproject.toml", *helpers):
        shutil.copy(ROOT / name, folder / name)
    for name, where, text in STEPS:
        follow(folder / name, where, text)
    return folder


def follow(path: Path, where: str, text: str) -> None:
    """Do one step of the page."""
    if where == " a new file":
        path.write_text(text, encoding="utf-8")
        return
    before = path.read_text(encoding="utf-8")
    if where == " at its end":
        place, text = len(before), "\n\n" + text
    elif found := re.fullmatch(r" as the last entry of `(\w+)`", where):
        place = before.index("\n}\n", re.search(rf"^{found[1]}\b", before, re.MULTILINE).start()) + 1  # type: ignore[union-attr]
    else:
        found = re.fullmatch(r" before `(\w+)`", where)
        assert found, where
        place, text = re.search(rf"^{found[1]}\b", before, re.MULTILINE).start(), text + "\n\n"  # type: ignore[union-attr]
    path.write_text(before[:place] + text + before[place:], encoding="utf-8")


def execute(folder: Path, *arguments: str) -> str:
    result = subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_two_files_of_the_product_the_formula_and_the_exported_code_are_all(followed: Path) -> None:
    files = [CLASS, REGISTRY, FORMULA, *NATIVE]
    assert list(dict.fromkeys(name for name, _, _ in STEPS)) == files
    assert not (ROOT / CLASS).exists()
    execute(followed, str(BIN / "ruff"), "format", "--check", "--no-cache", *files)
    execute(followed, str(BIN / "ruff"), "check", "--no-cache", *files)


def test_a_configuration_builds_trains_and_generates_with_it(followed: Path) -> None:
    (followed / "gated.yaml").write_text(CONFIG, encoding="utf-8")
    execute(followed, sys.executable, "-c", PROGRAM)


def test_the_tests_take_it_in_unchanged(followed: Path) -> None:
    ((_, *arguments),) = (shlex.split(line) for line in re.findall(r"^```bash\n(.*)\n```$", PAGE, re.MULTILINE))
    summary = execute(followed, sys.executable, *arguments, "-p", "no:cacheprovider").splitlines()[-1]
    assert re.match(r"([3-9]\d) passed, \d+ deselected in", summary), summary


def test_it_exports_and_what_it_lacks_is_said(followed: Path) -> None:
    """Each export compares the logits of what it has written with the checkpoint's, in float64."""
    learned, rope, stock, native = execute(followed, sys.executable, "-c", EXPORT).splitlines()
    assert (learned, rope) == ("exported/learned_out", "exported/rope_out")
    for name in (learned, rope):
        assert json.loads((followed / name / "config.json").read_text())["attention"] == "mqa_gated"
    assert stock == "--format stock: no stock model computes model.attention: mqa_gated; or take --format native"
    assert native.startswith("--format native: our own class does not know model.attention: mqa_gated. Add it to CACHED_HEADS")
