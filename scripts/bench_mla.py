"""MLA and experts on a GPU: kernels against float64, and their time beside what reading costs.

    python scripts/bench_mla.py
    python scripts/bench_mla.py --parts decode --num-heads 16 --nbits 16,4
    python scripts/bench_mla.py --sweep --nbits 4
    python scripts/bench_mla.py --parts experts --shape 128,8,2048,768     # Qwen3-30B-A3B; 64,6,2048,1408 is V2-Lite

decode: attention of one decode step over latents of 512 and rope keys of 64, by KV bits and kernel, beside the expanded
form in torch (keys and values of all heads made of the latents, then scaled_dot_product_attention). prefill: one prompt
from its first token on. experts: a layer's routed experts on tokens that choose at random, beside a loop over them in
torch. --sweep: a step of 16 sequences by how the tiles of the kernel in CUDA C++ are cut.

Each figure is the mean of a CUDA graph that runs layers one behind the other, as many as fill 4 GiB, so that no cache
helps. Its bytes are those that must be read: latents and rope keys as they are stored, and the experts that are chosen.
Errors are relative, against float64; the script fails where one is above 1 %.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.triton_backend import TritonPrefill
from kvtool.config import KVOptions
from kvtool.kernels import cuda_mla_decode, mla_decode, moe
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.layers.moe import mix_reference
from kvtool.quantize.decode_speed import FOOTPRINT, fill, graph_seconds, read_bandwidth, step_bytes

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
WORKLOADS = ((16, 32_000), (64, 4_096), (1, 32_000), (1, 131_072), (256, 1_024))  # sequences, tokens of each
PROMPTS = (128, 512, 1_024, 2_048, 8_192)  # tokens
BATCHES = (1, 2, 8, 16, 64, 256, 2_048)  # tokens of a step
DTYPE = torch.bfloat16
LIMIT = 1e-2  # of relative errors
# Warps, tokens of a tile, stages, programs per SM and operands in registers, as `cuda_mla_decode.TILES` has them.
SWEEP = {
    "8": [(4, 64, 2, 2, 4), (8, 64, 2, 2, 0), (8, 64, 3, 1, 0), (8, 64, 4, 1, 16), (8, 128, 2, 1, 0), (4, 32, 3, 2, 0)],
    "4": [
        (4, 64, 3, 2, 8),
        (4, 64, 2, 2, 0),
        (4, 32, 3, 3, 0),
        (8, 64, 3, 2, 0),
        (8, 128, 3, 1, 0),
        (8, 128, 4, 1, 16),
    ],
    "2": [
        (4, 64, 3, 2, 8),
        (4, 64, 4, 2, 0),
        (4, 128, 2, 2, 0),
        (8, 64, 3, 2, 0),
        (8, 128, 3, 1, 0),
        (8, 128, 4, 1, 16),
    ],
}
Attend = Callable[[int, slice], Tensor]  # of a layer's index, and some of the sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="decode,prefill,experts")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--nbits", default="16,8,4,2", help="of the default recipes, or fp8")
    parser.add_argument("--sweep", action="store_true", help="time tiles, and nothing else")
    parser.add_argument("--shape", default="64,6,2048,1408", help="experts, chosen by a token, hidden and intermediate")
    args = parser.parse_args()
    bandwidth, formats, good = read_bandwidth(), args.nbits.split(","), True
    print(f"{torch.cuda.get_device_name()}, read {bandwidth / 1e12:.2f} TB/s")
    if args.sweep:
        sys.exit(not sweep_table(args.num_heads, formats, bandwidth))
    if "decode" in args.parts:
        good &= decode_table(args.num_heads, formats, bandwidth)
    if "prefill" in args.parts:
        prefill_table(args.num_heads, formats)
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


def decode_table(num_heads: int, formats: list[str], bandwidth: float) -> bool:
    head(f"{num_heads} heads", "KV")
    good = True
    for num_seqs, length in WORKLOADS:
        for nbits in formats:
            step = Step(num_heads, nbits, num_seqs, length)
            for name, attend in step.kernels().items():
                good &= show(f"{num_seqs}×{length}", f"{nbits} {name}", *step.measured(attend), bandwidth)
        if (seconds := expanded_seconds(num_heads, num_seqs, length)) is not None:
            show(f"{num_seqs}×{length}", "expanded", seconds, num_seqs * length * 1152, None, bandwidth)
    return good


def sweep_table(num_heads: int, formats: list[str], bandwidth: float) -> bool:
    """Of the first workload."""
    num_seqs, length = WORKLOADS[0]
    tiles, good = cuda_mla_decode.TILES, True
    head(f"{num_seqs}×{length}", "KV")
    for nbits in formats:
        step = Step(num_heads, nbits, num_seqs, length)
        show("Triton", nbits, *step.measured(step.kernels()["Triton"]), bandwidth)
        for tile in dict.fromkeys([tiles[228, nbits], *SWEEP[nbits]]) if nbits in SWEEP else ():
            tiles[228, nbits] = tile
            good &= show(" ".join(map(str, tile)), nbits, *step.measured(step.kernels()["CUDA"]), bandwidth)
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
        """What attends in a layer with some of the sequences: Triton, and CUDA C++ where it takes this format."""
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


def prefill_table(num_heads: int, formats: list[str]) -> None:
    print(f"\n{'prompt':>14} {'KV':>12} {'µs':>9} {'TFLOP/s':>8}")
    for length in PROMPTS:
        flops = num_heads * (2 * LATENT + ROPE) * length * (length + 1)
        calls = {nbits: prefill(num_heads, nbits, length) for nbits in formats}
        for name, call in ({"expanded": expanded_prompt(num_heads, length)} | calls).items():
            seconds = graph_seconds(call, range(2))
            print(f"{length:>14} {name:>12} {seconds * 1e6:9.1f} {flops / seconds / 1e12:8.0f}", flush=True)


def prefill(num_heads: int, nbits: str, length: int) -> Callable[[int], object]:
    """The kernels on a prompt that two layers have written to a store."""
    layer, layout = latent_layer(num_heads), layout_of(nbits, 2)
    num_blocks = layout.format.num_blocks(length)
    store = KVStore(layout, num_blocks + 1, 1, DTYPE, "cuda")
    batch = KVBatch.build(layout.format, [Span(0, length, torch.randperm(num_blocks).tolist(), 0)], "cuda")
    q = torch.randn(length, num_heads, layer.head_dim, dtype=DTYPE, device="cuda") / 4
    new = [torch.randn(2, length, 1, dim, dtype=DTYPE, device="cuda") for dim in (ROPE, LATENT)]
    nears = [kv.write(key, value, batch) for kv, key, value in zip(store.layers, *new, strict=True)]
    out = torch.empty(length, num_heads, LATENT, dtype=DTYPE, device="cuda")
    return lambda index: TritonPrefill().prefill(q, nears[index], store.layers[index], batch, layer, out)


def expanded_prompt(num_heads: int, length: int) -> Callable[[int], object]:
    """Causal attention over keys and values of all heads, which are there already."""
    q, key = (torch.randn(1, num_heads, length, NOPE + ROPE, dtype=DTYPE, device="cuda") for _ in range(2))
    value = torch.randn(1, num_heads, length, VALUE, dtype=DTYPE, device="cuda")
    return lambda _: F.scaled_dot_product_attention(q, key, value, is_causal=True)


# Experts


def expert_table(shape: tuple[int, ...], bandwidth: float) -> bool:
    num_experts, top_k, hidden, size = shape
    layer_bytes = num_experts * 3 * hidden * size * 2
    layers = max(1, min(8, math.ceil(FOOTPRINT / layer_bytes)))
    gate_up = torch.randn(layers, num_experts, 2 * size, hidden, dtype=DTYPE, device="cuda") * hidden**-0.5
    down = torch.randn(layers, num_experts, hidden, size, dtype=DTYPE, device="cuda") * size**-0.5
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

        good &= show(f"{tokens} tokens", "grouped", graph_seconds(grouped, range(layers)), nbytes, error, bandwidth)
        loop = wall_seconds(lambda: mix_reference(x, gate_up[0], down[0], ids[0], weights))  # noqa: B023
        show(f"{tokens} tokens", "a loop", loop, nbytes, None, bandwidth)
    return good


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
