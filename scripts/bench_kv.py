"""What writing the packed KV store costs on a GPU, beside a copy of as many bytes.

    python scripts/bench_kv.py --num-layers 28 --num-kv-heads 4 --head-dim 128 --nbits 4

Append: one token of every sequence into the tails (or blocks) of all layers. Seal: a block of every sequence, of all
layers; "few" is a step in which one sequence in 64 completes a block. Prefill: 4,096 tokens of one layer into blocks.
Bytes are those read and written; the copy moves as many in all. Means over CUDA graphs.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore

DTYPE = torch.bfloat16
PROMPT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=28)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--nbits", default="8,4,2,fp8", help="of the default recipes")
    args = parser.parse_args()
    stream = StreamSpec(args.num_kv_heads, args.head_dim)
    spec = KVSpec(args.num_layers, stream, stream, DTYPE.itemsize)
    print(f"{torch.cuda.get_device_name()}, {spec}, {args.num_seqs} sequences")
    print(f"{'bits':>5} {'':>8} {'µs':>9} {'GB/s':>7} {'of copy':>8}")
    for nbits in args.nbits.split(","):
        for name, seconds, nbytes in measure(KVLayout(spec, resolve(KVOptions(nbits=nbits), spec)), args.num_seqs):
            copy = copy_seconds(nbytes)
            print(f"{nbits:>5} {name:>8} {seconds * 1e6:9.1f} {nbytes / seconds / 1e9:7.0f} {copy / seconds:8.0%}")


def measure(layout: KVLayout, num_seqs: int) -> Iterator[tuple[str, float, int]]:
    """What is done, its seconds, and the bytes that it reads and writes."""
    spec, fmt = layout.spec, layout.format
    size = fmt.block_size
    full = size * spec.elements * spec.element_size
    store = KVStore(layout, num_seqs + PROMPT // size, num_seqs, DTYPE, "cuda")
    store.tails.view(DTYPE).normal_()
    batch = KVBatch.build(fmt, [Span(size - 1, size, [i], i) for i in range(num_seqs)], "cuda")
    token = torch.randn(num_seqs, spec.key.heads, spec.key.dim, dtype=DTYPE, device="cuda")

    def append() -> None:
        for layer in store.layers:
            layer.write(token, token, batch)

    bytes_written = layout.block_bytes // size if fmt.packs_on_write else full // size
    yield "append", seconds_of(append), num_seqs * (full // size + bytes_written)
    prompt = torch.randn(PROMPT, spec.key.heads, spec.key.dim, dtype=DTYPE, device="cuda")
    if store.sealer is None or store.layers[0].writer is None:
        return
    sealer, write_blocks = store.sealer, store.layers[0].writer.write_blocks
    few = batch.positions.clone().where(torch.arange(num_seqs, device="cuda") % 64 == 0, 0)
    sealed = full + layout.block_bytes
    yield (
        "seal",
        seconds_of(lambda: sealer.seal(batch.positions, batch.tail_slots, batch.block_table)),
        num_seqs * sealed,
    )
    yield (
        "few",
        seconds_of(lambda: sealer.seal(few, batch.tail_slots, batch.block_table)),
        -(-num_seqs // 64) * sealed,
    )
    blocks = torch.arange(PROMPT // size, device="cuda")
    rows, to = blocks * size, blocks + num_seqs
    packed = seconds_of(lambda: write_blocks(prompt, prompt, rows, to))
    yield "prefill", packed, sealed * (PROMPT // size) // spec.num_layers


def copy_seconds(nbytes: int) -> float:
    """Of a copy that reads and writes `nbytes` in all."""
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source))


def seconds_of(work: Callable[[], object], rounds: int = 20) -> float:
    """Mean of `rounds` runs behind each other, as one CUDA graph."""
    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            work()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / rounds / 1e3


if __name__ == "__main__":
    main()
