"""Products of 8-bit weights with activations that are quantised to 8 bits token by token: int8, and fp8 (e4m3).

Both are symmetric, with one scale for each row of the weights and one for each row of x, found here. This module itself
needs no triton.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels import takes

INT8_MAX, FP8_MAX = 127.0, 448.0
FP8 = torch.float8_e4m3fn


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [M, K] in int8, halves to even, and its scale max|x| / 127 [M] in float32 at least; a row of zeros
    has scale 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.abs().amax(-1) / INT8_MAX
    return (wide / _divisor(scales)).round_().to(torch.int8), scales


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [M, K] in e4m3, and its scale max|x| / 448 [M] in float32 at least; a row of zeros has scale 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.abs().amax(-1) / FP8_MAX
    return (wide / _divisor(scales)).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales


def _divisor(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1)[:, None]


def w8a8_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`w8a8_linear` in float32, or in float64 where x is."""
    return _product(*int8_rows(x), weight, scales, bias, x.dtype)


def w8a8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight · scales)ᵀ + b with x in `int8_rows`.

    Args:
        x: [M, K].
        weight: int8 [N, K]; scales: float32 [N].
        bias: [N] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    return _linear(x, weight, scales, bias) if takes(x) else w8a8_reference(x, weight, scales, bias)


def fp8_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`fp8_linear` in float32, or in float64 where x is."""
    return _product(*fp8_rows(x), weight, scales, bias, x.dtype)


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight · scales)ᵀ + b with x in `fp8_rows`.

    Args:
        x: [M, K].
        weight: float8_e4m3fn [N, K]; scales: float32 [N].
        bias: [N] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    return _linear(x, weight, scales, bias) if takes(x) else fp8_reference(x, weight, scales, bias)


def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    from kvtool.kernels import w8a8_kernels

    return w8a8_kernels.linear(x, weight, scales, bias)


def _product(
    codes: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    wide = row_scales.dtype
    out = F.linear(codes.to(wide), weight.to(wide)) * row_scales[:, None] * scales.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)
