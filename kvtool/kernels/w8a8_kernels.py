"""What `kvtool.kernels.w8a8` defines, in Triton, and by the vendor's product where that is faster."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, capability, chained, prefetch
from kvtool.kernels.pack import e4m3
from kvtool.kernels.sums import finish, steps_of_part

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs and rows of a program, columns at a time, warps and stages."""

    outputs: int
    rows: int
    depth: int
    warps: int
    stages: int


# By dtype of the weights, compute capability and rows, rounded up to a power of 2. More rows than any here are the
# vendor's, or the last tile's where the vendor's product does not take them. Chosen so that enough bytes are under way
# and x is read but few times; never timed.
TILES: dict[tuple[torch.dtype, int], dict[int, Tile]] = {
    (torch.int8, 8): {
        8: Tile(16, 8, 256, 1, 4),
        16: Tile(16, 16, 256, 1, 4),
        32: Tile(32, 32, 128, 2, 4),
        64: Tile(64, 64, 128, 4, 3),
        128: Tile(64, 128, 128, 4, 3),
    },
    (torch.int8, 9): {
        8: Tile(16, 8, 512, 1, 4),
        16: Tile(16, 16, 512, 1, 4),
        32: Tile(32, 32, 256, 2, 4),
        64: Tile(64, 64, 128, 4, 4),
        128: Tile(64, 128, 128, 4, 3),
    },
    (FP8, 8): {
        8: Tile(16, 8, 256, 1, 4),
        16: Tile(16, 16, 256, 1, 4),
        32: Tile(32, 32, 128, 2, 4),
        64: Tile(64, 64, 128, 4, 3),
    },
    (FP8, 9): {
        8: Tile(16, 8, 512, 1, 4),
        16: Tile(16, 16, 512, 1, 4),
        32: Tile(32, 32, 256, 2, 4),
        64: Tile(64, 64, 128, 4, 4),
    },
}
SUMS = 32 << 20  # bytes of what the vendor's int8 product leaves: still in the L2 cache when it is scaled
PREFETCHED = 32 << 20  # bytes of a matrix that is fetched to L2 while the kernels before still run

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as when a kernel is decorated; it rounds none to e4m3


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`w8a8.w8a8_linear` or `w8a8.fp8_linear`, as the weights are, by the product for so many rows."""
    tiles = TILES[weight.dtype, capability(x.device)]
    codes, row_scales = quantized(x, weight.dtype)
    tile = tiles.get(max(8, triton.next_power_of_2(len(x))))
    if tile is None and vendor_takes(x.dtype, weight):
        return vendor_product(codes, row_scales, weight, scales, bias, x.dtype)
    return product(codes, row_scales, weight, scales, bias, tile or tiles[max(tiles)], x.dtype)


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`w8a8.int8_rows` or `w8a8.fp8_rows`, of x [M, K]: codes [M, K] of `dtype`, and scales [M] in float32."""
    rows, depth = x.shape
    assert x.is_contiguous()
    codes = torch.empty(rows, depth, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(depth)
    _quantize_kernel[(rows,)](
        x,
        codes,
        scales,
        DEPTH=depth,
        WIDTH=width,
        FP8=dtype == FP8,
        MOST=448.0 if dtype == FP8 else 127.0,
        num_warps=max(1, min(16, width // 256)),
        **chained(x.device),
    )
    return codes, scales


def product(
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    tile: Tile,
    dtype: torch.dtype,
) -> Tensor:
    """Quantised rows [M, K] times weights [N, K], both with their scales, plus bias: [M, N] in `dtype`.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.
    """
    (rows, depth), outputs = codes.shape, len(weight)
    assert codes.is_contiguous() and weight.is_contiguous()
    row_tiles = triton.cdiv(rows, tile.rows)
    programs = triton.cdiv(outputs, tile.outputs) * row_tiles
    share = tile.depth * steps_of_part(programs, triton.cdiv(depth, tile.depth), codes.device)
    parts = triton.cdiv(depth, share)
    out = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    kind = torch.int32 if weight.dtype == torch.int8 else torch.float32
    sums = torch.empty(parts, rows, outputs, dtype=kind, device=codes.device) if parts > 1 else out
    _product_kernel[(programs, parts)](
        codes,
        row_scales,
        weight,
        scales,
        scales if bias is None else bias,
        sums,
        rows,
        row_tiles,
        outputs,
        depth,
        share,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        EVEN=depth % tile.depth == 0,
        INT8=weight.dtype == torch.int8,
        WHOLE=parts == 1,
        BIAS=bias is not None,
        PREFETCH=row_tiles == 1 == parts and weight.nbytes <= PREFETCHED and depth % 16 == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(codes.device),
    )
    return finish(sums, row_scales, scales, bias, out) if parts > 1 else out


def vendor_takes(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether `vendor_product` computes products with `weight` in `dtype`."""
    return not any(size % 16 for size in weight.shape) and (weight.dtype == torch.int8 or dtype == torch.bfloat16)


def vendor_product(
    codes: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`product` by the vendor's kernels, of more than 16 rows."""
    if weight.dtype == FP8:
        by_row, by_output = row_scales[:, None], scales[None, :]
        return torch._scaled_mm(codes, weight.t(), by_row, by_output, bias, out_dtype=dtype, use_fast_accum=True)
    rows, outputs = len(codes), len(weight)
    out = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    pieces = triton.cdiv(rows, max(128, SUMS // (4 * outputs)))
    for own, own_scales, to in zip(*(x.tensor_split(pieces) for x in (codes, row_scales, out)), strict=True):
        finish(torch._int_mm(own, weight.t())[None], own_scales, scales, bias, to)
    return out


@triton.jit
def _quantize_kernel(
    x,
    codes,
    scales,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    MOST: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    await_inputs(CHAINED)
    value = tl.load(x + row * DEPTH + column, mask=column < DEPTH, other=0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), 0), MOST)
    tl.store(scales + row, scale)
    quotient = tl.div_rn(value, tl.full([WIDTH], 1, tl.float32) * tl.where(scale == 0, 1.0, scale))
    if FP8:
        quotient = tl.clamp(quotient, -MOST, MOST)
        code = (
            e4m3(quotient).to(tl.uint8).to(tl.float8e4nv, bitcast=True) if INTERPRETED else quotient.to(tl.float8e4nv)
        )
    else:
        code = (quotient + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # ties to even, as a sum rounds
        code = code.to(tl.int8)
    tl.store(codes + row * DEPTH + column, code, mask=column < DEPTH)


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _product_kernel(
    codes,
    row_scales,
    weight,
    scales,
    bias,
    out,
    rows,
    row_tiles,
    outputs,
    depth,
    share,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    INT8: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (outputs and rows, columns): neighbours read the same part of the matrix.

    WHOLE: of all columns; else sums of a part of them are left to `sums.finish`.
    """
    first = tl.program_id(0) // row_tiles * OUTPUTS
    output = first + tl.arange(0, OUTPUTS)
    line = tl.minimum(output, outputs - 1).to(tl.int64)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, rows - 1).to(tl.int64)
    at = tl.arange(0, DEPTH)
    lines = weight + line[:, None] * depth + at[None, :]
    columns = codes + own[None, :] * depth + at[:, None]
    if CHAINED and PREFETCH:
        prefetch(weight + first.to(tl.int64) * depth, tl.minimum(outputs - first, OUTPUTS) * depth)
    await_inputs(CHAINED)
    sums = tl.zeros([OUTPUTS, ROWS], tl.int32 if INT8 else tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, depth), DEPTH):
        if EVEN:
            w = tl.load(lines + start)
            piece = tl.load(columns + start)
        else:
            inside = start + at < depth
            w = tl.load(lines + start, mask=inside[None, :], other=0 if INT8 else 0.0)
            piece = tl.load(columns + start, mask=inside[:, None], other=0 if INT8 else 0.0)
        sums = tl.dot(w, piece, sums, out_dtype=sums.dtype)
    inside_out = (output < outputs)[:, None] & (row < rows)[None, :]
    to = out + (tl.program_id(1) * rows + row.to(tl.int64))[None, :] * outputs + output[:, None]
    if WHOLE:
        value = sums.to(tl.float32) * (tl.load(scales + line)[:, None] * tl.load(row_scales + own)[None, :])
        if BIAS:
            value += tl.load(bias + line).to(tl.float32)[:, None]
        tl.store(to, value.to(out.dtype.element_ty), mask=inside_out)
    else:
        tl.store(to, sums, mask=inside_out)
