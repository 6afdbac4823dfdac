"""Products of pairs, grouped by expert, with the matrix of their expert: of 16 bits, or of 4-bit codes that are decoded
in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.activation import silu
from kvtool.kernels.launch import await_inputs, capability, chained
from kvtool.kernels.w4a16 import RUN, Int4Weights, dequantize_w4


@dataclass(frozen=True)
class Tile:
    """How a grouped product is cut: outputs (of gates and of ups, each), depth at a time (of codes at most, and no more
    than share a scale), warps, and stages."""

    outputs: int
    depth: int
    warps: int
    stages: int


# By compute capability and rows of a tile. Neither was timed yet; those of sm_89 compile within its shared memory.
TILES: dict[tuple[int, int], Tile] = {
    (8, 8): Tile(32, 128, 2, 3),
    (8, 16): Tile(32, 128, 2, 3),
    (8, 32): Tile(32, 128, 4, 3),
    (8, 64): Tile(64, 64, 4, 3),
    (8, 128): Tile(64, 32, 8, 3),
    (9, 8): Tile(16, 256, 1, 4),
    (9, 16): Tile(16, 256, 1, 4),
    (9, 32): Tile(64, 128, 4, 3),
    (9, 64): Tile(64, 64, 4, 4),
    (9, 128): Tile(128, 64, 8, 3),
}
CODE_TILES: dict[tuple[int, int], Tile] = {
    (8, 8): Tile(32, 128, 2, 4),
    (8, 16): Tile(32, 128, 2, 4),
    (8, 32): Tile(32, 128, 4, 3),
    (8, 64): Tile(64, 64, 4, 3),
    (8, 128): Tile(64, 32, 8, 3),
    (9, 8): Tile(64, 128, 4, 3),
    (9, 16): Tile(64, 128, 4, 3),
    (9, 32): Tile(64, 128, 4, 3),
    (9, 64): Tile(64, 64, 4, 4),
    (9, 128): Tile(128, 64, 8, 3),
}
LEAST_ROWS, MOST_ROWS = 8, 128


Weights = Tensor | Int4Weights  # [E, N, K]


@dataclass(frozen=True)
class Groups:
    """Pairs by expert. Pair p is token p // top_k and its expert ids[p // top_k, p % top_k].

    Attributes:
        pairs: [T · top_k] int32, in the order of their experts; last those whose expert is not here.
        tiles: [n, 3] int32: expert, first place in `pairs`, and how many; good are the first `num_tiles` [1] int32.
        rows: pairs that a tile has at most.
    """

    pairs: Tensor
    tiles: Tensor
    num_tiles: Tensor
    rows: int


def grouped_product(x: Tensor, weight: Weights, groups: Groups, repeat: int = 1, *, gated: bool = False) -> Tensor:
    """Each pair's row times the matrix of its expert, summed in fp32.

    Args:
        x: [P / repeat, K] of 16 bits: row p // repeat is pair p's.
        weight: [E, N, K].
        gated: the first half of a matrix are gates, the second ups; the result is silu(gate) · up.

    Returns:
        [P, N] of x's dtype, or [P, N / 2] where gated; rows of pairs whose expert is not here are anything.
    """
    _, lines, depth = weight.shape
    outputs = lines // 2 if gated else lines
    out = torch.empty(len(groups.pairs), outputs, dtype=x.dtype, device=x.device)
    if isinstance(weight, Int4Weights):
        tensors, group = (weight.weight, weight.scales, weight.zeros), weight.group_size
        assert group % RUN == 0
        tile = CODE_TILES[capability(x.device), groups.rows]
        deep = min(tile.depth, group & -group)
    else:
        tensors, group, tile = (weight, weight, weight), 0, TILES[capability(x.device), groups.rows]
        deep = tile.depth
    assert all(tensor.is_contiguous() for tensor in (x, tensors[0]))
    _grouped_kernel[(len(groups.tiles) * -(-outputs // tile.outputs),)](
        x,
        *tensors,
        out,
        groups.pairs,
        groups.tiles,
        groups.num_tiles,
        len(groups.tiles),
        outputs,
        depth,
        len(weight) * lines,
        repeat,
        ROWS=groups.rows,
        OUTPUTS=tile.outputs,
        DEPTH=deep,
        EVEN=depth % deep == 0,
        GATED=gated,
        GROUP=group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(x.device),
    )
    return out


def grouped_product_reference(
    x: Tensor, weight: Weights, ids: Tensor, repeat: int = 1, *, gated: bool = False
) -> Tensor:
    """What `grouped_product` computes, pair by pair in float64; zeros for experts that are not here."""
    if isinstance(weight, Int4Weights):
        tensors = (weight.weight, weight.scales, weight.zeros)
        weight = torch.stack([dequantize_w4(*of, torch.float64) for of in zip(*tensors, strict=True)])
    outputs = weight.shape[1] // 2 if gated else weight.shape[1]
    out = torch.zeros(ids.numel(), outputs, dtype=torch.float64, device=x.device)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert < len(weight):
            y = weight[expert].double() @ x[pair // repeat].double()
            out[pair] = torch.nn.functional.silu(y[:outputs]) * y[outputs:] if gated else y
    return out


@triton.jit(do_not_specialize=["tile_count", "repeat"])
def _grouped_kernel(
    x,
    weight,
    scales,
    zeros,
    out,
    pairs,
    tiles,
    num_tiles,
    tile_count,
    outputs,
    depth,
    all_lines,
    repeat,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (outputs, tile): neighbours read the same matrix where an expert has several tiles.

    GROUP: columns of codes that share a scale; 0: weights have 16 bits.
    """
    await_inputs(CHAINED)
    tile = tl.program_id(0) % tile_count
    if tile < tl.load(num_tiles):
        expert = tl.load(tiles + tile * 3).to(tl.int64)
        first = tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
        row = tl.arange(0, ROWS)
        pair = tl.load(pairs + first + tl.minimum(row, count - 1)).to(tl.int64)
        columns = x + (pair // repeat)[None, :] * depth
        output = tl.program_id(0) // tile_count * OUTPUTS + tl.arange(0, OUTPUTS)
        line = expert * outputs * (2 if GATED else 1) + tl.minimum(output, outputs - 1)
        up_line = line + outputs
        sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
        up_sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
        if GROUP:
            byte = tl.arange(0, DEPTH // 2)
            low = byte // 16 * 32 + byte % 16  # the columns of low nibbles, in order
            for start in range(0, depth, DEPTH):
                here = columns + (start + low)[:, None]
                lows, highs = tl.load(here), tl.load(here + 16)
                now, group = start // 2 + byte, start // GROUP * all_lines
                sums = _add_coded(weight, scales, zeros, line, depth, now, group, lows, highs, sums)
                if GATED:
                    up_sums = _add_coded(weight, scales, zeros, up_line, depth, now, group, lows, highs, up_sums)
        else:
            lines, up_lines = weight + line[:, None] * depth, weight + up_line[:, None] * depth
            at = tl.arange(0, DEPTH)
            for start in range(0, depth, DEPTH):
                now = start + at
                if EVEN:
                    piece = tl.load(columns + now[:, None])
                    sums = tl.dot(tl.load(lines + now[None, :]), piece, sums)
                    if GATED:
                        up_sums = tl.dot(tl.load(up_lines + now[None, :]), piece, up_sums)
                else:
                    inside = now < depth
                    piece = tl.load(columns + now[:, None], mask=inside[:, None], other=0)
                    sums = tl.dot(tl.load(lines + now[None, :], mask=inside[None, :], other=0), piece, sums)
                    if GATED:
                        up = tl.load(up_lines + now[None, :], mask=inside[None, :], other=0)
                        up_sums = tl.dot(up, piece, up_sums)
        if GATED:
            sums = silu(sums) * up_sums
        to = out + pair[None, :] * outputs + output[:, None]
        tl.store(to, sums.to(out.dtype.element_ty), mask=(output < outputs)[:, None] & (row < count)[None, :])


@triton.jit
def _add_coded(weight, scales, zeros, line, depth, byte, group, lows, highs, sums):
    """sums [OUTPUTS, ROWS] plus the codes in these bytes of each line, decoded, times x.

    lows, highs: [bytes, ROWS], the columns of x that low and high nibbles meet.
    """
    codes = tl.load(weight + line[:, None] * (depth // 2) + byte[None, :])
    runs = tl.reshape(codes, (codes.shape[0], codes.shape[1] // 16, 4, 2, 2))  # of `pack_w4`: [OUTPUTS, runs, t, e, j]
    codes = tl.reshape(tl.permute(runs, (0, 1, 4, 2, 3)), codes.shape)
    scale, zero = tl.load(scales + group + line)[:, None], tl.load(zeros + group + line)[:, None]
    sums = tl.dot(((codes & 15).to(scale.dtype) - zero) * scale, lows, sums)
    return tl.dot(((codes >> 4).to(scale.dtype) - zero) * scale, highs, sums)
