"""`quantized_rows` and `w8a8` in Triton, and products by the vendor where that is faster."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.encode import e4m3
from kvtool.kernels.launch import INTERPRETED, await_inputs, capability, chained, next_power_of_2, num_sms, power_of_2
from kvtool.kernels.quantized_rows import FP8, LARGEST, Activations, QuantizedRows
from kvtool.kernels.sums import finish, steps_of_part


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs and rows of a program, columns at a time, warps and stages."""

    outputs: int
    rows: int
    depth: int
    warps: int
    stages: int


# By dtype of the weights, compute capability and rows, rounded up to a power of 2; more rows than any here are as the
# last. Where there are two, the second is for outputs so many that the first would give each multiprocessor two
# programs. None is the vendor's product. Those of sm_90 were chosen on an H200 (`scripts/bench_linear.py --sweep`), fp8
# with 16 rows as its neighbours; the others are to have enough bytes under way in less shared memory, and were never
# timed.
TILES: dict[tuple[torch.dtype, int], dict[int, tuple[Tile | None, ...]]] = {
    (torch.int8, 8): {
        8: (Tile(16, 8, 256, 1, 4),),
        16: (Tile(16, 16, 256, 1, 4),),
        32: (Tile(32, 32, 128, 2, 4),),
        64: (Tile(64, 64, 128, 4, 3),),
        128: (Tile(64, 128, 128, 4, 3),),
        256: (None,),
    },
    (torch.int8, 9): {
        8: (Tile(16, 8, 512, 1, 4),),
        16: (Tile(16, 16, 512, 1, 4),),
        32: (Tile(64, 32, 256, 4, 4),),
        64: (Tile(64, 64, 128, 4, 5), Tile(64, 64, 128, 4, 4)),
        128: (Tile(64, 128, 128, 4, 4),),
        256: (Tile(64, 128, 128, 4, 4), Tile(128, 128, 128, 4, 3)),
    },
    (FP8, 8): {
        8: (Tile(16, 8, 256, 1, 4),),
        16: (Tile(16, 16, 256, 1, 4),),
        32: (Tile(32, 32, 128, 2, 4),),
        64: (Tile(64, 64, 128, 4, 3),),
        128: (None,),
    },
    (FP8, 9): {
        8: (Tile(64, 8, 256, 4, 4), Tile(16, 8, 512, 1, 4)),
        16: (Tile(64, 16, 256, 4, 4),),
        32: (Tile(64, 32, 256, 4, 4),),
        64: (Tile(64, 64, 128, 4, 5), Tile(64, 64, 128, 4, 4)),
        128: (Tile(64, 128, 128, 4, 4), None),
        256: (Tile(64, 128, 128, 4, 4), None),
        512: (None,),
    },
}
SUMS = 32 << 20  # bytes of what the vendor's int8 product leaves: still in the L2 cache when it is scaled
BLOCK = 1024  # columns that a program encodes

LARGEST_INT8, LARGEST_FP8 = tl.constexpr(LARGEST[torch.int8]), tl.constexpr(LARGEST[FP8])
LEAST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)


def linear(x: Activations, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`w8a8.w8a8_linear`, by the product for so many rows and outputs."""
    rows = quantized(x, weight.dtype) if isinstance(x, Tensor) else x
    tile = tile_for(len(rows), weight, rows.dtype)
    if tile is None:
        return vendor_product(rows, weight, scales, bias)
    return product(rows, weight, scales, bias, tile)


def tile_for(rows: int, weight: Tensor, dtype: torch.dtype) -> Tile | None:
    """How the product of so many rows, of `dtype`, is cut; None: the vendor's kernels compute it."""
    tiles = TILES[weight.dtype, capability(weight.device)]
    few, *many = tiles[min(max(8, power_of_2(rows)), max(tiles))]
    tile = few
    if few and many:
        programs = -(-len(weight) // few.outputs) * -(-rows // few.rows)
        tile = few if programs < 2 * num_sms(weight.device) else many[0]
    if tile is None and not vendor_takes(dtype, weight):
        return [tile for choices in tiles.values() for tile in choices if tile][-1]
    return tile


def quantized(x: Tensor, kind: torch.dtype) -> QuantizedRows:
    """`quantize_rows`."""
    rows, depth = x.shape
    assert x.is_contiguous()
    out = empty_rows(x, depth, kind)
    width = power_of_2(depth)
    _quantize_kernel[(rows,)](
        x,
        out.codes,
        out.scales,
        DEPTH=depth,
        WIDTH=width,
        num_warps=max(1, min(16, width // 256)),
        **chained(x.device),
    )
    return out


def encoded(x: Tensor, peaks: Tensor, kind: torch.dtype) -> QuantizedRows:
    """`quantize_rows` of x [M, K] by several programs for each row, the greatest magnitudes of some parts of which are
    known, [M, parts]."""
    (rows, depth), parts = x.shape, peaks.shape[1]
    assert x.is_contiguous() and peaks.is_contiguous()
    out = empty_rows(x, depth, kind)
    _encode_kernel[(rows, -(-depth // BLOCK))](
        x, peaks, out.codes, out.scales, depth, PARTS=parts, BLOCK=BLOCK, num_warps=4, **chained(x.device)
    )
    return out


def empty_rows(x: Tensor, depth: int, kind: torch.dtype) -> QuantizedRows:
    """Of so many columns, yet to be written, for what becomes of each row of `x`."""
    codes = torch.empty(len(x), depth, dtype=kind, device=x.device)
    return QuantizedRows(codes, torch.empty(len(x), dtype=torch.float32, device=x.device), x.dtype)


def product(x: QuantizedRows, weight: Tensor, scales: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """Quantised rows [M, K] times weights [N, K], both with their scales, plus bias: [M, N] in the dtype of x."""
    codes, (rows, depth), outputs = x.codes, x.codes.shape, len(weight)
    assert codes.is_contiguous() and weight.is_contiguous()
    row_tiles = -(-rows // tile.rows)
    programs = -(-outputs // tile.outputs) * row_tiles
    share = tile.depth * steps_of_part(programs, -(-depth // tile.depth), codes.device)
    parts = -(-depth // share)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=codes.device)
    kind = torch.int32 if weight.dtype == torch.int8 else torch.float32
    sums = torch.empty(parts, rows, outputs, dtype=kind, device=codes.device) if parts > 1 else out
    _product_kernel[(programs, parts)](
        codes,
        x.scales,
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
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(codes.device),
    )
    return finish(sums, x.scales, scales, bias, out) if parts > 1 else out


def vendor_takes(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether `vendor_product` computes products with `weight` in `dtype`."""
    return not any(size % 16 for size in weight.shape) and (weight.dtype == torch.int8 or dtype == torch.bfloat16)


def vendor_product(x: QuantizedRows, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`product` by the vendor's kernels, of more than 16 rows."""
    if weight.dtype == FP8:
        by_row, by_output = x.scales[:, None], scales[None, :]
        return torch._scaled_mm(x.codes, weight.t(), by_row, by_output, bias, out_dtype=x.dtype, use_fast_accum=True)
    rows, outputs = len(x), len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=weight.device)
    pieces = -(-rows // max(128, SUMS // (4 * outputs)))
    for codes, row_scales, to in zip(*(whole.tensor_split(pieces) for whole in (x.codes, x.scales, out)), strict=True):
        finish(torch._int_mm(codes, weight.t())[None], row_scales, scales, bias, to)
    return out


@triton.jit
def _quantize_kernel(x, codes, scales, DEPTH: tl.constexpr, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < DEPTH
    await_inputs(CHAINED)
    value = tl.load(x + row * DEPTH + column, mask=inside, other=0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value), 0), codes.dtype.element_ty)
    tl.store(scales + row, scale)
    store_codes(codes + row * DEPTH + column, value, scale, inside)


@triton.jit
def _encode_kernel(x, peaks, codes, scales, depth, PARTS: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Program (row, part of its columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, next_power_of_2(PARTS))
    inside = column < depth
    await_inputs(CHAINED)
    value = tl.load(x + row * depth + column, mask=inside, other=0).to(tl.float32)
    peak = tl.max(tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=0), 0)
    scale = scale_of(peak, codes.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(scales + row, scale)
    store_codes(codes + row * depth + column, value, scale, inside)


@triton.jit
def scale_of(peak, kind: tl.constexpr):
    """Of a row whose greatest magnitude is `peak`."""
    return peak * (1 / LARGEST_INT8 if kind == tl.int8 else 1 / LARGEST_FP8)


@triton.jit
def store_codes(to, value, scale, mask):
    """Codes of the kind that `to` points to, of values in fp32."""
    kind: tl.constexpr = to.dtype.element_ty
    factor = tl.where(scale < LEAST_SCALE, 0.0, tl.div_rn(1.0, tl.maximum(scale, LEAST_SCALE)))
    # The clamp keeps product and sum apart, which one rounding for both would not leave as defined.
    if kind == tl.int8:
        value = tl.clamp(value * factor, -LARGEST_INT8, LARGEST_INT8)
        code = (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # ties to even, as a sum rounds
        tl.store(to, code.to(tl.int8), mask=mask)
    else:
        value = tl.clamp(value * factor, -LARGEST_FP8, LARGEST_FP8)
        if INTERPRETED:
            tl.store(to, e4m3(value).to(tl.uint8).to(tl.float8e4nv, bitcast=True), mask=mask)
        else:
            tl.store(to, value.to(tl.float8e4nv), mask=mask)


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
    CHAINED: tl.constexpr,
):
    """Program (outputs and rows, columns): neighbours read the same part of the matrix.

    WHOLE: of all columns; else sums of a part of them are left to `sums.finish`.
    """
    first = tl.program_id(0) // row_tiles * OUTPUTS
    output = first + tl.arange(0, OUTPUTS)
    line = tl.minimum(output, outputs - 1).to(tl.int64)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    is_row = row < rows  # others read nothing: all programs would ask for the same line of memory
    at = tl.arange(0, DEPTH)
    lines = weight + line[:, None] * depth + at[None, :]
    columns = codes + row.to(tl.int64)[None, :] * depth + at[:, None]
    begin = tl.program_id(1) * share
    await_inputs(CHAINED)
    sums = tl.zeros([OUTPUTS, ROWS], tl.int32 if INT8 else tl.float32)
    for start in range(begin, tl.minimum(begin + share, depth), DEPTH):
        if EVEN:
            w = tl.load(lines + start)
            piece = tl.load(columns + start, mask=is_row[None, :], other=0 if INT8 else 0.0)
        else:
            inside = start + at < depth
            w = tl.load(lines + start, mask=inside[None, :], other=0 if INT8 else 0.0)
            piece = tl.load(columns + start, mask=inside[:, None] & is_row[None, :], other=0 if INT8 else 0.0)
        sums = tl.dot(w, piece, sums, out_dtype=sums.dtype)
    inside_out = (output < outputs)[:, None] & is_row[None, :]
    to = out + (tl.program_id(1) * rows + row.to(tl.int64))[None, :] * outputs + output[:, None]
    if WHOLE:
        value = sums.to(tl.float32) * (
            tl.load(scales + line)[:, None] * tl.load(row_scales + row, mask=is_row, other=0)[None, :]
        )
        if BIAS:
            value += tl.load(bias + line).to(tl.float32)[:, None]
        tl.store(to, value.to(out.dtype.element_ty), mask=inside_out)
    else:
        tl.store(to, sums, mask=inside_out)
