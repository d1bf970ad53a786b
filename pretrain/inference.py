"""Use a checkpoint without an engine: load the model, evaluate it, write text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Config, StreamConfig
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import Batch, ValidationLoader
from data_pipeline.read.manifest import TOKEN_COUNTS, TOKENIZER, read_manifest
from data_pipeline.read.sets import UNNAMED, validation_sets
from data_pipeline.read.task_file import encode_task, task_faults
from data_pipeline.read.task_loader import TaskLoader
from model.build import build_model
from model.generation import Generative, generate
from model.registry import ability_fault
from model.row import RowModel
from pretrain.checkpoints.folder import COMMON_FILES, newest_checkpoint, read_config, verify
from pretrain.checkpoints.unsharded import Weights, Which, weight_files
from pretrain.distributed.layout import Layout
from pretrain.loop.evaluate import evaluate
from pretrain.loop.task_scores import in_words, log_probabilities, scores
from pretrain.objectives.base import Examples, WeightedSum, weighted_sum
from pretrain.objectives.registry import make_objective, objective_faults


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, ready to use."""

    folder: Path
    config: Config
    model: RowModel
    tokenizer: Tokenizer
    device: torch.device
    weights: str  # which they are, in words


def not_finite(checkpoint: Path, what: Literal["weights", "logits", "losses"]) -> UserError:
    """The error of a checkpoint whose weights compute no numbers; `what` is where that shows."""
    return UserError(f"{checkpoint}: its {what} are not finite: its training diverged; take an earlier checkpoint")


def load_model(path: Path, which: Which = "trained") -> LoadedModel:
    """The model of a run's folder (its newest checkpoint) or of a checkpoint folder; float32, on the GPU if there is one."""
    layout = Layout.from_environment()
    folder = newest_checkpoint(path)
    verify(folder, COMMON_FILES)
    config = read_config(folder)
    verify(folder, weight_files(folder, which))
    weights = Weights(folder, which)
    # Generation runs single tokens, which the kernel of training may not support.
    model = build_model(config.model.model_copy(update={"attention_kernel": "auto"}))
    try:
        model.load_state_dict({name: weights(name) for name in weights.shapes})
    except RuntimeError as error:
        raise UserError(f"{folder}: its weights do not fit its config.yaml ({str(error).splitlines()[0]})") from error
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise not_finite(folder, "weights")
    model.float().to(layout.device).eval()
    return LoadedModel(folder, config, model, Tokenizer.load(folder / TOKENIZER), layout.device, weights.label)


def evaluate_checkpoint(
    path: Path, data: str | None, split: str, samples: int | None, batch_size: int, which: Which = "trained"
) -> dict[str, float | int | str]:
    """Figures of a checkpoint on `split` of a prepared folder, or of each that the run measures, beside a unigram model's loss.

    bits_per_byte divides by the bytes of text that the evaluated label tokens stand for, so that tokenizers can be compared.
    The unigram model gives each token its share of the train split, with one count added to each token of the vocabulary.
    """
    loaded = load_model(path, which)
    figures: dict[str, float | int | str] = {"checkpoint": str(loaded.folder), "weights": loaded.weights}
    for name, folder in _folders(loaded, data, split).items():
        own = _evaluated(loaded, Path(folder), split, samples, batch_size)
        figures |= {f"{name}/{figure}" if name else figure: value for figure, value in own.items()}
    return figures


def _folders(loaded: LoadedModel, data: str | None, split: str) -> dict[str, str]:
    """Name → prepared folder; the name of one alone is empty."""
    if data is not None:
        return {UNNAMED: data}
    config, parts = loaded.config, loaded.config.data.parts
    if split == "valid":
        found = validation_sets(config.data, config.validation)
    else:
        found = {source.label if len(parts) > 1 else UNNAMED: source.path for source in parts}
    if not found:
        raise UserError(f"{loaded.folder}: trained on a stream; name a prepared folder with --data")
    return found


def _evaluated(
    loaded: LoadedModel, folder: Path, split: str, samples: int | None, batch_size: int
) -> dict[str, float | int | str]:
    manifest = read_manifest(folder)
    if manifest.tokenizer_sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{folder}: prepared with another tokenizer than the checkpoint's; "
            f"prepare it with --tokenizer {loaded.folder}/tokenizer.json"
        )
    of_run = loaded.config.data
    dataset = TokenDataset(folder, split, of_run.sequence_length, packing=of_run.packing)
    loader = ValidationLoader(dataset, samples, batch_size, 0, 1)

    own_data = {"path": str(folder), "sources": [], "stream": StreamConfig()}  # the run's may be elsewhere
    here = loaded.config.data.model_copy(update=own_data)
    objective = make_objective(loaded.config.model_copy(update={"data": here}))
    counts = np.load(folder / TOKEN_COUNTS, allow_pickle=False)
    unigram = torch.from_numpy(-np.log((counts + 1) / (counts + 1).sum()))
    bytes_of_token_V = torch.from_numpy(loaded.tokenizer.token_bytes())
    cpu = torch.device("cpu")
    with torch.inference_mode():
        result = evaluate(
            lambda batch: objective.loss_of(loaded.model, objective.examples(batch), loaded.model.layers, loaded.device),
            loader,
            loaded.device,
            text_bytes=partial(objective.text_bytes, bytes_of_token_V=bytes_of_token_V),
        )
        unigram_result = evaluate(lambda batch: _losses_by_table(unigram, objective.examples(batch)), loader, cpu)
    assert result is not None
    assert unigram_result is not None
    if not math.isfinite(result.loss):
        raise not_finite(loaded.folder, "losses")
    in_bits = {} if result.bits_per_byte is None else {"bits_per_byte": result.bits_per_byte}
    return {
        "data": f"{folder} ({split})",
        "tokens": round(result.weight),  # weights are 0 or 1
        "bytes": round(result.text_bytes),
        "loss": result.loss,
        "perplexity": result.perplexity,
        **in_bits,  # left out if all labels are ends of documents
        **({"unigram_loss": unigram_result.loss} if counts.any() else {}),  # without a train split nothing is known of tokens
    }


def score_tasks(path: Path, files: Sequence[str], batch_size: int, which: Which = "trained") -> dict[str, float | int | str]:
    """Scores of a checkpoint in multiple-choice tasks: those of `files`, or without any those of the run's configuration."""
    loaded = load_model(path, which)
    config, length = loaded.config, loaded.config.data.sequence_length
    tasks = {Path(file).stem: file for file in files} or config.validation.tasks
    if not tasks:
        raise UserError(f"{loaded.folder}: its run names no tasks (validation.tasks); name their files")
    validation = config.validation.model_copy(update={"tasks": tasks})
    sections = {"data": config.data, "training": config.training, "model": config.model, "validation": validation}
    for fault in (*task_faults(sections), *objective_faults(sections)):
        raise UserError(str(fault))
    objective = make_objective(config)

    def loss(batch: Batch) -> WeightedSum:
        return objective.loss_of(loaded.model, objective.examples(batch), loaded.model.layers, loaded.device)

    figures: dict[str, float | int | str] = {"checkpoint": str(loaded.folder), "weights": loaded.weights}
    for name, file in tasks.items():
        task = encode_task(name, Path(file), loaded.tokenizer, length)
        logs = log_probabilities(loss, TaskLoader(task, length, batch_size, 0, 1), loaded.device)
        if logs is None or not all(map(math.isfinite, logs)):
            raise not_finite(loaded.folder, "losses")
        figures[f"tasks/{name}"] = f"{in_words(task, length)} ({file})"
        figures |= {f"tasks/{name}/{figure}": value for figure, value in scores(task.items, logs).items()}
    return figures


def _losses_by_table(losses_V: torch.Tensor, examples: Examples) -> WeightedSum:
    """The sum over the same labels of a loss that each token id has."""
    return weighted_sum(losses_V[examples.labels], examples.weights)


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, complete characters only, until the end of the document."""
    fault = ability_fault(loaded.config.model.kind, "generates")
    if fault is not None:
        raise UserError(f"{loaded.folder}: {fault}")
    end = loaded.tokenizer.end_of_document
    ids = [end, *loaded.tokenizer.encode(prompt)]  # documents follow an end-of-document token in training
    tokens = generate(
        cast("Generative", loaded.model),
        torch.tensor([ids], device=loaded.device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token=end,
        vocab_size=loaded.tokenizer.vocab_size,
    )
    written: list[int] = []
    shown = ""
    try:
        for token in tokens:
            if int(token) == end:
                break
            written.append(int(token))
            text = loaded.tokenizer.decode(written)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character whose last bytes are still to come
                yield text[len(shown) :]
                shown = text
    except FloatingPointError as error:
        raise not_finite(loaded.folder, "logits") from error
    yield loaded.tokenizer.decode(written)[len(shown) :]
