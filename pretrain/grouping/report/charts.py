"""Pictures of a head election, without a plotting library: similarities as pixels or PNG, votes and margins as SVG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.report.svg import picture, text

# Blue, white, red of ColorBrewer, which the colour-blind can tell apart: cosines from −1 to 1.
_ANCHORS = ("2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b")
_STEPS = 254  # levels 0 to 254 for cosines −1 to 1: 127 is 0
_LINE = 255  # the level of lines between groups
_IMAGE, _PAGE = 400, 360  # approximate width in pixels of an image for TensorBoard and of one on the page
_BARS = 64  # bars in a row of the chart of votes
_GROUP_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito 2008; neighbours differ


@dataclass(frozen=True)
class Bar:
    """A head in the chart of votes."""

    head: int
    group: int
    score: float
    stays: bool


@dataclass(frozen=True)
class Axis:
    """One side of a layer's similarity image: `positions` has for each pixel the position in `heads`, −1 on a line."""

    heads: tuple[int, ...]  # sorted by group, then by number
    positions: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]  # group, its first pixel, the pixel after its last


def similarity_image(G_NN: Tensor, labels_N: Tensor) -> Tensor:
    """Cosines between the heads of a layer as a (3, H, W) uint8 image: heads by group, a line between groups.

    Blue −1, white 0, red 1; 300 to 600 pixels wide for up to 128 heads.
    """
    return _palette()[_levels(G_NN, axis(labels_N.tolist(), _IMAGE)).long()].permute(2, 0, 1)


def axis(labels: Sequence[int], pixels: int) -> Axis:
    """One side of an image, about `pixels` long; `labels` are the heads' groups. A cell has at least one pixel."""
    heads = sorted(range(len(labels)), key=lambda head: (labels[head], head))
    cell = max(1, round(pixels / len(heads)))
    line = 2 if cell >= 12 else 1
    positions: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for position, head in enumerate(heads):
        if spans and spans[-1][0] != labels[head]:
            positions += line * [-1]
        if not spans or spans[-1][0] != labels[head]:
            spans.append((labels[head], len(positions), len(positions)))
        positions += cell * [position]
        spans[-1] = (*spans[-1][:2], len(positions))
    return Axis(tuple(heads), tuple(positions), tuple(spans))


def _cosines(G_NN: Tensor) -> Tensor:
    """Cosine similarities (N, N) from a Gram matrix, float64 on the CPU; 0 where a map is zero."""
    G_NN = G_NN.detach().double().cpu()
    length_N = G_NN.diagonal().clamp_min(0).sqrt()
    return (G_NN / (length_N[:, None] * length_N)).nan_to_num(0, 0, 0).clamp(-1, 1)


def png(levels_HW: Tensor) -> bytes:
    """A PNG file of palette indices (RFC 2083): header, palette, rows each after a byte 0 for "no filter"."""
    height, width = levels_HW.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), levels_HW], dim=1).numpy().tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, indices, not interlaced
    chunks = {b"IHDR": header, b"PLTE": _palette().numpy().tobytes(), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks.items())


def similarity_svg(G_NN: Tensor, labels: Sequence[int], kept: Iterable[int], title: str) -> str:
    """The similarity image with the numbers of groups at its sides and a tick at every head that stays."""
    side, stays, margin = axis(labels, _PAGE), set(kept), 26
    size = len(side.positions)
    data = base64.b64encode(png(_levels(G_NN, side))).decode()
    parts = [f'<image href="data:image/png;base64,{data}" x="{margin}" y="{margin}" width="{size}" height="{size}"/>']
    parts.append(f'<rect class="frame" x="{margin}" y="{margin}" width="{size}" height="{size}"/>')
    for group, start, stop in side.spans:
        if stop - start >= 9:
            middle = margin + (start + stop) / 2
            parts += [text(middle, 12, str(group)), text(8, middle + 4, str(group))]
    for position, head in enumerate(side.heads):
        if head in stays:
            at = margin + side.positions.index(position) + side.positions.count(position) / 2
            parts.append(f'<path class="tick" d="M{at:g} {margin - 8}V{margin - 1}M{margin - 8} {at:g}H{margin - 1}"/>')
    return picture(size + margin + 2, size + margin + 2, title, parts)


def votes_svg(bars: Sequence[Bar], title: str, unit: str) -> str:
    """A bar for each head in the given order, coloured by group, pale if it is pruned. `unit` of the scores, such as votes."""
    rows = math.ceil(len(bars) / _BARS)
    in_row = math.ceil(len(bars) / rows)
    highest = max(1e-9, *(bar.score for bar in bars))
    parts: list[str] = []
    for row in range(rows):
        parts += _bar_row(bars[row * in_row : (row + 1) * in_row], 190 * row, highest, unit)
    return picture(690, 190 * rows, title, parts)


def histogram_svg(values: Sequence[float], upper: float, title: str) -> str:
    """How many values lie in each tenth of 0 to `upper`, as shares."""
    counts = [0] * 10
    for value in values:
        counts[min(9, max(0, int(10 * value / upper)))] += 1
    parts = [text(8, 14, "groups", "start"), '<path class="axis" d="M20 160H420"/>', text(220, 195, "margin")]
    for tenth, count in enumerate(counts):
        height = 120 * count / max(1, *counts)
        bar = f'<rect class="plain" x="{22 + 40 * tenth}" y="{160 - height:.1f}" width="36" height="{height:.1f}"/>'
        parts += [bar, text(40 + 40 * tenth, 155 - height, str(count))]
    parts += [text(20 + 40 * tenth, 175, f"{10 * upper * tenth:.3g}%") for tenth in range(11)]
    return picture(440, 200, title, parts)


def margins_svg(margins: Sequence[Sequence[tuple[str, float, bool]]], upper: float, title: str) -> str:
    """A dot for every decision of every layer: its name, its margin, and whether it is doubtful. `upper` ends the axis."""
    pitch = min(60.0, 610 / len(margins))
    parts = [text(8, 14, "margin", "start"), f'<path class="axis" d="M50 160H{60 + pitch * len(margins):.1f}"/>']
    for share in (0.0, 0.5, 1.0):
        y = 160 - 130 * share
        parts.append(f'<path class="grid" d="M50 {y:g}H{60 + pitch * len(margins):.1f}"/>')
        parts.append(text(44, y + 4, f"{100 * upper * share:.3g}%", "end"))
    every = math.ceil(22 / pitch)
    for layer, decisions in enumerate(margins):
        x = 55 + pitch * (layer + 0.5)
        if layer % every == 0:
            parts.append(text(x, 175, str(layer)))
        for name, margin, doubtful in decisions:
            y = 160 - 130 * min(1.0, max(0.0, margin / upper))
            mark, radius = "doubt" if doubtful else "plain", 3 if pitch < 15 else 4
            dot = f'class="{mark}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
            parts.append(f"<circle {dot}><title>{escape(name)}</title></circle>")
    parts.append(text(55 + pitch * len(margins) / 2, 195, "layer"))
    return picture(680, 200, title, parts)


def _bar_row(bars: Sequence[Bar], top: float, highest: float, unit: str) -> Iterator[str]:
    """Bars up to 120 high, below `top` + 20; under them the heads' numbers, then the groups'."""
    breaks = sum(1 for left, right in pairwise(bars) if left.group != right.group)
    pitch = min(36.0, 630 / (len(bars) + 0.7 * breaks))
    base, x, first = top + 140, 50.0, 50.0
    yield text(44, top + 24, f"{highest:.4g}", "end") + text(44, base + 4, "0", "end") + text(8, top + 10, unit, "start")
    for index, bar in enumerate(bars):
        height = 120 * max(0.0, bar.score) / highest
        colour, state = _GROUP_COLOURS[bar.group % len(_GROUP_COLOURS)], "stays" if bar.stays else "pruned"
        name = f"head {bar.head}, group {bar.group}: {bar.score:.4g} {unit}, {state}"
        place = f'x="{x + 0.1 * pitch:.1f}" y="{base - height:.1f}" width="{0.8 * pitch:.1f}" height="{height:.1f}"'
        yield f'<rect class="{state}" fill="{colour}" {place}><title>{escape(name)}</title></rect>'
        yield _head_number(x + pitch / 2, base, bar, pitch)
        x += pitch
        if index + 1 == len(bars) or bars[index + 1].group != bar.group:
            yield f'<path stroke="{colour}" stroke-width="3" d="M{first + 1:.1f} {base + 30}H{x - 1:.1f}"/>'
            yield text((first + x) / 2, base + 44, f"group {bar.group}" if x - first > 50 else str(bar.group))
            x += 0.7 * pitch
            first = x
    yield f'<path class="axis" d="M48 {base:g}H{x:.1f}"/>'


def _head_number(x: float, base: float, bar: Bar, pitch: float) -> str:
    """The head's number under its bar, rotated if there is no room; bold if the head stays."""
    weight = ' font-weight="bold"' if bar.stays else ""
    if pitch >= 20:
        return f'<text x="{x:.1f}" y="{base + 16:g}" text-anchor="middle"{weight}>{bar.head}</text>'
    at = f"{x + 3.5:.1f} {base + 26:g}"
    return f'<text class="small" transform="translate({at}) rotate(-90)"{weight}>{bar.head}</text>'


def _levels(G_NN: Tensor, side: Axis) -> Tensor:
    """(H, W) uint8: the level of each pixel, a cosine or a line between groups."""
    heads = torch.tensor(side.heads)
    level_NN = ((_cosines(G_NN)[heads][:, heads] + 1) * (_STEPS / 2)).round().to(torch.uint8)
    framed = torch.full((len(heads) + 1, len(heads) + 1), _LINE, dtype=torch.uint8)  # position −1 is the last row, the line
    framed[:-1, :-1] = level_NN
    positions = torch.tensor(side.positions)
    return framed[positions][:, positions]


def _palette() -> Tensor:
    """(256, 3) uint8: the colours of all levels, black for the line."""
    anchors = torch.tensor([[int(colour[at : at + 2], 16) for at in (0, 2, 4)] for colour in _ANCHORS], dtype=torch.float64)
    place = torch.arange(_STEPS + 1, dtype=torch.float64) * (len(_ANCHORS) - 1) / _STEPS
    left = place.floor().long().clamp_max(len(_ANCHORS) - 2)
    share = (place - left)[:, None]
    colours = (anchors[left] * (1 - share) + anchors[left + 1] * share).round().to(torch.uint8)
    return torch.cat([colours, torch.zeros(1, 3, dtype=torch.uint8)])
