"""Attention over a 16-bit KV store by flash-attn (Dao-AILab/flash-attention 2.8), where it is installed."""

import torch
from torch import Tensor

from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import LayerKV, Near

PAGE = 256  # tokens of a block: its paged calls take multiples of it
MAX_HEAD_DIM = 256


class FlashAttention:
    """Blocks of 256 tokens are its pages; a step of whole prompts reads their own keys and no page."""

    is_capturable = True
    captures_prompts = False

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        codes = kv.key.arrays["codes"]
        if layer.latent_dim is not None:
            return "it reads no latents"
        if not kv.is_exact:
            return "it reads 16-bit KV only, without a residual window"
        if codes.device.type != "cuda" or torch.cuda.get_device_capability(codes.device) < (8, 0):
            return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {codes.device.type}"
        if codes.dtype not in (torch.bfloat16, torch.float16):
            return f"it runs in bfloat16 or float16, not {str(codes.dtype).removeprefix('torch.')}"
        if layer.head_dim % 8 or layer.head_dim > MAX_HEAD_DIM:
            return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, not {layer.head_dim}"
        if kv.format.block_size % PAGE:
            return f"its pages hold {PAGE} tokens, these blocks {kv.format.block_size}; ask for it by name to get them"
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
            return "flash-attn is not installed" if missing else f"flash-attn does not load: {error}"
        return None

    def prefill(
        self,
        q: Tensor | LatentQueries,
        near: Near | None,
        kv: LayerKV,
        batch: KVBatch,
        layer: AttentionLayer,
        out: Tensor,
    ) -> None:
        from flash_attn import flash_attn_varlen_func

        prompts = batch.prompts
        assert near and prompts and isinstance(q, Tensor)
        _, starts, ends = prompts.spans.T[:3]
        cu_seqlens_q, cu_seqlens_k = prompts.cu_seqlens
        whole = not starts.any()
        key, value = (near.key, near.value) if whole else (_pages(kv.key.arrays), _pages(kv.value.arrays))
        attended = flash_attn_varlen_func(
            q,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=int((ends - starts).max()),
            max_seqlen_k=int(ends.max()),
            softmax_scale=layer.scale,
            causal=True,
            window_size=_window(layer),
            block_table=None if whole else batch.pages[batch.num_decodes :],
        )
        out.copy_(attended)

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        from flash_attn import flash_attn_with_kvcache

        attended = flash_attn_with_kvcache(
            q[:, None],
            _pages(kv.key.arrays),
            _pages(kv.value.arrays),
            cache_seqlens=batch.decode_lengths,
            block_table=batch.pages[: batch.num_decodes],
            softmax_scale=layer.scale,
            causal=True,
            window_size=_window(layer),
        )
        out.copy_(attended[:, 0])


def _pages(arrays: dict[str, Tensor]) -> Tensor:
    """[num_blocks, B, Hkv, D], a view."""
    return arrays["codes"].transpose(1, 2)


def _window(layer: AttentionLayer) -> tuple[int, int]:
    """Positions to the left and right of a query's own; -1 is all."""
    return (-1 if layer.sliding_window is None else layer.sliding_window - 1, 0)
