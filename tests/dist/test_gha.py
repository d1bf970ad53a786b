"""Grouped heads on every layout: the loss, its gradient and the groups of one process that has the feature maps themselves."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader
from data_pipeline.read.manifest import read_manifest
from model.decoder import DecoderLM
from model.gha.clustering import align, kmeans
from model.initialization import init_weights
from model.tensor_file import read_tensors
from pretrain.optim.groups import build_optimizer
from pretrain.optim.schedule import learning_rate
from tests.helpers import free_port, launched_as, losses_of, metrics, named, numbers, run_ranks, write_run

STEPS = 4
SETTINGS = (
    "--model.num_layers=3",
    "--model.head_dim=4",
    "--optimizer.lr=3e-4",
    "--model.init_std=0.2",  # heads that differ from the first step on
    f"--training.steps={STEPS}",
    "--gha.stage=constrain",
    "--gha.groups=3",
    "--gha.gram_decay=0.5",
    "--gha.warmup_steps=2",
    "--gha.alpha=0.7",
    "--gha.beta=0.5",
    "--validation.every_steps=0",
    "--logging.heads=true",
)
CASES = {
    "mhe_mul, value": ("--model.attention=mhe_mul",),
    "mhe_add, value": ("--model.attention=mhe_add", "--gha.loss=categorical"),
    "mha, output": ("--model.attention=mha", "--gha.feature_map=output"),
    "mha, value": ("--model.attention=mha",),
    "mqa, output": ("--model.attention=mqa", "--gha.feature_map=output"),
    "mhe_add, attention": ("--model.attention=mhe_add", "--gha.feature_map=attention", "--gha.attention_rows=4"),
    "gqa, attention": (
        "--model.attention=gqa",
        "--model.num_kv_heads=4",
        "--gha.feature_map=attention",
        "--gha.attention_rows=0",
    ),
    "mhe_add, value, two seeds": ("--model.attention=mhe_add", "--model.num_seeds=2"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ZeRO 2 × 2": (2, ("--parallel.zero_stage=2",)),
    "ZeRO 3 × 2, recompute": (2, ("--parallel.zero_stage=3", "--training.recompute_activations=true")),
    "PP 2": (2, ("--parallel.pipeline=2",)),
    "TP 2": (2, ("--parallel.tensor=2", "--parallel.mhe_gather=auto")),
    "FSDP 2": (2, ("--backend=fsdp",)),
    "TP 2 × PP 2, SP": (4, ("--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.sequence=true")),
    "FSDP 2 × TP 2": (4, ("--backend=fsdp", "--parallel.tensor=2", "--training.recompute_activations=true")),
}


# All cases where heads are shared out over ranks; elsewhere two or three feature maps, with both losses among them.
CHOSEN: dict[str, tuple[int, ...]] = {
    "ZeRO 2 × 2": (2, 6),
    "ZeRO 3 × 2, recompute": (1, 5),
    "PP 2": (0, 1, 2),
    "FSDP 2": (1, 3),
    "TP 2 × PP 2, SP": (0, 2, 6),
    "FSDP 2 × TP 2": (2, 6),
}


def cases(layout: str) -> dict[str, tuple[str, ...]]:
    names = list(CASES)
    return {names[number]: CASES[names[number]] for number in CHOSEN.get(layout, range(len(names)))}


def train_layouts(rank: int, ranks: int, port: int, path: Path, layouts: list[str]) -> None:
    from pretrain.build import build_trainer

    with launched_as(rank, ranks, port) as opened:
        for layout in layouts:
            with opened(resolved(path, LAYOUTS[layout][1]).parallel) as own:
                for name, settings in cases(layout).items():
                    folder = path.parent / layout / name
                    config = resolved(path, (*settings, *LAYOUTS[layout][1], f"--run.folder={folder}"))
                    folder.mkdir(parents=True, exist_ok=True)
                    trainer = build_trainer(config, own)
                    trainer.progress.speaks = False
                    trainer.run()
                    trainer.close()


def resolved(path: Path, overrides: tuple[str, ...]) -> Config:
    config = load_config(path, [*SETTINGS, *overrides])
    manifest = read_manifest(config.data.parts[0].path)
    return config.resolved(manifest.vocab_size, manifest.end_of_document)


class Maps:
    """Flattened feature maps of every layer, from weights and inputs by the formulas of the papers."""

    def __init__(self, model: Any, config: Config) -> None:
        self.config, self.of_layers = config, [torch.empty(0)] * config.model.num_layers
        for layer, block in enumerate(model.blocks):
            block.attention.register_forward_pre_hook(lambda module, inputs, layer=layer: self.see(layer, module, inputs[0]))
            block.attention.out.register_forward_pre_hook(lambda _module, inputs, layer=layer: self.see_out(layer, inputs[0]))

    def see(self, layer: int, attention: Any, x_SBH: Tensor) -> None:
        model, kind = self.config.model, self.config.gha.feature_map
        heads, width, name = model.num_heads, model.head_width, model.attention_words
        if kind == "output":
            return
        if name.startswith("mhe"):
            of_seeds_SBGD = attention.qkv(x_SBH).unflatten(-1, (model.num_seeds, 3 * width))
            q, k, v = of_seeds_SBGD.repeat_interleave(heads // model.num_seeds, dim=2).chunk(3, dim=-1)
            q_SBND = attention_embedded(name, q, attention.query_embedding)
            k_SBND = attention_embedded(name, k, attention.key_embedding)
            v_SBND = attention_embedded(name, v, attention.value_embedding)
        else:
            q_SBND = attention.query(x_SBH).unflatten(-1, (heads, width))
            pairs = attention.key_value(x_SBH).unflatten(-1, (-1, 2 * width))
            k_SBND, v_SBND = pairs.repeat_interleave(heads // pairs.shape[2], dim=2).chunk(2, dim=-1)
        if kind == "value":
            self.of_layers[layer] = v_SBND.permute(2, 0, 1, 3).flatten(1)
            return
        scores_BNST = torch.einsum("sbnd,tbnd->bnst", q_SBND, k_SBND) / width**0.5
        length = scores_BNST.shape[-1]
        weights = scores_BNST.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
        rows = self.config.gha.attention_rows
        chosen = [(r + 1) * length // rows - 1 for r in range(rows)] if rows else list(range(length))
        self.of_layers[layer] = weights[:, :, chosen].transpose(0, 1).flatten(1)

    def see_out(self, layer: int, heads_SBF: Tensor) -> None:
        if self.config.gha.feature_map == "output":
            heads = self.config.model.num_heads
            self.of_layers[layer] = heads_SBF.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(1)


def attention_embedded(variant: str, x_SBND: Tensor, e_ND: Tensor) -> Tensor:
    return x_SBND + e_ND if variant == "mhe_add" else x_SBND * (1 + e_ND)


def direct_loss(maps_NF: Tensor, labels: list[int], groups: int, alpha: float, beta: float, kind: str) -> Tensor:
    """The constraint of one layer on the maps themselves."""
    centres = [
        torch.stack([x for x, label in zip(maps_NF, labels, strict=True) if label == group]).mean(0) for group in range(groups)
    ]
    cos = torch.stack([torch.stack([torch.cosine_similarity(x, z, dim=0) for z in centres]) for x in maps_NF])
    own = torch.tensor(labels)
    if kind == "categorical":
        from model.gha.losses import SCALE

        log_p = (SCALE * cos).log_softmax(-1)
        others = (log_p.sum(-1) - log_p[torch.arange(len(own)), own]) / (groups - 1)
        return -alpha * log_p[torch.arange(len(own)), own].mean() + beta * others.mean()
    pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(centres, 2)]
    return -alpha * cos[torch.arange(len(own)), own].mean() + beta * torch.stack(pairs).mean()


class Reference(NamedTuple):
    """Cross-entropy, constraint and gradient norm of each step; the last groups; how alike heads are at the end, by layer."""

    steps: list[tuple[float, float, float]]
    labels_LN: Tensor
    output_similarity: list[float]
    query_spread: list[float]


def reference(config: Config) -> Reference:
    """Plain torch on the maps themselves."""
    model, gha, training = DecoderLM(config.model), config.gha, config.training
    init_weights(model, config.run.seed)
    maps = Maps(model, config)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    data = TokenDataset(config.data.parts[0].path, "train", config.data.sequence_length, config.run.seed)
    labels_LN = running = None
    steps = []
    groups = gha.groups or 0
    with TrainLoader(data, training.global_batch_size, training.micro_batch_size, 0, 1, steps=STEPS) as loader:
        for step in range(STEPS):
            ramp, total, constraint = min(1, (step + 1) / (gha.warmup_steps + 1)), 0.0, 0.0
            gram = torch.zeros(config.model.num_layers, config.model.num_heads, config.model.num_heads, dtype=torch.float64)
            batches = loader.step(step)
            for batch in batches:
                loss = losses_of(model, batch.tokens, batch.labels).mean()
                total += float(loss.detach()) / len(batches)
                if labels_LN is not None:
                    terms = [
                        direct_loss(x, labels_LN[layer].tolist(), groups, gha.alpha * ramp, gha.beta * ramp, gha.loss)
                        for layer, x in enumerate(maps.of_layers)
                    ]
                    term = torch.stack(terms).mean()
                    loss, constraint = loss + term, constraint + float(term.detach()) / len(batches)
                (loss / len(batches)).backward()
                gram += torch.stack([x.detach().double() @ x.detach().double().T for x in maps.of_layers])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad()
            running = gram if running is None else gha.gram_decay * running + gram
            labels_LN = align(kmeans(running, groups, config.run.seed), labels_LN, groups)
            steps.append((total, constraint, float(norm)))
    assert labels_LN is not None
    return Reference(steps, labels_LN, output_similarity(model, config), query_spread(model))


@torch.no_grad()
def output_similarity(model: Any, config: Config) -> list[float]:
    """The mean cosine of two heads' outputs on the validation samples, by layer."""
    found: list[Tensor] = [torch.empty(0)] * config.model.num_layers
    for layer, block in enumerate(model.blocks):
        block.attention.out.register_forward_pre_hook(lambda _module, x, layer=layer: found.__setitem__(layer, x[0]))
    valid = TokenDataset(config.data.parts[0].path, "valid", config.data.sequence_length)
    samples = min(16, valid.samples_per_epoch) // 4 * 4  # what four ranks can share in micro-batches of one
    valid.prepare_range(0, samples)
    rows = [torch.from_numpy(valid.sample(number)) for number in range(samples)]
    model(torch.stack(rows)[:, :-1])
    outputs = [heads.unflatten(-1, (config.model.num_heads, -1)).movedim(-2, 0).flatten(1).double() for heads in found]
    return [mean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(x, 2)) for x in outputs]


def query_spread(model: Any) -> list[float]:
    """Root mean square distance of the heads' query embeddings from their mean, by layer; empty without embeddings."""
    found = [getattr(block.attention, "query_embedding", None) for block in model.blocks]
    return [float((e - e.mean(0)).double().square().mean().sqrt()) for e in found if e is not None]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_groups_loss_and_gradient_are_those_of_one_process(tmp_path: Path, prepared: Path, ranks: int) -> None:
    layouts = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
    config = write_run(tmp_path, prepared)
    run_ranks(train_layouts, ranks, ranks, free_port(), config, layouts, seconds=380)
    torch.set_num_threads(1)
    for name, settings in CASES.items():
        of_case = [layout for layout in layouts if name in cases(layout)]
        if not of_case:
            continue
        steps, labels_LN, similarity, spread = reference(resolved(config, settings))
        expected = torch.tensor(steps)
        assert len({tuple(row) for row in labels_LN.tolist()}) > 1, "all layers have the same groups: a poor test"
        for layout in of_case:
            folder = tmp_path / layout / name
            lines = [line for line in metrics(folder) if "loss" in line]
            found = torch.tensor([(line["loss"], line.get("loss/gha", 0.0), line["grad_norm"]) for line in lines])
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6, msg=named(f"{layout}, {name}"))
            assert abs(expected[1:, 1]).min() > 1e-3
            state, _ = read_tensors(folder / f"checkpoints/step_{STEPS:08d}/gha.safetensors")
            assert state["labels"].tolist() == labels_LN.tolist(), f"{layout}, {name}"
            figures = next(line for line in metrics(folder) if "heads/output_similarity" in line)
            assert figures["heads/layers/output_similarity"] == pytest.approx(similarity, rel=1e-4, abs=1e-5), layout
            assert figures["heads/output_similarity"] == pytest.approx(mean(similarity), rel=1e-4, abs=1e-5)
            assert figures.get("heads/layers/query_embedding", []) == pytest.approx(spread, rel=1e-4)
            by_layer: Any = numbers(metrics(folder), "similarity/homogeneity", "similarity/layers/homogeneity")
            assert len(by_layer) == STEPS
            assert all(mean == pytest.approx(sum(layers) / len(layers)) for mean, layers in by_layer)
