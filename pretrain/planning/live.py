"""How many bytes the tensors of this process hold while it computes, and how many at most: of real tensors and of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, UntypedStorage, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on, it follows every storage that an operator gives out, from then until nothing refers to it.

    `now` are the bytes of those and of the tensors that it was given, also where a storage changes its size; `peak` the most
    since `start_over`. What a kernel allocates and frees by itself is not seen. `at_peak` is called whenever the peak rises.
    """

    def __init__(self, held: Iterable[Tensor] = (), at_peak: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[UntypedStorage]] = {}
        self._at_peak = at_peak
        for tensor in held:
            self._follow(tensor)
        self.start_over()

    def start_over(self) -> None:
        """Let the peak be what is held now."""
        self.peak = self.now

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for reference in list(self.storages.values()) if (storage := reference()) is not None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._follow(value)
        now = self.now
        if now > self.peak:
            self.peak = now
            self._at_peak()
        return out

    def _follow(self, tensor: Tensor) -> None:
        if tensor.layout is not strided:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.storages:
            self.storages[address] = weakref.ref(storage, lambda _: self.storages.pop(address, None))
