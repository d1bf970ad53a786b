"""The table of devices and links: its faults, and peaks by whole words of names that drivers give."""

from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.hardware import SHIPPED, load_hardware, peak_tflops, shipped_hardware


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-32GB", None),
        ("", None),
    ],
)
def test_peaks(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops


@pytest.mark.parametrize(
    ("right", "wrong", "key"),
    [
        ("fp8: 1979", "fp8: -1", "devices.h100.peak_tflops.fp8 = -1: must be greater than 0"),
        ("fp8: 1979", "fp4: 1979", "devices.h100.peak_tflops.fp4 = 'fp4'"),
        ("link: nvlink4", "link: nvlink9", "devices.h100.link = 'nvlink9': one of links: nvlink3"),
        ("memory_gb: 141", "memory: 141", "devices.h200.memory = 141: unknown key"),
        ("units: NVIDIA A100 arch", "power: NVIDIA A100 arch", "devices.a100.sources.units = null: required"),
        ("gb_per_s: 300, ", "", "links.nvlink3.gb_per_s = null: required"),
        ("\nlinks:", "\nlinks: [", "is not valid YAML"),
    ],
)
def test_faults_name_file_and_key(right: str, wrong: str, key: str, tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_hardware(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert key in str(raised.value)


def test_a_copy_is_read_as_the_shipped_table(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(SHIPPED.read_bytes())
    assert load_hardware(copy) == shipped_hardware()
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_hardware(tmp_path / "nowhere.yaml")


def test_measured_figures_are_below_peaks() -> None:
    for name, device in shipped_hardware().devices.items():
        for precision, measured in device.product_tflops.items():
            assert measured < device.peak_tflops[precision], name
        for of_kernel in device.attention_tflops.values():
            assert all(measured < device.product_tflops["bf16"] for measured in of_kernel.values()), name
