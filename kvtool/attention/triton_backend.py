"""Attention over the KV store in Triton: single queries straight from packed codes, prompts over decoded blocks.

Latents (MLA) have kernels of their own.
"""

from torch import Tensor

from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import LayerKV, Near

try:
    from kvtool.kernels import decode, launch, mla_decode, mla_expanded, mla_prefill, prefill
except ModuleNotFoundError:  # torch for CPU comes without triton
    decode = launch = prefill = mla_decode = mla_expanded = mla_prefill = None  # type: ignore[assignment]


class TritonPrefill:
    """The queries of all spans in one launch, behind one that decodes the blocks they read."""

    captures_prompts = True

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        if layer.latent_dim is not None:
            return _not_here(kv) or mla_decode.refuses(kv.key.packed, kv.value.packed)
        return _not_here(kv) or prefill.refuses(kv.key.packed, kv.value.packed, layer.num_heads)

    def prefill(
        self,
        q: Tensor | LatentQueries,
        near: Near | None,
        kv: LayerKV,
        batch: KVBatch,
        layer: AttentionLayer,
        out: Tensor,
    ) -> None:
        prompts = batch.prompts
        assert prompts
        if isinstance(q, LatentQueries):
            contexts = batch.contexts(older=kv.is_exact)
            mla_expanded.expanded_prefill(
                q.nope,
                q.rope,
                q.products,
                near.key if near else None,
                near.value if near else None,
                kv.key.packed,
                kv.value.packed,
                contexts.blocks,
                contexts.firsts,
                prompts.tiles,
                batch.visible,
                is_exact=kv.is_exact,
                num_decodes=batch.num_decodes,
                scale=layer.scale,
                out=out,
            )
            return
        given = (
            q,
            near.key if near else None,
            near.value if near else None,
            kv.key.packed,
            kv.value.packed,
            batch.prompt_table if kv.is_exact else prompts.far_table,
            None if kv.is_exact else prompts.far_blocks,
            prompts.tiles,
            batch.visible,
        )
        first, scale, window = batch.first_prompt, layer.scale, layer.sliding_window
        if layer.latent_dim is not None:
            mla_prefill.latent_prefill(*given, first_token=first, scale=scale, out=out)
        else:
            prefill.paged_prefill(*given, kv.arrivals, first_token=first, scale=scale, sliding_window=window, out=out)


class TritonDecode:
    """The single queries of all sequences in one launch and a merge, whatever their lengths."""

    is_capturable = True

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        if layer.latent_dim is not None:
            return _not_here(kv) or mla_decode.refuses(kv.key.packed, kv.value.packed)
        return _not_here(kv) or decode.refuses(kv.key.packed, kv.value.packed, layer.num_heads)

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        given = q, kv.key.packed, kv.value.packed, *batch.decodes
        if layer.latent_dim is not None:
            mla_decode.latent_decode(*given, scale=layer.scale, out=out)
        else:
            decode.paged_decode(*given, scale=layer.scale, sliding_window=layer.sliding_window, out=out)


def _not_here(kv: LayerKV) -> str | None:
    if decode is None:
        return "triton is not installed"
    device = kv.key.tail.device.type
    return None if device == "cuda" or launch.INTERPRETED.value else f"it needs an NVIDIA GPU, not {device}"
