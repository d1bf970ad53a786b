"""Masked language modelling and span corruption as examples, and small models that learn them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from configs.schema import Config
from data_pipeline.corrupt.draws import draws
from data_pipeline.mix.mixture import training_samples
from data_pipeline.read.loader import Batch, TrainLoader, ValidationLoader
from model.build import build_model
from model.initialization import init_weights
from model.layers import Layers
from pretrain.objectives.base import Examples
from pretrain.objectives.masked import MaskedTokens
from pretrain.objectives.registry import make_objective, vocabulary_of
from pretrain.objectives.spans import Spans
from tests.bidirectional import BIDIRECTIONAL
from tests.helpers import resolved, write_run

LENGTH = 32


@pytest.fixture
def run(tmp_path: Path, masked_data: Path, bidirectional_kind: str) -> Config:
    """A bidirectional model that learns masked tokens."""
    return config_of(tmp_path, masked_data, "masked", bidirectional_kind)


def config_of(folder: Path, data: Path, objective: str, kind: str, *others: str) -> Config:
    chosen = [f"--training.objective={objective}", f"--model.kind={kind}", f"--data.sequence_length={LENGTH}"]
    return resolved(write_run(folder, data), [*chosen, *others], world_size=1)


def loader(config: Config, rank: int = 0, ranks: int = 1) -> TrainLoader:
    sizes = (config.training.global_batch_size, config.training.micro_batch_size)
    return TrainLoader(training_samples(config), *sizes, rank, ranks, steps=200, seed=config.run.seed)


def seeds_of(batch: Batch) -> list[int]:
    assert batch.seeds is not None
    seeds: list[int] = batch.seeds.tolist()
    return seeds


def weights_of(examples: Examples) -> torch.Tensor:
    assert examples.weights is not None
    return examples.weights


def test_labels_are_the_tokens_and_chosen_ones_count(run: Config) -> None:
    objective, mask = make_objective(run), vocabulary_of(run).special["<|mask|>"]
    assert isinstance(objective, MaskedTokens)
    with loader(run) as batches:
        batch = batches.step(0)[0]
    given = objective.examples(batch)
    assert torch.equal(given.labels, batch.tokens)
    for row, seed in enumerate(seeds_of(batch)):
        inputs, chosen = objective.mask(batch.tokens[row].numpy(), draws(seed))
        assert given.inputs[row].tolist() == inputs.tolist()
        assert weights_of(given)[row].tolist() == chosen.astype(float).tolist()
    assert given.weight == sum(round(0.15 * int((row != 0).sum())) for row in batch.tokens)
    assert (given.inputs == mask).any()


def test_a_sample_is_masked_alike_on_every_layout(run: Config) -> None:
    objective = make_objective(run)

    def inputs(ranks: int) -> torch.Tensor:
        """The micro-batches of all ranks, in the order of the samples."""
        loaders = [loader(run, rank, ranks) for rank in range(ranks)]
        passes = list(zip(*(batches.step(3) for batches in loaders), strict=True))
        for batches in loaders:
            batches.close()
        return torch.cat([objective.examples(batch).inputs for of_ranks in passes for batch in of_ranks])

    assert torch.equal(inputs(1), inputs(2))


def test_each_epoch_masks_a_sample_anew(run: Config) -> None:
    epoch, seeds = training_samples(run).samples_per_epoch, defaultdict(list)
    with loader(run) as batches:
        for step in range(2 * epoch // run.training.global_batch_size + 1):
            for batch in batches.step(step):
                for row, seed in zip(batch.tokens.tolist(), seeds_of(batch), strict=True):
                    seeds[row[1], row[2], row[3], row[4]].append(seed)
    assert any(len(found) > 1 for found in seeds.values())
    drawn = [seed for found in seeds.values() for seed in found]
    assert len(set(drawn)) == len(drawn) >= 2 * epoch


def test_held_out_samples_are_masked_alike_in_every_run(run: Config) -> None:
    other = run.model_copy(update={"run": run.run.model_copy(update={"seed": 99})})
    found = []
    for config in (run, other):
        objective, samples = make_objective(config), training_samples(run)
        found.append([objective.examples(batch) for batch in ValidationLoader(samples, 5, 2, 0, 1)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(weights_of(one), weights_of(two))
    assert weights_of(found[0][-1])[1].sum() == 0, "what fills up the last batch does not count"


def test_rows_of_spans(tmp_path: Path, masked_data: Path) -> None:
    config = config_of(tmp_path, masked_data, "spans", "decoder")
    objective, special = make_objective(config), vocabulary_of(config).special
    assert isinstance(objective, Spans)
    with loader(config) as batches:
        batch = batches.step(0)[1]
    given = objective.examples(batch)
    corrupted, spans = config.training.spans.counts(LENGTH)
    assert given.inputs.shape == given.labels.shape == (2, config.row_length) == (2, LENGTH + 2 * spans)
    assert given.weight == 2 * (corrupted + spans + 1)
    for row, seed in enumerate(seeds_of(batch)):
        inputs, targets = objective.corruption(batch.tokens[row].numpy(), draws(seed))
        assert torch.equal(given.inputs[row, 1:], given.labels[row, :-1])
        assert given.inputs[row, : len(inputs)].tolist() == inputs.tolist()
        counted = given.labels[row][weights_of(given)[row] > 0]
        assert counted.tolist() == [*targets.tolist(), special["<|endoftext|>"]]
    half = Batch(batch.tokens, batch.labels, torch.tensor([[1.0], [0.0]]).expand(2, LENGTH), batch.seeds)
    assert objective.examples(half).weight == corrupted + spans + 1


@pytest.mark.parametrize(("objective", "kind"), [("masked", BIDIRECTIONAL), ("spans", "decoder")])
def test_a_model_learns_it(tmp_path: Path, masked_data: Path, objective: str, kind: str, bidirectional_kind: str) -> None:
    config = config_of(tmp_path, masked_data, objective, kind, "--model.hidden_size=32", "--model.position=rope")
    learned, model = make_objective(config), build_model(config.model)
    init_weights(model, 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    with loader(config) as batches:
        for step in range(40):
            examples = [learned.examples(batch) for batch in batches.step(step)]
            totals = [learned.loss_of(model, part, Layers(), torch.device("cpu")) for part in examples]
            loss = torch.stack([total.loss for total in totals]).sum() / sum(part.weight for part in examples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-10:]))
    assert last < 0.7 * first, (first, last)


def test_a_bidirectional_model_uses_what_follows(run: Config) -> None:
    model = build_model(run.model).double()
    init_weights(model, 1)
    tokens = torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    later = tokens.clone()
    later[0, -1] += 1
    assert (model(tokens)[0] - model(later)[0]).abs().max() > 1e-9


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_documents_are_computed_as_if_alone_without_a_causal_mask(run: Config, position: str) -> None:
    apart = {"attend_across_documents": False, "end_of_document": 0, "position": position}
    config = run.model_copy(update={"model": run.model.model_copy(update=apart)})
    objective, model = make_objective(config), build_model(config.model).double()
    init_weights(model, 1)
    draw = torch.Generator().manual_seed(3)
    texts = [torch.cat([torch.randint(3, 90, (n,), generator=draw), torch.zeros(1, dtype=torch.long)]) for n in (11, 1, 7)]
    sample = torch.cat(texts)[None]
    weights = torch.rand(sample.shape, generator=draw, dtype=torch.float64)

    def loss_of(tokens: torch.Tensor, counts: torch.Tensor) -> float:
        total = objective.loss_of(model, Examples(tokens, tokens, counts), Layers(), torch.device("cpu"))
        return total.loss.item()

    splits = weights.split([len(text) for text in texts], dim=1)
    alone = sum(loss_of(text[None], counts) for text, counts in zip(texts, splits, strict=True))
    assert loss_of(sample, weights) == pytest.approx(alone, rel=1e-12)
