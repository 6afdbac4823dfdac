"""What products with quantised weights take for a model's matrices, beside those in 16 bits; one JSON document.

    python scripts/bench_linear.py --rows 1,8,16,64,256,4096 > linear.json
    python scripts/bench_linear.py --sweep > tiles.json

Each figure is the mean of a CUDA graph that multiplies with one matrix after the other, 512 MiB of them, so that no
cache holds any; where activations are quantised, that is part of it. "share" is of the bytes per second that a plain
sum reads. --sweep times the tiles that each kernel could use, and lists the best. What differs from the definition by
more than rounding does is named and not listed.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product as pairs_of

import torch
import triton
from bench_gemv import MODELS, matrices_of
from torch import Tensor

from kvtool.kernels import w4a16, w4a16_gemv, w4a16_kernels, w8a8, w8a8_kernels
from kvtool.layers.linear import linear
from kvtool.quantize.decode_speed import graph_seconds, read_bandwidth

FOOTPRINT = 512 << 20
GROUP = 128
MAX_ERROR = 1e-2
BFLOAT = torch.bfloat16

Run = Callable[[Tensor, int], Tensor]  # x, index of the matrix


@dataclass(frozen=True)
class Weights:
    """As many matrices of one shape as fill `FOOTPRINT`, of one kind; `tensors` have a row for each."""

    kind: str
    outputs: int
    depth: int
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Of one matrix."""
        return sum(x[0].nbytes for x in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(x[index] for x in self.tensors)

    @classmethod
    def drawn(cls, kind: str, outputs: int, depth: int) -> "Weights":
        bits = {"bf16": 16, "w4a16": 4}.get(kind, 8)
        shape = (max(2, math.ceil(FOOTPRINT * 8 / (outputs * depth * bits))), outputs, depth)
        sigma = 1 / math.sqrt(depth)
        if kind == "bf16":
            return cls(kind, outputs, depth, (torch.randn(shape, dtype=BFLOAT, device="cuda") * sigma,))
        if kind == "w4a16":
            codes = torch.randint(256, (*shape[:2], depth // 2), dtype=torch.uint8, device="cuda")
            scales = (torch.rand(*shape[:2], depth // GROUP, device="cuda") + 0.5).to(BFLOAT) * sigma / 4
            return cls(kind, outputs, depth, (codes, scales, torch.full_like(scales, 7)))
        scales = torch.rand(shape[:2], device="cuda") + 0.5
        if kind == "w8a8":
            codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
            return cls(kind, outputs, depth, (codes, scales * sigma / 73))
        weights = torch.empty(shape, dtype=w8a8.FP8, device="cuda")
        for matrix in weights:
            matrix.copy_(torch.randn(shape[1:], device="cuda"))
        return cls(kind, outputs, depth, (weights, scales * sigma))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,16,64,256,4096")
    parser.add_argument("--kinds", default="bf16,w4a16,w8a8,fp8")
    parser.add_argument("--model", default="Qwen2.5-7B", choices=MODELS)
    parser.add_argument("--sweep", action="store_true", help="time all tiles")
    args = parser.parse_args()
    rows, kinds = [int(n) for n in args.rows.split(",")], args.kinds.split(",")
    if args.sweep:
        compile_all(kinds, rows)
    bandwidth = read_bandwidth()
    results = []
    for name, matrix in matrices_of(*MODELS[args.model]).items():
        if name == "head":
            continue
        baselines: dict[int, float] = {}
        for kind in kinds:
            weights = Weights.drawn(kind, matrix.outputs, matrix.depth)
            for n in rows:
                timed = time_all(weights, n, args.sweep)
                if not timed:
                    continue
                (best, label), *others = timed
                if kind == "bf16":
                    baselines[n] = best
                figures = {
                    "matrix": name,
                    "outputs": matrix.outputs,
                    "depth": matrix.depth,
                    "kind": kind,
                    "rows": n,
                    "us": round(best * 1e6, 2),
                    "share": round(weights.nbytes / best / bandwidth, 3),
                    "tflops": round(2 * n * matrix.outputs * matrix.depth / best / 1e12, 1),
                    "of_bf16": round(best / baselines[n], 3) if n in baselines else None,
                    "by": label,
                    "others": {other: round(seconds * 1e6, 2) for seconds, other in others},
                }
                results.append(figures)
                shown = dict(list(figures["others"].items())[:6])
                print(*list(figures.values())[:-1], shown, file=sys.stderr, flush=True)
            del weights
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth": bandwidth,
    }
    document = {"schema": "kvtool.bench-linear/1", "environment": environment, "config": vars(args), "rows": results}
    json.dump(document, sys.stdout)


def time_all(weights: Weights, rows: int, sweep: bool) -> list[tuple[float, str]]:
    """Seconds and what was run, the fastest first."""
    x = torch.randn(rows, weights.depth, dtype=BFLOAT, device="cuda")
    expected = definition(x, weights)
    results = []
    for label, run in runs_of(weights, rows, sweep):
        try:
            out = run(x, 0)
            error = float((out.float() - expected).norm() / expected.norm()) if out.dtype == BFLOAT else 0.0
            if not error < MAX_ERROR:
                print(f"{label} is wrong for {weights.kind}, {rows} rows: error {error:.3g}", file=sys.stderr)
                continue
            count = len(weights) if rows <= 512 else 2  # of many rows no cache holds the activations
            results.append((graph_seconds(lambda index, run=run: run(x, index), range(count)), label))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as refusal:
            print(f"{label} does not run: {str(refusal).splitlines()[0]}", file=sys.stderr)
    return sorted(results)


def definition(x: Tensor, weights: Weights) -> Tensor:
    """The product with the first matrix, in fp32."""
    matrix = weights[0]
    if weights.kind == "bf16":
        return x.float() @ matrix[0].float().t()
    if weights.kind == "w4a16":
        return w4a16.w4a16_reference(x.float(), *matrix, None)
    return (w8a8.w8a8_reference if weights.kind == "w8a8" else w8a8.fp8_reference)(x.float(), *matrix, None)


def runs_of(weights: Weights, rows: int, sweep: bool) -> Iterator[tuple[str, Run]]:
    """What computes the product: what the layer would call, and with `sweep` all that it could."""
    kind = weights.kind
    layer = {"bf16": linear, "w4a16": w4a16.w4a16_linear, "w8a8": w8a8.w8a8_linear, "fp8": w8a8.fp8_linear}[kind]
    yield "as tabled", lambda x, index: layer(x, *weights[index])
    if kind == "bf16":
        yield "cuBLAS", lambda x, index: torch.nn.functional.linear(x, *weights[index])
    elif sweep and kind == "w4a16":
        for gemv in gemv_tiles(rows):
            yield (
                f"gemv {tuple(asdict(gemv).values())}",
                (lambda x, index, tile=gemv: w4a16_gemv.gemv(x, *weights[index], None, tile)),
            )
        for tile in w4a16_tiles(rows):
            yield (
                f"product {tuple(asdict(tile).values())}",
                (lambda x, index, tile=tile: w4a16_kernels.product(x, *weights[index], None, tile)),
            )
        if rows >= 64:
            yield "decoded", lambda x, index: w4a16_kernels.decoded_product(x, *weights[index], None)
    elif sweep:
        dtype = weights.tensors[0].dtype
        for tile in w8a8_tiles(rows):
            yield (
                f"product {tuple(asdict(tile).values())}",
                (
                    lambda x, index, tile=tile: w8a8_kernels.product(
                        *w8a8_kernels.quantized(x, dtype), *weights[index], None, tile, x.dtype
                    )
                ),
            )
        if kind == "fp8":
            yield (
                "vendor",
                (
                    lambda x, index: w8a8_kernels.scaled_product(
                        *w8a8_kernels.quantized(x, dtype), *weights[index], None
                    )
                ),
            )
        elif rows > 16:
            yield (
                "vendor, sums unscaled",
                (lambda x, index: torch._int_mm(w8a8_kernels.quantized(x, dtype)[0], weights[index][0].t())),
            )


def gemv_tiles(rows: int) -> Iterator[w4a16_gemv.Tile]:
    """Up to 128 registers of a thread, or 80 where that may do."""
    if rows > w4a16_gemv.MAX_ROWS:
        return
    for tiles, warps, stages in pairs_of((1, 2, 4), (2, 4, 8, 16), (1, 2, 3, 4)):
        for resident in (16, 24) if tiles == 1 and rows <= 8 else (8, 16) if tiles < 4 else (8,):
            if tiles * stages in (2, 3, 4, 6, 8) and resident >= warps:
                yield w4a16_gemv.Tile(tiles, warps, stages, resident // warps)


def w4a16_tiles(rows: int) -> Iterator[w4a16_kernels.Tile]:
    tile = w4a16_kernels.Tile
    if rows <= 16:
        width = max(8, triton.next_power_of_2(rows))
        yield from (tile(16, width, 128, 1, 4), tile(32, width, 128, 2, 4))
    elif rows <= 32:
        for outputs, warps, stages in ((32, 2, 4), (64, 2, 3), (64, 4, 4), (16, 1, 4)):
            yield tile(outputs, 32, 128, warps, stages)
    elif rows <= 1024:
        for outputs, width, depth, warps, stages in (
            (32, 64, 128, 2, 3),
            (64, 64, 64, 2, 3),
            (64, 64, 64, 4, 4),
            (64, 64, 128, 4, 3),
            (128, 64, 64, 4, 4),
            (128, 64, 128, 8, 3),
            (64, 128, 64, 4, 4),
            (128, 128, 64, 8, 4),
            (128, 128, 128, 8, 3),
            (128, 256, 64, 8, 3),
        ):
            if width <= triton.next_power_of_2(rows):
                yield tile(outputs, width, depth, warps, stages)


def w8a8_tiles(rows: int) -> Iterator[w8a8_kernels.Tile]:
    width = min(256, max(8, triton.next_power_of_2(rows)))
    shapes: Iterable[tuple[int, int, int, int, int]]
    if width <= 16:
        shapes = [
            (16, width, depth, 1, stages) for depth, stages in ((256, 4), (256, 6), (512, 3), (512, 4), (1024, 2))
        ]
        shapes += [(32, width, 256, warps, 4) for warps in (1, 2)]
        shapes += [(64, width, 128, 4, stages) for stages in (4, 6)] + [(64, width, 256, 4, 4)]
    elif width <= 32:
        shapes = ((16, 32, 256, 1, 4), (32, 32, 256, 2, 4), (64, 32, 128, 4, 5), (64, 32, 256, 4, 4))
    elif width <= 64:
        shapes = (
            (32, 64, 256, 2, 3),
            (64, 64, 128, 4, 3),
            (64, 64, 128, 4, 5),
            (64, 64, 256, 4, 4),
            (128, 64, 128, 4, 4),
        )
        shapes += ((128, 64, 128, 8, 5),)
    else:
        shapes = ((64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 4))
        shapes += ((128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4)) if width == 256 else ()
    yield from (w8a8_kernels.Tile(*shape) for shape in shapes)


def compile_all(kinds: list[str], rows: list[int]) -> None:
    """Compile in parallel what will be timed: Triton's kernels to its cache, in processes, NVRTC's in threads."""
    jobs = {
        (kind, tile, min(n, 2 * tile.rows))
        for kind in kinds
        for n in rows
        for tile in {"bf16": (), "w4a16": w4a16_tiles(n)}.get(kind, w8a8_tiles(n))
    }
    gemvs = {(tile, 8 * triton.cdiv(n, 8)) for n in rows for tile in gemv_tiles(n)} if "w4a16" in kinds else set()
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool, ThreadPoolExecutor(workers) as threads:
        done = pool.starmap_async(compile_one, sorted(jobs, key=repr), chunksize=1)
        list(threads.map(compile_gemv, gemvs))
        done.get()
    print(f"compiled {len(jobs)} kernels in Triton and {len(gemvs)} in CUDA C++", file=sys.stderr)


def compile_gemv(job: tuple[w4a16_gemv.Tile, int]) -> None:
    tile, rows = job
    x, scales = torch.empty(rows, GROUP, dtype=BFLOAT, device="cuda"), torch.empty(1, 1, dtype=BFLOAT, device="cuda")
    w4a16_gemv._kernel(x.device, tuple(w4a16_gemv.constants(x, scales, tile, x.device).items()))


def compile_one(kind: str, tile: w4a16_kernels.Tile | w8a8_kernels.Tile, rows: int) -> None:
    outputs, depth = 2 * tile.outputs, 2048
    x = torch.zeros(rows, depth, dtype=BFLOAT, device="cuda")
    for prefetched in (0, 1 << 30):
        w4a16_kernels.PREFETCHED = w8a8_kernels.PREFETCHED = prefetched
        try:
            if isinstance(tile, w4a16_kernels.Tile):
                weight = torch.zeros(outputs, depth // 2, dtype=torch.uint8, device="cuda")
                scales = torch.zeros(outputs, depth // GROUP, dtype=BFLOAT, device="cuda")
                w4a16_kernels.product(x, weight, scales, scales, None, tile)
            else:
                codes = torch.zeros(rows, depth, dtype=torch.int8, device="cuda")
                weight, scales = torch.zeros(outputs, depth, dtype=torch.int8, device="cuda"), x[:, 0].float()
                if kind == "fp8":
                    codes, weight = codes.to(w8a8.FP8), weight.to(w8a8.FP8)
                w8a8_kernels.product(codes, scales, weight, torch.zeros(outputs, device="cuda"), None, tile, BFLOAT)
        except triton.runtime.errors.OutOfResources:
            return


if __name__ == "__main__":
    with torch.inference_mode():
        main()
