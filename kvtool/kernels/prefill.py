"""Prefill attention of all spans of a step in one launch: packed blocks below v(t), full precision from there to t.

Codes that many queries read are decoded once, into a workspace where a span's keys lie behind each other. A tile's rows
are queries of one KV head, the heads that share it side by side, so that a tile spans few positions and a key is loaded
for all of them. Few queries behind a long context are few tiles: programs then share the keys of each, and the last one
to be done merges what they found. Softmax as in FlashAttention-2 (arXiv:2307.08691).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvtool.kernels import MOST_PIECES, WORKSPACE
from kvtool.kernels.decode import HEAD_DIMS
from kvtool.kernels.launch import capability, next_power_of_2, num_sms, power_of_2
from kvtool.kernels.streams import PackedStream, refuses_heads
from kvtool.kernels.tiles import FIELDS, Tile, first_near, gather, load_keys, tile_at
from kvtool.kernels.unpack import unpack

# By (compute capability, head_dim padded to a power of 2): for steps that fill the device, and for those that do not.
# sm_89 was never timed: its rows are those that compile without spills.
TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (8, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (8, 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    (8, 256): (Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
    (9, 64): (Tile(128, 128, 8, 3), Tile(64, 64, 4, 3, 2)),
    (9, 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3, 2)),
    (9, 256): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
}


def refuses(key: PackedStream, value: PackedStream, num_heads: int) -> str | None:
    """Why `paged_prefill` cannot read these streams, or None if it can: it takes every format."""
    most = min(tile.rows for tiles in TILES.values() for tile in tiles)
    return refuses_heads(key, value, num_heads, HEAD_DIMS, most)


def paged_prefill(
    q: Tensor,
    near_key: Tensor | None,
    near_value: Tensor | None,
    key: PackedStream,
    value: PackedStream,
    table: Tensor,
    far_blocks: Tensor | None,
    tiles: Callable[[int, int], Tensor],
    visible: Tensor,
    arrivals: Tensor,
    *,
    first_token: int,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor,
) -> None:
    """Attention of the spans behind the decodes over what the store holds of them.

    Three kinds of store: 16 bits, where blocks are read as they are below a span's first token, and its own keys from
    there on (`far_blocks` is None); formats with a tail; and those that pack on write, where blocks hold everything
    (`near_key` and `near_value` are None). Agrees with `TorchAttention` in float64 to a relative error of 5e-3 in bf16.

    Args:
        q: [T, Hq, D] bf16 or fp16, of the tokens behind the decodes.
        near_key, near_value: [n, Hkv, D] of q's dtype, as in `kvtool.kv.store.Near`.
        table: [P, N] integers, blocks of each span: ids, or where `far_blocks` [F] is given indices into that, one
            behind the other.
        tiles: `Prompts.tiles`; a tile of span -1 is nobody's.
        visible: [first_token + T] integers, v(t) of each token of the batch.
        arrivals: [ARRIVALS] int32, as in `kvtool.kv.store.LayerKV`.
        scale: multiplies q·k before the softmax.
        sliding_window: a query sees this many newest positions, itself included; None sees all.
        out: [T, Hq, D], contiguous, where the result goes.
    """
    _, num_heads, head_dim = q.shape
    _, kv_heads, block_size, _ = key.codes.shape
    q = q if q.stride(1) == head_dim and q.stride(2) == 1 else q.contiguous()
    group_heads = num_heads // kv_heads
    tile = _choose(len(q), q.device, head_dim, group_heads, kv_heads)
    tokens = tile.rows // group_heads
    at_once = min(MOST_PIECES, tile.per_sm * num_sms(q.device) // kv_heads)
    cut = tiles(tokens, at_once)
    # A graph may run half as many tokens as it has room for. Without SPLIT a piece is computed as a whole tile.
    split = -(-len(q) // tokens) < 2 * at_once
    heads = kv_heads if far_blocks is None else _heads_at_once(len(far_blocks) * block_size * head_dim, kv_heads)
    partial, lse = out, out
    if split:
        partial = torch.empty(at_once, heads, tile.rows, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(at_once, heads, tile.rows, dtype=torch.float32, device=q.device)
    for first_head in range(0, kv_heads, heads):
        heads = min(heads, kv_heads - first_head)
        if far_blocks is None:
            far_key, far_value = key.codes, value.codes
        else:
            far_key, far_value = unpack(key, value, far_blocks, first_head, heads, q.dtype)
        nears = (q, q) if near_key is None or near_value is None else (near_key, near_value)
        assert nears[0].stride(-1) == nears[1].stride(-1) == 1
        # Rows that all queries of a tile see, and that lie behind each other.
        rows = nears if far_blocks is None else (far_key, far_value)
        row_tiles = [_tiles(x, tile.keys) for x in rows]
        _prefill_kernel[(len(cut) * heads,)](
            q,
            out,
            partial,
            lse,
            *nears,
            *row_tiles,
            far_key,
            far_value,
            table,
            cut,
            visible,
            arrivals,
            scale * 1.4426950408889634,  # exp2 is what the hardware has
            first_token,
            q.stride(0),
            out.stride(0),
            *nears[0].stride()[:2],
            *nears[1].stride()[:2],
            *far_key.stride()[:2],
            *far_value.stride()[:2],
            table.stride(0),
            sliding_window or 0,
            first_head,
            heads,
            M=tile.rows,
            N=tile.keys,
            FAR_N=min(tile.keys, block_size) if far_blocks is None else tile.keys,
            D=head_dim,
            # Known when compiling, so that addresses take few registers, where it is the same in all steps.
            K_STRIDE=nears[0].stride(0) if far_blocks is None else 0,
            V_STRIDE=nears[1].stride(0) if far_blocks is None else 0,
            GROUP_HEADS=group_heads,
            BLOCK=block_size,
            EXACT=far_blocks is None,
            NEAR=near_key is not None,
            K_CODED=far_blocks is not None and key.bits != "16",
            WINDOWED=sliding_window is not None,
            SPLIT=split,
            TILED=row_tiles[0] is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _choose(num_tokens: int, device: torch.device, head_dim: int, group_heads: int, kv_heads: int) -> Tile:
    """The large tile where it fills the device, else the small one. It depends on shapes alone, for CUDA graphs."""
    large, small = TILES[capability(device), power_of_2(head_dim)]
    programs = -(-num_tokens // (large.rows // group_heads)) * kv_heads
    return large if programs >= num_sms(device) else small


def _tiles(x: Tensor, rows: int) -> TensorDescriptor | None:
    """Tiles of so many rows of one head of `x` [n, H, D], as an sm_90 copies them to shared memory by itself (TMA);
    None where the GPU does not, or not from where they lie, or there are none."""
    places = (x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:2]))
    if capability(x.device) < 9 or len(x) == 0 or any(place % 16 for place in places):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, power_of_2(x.shape[2])])


def _heads_at_once(elements: int, kv_heads: int) -> int:
    """KV heads whose decoded keys and values, `elements` of each, fit in the workspace."""
    return min(kv_heads, max(1, WORKSPACE // max(1, 4 * elements)))


@triton.jit(
    do_not_specialize=["first_token", "table_stride", "window", "first_head", "heads"],
    do_not_specialize_on_alignment=["table_ptr", "visible_ptr"],
)
def _prefill_kernel(
    q_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    near_k,
    near_v,
    k_tiles,
    v_tiles,
    far_k,
    far_v,
    table_ptr,
    tiles_ptr,
    visible_ptr,
    arrivals_ptr,
    scale,
    first_token,
    q_stride,
    out_stride,
    near_k_stride,
    near_k_head_stride,
    near_v_stride,
    near_v_head_stride,
    far_k_stride,
    far_k_head_stride,
    far_v_stride,
    far_v_head_stride,
    table_stride,
    window,
    first_head,
    heads,
    M: tl.constexpr,
    N: tl.constexpr,
    FAR_N: tl.constexpr,
    D: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    NEAR: tl.constexpr,
    K_CODED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    TILED: tl.constexpr,
):
    """Program (piece of a tile, head)."""
    PAD: tl.constexpr = next_power_of_2(D)
    TOKENS: tl.constexpr = M // GROUP_HEADS
    head = tl.program_id(0) % heads
    piece = tl.program_id(0) // heads
    span, token, t_first, t_last, near_first, near_row = tile_at(tiles_ptr, piece, TOKENS)
    if span < 0:  # nobody's
        return
    table_ptr += span * table_stride
    far_k += head * far_k_head_stride
    far_v += head * far_v_head_stride
    near_k += (first_head + head) * near_k_head_stride
    near_v += (first_head + head) * near_v_head_stride

    # Rows past the last query repeat it, and are not stored.
    row = tl.arange(0, M)
    position = tl.minimum(t_first + row // GROUP_HEADS, t_last)
    channel = tl.arange(0, PAD)
    at = (token - first_token + position) * q_stride + ((first_head + head) * GROUP_HEADS + row % GROUP_HEADS) * D
    q = tl.load(q_ptr + at[:, None] + channel[None, :], mask=(channel < D)[None, :], other=0)

    v_first, v_last, v = first_near(visible_ptr, token, t_first, t_last, position, near_first, EXACT, NEAR)
    first = tl.full([M], 0, tl.int32)
    begin = 0
    end = t_last + 1
    if SPLIT:
        index, pieces, begin, end = _piece(tiles_ptr, piece, end)
    if WINDOWED:
        first = position + 1 - window
        begin = tl.maximum(begin, t_first + 1 - window)

    m = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, PAD], tl.float32)
    state = (acc, m, total)
    to_log2 = tl.full([M], 1, tl.float32) * scale
    far_q = q
    far_to_log2 = to_log2
    if K_CODED:  # within fp16, whatever q's size
        q_max = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-20)
        far_q = (q.to(tl.float32) / q_max[:, None]).to(tl.float16)
        far_to_log2 = q_max * scale
    far_row = 0
    if not EXACT:
        far_row = tl.load(table_ptr) * BLOCK
    far = (far_k, far_v, far_row, table_ptr, far_k_stride, far_v_stride)
    far_begin = begin // FAR_N * FAR_N
    far_full = tl.maximum(far_begin, tl.minimum(v_first, end) // FAR_N * FAR_N)
    far_end = tl.minimum(v_last, end)
    SIZE: tl.constexpr = BLOCK if EXACT else 0
    EDGE: tl.constexpr = min(FAR_N, 64)  # where not all rows see all keys, fewer at a time
    if TILED and not EXACT:
        tiles = (k_tiles, v_tiles, far_row.to(tl.int32), head)
        state = _read_tiles(state, far_q, far_to_log2, tiles, far_begin, far_full, first, v, FAR_N, PAD, WINDOWED)
    else:
        state = _read(state, far_q, far_to_log2, far, far_begin, far_full, first, v, FAR_N, D, D, D, SIZE, WINDOWED)
    state = _read(state, far_q, far_to_log2, far, far_full, far_end, first, v, EDGE, D, D, D, SIZE, True)
    if NEAR:
        near = (near_k, near_v, near_row, table_ptr, 0, 0)
        if K_CODED:  # again: both kinds of it at once would leave no room for a second program
            q = tl.load(q_ptr + at[:, None] + channel[None, :], mask=(channel < D)[None, :], other=0, volatile=True)
        near_begin = tl.maximum(begin, v_first)
        near_full = near_begin
        from_, to = tl.maximum(first, v), tl.minimum(position + 1, end)
        if EXACT:
            near_full += tl.maximum(tl.minimum(t_first + 1, end) - near_begin, 0) // N * N
            K: tl.constexpr = K_STRIDE
            V: tl.constexpr = V_STRIDE
            if TILED:
                tiles = (k_tiles, v_tiles, near_row.to(tl.int32), head)
                state = _read_tiles(state, q, to_log2, tiles, near_begin, near_full, from_, to, N, PAD, WINDOWED)
            else:
                state = _read(state, q, to_log2, near, near_begin, near_full, from_, to, N, D, K, V, 0, WINDOWED)
            state = _read(state, q, to_log2, near, near_full, end, from_, to, EDGE, D, K, V, 0, True)
        else:
            by_k, by_v = near_k_stride, near_v_stride
            state = _read(state, q, to_log2, near, near_full, end, from_, to, EDGE, D, by_k, by_v, 0, True)
    acc, m, total = state

    total = tl.maximum(total, 1e-37)  # a piece may hold nothing that a row sees
    result = acc / total[:, None]
    is_last = True
    if SPLIT:
        is_last = pieces == 1
        if pieces > 1:
            line = (piece * heads + head) * M + row
            tl.store(lse_ptr + line, m + tl.log2(total))
            tl.store(partial_ptr + line[:, None] * D + channel[None, :], result, mask=(channel < D)[None, :])
            tl.debug_barrier()  # all threads have written
            arrived = arrivals_ptr + (piece - index) * heads + head
            is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == pieces - 1
            if is_last:
                tl.store(arrived, 0)
                m = tl.full([M], -1e30, tl.float32)
                total = tl.zeros([M], tl.float32)
                result = tl.zeros([M, PAD], tl.float32)
                for other in range(piece - index, piece - index + pieces):  # the order is the same whoever is last
                    line = (other * heads + head) * M + row
                    lse = tl.load(lse_ptr + line, cache_modifier=".cg")
                    x = partial_ptr + line[:, None] * D + channel[None, :]
                    x = tl.load(x, mask=(channel < D)[None, :], other=0, cache_modifier=".cg")
                    most = tl.maximum(m, lse)
                    alpha, weight = tl.exp2(m - most), tl.exp2(lse - most)
                    result = result * alpha[:, None] + x * weight[:, None]
                    total = total * alpha + weight
                    m = most
                result /= total[:, None]
    if is_last:
        is_query = t_first + row // GROUP_HEADS <= t_last
        at = (token - first_token + position) * out_stride
        at += ((first_head + head) * GROUP_HEADS + row % GROUP_HEADS) * D
        mask = is_query[:, None] & (channel < D)[None, :]
        tl.store(out_ptr + at[:, None] + channel[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _piece(tiles_ptr, row, end):
    """Which piece of its tile, which reads keys to `end`, a row is, of how many, and what keys it reads."""
    piece = tiles_ptr + row * FIELDS
    index, length = tl.load(piece + 7).to(tl.int32), tl.load(piece + 9).to(tl.int32)
    return index, tl.load(piece + 8).to(tl.int32), index * length, tl.minimum((index + 1) * length, end)


@triton.jit
def _read(
    state,
    q,
    to_log2,
    memory,
    begin,
    end,
    first,
    past,
    N: tl.constexpr,
    D: tl.constexpr,
    k_stride,
    v_stride,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions `begin` to `end`, in blocks of BLOCK tokens that a table finds, `begin` being a multiple of N, or (0)
    in rows behind each other; MASKED: each row of queries those from `first` to below `past`."""
    acc, m, total = state
    k_ptr, v_ptr, row, table_ptr, k_block_stride, v_block_stride = memory
    last = tl.maximum(end - 1, 0)
    block = 0
    if BLOCK:
        block = tl.load(table_ptr + tl.minimum(begin, last) // BLOCK)
    for key in range(begin, end, N):
        k_row, v_row = k_ptr + (row + key) * k_stride, v_ptr + (row + key) * v_stride
        next_block = block
        if BLOCK:
            next_block = tl.load(table_ptr + tl.minimum(key + N, last) // BLOCK)  # none waits for its block's id
            k_row = k_ptr + block * k_block_stride + key % BLOCK * k_stride
            v_row = v_ptr + block * v_block_stride + key % BLOCK * v_stride
        k = load_keys(k_row, k_stride, end - key, N, D, MASKED)
        v = load_keys(v_row, v_stride, end - key, N, D, MASKED)
        at = (key + tl.arange(0, N))[None, :]
        keep = (at >= first[:, None]) & (at < past[:, None])
        acc, m, total = gather(acc, m, total, tl.dot(q, tl.trans(k)), v, to_log2, keep, MASKED)
        block = next_block
    return acc, m, total


@triton.jit
def _read_tiles(
    state, q, to_log2, memory, begin, end, first, past, N: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """`_read` of rows behind each other, whole tiles of them, of a head that descriptors find."""
    acc, m, total = state
    k_tiles, v_tiles, row, head = memory
    for key in range(begin, end, N):
        k = k_tiles.load([row + key, head, 0]).reshape(N, PAD)
        v = v_tiles.load([row + key, head, 0]).reshape(N, PAD)
        at = (key + tl.arange(0, N))[None, :]
        keep = (at >= first[:, None]) & (at < past[:, None])
        acc, m, total = gather(acc, m, total, tl.dot(q, tl.trans(k)), v, to_log2, keep, MASKED)
    return acc, m, total
