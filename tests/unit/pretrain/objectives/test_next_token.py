"""The next token's loss by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.load import load_config
from data_pipeline.read.loader import Batch
from model.layers import Layers
from model.registry import model_kinds
from pretrain.objectives.base import Objective
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.registry import make_objective
from tests.helpers import write_run


@pytest.mark.parametrize("kind", model_kinds())
def test_every_kind_of_model_has_an_objective(tmp_path: Path, kind: str) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"), [f"--model.kind={kind}"]).resolved(50)
    assert isinstance(make_objective(config), Objective)


def test_it_is_the_cross_entropy_of_each_label(tmp_path: Path) -> None:
    objective = make_objective(load_config(write_run(tmp_path, tmp_path / "data")).resolved(50))
    assert isinstance(objective, NextToken)
    draw = torch.Generator().manual_seed(3)
    table_VV, weights_BS = torch.randn(9, 9, generator=draw), torch.rand(2, 5, generator=draw)
    tokens_BS, labels_BS = torch.randint(9, (2, 2, 5), generator=draw)
    given = objective.examples(Batch(tokens_BS, labels_BS, weights_BS))
    total = objective.loss_of(lambda tokens: table_VV[tokens.t()], given, Layers(), torch.device("cpu"))
    losses_BS = F.cross_entropy(table_VV[tokens_BS].transpose(1, 2), labels_BS, reduction="none")
    torch.testing.assert_close(total.loss, (losses_BS * weights_BS).sum())
    assert float(total.weight) == pytest.approx(float(weights_BS.sum()))
    assert given.weight == pytest.approx(float(weights_BS.sum()))
