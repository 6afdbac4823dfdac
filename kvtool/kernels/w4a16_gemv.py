"""What `kvtool.kernels.w4a16` defines for a few rows, in CUDA C++: bound by the rate at which weights are read.

The kernel, `w4a16.cu`, is compiled when it is first called for a shape of its work.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kvtool.kernels.launch import capability
from kvtool.kernels.nvrtc import Kernel, compile_cubin, refuses_to_compile, source

MAX_ROWS = 32


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


# By compute capability and rows, rounded up to 8, 16 or 32: the first entry of which a matrix has at least so many
# outputs and columns. Chosen so that enough weights are under way and x is not read too often; never timed.
TILES: dict[tuple[int, int], tuple[tuple[int, int, Tile], ...]] = {
    (8, 8): ((0, 0, Tile(1, 4, 3, 4)),),
    (8, 16): ((0, 0, Tile(1, 4, 3, 3)),),
    (8, 32): ((0, 0, Tile(2, 4, 2, 2)),),
    (9, 8): ((16384, 0, Tile(2, 4, 2, 4)), (0, 8192, Tile(1, 8, 3, 2)), (0, 0, Tile(1, 4, 4, 4))),
    (9, 16): ((16384, 0, Tile(2, 4, 2, 3)), (0, 0, Tile(2, 8, 2, 1))),
    (9, 32): ((16384, 0, Tile(2, 4, 2, 2)), (0, 0, Tile(2, 8, 2, 1))),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile | None:
    """The tile for `gemv`, or None where it takes no such rows or cannot be compiled."""
    if len(x) > MAX_ROWS or not _compiles():
        return None
    outputs, depth = len(weight), x.shape[1]
    entries = TILES[capability(x.device), 8 * _columns(len(x))]
    return next((tile for least, columns, tile in entries if outputs >= least and depth >= columns), None)


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
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales, zeros))
    return [x, weight, scales, zeros, bias, out, *map(ctypes.c_int, (len(x), len(weight), x.shape[1]))]


def _columns(rows: int) -> int:
    """Products of 8 rows each."""
    return triton.next_power_of_2(triton.cdiv(rows, 8))


@cache
def _compiles() -> bool:
    return refuses_to_compile() is None


@cache
def _kernel(device: torch.device, macros: tuple[tuple[str, object], ...]) -> Kernel:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cubin = compile_cubin(source("w4a16.cu"), architecture, dict(macros))
    with torch.cuda.device(device):
        return Kernel(cubin, "w4a16", 32 * int(dict(macros)["WARPS"]), carveout=-1)
