"""Which tile of `kvtool.kernels.gemv` is the fastest for a model's matrices and few rows, beside the vendor's product.

    python scripts/bench_gemv.py --rows 1,2,4,8,16

Each figure is the mean of a CUDA graph that multiplies with one matrix after the other, 512 MiB of them, so that no
cache holds any. What a decoder layer does just before or behind is part of it: the norm ahead of qkv and gate_up, and
the activation. "apart" is the best tile with the norm in a kernel of its own. What differs from the vendor's product by
more than rounding does is not listed.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor

from kvtool.kernels.activation import silu_mul
from kvtool.kernels.gemv import Prologue, Tile, gemv, norm_gemv
from kvtool.kernels.norm import add_rms_norm
from kvtool.quantize.decode_speed import graph_seconds, read_bandwidth

# hidden_size, intermediate_size, elements of all query heads and of all key heads, vocab_size
MODELS = {
    "Qwen2.5-7B": (3584, 18944, 3584, 512, 152064),
    "Qwen2.5-1.5B": (1536, 8960, 1536, 256, 151936),
    "Qwen3-0.6B": (1024, 3072, 2048, 1024, 151936),
}
FOOTPRINT = 512 << 20
MAX_ERROR = 1e-2


@dataclass(frozen=True)
class Matrix:
    """Rows, the first half of which may be gates, columns, and whether a norm comes before."""

    outputs: int
    depth: int
    gated: bool = False
    normed: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    rows = [int(n) for n in args.rows.split(",")]
    matrices = {
        f"{model} {name}": matrix
        for model in args.models.split(",")
        for name, matrix in matrices_of(*MODELS[model]).items()
    }
    compile_all(matrices.values(), rows)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read {bandwidth / 1e12:.2f} TB/s")
    print(f"{'matrix':>20} {'N×K':>12} rows cuBLAS µs  ours µs ratio share apart µs  tile, and the next best")
    for name, matrix in matrices.items():
        nbytes = 2 * matrix.outputs * matrix.depth
        shape = (max(2, math.ceil(FOOTPRINT / nbytes)), matrix.outputs, matrix.depth)
        weights = torch.randn(shape, dtype=torch.bfloat16, device="cuda") / math.sqrt(matrix.depth)
        for n in rows:
            vendor, apart, best = timed(n, weights, matrix)
            seconds, tile = best[0]
            print(
                f"{name:>20} {f'{matrix.outputs}×{matrix.depth}':>12} {n:4} {vendor * 1e6:9.2f} {seconds * 1e6:8.2f} "
                f"{vendor / seconds:5.2f} {nbytes / bandwidth / seconds:5.0%} {apart * 1e6:8.2f}  {describe(tile)}   "
                + "  ".join(f"{describe(other)} {more * 1e6:.2f}" for more, other in best[1:4]),
                flush=True,
            )


def matrices_of(hidden: int, intermediate: int, q: int, kv: int, vocab: int) -> dict[str, Matrix]:
    return {
        "qkv": Matrix(q + 2 * kv, hidden, normed=True),
        "o": Matrix(hidden, q),
        "gate_up": Matrix(2 * intermediate, hidden, gated=True, normed=True),
        "down": Matrix(hidden, intermediate),
        "head": Matrix(vocab, hidden),
    }


def candidates(rows: int, gated: bool) -> Iterator[Tile]:
    if rows <= 8:
        for outputs, depth, warps, stages in product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (1, 2)):
            tile = Tile(outputs, depth, warps, stages)
            if fits(tile, rows, gated) and (rows > 1 or outputs * depth // warps >= 512):
                yield tile
    if 1 < rows <= 16:
        for outputs, depth, stages in product((16, 32, 64), (128, 256, 512), (3, 4, 6)):
            for warps in {max(1, outputs // 32), outputs // 16}:
                tile = Tile(outputs, depth, warps, stages, dot=True)
                if fits(tile, rows, gated) and outputs * depth * stages >= 12288:
                    yield tile
    if rows > 8:
        for outputs, depth, stages in product((64, 128), (64, 128), (3, 4, 5)):
            if fits(tile := Tile(outputs, depth, 4, stages, dot=True), rows, gated):
                yield tile


def fits(tile: Tile, rows: int, gated: bool) -> bool:
    """Whether sums stay in registers, or what is under way in shared memory."""
    if tile.dot:
        return tile.stages * tile.depth * (2 * tile.outputs * (1 + gated) + 2 * max(8, rows)) <= 99 << 10
    elements = tile.outputs * (1 + gated) * tile.depth // (32 * tile.warps)
    return elements >= 8 and elements * (rows + tile.stages) <= 136


def timed(rows: int, weights: Tensor, matrix: Matrix) -> tuple[float, float, list[tuple[float, Tile]]]:
    """Seconds of the vendor's product, of the best tile with the norm apart, and of each tile, the fastest first."""
    gated = matrix.gated
    x, residual = (torch.randn(rows, matrix.depth, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    prologue = Prologue(residual, torch.ones_like(x[0]), 1e-6)

    def normed(x: Tensor) -> Tensor:
        return add_rms_norm(x, residual, prologue.gain, prologue.eps)[0] if matrix.normed else x

    def vendor(weight: Tensor) -> Tensor:
        y = torch.nn.functional.linear(normed(x), weight)
        return silu_mul(y) if gated else y

    expected = torch.nn.functional.linear(x, weights[0])
    expected = (silu_mul(expected) if gated else expected).float()
    apart, results = math.inf, []
    for tile in candidates(rows, gated):

        def alone(weight: Tensor, tile: Tile = tile) -> Tensor:
            return gemv(normed(x), weight, None, tile, gated=gated)

        def together(weight: Tensor, tile: Tile = tile) -> Tensor:
            return norm_gemv(x, prologue, weight, None, tile, gated=gated)[0]

        error = float((gemv(x, weights[0], None, tile, gated=gated).float() - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            print(f"{describe(tile)} is wrong for {tuple(weights[0].shape)}, {rows} rows: error {error:.3g}")
            continue
        seconds = seconds_over(weights, alone)
        apart = min(apart, seconds)
        if matrix.normed and not tile.dot:
            seconds = seconds_over(weights, together)
        results.append((seconds, tile))
    return seconds_over(weights, vendor), apart, sorted(results, key=lambda result: result[0])


def seconds_over(weights: Tensor, run: Callable[[Tensor], Tensor]) -> float:
    """Mean seconds of `run` over all `weights`."""
    return graph_seconds(lambda index: run(weights[index]), range(len(weights)))


def compile_all(matrices: Iterable[Matrix], rows: list[int]) -> None:
    """Compile in parallel what will be timed; kernels stay in Triton's cache, where this process finds them."""
    jobs = {
        (tile, max(8, triton.next_power_of_2(n)) if tile.dot else n, matrix.gated, normed, is_even(tile, matrix))
        for matrix in matrices
        for n in rows
        for tile in candidates(n, matrix.gated)
        for normed in {False, matrix.normed and not tile.dot}
    }
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(compile_one, sorted(jobs, key=repr), chunksize=4)
    print(f"compiled {len(jobs)} kernels")


def is_even(tile: Tile, matrix: Matrix) -> bool:
    return matrix.depth % tile.depth == 0 and matrix.outputs // (1 + matrix.gated) % tile.outputs == 0


def compile_one(tile: Tile, rows: int, gated: bool, normed: bool, even: bool) -> None:
    depth = tile.depth * 2 if even else tile.depth * 2 + 16
    weight = torch.zeros(64 * tile.outputs, depth, dtype=torch.bfloat16, device="cuda")
    x = weight[:rows].contiguous()
    if normed:
        norm_gemv(x, Prologue(x, x[0], 1e-6), weight, None, tile, gated=gated)
    else:
        gemv(x, weight, None, tile, gated=gated)


def describe(tile: Tile) -> str:
    return f"{'dot' if tile.dot else 'fma'} {tile.outputs}×{tile.depth}/{tile.warps}/{tile.stages}"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
