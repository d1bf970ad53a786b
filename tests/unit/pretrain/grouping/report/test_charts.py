"""Images of a head election against pixels by hand and another reader of PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.grouping.report.charts import axis, png, similarity_image

RED, WHITE, BLUE, BLACK = (178, 24, 43), (247, 247, 247), (33, 102, 172), (0, 0, 0)


def test_the_image_of_four_heads() -> None:
    maps = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.5]])
    image = similarity_image(maps @ maps.T, torch.tensor([1, 0, 1, 0]))  # in the order 1, 3 | 0, 2
    assert image.dtype == torch.uint8
    assert image.shape == (3, 402, 402)
    expected = np.zeros((402, 402, 3), dtype=np.uint8)
    expected[:200, :200] = RED
    expected[:200, 202:] = expected[202:, :200] = WHITE
    expected[202:302, 202:302] = expected[302:, 302:] = RED
    expected[202:302, 302:] = expected[302:, 202:302] = BLUE
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert tuple(expected[50, 200]) == BLACK


@pytest.mark.parametrize(
    ("cosine", "colour"),
    [(-0.75, 0x4393C3), (-0.5, 0x92C5DE), (-0.25, 0xD1E5F0), (0.25, 0xFDDBC7), (0.5, 0xF4A582), (0.75, 0xD6604D)],
)
def test_colours_between(cosine: float, colour: int) -> None:
    image = similarity_image(torch.tensor([[1.0, cosine * 2], [cosine * 2, 4.0]]), torch.tensor([0, 0]))
    np.testing.assert_allclose(image[:, 10, -10].int(), [colour >> 16, colour >> 8 & 255, colour & 255], atol=2)


@pytest.mark.parametrize("groups", [1, 2, 8, 64])
def test_images_are_300_to_600_pixels_wide(groups: int) -> None:
    for heads in range(8, 129):
        image = similarity_image(torch.eye(heads), torch.arange(heads) % groups)
        assert image.shape[1] == image.shape[2]
        assert 300 <= image.shape[1] <= 600


def test_heads_are_sorted_by_group_then_number() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 64)
    side = axis(labels.tolist(), pixels=400)
    assert list(side.heads) == np.lexsort((np.arange(64), labels)).tolist()
    assert [group for group, _, _ in side.spans] == sorted(set(labels.tolist()))
    for group, start, stop in side.spans:
        inside = side.positions[start:stop]
        assert {int(labels[side.heads[position]]) for position in inside} == {group}
        assert len(inside) == 6 * np.count_nonzero(labels == group)  # 400 / 64 pixels for each head
    assert side.positions.count(-1) == len(side.spans) - 1


def test_heads_without_maps_are_white() -> None:
    G_NN = torch.zeros(2, 2)
    G_NN[1, 1] = 1.0
    image = similarity_image(G_NN, torch.tensor([0, 0]))
    assert tuple(image[:, 0, 0].tolist()) == tuple(image[:, 0, -1].tolist()) == WHITE
    assert tuple(image[:, -1, -1].tolist()) == RED


def test_png_is_read_by_another_library() -> None:
    levels_HW = torch.randint(0, 256, (37, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels_HW[0, :4] = torch.tensor([0, 127, 254, 255])
    with Image.open(io.BytesIO(png(levels_HW))) as picture:
        picture.load()
        assert (picture.mode, picture.size) == ("P", (53, 37))
        np.testing.assert_array_equal(np.asarray(picture), levels_HW.numpy())
        colours = np.asarray(picture.convert("RGB"))
    assert [tuple(colour) for colour in colours[0, :4]] == [BLUE, WHITE, RED, BLACK]
