"""Products with 4-bit weights: codes of 0..15 with a scale and a zero for each group of columns, x at full precision.

This module itself needs no triton.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels import takes

RUN = 32  # columns whose codes lie together, in 16 bytes


@dataclass(frozen=True)
class Int4Weights:
    """Matrices of one size, one for each expert.

    Attributes:
        weight: uint8 [E, N, K / 2], of `pack_w4`.
        scales, zeros: [E, N, K / G] in x's dtype, parts of what `by_group` makes of all [E · N, K / G].
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
    """Codes uint8 [N, K] of 0..15 as the kernels read them: uint8 [N, K / 2]. K is even.

    A lane t of four holds columns 2t + e + 8j + 16s of each run of 32 where tensor cores multiply them 16 at a time
    (e, j and s are 0 or 1): word t of its 16 bytes, of which byte 2e + j has s = 0 in its low nibble and s = 1 in its
    high one. Where K is no multiple of 32, neighbours share a byte.
    """
    if codes.shape[1] % RUN:
        low, high = codes.unflatten(1, (-1, 2)).unbind(2)
        return low | high << 4
    low, high = codes.unflatten(1, (-1, 2, 2, 4, 2)).unbind(2)  # [N, runs, j, t, e]
    return (low | high << 4).permute(0, 1, 3, 4, 2).flatten(1)


def unpack_w4(weight: Tensor) -> Tensor:
    """The codes that `pack_w4` was given: uint8 [N, K / 2] → [N, K]."""
    if weight.shape[1] % (RUN // 2):
        return torch.stack((weight & 15, weight >> 4), dim=2).flatten(1)
    packed = weight.unflatten(1, (-1, 4, 2, 2)).permute(0, 1, 4, 2, 3)
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def by_group(grid: Tensor) -> Tensor:
    """Scales or zeros [N, K / G] as the kernels read them: those of a group side by side."""
    return grid.t().contiguous().t()


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
        scales, zeros: [N, K / G] in x's dtype, of `by_group`, for groups of G columns; zeros are in units of codes.
        bias: [N] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    if takes(x) and x.dtype.itemsize == 2 and 2 * weight.shape[1] // scales.shape[1] % RUN == 0:
        from kvtool.kernels import w4a16_kernels

        if w4a16_kernels.compiles():
            return w4a16_kernels.linear(x, weight, scales, zeros, bias)
    return w4a16_reference(x, weight, scales, zeros, bias)
