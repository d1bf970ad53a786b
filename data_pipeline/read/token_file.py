"""The token file of one split, read by megatron-core: its documents, and one pass over them as samples.

The only reader that imports megatron-core, which takes seconds. `TokenDataset` imports this file when it opens one.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.errors import UserError
from configs.packages import quiet_megatron
from data_pipeline.folder import MANIFEST
from data_pipeline.read.manifest import Manifest, file_record

with quiet_megatron():
    from megatron.core import __version__ as megatron_version
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
    from megatron.core.datasets.utils import Split

HASHED_BYTES = 64 << 20  # files up to this size are hashed when they are opened; `launch/prepare.py check` hashes all
WINDOWS, WINDOW = 64, 4096  # of larger ones, ids are looked at in so many places, so many at each
_AGAIN = "copy it again or run launch/prepare.py"


class TokenFile:
    """The open file of `split` in a prepared folder. `version` is of the program that orders its samples."""

    version: str = megatron_version

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """UserError if the file differs from the manifest."""
        self.split, self.manifest = split, manifest
        record, path = manifest.splits[split], folder / f"{split}.idx"
        damaged = UserError(f"{path}: is damaged, it does not fit {MANIFEST}; {_AGAIN}")
        # Magic, version, type of the ids, number of sequences and of document bounds: Megatron only asserts them.
        kind = DType.code_from_dtype(np.dtype(manifest.dtype).type)
        expected = struct.pack("<9sQBQQ", b"MMIDIDX", 1, kind, record.documents, record.documents + 1)
        with path.open("rb") as file:
            if file.read(len(expected)) != expected:
                raise damaged
        for name, written in ((f"{split}.bin", record.bin), (f"{split}.idx", record.idx)):
            if written.bytes <= HASHED_BYTES and file_record(folder / name) != written:
                raise UserError(f"{folder / name}: is damaged (its sha256 differs from that in {MANIFEST}); {_AGAIN}")
        self._tokens = IndexedDataset(str(folder / split))
        lengths = self._tokens.sequence_lengths
        if int(lengths.sum()) != record.tokens or int(lengths.min()) < 1:
            raise damaged
        self._check_ids(folder / f"{split}.bin")

    def _check_ids(self, path: Path) -> None:
        """UserError if places spread over the file hold an id that the tokenizer does not have."""
        ids = np.memmap(path, dtype=self.manifest.dtype, mode="r")
        for start in range(0, ids.size, max(WINDOW, ids.size // WINDOWS)):
            window = ids[start : start + WINDOW]
            if int(window.max()) >= self.manifest.vocab_size or int(window.min()) < 0:
                raise UserError(
                    f"{path}: is damaged, it has ids outside the vocabulary of {self.manifest.vocab_size}; {_AGAIN}"
                )

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
        item = self._data[place]
        return np.append(item["tokens"].numpy(), item["labels"][-1].numpy())

    def documents(self, place: int) -> list[int]:
        _, documents = self._data._query_document_sample_shuffle_indices(place)
        return [int(document) for document in documents]
