"""What a decode step's latent attention takes in its different forms, on the same weights and tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention import BACKENDS, AttentionBackend, rotated_queries
from kvtool.attention.layer import AttentionLayer
from kvtool.config import Bits, KVOptions
from kvtool.errors import CapacityError, ConfigError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.hadamard import hadamard
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore, LayerKV, Stream
from kvtool.quantize.decode_speed import read_bandwidth, step_bytes
from kvtool.sizing.shapes import ModelShape
from kvtool.sizing.theory import kv_format, schemes_of

BITS: tuple[Bits, ...] = ("16", "8", "4")  # of latents
FLUSHED = 256 << 20  # bytes written before each run on a GPU, so that nothing is found in a cache
AHEAD = 20  # times: all of a run is launched by then, and what is timed waits for no host
RUNS, WARMUP = 20, 3


@dataclass(frozen=True)
class Latency:
    """One form of attention.

    Attributes:
        form: what is done; `cache`: what is read.
        seconds: median of runs.
        nbytes: that must be read: of the cache, and of the products that make keys and values of latents.
        floor: seconds that reading them takes at the rate of a plain sum.
        error: of the output, relative to the norm of that in float64.
    """

    form: str
    cache: str
    seconds: float
    nbytes: int
    floor: float
    error: float

    @property
    def share(self) -> float:
        """Of the bandwidth."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class Step:
    """The decode step of one layer.

    Attributes:
        nope, rope: queries [B, H, nope_dim] and [B, H, rope_dim], rotated.
        latents, keys: of all tokens, this one's last: [B, T, kv_lora_rank], [B, T, rope_dim].
        to_keys, to_values: the products [H, nope_dim, kv_lora_rank], [H, value_dim, kv_lora_rank].
        scale: of scores.
    """

    nope: Tensor
    rope: Tensor
    latents: Tensor
    keys: Tensor
    to_keys: Tensor
    to_values: Tensor
    scale: float

    @classmethod
    def random(cls, shape: ModelShape, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> "Step":
        """Latents are normed, so are these; products keep their size."""
        rank, heads = shape.value.dim, shape.num_heads

        def normal(*sizes: int, std: float = 1.0) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device).normal_(std=std)

        return cls(
            normal(batch, heads, shape.head_dim),
            normal(batch, heads, shape.key.dim),
            normal(batch, context, rank),
            normal(batch, context, shape.key.dim),
            normal(heads, shape.head_dim, rank, std=rank**-0.5),
            normal(heads, shape.value_dim, rank, std=rank**-0.5),
            (shape.head_dim + shape.key.dim) ** -0.5,
        )

    @property
    def product_bytes(self) -> int:
        return self.to_keys.nbytes + self.to_values.nbytes

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, nope_dim + rope_dim] and values [B, H, T, value_dim] of all heads."""
        nope = torch.einsum("btr,hnr->bhtn", self.latents, self.to_keys)
        shared = self.keys[:, None].expand(-1, self.to_keys.shape[0], -1, -1)
        return torch.cat([nope, shared], dim=-1), torch.einsum("btr,hvr->bhtv", self.latents, self.to_values)

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        """Over what `expanded` makes: [B, H, value_dim]."""
        q = torch.cat([self.nope, self.rope], dim=-1)[:, :, None]
        return F.scaled_dot_product_attention(q, keys, values, scale=self.scale)[:, :, 0]

    def absorbed(self, latents: Tensor, keys: Tensor) -> Tensor:
        """Over latents and rope keys as they are cached: each head's products go to its query and to its output, and
        attention is that of one key head (DeepSeek-V2, arXiv 2405.04434, 2.1.2): [B, H, value_dim]."""
        scores = torch.baddbmm(self.queries() @ latents.transpose(1, 2), self.rope, keys.transpose(1, 2))
        return self.values((scores.float() * self.scale).softmax(-1).to(latents.dtype) @ latents)

    def queries(self) -> Tensor:
        """As they meet latents: [B, H, kv_lora_rank]."""
        return torch.einsum("bhn,hnr->bhr", self.nope, self.to_keys)

    def values(self, gathered: Tensor) -> Tensor:
        """What heads have gathered of latents [B, H, kv_lora_rank], as values [B, H, value_dim]."""
        return torch.einsum("bhr,hvr->bhv", gathered, self.to_values)

    def reference(self) -> Tensor:
        """The output in float64, through keys and values of all heads, one sequence after the other."""
        to_keys, to_values = self.to_keys.double(), self.to_values.double()
        by_sequence = (x.double().split(1) for x in (self.nope, self.rope, self.latents, self.keys))
        parts = (
            Step(nope, rope, latents, keys, to_keys, to_values, self.scale)
            for nope, rope, latents, keys in zip(*by_sequence, strict=True)
        )
        return torch.cat([part.attend(*part.expanded()) for part in parts])


def latencies(shape: ModelShape, options: KVOptions, batch: int, context: int, device: torch.device) -> list[Latency]:
    """Time one layer's decode attention for `batch` sequences of `context` tokens each, in all forms.

    Raises:
        ConfigError: a model without latents.
        CapacityError: the device cannot hold them.
    """
    if not shape.has_latent:
        raise ConfigError(f"--section latency: {shape.name} is {shape.scheme} and has no latents; choose one with MLA")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return _latencies(shape, options, batch, context, device, dtype)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{device} cannot hold {batch} sequences of {context} tokens in all forms; lower --batch or --context"
        ) from error


@torch.inference_mode()
def _latencies(
    shape: ModelShape, options: KVOptions, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> list[Latency]:
    step = Step.random(shape, batch, context, dtype, device)
    expected = step.reference()
    bandwidth, on_gpu = bandwidth_of(device), device.type == "cuda"
    found = []

    def timed(form: str, cache: str, nbytes: int, run: Callable[[], Tensor]) -> None:
        error = float((run().double() - expected).norm() / expected.norm())
        found.append(Latency(form, cache, seconds_of(run, device), nbytes, nbytes / bandwidth, error))

    keys, values = step.expanded()
    timed("expanded", "keys and values", keys.nbytes + values.nbytes, partial(step.attend, keys, values))
    del keys, values
    nbytes = step.latents.nbytes + step.keys.nbytes + step.product_bytes
    timed("expanded anew", "latents", nbytes, lambda: step.attend(*step.expanded()))
    timed("absorbed, torch", "latents", nbytes, partial(step.absorbed, step.latents, step.keys))
    for nbits in BITS:
        latents = StoredLatents.of(step, native_layout(shape, replace(options, nbits=nbits), dtype))
        nbytes = batch * step_bytes(latents.layout, context) + step.product_bytes
        for backend in BACKENDS:
            if backend.decode.refuses(latents.attention, latents.kv) is None and (on_gpu or backend.name == "torch"):
                attend = partial(latents.attend, step, backend)
                timed(f"absorbed, {backend.name}", f"store of {nbits} bits", nbytes, attend)
    return found


def native_layout(shape: ModelShape, options: KVOptions, dtype: torch.dtype) -> KVLayout:
    """Of one layer's latents."""
    (latent,) = (scheme for scheme in schemes_of(shape, []) if scheme.native)
    return KVLayout(replace(latent.spec(1), element_size=dtype.itemsize), kv_format(options, latent, num_layers=1))


@dataclass(frozen=True)
class StoredLatents:
    """The latents and rope keys of a step in a store of one layer, and the batch of its queries."""

    layout: KVLayout
    kv: LayerKV
    batch: KVBatch
    attention: AttentionLayer

    @classmethod
    def of(cls, step: Step, layout: KVLayout) -> "StoredLatents":
        """Write them as prompts."""
        fmt, (batch, context, rank), device = layout.format, step.latents.shape, step.latents.device
        per_seq = fmt.num_blocks(context)
        (kv,) = KVStore(layout, batch * per_seq, batch, step.latents.dtype, device).layers
        blocks = torch.arange(batch * per_seq).view(batch, per_seq).tolist()
        for seq, (key, latent) in enumerate(zip(step.keys, step.latents, strict=True)):
            span = Span(0, context, blocks[seq], seq)
            kv.write(stored(key, kv.key), stored(latent, kv.value), KVBatch.build(fmt, [span], device))
        last = KVBatch.build(fmt, [Span(context - 1, context, ids, seq) for seq, ids in enumerate(blocks)], device)
        num_heads, rope_dim = step.rope.shape[1:]
        return cls(layout, kv, last, AttentionLayer(num_heads, 1, rank + rope_dim, step.scale, latent_dim=rank))

    def attend(self, step: Step, backend: AttentionBackend) -> Tensor:
        """What `Step.absorbed` does, by a backend from the store."""
        q = rotated_queries(torch.cat([step.queries(), step.rope], dim=-1), self.kv, self.attention)
        gathered = backend.forward(q, None, self.kv, self.batch, self.attention)
        return step.values(hadamard(gathered) if self.kv.value.format.rotate else gathered)


def stored(x: Tensor, stream: Stream) -> Tensor:
    """Tokens [T, D] of one head as `stream` takes them."""
    return hadamard(x[:, None]) if stream.format.rotate else x[:, None]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median of runs: of a GPU by its own clock, nothing being in its caches."""
    times = []
    flushed = torch.empty(FLUSHED if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    events = []
    for _ in range(WARMUP + RUNS):
        for _ in range(AHEAD):
            flushed.zero_()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        else:
            began = perf_counter()
            run()
            times.append(perf_counter() - began)
    if events:
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) / 1e3 for start, end in events]
    return median(times[WARMUP:])


def bandwidth_of(device: torch.device) -> float:
    """Bytes per second that a plain sum reads."""
    if device.type == "cuda":
        return read_bandwidth()
    x = torch.ones(64 << 20)
    return x.nbytes / seconds_of(x.sum, device)
