"""Attention over the KV store in plain torch: runs everywhere, and is what users without a GPU get."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention.layer import AttentionLayer
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.store import LayerKV, Near


class TorchAttention:
    """Decodes the blocks that a step reads and multiplies; the single queries of all sequences go together."""

    name = "torch"

    def refuses(self, layer: AttentionLayer, kv: LayerKV) -> str | None:
        return None

    def forward(self, q: Tensor, near: list[Near], kv: LayerKV, batch: KVBatch, layer: AttentionLayer) -> Tensor:
        n = batch.num_decodes
        outs = [_decodes(q[:n], kv, batch, layer)] if n else []
        for index, span in enumerate(batch.spans[batch.num_decodes :]):
            chunk = slice(n, n + span.length)
            far_blocks = batch.block_table[batch.num_decodes + index]
            if near:
                outs.append(_chunk(q[chunk], near[index], kv, far_blocks, batch.visible[chunk], span, layer))
            else:
                outs.append(_packed_chunk(q[chunk], kv, far_blocks, span, layer))
            n += span.length
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _decodes(q: Tensor, kv: LayerKV, batch: KVBatch, layer: AttentionLayer) -> Tensor:
    """One query per sequence, `q` [n, Hq, D], over its blocks below v(t) and its tail from v(t) to t."""
    n, size = q.shape[0], kv.format.block_size
    position, first_near = batch.positions[:n, None], batch.visible[:n, None]
    heads = (q * layer.scale).view(n, layer.num_kv_heads, -1, q.shape[-1])
    scores, seen = [], []
    width = max(-(-kv.format.visible(span.start) // size) for span in batch.spans[:n])
    blocks = batch.block_table[:n, :width]
    if width:
        keys = kv.key.read_blocks(blocks, q.dtype)  # [n, width, Hkv, B, D]
        far = heads[:, None] @ keys.transpose(-1, -2)
        scores.append(far.permute(0, 2, 3, 1, 4).flatten(-2))
        at = torch.arange(width * size, device=q.device)
        seen.append((at < first_near) & _in_window(at, position, layer))
    if not kv.format.packs_on_write:
        tail_keys = kv.key.tail[batch.tail_slots[:n]]  # [n, Hkv, rows, D]
        scores.append(heads @ tail_keys.transpose(-1, -2))
        rows = torch.arange(kv.format.tail_tokens, device=q.device)
        at = position - (position - rows) % kv.format.tail_tokens  # the newest position that each row can hold
        seen.append((at >= first_near) & _in_window(at, position, layer))
    mask = torch.cat(seen, -1)[:, None, None]
    probs = torch.cat(scores, -1).masked_fill(~mask, float("-inf")).softmax(-1, dtype=_softmax_dtype(q)).to(q.dtype)
    out = torch.zeros_like(heads)
    if width:
        far = probs[..., : width * size].unflatten(-1, (width, size)).permute(0, 3, 1, 2, 4)
        out = (far @ kv.value.read_blocks(blocks, q.dtype)).sum(1)
    if not kv.format.packs_on_write:
        out = out + probs[..., width * size :] @ kv.value.tail[batch.tail_slots[:n]]
    return out.view(n, layer.num_heads, -1)


def _chunk(
    q: Tensor, near: Near, kv: LayerKV, blocks: Tensor, visible: Tensor, span: Span, layer: AttentionLayer
) -> Tensor:
    """Queries `q` [n, Hq, D] of one span: each reads blocks below its own v(t), and full precision from there on."""
    width = kv.format.visible(span.end - 1)
    far_key, far_value = _read_span(kv, blocks, width, q.dtype)
    position = torch.arange(span.start, span.end, device=q.device)[:, None]
    far_at, near_at = torch.arange(width, device=q.device), torch.arange(near.first, span.end, device=q.device)
    first_near = visible[:, None]
    mask = torch.cat([far_at < first_near, (near_at >= first_near) & (near_at <= position)], dim=1)
    mask &= _in_window(torch.cat([far_at, near_at]), position, layer)
    key, value = torch.cat([far_key, near.key], dim=1), torch.cat([far_value, near.value], dim=1)
    return _attend(q, key, value, mask, layer)


def _packed_chunk(q: Tensor, kv: LayerKV, blocks: Tensor, span: Span, layer: AttentionLayer) -> Tensor:
    """Queries of one span where everything, the span itself included, is read from blocks."""
    key, value = _read_span(kv, blocks, span.end, q.dtype)
    at = torch.arange(span.end, device=q.device)
    position = torch.arange(span.start, span.end, device=q.device)[:, None]
    return _attend(q, key, value, (at <= position) & _in_window(at, position, layer), layer)


def _read_span(kv: LayerKV, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decoded keys and values of the first `length` positions, [Hkv, length, D]."""
    used = blocks[: -(-length // kv.format.block_size)]
    key, value = (stream.read_blocks(used, dtype).transpose(0, 1).flatten(1, 2) for stream in (kv.key, kv.value))
    return key[:, :length], value[:, :length]


def _attend(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: AttentionLayer) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], key[None], value[None], attn_mask=mask, scale=layer.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _in_window(at: Tensor, position: Tensor, layer: AttentionLayer) -> Tensor | bool:
    return True if layer.sliding_window is None else at > position - layer.sliding_window


def _softmax_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
