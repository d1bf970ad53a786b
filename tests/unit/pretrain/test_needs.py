"""What a run needs installed: FSDP on unsharded layers, checkpoints and generation need neither deepspeed nor megatron-core.

That nothing else imports them, import-linter checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import ConfigError, load_config
from configs.schema import Config, Fault
from launch.common import CHECKS
from tests.helpers import ROOT, environment, write_run

ABSENT = """
import sys
sys.modules |= {"deepspeed": None, "megatron": None}
from pathlib import Path
from tests.unit.pretrain.test_needs import train_and_generate
train_and_generate(Path(sys.argv[1]))
"""
LENGTH, STEPS = 16, 4
TEXT = "the cat sat on a mat and many heads attend to one key while dogs ran home "


class OneText:
    """Samples that all have the same tokens, so that a loss falls."""

    samples_per_epoch = 8

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.resize(np.array(tokens), LENGTH + 1)

    def prepare_range(self, first: int, last: int) -> None:
        pass

    def sample(self, number: int) -> np.ndarray:
        return self.tokens


def config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "backend": "fsdp",
            "run": {"folder": str(folder)},
            "data": {"path": "unused", "sequence_length": LENGTH},
            "model": {"attention": "mhe_add", "hidden_size": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4},
            "training": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup_steps": 1},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
    )


def train_and_generate(folder: Path) -> None:
    """Train, save a checkpoint and continue a text from it, in this process; what the test asks of it is printed."""
    import pretrain.run  # noqa: F401
    from data_pipeline.prepare.tokenizer import Tokenizer, train
    from data_pipeline.read.loader import TrainLoader
    from pretrain.build import make_backend
    from pretrain.checkpoints.saver import Saver
    from pretrain.checkpoints.store import CheckpointStore
    from pretrain.distributed.layout import Layout
    from pretrain.inference import generate_text, load_model
    from pretrain.loop.hooks import Checkpoints
    from pretrain.loop.skipping import Skipping
    from pretrain.loop.trainer import Trainer

    folder.mkdir()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(train([TEXT] * 20, 280), "here")
    run = config(folder).resolved(tokenizer.vocab_size, tokenizer.end_of_document)
    loader = TrainLoader(OneText(tokenizer.encode(TEXT)), 4, 2, 0, 1, STEPS)
    with Layout().opened() as layout:
        checkpoints = Checkpoints(Saver(CheckpointStore(folder), layout, run, "0" * 64, tokenizer.text), every_steps=0)
        trainer = Trainer(run, layout, make_backend(run, layout), loader, [Skipping(run, layout), checkpoints], 0)
        trainer.progress.speaks = False
        trainer.run()
        trainer.close()
    pieces = generate_text(load_model(folder), TEXT[:7], max_new_tokens=3, temperature=0.0, top_k=None, top_p=None, seed=0)
    present = [name for name, module in sys.modules.items() if module and name.partition(".")[0] in ("deepspeed", "megatron")]
    print(json.dumps({"imported": present, "generated": len("".join(pieces))}))


def test_fsdp_trains_without_deepspeed_and_megatron(tmp_path: Path) -> None:
    program = [sys.executable, "-c", ABSENT, str(tmp_path / "run")]
    result = subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["imported"] == []
    assert said["generated"] > 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


WITHOUT = f"which is not installed for {sys.executable}; `make install` makes .venv with all packages"


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        (["--backend=fsdp"], ["data.path: reading it needs megatron-core, {without}"]),
        (
            ["--parallel.tensor=2"],
            [
                "parallel.tensor: needs megatron-core, {without}",
                "backend: needs deepspeed, {without}; or take a backend that does without: fsdp",
                "data.path: reading it needs megatron-core, {without}",
            ],
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], faults: list[str]
) -> None:
    run = write_run(tmp_path, prepared)
    load_config(run, overrides, CHECKS, world_size=2)
    for name in ("deepspeed", "megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        load_config(run, overrides, CHECKS, world_size=2)
    found = [f"{fault.key}: {fault.allowed}" for fault in caught.value.faults if isinstance(fault, Fault)]
    assert found == [fault.format(without=WITHOUT) for fault in faults]
