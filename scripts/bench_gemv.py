"""Which tile of `kvtool.kernels.gemv` is the fastest for a model's matrices and few rows, beside the vendor's product.

    python scripts/bench_gemv.py --rows 1,2,4,8,16

Each figure is the mean of a CUDA graph that multiplies with one matrix after the other, 512 MiB of them, so that no
cache holds any. What differs from the vendor's product by more than rounding does is not listed.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from kvtool.kernels.activation import silu_mul
from kvtool.kernels.gemv import Tile, gemv

# hidden_size, intermediate_size, elements of all query heads and of all key heads, vocab_size
MODELS = {
    "Qwen2.5-7B": (3584, 18944, 3584, 512, 152064),
    "Qwen2.5-1.5B": (1536, 8960, 1536, 256, 151936),
    "Qwen3-0.6B": (1024, 3072, 2048, 1024, 151936),
}
FOOTPRINT = 512 << 20
REPEATS = 10
MAX_ERROR = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    rows = [int(n) for n in args.rows.split(",")]
    matrices = {
        f"{model} {name}": shape for model in args.models.split(",") for name, shape in shapes(*MODELS[model]).items()
    }
    compile_all(matrices.values(), rows)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read {bandwidth / 1e12:.2f} TB/s")
    print(f"{'matrix':>22} {'N×K':>13} {'rows':>4} {'cuBLAS µs':>9} {'ours µs':>8} {'ratio':>5} {'share':>5}  tile")
    for name, (outputs, depth, gated) in matrices.items():
        count = max(2, math.ceil(FOOTPRINT / (2 * outputs * depth)))
        weights = torch.randn(count, outputs, depth, dtype=torch.bfloat16, device="cuda") / math.sqrt(depth)
        floor = 2 * outputs * depth / bandwidth
        for n in rows:
            x = torch.randn(n, depth, dtype=torch.bfloat16, device="cuda")
            vendor, best = timed(x, weights, gated)
            seconds, tile = best[0]
            print(
                f"{name:>22} {f'{outputs}×{depth}':>13} {n:4} {vendor * 1e6:9.2f} {seconds * 1e6:8.2f} "
                f"{vendor / seconds:5.2f} {floor / seconds:5.0%}  {describe(tile)}   "
                + "  ".join(f"{describe(other)} {more * 1e6:.2f}" for more, other in best[1:4]),
                flush=True,
            )


def shapes(hidden: int, intermediate: int, q: int, kv: int, vocab: int) -> dict[str, tuple[int, int, bool]]:
    """Rows and columns of a model's matrices, and whether the first half of the rows are gates."""
    return {
        "qkv": (q + 2 * kv, hidden, False),
        "o": (hidden, q, False),
        "gate_up": (2 * intermediate, hidden, True),
        "down": (hidden, intermediate, False),
        "head": (vocab, hidden, False),
    }


def candidates(rows: int, gated: bool) -> Iterator[Tile]:
    if rows <= 8:
        for outputs, depth, warps in product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8)):
            tile = Tile(outputs, depth, warps)
            if tile.fits(rows, gated):
                yield tile
    if rows > 1:
        for outputs, depth, stages in product((16, 32, 64), (64, 128, 256, 512), (3, 4, 6)):
            for warps in {max(1, outputs // 32), outputs // 16}:
                tile = Tile(outputs, depth, warps, stages, dot=True)
                if tile.fits(rows, gated) and outputs * depth * stages >= 8192:
                    yield tile


def timed(x: Tensor, weights: Tensor, gated: bool) -> tuple[float, list[tuple[float, Tile]]]:
    """Seconds of the vendor's product, and of each tile that computes the same, the fastest first."""

    def vendor(weight: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight)
        return silu_mul(y) if gated else y

    expected, results = vendor(weights[0]).float(), []
    for tile in candidates(len(x), gated):

        def ours(weight: Tensor, tile: Tile = tile) -> Tensor:
            return gemv(x, weight, None, tile, gated=gated)

        error = float((ours(weights[0]).float() - expected).norm() / expected.norm())
        if error < MAX_ERROR:
            results.append((graph_seconds(ours, weights), tile))
        else:
            print(f"{describe(tile)} is wrong for {tuple(weights[0].shape)}, {len(x)} rows: error {error:.3g}")
    return graph_seconds(vendor, weights), sorted(results, key=lambda result: result[0])


def graph_seconds(run: Callable[[Tensor], Tensor], weights: Tensor) -> float:
    """Mean seconds of `run` over all `weights`, from a CUDA graph of all."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    return replay_seconds(graph.replay) / len(weights)


def replay_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def read_bandwidth() -> float:
    """Bytes per second of a plain sum."""
    x = torch.ones(1 << 30, device="cuda")
    return x.nbytes / replay_seconds(x.sum)


def compile_all(matrices: Iterable[tuple[int, int, bool]], rows: list[int]) -> None:
    """Compile in parallel what will be timed; kernels stay in Triton's cache, where this process finds them."""
    jobs = {
        (tile, n, gated, depth % tile.depth == 0 and outputs // (1 + gated) % tile.outputs == 0)
        for outputs, depth, gated in matrices
        for n in rows
        for tile in candidates(n, gated)
    }
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(compile_one, sorted(jobs, key=repr), chunksize=4)
    print(f"compiled {len(jobs)} kernels")


def compile_one(tile: Tile, rows: int, gated: bool, even: bool) -> None:
    depth = tile.depth * 2 if even else tile.depth * 2 + 16
    weight = torch.zeros(64 * tile.outputs, depth, dtype=torch.bfloat16, device="cuda")
    gemv(weight[:rows].contiguous(), weight, None, tile, gated=gated)


def describe(tile: Tile) -> str:
    stages = f"/{tile.stages}" if tile.dot else ""
    return f"{'dot' if tile.dot else 'fma'} {tile.outputs}×{tile.depth}/{tile.warps}{stages}"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
