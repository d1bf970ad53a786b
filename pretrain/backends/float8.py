"""Matrix products in float8 (`training.precision: fp8`), by torchao."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from configs.errors import UserError
from model.layers import Expand

CAPABILITY = (8, 9)  # Ada and Hopper, the first with float8 units
MULTIPLE = 16  # what those units ask of both widths of a matrix


def check_float8(device: torch.device) -> None:
    """Raises UserError that names all that is missing here for float8."""
    missing = []
    if device.type != "cuda":
        missing.append("a GPU (this process has none)")
    elif (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        missing.append(f"a GPU of compute capability {_dotted(CAPABILITY)} or higher (this one has {_dotted(found)})")
    if importlib.util.find_spec("torchao") is None:
        missing.append("torchao (pip install torchao)")
    if missing:
        raise UserError(f"training.precision = 'fp8': needs {' and '.join(missing)}; take bf16")


def convert_to_float8(block: nn.Module) -> None:
    """Let the linear layers of `block` multiply in float8 where their widths allow it; their weights stay as they are."""
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(block, module_filter_fn=lambda module, name: fits_float8(module))


def fits_float8(module: nn.Module) -> bool:
    """Whether torchao may take the layer's place, which is then a plain linear one, and has kernels for its widths."""
    if not isinstance(module, nn.Linear) or (isinstance(module, Expand) and module.groups > 1):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
