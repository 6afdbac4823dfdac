"""Products with 4-bit weights: codes of 0..15 with a scale and a zero for each group of columns, x at full precision.

This module itself needs no triton.
"""

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels import takes

RUN = 32  # columns whose codes lie together: the first half in the low nibbles of 16 bytes, the second in the high ones


@dataclass(frozen=True)
class Int4Weights:
    """Matrices of one size, one for each expert.

    Attributes:
        weight: uint8 [E, N, K / 2], of `pack_w4`.
        scales, zeros: [E, N, K / G] in x's dtype.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, half = self.weight.shape
        return experts, outputs, 2 * half

    @property
    def group_size(self) -> int:
        return self.shape[2] // self.scales.shape[2]


def pack_w4(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] of 0..15 as the kernels read them: uint8 [N, K / 2]. K is even."""
    low, high = codes.unflatten(1, (-1, 2, gcd(RUN, codes.shape[1]) // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_w4(weight: Tensor) -> Tensor:
    """The codes that `pack_w4` was given: uint8 [N, K / 2] → [N, K]."""
    packed = weight.unflatten(1, (-1, gcd(RUN, 2 * weight.shape[1]) // 2))
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def dequantize_w4(weight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """(codes − zeros) · scales [N, K], computed in `dtype`, of what `w4a16_linear` takes."""
    codes = unpack_w4(weight).unflatten(1, (scales.shape[1], -1)).to(dtype)
    return ((codes - zeros.to(dtype)[..., None]) * scales.to(dtype)[..., None]).flatten(1)


def w4a16_reference(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    """`w4a16_linear` in float32, or in float64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = dequantize_w4(weight, scales, zeros, wide)
    return F.linear(x.to(wide), matrix, None if bias is None else bias.to(wide)).to(x.dtype)


def w4a16_linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ((codes − zeros) · scales)ᵀ + b.

    Args:
        x: [M, K].
        weight: uint8 [N, K / 2], of `pack_w4`.
        scales, zeros: [N, K / G] in x's dtype, for groups of G columns; zeros are in units of codes.
        bias: [N] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    if takes(x) and x.dtype.itemsize == 2 and 2 * weight.shape[1] // scales.shape[1] % RUN == 0:
        from kvtool.kernels import w4a16_kernels

        return w4a16_kernels.linear(x, weight, scales, zeros, bias)
    return w4a16_reference(x, weight, scales, zeros, bias)
