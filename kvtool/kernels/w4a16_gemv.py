"""What `kvtool.kernels.w4a16` defines for a few rows, in CUDA C++: bound by the rate at which weights are read.

The kernel, `w4a16_gemv.cu`, is compiled when it is first called for a shape of its work. Programs that all run at once
have even shares of the outputs, and a program's warps even shares of what must be read for those, each without a pause.
"""

import ctypes
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch
from torch import Tensor

from kvtool.kernels.launch import capability, num_sms, power_of_2, shared_kib
from kvtool.kernels.nvrtc import load, source

SOURCE = source("w4a16.cuh", "w4a16_gemv.cu")
_kernel = partial(load, SOURCE, "w4a16_gemv", carveout=-1)

OUTPUTS = 2  # of which it takes multiples
MAX_ROWS = 8  # of a product on the tensor cores; more rows are for `w4a16_stream`


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tiles: of 16 outputs each, that a warp multiplies at once: 1 or 2.
        warps: of a program.
        stages: chunks of columns of each warp that are under way at once.
        per_sm: programs that there is room for on a multiprocessor.
        programs: that each multiprocessor has.
    """

    tiles: int
    warps: int
    stages: int
    per_sm: int
    programs: int = 1


@dataclass(frozen=True)
class Share:
    """What a program has of the outputs.

    Attributes:
        tiles: each of 16 `Tile.tiles` outputs.
        lines: of 16 outputs, how many are used: an even number.
        programs: that have all outputs.
    """

    tiles: int
    lines: int
    programs: int


# By compute capability: the first entry of which a matrix has at least so many outputs. Those of an H200 (9) are
# the best of three that were timed with Qwen2.5-7B's matrices and 1 and 8 rows; that of 8 is not timed.
TILES: dict[int, tuple[tuple[int, Tile], ...]] = {
    8: ((0, Tile(1, 8, 3, 2)),),
    9: ((16384, Tile(2, 16, 2, 1)), (4096, Tile(2, 8, 3, 2, 2)), (0, Tile(2, 16, 2, 1))),
}


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """The tile for `gemv`."""
    return next(tile for least, tile in TILES[capability(x.device)] if len(weight) >= least)


def gemv(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`w4a16.w4a16_linear`, summed in fp32.

    On sm_90 the matrix is read while earlier kernels of the stream still run: none of them may be writing it.

    Args:
        x: [M, K], M at most `MAX_ROWS`, of 16 bits; the rest as there, of a multiple of `OUTPUTS`, in groups of
            multiples of 32 columns.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    share = share_for(x, weight, scales, tile, x.device)
    kernel = _kernel(x.device, tuple(constants(x, scales, tile, x.device).items()))
    values, shared = arguments(x, weight, scales, zeros, bias, out, share), shared_bytes(x, scales, tile, share)
    kernel((share.programs, 1), values, chained=capability(x.device) >= 9, shared=shared)
    return out


def share_for(x: Tensor, weight: Tensor, scales: Tensor, tile: Tile, device: torch.device) -> Share:
    """An even one for as many programs as run at once, or a few times as many if there is no room for its sums."""
    at_once = tile.programs * num_sms(device)
    shares = (share_of(len(weight), tile, most) for most in range(at_once, at_once + len(weight), at_once))
    return next(share for share in shares if shared_bytes(x, scales, tile, share) <= room(tile, device))


def share_of(outputs: int, tile: Tile, most: int) -> Share:
    """An even one for each of `most` programs at most."""
    share = -(-outputs // most)
    tiles = -(-share // (16 * tile.tiles))
    lines = -(-share // (2 * tiles * tile.tiles)) * 2
    return Share(tiles, lines, -(-outputs // (tiles * tile.tiles * lines)))


def room(tile: Tile, device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    return (shared_kib(device) // tile.per_sm - 1) << 10


def constants(x: Tensor, scales: Tensor, tile: Tile, device: torch.device) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    return {
        "TILES": tile.tiles,
        "ROWS": power_of_2(len(x)),
        "GROUP": x.shape[1] // scales.shape[1],
        "BF16": int(x.dtype == torch.bfloat16),
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "PER_SM": tile.per_sm,
        "ROOM": room(tile, device),
        "CHAINED": int(capability(device) >= 9),
    }


def shared_bytes(x: Tensor, scales: Tensor, tile: Tile, share: Share) -> int:
    """Of a program, as the kernel has it: the rings, and where warps meet."""
    chunk = gcd(x.shape[1] // scales.shape[1], 128)
    stage = tile.tiles * (8 * chunk + 64) + power_of_2(len(x)) * chunk * 2
    meeting = (tile.warps + share.tiles - 1) * len(x) * (16 * tile.tiles + 4) * 4
    return tile.warps * tile.stages * stage + meeting


def arguments(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor, share: Share
) -> list[object]:
    """What the kernel takes, in its order."""
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales.t(), zeros.t())) and len(weight) % OUTPUTS == 0
    numbers = map(ctypes.c_int, (len(x), len(weight), x.shape[1], share.tiles, share.lines))
    return [x, weight, scales, zeros, bias, out, *numbers]
