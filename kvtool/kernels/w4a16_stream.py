"""What `kvtool.kernels.w4a16` defines, in CUDA C++ for more rows than `w4a16_gemv` takes.

The kernel, `w4a16_stream.cu`, is compiled when it is first called for a shape of its work. A product is cut into tiles,
and a tile into steps of columns. Each program takes as many steps as the others, one tile's after the other's, whatever
the shape ("stream-K", arXiv 2301.03598): no multiprocessor waits for others with their last tile.
"""

import ctypes
from dataclasses import dataclass, replace
from functools import cache, partial
from math import gcd

import torch
from torch import Tensor

from kvtool.kernels.launch import capability, num_sms, shared_kib
from kvtool.kernels.nvrtc import load, source

SOURCE = source("w4a16.cuh", "w4a16_stream.cu")
_kernel = partial(load, SOURCE, "w4a16", carveout=-1)

STEP = 128  # columns
FETCHING = 4  # warps of a program, beside those that multiply
OUTPUTS = 8  # of which it takes multiples
WHOLE = 9 / 8  # of an even share, up to which it rather is of whole tiles, which nobody need add up
WARPGROUPS = (9, 0)  # the compute capability that has products of four warps with what lies in shared memory


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tiles: of 16 outputs each, that a warp multiplies.
        columns: of 8 rows of x each, that it multiplies them with.
        warps: of a program, that multiply.
        stages: steps that a program holds at most, some of them under way; up to seven, as there are 15 barriers.
        per_sm: programs that run at once on a multiprocessor.
    """

    tiles: int
    columns: int
    warps: int
    stages: int
    per_sm: int

    @property
    def outputs(self) -> int:
        return 16 * self.tiles * self.warps

    @property
    def rows(self) -> int:
        return 8 * self.columns

    def stage_bytes(self, group: int) -> int:
        """Of a program, in groups of so many columns, as the kernel has it."""
        grids = STEP // gcd(group, STEP)
        return -(-(self.rows * STEP * 2 + self.outputs * (STEP // 2 + 4 * grids)) // 1024) * 1024

    def fitted(self, group: int, shared_kib: int) -> "Tile":
        """With as many stages as there is room for."""
        room = ((shared_kib << 10) // self.per_sm - 1024) // self.stage_bytes(group)
        return replace(self, stages=min(self.stages, room))


# Weights of a matrix, from which on it fills an H200 with wide tiles, few of which several programs share.
LARGE = 32 << 20

# By whether four warps multiply together, and rows up to which entries are for: the first of which a matrix has at
# least so many weights. Those of True are the best found on an H200, for Qwen2.5-7B's matrices; those of False are for
# an RTX 4090, on which none was timed.
TILES: dict[tuple[bool, int], tuple[tuple[int, Tile], ...]] = {
    (False, 32): ((0, Tile(2, 4, 8, 4, 1)),),
    (False, 128): ((3 * LARGE, Tile(2, 8, 8, 3, 1)), (0, Tile(1, 8, 8, 4, 1))),
    (True, 32): ((3 * LARGE, Tile(2, 4, 4, 4, 3)), (LARGE, Tile(2, 4, 4, 6, 2)), (0, Tile(1, 4, 4, 7, 2))),
    (True, 64): ((3 * LARGE, Tile(1, 8, 20, 5, 1)), (LARGE, Tile(1, 8, 8, 7, 1)), (0, Tile(1, 8, 4, 5, 2))),
    (True, 128): ((LARGE, Tile(1, 16, 12, 5, 1)), (0, Tile(1, 16, 4, 3, 2))),
    (True, 1024): ((LARGE, Tile(1, 32, 8, 3, 1)), (0, Tile(1, 16, 12, 5, 1))),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """The tile for `product`."""
    together, weights = multiplies_together(x.device), 2 * weight.numel()
    entries = next(entries for (of, rows), entries in TILES.items() if of == together and len(x) <= rows)
    return next(tile for least, tile in entries if weights >= least)


@cache
def multiplies_together(device: torch.device) -> bool:
    """Whether four warps do, on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == WARPGROUPS


def product(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`w4a16.w4a16_linear`, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [M, K] of 16 bits; the rest as there, of a multiple of `OUTPUTS`, in groups of multiples of 32 columns.
            Scales of fp16 are below 128.
    """
    out, chain = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device), capability(x.device) >= 9
    tile = tile.fitted(x.shape[1] // scales.shape[1], shared_kib(x.device))
    together = multiplies_together(x.device)
    macros = constants(x, scales, tile, together, chain)
    kernel = _kernel(x.device, tuple(macros.items()), features="a" * together)
    programs, share = grid(x, weight, tile, tile.per_sm * num_sms(x.device))
    partial = torch.empty(programs, 2, tile.outputs * tile.rows, dtype=torch.float32, device=x.device)
    values = arguments(x, weight, scales, zeros, bias, out, partial, _arrivals(x.device), share)
    kernel((programs, 1), values, chained=chain)
    return out


def grid(x: Tensor, weight: Tensor, tile: Tile, most: int) -> tuple[int, int]:
    """Programs, of which at most so many run at once, and steps of each."""
    of_tile = -(-x.shape[1] // STEP)
    steps = -(-len(weight) // tile.outputs) * -(-len(x) // tile.rows) * of_tile
    share = -(-steps // most)
    whole = -(-share // of_tile) * of_tile
    if whole <= WHOLE * share:
        share = whole
    return -(-steps // share), share


def constants(x: Tensor, scales: Tensor, tile: Tile, together: bool, chain: bool) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    return {
        "TILES": tile.tiles,
        "COLUMNS": tile.columns,
        "GROUP": x.shape[1] // scales.shape[1],
        "BF16": int(x.dtype == torch.bfloat16),
        "WARPS": tile.warps + FETCHING,
        "FETCHING": FETCHING,
        "STAGES": tile.stages,
        "PER_SM": tile.per_sm,
        "TOGETHER": int(together),
        "CHAINED": int(chain),
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
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales.t(), zeros.t())) and len(weight) % OUTPUTS == 0
    numbers = map(ctypes.c_int, (len(x), len(weight), x.shape[1], share))
    return [x, weight, scales, zeros, bias, out, partial, arrivals, *numbers]


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Zeros between kernels, which must run one at a time: programs that share a tile count here who is done."""
    return torch.zeros(16 * num_sms(device), dtype=torch.int32, device=device)
