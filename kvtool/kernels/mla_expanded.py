"""Prefill attention over keys and values that are made of latents (MLA, expanded), of all spans of a step.

One product makes them of what a span reads at full precision, another of what stands in blocks, decoded before: a piece
at a time, so that a long context needs no more memory than a short one. What came of earlier pieces is where the next
one goes on. A program has queries of one head as rows; the rope key is one for all heads and is nowhere repeated.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import capability, next_power_of_2, num_sms
from kvtool.kernels.streams import PackedStream
from kvtool.kernels.tiles import Tile, first_near, gather, load_keys, tile_at
from kvtool.kernels.unpack import unpack_stream

WORKSPACE = 128 << 20  # bytes of a piece: of decoded blocks, and of the keys and values that are made of them

# By compute capability: for steps that fill the device, and for those that do not. What compiles without spills; none
# was timed yet.
TILES: dict[int, tuple[Tile, Tile]] = {
    8: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    9: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
}


def expanded_prefill(
    nope: Tensor,
    rope: Tensor,
    products: Tensor,
    near_key: Tensor | None,
    near_value: Tensor | None,
    key: PackedStream,
    value: PackedStream,
    blocks: Tensor,
    firsts: Tensor,
    tiles: Callable[[int], Tensor],
    visible: Tensor,
    *,
    is_exact: bool,
    num_decodes: int,
    scale: float,
    out: Tensor,
) -> None:
    """Attention of the spans behind the decodes over latents, through keys and values of all heads.

    Agrees with `TorchAttention` in float64 to a relative error of 5e-3 in bf16.

    Args:
        nope, rope: [T, H, N] and [T, H, R] bf16 or fp16, of the tokens behind the decodes.
        products: [H, N + V, L], as in `kvtool.attention.latents.LatentQueries`.
        near_key, near_value: [n, 1, R] and [n, 1, L], or None where blocks hold everything.
        blocks, firsts: `kvtool.kv.batch.Contexts`: of older tokens only where `is_exact`.
        is_exact: blocks give back what was written, and are read below a span's first token.
        tiles, visible, scale: as in `kvtool.kernels.prefill.paged_prefill`.
        out: [T, H, V], contiguous, where the result goes.
    """
    heads, width, latent = products.shape
    rope_dim, block_size, made_width = rope.shape[2], value.codes.shape[2], heads * width
    weight = products.reshape(made_width, latent)
    near = (rope, rope) if near_key is None or near_value is None else (F.linear(near_value[:, 0], weight), near_key)
    # The same memory whatever there is to read, so that it is counted in a step without context, too.
    room = max(1, WORKSPACE // (nope.itemsize * block_size * (made_width + latent + rope_dim)))
    made = nope.new_empty(room * block_size, made_width)
    ropes, latents = (nope.new_empty(room, 1, block_size, dim) for dim in (rope_dim, latent))
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    large, small = TILES[capability(nope.device)]
    tile = large if -(-len(nope) // large.rows) * heads >= num_sms(nope.device) else small
    cut = tiles(tile.rows)
    for first in range(0, max(1, len(blocks)), room):
        piece = blocks[first : first + room]
        rows = len(piece) * block_size
        unpack_stream(key, piece, ropes)
        unpack_stream(value, piece, latents)
        torch.mm(latents.view(-1, latent)[:rows], weight.T, out=made[:rows])
        _expanded_kernel[(len(cut) * heads,)](
            nope,
            rope,
            out,
            lse,
            *near,
            made,
            ropes,
            cut,
            firsts,
            visible,
            scale * 1.4426950408889634,  # exp2 is what the hardware has
            num_decodes,
            *nope.stride()[:2],
            *rope.stride()[:2],
            near[1].stride(0),
            first * block_size,
            rows,
            heads,
            M=tile.rows,
            N=tile.keys,
            BLOCK=block_size,
            NOPE=nope.shape[2],
            ROPE=rope_dim,
            VALUE=width - nope.shape[2],
            EXACT=is_exact,
            NEAR=near_key is not None,
            FIRST=first == 0,
            LAST=first + room >= len(blocks),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


@triton.jit(do_not_specialize=["num_decodes", "first_row", "num_rows", "heads"])
def _expanded_kernel(
    nope_ptr,
    rope_ptr,
    out_ptr,
    lse_ptr,
    near_made,
    near_ropes,
    far_made,
    far_ropes,
    tiles_ptr,
    firsts_ptr,
    visible_ptr,
    scale,
    num_decodes,
    nope_stride,
    nope_head_stride,
    rope_stride,
    rope_head_stride,
    near_rope_stride,
    first_row,
    num_rows,
    heads,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    EXACT: tl.constexpr,
    NEAR: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Program (tile, head) on one piece, rows `first_row` to `first_row + num_rows` of all contexts; the last piece is
    read together with what is at full precision. Other names are those of `kvtool.kernels.prefill`."""
    PAD: tl.constexpr = next_power_of_2(VALUE)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    span, token, t_first, t_last, near_first, near_row = tile_at(tiles_ptr, tile, M)
    far_row = (tl.load(firsts_ptr + span) * BLOCK - first_row).to(tl.int32)  # of position 0

    # Rows past the last query repeat it, and are not stored.
    row = tl.arange(0, M)
    position = tl.minimum(t_first + row, t_last)
    v_first, v_last, v = first_near(visible_ptr, token, t_first, t_last, position, near_first, EXACT, NEAR)

    line = token - num_decodes + position
    nope = _queries(nope_ptr + head * nope_head_stride, line, nope_stride, NOPE)
    rope = _queries(rope_ptr + head * rope_head_stride, line, rope_stride, ROPE)
    channel = tl.arange(0, PAD)[None, :]
    outs = out_ptr + (line * heads + head)[:, None] * VALUE + channel
    if FIRST:
        m = tl.full([M], -1e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, PAD], tl.float32)
    else:
        m = tl.load(lse_ptr + line * heads + head)
        total = tl.full([M], 1, tl.float32)
        acc = tl.load(outs, mask=channel < VALUE, other=0).to(tl.float32)
    state = (acc, m, total)
    to_log2 = tl.full([M], 1, tl.float32) * scale

    stride = heads * (NOPE + VALUE)
    far = (far_made + head * (NOPE + VALUE), far_ropes, stride, ROPE, far_row)
    begin = tl.maximum(0, -far_row)
    end = tl.minimum(v_last, num_rows - far_row)
    full = begin + tl.maximum(0, tl.minimum(v_first, end) - begin) // N * N
    none = tl.full([M], 0, tl.int32)
    state = _read(state, nope, rope, to_log2, far, begin, full, none, v, N, NOPE, ROPE, VALUE, False)
    state = _read(state, nope, rope, to_log2, far, full, end, none, v, N, NOPE, ROPE, VALUE, True)
    if NEAR and LAST:
        near = (near_made + head * (NOPE + VALUE), near_ropes, stride, near_rope_stride, near_row)
        past = position + 1
        full = v_first
        if EXACT:
            full += tl.maximum(t_first + 1 - v_first, 0) // N * N
            state = _read(state, nope, rope, to_log2, near, v_first, full, v, past, N, NOPE, ROPE, VALUE, False)
        state = _read(state, nope, rope, to_log2, near, full, t_last + 1, v, past, N, NOPE, ROPE, VALUE, True)
    acc, m, total = state

    is_query = t_first + row <= t_last
    total = tl.maximum(total, 1e-37)  # a piece may hold nothing of a span
    if not LAST:
        tl.store(lse_ptr + line * heads + head, m + tl.log2(total), mask=is_query)
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(outs, result, mask=is_query[:, None] & (channel < VALUE))


@triton.jit
def _queries(ptr, line, stride, D: tl.constexpr):
    """[M, D padded], zeros in the padding."""
    channel = tl.arange(0, next_power_of_2(D))[None, :]
    return tl.load(ptr + line[:, None] * stride + channel, mask=channel < D, other=0)


@triton.jit
def _read(
    state,
    nope,
    rope,
    to_log2,
    where,
    begin,
    end,
    v_from,
    v_to,
    N: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions `begin` to `end`; MASKED: each row those from `v_from` to below `v_to`."""
    acc, m, total = state
    made, ropes, made_stride, rope_stride, row = where
    for key in range(begin, end, N):
        keys = made + (row + key) * made_stride
        k = load_keys(keys, made_stride, end - key, N, NOPE, MASKED)
        k_rope = load_keys(ropes + (row + key) * rope_stride, rope_stride, end - key, N, ROPE, MASKED)
        v = load_keys(keys + NOPE, made_stride, end - key, N, VALUE, MASKED)
        at = (key + tl.arange(0, N))[None, :]
        keep = (at >= v_from[:, None]) & (at < v_to[:, None])
        s = tl.dot(nope, tl.trans(k), tl.dot(rope, tl.trans(k_rope)))
        acc, m, total = gather(acc, m, total, s, v, to_log2, keep, MASKED)
    return acc, m, total
