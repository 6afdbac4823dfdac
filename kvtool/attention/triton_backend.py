"""Attention over the KV store in Triton: single queries straight from packed codes."""

from torch import Tensor

from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import LayerKV, Stream

try:
    from kvtool.kernels import decode as kernels
except ModuleNotFoundError:  # torch for CPU comes without triton
    kernels = None  # type: ignore[assignment]


class TritonDecode:
    """The single queries of all sequences in one launch and a merge, whatever their lengths."""

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        if kernels is None:
            return "triton is not installed"
        device = kv.key.tail.device.type
        if device != "cuda" and not kernels.INTERPRETED.value:
            return f"it needs an NVIDIA GPU, not {device}"
        reason: str | None = kernels.refuses(_packed(kv.key), _packed(kv.value), layer.num_heads)
        return reason

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer) -> Tensor:
        n = batch.num_decodes
        out: Tensor = kernels.paged_decode(
            q,
            _packed(kv.key),
            _packed(kv.value),
            batch.block_table[:n],
            batch.positions[:n],
            batch.visible[:n],
            batch.tail_slots[:n],
            scale=layer.scale,
            sliding_window=layer.sliding_window,
        )
        return out


def _packed(stream: Stream) -> "kernels.PackedStream":
    fmt, arrays = stream.format, stream.arrays
    return kernels.PackedStream(
        fmt.bits, fmt.axis, fmt.group, arrays["codes"], arrays.get("scale"), arrays.get("zero"), stream.tail
    )
