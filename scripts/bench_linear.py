"""What products with quantised weights take for a model's matrices, beside those in 16 bits.

    python scripts/bench_linear.py --rows 1,8,16,64,256,4096 --output linear.json
    python scripts/bench_linear.py --kinds w4a16 --rows 1,8,16,32,64 --sweep --output tiles.json

Each figure is the mean of a CUDA graph that multiplies with one matrix after the other, 512 MiB of them, so that no
cache holds any. Activations of 8 bits are there as such, as norms and gated products hand them out. "share" is of the
bytes per second that a plain sum reads, "error" what was there before that: against the definition in fp32. What errs
by more than rounding does is named and not listed. The best is printed as soon as it is known, and FILE, one JSON
document, is written anew with it.
--sweep times all the tiles that each kernel could use.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product as pairs_of
from pathlib import Path
from typing import Any

import torch
import triton
from bench_gemv import MODELS, Matrix, matrices_of
from torch import Tensor

from kvtool.kernels import w4a16, w4a16_gemv, w4a16_kernels, w4a16_stream, w8a8, w8a8_kernels
from kvtool.kernels.launch import shared_kib
from kvtool.kernels.quantized_rows import FP8, QuantizedRows
from kvtool.layers.linear import linear
from kvtool.quantize.decode_speed import graph_seconds, read_bandwidth

FOOTPRINT = 512 << 20
GROUP = 128
MAX_ERROR = {"bf16": 1e-2, "w4a16": 1e-2, "w8a8": 1e-2, "fp8": 2e-2}
BFLOAT, DEVICE = torch.bfloat16, torch.device("cuda")
REFUSALS = (RuntimeError, triton.runtime.errors.OutOfResources)
IN_REGISTERS: dict[type, Callable[..., Tensor]] = {
    w4a16_gemv.Tile: w4a16_gemv.gemv,
    w4a16_stream.Tile: w4a16_stream.product,
}

Run = Callable[[Any, int], Tensor]  # x, as the matrices read it, and the index of one


@dataclass(frozen=True)
class Weights:
    """Matrices of one shape and kind; `tensors` have a row for each."""

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
    def drawn(cls, kind: str, outputs: int, depth: int, nbytes: int) -> "Weights":
        """As many as fill `nbytes`, and two at least."""
        bits = {"bf16": 16, "w4a16": 4}.get(kind, 8)
        shape = (max(2, math.ceil(nbytes * 8 / (outputs * depth * bits))), outputs, depth)
        sigma = 1 / math.sqrt(depth)
        if kind == "bf16":
            return cls(kind, outputs, depth, (torch.randn(shape, dtype=BFLOAT, device=DEVICE) * sigma,))
        if kind == "w4a16":
            codes = torch.randint(256, (*shape[:2], depth // 2), dtype=torch.uint8, device=DEVICE)
            scales = (torch.rand(*shape[:2], depth // GROUP, device=DEVICE) + 0.5).to(BFLOAT) * sigma / 4
            grids = (scales, torch.full_like(scales, 7))
            return cls(kind, outputs, depth, (codes, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in grids)))
        scales = torch.rand(shape[:2], device=DEVICE) + 0.5
        if kind == "w8a8":
            codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
            return cls(kind, outputs, depth, (codes, scales * sigma / 73))
        weights = torch.empty(shape, dtype=FP8, device=DEVICE)
        for matrix in weights:
            matrix.copy_(torch.randn(shape[1:], device=DEVICE))
        return cls(kind, outputs, depth, (weights, scales * sigma))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,16,64,256,4096")
    parser.add_argument("--kinds", default=",".join(MAX_ERROR))
    parser.add_argument("--model", default="Qwen2.5-7B", choices=MODELS)
    parser.add_argument("--sweep", action="store_true", help="time all tiles")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows, kinds = [int(n) for n in args.rows.split(",")], args.kinds.split(",")
    matrices = {name: matrix for name, matrix in matrices_of(*MODELS[args.model]).items() if name != "head"}
    compile_all(kinds, matrices.values(), rows, args.sweep)
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth": read_bandwidth(),
    }
    document = {
        "schema": "kvtool.bench-linear/1",
        "environment": environment,
        "config": vars(args) | {"output": str(args.output)},
        "rows": [],
    }
    print(f"{environment['gpu']}, read {environment['bandwidth'] / 1e12:.2f} TB/s")
    print(f"{'matrix':>8} {'kind':>6} rows {'µs':>8} share TFLOP/s × bf16   error  by, and the next best")
    for figures in measured(kinds, matrices, rows, args.sweep, environment["bandwidth"]):
        document["rows"].append(figures)
        show(figures)
        if args.output:
            unfinished = args.output.with_suffix(".part")
            unfinished.write_text(json.dumps(document))
            unfinished.replace(args.output)


def measured(
    kinds: list[str], matrices: dict[str, Matrix], rows: list[int], sweep: bool, bandwidth: float
) -> Iterator[dict[str, object]]:
    for name, matrix in matrices.items():
        baselines: dict[int, float] = {}
        for kind in kinds:
            weights = Weights.drawn(kind, matrix.outputs, matrix.depth, FOOTPRINT)
            for n in rows:
                timed = time_all(weights, n, sweep)
                if not timed:
                    continue
                (seconds, error, label), *others = timed
                if kind == "bf16":
                    baselines[n] = seconds
                yield {
                    "matrix": name,
                    "outputs": matrix.outputs,
                    "depth": matrix.depth,
                    "kind": kind,
                    "rows": n,
                    "us": round(seconds * 1e6, 2),
                    "share": round(weights.nbytes / seconds / bandwidth, 3),
                    "tflops": round(2 * n * matrix.outputs * matrix.depth / seconds / 1e12, 1),
                    "of_bf16": round(seconds / baselines[n], 3) if n in baselines else None,
                    "error": error,
                    "by": label,
                    "others": {other: round(more * 1e6, 2) for more, _, other in others},
                }


def show(figures: dict[str, object]) -> None:
    of_bf16 = "" if figures["of_bf16"] is None else f"{figures['of_bf16']:.3f}"
    print(
        f"{figures['matrix']:>8} {figures['kind']:>6} {figures['rows']:4} {figures['us']:8.2f} {figures['share']:5.0%} "
        f"{figures['tflops']:7.1f} {of_bf16:>6} {figures['error']:7.1e}  {figures['by']}   "
        + "  ".join(f"{other} {us:.2f}" for other, us in list(figures["others"].items())[:4]),
        flush=True,
    )


def time_all(weights: Weights, rows: int, sweep: bool) -> list[tuple[float, float, str]]:
    """Seconds, error and what was run, the fastest first."""
    x = torch.randn(rows, weights.depth, dtype=BFLOAT, device=DEVICE)
    expected, read = definition(x, weights), as_read(x, weights)
    results = []
    for label, run in runs_of(weights, rows, sweep):
        try:
            out = run(read, 0)
            error = float((out.float() - expected).norm() / expected.norm())
            if not error < MAX_ERROR[weights.kind]:
                print(f"{label} is wrong for {weights.kind}, {rows} rows: error {error:.3g}", file=sys.stderr)
                continue
            count = len(weights) if rows <= 512 else 2  # of many rows no cache holds the activations
            seconds = graph_seconds(lambda index, run=run: run(read, index), range(count))
            results.append((seconds, error, label))
        except REFUSALS as refusal:
            print(f"{label} does not run: {str(refusal).splitlines()[0]}", file=sys.stderr)
    return sorted(results)


def definition(x: Tensor, weights: Weights) -> Tensor:
    """The product with the first matrix, in fp32."""
    matrix = weights[0]
    if weights.kind == "bf16":
        return x.float() @ matrix[0].float().t()
    if weights.kind == "w4a16":
        return w4a16.w4a16_reference(x.float(), *matrix, None)
    return w8a8.w8a8_reference(x.float(), *matrix, None)


def as_read(x: Tensor, weights: Weights) -> Tensor | QuantizedRows:
    """What the product multiplies."""
    return w8a8_kernels.quantized(x, weights.tensors[0].dtype) if weights.kind in ("w8a8", "fp8") else x


def runs_of(weights: Weights, rows: int, sweep: bool) -> Iterator[tuple[str, Run]]:
    """What computes the product: what the layer would call, and with `sweep` all that it could."""
    kind = weights.kind
    layer = {"bf16": linear, "w4a16": w4a16.w4a16_linear, "w8a8": w8a8.w8a8_linear, "fp8": w8a8.w8a8_linear}[kind]
    yield "as tabled", lambda x, index: layer(x, *weights[index])
    if kind == "bf16":
        yield "cuBLAS", lambda x, index: torch.nn.functional.linear(x, *weights[index])
    elif sweep and kind == "w4a16":
        for tile in w4a16_tiles(rows):
            product = IN_REGISTERS[type(tile)]
            yield (
                f"{product.__name__} {tuple(asdict(tile).values())}",
                (lambda x, index, product=product, tile=tile: product(x, *weights[index], None, tile)),
            )
        if rows >= 64:
            yield "decoded", lambda x, index: w4a16_kernels.decoded_product(x, *weights[index], None)
    elif sweep:
        for tile in w8a8_tiles(rows):
            yield (
                f"product {tuple(asdict(tile).values())}",
                (lambda x, index, tile=tile: w8a8_kernels.product(x, *weights[index], None, tile)),
            )
        if rows > 16 and w8a8_kernels.vendor_takes(BFLOAT, weights[0][0]):
            yield "vendor", lambda x, index: w8a8_kernels.vendor_product(x, *weights[index], None)


def w4a16_tiles(rows: int) -> Iterator[w4a16_gemv.Tile | w4a16_stream.Tile]:
    if rows <= w4a16_gemv.MAX_ROWS:
        yield from gemv_tiles(rows)
    yield from stream_tiles(rows)


def gemv_tiles(rows: int) -> Iterator[w4a16_gemv.Tile]:
    """Of up to 128 registers of a thread, or 80 where that may do."""
    for tiles, warps, stages in pairs_of((1, 2, 4), (2, 4, 8, 16), (1, 2, 3, 4)):
        for resident in (16, 24) if tiles == 1 and rows <= 8 else (8, 16) if tiles < 4 else (8,):
            if tiles * stages in (2, 3, 4, 6, 8) and resident >= warps:
                yield w4a16_gemv.Tile(tiles, warps, stages, resident // warps)


def stream_tiles(rows: int) -> Iterator[w4a16_stream.Tile]:
    """Those of which so many run at once; as many stages as there are barriers and room for."""
    together, room = w4a16_stream.multiplies_together(DEVICE), shared_kib(DEVICE)
    width = min(32 if together else 8, max(4, triton.next_power_of_2(triton.cdiv(rows, 8))))
    for tiles, warps, per_sm in pairs_of((1, 2, 4), (4, 8, 12, 16), (1, 2, 3)):
        for columns in {width, max(4, width // 2)}:
            if (4 * tiles * columns + 80) * warps * 32 + 40 * 128 <= (1 << 16) // per_sm:
                tile = w4a16_stream.Tile(tiles, columns, warps, 7, per_sm).fitted(GROUP, room)
                if tile.stages >= 3:
                    yield tile


def w8a8_tiles(rows: int) -> Iterator[w8a8_kernels.Tile]:
    width = min(256, max(8, triton.next_power_of_2(rows)))
    if width <= 16:
        shapes = [(16, width, 256, 1, 4), (16, width, 256, 1, 6), (16, width, 512, 1, 3), (16, width, 512, 1, 4)]
        shapes += [(32, width, 256, 1, 4), (32, width, 256, 2, 4), (64, width, 128, 4, 6), (64, width, 256, 4, 4)]
    elif width == 32:
        shapes = [(16, 32, 256, 1, 4), (32, 32, 256, 2, 4), (64, 32, 128, 4, 5), (64, 32, 256, 4, 4)]
    elif width == 64:
        shapes = [(32, 64, 256, 2, 3), (64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 64, 256, 4, 4)]
        shapes += [(128, 64, 128, 4, 4), (128, 64, 128, 8, 5)]
    else:
        shapes = [(64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 4)]
        shapes += [(128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4)] if width == 256 else []
    yield from (w8a8_kernels.Tile(*shape) for shape in shapes)


def compile_all(kinds: list[str], matrices: Iterable[Matrix], rows: list[int], sweep: bool) -> None:
    """Compile in parallel what will be timed: Triton's kernels to its cache, in processes, NVRTC's here, in threads."""
    jobs = [(kind, matrix.outputs, matrix.depth, n, sweep) for matrix in matrices for kind in kinds for n in rows]
    tiles = {(8 if n <= 8 else 16, tile) for n in rows for tile in w4a16_tiles(n)} if sweep and "w4a16" in kinds else ()
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool, ThreadPoolExecutor(workers) as threads:
        done = pool.starmap_async(run_once, jobs, chunksize=1)
        for compiled in [threads.submit(tile_once, *job) for job in tiles]:
            compiled.result()
        done.get()
    print(f"compiled for {len(jobs)} products, and {len(tiles)} kernels in CUDA C++", file=sys.stderr)


def tile_once(rows: int, tile: w4a16_gemv.Tile | w4a16_stream.Tile) -> None:
    with torch.inference_mode(), suppress(*REFUSALS):
        weights = Weights.drawn("w4a16", 16, GROUP, 0)
        x = torch.zeros(rows, GROUP, dtype=BFLOAT, device=DEVICE)
        IN_REGISTERS[type(tile)](x, *weights[0], None, tile)


def run_once(kind: str, outputs: int, depth: int, rows: int, sweep: bool) -> None:
    """All but what NVRTC compiles, which no other process finds again."""
    with torch.inference_mode():
        weights = Weights.drawn(kind, outputs, depth, 0)
        x = as_read(torch.zeros(rows, depth, dtype=BFLOAT, device=DEVICE), weights)
        if kind == "w4a16":
            w4a16_kernels.decoded_product(x, *weights[0], None)
            return
        for _, run in runs_of(weights, rows, sweep):
            with suppress(*REFUSALS):
                run(x, 0)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
