"""Attention over the KV store in plain torch: runs everywhere, and is what users without a GPU get."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer, operands
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.store import LayerKV, Near, Stream


class TorchAttention:
    """Decodes what a step reads and leaves the rest to torch; the single queries of all sequences go together."""

    is_capturable = captures_prompts = False

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
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
        assert batch.prompts
        n = batch.num_decodes
        spans = zip(batch.spans[n:], batch.block_table[n:], batch.prompts.spans.tolist(), strict=True)
        for span, blocks, (token, _, _, first_near, row) in spans:
            chunk = slice(token - n, token - n + span.length)
            queries = q[chunk] if isinstance(q, Tensor) else q.rows(chunk)
            if near is None:
                out[chunk] = _packed_chunk(queries, kv, blocks, span, layer)
            else:
                rows = slice(row, row + span.end - first_near)
                visible = None if kv.is_exact else batch.visible[token : token + span.length]
                own = Near(near.key[rows], near.value[rows])
                out[chunk] = _chunk(queries, own, first_near, kv, blocks, visible, span, layer)

    def decode(self, q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer, out: Tensor) -> None:
        n = q.shape[0]
        blocks, at = batch.decode_columns
        window = layer.sliding_window
        first = 0 if window is None else (batch.positions[:n, None] + 1 - window).clamp_(min=0)

        def columns(stream: Stream) -> Tensor:
            parts = [stream.read_blocks(blocks, q.dtype)] if blocks.numel() else []
            if not kv.format.packs_on_write:
                parts.append(stream.tail[batch.tail_slots[:n]])
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

        # A KV head's queries stand where sdpa expects positions: they read the same keys under the same mask.
        heads = q.reshape(n, layer.num_kv_heads, -1, q.shape[-1])
        key, value = operands(columns(kv.key), columns(kv.value), layer)
        attended = F.scaled_dot_product_attention(
            heads, key, value, attn_mask=(at >= first)[:, None, None], scale=layer.scale
        )
        out.copy_(attended.reshape(n, layer.num_heads, -1))


def _chunk(
    q: Tensor | LatentQueries,
    near: Near,
    first_near: int,
    kv: LayerKV,
    blocks: Tensor,
    visible: Tensor | None,
    span: Span,
    layer: AttentionLayer,
) -> Tensor:
    """Queries `q` [n, Hq, D] of one span: each reads blocks below its own v(t), and full precision from there on.

    `visible` [n] is None where blocks and full precision are the same: then blocks are read below the first near token.
    """
    width = first_near if visible is None else kv.format.visible(span.end - 1)
    device = blocks.device
    far_key, far_value = _read_span(kv, blocks, width, q.dtype)
    position = torch.arange(span.start, span.end, device=device)[:, None]
    far_at, near_at = torch.arange(width, device=device), torch.arange(first_near, span.end, device=device)
    from_near = torch.full_like(position, first_near) if visible is None else visible[:, None]
    mask = torch.cat([far_at < from_near, (near_at >= from_near) & (near_at <= position)], dim=1)
    mask &= _in_window(torch.cat([far_at, near_at]), position, layer)
    key = torch.cat([far_key, near.key.transpose(0, 1)], dim=1)
    value = torch.cat([far_value, near.value.transpose(0, 1)], dim=1)
    return _attend(q, key, value, mask, layer)


def _packed_chunk(q: Tensor | LatentQueries, kv: LayerKV, blocks: Tensor, span: Span, layer: AttentionLayer) -> Tensor:
    """Queries of one span where everything, the span itself included, is read from blocks."""
    key, value = _read_span(kv, blocks, span.end, q.dtype)
    at = torch.arange(span.end, device=blocks.device)
    position = torch.arange(span.start, span.end, device=blocks.device)[:, None]
    return _attend(q, key, value, (at <= position) & _in_window(at, position, layer), layer)


def _read_span(kv: LayerKV, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decoded keys and values of the first `length` positions, [Hkv, length, D]."""
    used = blocks[None, : -(-length // kv.format.block_size)]
    return kv.key.read_blocks(used, dtype)[0, :, :length], kv.value.read_blocks(used, dtype)[0, :, :length]


def _attend(q: Tensor | LatentQueries, key: Tensor, value: Tensor, mask: Tensor, layer: AttentionLayer) -> Tensor:
    if isinstance(q, LatentQueries):
        key, value = q.expanded(key[0], value[0])
        q = torch.cat([q.nope, q.rope], dim=-1)
    else:
        key, value = operands(key, value, layer)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], key[None], value[None], attn_mask=mask, scale=layer.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _in_window(at: Tensor, position: Tensor, layer: AttentionLayer) -> Tensor | bool:
    return True if layer.sliding_window is None else at > position - layer.sliding_window
