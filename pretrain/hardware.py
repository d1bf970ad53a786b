"""What devices and links can do, from hardware.yaml or a file of the user's own, each figure with its source. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UserError, shortened
from configs.schema.base import LONGEST_SHOWN, Fault, Section, as_yaml
from configs.words import counted
from configs.yaml_text import NotYamlError, parse

SHIPPED = Path(__file__).with_suffix(".yaml")
Positive = Annotated[float, Field(gt=0, le=1e12)]
Count = Annotated[int, Field(ge=1, le=2**20)]
Precision = Literal["fp32", "bf16", "fp8"]
Kernel = Literal["flash", "cudnn"]
SOURCED = (
    "peak_tflops",
    "product_tflops",
    "attention_tflops",
    "units",
    "memory_gb",
    "memory_gb_per_s",
    "power_watts",
    "devices_per_node",
)


class Link(Section):
    """A link between the devices of a node, or a network between nodes."""

    gb_per_s: Positive
    microseconds: Annotated[float, Field(ge=0, le=1e6)]
    per: Literal["device", "node"]
    source: Annotated[str, Field(min_length=1)]


class DeviceSheet(Section):
    """One kind of device; hardware.yaml says what the fields mean."""

    title: str = ""
    names: list[list[str]] = Field([])
    peak_tflops: Annotated[dict[Precision, Positive], Field(min_length=1)]
    product_tflops: dict[Precision, Positive] = Field({})
    attention_tflops: dict[Kernel, Annotated[dict[int, Positive], Field(min_length=1)]] = Field({})
    units: Count | None = None
    memory_gb: Positive | None = None
    memory_gb_per_s: Positive | None = None
    power_watts: Positive | None = None
    devices_per_node: Count | None = None
    link: str | None = None
    network: str | None = None
    sources: dict[str, Annotated[str, Field(min_length=1)]]

    def faults(self) -> Iterator[Fault]:
        for field in SOURCED:
            if getattr(self, field) and field not in self.sources:
                yield Fault(f"sources.{field}", None, "required: where the figure is from")
        for field in self.sources:
            if field not in SOURCED or not getattr(self, field):
                yield Fault(f"sources.{field}", self.sources[field], "the source of a figure that is not given")


class Hardware(Section):
    """All devices and links of a table by name."""

    devices: dict[str, DeviceSheet]
    links: dict[str, Link]

    def faults(self) -> Iterator[Fault]:
        for name, device in self.devices.items():
            for fault in device.faults():
                yield Fault(f"devices.{name}.{fault.key}", fault.value, fault.allowed)
            for field in ("link", "network"):
                if (link := getattr(device, field)) is not None and link not in self.links:
                    yield Fault(f"devices.{name}.{field}", link, f"one of links: {', '.join(self.links)}")


def load_hardware(path: Path = SHIPPED) -> Hardware:
    """The table in a file. UserError that names the file and all that is wrong in it."""
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    except NotYamlError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold the mappings devices and links, as {SHIPPED.name} has them")
    try:
        hardware = Hardware(**{str(key): value for key, value in tree.items()})
        faults = [str(fault) for fault in hardware.faults()]
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors()]
    if faults:
        raise UserError("\n".join([f"{path}: {counted(len(faults), 'fault')}", *(f"  {fault}" for fault in faults)]))
    return hardware


def _fault(detail: ErrorDetails) -> str:
    """One line of what pydantic finds wrong, named by the keys that lead there."""
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "missing":
        return f"{key} = null: required"
    wrong = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"].replace("Input should be", "must be")
    return f"{shortened(key, LONGEST_SHOWN)} = {shortened(as_yaml(detail['input']), LONGEST_SHOWN)}: {wrong}"


@lru_cache(1)
def shipped_hardware() -> Hardware:
    """hardware.yaml."""
    return load_hardware()


def peak_tflops(name: str) -> float | None:
    """The bf16 peak of a device as the driver names it, such as "NVIDIA H100 80GB HBM3"; None if no data sheet is known.

    A MIG instance is a part of a device, so none is known for it.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    sheets = shipped_hardware().devices.values()
    known = [(len(entry), sheet) for sheet in sheets for entry in sheet.names if words.issuperset(entry)]
    if "MIG" in words or not known:
        return None
    return max(known, key=lambda found: found[0])[1].peak_tflops.get("bf16")
