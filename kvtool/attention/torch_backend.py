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
    n, slots = q.shape[0], batch.tail_slots[: q.shape[0]]
    blocks, at = batch.decode_columns
    heads = (q * layer.scale).view(n, layer.num_kv_heads, -1, q.shape[-1])
    scores = []
    if blocks.numel():
        far = heads[:, None] @ kv.key.read_blocks(blocks, q.dtype).transpose(-1, -2)  # [n, width, Hkv, G, B]
        scores.append(far.permute(0, 2, 3, 1, 4).flatten(-2))
    if not kv.format.packs_on_write:
        scores.append(heads @ kv.key.tail[slots].transpose(-1, -2))
    first = 0 if layer.sliding_window is None else (batch.positions[:n, None] + 1 - layer.sliding_window).clamp_(min=0)
    masked = torch.cat(scores, -1).masked_fill_((at < first)[:, None, None], float("-inf"))
    probs = masked.softmax(-1, dtype=_softmax_dtype(q)).to(q.dtype)
    columns = blocks.shape[1] * kv.format.block_size
    outs = []
    if blocks.numel():
        far = probs[..., :columns].unflatten(-1, (-1, kv.format.block_size)).permute(0, 3, 1, 2, 4)
        outs.append((far @ kv.value.read_blocks(blocks, q.dtype)).sum(1))
    if not kv.format.packs_on_write:
        outs.append(probs[..., columns:] @ kv.value.tail[slots])
    out: Tensor = outs[0] if len(outs) == 1 else outs[0] + outs[1]
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
