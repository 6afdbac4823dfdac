"""What the packed KV store's own work costs on a GPU, beside a copy of as many bytes.

    python scripts/bench_kv.py --num-layers 28 --num-kv-heads 4 --head-dim 128 --nbits 4

Append: one token of every sequence into the tails (or blocks) of all layers. Seal: a block of every sequence, of all
layers; "few" is a step in which one sequence in 64 completes a block. Prefill: 4,096 tokens of one layer into blocks.
Swap out, swap in: as many tokens to pinned host memory and back. Allocate, look up: their blocks, on the host, out of
the pool, and by the digests of their tokens. Bytes are those read and written; the copy moves as many in all, between
GPU and host for the swaps. Means over CUDA graphs, or over as many runs of what the host does.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.blocks import BlockPool, block_digest
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.kv.swap import SwapSpace

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
    print(f"{'bits':>5} {'':>8} {'µs':>9} {'tokens/s':>14} {'GB/s':>7} {'of copy':>8}")
    for nbits in args.nbits.split(","):
        layout = KVLayout(spec, resolve(KVOptions(nbits=nbits), spec))
        for name, seconds, tokens, nbytes in measure(layout, args.num_seqs):
            copied = swap_seconds(nbytes) if name.startswith("swap") else copy_seconds(nbytes)
            rates = f"{nbytes / seconds / 1e9:7.0f} {copied / seconds:8.0%}"
            print(f"{nbits:>5} {name:>8} {seconds * 1e6:9.1f} {tokens / seconds:14,.0f} {rates}")
        for name, seconds in host_work(layout):
            print(f"{nbits:>5} {name:>8} {seconds * 1e6:9.1f} {PROMPT / seconds:14,.0f}")


def measure(layout: KVLayout, num_seqs: int) -> Iterator[tuple[str, float, int, int]]:
    """What is done, its seconds, of how many tokens, and the bytes that it reads and writes."""
    spec, fmt = layout.spec, layout.format
    size, last = fmt.block_size, fmt.residual + fmt.block_size - 1  # the token that completes the first block
    full = size * spec.elements * spec.element_size
    store = KVStore(layout, num_seqs + PROMPT // size, num_seqs, DTYPE, "cuda")
    store.tails.view(DTYPE).normal_()
    batch = KVBatch.build(fmt, [Span(last, last + 1, [i], i) for i in range(num_seqs)], "cuda")
    token = torch.randn(num_seqs, spec.key.heads, spec.key.dim, dtype=DTYPE, device="cuda")

    def append() -> None:
        for layer in store.layers:
            layer.write(token, token, batch)

    bytes_written = layout.block_bytes // size if fmt.packs_on_write else full // size
    yield "append", seconds_of(append), num_seqs, num_seqs * (full // size + bytes_written)
    prompt = torch.randn(PROMPT, spec.key.heads, spec.key.dim, dtype=DTYPE, device="cuda")
    if store.sealer and store.layers[0].writer:
        sealer, write_blocks = store.sealer, store.layers[0].writer.write_blocks
        few = batch.positions.clone().where(torch.arange(num_seqs, device="cuda") % 64 == 0, 0)
        sealed, num_few = full + layout.block_bytes, -(-num_seqs // 64)
        for name, positions, count in (("seal", batch.positions, num_seqs), ("few", few, num_few)):
            seconds = seconds_of(lambda at=positions: sealer.seal(at, batch.tail_slots, batch.block_table))
            yield name, seconds, count * size, count * sealed
        blocks = torch.arange(PROMPT // size, device="cuda")
        rows, to = blocks * size, blocks + num_seqs
        packed = seconds_of(lambda: write_blocks(prompt, prompt, rows, to))
        yield "prefill", packed, PROMPT, sealed * (PROMPT // size) // spec.num_layers
    units = list(range(PROMPT // size + -(-layout.tail_bytes // layout.block_bytes)))
    space, ids = SwapSpace(store, len(units)), list(range(PROMPT // size))
    nbytes = len(ids) * layout.block_bytes + layout.tail_bytes
    yield "swap out", host_seconds(lambda: space.save(ids, 0, units)), PROMPT, nbytes
    yield "swap in", host_seconds(lambda: space.load(units, ids, 0)), PROMPT, nbytes


def host_work(layout: KVLayout) -> Iterator[tuple[str, float]]:
    """What the host does for a prompt's blocks, and its seconds."""
    pool, size = BlockPool(2 * PROMPT // layout.format.block_size), layout.format.block_size
    tokens = list(range(PROMPT))

    def digests() -> list[bytes]:
        found = [b""]
        for first in range(0, PROMPT, size):
            found.append(block_digest(found[-1], tokens[first : first + size]))
        return found[1:]

    for digest in digests():
        pool.seal(pool.allocate(), digest)

    def allocate() -> None:
        for block in [pool.allocate() for _ in range(PROMPT // size)]:
            pool.free(block)

    yield "allocate", host_seconds(allocate)
    yield "look up", host_seconds(lambda: [pool.find(digest) for digest in digests()])


def host_seconds(work: Callable[[], object], rounds: int = 20) -> float:
    """Mean of `rounds` runs, with all that they have asked of the GPU."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def swap_seconds(nbytes: int) -> float:
    """Of one copy of so many bytes to the host."""
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    source = torch.empty_like(target, device="cuda")
    return host_seconds(lambda: target.copy_(source, non_blocking=True))


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
