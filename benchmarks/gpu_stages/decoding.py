"""Stage decoding: tokens a second after a prompt, by our own models and by exported ones in transformers, in bf16.

Ours are those of the 1 B configuration, exported ones as benchmarks/generation.py builds them. Weights are random. Times are
those of whole steps, with Python's own: of one step of the full batch, after the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import generation
from benchmarks.gpu_stages.stages import Case, Options, Row
from benchmarks.gpu_stages.timing import need_package, now
from benchmarks.gpu_stages.trainers import ENGINES, configuration
from configs.schema import ModelConfig
from model.costs.memory import kv_cache_bytes_per_token
from model.decoder import DecoderLM
from model.generation import generate

OURS = ("mha", "mqa", "mhe_add", "mhe_mul")
EXPORTED = (("mha", "stock"), ("mhe_add", "stock"), ("mhe_add", "native"))
ROUNDS = 3


def cases(options: Options) -> list[Case]:
    ours = [Case(f"{variant}, ours", partial(by_us, options, variant)) for variant in OURS]
    exported = [Case(f"{variant}, {kind}", partial(by_transformers, options, variant, kind)) for variant, kind in EXPORTED]
    return ours + exported


def sizes(options: Options) -> tuple[int, int, int]:
    """Batch, tokens of the prompt, new tokens."""
    return (2, 8, 4) if options.tiny else (16, 1024, 32)


def by_us(options: Options, variant: str) -> Iterator[Row]:
    config = configuration(options, {**ENGINES["fsdp"], "model.attention": variant}, 1, 1).model
    batch, prompt, new_tokens = sizes(options)
    with torch.device("meta"):
        model = DecoderLM(config)
    model = model.to(torch.bfloat16).to_empty(device=options.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    prompt_BS = torch.randint(config.vocab_size or 0, (batch, prompt), device=options.device)
    runs = [decode(model, prompt_BS, new_tokens, options.device) for _ in range(ROUNDS + 1)][1:]
    kv_bytes = kv_cache_bytes_per_token(config) * batch * (prompt + new_tokens)
    yield row(variant, "ours", config, options, kv_bytes, runs)


def decode(model: DecoderLM, prompt_BS: torch.Tensor, new_tokens: int, device: str) -> tuple[float, float]:
    """Seconds until the first new token, and for each of those after it."""
    started = now(device)
    tokens = generate(model, prompt_BS, new_tokens + 1, temperature=0)
    next(tokens)
    prefilled = now(device)
    for _ in tokens:
        pass
    return prefilled - started, (now(device) - prefilled) / new_tokens


def by_transformers(options: Options, variant: str, kind: str) -> Iterator[Row]:
    need_package("transformers")
    batch, prompt, new_tokens = sizes(options)
    fields = {"hidden_size": 32, "num_layers": 2, "num_heads": 4} if options.tiny else {}
    given: dict[str, Any] = {"hidden_size": 1024, "num_layers": 8, "num_heads": 64, **fields}
    length = prompt + new_tokens
    config = ModelConfig(attention=variant, vocab_size=generation.VOCABULARY, max_position_embeddings=length, **given)
    model = generation.build(config, kind, length).to(options.device, torch.bfloat16)
    prompt_BS = torch.randint(generation.VOCABULARY, (batch, prompt), device=options.device)
    runs = [generation.generate(model, prompt_BS, new_tokens) for _ in range(ROUNDS + 1)][1:]
    yield row(variant, kind, config, options, runs[0][2], [run[:2] for run in runs])


def row(variant: str, form: str, config: ModelConfig, options: Options, kv_bytes: int, runs: list[tuple[float, float]]) -> Row:
    batch, prompt, new_tokens = sizes(options)
    prefill, token = (median(column) for column in zip(*runs, strict=True))
    found: Row = {"variant": variant, "format": form, "layers": config.num_layers, "width": config.hidden_size}
    found |= {"heads": config.num_heads, "head_dim": config.head_width, "batch": batch, "prompt": prompt}
    found |= {"new_tokens": new_tokens, "kv_bytes": kv_bytes, "prefill_s": prefill, "token_s": token}
    return found | {"tokens_per_second": batch / token}
