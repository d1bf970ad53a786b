"""Import this before deepspeed: it says where there is no GPU, which deepspeed otherwise warns about on every rank."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
