"""What `kvtool.kernels.w4a16` defines, by the kernel for so many rows.

Up to a hundred or so, codes are decoded in registers, as operands of the tensor cores; for more the matrix is decoded
to memory, a piece at a time, and the vendor's product multiplies.
"""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels import w4a16_gemv, w4a16_stream
from kvtool.kernels.launch import await_inputs, chained
from kvtool.kernels.nvrtc import refuses_to_compile

MOST_ROWS = 128  # for which codes are decoded in registers; for 256 that took longer on an H200, whatever the matrix
DECODED = 32 << 20  # bytes of a piece that is decoded to memory: it is still in the L2 cache when it is multiplied

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as when a kernel is decorated; it knows no assembly


def linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    """`w4a16.w4a16_linear` by the kernel for so many rows. x is of 16 bits, groups are multiples of 32."""
    if not 0 < len(x) <= MOST_ROWS or not _compiles():
        return decoded_product(x, weight, scales, zeros, bias)
    if len(x) > w4a16_gemv.MAX_ROWS:
        return w4a16_stream.product(x, weight, scales, zeros, bias, w4a16_stream.tile_for(x))
    return w4a16_gemv.gemv(x, weight, scales, zeros, bias, w4a16_gemv.tile_for(x, weight))


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
    """`w4a16.dequantize_w4` in the dtype of the scales."""
    outputs, group = len(weight), _group(weight, scales)
    depth, step = 2 * weight.shape[1], gcd(group, 512)
    out = torch.empty(outputs, depth, dtype=scales.dtype, device=weight.device)
    lines = 2048 // step
    _dequantize_kernel[(triton.cdiv(outputs, lines), depth // step)](
        weight,
        scales,
        zeros,
        out,
        outputs,
        depth,
        GROUP=group,
        OUTPUTS=lines,
        DEPTH=step,
        num_warps=4,
        **chained(weight.device),
    )
    return out


@cache
def _compiles() -> bool:
    return refuses_to_compile() is None


def _group(weight: Tensor, scales: Tensor) -> int:
    """Columns that share a scale."""
    return 2 * weight.shape[1] // scales.shape[1]


@triton.jit
def _dequantize_kernel(
    weight,
    scales,
    zeros,
    out,
    outputs,
    depth,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    line = tl.minimum(output, outputs - 1).to(tl.int64)
    start = tl.program_id(1) * DEPTH
    byte = tl.arange(0, DEPTH // 2)
    packed = tl.load(weight + line[:, None] * (depth // 2) + start // 2 + byte[None, :])
    scale = tl.load(scales + line * (depth // GROUP) + start // GROUP)
    zero = tl.load(zeros + line * (depth // GROUP) + start // GROUP)
    to = out + line[:, None] * depth + start + (byte // 16 * 32 + byte % 16)[None, :]
    await_inputs(CHAINED)
    tl.store(to, _decoded(packed, scale, zero, 0), mask=(output < outputs)[:, None])
    tl.store(to + 16, _decoded(packed, scale, zero, 1), mask=(output < outputs)[:, None])


@triton.jit
def _decoded(packed, scale, zero, PART: tl.constexpr):
    """(codes − zero) · scale of the low (0) or high (1) nibbles, in the dtype of the scales [OUTPUTS]."""
    if INTERPRETED:
        return (((packed >> (PART * 4)) & 15).to(scale.dtype) - zero[:, None]) * scale[:, None]
    asm: tl.constexpr = _decode_asm(PART, scale.dtype == tl.bfloat16)
    arguments = [packed, _pair(scale)[:, None], _pair(zero)[:, None]]
    return tl.inline_asm_elementwise(asm, "=r,=r,r,r,r,r,r,r,r,r,r", arguments, scale.dtype, True, 4)


@triton.jit
def _pair(x):
    """Each of 16 bits twice, in 32."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.constexpr_function
def _decode_asm(part, bfloat):
    """Four bytes, and a scale and a zero in both halves of a register, to two registers of two numbers each.

    A nibble under 0x43 is a bf16 of 128 + code, under 0x64 an fp16 of 1,024 + code: a permutation and a sum instead of
    conversions, which take many times as long. Sums and products are `fma`, which sm_89 has for pairs of bf16 too.
    """
    kind, byte, one, offset = ("bf16x2", 0x43, 0x3F80, 0x4300) if bfloat else ("f16x2", 0x64, 0x3C00, 0x6400)
    both = 0x10001
    asm = ".reg .b32 t, i, m, o, n; "
    asm += f"mov.b32 i, {one * both:#x}; mov.b32 m, {(one | 0x8000) * both:#x}; "  # 1, -1, -0
    asm += f"mov.b32 o, {(offset | 0x8000) * both:#x}; mov.b32 n, {0x8000 * both:#x}; "
    asm += "shr.b32 t, $2, 4; and.b32 t, t, 0x0f0f0f0f; " if part else "and.b32 t, $2, 0x0f0f0f0f; "
    for register, selector in ((0, "0x4140"), (1, "0x4342")):
        asm += f"prmt.b32 ${register}, t, {byte * 0x01010101:#x}, {selector}; "
        for operands in (f"${register}, i, o", f"$7, m, ${register}", f"${register}, $3, n"):
            asm += f"fma.rn.{kind} ${register}, {operands}; "
    return "{ " + asm + "}"
