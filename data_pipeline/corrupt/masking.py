"""Masked language modelling: some tokens of a sample are hidden, and predicted from all others (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.schema import MaskedConfig
from data_pipeline.corrupt.vocabulary import Vocabulary

LONGEST_WORD = 16  # tokens


@dataclass(frozen=True)
class Masking:
    """How samples are masked. Special tokens, ends of documents among them, are never chosen."""

    rules: MaskedConfig
    vocabulary: Vocabulary

    def __call__(self, tokens: np.ndarray, draw: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """The sample as the model sees it, int64 [S], and which of its tokens are predicted, bool [S]."""
        free = ~self.vocabulary.is_special[tokens]
        count = min(int(free.sum()), max(1, round(self.rules.share * int(free.sum()))))
        chosen = np.zeros(len(tokens), bool)
        if self.rules.whole_words:
            chosen[self._words(tokens, free, count, draw)] = True
        else:
            chosen[draw.permutation(np.flatnonzero(free))[:count]] = True
        how, ordinary = draw.random_sample(len(tokens)), self.vocabulary.ordinary
        others = ordinary[draw.randint(len(ordinary), size=len(tokens))]
        replaced = chosen & (how < self.rules.replaced)
        random = chosen & ~replaced & (how < self.rules.replaced + self.rules.random)
        inputs = np.where(random, others, tokens)
        inputs[replaced] = self.vocabulary.special[self.rules.token]
        return inputs, chosen

    def _words(self, tokens: np.ndarray, free: np.ndarray, count: int, draw: np.random.RandomState) -> np.ndarray:
        """The places of drawn words with `count` tokens, or fewer where none that is left fits; at least of one word.

        A special token is never in the word of another token. What has no break for long, such as text without spaces, counts
        as words of LONGEST_WORD tokens.
        """
        begins, places = self.vocabulary.word_begins(tokens), np.arange(len(tokens))
        begins |= (places - np.maximum.accumulate(np.where(begins, places, 0))) % LONGEST_WORD == 0
        word = begins.cumsum() - 1
        sizes, left, taken = np.bincount(word[free], minlength=len(tokens)), count, list[int]()
        drawn = draw.permutation(np.flatnonzero(sizes))
        for number in drawn:
            if sizes[number] <= left:
                taken.append(number)
                left -= sizes[number]
            if not left:
                break
        return np.flatnonzero(np.isin(word, taken or drawn[:1]))
