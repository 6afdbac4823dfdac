"""Products of 8-bit weights with activations that are quantised to 8 bits token by token: int8, and fp8 (e4m3).

The weights have one scale for each row, as the activations have. This module itself needs no triton.
"""

import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels import takes
from kvtool.kernels.quantized_rows import Activations, QuantizedRows, quantize_rows


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
