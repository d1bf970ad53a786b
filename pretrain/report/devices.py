"""Names of devices, and what makers' data sheets say of GPUs: their peak in dense bf16 matrix products, in TFLOP/s."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

# Words of the device's name → TFLOP/s. The entry with the most words that are all in the name counts. Data sheets that give a
# figure with sparsity are halved. GB200 is one GPU of the two on a board.
_PEAKS: dict[tuple[str, ...], float] = {
    ("A10",): 125.0,  # NVIDIA A10 data sheet, 2021
    ("A30",): 165.0,  # A30 data sheet, 2022
    ("A40",): 149.7,  # A40 data sheet, 2022
    ("A100",): 312.0,  # A100 data sheet, 2021
    ("L4",): 121.0,  # L4 data sheet, 2023
    ("L40",): 181.0,  # L40 data sheet, 2022
    ("L40S",): 362.0,  # L40S data sheet, 2023
    ("H100",): 989.0,  # H100 data sheet, SXM
    ("H100", "PCIe"): 756.0,  # H100 data sheet, 2022
    ("H100", "NVL"): 835.0,  # H100 data sheet, 2024
    ("H200",): 989.0,  # H200 data sheet, SXM
    ("H200", "NVL"): 835.0,  # H200 data sheet, 2024
    ("GH200",): 989.0,  # GH200 data sheet
    ("B200",): 2250.0,  # HGX B200 data sheet
    ("GB200",): 2500.0,  # GB200 NVL72 data sheet
}


def peak_tflops(name: str) -> float | None:
    """The peak of a device as the driver names it, such as "NVIDIA H100 80GB HBM3"; None if no data sheet is known.

    A MIG instance is a part of a device, so none is known for it.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    known = [entry for entry in _PEAKS if words.issuperset(entry)]
    if "MIG" in words or not known:
        return None
    return _PEAKS[max(known, key=len)]


def device_name(device: torch.device) -> str:
    """A GPU's or a processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
