"""Single queries straight from integer codes by kernels in CUDA C++, which NVRTC compiles for the GPU at hand.

Latents (MLA) have a kernel of their own.
"""

import torch
from torch import Tensor

from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import LayerKV

try:
    from kvtool.kernels import cuda_decode, cuda_mla_decode, nvrtc
except ModuleNotFoundError:  # torch for CPU comes without triton, which merges
    cuda_decode = cuda_mla_decode = nvrtc = None  # type: ignore[assignment]


class CudaDecode:
    """The single queries of all sequences in one launch, whatever their lengths."""

    is_capturable = True

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        device = kv.key.tail.device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {device.type}"
        if cuda_decode is None:
            return "triton is not installed"
        streams = kv.key.packed, kv.value.packed
        if layer.latent_dim is not None:
            return cuda_mla_decode.refuses(*streams) or nvrtc.refuses_to_compile()
        return cuda_decode.refuses(*streams, layer.num_heads) or nvrtc.refuses_to_compile()

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        given = q, kv.key.packed, kv.value.packed, *batch.decodes, kv.arrivals
        if layer.latent_dim is not None:
            cuda_mla_decode.latent_decode(*given, scale=layer.scale, out=out)
        else:
            cuda_decode.paged_decode(*given, scale=layer.scale, sliding_window=layer.sliding_window, out=out)
