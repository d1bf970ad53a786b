"""The token file of one split, read by megatron-core: its documents, and one pass over them as samples.

The only reader that imports megatron-core, which takes seconds. `TokenDataset` imports this file when it opens one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.packages import quiet_megatron
from data_pipeline.read.manifest import Manifest

with quiet_megatron():
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split


class TokenFile:
    """The open file of `split` in a prepared folder."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """Its files are sound (data_pipeline/read/sound.py)."""
        self.split, self.manifest = split, manifest
        self._tokens = IndexedDataset(str(folder / split))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32."""
        lengths: np.ndarray = self._tokens.sequence_lengths
        return lengths

    def document(self, number: int, start: int, most: int) -> np.ndarray:
        """At most `most` tokens of a document, from its token `start` on."""
        tokens: np.ndarray = self._tokens.get(number, start, min(most, int(self.lengths[number]) - start))
        return tokens

    def one_pass(self, sequence_length: int, seed: int, cache: Path) -> Concatenated:
        """Megatron's samples of one pass. It reads its index from `cache`, or writes it there if there is none."""
        tokenizer = SimpleNamespace(
            vocab_size=self.manifest.vocab_size,
            eod=self.manifest.end_of_document,
            pad=-1,  # an id that no text has, so that no token counts as padding
            unique_identifiers={"sha256": self.manifest.tokenizer_sha256},
        )
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([self.split], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(self._tokens), dtype=np.int32)
        return Concatenated(GPTDataset(self._tokens, None, documents, None, Split[self.split], config))


class Concatenated:
    """The samples of one epoch: shuffled documents one after the other."""

    def __init__(self, data: GPTDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        tokens: np.ndarray = self._read(place)[0]
        return tokens.astype(np.int64)

    def documents(self, place: int) -> list[int]:
        return [int(document) for document in self._read(place)[1]]

    def _read(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and documents. What Megatron makes of them besides, masks and positions, takes longer than to read them."""
        found: tuple[np.ndarray, np.ndarray] = self._data._query_document_sample_shuffle_indices(place)
        return found
