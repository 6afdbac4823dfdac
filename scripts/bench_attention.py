"""Attention on a GPU by workload and KV bits, beside flash-attn where it is installed.

    python scripts/bench_attention.py --num-q-heads 28 --num-kv-heads 4
    python scripts/bench_attention.py --phase prefill --num-q-heads 28 --num-kv-heads 4
    python scripts/bench_attention.py --phase prefill --context 4000,32000 --tokens 8,64,256 --nbits 16,4
    python scripts/bench_attention.py --sweep --num-q-heads 28 --num-kv-heads 4 --nbits 8,4 --workloads 64x4096

Each figure is the mean of a CUDA graph that runs layers one behind the other: for decode as many as fill 4 GiB, so that
no cache helps. Its bytes are those that must be read: sealed blocks below v(t) with their scales, and the tail from
v(t) to t. Prefill is one prompt behind a context that was computed before, beside torch written out ("naive") and,
where there is no context, its scaled_dot_product_attention; workspace is what a call allocates besides its result.
--sweep: by how kernels cut the work: warps, stages, programs per SM and tokens of a tile (in Triton, which reads 16
bits and fp8, registers); and the programs that share a sequence and KV head: one, and as many as one to four to an SM
make.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from unittest import mock

import torch

from kvtool.attention import select
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.triton_backend import TritonPrefill
from kvtool.config import KVOptions
from kvtool.kernels import cuda_decode, decode
from kvtool.kernels.launch import num_sms
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.quantize.decode_speed import FOOTPRINT, fill, graph_seconds, read_bandwidth

Workloads = dict[str, list[int]]  # tokens of each sequence, by name
WORKLOADS = "16x32000,64x4096,256x1024,200x100-1700,1x131072"
PROMPTS = "128,256,512,1024,2048,4096,8192"  # tokens
PROMPT_LAYERS = 8
PAGE = 256  # tokens, the least that flash-attn takes
SWEEP = ((4, 2, 3, 32), (4, 2, 3, 64), (6, 2, 2, 32), (6, 2, 2, 64), (3, 2, 4, 64))  # as `cuda_decode.TILES` has them
SWEEP_TRITON = ((4, 3, 3, None), (4, 5, 2, None), (8, 5, 3, None))  # as `decode.TILES` has them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-q-heads", type=int, default=28)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--nbits", default="16,8,4,2", help="of the default recipes, or fp8")
    parser.add_argument("--attention-backend", default="auto", help="for decode")
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--workloads", default=WORKLOADS, help="of decode: sequences × tokens, or × least-most")
    parser.add_argument("--tokens", default=PROMPTS, help="of each prompt")
    parser.add_argument("--context", default="0", help="tokens before each prompt")
    parser.add_argument("--sweep", action="store_true", help="time decode by tiles and splits, and nothing else")
    args = parser.parse_args()
    asked = {one: lengths_of(one) for one in args.workloads.split(",")}
    layer = AttentionLayer(args.num_q_heads, args.num_kv_heads, args.head_dim, args.head_dim**-0.5)
    if args.sweep:
        sweep_table(layer, args.nbits.split(","), asked)
    elif args.phase == "decode":
        decode_table(layer, args.nbits.split(","), asked, args.attention_backend)
    else:
        bounds = [(int(c), int(c) + int(n)) for c in args.context.split(",") for n in args.tokens.split(",")]
        prefill_table(layer, args.nbits.split(","), bounds)


def lengths_of(workload: str) -> list[int]:
    """4,096 tokens of each sequence for "64x4096"; for "200x100-1700" evenly from 1,700 to 100, as a step has them."""
    count, _, length = workload.partition("x")
    shortest, _, longest = length.partition("-")
    return torch.linspace(int(longest or shortest), int(shortest), int(count)).int().tolist()


def decode_table(layer: AttentionLayer, formats: list[str], workloads: Workloads, asked: str) -> None:
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {layer.describe()}, read {bandwidth / 1e12:.2f} TB/s")
    print(f"{'workload':>12} {'KV':>10} {'µs':>8} {'GB/s':>7} {'share':>6} {'× flash-attn':>12}")
    for name, lengths in workloads.items():
        peer = flash_attention_seconds(layer, lengths)
        if peer is not None:
            show(name, "flash-attn", peer, sum(lengths) * 4 * layer.num_kv_heads * layer.head_dim, bandwidth, peer)
        for nbits in formats:
            run, layers, nbytes = decode_step(layer, nbits, lengths, asked)
            show(name, nbits, graph_seconds(run, layers), nbytes, bandwidth, peer)


def sweep_table(layer: AttentionLayer, formats: list[str], workloads: Workloads) -> None:
    bandwidth, sms = read_bandwidth(), num_sms(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, {layer.describe()}, read {bandwidth / 1e12:.2f} TB/s")
    print(f"{'workload':>12} {'KV':>10} {'µs':>8} {'GB/s':>7} {'share':>6} {'× flash-attn':>12}  tile, splits")
    for name, lengths in workloads.items():
        peer = flash_attention_seconds(layer, lengths)
        filling = {max(1, programs * sms // (len(lengths) * layer.num_kv_heads)) for programs in range(5)}
        for nbits in formats:
            in_triton = nbits in ("16", "fp8")
            run, layers, nbytes = decode_step(layer, nbits, lengths, "triton" if in_triton else "cuda")
            kernel, sweep = (decode, SWEEP_TRITON) if in_triton else (cuda_decode, SWEEP)
            tiles, key = kernel.TILES, (9 if in_triton else 228, nbits)
            for tile in dict.fromkeys([tiles[key], *sweep]):
                for splits in sorted(filling):
                    with (
                        mock.patch.dict(tiles, {key: tile}),
                        mock.patch.dict(cuda_decode.MANY_TILES, {(228, nbits): tile}),
                        mock.patch.object(kernel, "num_splits", return_value=splits),
                    ):
                        seconds = graph_seconds(run, layers)
                    cut = f"{' '.join(map(str, tile))}, {splits}"
                    show(name, nbits, seconds, nbytes, bandwidth, peer, cut)


def prefill_table(layer: AttentionLayer, formats: list[str], bounds: list[tuple[int, int]]) -> None:
    print(f"{torch.cuda.get_device_name()}, {layer.describe()}, one prompt")
    print(f"{'tokens':>12} {'attention':>10} {'µs':>8} {'TFLOP/s':>8} {'workspace MiB':>13} {'× flash-attn':>12}")
    for start, end in bounds:
        calls = other_prefills(layer, start, end)
        calls |= {nbits: triton_prefill(layer, nbits, start, end) for nbits in formats}
        flops = 2 * layer.num_heads * layer.head_dim * (end * (end + 1) - start * (start + 1))
        workload = f"{start} + {end - start}" if start else str(end)
        peer = None
        for name, call in calls.items():
            workspace = workspace_bytes(call, 2 * (end - start) * layer.num_heads * layer.head_dim)
            seconds = graph_seconds(call, range(PROMPT_LAYERS))
            peer = seconds if name == "flash-attn" else peer
            ratio = "" if peer is None else f"{peer / seconds:.2f}"
            rate = flops / seconds / 1e12
            print(f"{workload:>12} {name:>10} {seconds * 1e6:8.1f} {rate:8.0f} {workspace / 2**20:13.1f} {ratio:>12}")


def other_prefills(layer: AttentionLayer, start: int, end: int) -> dict[str, Callable[[int], object]]:
    """Causal attention of tokens `start` to `end` without a store, by name."""
    length = end - start
    q = torch.randn(length, layer.num_heads, layer.head_dim, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, end, layer.num_kv_heads, layer.head_dim, dtype=torch.bfloat16, device="cuda")
    by_head = [x.transpose(0, 1)[None] for x in (q, key, value)]
    group_heads = layer.num_heads // layer.num_kv_heads

    def naive(_: int) -> object:
        keys, values = (x.repeat_interleave(group_heads, dim=1) for x in by_head[1:])
        scores = by_head[0] @ keys.transpose(-1, -2) * layer.scale
        future = torch.ones(length, end, dtype=torch.bool, device="cuda").triu_(1 + start)
        return scores.masked_fill_(future, -math.inf).softmax(-1) @ values

    def sdpa(_: int) -> object:
        return torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)

    calls: dict[str, Callable[[int], object]] = {"naive": naive}
    if not start:
        calls["torch SDPA"] = sdpa
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return calls
    of_queries, of_keys = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (length, end))
    calls["flash-attn"] = lambda _: flash_attn_varlen_func(q, key, value, of_queries, of_keys, length, end, causal=True)
    return calls


def triton_prefill(layer: AttentionLayer, nbits: str, start: int, end: int) -> Callable[[int], object]:
    """The kernels on tokens `start` to `end` of a prompt that layer after layer has written to a store."""
    stream = StreamSpec(layer.num_kv_heads, layer.head_dim)
    spec = KVSpec(PROMPT_LAYERS, stream, stream, 2)
    layout = KVLayout(spec, resolve(KVOptions(nbits=nbits), spec))  # type: ignore[arg-type]
    num_blocks = layout.format.num_blocks(end)
    store = KVStore(layout, num_blocks + 1, 1, torch.bfloat16, "cuda")
    blocks = torch.randperm(num_blocks).tolist()
    q = torch.randn(end - start, layer.num_heads, layer.head_dim, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(2, end, stream.heads, stream.dim, dtype=torch.bfloat16, device="cuda")
    if start:
        context = KVBatch.build(layout.format, [Span(0, start, blocks, 0)], "cuda")
        for kv in store.layers:
            kv.write(*new[:, :start], context)
    batch = KVBatch.build(layout.format, [Span(start, end, blocks, 0)], "cuda")
    nears = [kv.write(*new[:, start:], batch) for kv in store.layers]
    backend = TritonPrefill()

    def call(index: int) -> object:
        out = torch.empty_like(q)
        backend.prefill(q, nears[index], store.layers[index], batch, layer, out)
        return out

    return call


def workspace_bytes(call: Callable[[int], object], result: int) -> int:
    """Bytes that a call holds at its peak, but for the `result` bytes that it returns."""
    call(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    return torch.cuda.max_memory_allocated() - before - result


def show(
    workload: str, name: str, seconds: float, nbytes: int, bandwidth: float, peer: float | None, cut: str = ""
) -> None:
    rate = nbytes / seconds
    ratio = "" if peer is None else f"{peer / seconds:.2f}"
    figures = f"{seconds * 1e6:8.1f} {rate / 1e9:7.0f} {rate / bandwidth:6.0%} {ratio:>12}"
    print(f"{workload:>12} {name:>10} {figures}  {cut}".rstrip(), flush=True)


def decode_step(
    layer: AttentionLayer, nbits: str, lengths: Sequence[int], asked: str
) -> tuple[Callable[[int], object], range, int]:
    """The decode step of a layer by its index, these, and the bytes that each must read."""
    stream = StreamSpec(layer.num_kv_heads, layer.head_dim)
    options = KVOptions(nbits=nbits)  # type: ignore[arg-type]
    single = KVLayout(spec := KVSpec(1, stream, stream, 2), resolve(options, spec))
    ends = list(accumulate(map(single.format.num_blocks, lengths), initial=0))
    held = ends[-1] * single.block_bytes + len(lengths) * single.tail_bytes
    spec = KVSpec(math.ceil(FOOTPRINT / held), stream, stream, 2)
    layout = KVLayout(spec, resolve(options, spec))
    store = KVStore(layout, ends[-1], len(lengths), torch.bfloat16, "cuda")
    fill(store)
    ids = torch.randperm(ends[-1]).tolist()
    spans = [Span(n - 1, n, ids[ends[i] : ends[i + 1]], i) for i, n in enumerate(lengths)]
    batch = KVBatch.build(layout.format, spans, "cuda")
    q = torch.randn(len(lengths), layer.num_heads, layer.head_dim, dtype=torch.bfloat16, device="cuda")
    out, backend = torch.empty_like(q), select(layer, store.layers[0], asked).decode
    far = sum(min(layout.format.visible(n - 1), n) for n in lengths)
    near = (sum(lengths) - far) * 2 * stream.elements * spec.element_size
    nbytes = far * layout.layer_block_bytes(0) // layout.format.block_size + near
    return lambda index: backend.decode(q, store.layers[index], batch, layer, out), range(spec.num_layers), nbytes


def flash_attention_seconds(layer: AttentionLayer, lengths: Sequence[int]) -> float | None:
    """Seconds of one layer of flash-attn's paged decode in bf16; None where it is not installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    pages = [math.ceil(length / PAGE) for length in lengths]
    shape = (sum(pages), PAGE, layer.num_kv_heads, layer.head_dim)
    layers = math.ceil(FOOTPRINT / (4 * math.prod(shape)))
    cache = torch.randn(layers, 2, *shape, dtype=torch.bfloat16, device="cuda")
    owned = torch.randperm(sum(pages), device="cuda").int().split(pages)
    table = torch.nn.utils.rnn.pad_sequence(list(owned), batch_first=True)
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    q = torch.randn(len(lengths), 1, layer.num_heads, layer.head_dim, dtype=torch.bfloat16, device="cuda")
    return graph_seconds(
        lambda index: flash_attn_with_kvcache(
            q, cache[index, 0], cache[index, 1], cache_seqlens=cache_seqlens, block_table=table, causal=True
        ),
        range(layers),
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
