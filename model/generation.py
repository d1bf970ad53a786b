"""Text generation: prefill the cache with the prompt, then generate one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.cache import Cache


class Generative(Protocol):
    """A model that reads its tokens step by step and keeps their keys and values in a cache."""

    config: ModelConfig
    training: bool

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens of each of `batch_size` sequences."""

    def logits(self, tokens_BS: Tensor, *, cache: Cache, last_only: bool) -> Tensor:
        """Logits (B, S, vocab), or with `last_only` (B, 1, vocab), of tokens that follow those in the cache."""

    def eval(self) -> Generative: ...

    def train(self, mode: bool = True) -> Generative: ...


def generate(
    model: Generative,
    prompt_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """The next token ids of each sequence, (B,), until `max_new_tokens`, the last learned position, or all have stopped.

    Arguments are checked at the call; tokens are generated lazily. FloatingPointError if the model computes no numbers.

    `temperature` 0 takes the likeliest token. Otherwise one is sampled from the `top_k` likeliest, further limited to the
    smallest set whose probabilities reach `top_p`. A sequence that has yielded `stop_token` keeps yielding it. Ids from
    `vocab_size` on only pad the embedding and are never sampled. Dropout is off during generation.
    """
    allowed_temperature = math.isfinite(temperature) and temperature >= 0
    if not allowed_temperature or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: finite and at least 0, at least 1, in (0, 1]"
        )
    if not 0 <= seed < 2**63 or max_new_tokens < 0:
        raise UserError(f"seed {seed}, max_new_tokens {max_new_tokens}: from 0 to 2^63 - 1, at least 0")
    prompt_length, longest = prompt_BS.shape[1], model.config.max_position_embeddings
    if prompt_length == 0:
        raise UserError("the prompt is empty; generation needs at least one token")
    if longest is not None and prompt_length >= longest:
        raise UserError(
            f"the prompt has {prompt_length} tokens; with learned positions fewer than {longest} leave room for more"
        )
    if longest is not None:
        max_new_tokens = min(max_new_tokens, longest - prompt_length)
    generator = torch.Generator(prompt_BS.device).manual_seed(seed)

    def draw(logits_BSV: Tensor) -> Tensor:
        logits_BV = logits_BSV[:, -1, :vocab_size]
        if not torch.isfinite(logits_BV).all():
            raise FloatingPointError("the logits are not finite")
        return sample(logits_BV, temperature, top_k, top_p, generator)

    return _generated(model, prompt_BS, max_new_tokens, draw, stop_token)


@torch.inference_mode()
def _generated(
    model: Generative, prompt_BS: Tensor, max_new_tokens: int, draw: Callable[[Tensor], Tensor], stop_token: int | None
) -> Iterator[Tensor]:
    """`generate` after its checks; `draw` samples the tokens from logits."""
    cache = model.new_cache(prompt_BS.shape[0], prompt_BS.shape[1] + max_new_tokens)
    stopped = torch.zeros(prompt_BS.shape[0], dtype=torch.bool, device=prompt_BS.device)
    tokens_BS, was_training = prompt_BS, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            token = draw(model.logits(tokens_BS, cache=cache, last_only=True))
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            yield token
            if stop_token is not None and stopped.all():
                return
            tokens_BS = token[:, None]
    finally:
        model.train(was_training)


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> Tensor:
    """Logits (B, vocab) → token ids (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    sorted_logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # The largest logit becomes 0 at any temperature; the others may overflow to -inf, which is probability 0.
    sorted_logits = (sorted_logits - sorted_logits[:, :1]) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None:
        sorted_logits = sorted_logits[:, :top_k]
    probabilities = sorted_logits.softmax(dim=-1)
    if top_p is not None:
        # Compare the sum before each token, so that the one that crosses top_p is kept, and the first always is.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)
