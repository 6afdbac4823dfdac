"""Products with 4-bit weights: codes of 0..15 with a scale and a zero for each group of columns, x at full precision.

This module itself needs no triton.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_w4(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] of 0..15 as the kernels read them: uint8 [N, K / 2]. K is even."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_w4(weight: Tensor) -> Tensor:
    """The codes that `pack_w4` was given: uint8 [N, K / 2] → [N, K]."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)


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
    return w4a16_reference(x, weight, scales, zeros, bias)
