"""Products of a few rows with a matrix of 16-bit weights, bound by the rate at which weights are read.

Two kernels: multiply-adds on registers for the fewest rows, and tensor cores, whose tiles have weights as rows and the
few rows as columns. Either can add a bias, or end in the activation of a gated MLP.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.activation import silu
from kvtool.kernels.launch import await_inputs, capability, chained, power_of_2

MAX_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        outputs: rows of the matrix that one program multiplies (of gates and of ups, each, where there are both).
        depth: elements of each that it reads at a time.
        warps, stages: of a program; `stages` reads are under way at once.
        dot: on tensor cores.
    """

    outputs: int
    depth: int
    warps: int
    stages: int = 1
    dot: bool = False


# By compute capability and rows, rounded up to a power of 2: the first entry of which a matrix has at least so many
# outputs and columns. Timed on an H200; sm_89 was never timed.
TILES: dict[tuple[int, int], tuple[tuple[int, int, Tile], ...]] = {
    (8, 1): ((0, 0, Tile(4, 512, 2)),),
    (8, 2): ((0, 0, Tile(2, 512, 2)),),
    (8, 4): ((0, 0, Tile(16, 256, 1, 4, dot=True)),),
    (8, 8): ((0, 0, Tile(16, 256, 1, 4, dot=True)),),
    (9, 1): (
        (16384, 0, Tile(4, 512, 2)),
        (2560, 8192, Tile(4, 1024, 4)),
        (4096, 0, Tile(4, 512, 4)),
        (2560, 0, Tile(8, 512, 8)),
        (0, 0, Tile(2, 2048, 8)),
    ),
    (9, 2): (
        (65536, 0, Tile(64, 128, 2, 4, dot=True)),
        (16384, 0, Tile(64, 64, 4, 3, dot=True)),
        (4096, 0, Tile(16, 256, 1, 4, dot=True)),
        (0, 0, Tile(4, 512, 2)),
    ),
    (9, 4): (
        (65536, 0, Tile(32, 256, 1, 4, dot=True)),
        (16384, 0, Tile(64, 64, 4, 3, dot=True)),
        (2560, 0, Tile(32, 256, 1, 4, dot=True)),
        (0, 0, Tile(16, 256, 1, 4, dot=True)),
    ),
    (9, 8): (
        (65536, 0, Tile(32, 128, 1, 4, dot=True)),
        (0, 0, Tile(16, 256, 1, 4, dot=True)),
    ),
    (9, 16): (
        (65536, 0, Tile(64, 128, 4, 3, dot=True)),
        (16384, 0, Tile(32, 128, 1, 4, dot=True)),
    ),
    (9, 32): (
        (65536, 0, Tile(64, 128, 4, 3, dot=True)),
        (16384, 0, Tile(64, 64, 4, 3, dot=True)),
    ),
    (9, 64): ((16384, 0, Tile(64, 64, 4, 3, dot=True)),),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile | None:
    """The tile for `gemv`, or None where the vendor's product is faster, or has a single output."""
    if not 0 < x.shape[0] <= MAX_ROWS or x.dtype.itemsize != 2 or len(weight) == 1:
        return None
    entries = TILES.get((capability(x.device), power_of_2(len(x))), ())
    outputs, depth = weight.shape
    return next((tile for least, columns, tile in entries if outputs >= least and depth >= columns), None)


@dataclass(frozen=True)
class Prologue:
    """What becomes of the rows first: `kvtool.layers.norm.RMSNorm`, with its `gain` [K].

    Attributes:
        residual: [T, K], the stream to which the rows are added; None: they begin it.
    """

    residual: Tensor | None
    gain: Tensor
    eps: float


def norm_gemv(
    x: Tensor, prologue: Prologue, weight: Tensor, bias: Tensor | None, tile: Tile, *, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """`gemv` of the normalised stream x + residual, and that stream [T, K].

    Every program sums the squares of all rows, which it has just read, and divides by the norm in the end.
    """
    assert not tile.dot and x.is_contiguous()
    stream = x if prologue.residual is None else torch.empty_like(x)
    return _launch(x, weight, bias, tile, gated, prologue, stream), stream


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, *, gated: bool = False) -> Tensor:
    """x Wᵀ + b in the dtype of x, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [T, K], T at most `MAX_ROWS`, of 16 bits.
        weight: [N, K], rows contiguous; bias: [N].
        gated: the first half of the outputs are gates, the second ups; the result is silu(gate) · up.

    Returns:
        [T, N], or [T, N / 2] where gated.
    """
    return _launch(x, weight, bias, tile, gated)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    prologue: Prologue | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    rows, depth = x.shape
    assert x.is_contiguous() and weight.is_contiguous() and rows <= MAX_ROWS
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    columns = power_of_2(rows)
    options = {
        "ROWS": max(8, columns) if tile.dot else columns,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "EVEN": depth % tile.depth == 0 and outputs % tile.outputs == 0,
        "BIAS": bias is not None,
        "GATED": gated,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **chained(x.device),
    }
    grid = (-(-outputs // tile.outputs),)
    given = (x, weight, weight if bias is None else bias, out, rows, outputs, depth)
    if tile.dot:
        _dot_kernel[grid](*given, **options)
    else:
        residual = prologue and prologue.residual
        _multiply_kernel[grid](
            *given,
            x if residual is None else residual,
            x if stream is None else stream,
            prologue.gain if prologue else x,
            prologue.eps if prologue else 0.0,
            STAGES=tile.stages,
            NORM=prologue is not None,
            ADD=residual is not None,
            **options,
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _multiply_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    depth,
    residual,
    stream,
    gain,
    eps,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at = tl.arange(0, DEPTH)
    lines = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * depth
    up_lines = lines + outputs.to(tl.int64) * depth
    held = ()
    ups = ()
    for stage in tl.static_range(STAGES):
        held += (_piece(lines, stage * DEPTH + at, depth, EVEN and stage == 0),)
        ups += (_piece(up_lines, stage * DEPTH + at, depth, EVEN and stage == 0) if GATED else 0,)
    await_inputs(CHAINED)
    sums = ()
    up_sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([OUTPUTS, DEPTH], tl.float32),)
        up_sums += (tl.zeros([OUTPUTS, DEPTH], tl.float32) if GATED else 0,)
        squares += (tl.zeros([DEPTH], tl.float32) if NORM else 0,)
    for start in range(0, depth, DEPTH):
        now = start + at
        w = held[0].to(tl.float32)
        up = ups[0].to(tl.float32) if GATED else 0
        later = ()
        later_ups = ()
        for stage in tl.static_range(STAGES - 1):
            later += (held[stage + 1],)
            later_ups += (ups[stage + 1],)
        later += (_piece(lines, now + STAGES * DEPTH, depth, False),)
        later_ups += (_piece(up_lines, now + STAGES * DEPTH, depth, False) if GATED else 0,)
        held = later
        ups = later_ups
        gains = _gains(gain, now, depth, NORM)
        new_sums = ()
        new_up_sums = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            given = _stream_piece(x, residual, row, now, rows, depth, ADD)
            piece = given.to(tl.float32)
            if ADD:
                inside = tl.where((row < rows) & (tl.program_id(0) == 0), now < depth, False)
                tl.store(stream + row * depth + now, given, mask=inside)
            new_squares += (squares[row] + piece * piece if NORM else 0,)
            piece *= gains
            new_sums += (sums[row] + w * piece[None, :],)
            new_up_sums += (up_sums[row] + up * piece[None, :] if GATED else 0,)
        sums = new_sums
        up_sums = new_up_sums
        squares = new_squares
    for row in tl.static_range(ROWS):
        scale = tl.rsqrt(tl.sum(squares[row], 0) / depth + eps) if NORM else 1.0
        value = tl.sum(sums[row], 1) * scale
        if BIAS:
            value += tl.load(bias + output, mask=output < outputs, other=0).to(tl.float32)
        if GATED:
            up_value = tl.sum(up_sums[row], 1) * scale
            if BIAS:
                up_value += tl.load(bias + outputs + output, mask=output < outputs, other=0).to(tl.float32)
            value = silu(value) * up_value
        tl.store(
            out + row * outputs + output,
            value.to(out.dtype.element_ty),
            mask=tl.where(row < rows, output < outputs, False),
        )


@triton.jit
def _gains(gain, at, depth, NORM: tl.constexpr):
    """[DEPTH] of the norm's weights; 1 without a norm."""
    if NORM:
        return tl.load(gain + at, mask=at < depth, other=0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _stream_piece(x, residual, row, at, rows, depth, ADD: tl.constexpr):
    """[DEPTH] of a row, in its dtype."""
    inside = tl.where(row < rows, at < depth, False)
    piece = tl.load(x + row * depth + at, mask=inside, other=0)
    if ADD:
        before = tl.load(residual + row * depth + at, mask=inside, other=0)
        piece = (piece.to(tl.float32) + before.to(tl.float32)).to(piece.dtype)
    return piece


@triton.jit
def _piece(lines, at, depth, EVEN: tl.constexpr):
    """[OUTPUTS, DEPTH] of the matrix, which no other program reads."""
    if EVEN:
        return tl.load(lines + at[None, :], eviction_policy="evict_first")
    return tl.load(lines + at[None, :], mask=(at < depth)[None, :], other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["rows"])
def _dot_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    depth,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)[None, :]
    at = tl.arange(0, DEPTH)
    lines = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * depth
    up_lines = lines + outputs.to(tl.int64) * depth
    columns = x + tl.minimum(row, rows - 1) * depth
    await_inputs(CHAINED)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up_sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        now = start + at
        if EVEN:
            piece = tl.load(columns + now[:, None])
        else:
            piece = tl.load(columns + now[:, None], mask=(now < depth)[:, None], other=0)
        sums = tl.dot(_piece(lines, now, depth, EVEN), piece, sums)
        if GATED:
            up_sums = tl.dot(_piece(up_lines, now, depth, EVEN), piece, up_sums)
    inside = (output < outputs)[:, None] & (row < rows)
    if BIAS:
        sums += tl.load(bias + output, mask=output < outputs, other=0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            up_sums += tl.load(bias + outputs + output, mask=output < outputs, other=0).to(tl.float32)[:, None]
        sums = silu(sums) * up_sums
    tl.store(out + row * outputs + output[:, None], sums.to(out.dtype.element_ty), mask=inside)
