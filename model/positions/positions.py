"""The positions and mask of one forward pass; made once for all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.positions.masks import AttentionMask
from model.positions.registry import position_kind


@dataclass(frozen=True)
class Positions:
    """The S tokens of this pass, after `offset` cached tokens; T = offset + S keys in total.

    `rotary`: for each width of what is rotated cos and sin, each (T, width/2), of all keys; the queries are the last S rows.
    Where documents are kept apart each sequence has its own, (B, 1, T, width/2). None without a rotation.
    `slopes_N`: the slope of each head's bias; None without one. `dtype`: that of the hidden states.
    """

    length: int
    offset: int = 0
    rotary: Mapping[int, tuple[Tensor, Tensor]] | None = None
    slopes_N: Tensor | None = None
    mask: AttentionMask = field(default_factory=AttentionMask)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _made: dict[object, Tensor | None] = field(default_factory=dict, repr=False, compare=False)
    _of_maps: dict[int, Positions] = field(default_factory=dict, repr=False, compare=False)

    def of_rows(self, rows_R: Tensor) -> Positions:
        """For `rotate` of some of this pass's tokens, numbered from its first."""
        if self.rotary is None:
            return self
        rotary = {
            width: (cos[..., self.offset + rows_R, :], sin[..., self.offset + rows_R, :])
            for width, (cos, sin) in self.rotary.items()
        }
        return replace(self, length=len(rows_R), offset=0, rotary=rotary, _made={}, _of_maps={})

    def of_maps(self, maps: int) -> Positions:
        """For heads that have `maps` softmax maps each, neighbours: all have their head's slope. Made on first use."""
        if self.slopes_N is None:
            return self
        if maps not in self._of_maps:
            slopes = self.slopes_N.repeat_interleave(maps)
            self._of_maps[maps] = replace(self, slopes_N=slopes, _made={}, _of_maps={})
        return self._of_maps[maps]

    def rotary_of(self, width: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin for what is `width` wide; None without a rotation."""
        return None if self.rotary is None else self.rotary[width]

    @property
    def visible(self) -> Tensor | None:
        """(B or 1, 1, S, T), or None where every query sees all keys."""
        return self._once("visible", lambda: self.mask.between(self.queries, self.keys, self.device))

    @property
    def queries(self) -> range:
        """The numbers of this pass's tokens."""
        return range(self.offset, self.offset + self.length)

    @property
    def keys(self) -> range:
        """The numbers of all tokens, or of those of another stream, which the mask knows."""
        return range(self.queries.stop if self.mask.valid_BT is None else self.mask.valid_BT.shape[1])

    @property
    def blind(self) -> Tensor | None:
        """(B, 1, S, 1), True for a query that sees no key; None if padding cannot cause one."""
        if self.mask.valid_BT is None:
            return None
        visible = self.visible
        return self._once("blind", lambda: None if visible is None else ~visible.any(-1, keepdim=True))

    @property
    def bias(self) -> Tensor | None:
        """Mask and slopes as a bias on scores, (B or 1, N or 1, S, T), for kernels that know neither. Made on first use.

        None if `causal` suffices. A blind query gets no bias, so that softmax and its gradient stay finite.
        """
        aligned = not self.mask.causal or self.length == 1 or self.offset == 0
        if self.slopes_N is None and self.mask.is_plain and self.mask.window is None and aligned:
            return None
        return self.bias_between(self.queries, self.keys)

    def bias_between(self, queries: range, keys: range) -> Tensor | None:
        """`bias` of some queries and keys, by their numbers among the T tokens; None where each of them sees all."""
        relative = queries.start - keys.start, len(queries), len(keys)  # all that matters of them without padding and documents
        name = ("bias", relative, None if self.mask.is_plain else queries.start)
        return self._once(name, lambda: self.make_bias(queries, keys))

    def make_bias(self, queries: range, keys: range) -> Tensor | None:
        """`bias_between`, which nothing keeps."""
        visible, bias = self.mask.between(queries, keys, self.device), torch.zeros((1, 1, 1, 1), device=self.device)
        if visible is None and self.slopes_N is None:
            return None
        if self.slopes_N is not None:
            of_queries, of_keys = (torch.arange(part.start, part.stop, device=self.device) for part in (queries, keys))
            bias = (-self.slopes_N[:, None, None] * (of_queries[:, None] - of_keys))[None]
        if visible is not None:
            bias = torch.where(visible, bias, -math.inf)
        if self.blind is not None:
            bias = bias.masked_fill(self.blind[:, :, queries.start - self.offset : queries.stop - self.offset], 0)
        return bias.to(self.dtype)

    def _once(self, name: object, make: Callable[[], Tensor | None]) -> Tensor | None:
        """For all layers. Not by functools.cached_property, whose lock in Python 3.11 breaks the graphs of torch.compile."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def make_positions(
    config: ModelConfig,
    length: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
    mask: AttentionMask | None = None,
    heads: slice = slice(None),
    rotary_widths: Iterable[int] | None = None,
) -> Positions:
    """Positions of `length` tokens after `offset` cached ones, for hidden states of `dtype` and these heads.

    `rotary_widths`: how wide is what layers rotate, by default head_dim. The mask gets the configuration's window, if it is
    shorter than the sequence.

    Recomputed in each pass instead of kept as buffers: this costs less than one layer's norm, needs no longest sequence, and a
    cast of the model to bf16 cannot round the angles. Documents that the mask keeps apart count from their own first token.
    """
    mask = mask or AttentionMask()
    if config.sliding_window is not None and config.sliding_window < offset + length:
        mask = replace(mask, window=config.sliding_window)
    wide = torch.promote_types(dtype, torch.float32)
    kind, rotary, slopes_N = position_kind(config), None, None
    if kind.rotates:
        rotary, restarts_BT = {}, mask.restarts_BT
        for width in rotary_widths or [config.head_width]:
            cos, sin = kind.load()(config, width, offset + length, wide, device)
            rotary[width] = (cos, sin) if restarts_BT is None else (cos[restarts_BT][:, None], sin[restarts_BT][:, None])
    elif kind.biases_scores:
        slopes_N = torch.tensor(kind.load()(config.num_heads)[heads], dtype=wide, device=device)
    return Positions(length, offset, rotary, slopes_N, mask, dtype, device)
