"""Metrics of a run: one JSON line per step, TensorBoard, and model FLOPs utilisation if the device's peak is known."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import psutil
import torch

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config
from model.attention.faults import may_share_scores
from model.attention.kernels import choose
from model.attention.registry import layer_kinds
from model.costs.flops import executed_flops_per_token, flops_per_token
from pretrain.distributed.layout import Layout
from pretrain.hardware import peak_tflops
from pretrain.report.records import METRICS, read_metrics

Figure = float | Sequence[float]  # one number, or one for each layer
Known = float | Sequence[float | None]  # the same where all numbers are finite

# TensorBoard shows groups in the order of the alphabet: the loss comes first, single figures of a kind stand together.
_TAGS = {
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens": "speed/tokens",
    "seconds": "speed/step_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "hfu": "speed/hfu",
    "slowest_rank": "speed/slowest_rank",
    "slowest_lag_seconds": "speed/slowest_lag_seconds",
    "memory_gib": "speed/memory_gib",
}
_NO_TAG = ("time", "samples")  # TensorBoard notes the time of each value itself; the other is nearly always the same


class MetricsWriter:
    """Appends to `<run>/metrics.jsonl` and to TensorBoard's events; does nothing on ranks other than the first.

    The events lie in the run's folder itself, because TensorBoard names a run by the folder in which it finds them.
    """

    def __init__(self, folder: Path, config: Config, layout: Layout, first_step: int) -> None:
        self.folder = folder
        self.file: TextIO | None = None
        self.tensorboard: Any = None
        if not layout.is_main:
            return
        path = folder / METRICS
        try:
            _drop_from(folder, first_step)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, not needed on the other ranks

            try:
                self.tensorboard = SummaryWriter(str(folder), purge_step=first_step + 1)
            except OSError as error:
                hint = "make room or pass --logging.tensorboard=false"
                raise UserError(f"{folder}: TensorBoard's events cannot be written ({error.strerror}); {hint}") from error

    def write(self, step: int, values: Mapping[str, Figure | None], notes: Mapping[str, object] = MappingProxyType({})) -> None:
        """One line `{"step": …, name: value, …}`, and the same in TensorBoard, where figures by layer are histograms.

        `notes` are in the line only. A figure that is None or not finite is left out; one of a layer that is not finite is
        null. JSON has no NaN.
        """
        known = {name: known for name, value in values.items() if (known := _finite(value)) is not None}
        try:
            if self.file is not None:
                self._reopen_if_deleted(step)
                self.file.write(json.dumps({"step": step, **known, **notes}, allow_nan=False) + "\n")
                self.file.flush()
            if self.tensorboard is not None:
                for name, value in known.items():
                    self._show(name, value, step)
        except OSError as error:  # losing metrics must not stop the run; if the disk is full, the next checkpoint says so
            print(f"warning: metrics end at step {step}: {self.folder} cannot be written ({error.strerror})", file=sys.stderr)
            self.close()
            self.file = self.tensorboard = None

    def _reopen_if_deleted(self, step: int) -> None:
        assert self.file is not None
        if os.fstat(self.file.fileno()).st_nlink == 0:
            path = self.folder / METRICS
            print(f"warning: {path}: was deleted; the metrics of step {step} and later are in a new file", file=sys.stderr)
            self.file.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")

    def _show(self, name: str, value: Known, step: int) -> None:
        if name.rpartition("/")[2] in _NO_TAG:
            return
        if isinstance(value, Sequence):
            if of_layers := [of_layer for of_layer in value if of_layer is not None]:
                self.tensorboard.add_histogram(name, torch.tensor(of_layers), step)
        else:
            self.tensorboard.add_scalar(_TAGS.get(name, name), value, step)

    def image(self, step: int, name: str, image_CHW: torch.Tensor) -> None:
        """An image of bytes for TensorBoard."""
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, image_CHW, step)

    def close(self) -> None:
        for figures in (self.file, self.tensorboard):
            with contextlib.suppress(OSError):
                if figures is not None:
                    figures.close()


class Throughput:
    """Tokens per second, MFU and HFU of a step, from its wall time."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        row = config.row_length
        rows = row / config.data.sequence_length  # of a token of text
        self.flops_per_token = flops_per_token(config.model, row) * rows
        executed = _executed_flops(config, layout)
        self.executed_flops_per_token = None if executed is None else executed * rows
        peak = config.logging.peak_tflops or _known_peak(config.training.precision, layout.device)
        self.peak_flops = None if peak is None else peak * 1e12 * layout.world_size

    def tokens_per_second(self, seconds: float) -> float:
        return self.tokens_per_step / seconds

    def mfu(self, seconds: float) -> float | None:
        """The model's own FLOPs as a share of the devices' peak; None if that is unknown.

        As Chowdhery et al. 2022, appendix B, but with the causal half of attention only (`flops_per_token`).
        """
        return self._utilisation(seconds, self.flops_per_token)

    def hfu(self, seconds: float) -> float | None:
        """The FLOPs that the devices execute as a share of their peak: `executed_flops_per_token`, recomputation included.

        None if the peak is unknown, or where the attention kernel is the formula itself.
        """
        return self._utilisation(seconds, self.executed_flops_per_token)

    def _utilisation(self, seconds: float, of_token: float | None) -> float | None:
        if self.peak_flops is None or of_token is None:
            return None
        return self.tokens_per_second(seconds) * of_token / self.peak_flops


def memory_gib(device: torch.device) -> float:
    """Peak memory allocated on this rank's GPU so far, or on a CPU the resident size of this process; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _executed_flops(config: Config, layout: Layout) -> float | None:
    """Of a token of a row, with the attention kernel that this run's shapes get; None where that counts every pair."""
    row, sharing = config.row_length, [layer for layer in layer_kinds(config.model) if may_share_scores(layer)]
    model = sharing[0] if sharing else config.model
    choice = choose(
        model.attention_kernel,
        shares_scores=bool(sharing),
        device=layout.device,
        dtype=torch.float32 if config.training.precision == "fp32" else torch.bfloat16,
        heads=max(1, model.num_heads // (model.num_seeds * layout.size("tensor"))),
        head_dim=model.head_width,
        queries=row,
        keys=row,
        softcap=model.logit_softcap,
        announces=False,
    )
    if choice.kernel == "math":
        return None
    shares = choice.kernel == "shared_scores"
    return executed_flops_per_token(config.model, row, shares, config.training.recompute_activations)


def _known_peak(precision: str, device: torch.device) -> float | None:
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def _finite(value: Figure | None) -> Known | None:
    if isinstance(value, Sequence):
        return [of_layer if math.isfinite(of_layer) else None for of_layer in value]
    return value if value is not None and math.isfinite(value) else None


def _drop_from(folder: Path, first_step: int) -> None:
    """Remove what an interrupted run wrote after the checkpoint that this run resumes from."""
    kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
    if (folder / METRICS).exists():
        write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
