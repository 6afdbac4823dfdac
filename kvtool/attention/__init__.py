"""Attention over the KV store: the table of backends, and the one call that a decoder layer makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvtool.attention.cuda_backend import CudaDecode
from kvtool.attention.flash_backend import PAGE, FlashAttention
from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.queries import Queries, rotated
from kvtool.attention.torch_backend import TorchAttention
from kvtool.attention.triton_backend import TritonDecode, TritonPrefill
from kvtool.errors import UnsupportedError
from kvtool.kernels.rotary_heads import RotaryHeads
from kvtool.kv.batch import KVBatch
from kvtool.kv.format import BLOCK_SIZE
from kvtool.kv.hadamard import hadamard
from kvtool.kv.store import KVStore, LayerKV, Near
from kvtool.ranges import Range


class Prefill(Protocol):
    """Attention of spans of several queries.

    Attributes:
        captures_prompts: it looks at no value on the host, so that a CUDA graph can hold it.
    """

    captures_prompts: bool

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        """Why this cannot run `layer` on `kv`, or None if it can."""

    def prefill(
        self,
        q: Tensor | LatentQueries,
        near: Near | None,
        kv: LayerKV,
        batch: KVBatch,
        layer: AttentionLayer,
        out: Tensor,
    ) -> None:
        """Attention of `q` [T, Hq, D], from `batch.first_prompt` on, over what `kv.write` has stored, into `out`.

        Latents it expands for queries that have not absorbed the products; those are rotated as latents and rope keys
        are, and `out` is [T, Hq, D of values].
        """


class Decode(Protocol):
    """Attention of the single queries of all sequences.

    Attributes:
        is_capturable: it looks at no value on the host, so that a CUDA graph can hold it.
    """

    is_capturable: bool

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        """Why this cannot run `layer` on `kv`, or None if it can."""

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        """Attention of `q` [batch.num_decodes, Hq, D] over what `kv.write` has stored, into `out`."""


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over the store, composed of two.

    Attributes:
        name: as in --attention-backend.
        block_size: tokens that it wants in a block of 16-bit KV.
    """

    name: str
    prefill: Prefill
    decode: Decode
    block_size: int = BLOCK_SIZE

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        """Why this backend cannot run `layer` on `kv`, or None if it can."""
        return self.decode.refuses(layer, kv) or self.prefill.refuses(layer, kv)

    def forward(self, q: Tensor, near: Near | None, kv: LayerKV, batch: KVBatch, layer: AttentionLayer) -> Tensor:
        """Attention of `q` [T, Hq, D] over what `kv.write` has stored, as [T, Hq, D of values]."""
        dim = layer.head_dim if layer.latent_dim is None else layer.latent_dim
        n, first = batch.num_decodes, batch.first_prompt
        out = torch.empty(*q.shape[:2], dim, dtype=q.dtype, device=q.device)
        if n:
            self.decode.decode(q[:n], kv, batch, layer, out[:n])
        if first < len(q):  # behind decodes, which may write anything for what is nobody's
            self.prefill.prefill(q[first:], near, kv, batch, layer, out[first:])
        return out


BACKENDS = (  # best first
    AttentionBackend("flash-attn", prefill=FlashAttention(), decode=FlashAttention(), block_size=PAGE),
    AttentionBackend("cuda", prefill=TritonPrefill(), decode=CudaDecode()),
    AttentionBackend("triton", prefill=TritonPrefill(), decode=TritonDecode()),
    AttentionBackend("torch", prefill=TorchAttention(), decode=TorchAttention()),
)


def block_size(asked: str) -> int:
    """Tokens of a 16-bit block for the backend `asked` for; `resolve` takes it."""
    return next((backend.block_size for backend in BACKENDS if backend.name == asked), BLOCK_SIZE)


def select(layer: AttentionLayer, kv: LayerKV, asked: str = "auto") -> AttentionBackend:
    """The first backend that takes this layer.

    Raises:
        UnsupportedError: with every backend's reason.
    """
    refusals = {}
    for backend in BACKENDS:
        if asked in ("auto", backend.name):
            reason = backend.refuses(layer, kv)
            if reason is None:
                return backend
            refusals[backend.name] = reason
    if not refusals:
        known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise UnsupportedError(f"--attention-backend {asked}: must be one of {known}")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    hint = "" if asked == "auto" else "; --attention-backend auto takes one that can"
    raise UnsupportedError(f"no attention backend for {layer.describe()}: {reasons}{hint}")


# An H200 takes 206 µs a layer for 1,024 absorbed tokens of 16 heads. For half as many it is no more than what a graph
# saves in launches; where exactly that ends was not timed.
ABSORBED_TOKENS = 512


class PagedAttention:
    """All attention layers of a model over one store; called with a layer's index, queries, keys and values."""

    def __init__(self, store: KVStore, layers: Sequence[AttentionLayer], asked: str = "auto") -> None:
        self.store, self.layers = store, layers
        self.backends = [select(layer, kv, asked) for layer, kv in zip(layers, store.layers, strict=True)]

    @property
    def is_capturable(self) -> bool:
        """Decode steps look at no value on the host, so that a CUDA graph can hold them."""
        return all(b.decode.is_capturable for b in self.backends) and all(kv.writer for kv in self.store.layers)

    @property
    def captured_tokens(self) -> int | None:
        """Most tokens of prompts in a step that a CUDA graph should hold; None: any number.

        A graph does not know what contexts there will be, so over latents it absorbs: longer prompts expand outside.
        """
        if not self.is_capturable or not all(b.prefill.captures_prompts for b in self.backends):
            return 0
        return ABSORBED_TOKENS if any(layer.latent_dim is not None for layer in self.layers) else None

    def __call__(self, index: int, q: Queries, key: Tensor, value: Tensor, batch: KVBatch) -> Tensor:
        """Store this step's `key` and `value` [T, Hkv, D] and attend with `q` [T, Hq, D]; returns [T, Hq, D].

        Rotary heads become ready here, on a GPU in the kernel that stores them, where nothing else reads their keys.
        Streams that are stored rotated are rotated here, once: keys and queries alike, values on the way in and the
        output back.
        """
        kv = self.store.layers[index]
        with Range("kvtool::write"):
            ready, near = self._store(kv, q, key, value, batch)
        with Range("kvtool::attention"):
            return self._attend(index, ready, near, batch)

    def _store(
        self, kv: LayerKV, q: Queries, key: Tensor, value: Tensor, batch: KVBatch
    ) -> tuple[Tensor | LatentQueries, Near | None]:
        """Queries that are ready, and what `kv.write` returns."""
        if isinstance(q, RotaryHeads):
            if kv.rotates(batch):
                return kv.rotate_and_write(q, batch)
            q, key = rotated(q)
        if kv.key.format.rotate:
            key = hadamard(key)
        if kv.value.format.rotate:
            value = hadamard(value)
        return q, kv.write(key, value, batch)

    def _attend(self, index: int, q: Tensor | LatentQueries, near: Near | None, batch: KVBatch) -> Tensor:
        kv = self.store.layers[index]
        if not isinstance(q, LatentQueries):
            return self._forward(index, q, near, batch)
        if not batch.prompts or not q.expand(batch.prompts.spans):
            return q.values(self._forward(index, q.absorbed(), near, batch))
        n, out = batch.num_decodes, q.empty()
        if n:
            decodes = q.rows(slice(n))
            out[:n] = decodes.values(self._forward(index, decodes.absorbed(), None, batch))
        prompts = q.rows(slice(n, None)).rotated(key=kv.key.format.rotate, latent=kv.value.format.rotate)
        self.backends[index].prefill.prefill(prompts, near, kv, batch, self.layers[index], out[n:])
        return out

    def _forward(self, index: int, q: Tensor, near: Near | None, batch: KVBatch) -> Tensor:
        layer, kv = self.layers[index], self.store.layers[index]
        out = self.backends[index].forward(rotated_queries(q, kv, layer), near, kv, batch, layer)
        return hadamard(out) if kv.value.format.rotate else out


def rotated_queries(q: Tensor, kv: LayerKV, layer: AttentionLayer) -> Tensor:
    """`q` [T, Hq, D] as it meets streams that may be stored rotated."""
    if layer.latent_dim is None:
        return hadamard(q) if kv.key.format.rotate else q
    parts = q.split([layer.latent_dim, layer.head_dim - layer.latent_dim], dim=-1)
    streams = (kv.value, kv.key)
    if not any(stream.format.rotate for stream in streams):
        return q
    return torch.cat([hadamard(x) if s.format.rotate else x for x, s in zip(parts, streams, strict=True)], dim=-1)
