"""Masked samples: which tokens are chosen, and what takes their place."""

from __future__ import annotations

import numpy as np
import pytest

from configs.schema import MaskedConfig
from data_pipeline.corrupt.draws import draws, sample_seed
from data_pipeline.corrupt.masking import Masking
from data_pipeline.corrupt.vocabulary import Vocabulary

END, MASK, UNUSED, SIZE = 0, 1, 2, 50


def vocabulary() -> Vocabulary:
    """Ids 3 to 49 are text; a third of them begin words."""
    numbers = np.arange(SIZE)
    return Vocabulary({"<|mask|>": MASK, "<|endoftext|>": END}, numbers < 3, numbers % 3 == 0, np.zeros(SIZE, bool))


def masking(**rules: object) -> Masking:
    return Masking(MaskedConfig.model_validate(rules), vocabulary())


def sample(length: int, seed: int = 0, ends: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(3, SIZE, length)
    tokens[draw.permutation(length)[:ends]] = END
    return tokens


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares_are_those_of_the_rules(whole_words: bool) -> None:
    mask, chosen_count, kinds, length = masking(whole_words=whole_words), 0, np.zeros(3), 512
    for number in range(200):
        tokens = sample(length, number)
        inputs, chosen = mask(tokens, draws(number))
        assert np.array_equal(inputs[~chosen], tokens[~chosen])
        if not whole_words:
            assert chosen.sum() == round(0.15 * length)
        assert chosen.sum() <= round(0.15 * length)
        chosen_count += chosen.sum()
        replaced = inputs[chosen] == MASK
        changed = ~replaced & (inputs[chosen] != tokens[chosen])
        kinds += [replaced.sum(), changed.sum(), (~replaced & ~changed).sum()]
    assert chosen_count / (200 * length) == pytest.approx(0.15, abs=0.001)
    # A random token is by chance the old one once in 47.
    assert kinds / chosen_count == pytest.approx([0.8, 0.1 * 46 / 47, 0.1 + 0.1 / 47], abs=0.01)


def test_random_tokens_are_any_text_and_nothing_else() -> None:
    mask, seen = masking(share=1.0, replaced=0.0, random=1.0), np.zeros(SIZE)
    for number in range(50):
        inputs, chosen = mask(sample(200, number), draws(number))
        assert chosen.all()
        seen += np.bincount(inputs, minlength=SIZE)
    assert seen[:3].sum() == 0
    assert seen[3:].min() > 0.7 * seen.sum() / 47


@pytest.mark.parametrize("whole_words", [False, True])
def test_ends_of_documents_are_never_chosen(whole_words: bool) -> None:
    mask = masking(share=1.0, whole_words=whole_words)
    tokens = sample(100, ends=40)
    _, chosen = mask(tokens, draws(1))
    assert np.array_equal(chosen, tokens != END)
    inputs, chosen = mask(np.full(5, END), draws(1))
    assert not chosen.any()
    assert (inputs == END).all()


def test_one_token_at_least_where_there_is_one() -> None:
    tokens = np.full(20, END)
    tokens[7] = 9
    for whole_words in (False, True):
        assert np.flatnonzero(masking(share=0.01, whole_words=whole_words)(tokens, draws(3))[1]).tolist() == [7]
    tokens[:] = 4  # no break: a word of 16 tokens, and one of four
    assert masking(share=0.1, whole_words=True)(tokens, draws(3))[1].sum() in (4, 16)


def test_text_without_breaks_is_not_hidden_as_one_word() -> None:
    _, chosen = masking(share=0.25, whole_words=True)(np.full(512, 4), draws(3))
    assert chosen.sum() == 128
    starts = np.flatnonzero(np.diff(chosen.astype(int), prepend=0) == 1)
    assert len(starts) > 3
    assert (starts % 16 == 0).all()


def test_words_are_chosen_as_a_whole() -> None:
    tokens = sample(512, ends=20)
    word = vocabulary().word_begins(tokens).cumsum()
    _, chosen = masking(whole_words=True)(tokens, draws(5))
    for number in set(word[chosen]):
        assert (chosen[word == number] == (tokens[word == number] != END)).all()
    assert chosen.sum() > 60


def test_seeds_decide_alone() -> None:
    tokens, mask = sample(128), masking()
    seeds = [
        sample_seed(origin, number) for origin in ("training, seed 1", "training, seed 2", "held out") for number in (0, 1)
    ]
    found = [tuple(mask(tokens, draws(seed))[0]) for seed in seeds]
    assert len(set(found)) == len(seeds)
    assert found == [tuple(mask(tokens, draws(seed))[0]) for seed in seeds]


def test_draws_of_a_number_stay_what_they_are() -> None:
    """Else a run that resumes after an update would see other text."""
    seed = sample_seed("training, seed 1234", 5)
    assert (seed, draws(seed).randint(1000, size=3).tolist()) == FROZEN


FROZEN = (2018639150021803149, [170, 612, 946])
