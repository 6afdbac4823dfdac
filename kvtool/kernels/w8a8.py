"""Products of 8-bit weights with activations that are quantised to 8 bits token by token: int8, and fp8 (e4m3).

Both are symmetric, with one scale for each row of the weights and one for each row of x, found here. This module itself
needs no triton.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels import takes

FP8 = torch.float8_e4m3fn
LARGEST: dict[torch.dtype, float] = {torch.int8: 127.0, FP8: 448.0}  # code of each kind


@dataclass(frozen=True)
class QuantizedRows:
    """codes · scales, which stand for x [M, K].

    Attributes:
        codes: [M, K], int8 or e4m3.
        scales: [M], in float32, or float64 where x is.
        dtype: of x, and of what products make of it.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)


Activations: TypeAlias = Tensor | QuantizedRows  # inputs [M, K] of a product


def quantize_rows(x: Tensor, kind: torch.dtype) -> QuantizedRows:
    """Each row of x [M, K] times 127 / max|x| in int8, or 448 / max|x| in e4m3, rounded to the nearest, halves to even.

    Scales are max|x| / 127 or 448, and codes are computed with their reciprocals. Rows whose scale is below the least
    normal number of float32, which may have none, get codes of 0.
    """
    wide, largest = x.to(torch.promote_types(x.dtype, torch.float32)), LARGEST[kind]
    scales = wide.abs().amax(-1) / largest
    factors = torch.where(scales < torch.finfo(torch.float32).tiny, 0, 1 / scales)
    codes = (wide * factors[:, None]).clamp_(-largest, largest)
    return QuantizedRows((codes.round_() if kind == torch.int8 else codes).to(kind), scales, x.dtype)


def w8a8_reference(x: Activations, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`w8a8_linear` in float32, or in float64 where x is."""
    rows = quantize_rows(x, weight.dtype) if isinstance(x, Tensor) else x
    wide = rows.scales.dtype
    out = F.linear(rows.codes.to(wide), weight.to(wide)) * rows.scales[:, None] * scales.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(rows.dtype)


def w8a8_linear(x: Activations, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight · scales)ᵀ + b with x as `quantize_rows` rounds it, or as it has been rounded already.

    Args:
        x: [M, K], its codes of the kind that the weights are.
        weight: int8 or float8_e4m3fn [N, K]; scales: float32 [N].
        bias: [N] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    if takes(x.codes if isinstance(x, QuantizedRows) else x):
        from kvtool.kernels import w8a8_kernels

        return w8a8_kernels.linear(x, weight, scales, bias)
    return w8a8_reference(x, weight, scales, bias)
