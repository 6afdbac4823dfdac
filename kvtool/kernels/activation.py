"""The activation of a gated MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained

BLOCK = 1024  # elements of a program


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up of x [T, 2 · size], the gates first, computed in fp32: [T, size]."""
    assert x.is_contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    _silu_mul[(rows, -(-size // BLOCK))](x, out, size, BLOCK=BLOCK, num_warps=4, **chained(x.device))
    return out


@triton.jit
def _silu_mul(x, out, size, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    await_inputs(CHAINED)
    gate = tl.load(x + row * 2 * size + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * size + columns, (silu(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))
