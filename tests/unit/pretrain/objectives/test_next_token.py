"""The next token's loss by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.attention.registry import attention_variant
from model.decoder import DecoderLM
from model.initialization import init_weights
from model.layers import Layers
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.registry import make_objective
from tests.helpers import write_run
from tests.needs import causal_names, needs


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


END, LENGTH = 0, 24


def packed_run(folder: Path, attention: str, position: str, kernel: str) -> Config:
    """A run whose samples hold complete documents."""
    fields = {"attention": attention, "position": position, "attention_kernel": kernel, "hidden_size": 32}
    fields |= needs(attention)
    overrides = [f"--model.{name}={value}" for name, value in fields.items()]
    data = ["--data.packing=best_fit", f"--data.sequence_length={LENGTH}"]
    return load_config(write_run(folder, folder / "data"), [*overrides, *data]).resolved(50, END)


@pytest.mark.parametrize("attention", causal_names())
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_the_loss_of_a_packed_document_is_its_loss_alone(tmp_path: Path, attention: str, position: str) -> None:
    draw = torch.Generator().manual_seed(1)
    texts = [[*torch.randint(1, 50, (length,), generator=draw).tolist(), END] for length in (9, 0, 6, 3)]
    sample = torch.tensor([token for text in texts for token in text] + [END] * 3)
    assert len(sample) == LENGTH + 1
    for kernel in attention_variant(attention).kernels:
        config = packed_run(tmp_path, attention, position, kernel)
        objective, model = make_objective(config), DecoderLM(config.model).double()
        init_weights(model, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))

        def loss_of(tokens: torch.Tensor) -> tuple[float, float]:
            given = objective.examples(Batch(tokens[None, :-1], tokens[None, 1:]))  # noqa: B023
            total = objective.loss_of(model, given, Layers(), torch.device("cpu"))  # noqa: B023
            return float(total.loss), float(total.weight)

        loss, labels = loss_of(sample)
        alone = [loss_of(torch.tensor(text)) for text in texts if len(text) > 1]
        assert labels == sum(len(text) - 1 for text in texts) == sum(weight for _, weight in alone)
        assert loss == pytest.approx(sum(of_text for of_text, _ in alone), rel=1e-12), kernel


def test_weights_of_a_batch_stay_where_documents_are_kept_apart(tmp_path: Path) -> None:
    objective = make_objective(packed_run(tmp_path, "mha", "rope", "math"))
    tokens_BS, weights_BS = torch.tensor([[4, END, 5]]), torch.tensor([[0.5, 0.5, 0.25]])
    given = objective.examples(Batch(tokens_BS, tokens_BS, weights_BS))
    assert given.weights is not None
    assert given.weights.tolist() == [[0.5, 0.0, 0.25]]
