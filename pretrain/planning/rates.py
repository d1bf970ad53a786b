"""How long a device takes for products, attention and passes through its memory. Torch-free.

The constants say what devices reach of what the hardware table has. docs/planning.md tells where each is from, which are
fitted, and to which published runs.
"""

from __future__ import annotations

import math

from pretrain.planning.cluster import Device
from pretrain.planning.work import Attention, Product, Work

PRODUCTS = 0.86  # of the best measured product that products of a step reach: clocks under load, other shapes; fitted
MEMORY = 0.8  # of the data sheet that element-wise passes reach, as copies of large tensors do
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.55))  # rows, columns, what such tiles reach
FILL = 128  # a product with this many inner values takes twice the time of its multiply-adds
KEYS = 350  # attention takes as long as over so many more keys: tiles on the diagonal; FlashAttention-3's figure 5, FA 2
BACKWARD_FLOPS, BACKWARD_RATE = 2.5, 0.88  # of attention: five products for two, and the rate of FA 2's backward pass
LAUNCH = 5e-6  # seconds of Python and the driver for each kernel, where the device waits for it
SCORE_PASSES = 10  # of 4 bytes for each score, where scores are in memory, forward; twice as many backward


def product_seconds(product: Product, device: Device, precision: str, value: int) -> float:
    """By the slower of arithmetic, in whole tiles, and memory."""
    units = device.units
    if min(product.rows, product.columns) <= 0:
        return 0.0

    def share(rows: int, columns: int, reached: float) -> float:
        tiles = math.ceil(product.rows / rows) * math.ceil(product.columns / columns)
        full = product.rows * product.columns / (rows * columns)
        return reached * full / (units * math.ceil(tiles / units))

    reached = max(share(*tile) for tile in TILES) * product.inner / (product.inner + FILL)
    moved = product.rows * product.inner + product.inner * product.columns + product.rows * product.columns
    rate = PRODUCTS * device.product[precision] * reached
    return max(product.flops / rate, value * moved / (MEMORY * device.bandwidth))


def attention_seconds(attention: Attention, device: Device, kernel: str, precision: str) -> float:
    """The forward pass of a layer's heads."""
    if attention.kernel == "math":
        scores = SCORE_PASSES * 4 * attention.exponentials
        return attention.flops / (PRODUCTS * device.product["fp32"]) + scores / (MEMORY * device.bandwidth)
    narrow, wide = device.attention[kernel][64], device.attention[kernel][128]
    # A pair takes 4 d / rate + 1 / exponentials; two widths give both.
    of_narrow, of_wide = 4 * 64 / narrow, 4 * 128 / wide
    per_flop, per_pair = (of_wide - of_narrow) / 256, max(0.0, 2 * of_narrow - of_wide)
    longer = 1 + KEYS / attention.length
    seconds = longer * (attention.flops * per_flop + attention.exponentials * per_pair)
    if precision == "fp32":  # no tensor cores
        seconds *= device.product.get("bf16", device.product["fp32"]) / device.product["fp32"]
    return seconds


def forward_seconds(work: Work, device: Device, precision: str, kernel: str, value: int) -> tuple[float, float, float]:
    """Seconds of products, attention and memory of a forward pass."""
    products = sum(product_seconds(one, device, precision, value) for one in work.products)
    attention = sum(attention_seconds(one, device, kernel, precision) for one in work.attention)
    return products, attention, work.forward / (MEMORY * device.bandwidth)


def backward_seconds(work: Work, device: Device, precision: str, kernel: str, value: int) -> tuple[float, float, float]:
    """The same of a backward pass."""
    both = [factor for one in work.products for factor in one.backward()]
    products = sum(product_seconds(one, device, precision, value) for one in both)
    slower = BACKWARD_FLOPS / BACKWARD_RATE
    attention = slower * sum(attention_seconds(one, device, kernel, precision) for one in work.attention)
    return products, attention, work.backward / (MEMORY * device.bandwidth)
