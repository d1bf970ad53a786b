"""Samples of a prepared folder, addressed by one global number without upper bound.

Sample g is at place g % N of epoch g // N. Each epoch is a Megatron GPTDataset of exactly one pass with its own seed. So the
order does not depend on the number of steps, as Megatron's own order over several epochs does, nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from configs.errors import UserError
from data_pipeline.folder import LOCK, clear_abandoned, delete_unless_held, held_folder, hold
from data_pipeline.read.manifest import read_manifest
from data_pipeline.read.orders import Wanted, order_faults
from data_pipeline.read.packed import Packing
from data_pipeline.read.sound import folder_faults, sampled


class Epoch(Protocol):
    """The samples of one epoch by their places, int64 [sequence_length + 1] each."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> np.ndarray: ...

    def documents(self, place: int) -> list[int]:
        """Whose tokens a sample has, as numbers in the token file."""


class TokenDataset:
    """One split of a prepared folder as samples of `sequence_length` + 1 tokens; samples adjacent in the text share one token.

    Documents are shuffled, concatenated and split into samples, then the samples are shuffled. A remainder shorter than a
    sample is dropped, so every label is a token of the text. Held-out splits keep the default seed, so that runs with
    different seeds see the same samples.

    With `packing` best_fit samples hold complete documents instead (data_pipeline/read/pack.py), and nothing is dropped.
    """

    def __init__(
        self, folder: str | Path, split: str, sequence_length: int, seed: int = 0, packing: str = "concatenate"
    ) -> None:
        """UserError if the files differ from the manifest or the split is shorter than one sample."""
        self.folder = Path(folder)
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.manifest = read_manifest(folder)
        for fault in folder_faults(folder, self.manifest, [split]):
            raise UserError(f"{folder}: {fault}")
        if split not in self.manifest.splits:
            raise UserError(f"{folder}: has no split {split}; it has {', '.join(self.manifest.splits)}")
        tokens = self.manifest.splits[split].tokens
        self.samples_per_epoch = self.manifest.splits[split].samples(sequence_length)
        if self.samples_per_epoch < 1 and packing != "best_fit":
            raise UserError(f"{folder}: split {split} has {tokens} tokens, too few for one sample of {sequence_length} + 1")
        from data_pipeline.read.token_file import TokenFile  # here: whoever reads no token files needs no megatron-core

        self._file = TokenFile(self.folder, split, self.manifest)
        self._packing = Packing(self._file, sequence_length) if packing == "best_fit" else None
        if self._packing is not None:
            self.samples_per_epoch = self._packing.samples
        self._wanted = Wanted.of(self.folder, split, sequence_length, seed, packing)
        self._epochs: dict[int, Epoch] = {}
        self._held: dict[int, BinaryIO] = {}  # on rank 0, for all ranks: keeps other runs from deleting an index in use

    def prepare_range(self, first: int, last: int) -> None:
        """Make samples first ≤ g < last readable; every rank calls it with the same range, in the main thread.

        When an epoch begins, rank 0 builds its index and the others wait; epochs outside the range are released, so no thread
        may be reading one. UserError if an index cannot be written or is damaged, or the token file was changed meanwhile.
        """
        self._check_sizes()
        wanted = range(first // self.samples_per_epoch, (max(first, last - 1)) // self.samples_per_epoch + 1)
        missing = [epoch for epoch in wanted if epoch not in self._epochs]
        outdated = [epoch for epoch in self._epochs if missing and epoch not in wanted]
        for epoch in outdated:
            del self._epochs[epoch]
        for epoch in missing:
            self._build_once(epoch)
        # _build_once synchronised all ranks, so none still maps an outdated index. Deleting a file that another machine maps
        # over NFS would lose its pages and kill that process.
        for epoch in outdated:
            self._give_back(epoch)
        for epoch in missing:
            self._epochs[epoch] = self._load(epoch)

    def _check_sizes(self) -> None:
        """UserError for files that are shorter than they were: to read what is missing of a mapped file kills a process."""
        record = self.manifest.splits[self.split]
        for name, written in ((f"{self.split}.bin", record.bin), (f"{self.split}.idx", record.idx)):
            path = self.folder / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: cannot be read any more: {error.strerror}") from error
            if found != written.bytes:
                size = f"it has {found} bytes instead of {written.bytes}"
                raise UserError(f"{path}: was changed while the run reads it, {size}; put it back, then resume")

    def release(self) -> None:
        """Give back the indices of all epochs; those that no run uses are deleted. No other rank may be reading them."""
        for epoch in list(self._epochs):
            del self._epochs[epoch]
            self._give_back(epoch)

    def _give_back(self, epoch: int) -> None:
        if epoch in self._held:
            self._held.pop(epoch).close()
            delete_unless_held(self.index_folder(epoch))

    def sample(self, number: int) -> np.ndarray:
        """Tokens of sample `number` ≥ 0, int64 [sequence_length + 1]; prepare_range must have covered it."""
        epoch, place = divmod(number, self.samples_per_epoch)
        return self._epochs[epoch][place]

    def packed(self) -> str:
        """What becomes of the tokens of an epoch, in words."""
        tokens, places = self.manifest.splits[self.split].tokens, self.samples_per_epoch * self.sequence_length
        samples = f"{self.samples_per_epoch:,} samples an epoch"
        if self._packing is None:
            return f"{samples}, the last {tokens - 1 - places:,} of {tokens:,} tokens are left out"
        longer = int((self._file.lengths > self.sequence_length).sum())
        return f"{samples}, {(places - tokens) / places:.3%} padding, {longer:,} documents longer than a sample are split"

    def documents(self, number: int) -> list[int]:
        """The documents that sample `number` has tokens of, in their order, as numbers in the token file."""
        epoch, place = divmod(number, self.samples_per_epoch)
        return self._epochs[epoch].documents(place)

    def index_folder(self, epoch: int) -> Path:
        """The folder of one epoch's index. It may be deleted whenever no run uses it."""
        return self._wanted.place(epoch)

    def _epoch_seed(self, epoch: int) -> int:
        """31 bits. A hash, because with a sum the second epoch of one seed would equal the first of the next."""
        text = f"order of {self.split}, seed {self.seed}, epoch {epoch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1

    def _build_once(self, epoch: int) -> None:
        """Rank 0 writes the index if it does not exist, and holds it. All ranks return together, or all raise."""
        distributed = torch.distributed.is_initialized()
        final, failure = self.index_folder(epoch), None
        if not distributed or torch.distributed.get_rank() == 0:
            try:
                self._held[epoch] = self._build_and_hold(epoch)
            except UserError as error:
                failure = error
        if distributed:
            on_gpu = "nccl" in torch.distributed.get_backend()
            failed = torch.tensor(float(failure is not None), device="cuda" if on_gpu else "cpu")
            torch.distributed.all_reduce(failed)
            if failed.item() and failure is None:
                raise UserError(f"{final}: rank 0 could not write it; see its error")
        if failure is not None:
            raise UserError(
                f"{failure}; the order of the samples is kept there, so {self.folder} must be writable"
            ) from failure

    def _build_and_hold(self, epoch: int) -> BinaryIO:
        final = self.index_folder(epoch)
        clear_abandoned(final.parent)
        for _ in range(3):
            if not final.is_dir():
                with held_folder(final) as building:
                    self._one_pass(epoch, building)
            try:
                return hold(final)
            except FileNotFoundError:
                pass  # another run finished with it and deleted it in between
            except OSError as error:
                raise UserError(f"{final}: cannot be read: {error.strerror}") from error
        raise UserError(f"{final}: has no {LOCK}; delete it, it is built again")

    def _load(self, epoch: int) -> Epoch:
        folder = self.index_folder(epoch)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: rank 0 wrote it, but this machine does not see it; put the data on a shared file system"
            )
        damaged = f"{folder}: is damaged; delete it, it is built again"
        try:
            # Megatron would unpickle a file that is no array; this rejects such a file, and a truncated one.
            for fault in order_faults(folder, self._file.lengths, sampled):
                raise UserError(f"{damaged} ({fault})")
            data = self._one_pass(epoch, folder)
        except OSError as error:  # such as too many open files
            raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{damaged} ({error})") from error
        if len(data) != self.samples_per_epoch:
            raise UserError(damaged)
        return data

    def _one_pass(self, epoch: int, cache: Path) -> Epoch:
        if self._packing is not None:
            return self._packing.one_pass(self._epoch_seed(epoch), cache)
        return self._file.one_pass(self.sequence_length, self._epoch_seed(epoch), cache)
