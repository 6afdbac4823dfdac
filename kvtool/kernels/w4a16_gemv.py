"""What `kvtool.kernels.w4a16` defines for a few rows, in CUDA C++: bound by the rate at which weights are read.

The kernel, `w4a16_gemv.cu`, is compiled when it is first called for a shape of its work.
"""

import ctypes
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from kvtool.kernels.launch import capability
from kvtool.kernels.nvrtc import load, source

SOURCE = source("w4a16.cuh", "w4a16_gemv.cu")
_kernel = partial(load, SOURCE, "w4a16_gemv", carveout=-1)

MAX_ROWS = 16  # with 32, on an H200, `w4a16_stream` is faster where it matters: for large matrices


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tiles: of 16 outputs each, that a program multiplies.
        warps: of a program, which share its columns.
        stages: reads of each warp that are under way at once.
        per_sm: programs that run at once on a multiprocessor.
    """

    tiles: int
    warps: int
    stages: int
    per_sm: int


# By compute capability and products of 8 rows: the first entry of which a matrix has at least so many outputs. Where
# they are 32 at most for each of an H200's 132 multiprocessors, many warps share those; else programs have half as
# many warps, and run two at once. On an H200 (9), timed with Qwen2.5-7B's matrices and 1, 8 and 16 rows, no other is
# 3 % faster. Those of 8 are not timed.
TILES: dict[tuple[int, int], tuple[tuple[int, Tile], ...]] = {
    (8, 1): ((0, Tile(1, 4, 3, 4)),),
    (8, 2): ((0, Tile(1, 4, 3, 3)),),
    (9, 1): ((16384, Tile(2, 8, 2, 2)), (32 * 132 + 1, Tile(1, 8, 2, 2)), (0, Tile(2, 16, 2, 1))),
    (9, 2): ((32 * 132 + 1, Tile(2, 8, 2, 2)), (0, Tile(2, 16, 2, 1))),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """The tile for `gemv`."""
    entries = TILES[capability(x.device), _columns(len(x))]
    return next(tile for least, tile in entries if len(weight) >= least)


def gemv(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`w4a16.w4a16_linear`, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [M, K], M at most `MAX_ROWS`, of 16 bits; the rest as there, in groups of multiples of 32 columns.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    kernel = _kernel(x.device, tuple(constants(x, scales, tile, x.device).items()))
    grid = (triton.cdiv(len(weight), 16 * tile.tiles), 1)
    kernel(grid, arguments(x, weight, scales, zeros, bias, out), chained=capability(x.device) >= 9)
    return out


def constants(x: Tensor, scales: Tensor, tile: Tile, device: torch.device) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    return {
        "TILES": tile.tiles,
        "COLUMNS": _columns(len(x)),
        "GROUP": x.shape[1] // scales.shape[1],
        "BF16": int(x.dtype == torch.bfloat16),
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "PER_SM": tile.per_sm,
        "CHAINED": int(capability(device) >= 9),
    }


def arguments(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor
) -> list[object]:
    """What the kernel takes, in its order."""
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales.t(), zeros.t()))
    return [x, weight, scales, zeros, bias, out, *map(ctypes.c_int, (len(x), len(weight), x.shape[1]))]


def _columns(rows: int) -> int:
    """Products of 8 rows each."""
    return triton.cdiv(rows, 8)
