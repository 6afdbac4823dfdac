"""Activations in 8 bits, each token with a scale of its own: int8, and fp8 (e4m3), both symmetric.

This is the definition; what makes activations on a GPU hands them out so in one kernel (`norm`, `activation`).
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

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

    Scales are max|x| · (1 / 127), or 448, and codes are computed with their reciprocals: so to the bit on all devices
    (torch divides by a number otherwise on a GPU than on a CPU). Rows whose scale is below the least normal number of
    float32, which may have no reciprocal, get codes of 0.
    """
    wide, largest = x.to(torch.promote_types(x.dtype, torch.float32)), LARGEST[kind]
    scales = wide.abs().amax(-1) * (1 / largest)
    factors = torch.where(scales < torch.finfo(torch.float32).tiny, 0, 1 / scales)
    codes = (wide * factors[:, None]).clamp_(-largest, largest)
    return QuantizedRows((codes.round_() if kind == torch.int8 else codes).to(kind), scales, x.dtype)
