"""The norm of single heads or latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Layers


class HeadNorm(nn.Module):
    """RMSNorm over the last dimension, of `width` channels, with one weight for all heads. It never has a bias.

    Each tensor-parallel rank norms what its heads read, so the gradients of the weight are summed over ranks.
    """

    def __init__(self, layers: Layers, width: int, epsilon: float) -> None:
        super().__init__()
        self.layers, self.width, self.epsilon = layers, width, epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = self.layers.replicated(self.weight)
        return F.rms_norm(x, (self.width,), weight, self.epsilon)
