"""The activation of a gated MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained
from kvtool.kernels.quantized_rows import QuantizedRows
from kvtool.kernels.w8a8_kernels import encoded, quantized

BLOCK = 1024  # elements of a program
FEW = 256  # rows, up to which one program for each would leave an H200 idle


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up of x [T, 2 · size], the gates first, computed in fp32: [T, size]."""
    return _launch(x, None)


def silu_mul_rows(x: Tensor, kind: torch.dtype) -> QuantizedRows:
    """`silu_mul` as `quantize_rows` rounds it."""
    if len(x) > FEW:
        return quantized(silu_mul(x), kind)
    peaks = torch.empty(len(x), -(-(x.shape[1] // 2) // BLOCK), device=x.device)
    return encoded(_launch(x, peaks), peaks, kind)


def _launch(x: Tensor, peaks: Tensor | None) -> Tensor:
    """`silu_mul`, and in `peaks` [T, programs of a row] the greatest magnitude that each program has written."""
    assert x.is_contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    to, blocks = out if peaks is None else peaks, -(-size // BLOCK)
    _silu_mul[(rows, blocks)](x, out, to, size, BLOCK=BLOCK, PEAKS=peaks is not None, num_warps=4, **chained(x.device))
    return out


@triton.jit
def _silu_mul(x, out, peaks, size, BLOCK: tl.constexpr, PEAKS: tl.constexpr, CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    await_inputs(CHAINED)
    gate = tl.load(x + row * 2 * size + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + columns, mask=inside, other=0).to(tl.float32)
    value = (silu(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, value, mask=inside)
    if PEAKS:
        tl.store(peaks + row * tl.num_programs(1) + tl.program_id(1), tl.max(tl.abs(value.to(tl.float32)), 0))


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))
