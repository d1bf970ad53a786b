"""The machine of a plan: its devices, their links, and how long collectives take on it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from pretrain.hardware import SHIPPED, DeviceSheet, Hardware, Kernel, Link, load_hardware, shipped_hardware

LINK = 0.8  # of a link's data sheet bandwidth that large collectives reach: nccl-tests, 360 of 450 GB/s on NVLink 4
UNMEASURED_PRODUCT = 0.7  # of the peak, where no product has been measured
UNMEASURED_ATTENTION = {64: 0.38, 128: 0.42}  # of the best product, where no attention has been measured; as the H100's


@dataclass(frozen=True)
class Device:
    """One device of a cluster, with all that a plan needs."""

    name: str
    title: str
    peak: Mapping[str, float]  # FLOP/s by precision
    product: Mapping[str, float]  # the best measured product, FLOP/s
    attention: Mapping[str, Mapping[int, float]]  # forward, causal, long sequences, FLOP/s by kernel and head_dim
    units: int
    memory: float  # bytes
    bandwidth: float  # bytes a second
    watts: float

    @property
    def is_cpu(self) -> bool:
        """By the name of its entry."""
        return self.name.startswith("cpu")


@dataclass(frozen=True)
class Cluster:
    """`per_node` devices a node, joined by `link`, and nodes by `network`."""

    device: Device
    per_node: int
    link: Link
    network: Link
    link_name: str
    network_name: str

    def spread(self, group: int, stride: int) -> tuple[int, int]:
        """Of `group` ranks, `stride` ranks apart: how many share a node, and on how many nodes they are."""
        within = min(group, max(1, self.per_node // stride))
        return within, math.ceil(group / within)

    def seconds(self, op: str, sent: float, calls: int, group: int, stride: int) -> float:
        """The time of `calls` collectives in which each rank sends `sent` bytes altogether, from latency and bandwidth.

        Rings, one through each device of a node, so that as many adapters send as members are in a node. Between many nodes
        a tree, or a ring with as few steps, whichever is shorter.
        """
        if group == 1 or not calls:
            return 0.0
        within, nodes = self.spread(group, stride)
        bandwidth, latency = self.bandwidth(within, nodes), self.link.microseconds * (within - 1)
        if op == "send":
            latency = self.link.microseconds if nodes == 1 else self.network.microseconds
        elif nodes > 1:
            latency += self.network.microseconds * min(nodes - 1, 2 * math.ceil(math.log2(nodes)))
        rounds = 2 if op == "all_reduce" else 1
        return sent / bandwidth + calls * rounds * latency * 1e-6

    def bandwidth(self, within: int, nodes: int) -> float:
        """Bytes a second that a rank of a group sends."""
        inside = self.link.gb_per_s / (1 if self.link.per == "device" else self.per_node)
        if nodes == 1:
            return LINK * inside * 1e9
        # All devices of a node send at once: each group that has members in it.
        outside = self.network.gb_per_s * (within if self.network.per == "device" else within / self.per_node)
        return LINK * min(inside, outside) * 1e9 if within > 1 else LINK * outside * 1e9


def make_cluster(gpu: str, network: str | None = None, per_node: int | None = None, table: Path = SHIPPED) -> Cluster:
    """The cluster of one kind of device. UserError that names the file and what it lacks."""
    hardware = shipped_hardware() if table == SHIPPED else load_hardware(table)
    if gpu not in hardware.devices:
        raise UserError(f"{table}: no device {gpu}; it has {', '.join(planned(hardware))}")
    sheet = hardware.devices[gpu]
    lacking = [field for field in _NEEDED if not getattr(sheet, field)]
    if lacking:
        raise UserError(f"{table}: devices.{gpu} lacks {', '.join(lacking)}, which a plan needs")
    assert sheet.link is not None
    name = network or sheet.network or ""
    if name not in hardware.links:
        raise UserError(f"{table}: no link {name}; it has {', '.join(hardware.links)}")
    devices = per_node or sheet.devices_per_node or 1
    return Cluster(_device(gpu, sheet), devices, hardware.links[sheet.link], hardware.links[name], sheet.link, name)


_NEEDED = ("title", "units", "memory_gb", "memory_gb_per_s", "power_watts", "devices_per_node", "link", "network")


def planned(hardware: Hardware) -> list[str]:
    """The devices of a table that plans can be made for."""
    return [name for name, sheet in hardware.devices.items() if all(getattr(sheet, field) for field in _NEEDED)]


def _device(name: str, sheet: DeviceSheet) -> Device:
    assert sheet.units is not None
    assert sheet.memory_gb is not None
    assert sheet.memory_gb_per_s is not None
    assert sheet.power_watts is not None
    peak = {str(precision): tflops * 1e12 for precision, tflops in sheet.peak_tflops.items()}
    product = {precision: UNMEASURED_PRODUCT * rate for precision, rate in peak.items()}
    product |= {str(precision): tflops * 1e12 for precision, tflops in sheet.product_tflops.items()}
    usual = {width: share * product.get("bf16", product["fp32"]) for width, share in UNMEASURED_ATTENTION.items()}
    attention: dict[str, dict[int, float]] = {"flash": usual, "cudnn": usual}
    for kernel, rates in sheet.attention_tflops.items():
        attention[kernel] = _both({width: tflops * 1e12 for width, tflops in rates.items()}, kernel)
    return Device(
        name=name,
        title=sheet.title,
        peak=peak,
        product=product,
        attention=attention,
        units=sheet.units,
        memory=sheet.memory_gb * 1e9,
        bandwidth=sheet.memory_gb_per_s * 1e9,
        watts=sheet.power_watts,
    )


def _both(rates: dict[int, float], kernel: Kernel) -> dict[int, float]:
    """Rates at two widths of heads, of which one may be missing: then they stand to each other as usual."""
    ratio = UNMEASURED_ATTENTION[64] / UNMEASURED_ATTENTION[128]
    if len(rates) > 1:
        return rates
    ((width, rate),) = rates.items()
    at_128 = rate if width == 128 else rate / ratio
    return {64: ratio * at_128, 128: at_128}
