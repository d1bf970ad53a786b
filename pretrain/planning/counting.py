"""What the layers of a rank keep and need at most, counted in one run of each on tensors without values.

Everything that differs between attention variants, switches and tensor parallelism is in the code that trains, so that code is
what runs here: one block of each kind, the embedding, and what follows the blocks with the loss. Tensors are fake (shapes and
lifetimes, no values), and so are the other ranks. Nothing here needs a GPU; `OnGPU` stands for what differs there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.schema import Config, ModelConfig
from model.build import model_row
from model.layers import Layers
from model.parallel.pipeline import row_bounds
from model.row import Pass, RowLayer
from pretrain.distributed.layers import make_layers
from pretrain.distributed.layout import Layout
from pretrain.objectives.registry import make_objective
from pretrain.planning.live import LiveBytes
from pretrain.planning.on_gpu import OnGPU
from pretrain.planning.pieces import Piece, Pieces, Shape


def count_pieces(config: Config, gpu: bool, keeps_gradients: bool) -> Pieces:
    """The pieces of a resolved configuration's model on one tensor-parallel rank, in one micro-batch.

    Nothing is recomputed: `Piece.recomputed` follows from what is counted here. `keeps_gradients`: those of a piece's parameters are kept until its backward pass ends; else each is taken away at once.
    """
    with _rank(config) as layout, FakeTensorMode(), OnGPU() if gpu else nullcontext():
        return _Counting(config, make_layers(config, layout), keeps_gradients).pieces()


@contextmanager
def _rank(config: Config) -> Iterator[Layout]:
    """The first of the tensor-parallel ranks; the others do not exist. One thread, as ranks on CPUs have."""
    tensor, threads = config.parallel.tensor, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if tensor == 1:
            yield Layout()
        else:
            with Layout(0, tensor, sizes={"tensor": tensor}).opened(FakeStore(), backend="fake") as layout:
                yield layout
    finally:
        torch.set_num_threads(threads)


def row_stages(config: Config) -> list[int]:
    """Where the stages of a pipeline begin in the row and where the last one ends, balanced by parameters."""
    row = model_row(config.model)
    return row_bounds(row, [layer.weight for layer in row], config.parallel.pipeline)


class _Counting:
    """Runs the row of a model, layer by layer."""

    def __init__(self, config: Config, layers: Layers, keeps_gradients: bool) -> None:
        self.config, self.layers, self.keeps_gradients = config, layers, keeps_gradients
        self.dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
        if layers.size > 1:
            layers.config.params_dtype = self.dtype  # type: ignore[attr-defined]
        batch, length, share = config.training.micro_batch_size, config.row_length, layers.size if layers.sequence else 1
        self.hidden = length // share, batch, config.model.hidden_size
        self.tokens_BS = torch.zeros(batch, length, dtype=torch.long)
        self.pass_ = Pass(config.model, layers)
        self.pass_.begin(self.tokens_BS)

    def pieces(self) -> Pieces:
        row, of_blocks = model_row(self.config.model, self.layers), dict[ModelConfig, Piece]()
        blocks = [number for number, layer in enumerate(row) if layer.is_block]
        before = [self._piece(layer, of_tokens=number == 0) for number, layer in enumerate(row[: blocks[0]])]
        for layer in row[blocks[0] : blocks[-1] + 1]:
            assert layer.block is not None
            if layer.block not in of_blocks:
                of_blocks[layer.block] = self._piece(layer)
        *between, last = row[blocks[-1] + 1 :]
        after = [*map(self._piece, between), self._piece(last, then=self._loss)]
        return Pieces(tuple(before), of_blocks, tuple(after), _bytes(self._shared()))

    def _piece(self, layer: RowLayer, of_tokens: bool = False, then: Callable[[Tensor], Tensor] = lambda out: out) -> Piece:
        """Forward and backward of one layer of the row, and of what comes `then`."""
        holder, shared = self._built(layer), _bytes(self._shared())
        with LiveBytes([*holder.parameters(), self.tokens_BS, *self._shared()]) as live:
            x = self.tokens_BS if of_tokens else torch.empty(self.hidden, dtype=self.dtype, requires_grad=True) * 1
            start = live.now
            live.start_over()
            out = layer.run(holder, x, self.pass_)
            output = 0 if out is x else out.numel() * out.element_size()
            out = then(out)
            made = _bytes(self._shared()) - shared  # what all blocks share is made with the first one
            kept, forward = live.now - start - made, live.peak - start - made
            total = _Sink.apply(out)
            del out, x
            live.start_over()
            if total.requires_grad:
                total.backward()
            backward = live.peak - start - made
        prefix = f"{next(iter(layer.modules))}." if layer.is_block else ""
        named = ((name.removeprefix(prefix), p) for name, p in holder.named_parameters())
        parameters = tuple(Shape(name, p.numel(), p.dim(), p.shape[0]) for name, p in named)
        return Piece(parameters, output, kept, forward, backward)

    def _built(self, layer: RowLayer) -> nn.Module:
        holder, before = nn.Module(), torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # parameters without values cannot be converted later
        try:
            layer.build(holder)
        finally:
            torch.set_default_dtype(before)
        if not self.keeps_gradients:
            for parameter in holder.parameters():
                parameter.register_post_accumulate_grad_hook(_forget)
        return holder

    def _loss(self, own: Tensor) -> Tensor:
        return make_objective(self.config).loss(own, self.tokens_BS, None, self.layers).over(1.0)

    def _shared(self) -> list[Tensor]:
        """What all blocks of a pass read: rotations, slopes and masks."""
        tensors: list[Tensor | None] = [self.pass_.documents_BT]
        for positions in self.pass_._positions.values():
            of_widths = positions.rotary.values() if positions.rotary is not None else ()
            tensors += [*(table for pair in of_widths for table in pair), positions.slopes_N, *positions._made.values()]
        return [tensor for tensor in tensors if tensor is not None]


class _Sink(torch.autograd.Function):
    """What follows a piece: it reads its output and gives it a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes(tensors: list[Tensor]) -> int:
    """Of their storages."""
    return sum({(storage := tensor.untyped_storage())._cdata: storage.nbytes() for tensor in tensors}.values())
