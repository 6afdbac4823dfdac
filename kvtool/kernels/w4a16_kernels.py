"""What `kvtool.kernels.w4a16` defines, by the kernel for so many rows, in CUDA C++.

Up to some number codes are decoded in registers, as operands of the tensor cores; for more the matrix is decoded to
memory, a piece at a time, and the vendor's product multiplies.
"""

import ctypes
from functools import cache, partial

import torch
from torch import Tensor

from kvtool.kernels import w4a16_gemv, w4a16_stream
from kvtool.kernels.launch import capability
from kvtool.kernels.nvrtc import load, refuses_to_compile, source

DECODED = 32 << 20  # bytes of a piece that is decoded to memory: it is still in the L2 cache when it is multiplied
SOURCE = source("w4a16.cuh", "w4a16_decode.cu")
_kernel = partial(load, SOURCE, "w4a16_decode", carveout=-1)

LINES, COLUMNS, WARPS = 16, 512, 4  # outputs and columns of a program that decodes, and its warps

# Rows up to which codes are decoded in registers, where warps multiply by themselves and where four do together (see
# `w4a16_stream`), of matrices that are not large and of those that are.
MOST_ROWS = {False: (128, 128), True: (512, 1024)}


def linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    """`w4a16.w4a16_linear` by the kernel for so many rows. x is of 16 bits, groups are multiples of 32."""
    large = 2 * weight.numel() >= w4a16_stream.LARGE
    if not 0 < len(x) <= MOST_ROWS[w4a16_stream.multiplies_together(x.device)][large]:
        return decoded_product(x, weight, scales, zeros, bias)
    if len(x) <= w4a16_gemv.MAX_ROWS:
        return w4a16_gemv.gemv(x, weight, scales, zeros, bias, w4a16_gemv.tile_for(x, weight))
    if len(weight) % w4a16_stream.OUTPUTS:
        return decoded_product(x, weight, scales, zeros, bias)
    return w4a16_stream.product(x, weight, scales, zeros, bias, w4a16_stream.tile_for(x, weight))


def decoded_product(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by the vendor's product with pieces of the matrix in x's dtype, each of about `DECODED` bytes."""
    outputs, step = len(weight), max(1, DECODED // (16 * x.shape[1] * x.itemsize)) * 16
    if step >= outputs:
        return torch.nn.functional.linear(x, decode(weight, scales, zeros), bias)
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    for piece in (slice(start, start + step) for start in range(0, outputs, step)):
        matrix = decode(weight[piece], scales[piece], zeros[piece]).t()
        if bias is None:
            torch.mm(x, matrix, out=out[:, piece])
        else:
            torch.addmm(bias[piece], x, matrix, out=out[:, piece])
    return out


def decode(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`w4a16.dequantize_w4` in the dtype of the scales, of 16 bits. Groups are multiples of 32; rows may be a part."""
    out = torch.empty(len(weight), 2 * weight.shape[1], dtype=scales.dtype, device=weight.device)
    kernel = _kernel(out.device, tuple(constants(out, scales, capability(out.device) >= 9).items()))
    kernel(grid(out), arguments(weight, scales, zeros, out), chained=capability(out.device) >= 9)
    return out


def grid(out: Tensor) -> tuple[int, int]:
    """Programs that decode what `out` has room for."""
    return -(-len(out) // LINES), -(-out.shape[1] // COLUMNS)


def constants(out: Tensor, scales: Tensor, chain: bool) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    return {
        "GROUP": out.shape[1] // scales.shape[1],
        "BF16": int(out.dtype == torch.bfloat16),
        "LINES": LINES,
        "COLUMNS": COLUMNS,
        "WARPS": WARPS,
        "CHAINED": int(chain),
    }


def arguments(weight: Tensor, scales: Tensor, zeros: Tensor, out: Tensor) -> list[object]:
    """What the kernel takes, in its order."""
    assert weight.is_contiguous() and scales.stride() == zeros.stride() and (len(scales) == 1 or scales.stride(0) == 1)
    return [weight, scales, zeros, out, *map(ctypes.c_int, (len(out), scales.stride(1), out.shape[1]))]


@cache
def compiles() -> bool:
    """Whether there is what compiles these kernels."""
    return refuses_to_compile() is None
