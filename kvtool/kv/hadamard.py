"""Hadamard rotation along head_dim: spreads a channel's outliers over its neighbours (QuaRot, arXiv:2404.00456)."""

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., D] with each largest power-of-two run of D multiplied by the orthonormal Hadamard matrix.

    It is its own inverse, and rotating queries and keys alike leaves their products as they were.
    """
    dim = x.shape[-1]
    run = dim & -dim
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < run:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    runs: Tensor = x.unflatten(-1, (-1, run))
    rotated: Tensor = (runs @ (matrix * run**-0.5)).flatten(-2)
    return rotated
