"""Generation with a cache against a loop without one; sampling rules; where it ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.generation import generate, sample
from model.initialization import init_weights
from tests.needs import needs

NAMES = ["mha", "mqa", "gqa", "mhe_add", "mhe_mul"]
LONGEST = 12


def model_of(name: str, position: str = "learned", embedding_position: str = "after") -> DecoderLM:
    fields: dict[str, Any] = {"position": position, "embedding_position": embedding_position, "init_std": 0.3, **needs(name)}
    config = ModelConfig(
        **fields,
        attention=name,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        vocab_size=19,
        tie_embeddings=False,
        dropout=0.2,
        max_position_embeddings=LONGEST if position == "learned" else None,
    )
    model = DecoderLM(config).double()
    init_weights(model, seed=2)
    return model


def prompt() -> Tensor:
    return torch.tensor([[1, 2, 3], [9, 4, 4]])


def generated(model: DecoderLM, max_new_tokens: int = 8, **options: Any) -> list[list[int]]:
    return torch.stack(list(generate(model, prompt(), max_new_tokens, **options)), dim=1).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("position", "embedding_position"), [("learned", "after"), ("rope", "before"), ("alibi", "after")])
def test_greedy_equals_a_loop_without_cache(name: str, position: str, embedding_position: str) -> None:
    model = model_of(name, position, embedding_position if name.startswith("mhe") else "after")
    tokens_BS = prompt()
    model.eval()
    for _ in range(8):
        tokens_BS = torch.cat([tokens_BS, model.logits(tokens_BS)[:, -1:].argmax(dim=-1)], dim=1)
    expected = tokens_BS[:, 3:].tolist()
    assert len({token for row in expected for token in row}) > 3  # not a single repeated token
    model.train()
    assert generated(model, temperature=0) == expected
    assert generated(model, top_k=1, seed=5) == expected
    assert model.training


def test_a_seed_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    model, state = model_of("mhe_add"), torch.get_rng_state()
    first = generated(model, temperature=2.0, top_p=0.9, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert generated(model, temperature=2.0, top_p=0.9, seed=1) == first
    assert generated(model, temperature=2.0, top_p=0.9, seed=2) != first


def shares(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[float]:
    """Shares of four tokens of probability 0.1, 0.5, 0.25, 0.15 among many draws."""
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(20_000, 4)
    drawn = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    return (drawn.bincount(minlength=4) / 20_000).tolist()


def test_sampling_rules() -> None:
    assert shares() == pytest.approx([0.1, 0.5, 0.25, 0.15], abs=0.015)
    squares = [0.01, 0.25, 0.0625, 0.0225]
    assert shares(temperature=0.5) == pytest.approx([square / sum(squares) for square in squares], abs=0.015)
    assert shares(top_k=2) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.015)
    assert shares(top_p=0.8) == pytest.approx([0, 5 / 9, 2.5 / 9, 1.5 / 9], abs=0.015)
    assert shares(top_p=0.7) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.015)
    assert shares(top_k=3, top_p=0.6) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.015)
    for choice in (shares(top_p=0.01), shares(top_k=1), shares(temperature=0)):
        assert choice == [0, 1, 0, 0]
    assert shares(top_k=9, top_p=1.0) == shares()


def test_ends_at_the_stop_token_of_every_row() -> None:
    model = model_of("mhe_mul")
    first, second = generated(model, temperature=0)
    stop = first[2]
    rows = generated(model, temperature=0, stop_token=stop)
    for row, free in zip(rows, (first, second), strict=True):
        end = free.index(stop) if stop in free else len(free)
        assert row[: end + 1] == free[: end + 1]
        assert set(row[end:]) <= {stop}
    ends = [free.index(stop) + 1 if stop in free else len(free) for free in (first, second)]
    assert len(rows[0]) == max(ends)
    alone = [token.item() for token in generate(model, prompt()[:1], 8, temperature=0, stop_token=stop)]
    assert alone == first[: first.index(stop) + 1]


def test_ends_at_the_last_learned_position_only() -> None:
    assert len(generated(model_of("mqa"), 50)[0]) == LONGEST - 3
    assert len(generated(model_of("mqa", "rope"), 50)[0]) == 50
    assert list(generate(model_of("mqa"), prompt(), 0)) == []


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (0, {}, "prompt is empty"),
        (LONGEST, {}, f"prompt has {LONGEST} tokens"),
        (3, {"temperature": -1.0}, "temperature"),
        (3, {"temperature": math.nan}, "temperature nan"),
        (3, {"temperature": math.inf}, "temperature inf"),
        (3, {"seed": -1}, "seed -1"),
        (3, {"seed": 2**63}, "seed 9223372036854775808"),
        (3, {"max_new_tokens": -1}, "max_new_tokens -1"),
        (3, {"top_k": 0}, "top_k"),
        (3, {"top_p": 0.0}, "top_p"),
        (3, {"top_p": 1.5}, "top_p"),
    ],
)
def test_impossible_requests_are_refused_at_once(tokens: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model_of("mha"), torch.zeros(1, tokens, dtype=torch.long), **{"max_new_tokens": 4} | options)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_memory_grows_with_the_tokens_generated_and_not_those_allowed(position: str) -> None:
    model = model_of("mhe_add", position)
    stream = generate(model, prompt(), 10**13, temperature=0, seed=2**63 - 1)
    assert [next(stream).tolist() for _ in range(8)] == list(map(list, zip(*generated(model, temperature=0), strict=True)))


def test_logits_of_the_prompt_are_made_for_its_last_token_alone() -> None:
    model, rows = model_of("mqa"), []
    model.final_norm.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    generated(model, 3)
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[50.0, 3.0, 90.0, -torch.inf], [-7.0, -80.0, -9.0, -8.0]], dtype=dtype)
    assert sample(logits, temperature, None, None, torch.Generator().manual_seed(0)).tolist() == [2, 0]
    assert sample(logits, temperature, 3, 0.9, torch.Generator().manual_seed(0)).tolist() == [2, 0]


def test_an_abandoned_generation_leaves_the_model_as_it_was() -> None:
    model = model_of("mha")
    stream = generate(model, prompt(), 8)
    next(stream)
    del stream
    assert model.training


class Fails:
    """Logits of a model, with one that is no number from its `at`th call on."""

    def __init__(self, model: DecoderLM, at: int, value: float) -> None:
        self.calls, self.logits = 0, model.logits
        self.at, self.value = at, value

    def __call__(self, tokens_BS: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        logits_BSV = self.logits(tokens_BS, **options)
        if self.calls >= self.at:
            logits_BSV[1, -1, 7] = self.value
        return logits_BSV


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 4, "top_p": 0.5}])
def test_logits_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch, value: float, options: Any) -> None:
    """Before the token is given away where every token is looked at anyway, else at the end."""
    for stop_token, given in ((18, 2), (None, 5)):
        model, tokens = model_of("mha"), list[Tensor]()
        monkeypatch.setattr(model, "logits", Fails(model, 3, value))
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            tokens.extend(generate(model, prompt(), 5, stop_token=stop_token, seed=4, **options))
        assert len(tokens) == given


def test_the_device_is_not_waited_for_at_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to read a tensor's values makes the host wait for a GPU."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        read = getattr(Tensor, name)

        def noted(tensor: Tensor) -> Any:
            reads.append(name)
            return read(tensor)

        return noted

    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    assert len(list(generate(model_of("mha"), prompt(), 6, top_k=5, top_p=0.9))) == 6
    assert reads == ["tolist"]
    reads.clear()
    assert len(list(generate(model_of("mha"), prompt(), 6, top_k=5, stop_token=99))) == 6
    assert reads == ["tolist"] * 6
