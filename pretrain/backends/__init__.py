"""Engines. What DeepSpeed reads when it is imported is set here, before any of its modules is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found anyway, but with a warning on every rank
