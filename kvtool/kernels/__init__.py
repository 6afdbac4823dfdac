"""Kernels in Triton and CUDA C++, each beside the plain torch function that defines it. Importing one needs triton."""

import torch
from torch import Tensor

WORKSPACE = 128 << 20  # bytes of blocks that are decoded for prompts at a time, or of one KV head where those are more
MOST_PIECES = 256  # into which tiles of prompts are cut


def takes(x: Tensor) -> bool:
    """Whether kernels compute with `x`; elsewhere than on a GPU, and in float64, torch does."""
    return x.is_cuda and x.dtype != torch.float64
