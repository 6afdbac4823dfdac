"""MLA and experts on a GPU: kernels against float64, and their time beside what reading costs.

    python scripts/bench_mla.py
    python scripts/bench_mla.py --parts decode --num-heads 16 --nbits 16,4
    python scripts/bench_mla.py --parts decode --nbits 16,4 --workloads 16x32000,1x32000 --chosen
    python scripts/bench_mla.py --sweep --nbits 4
    python scripts/bench_mla.py --parts prefill --num-heads 16 --nbits 16,4
    python scripts/bench_mla.py --parts experts --shape 128,8,2048,768     # Qwen3-30B-A3B; 64,6,2048,1408 is V2-Lite

decode: attention of one decode step over latents of 512 and rope keys of 64, by KV bits and kernel, beside the expanded
form in torch (keys and values of all heads made of the latents, then scaled_dot_product_attention). prefill: some
tokens of one prompt, behind a context or none: absorbed, products on queries and outputs included; expanded, the making
of keys and values included, and which of the two is chosen; beside the latter in torch, and
scaled_dot_product_attention alone. experts: a layer's routed experts on tokens that choose at random, of 16 and 4 bits,
beside a loop over them in torch. --sweep: a decode step by how the tiles of the kernel in CUDA C++ are cut.

Each figure is the mean of a CUDA graph that runs layers one behind the other, as many as fill 4 GiB, so that no cache
helps. Its bytes are those that must be read: latents and rope keys as they are stored, and the experts that are chosen.
Errors are relative, against float64; the script fails where one is above 1 %.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.triton_backend import TritonPrefill
from kvtool.config import KVOptions
from kvtool.kernels import cuda_mla_decode, mla_decode, moe
from kvtool.kernels.w4a16 import Int4Weights
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.layers.moe import mix_reference
from kvtool.layers.quantized import Int4Matrix, rounded
from kvtool.quantize.decode_speed import FOOTPRINT, fill, graph_seconds, read_bandwidth, step_bytes

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
WORKLOADS = ((16, 32_000), (64, 4_096), (1, 32_000), (1, 131_072), (256, 1_024))  # sequences, tokens of each
# Contexts and new tokens. No end is a block's: the last query would read a tail that no later one needs.
CHUNKS = ((0, 127), (0, 511), (0, 1_023), (0, 2_047), (0, 8_191), (32_768, 127), (32_768, 511), (32_768, 2_047))
BATCHES = (1, 2, 8, 16, 64, 256, 2_048)  # tokens of a step
DTYPE = torch.bfloat16
LIMIT = 1e-2  # of relative errors
# Teams that score, warps of each, warps that gather, tokens of a tile and stages, as `cuda_mla_decode.TILES` has them.
SWEEP = {
    "8": [(2, 2, 4, 64, 4), (2, 4, 8, 64, 4), (2, 2, 8, 64, 4), (1, 4, 4, 64, 4)],
    "4": [(2, 4, 8, 128, 4), (2, 4, 4, 128, 4), (1, 4, 8, 128, 4), (1, 4, 4, 128, 4), (2, 2, 8, 64, 6)],
    "2": [(2, 4, 4, 128, 4), (1, 4, 4, 128, 4), (2, 2, 4, 64, 8), (2, 4, 4, 64, 8)],
}
Attend = Callable[[int, slice], Tensor]  # of a layer's index, and some of the sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="decode,prefill,experts")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--nbits", default="16,8,4,2", help="of the default recipes, or fp8")
    parser.add_argument("--workloads", help="of decode, as 16x32000,1x32000: sequences and tokens of each")
    parser.add_argument("--chosen", action="store_true", help="of decode time the kernels that would be chosen alone")
    parser.add_argument("--sweep", action="store_true", help="time tiles, and nothing else")
    parser.add_argument("--shape", default="64,6,2048,1408", help="experts, chosen by a token, hidden and intermediate")
    args = parser.parse_args()
    bandwidth, formats, good = read_bandwidth(), args.nbits.split(","), True
    workloads = [tuple(map(int, x.split("x"))) for x in args.workloads.split(",")] if args.workloads else WORKLOADS
    print(f"{torch.cuda.get_device_name()}, read {bandwidth / 1e12:.2f} TB/s")
    if args.sweep:
        sys.exit(not all([sweep_table(args.num_heads, formats, *work, bandwidth) for work in workloads]))
    if "decode" in args.parts:
        good &= decode_table(args.num_heads, formats, workloads, args.chosen, bandwidth)
    if "prefill" in args.parts:
        good &= prefill_table(args.num_heads, formats)
    if "experts" in args.parts:
        good &= expert_table(tuple(map(int, args.shape.split(","))), bandwidth)
    sys.exit(not good)


def show(what: str, kind: str, seconds: float, nbytes: float, error: float | None, bandwidth: float) -> bool:
    rate, wrong = nbytes / seconds, "" if error is None else f"{error:.1e}"
    print(
        f"{what:>14} {kind:>12} {seconds * 1e6:9.1f} {rate / 1e9:7.0f} {rate / bandwidth:6.0%} {wrong:>9}", flush=True
    )
    return error is None or error < LIMIT


def head(what: str, kind: str) -> None:
    print(f"\n{what:>14} {kind:>12} {'µs':>9} {'GB/s':>7} {'share':>6} {'error':>9}")


def latent_layer(num_heads: int) -> AttentionLayer:
    return AttentionLayer(num_heads, 1, LATENT + ROPE, (NOPE + ROPE) ** -0.5, latent_dim=LATENT)


def layout_of(nbits: str, num_layers: int) -> KVLayout:
    spec = KVSpec(num_layers, StreamSpec(1, ROPE), StreamSpec(1, LATENT), DTYPE.itemsize, latent=True)
    return KVLayout(spec, resolve(KVOptions(nbits=nbits), spec))  # type: ignore[arg-type]


# Decode


def decode_table(
    num_heads: int, formats: list[str], workloads: Sequence[tuple[int, int]], chosen: bool, bandwidth: float
) -> bool:
    head(f"{num_heads} heads", "KV")
    good = True
    for num_seqs, length in workloads:
        for nbits in formats:
            step = Step(num_heads, nbits, num_seqs, length)
            for name, attend in list(step.kernels().items())[-chosen:]:
                good &= show(f"{num_seqs}×{length}", f"{nbits} {name}", *step.measured(attend), bandwidth)
        if not chosen and (seconds := expanded_seconds(num_heads, num_seqs, length)) is not None:
            show(f"{num_seqs}×{length}", "expanded", seconds, num_seqs * length * 1152, None, bandwidth)
    return good


def sweep_table(num_heads: int, formats: list[str], num_seqs: int, length: int, bandwidth: float) -> bool:
    tiles, good = cuda_mla_decode.TILES, True
    chosen = tiles.copy()
    head(f"{num_seqs}×{length}", "KV")
    for nbits in formats:
        step = Step(num_heads, nbits, num_seqs, length)
        for tile in dict.fromkeys([tiles[228, nbits], *SWEEP[nbits]]) if nbits in SWEEP else ():
            tiles[228, nbits] = tile
            good &= show(" ".join(map(str, tile)), nbits, *step.measured(step.kernels()["CUDA"]), bandwidth)
    tiles.update(chosen)
    return good


class Step:
    """A decode step of layers that fill 4 GiB."""

    def __init__(self, num_heads: int, nbits: str, num_seqs: int, length: int) -> None:
        self.layer, single = latent_layer(num_heads), layout_of(nbits, 1)
        layout = layout_of(nbits, math.ceil(FOOTPRINT / single.bytes_for([length] * num_seqs)))
        per_seq = layout.format.num_blocks(length)
        self.store = KVStore(layout, num_seqs * per_seq, num_seqs, DTYPE, "cuda")
        fill(self.store)
        ids = torch.randperm(num_seqs * per_seq).tolist()
        spans = [Span(length - 1, length, ids[i * per_seq : (i + 1) * per_seq], i) for i in range(num_seqs)]
        self.batch = KVBatch.build(layout.format, spans, "cuda")
        self.q = torch.randn(num_seqs, num_heads, self.layer.head_dim, dtype=DTYPE, device="cuda") / 4
        self.nbytes = num_seqs * step_bytes(single, length)
        self.exact = mla_decode.latent_decode_reference(*self.arguments(0, slice(0, 2)), scale=self.layer.scale)

    def arguments(self, index: int, rows: slice) -> tuple[object, ...]:
        kv, batch = self.store.layers[index], self.batch
        places = (batch.block_table, batch.positions, batch.visible, batch.tail_slots)
        return (self.q[rows], kv.key.packed, kv.value.packed, *(x[rows] for x in places))

    def kernels(self) -> dict[str, Attend]:
        """What attends in a layer with some of the sequences: Triton, and CUDA C++ where it takes this format.

        The last is chosen.
        """
        layer, first = self.layer, self.store.layers[0]
        out = torch.empty(*self.q.shape[:2], LATENT, dtype=DTYPE, device="cuda")

        def in_cuda(index: int, rows: slice) -> Tensor:
            arrivals = self.store.layers[index].arrivals
            arguments = self.arguments(index, rows)
            cuda_mla_decode.latent_decode(*arguments, arrivals, scale=layer.scale, out=out[rows])
            return out[rows]

        named: dict[str, Attend] = {
            "Triton": lambda index, rows: mla_decode.latent_decode(*self.arguments(index, rows), scale=layer.scale)
        }
        return named if cuda_mla_decode.refuses(first.key.packed, first.value.packed) else named | {"CUDA": in_cuda}

    def measured(self, attend: Attend) -> tuple[float, int, float]:
        """Seconds of one layer, the bytes that it must read, and its error on a few sequences."""
        error = float((attend(0, slice(0, 2)).double() - self.exact).norm() / self.exact.norm())
        seconds = graph_seconds(lambda index: attend(index, slice(None)), range(len(self.store.layers)))
        return seconds, self.nbytes, error


def expanded_seconds(num_heads: int, num_seqs: int, length: int) -> float | None:
    """Seconds of making keys and values of all latents and attending to them; None where they do not fit."""
    expanded = num_seqs * length * num_heads * (NOPE + ROPE + VALUE) * 2
    if expanded > 24 << 30:
        return None
    latents = torch.randn(num_seqs, length, LATENT, dtype=DTYPE, device="cuda")
    rope = torch.randn(num_seqs, 1, length, ROPE, dtype=DTYPE, device="cuda").expand(-1, num_heads, -1, -1)
    weight = torch.randn(num_heads * (NOPE + VALUE), LATENT, dtype=DTYPE, device="cuda") * LATENT**-0.5
    q = torch.randn(num_seqs, num_heads, 1, NOPE + ROPE, dtype=DTYPE, device="cuda")

    def run(_: int) -> Tensor:
        made = F.linear(latents, weight).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, torch.cat([made[..., :NOPE], rope], -1), made[..., NOPE:])

    return graph_seconds(run, range(1))


# Prefill


def prefill_table(num_heads: int, formats: list[str]) -> bool:
    """Each row's TFLOP/s are of what it multiplies itself."""
    print(f"\n{'context+chunk':>14} {'by':>22} {'µs':>9} {'TFLOP/s':>8} {'error':>9}")
    good = True
    for context, length in CHUNKS:
        products = 2 * num_heads * LATENT * (NOPE + VALUE)  # of one token
        pairs = num_heads * length * (2 * context + length + 1)
        absorbed = length * products + pairs * (2 * LATENT + ROPE)
        alone = pairs * (NOPE + ROPE + VALUE)
        expanded = (context + length) * products + alone

        def row(by: str, flops: int, call: Callable[[int], object], error: float | None = None) -> bool:
            seconds, wrong = graph_seconds(call, range(2)), "" if error is None else f"{error:.1e}"
            chunk = f"{context}+{length}"  # noqa: B023
            print(f"{chunk:>14} {by:>22} {seconds * 1e6:9.1f} {flops / seconds / 1e12:8.0f} {wrong:>9}", flush=True)
            return error is None or error < LIMIT

        for nbits in formats:
            prompt = Chunk(num_heads, nbits, context, length)
            chosen = prompt.chosen()
            for by, flops, call in (("absorbed", absorbed, prompt.absorb), ("expanded", expanded, prompt.expand)):
                mark = " (chosen)" if by == chosen else ""
                good &= row(f"{by} {nbits}{mark}", flops, call, prompt.error(call))
        if not context:
            made, given = sdpa(num_heads, length)
            row("SDPA and making", expanded, made)
            row("SDPA", alone, given)
    return good


class Chunk:
    """Tokens of one prompt in a store of two layers, which hold its context and, at its end, these tokens."""

    def __init__(self, num_heads: int, nbits: str, context: int, length: int) -> None:
        layout, end = layout_of(nbits, 2), context + length
        self.layer, num_blocks = latent_layer(num_heads), layout.format.num_blocks(end)
        self.store = KVStore(layout, num_blocks + 1, 1, DTYPE, "cuda")
        blocks = torch.randperm(num_blocks).tolist()
        for start, stop in ((0, context), (context, end))[not context :]:
            self.batch = KVBatch.build(layout.format, [Span(start, stop, blocks, 0)], "cuda")
            new = [torch.randn(2, stop - start, 1, dim, dtype=DTYPE, device="cuda") for dim in (ROPE, LATENT)]
            layers = zip(self.store.layers, *new, strict=True)
            self.nears = [kv.write(key, latent, self.batch) for kv, key, latent in layers]
        products = torch.randn(2, num_heads, NOPE + VALUE, LATENT, dtype=DTYPE, device="cuda") * LATENT**-0.5
        nope = torch.randn(length, num_heads, NOPE, dtype=DTYPE, device="cuda") / 2
        rest = torch.randn(length, num_heads, LATENT + ROPE, dtype=DTYPE, device="cuda") / 2
        self.queries = [LatentQueries(nope, rest, each) for each in products]

    def chosen(self) -> str:
        assert self.batch.prompts
        return "expanded" if self.queries[0].expand(self.batch.prompts.spans) else "absorbed"

    def absorb(self, index: int) -> Tensor:
        queries = self.queries[index]
        gathered = torch.empty(*queries.nope.shape[:2], LATENT, dtype=DTYPE, device="cuda")
        self._prefill(index, queries.absorbed(), gathered)
        return queries.values(gathered)

    def expand(self, index: int) -> Tensor:
        out = self.queries[index].empty()
        self._prefill(index, self.queries[index], out)
        return out

    def _prefill(self, index: int, queries: Tensor | LatentQueries, out: Tensor) -> None:
        TritonPrefill().prefill(queries, self.nears[index], self.store.layers[index], self.batch, self.layer, out)

    def error(self, call: Callable[[int], Tensor]) -> float:
        """Of the last token's values, against float64."""
        kv, batch, last = self.store.layers[0], self.batch, self.queries[0].rows(slice(-1, None))
        double = LatentQueries(last.nope.double(), last.absorbing.double(), last.products.double())
        places = (batch.block_table, batch.positions[-1:], batch.visible[-1:], batch.tail_slots)
        streams = (kv.key.packed, kv.value.packed)
        gathered = mla_decode.latent_decode_reference(double.absorbed(), *streams, *places, scale=self.layer.scale)
        exact = double.values(gathered)
        return float((call(0)[-1:].double() - exact).norm() / exact.norm())


def sdpa(num_heads: int, length: int) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]]:
    """Causal attention in torch over keys and values of all heads: which it makes of latents, and which are there."""
    latents = torch.randn(1, length, LATENT, dtype=DTYPE, device="cuda")
    rope = torch.randn(1, 1, length, ROPE, dtype=DTYPE, device="cuda").expand(-1, num_heads, -1, -1)
    weight = torch.randn(num_heads * (NOPE + VALUE), LATENT, dtype=DTYPE, device="cuda") * LATENT**-0.5
    q = torch.randn(1, num_heads, length, NOPE + ROPE, dtype=DTYPE, device="cuda")

    def make() -> tuple[Tensor, Tensor]:
        made = F.linear(latents, weight).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        return torch.cat([made[..., :NOPE], rope], -1), made[..., NOPE:]

    key, value = make()[0], make()[1].contiguous()
    return (
        lambda _: F.scaled_dot_product_attention(q, *make(), is_causal=True),
        lambda _: F.scaled_dot_product_attention(q, key, value, is_causal=True),
    )


# Experts


def expert_table(shape: tuple[int, ...], bandwidth: float) -> bool:
    num_experts, top_k, hidden, size = shape
    layer_bytes = num_experts * 3 * hidden * size * 2
    layers = max(1, min(8, math.ceil(FOOTPRINT / layer_bytes)))
    gate_up = torch.randn(layers, num_experts, 2 * size, hidden, dtype=DTYPE, device="cuda") * hidden**-0.5
    down = torch.randn(layers, num_experts, hidden, size, dtype=DTYPE, device="cuda") * size**-0.5
    codes = [tuple(int4(matrices) for matrices in layer) for layer in zip(gate_up, down, strict=True)]
    head(f"{num_experts} experts", "by")
    good = True
    for tokens in BATCHES:
        x = torch.randn(tokens, hidden, dtype=DTYPE, device="cuda")
        ids = torch.rand(layers, tokens, num_experts, device="cuda").topk(top_k).indices.int()
        weights = torch.rand(tokens, top_k, device="cuda")
        touched = sum(len(layer.unique()) for layer in ids) / layers
        nbytes = touched * layer_bytes / num_experts
        few = min(tokens, 8)
        used, local = ids[0, :few].unique(return_inverse=True)  # float64 of all experts would not fit
        chosen = (m[0, used.long()].double() for m in (gate_up, down))
        exact = mix_reference(x[:few].double(), *chosen, local, weights[:few].double())
        error = float((moe.mix(x, gate_up[0], down[0], ids[0], weights)[:few].double() - exact).norm() / exact.norm())

        def grouped(i: int, x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> Tensor:
            return moe.mix(x, gate_up[i], down[i], ids[i], weights)

        def coded(i: int, x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> Tensor:
            return moe.mix(x, *codes[i], ids[i], weights)

        good &= show(f"{tokens} tokens", "grouped", graph_seconds(grouped, range(layers)), nbytes, error, bandwidth)
        error = float((coded(0)[:few].double() - exact).norm() / exact.norm())  # rounding's, too
        share = codes[0][1].weight.nbytes * 17 / 16 / down[0].nbytes  # with scales and zeros of 16 bits to 128 columns
        show(f"{tokens} tokens", "4 bits", graph_seconds(coded, range(layers)), nbytes * share, error, bandwidth)
        loop = wall_seconds(lambda: mix_reference(x, gate_up[0], down[0], ids[0], weights))  # noqa: B023
        show(f"{tokens} tokens", "a loop", loop, nbytes, None, bandwidth)
    return good


def int4(weight: Tensor) -> Int4Weights:
    matrix = rounded(weight.flatten(0, 1), "w4a16", 128)
    assert isinstance(matrix, Int4Matrix)
    return Int4Weights(*(t.unflatten(0, (len(weight), -1)) for t in (matrix.weight, matrix.scales, matrix.zeros)))


def wall_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Mean seconds of what waits for the GPU by itself."""
    from time import perf_counter

    run()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (perf_counter() - start) / repeats


if __name__ == "__main__":
    with torch.inference_mode():
        main()
