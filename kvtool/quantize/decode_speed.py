"""How fast a GPU's decode steps read a cache in some format."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvtool.attention import AttentionBackend, rotated_queries, select
from kvtool.attention.layer import AttentionLayer
from kvtool.errors import CapacityError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import KVFormat, LayerFormat
from kvtool.kv.hadamard import hadamard
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec
from kvtool.kv.store import KVStore, LayerKV

FOOTPRINT = 4 << 30  # bytes read in turn, so that no cache holds them
DTYPE = torch.bfloat16
WARM_UP_SECONDS = 0.05
REPLAYS = 10  # whose time is taken


@dataclass(frozen=True)
class DecodeSpeed:
    """Attention of one decode step in all layers of a model.

    Attributes:
        seconds: mean, of CUDA graphs that run as many layers as fill 4 GiB, one behind the other.
        nbytes: that must be read: blocks below v(t) with their scales, and the tail from v(t) to t.
        bandwidth: bytes per second that a plain sum reads.
    """

    seconds: float
    nbytes: int
    bandwidth: float


@torch.inference_mode()
def decode_speed(layer: AttentionLayer, spec: KVSpec, fmt: KVFormat, num_seqs: int, context: int) -> DecodeSpeed:
    """Time decode attention on the current CUDA device, for `num_seqs` sequences of `context` tokens each.

    Raises:
        CapacityError: the GPU cannot hold them.
        UnsupportedError: the kernels do not take this format, with the reason.
    """
    kinds = tuple(dict.fromkeys(fmt.layers))  # each is timed once, for all layers of its kind
    held = _layout(spec, fmt, kinds).bytes_for([context] * num_seqs)
    copies = math.ceil(FOOTPRINT / held)
    layout = _layout(spec, fmt, kinds * copies)
    try:
        bandwidth = read_bandwidth()
        store, batch = _filled_store(layout, num_seqs, context)
        q = torch.randn(num_seqs, layer.num_heads, layer.head_dim, dtype=DTYPE, device="cuda")
        backends = [_capturable(layer, kv) for kv in store.layers[: len(kinds)]]

        def decode(index: int) -> Tensor:
            kv, backend = store.layers[index], backends[index % len(kinds)]
            out = backend.forward(rotated_queries(q, kv, layer), None, kv, batch, layer)
            return hadamard(out) if kv.value.format.rotate else out

        per_kind = [graph_seconds(decode, range(i, len(layout.format.layers), len(kinds))) for i in range(len(kinds))]
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"the GPU cannot hold {num_seqs} sequences of {context} tokens; lower --batch or --context"
        ) from error
    return DecodeSpeed(
        seconds=sum(per_kind[kinds.index(kind)] for kind in fmt.layers),
        nbytes=num_seqs * step_bytes(_layout(spec, fmt, fmt.layers), context),
        bandwidth=bandwidth,
    )


def _capturable(layer: AttentionLayer, kv: LayerKV) -> AttentionBackend:
    """The backend that runs by default; where no graph can hold that, an error that says why no kernel takes `kv`."""
    backend = select(layer, kv)
    return backend if backend.decode.is_capturable else select(layer, kv, "triton")


def step_bytes(layout: KVLayout, context: int) -> int:
    """Bytes that the query at the last of `context` positions must read, in all layers."""
    fmt, spec = layout.format, layout.spec
    far = min(fmt.visible(context - 1), context)
    return far * layout.block_bytes // fmt.block_size + (context - far) * spec.elements * spec.element_size


def graph_seconds(run: Callable[[int], object], indices: range) -> float:
    """Mean seconds of `run(index)`, from a CUDA graph of all `indices`."""
    run(indices[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in indices:
            run(index)
    return replay_seconds(graph.replay) / len(indices)


def replay_seconds(run: Callable[[], object]) -> float:
    """Mean seconds of `run()` on the GPU, whose clock has risen as it does under load."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_SECONDS:
        run()
        torch.cuda.synchronize()
    start.record()
    for _ in range(REPLAYS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / REPLAYS


def read_bandwidth() -> float:
    """Bytes per second that the current CUDA device reads: those of a plain sum."""
    x = torch.ones(FOOTPRINT // 4, device="cuda")
    return x.nbytes / replay_seconds(x.sum)


def _layout(spec: KVSpec, fmt: KVFormat, layers: tuple[LayerFormat, ...]) -> KVLayout:
    """Of a cache with these layers, in the model's own precision on a GPU."""
    sized = replace(spec, num_layers=len(layers), element_size=DTYPE.itemsize)
    return KVLayout(sized, KVFormat(layers, fmt.block_size, fmt.residual))


def _filled_store(layout: KVLayout, num_seqs: int, context: int) -> tuple[KVStore, KVBatch]:
    """A store whose blocks lie in no order, and a batch of everybody's last token."""
    per_seq = layout.format.num_blocks(context)
    store = KVStore(layout, num_seqs * per_seq, num_seqs, DTYPE, "cuda")
    fill(store)
    ids = torch.randperm(num_seqs * per_seq).tolist()
    spans = [Span(context - 1, context, ids[i * per_seq : (i + 1) * per_seq], i) for i in range(num_seqs)]
    return store, KVBatch.build(layout.format, spans, "cuda")


def fill(store: KVStore) -> None:
    """Numbers that a model could have written: what bytes hold changes how fast a GPU runs."""
    store.tails.view(store.dtype).normal_()
    store.blocks.random_(0, 256)
    for layer in store.layers:
        for stream in (layer.key, layer.value):
            for name, array in stream.arrays.items():
                if array.dtype != torch.uint8:
                    array.normal_() if name == "codes" else array.fill_(0.02 if name == "scale" else -1.0)
