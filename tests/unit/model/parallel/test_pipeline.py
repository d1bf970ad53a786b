"""Stages run one after the other in one process, against the unsharded model, to the bit."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.build import build_model, model_row, unsharded_shapes
from model.initialization import InitialWeights, init_weights
from model.layers import Layers
from model.parallel.pipeline import (
    StageLayer,
    StagePart,
    row_bounds,
    stage_parts,
    tied_modules,
    unsharded_name,
)
from model.parallel.sharding import Spec
from tests.helpers import losses_of

POSITIONS = ["learned", "rope", "alibi", "none"]


def model_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "attention": "mhe_add",
        "hidden_size": 12,
        "num_layers": 4,
        "num_heads": 4,
        "head_dim": 6,
        "vocab_size": 17,
        "position": "learned",
        "dropout": 0.2,
    } | changes
    return ModelConfig(**fields, max_position_embeddings=9 if fields["position"] == "learned" else None)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens_BS = torch.randint(0, 17, (2, 10), generator=torch.Generator().manual_seed(seed))
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


class Pipeline:
    """All stages in this process, each with its own modules."""

    def __init__(self, config: ModelConfig, stages: int, recompute: bool) -> None:
        self.layers, row = Layers(), model_row(config)
        initial = InitialWeights(config, seed=5, specs=dict.fromkeys(unsharded_shapes(config), Spec()))
        bounds = row_bounds(row, [layer.weight for layer in row], stages)
        self.stages: list[list[tuple[StagePart, StageLayer]]] = []
        self.named: list[tuple[str, torch.nn.Parameter]] = []
        for first, end in pairwise(bounds):
            parts = stage_parts(row, config, self.layers, recompute)[first:end]  # ranks share nothing
            shared: dict[str, StageLayer] = {}
            stage = []
            for part in parts:
                module = shared.setdefault(part.tied, part.build()) if part.tied is not None else part.build()
                stage.append((part, module))
            self.stages.append(stage)
            self.named += [pair for module in {id(m): m for _, m in stage}.values() for pair in module.named_parameters()]
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(initial(name))

    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        hidden: Any = tokens_BS
        for stage in self.stages:
            # A received tensor is never the tensor that was sent.
            hidden = tuple(part.clone() for part in hidden) if isinstance(hidden, tuple) else hidden.clone()
            for part, module in stage:
                hidden = module.run_as(part, hidden)
        return self.layers.losses(hidden, labels_BS)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients since the last call, by unsharded name; those of tied weights are summed over stages."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.named:
            gradient = taken(parameter)
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return gradients


def taken(parameter: torch.nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return gradient if gradient is not None else torch.zeros_like(parameter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(
    ("attention", "position"),
    [*(("mhe_add", position) for position in POSITIONS), ("diff", "none")],  # diff depends on the layer's number
)
def test_stages_compute_what_the_unsharded_model_does(attention: str, position: str, documents: bool, tied: bool) -> None:
    apart = {"attend_across_documents": False, "end_of_document": 3} if documents else {}
    config = model_config(attention=attention, position=position, tie_embeddings=tied, **apart)
    for stages, recompute in ((1, False), (2, True), (3, False)):
        model, pipeline = build_model(config, recompute_activations=recompute), Pipeline(config, stages, recompute)
        init_weights(model, seed=5)
        for seed in range(2):  # a stage keeps positions from one micro-batch to the next
            results = []
            for losses in (partial(losses_of, model), pipeline.losses):
                torch.manual_seed(seed)
                results.append(losses(*batch(seed)))
                results[-1].mean().backward()
            assert torch.equal(*results)
            found = pipeline.gradients()
            assert all(torch.equal(found[name], taken(parameter)) for name, parameter in model.named_parameters())
            assert found["blocks.3.attention.out.weight"].count_nonzero() > 100


def test_documents_travel_to_the_last_block_and_no_further() -> None:
    config = model_config(attend_across_documents=False, end_of_document=3)
    hidden: Any = batch(0)[0]
    kinds = []
    for part in stage_parts(model_row(config), config, Layers()):
        hidden = part.build()(hidden)
        kinds.append(type(hidden))
    assert kinds == [tuple] * 5 + [Tensor] * 3  # tokens, positions, four blocks, norm, output


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_weights_of_the_row_are_those_of_the_model(position: str, tied: bool) -> None:
    config = model_config(position=position, tie_embeddings=tied, norm="rmsnorm", bias=False, activation="swiglu")
    shapes, row = unsharded_shapes(config), model_row(config)
    names: list[str] = []
    for number, part in enumerate(stage_parts(row, config, Layers())):
        parameters = dict(part.build().named_parameters())
        assert sum(parameter.numel() for parameter in parameters.values()) == row[number].weight
        assert {name: parameter.shape for name, parameter in parameters.items()}.items() <= shapes.items()
        names += parameters
    assert names == [*shapes, *["token_embedding.weight"] * tied]  # in the order of the model


def test_tied_layers_share_a_name() -> None:
    assert tied_modules(model_row(model_config())) == {0: "token_embedding", 7: "token_embedding"}
    assert tied_modules(model_row(model_config(tie_embeddings=False))) == {}
    assert unsharded_name("tied_modules.token_embedding.token_embedding.weight") == "token_embedding.weight"
    assert unsharded_name("2.blocks.0.mlp.up.bias") == "blocks.0.mlp.up.bias"
