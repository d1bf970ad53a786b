"""Text generation: prefill the cache with the prompt, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from configs.errors import UserError
from model.transformer import DecoderLM


@torch.inference_mode()
def generate(
    model: DecoderLM,
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
    """Yield the next token id of each sequence, (B,), until `max_new_tokens`, the last learned position, or all have stopped.

    `temperature` 0 takes the likeliest token; otherwise one is drawn from the `top_k` likeliest, of those from the fewest whose
    probabilities reach `top_p`. A sequence that has yielded `stop_token` goes on yielding it. Ids from
    `vocab_size` on, rows that only pad the embedding, are never drawn. Dropout is off meanwhile.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: at least 0, at least 1, in (0, 1]")
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
    cache = model.new_cache(prompt_BS.shape[0], prompt_length + max_new_tokens)
    stopped = torch.zeros(prompt_BS.shape[0], dtype=torch.bool, device=prompt_BS.device)
    tokens_BS, was_training = prompt_BS, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            token = sample(model(tokens_BS, cache=cache)[:, -1, :vocab_size], temperature, top_k, top_p, generator)
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
    sorted_logits, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_logits = sorted_logits[:, :top_k]
    probabilities = sorted_logits.softmax(dim=-1)
    if top_p is not None:
        # What stands before a token decides, so that the one that crosses top_p stays, and the first always does.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)
