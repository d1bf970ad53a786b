"""What two real ranks move is what fake ranks and the formulas say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.communication import Layout, build, count, fake_count
from configs.schema import ModelConfig
from model.costs.communication import Collective, Gather, collectives
from model.initialization import init_weights
from tests.helpers import joined, run_ranks

RANKS, MICRO_BATCH, LENGTH = 2, 3, 8
SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 24, "vocab_size": 37}
LEARNED: dict[str, Any] = {"position": "learned", "max_position_embeddings": LENGTH}
PLAIN: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}


VARIANTS: list[tuple[str, Gather, dict[str, Any], torch.dtype]] = [
    ("mha", "weights", PLAIN, torch.bfloat16),
    ("mqa", "weights", LEARNED, torch.float32),
    ("el", "weights", LEARNED, torch.float32),
    ("mhe_add", "weights", LEARNED, torch.bfloat16),
    ("mhe_add", "activations", LEARNED, torch.float32),
    ("mhe_mul", "weights", PLAIN, torch.float32),
]


def cases() -> dict[str, tuple[ModelConfig, Layout, torch.dtype]]:
    return {
        f"{name}-{gather}{'-sequence' * sequence}": (
            ModelConfig(attention=name, **SIZES, **style),
            Layout(RANKS, sequence, gather),
            dtype,
        )
        for name, gather, style, dtype in VARIANTS
        for sequence in (False, True)
    }


def work(rank: int, folder: Path) -> None:
    results = {}
    with joined(rank, RANKS, folder, tensor=RANKS) as opened:
        for name, (config, layout, dtype) in cases().items():
            model = build(config, layout, opened.group("tensor"), dtype)
            init_weights(model, seed=1)
            tokens_BS = torch.arange(MICRO_BATCH * LENGTH).view(MICRO_BATCH, LENGTH) % 37
            results[name] = [asdict(move) for move in count(model, tokens_BS)]
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, set[Collective]]]:
    """What each rank has counted, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, RANKS, folder)
    files = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [{name: {Collective(**move) for move in moves} for name, moves in counts.items()} for counts in files]


@pytest.mark.parametrize("name", list(cases()))
def test_real_ranks_move_what_fake_ranks_and_formulas_say(name: str, real: list[dict[str, set[Collective]]]) -> None:
    config, layout, dtype = cases()[name]
    sizes = MICRO_BATCH, LENGTH
    expected = set(collectives(config, RANKS, layout.sequence, layout.way, *sizes, dtype.itemsize))
    assert [counts[name] for counts in real] == RANKS * [expected]
    assert set(fake_count(config, layout, *sizes, dtype)) == expected
