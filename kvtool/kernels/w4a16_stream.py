"""What `kvtool.kernels.w4a16` defines, in CUDA C++ for more rows than `w4a16_gemv` takes.

The kernel, `w4a16_stream.cu`, is compiled when it is first called for a shape of its work. A product is cut into tiles,
and a tile into steps of columns. Each program takes as many steps as the others, one tile's after the other's, whatever
the shape ("stream-K", arXiv 2301.03598): no multiprocessor waits for others with their last tile.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kvtool.kernels.launch import capability, num_sms
from kvtool.kernels.nvrtc import Kernel, compile_cubin, source

SOURCE = source("w4a16.cuh", "w4a16_stream.cu")
BLOCK = 128  # columns of a step that one warp multiplies


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tiles: of 16 outputs each, that a warp multiplies.
        columns: of 8 rows of x each, that it multiplies them with.
        warps: of a program.
        parts: blocks of 128 columns of a step, each of other warps.
        stages: steps that a program holds, all but one of them under way.
        per_sm: programs that run at once on a multiprocessor.
    """

    tiles: int
    columns: int
    warps: int
    parts: int
    stages: int
    per_sm: int

    @property
    def outputs(self) -> int:
        return 16 * self.tiles * self.warps // self.parts

    @property
    def rows(self) -> int:
        return 8 * self.columns

    @property
    def shared_bytes(self) -> int:
        """Of a program, as the kernel has it."""
        step = self.parts * (self.outputs * BLOCK // 2 + self.rows * BLOCK * 2)
        return self.stages * step + (self.parts - 1) * self.outputs * self.rows * 4


# By compute capability and products of 8 rows, as wide as registers allow: x is read again for each tile. Timed on an
# H200 (9) with Qwen2.5-7B's four matrices and 32, 64 and 128 rows: another takes 13 % less at most, and that for the
# smallest; most take more. Those of 8 are not timed.
TILES: dict[tuple[int, int], Tile] = {
    (8, 4): Tile(2, 4, 8, 1, 4, 1),
    (8, 8): Tile(2, 8, 8, 1, 3, 1),
    (9, 4): Tile(2, 4, 8, 1, 4, 1),
    (9, 8): Tile(2, 8, 8, 1, 4, 1),
}


def tile_for(x: Tensor) -> Tile:
    """The tile for `product`."""
    return TILES[capability(x.device), 4 if len(x) <= 32 else 8]


def product(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`w4a16.w4a16_linear`, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [M, K] of 16 bits; the rest as there, in groups of multiples of 32 columns.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    kernel = _kernel(x.device, tuple(constants(x, scales, tile, x.device).items()))
    programs, share = grid(x, weight, tile, tile.per_sm * num_sms(x.device))
    partial = torch.empty(programs, 2, tile.outputs * tile.rows, dtype=torch.float32, device=x.device)
    values = arguments(x, weight, scales, zeros, bias, out, partial, _arrivals(x.device), share)
    kernel((programs, 1), values, chained=capability(x.device) >= 9)
    return out


def grid(x: Tensor, weight: Tensor, tile: Tile, most: int) -> tuple[int, int]:
    """Programs, of which at most so many run at once, and steps of each."""
    tiles = triton.cdiv(len(weight), tile.outputs) * triton.cdiv(len(x), tile.rows)
    steps = tiles * triton.cdiv(x.shape[1], BLOCK * tile.parts)
    share = triton.cdiv(steps, most)
    return triton.cdiv(steps, share), share


def constants(x: Tensor, scales: Tensor, tile: Tile, device: torch.device) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    return {
        "TILES": tile.tiles,
        "COLUMNS": tile.columns,
        "GROUP": x.shape[1] // scales.shape[1],
        "BF16": int(x.dtype == torch.bfloat16),
        "WARPS": tile.warps,
        "PARTS": tile.parts,
        "STAGES": tile.stages,
        "PER_SM": tile.per_sm,
        "CHAINED": int(capability(device) >= 9),
    }


def arguments(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out: Tensor,
    partial: Tensor,
    arrivals: Tensor,
    share: int,
) -> list[object]:
    """What the kernel takes, in its order."""
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales, zeros))
    numbers = map(ctypes.c_int, (len(x), len(weight), x.shape[1], share))
    return [x, weight, scales, zeros, bias, out, partial, arrivals, *numbers]


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Zeros between kernels, which must run one at a time: programs that share a tile count here who is done."""
    return torch.zeros(16 * num_sms(device), dtype=torch.int32, device=device)


@cache
def _kernel(device: torch.device, macros: tuple[tuple[str, object], ...]) -> Kernel:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cubin = compile_cubin(SOURCE, architecture, dict(macros))
    with torch.cuda.device(device):
        return Kernel(cubin, "w4a16", 32 * int(dict(macros)["WARPS"]), carveout=-1)
