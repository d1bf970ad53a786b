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

    `peak` are the most bytes of those and of the tensors that it was given, since `start_over`; `at_peak` is called whenever
    it rises. What a kernel allocates and frees by itself is not seen. Of the storages that it was given, those that are empty
    may grow and shrink, as FSDP's unsharded parameters do.
    """

    def __init__(self, held: Iterable[Tensor] = (), at_peak: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}
        self._bytes = 0  # of all that keep their size
        self._changing: list[UntypedStorage] = []
        self._at_peak = at_peak
        for tensor in held:
            self._follow(tensor, may_change=True)
        self.start_over()

    def start_over(self) -> None:
        """Let the peak be what is held now."""
        self.peak = self.now

    @property
    def now(self) -> int:
        return self._bytes + sum(storage.nbytes() for storage in self._changing)

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

    def _follow(self, tensor: Tensor, may_change: bool = False) -> None:
        if tensor.layout is not strided:
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[address]
            self._bytes -= size

        if size:
            self._bytes += size
            self._known[address] = weakref.ref(storage, gone)
        elif may_change:
            self._changing.append(storage)
            self._known[address] = weakref.ref(storage)
