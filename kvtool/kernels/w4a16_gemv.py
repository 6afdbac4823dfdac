"""What `kvtool.kernels.w4a16` defines for a few rows, in CUDA C++: bound by the rate at which weights are read.

The kernel, `w4a16_gemv.cu`, is compiled when it is first called for a shape of its work. Each multiprocessor has an
even share of the outputs, and each of its warps an even share of their columns, which it reads without a pause.
"""

import ctypes
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvtool.kernels.launch import capability, num_sms, shared_kib
from kvtool.kernels.nvrtc import load, source

SOURCE = source("w4a16.cuh", "w4a16_gemv.cu")
_kernel = partial(load, SOURCE, "w4a16_gemv", carveout=-1)

OUTPUTS = 2  # of which it takes multiples
MAX_ROWS = 16  # with 32, on an H200, `w4a16_stream` is faster where it matters: for large matrices


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tiles: of 16 outputs each, that a warp multiplies at once.
        warps: of a program, which share its columns.
        stages: reads of each warp that are under way at once.
        per_sm: programs that there is room for on a multiprocessor.
        programs: that there are for each.
    """

    tiles: int
    warps: int
    stages: int
    per_sm: int
    programs: int = 1


@dataclass(frozen=True)
class Cut:
    """Of the outputs.

    Attributes:
        programs: of all multiprocessors.
        tiles: of a program, each of `Tile.tiles` 16 outputs.
        lines: an even number, that are used of these 16.
    """

    programs: int
    tiles: int
    lines: int


# By compute capability and products of 8 rows: the first entry of which a matrix has at least so many outputs.
TILES: dict[tuple[int, int], tuple[tuple[int, Tile], ...]] = {
    (8, 1): ((0, Tile(1, 8, 4, 1)),),
    (8, 2): ((0, Tile(1, 8, 4, 1)),),
    (9, 1): ((0, Tile(1, 16, 4, 2)),),
    (9, 2): ((0, Tile(2, 16, 2, 1)),),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """The tile for `gemv`."""
    entries = TILES[capability(x.device), _columns(len(x))]
    return next(tile for least, tile in entries if len(weight) >= least)


def gemv(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`w4a16.w4a16_linear`, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [M, K], M at most `MAX_ROWS`, of 16 bits; the rest as there, of an even number of outputs, in groups of
            multiples of 32 columns.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    parts = cut(len(weight), tile, tile.programs * num_sms(x.device))
    macros = constants(x, scales, tile, parts, x.device)
    kernel = _kernel(x.device, tuple(macros.items()))
    shared = shared_bytes(x, tile, parts, macros)
    kernel(
        (parts.programs, 1),
        arguments(x, weight, scales, zeros, bias, out, parts),
        chained=capability(x.device) >= 9,
        shared=shared,
    )
    return out


def cut(outputs: int, tile: Tile, most: int) -> Cut:
    """Even shares for `most` programs."""
    share = -(-outputs // most)
    tiles = -(-share // (16 * tile.tiles))
    lines = -(-share // (2 * tiles * tile.tiles)) * 2
    return Cut(-(-outputs // (tiles * tile.tiles * lines)), tiles, lines)


def constants(x: Tensor, scales: Tensor, tile: Tile, parts: Cut, device: torch.device) -> dict[str, int]:
    """Macros that the kernel is compiled with."""
    room = (min(227, shared_kib(device) // tile.per_sm - 1)) << 10
    macros = {
        "TILES": tile.tiles,
        "COLUMNS": _columns(len(x)),
        "GROUP": x.shape[1] // scales.shape[1],
        "BF16": int(x.dtype == torch.bfloat16),
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "PER_SM": tile.per_sm,
        "CHAINED": int(capability(device) >= 9),
        "SHARED": room,
        "RING": 1,
        "SHARED_X": 1,
    }
    if shared_bytes(x, tile, parts, macros) > room:
        macros["SHARED_X"] = 0
    return macros


def shared_bytes(x: Tensor, tile: Tile, parts: Cut, macros: dict[str, int]) -> int:
    rows, depth = x.shape
    group = macros["GROUP"]
    read = 16 if group % 128 == 0 else 8 if group % 64 == 0 else 4
    ring = macros["RING"] * tile.warps * tile.stages * (tile.tiles * 64 * read + 128)
    xs = rows * (-(-depth // 128) * 256 + 64) + depth // (8 * read) * 8 * _columns(rows) * 4
    meeting = (tile.warps + parts.tiles - 1) * rows * (16 * tile.tiles + 4) * 4
    return ring + macros["SHARED_X"] * xs + meeting


def arguments(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor, parts: Cut
) -> list[object]:
    """What the kernel takes, in its order."""
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales.t(), zeros.t())) and len(weight) % OUTPUTS == 0
    return [
        x,
        weight,
        scales,
        zeros,
        bias,
        out,
        *map(ctypes.c_int, (len(x), len(weight), x.shape[1], parts.tiles, parts.lines)),
    ]


def _columns(rows: int) -> int:
    """Products of 8 rows each."""
    return -(-rows // 8)
