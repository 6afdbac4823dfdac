"""Hadamard rotation along head_dim: spreads a channel's outliers over its neighbours (QuaRot, arXiv:2404.00456)."""

from functools import cache

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., D] with each largest power-of-two run of D multiplied by the orthonormal Hadamard matrix.

    It is its own inverse, and rotating queries and keys alike leaves their products as they were.
    """
    dim = x.shape[-1]
    run = dim & -dim
    runs: Tensor = x.unflatten(-1, (-1, run))
    rotated: Tensor = (runs @ _matrix(run, x.dtype, x.device)).flatten(-2)
    return rotated


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [size, size]."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    orthonormal: Tensor = matrix * size**-0.5
    return orthonormal
