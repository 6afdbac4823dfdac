"""Single queries straight from integer codes by a kernel in CUDA C++, which NVRTC compiles for the GPU at hand."""

from torch import Tensor

from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import LayerKV

try:
    from kvtool.kernels import cuda_decode, nvrtc
except ModuleNotFoundError:  # torch for CPU comes without triton, which merges
    cuda_decode = nvrtc = None  # type: ignore[assignment]


class CudaDecode:
    """The single queries of all sequences in one launch, whatever their lengths."""

    is_capturable = True

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        device = kv.key.tail.device.type
        if device != "cuda":
            return f"it needs an NVIDIA GPU, not {device}"
        if cuda_decode is None:
            return "triton is not installed"
        return cuda_decode.refuses(kv.key.packed, kv.value.packed, layer.num_heads) or nvrtc.refuses_to_compile()

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        n = batch.num_decodes
        cuda_decode.paged_decode(
            q,
            kv.key.packed,
            kv.value.packed,
            batch.block_table[:n],
            batch.positions[:n],
            batch.visible[:n],
            batch.tail_slots[:n],
            kv.arrivals,
            scale=layer.scale,
            sliding_window=layer.sliding_window,
            out=out,
        )
