"""Decode attention over latents (MLA, absorbed), which are key and value at once: each is loaded once for both.

A program has 16 query heads as rows and walks over some of a sequence's tokens. Codes are decoded in registers to the
fp16 operands of the two products, by the scale and zero of their token; memory sees packed bytes alone.
Splits are those of `kvtool.kernels.decode`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, capability, chained, num_sms, num_splits
from kvtool.kernels.splits import merge
from kvtool.kernels.streams import PackedStream, part_of, refuses_dtype, rows_of

LATENT_DIMS = (64, 128, 256, 512)
ROPE_DIMS = (16, 32, 64, 128)
HEADS = 16  # of a program: the rows of the smallest product
BITS = ("16", "fp8", "8", "4", "2")

# Tokens at a time, warps, stages and programs per SM by (compute capability, bits of latents). None was timed yet; they
# compile without spills, those of sm_89 within its shared memory.
TILES: dict[tuple[int, str], tuple[int, int, int, int]] = {
    (8, "16"): (32, 4, 2, 1),
    (8, "fp8"): (32, 8, 2, 1),
    (8, "8"): (32, 8, 2, 1),
    (8, "4"): (32, 8, 2, 1),
    (8, "2"): (32, 8, 2, 1),
    (9, "16"): (64, 8, 3, 1),
    (9, "fp8"): (32, 8, 2, 1),
    (9, "8"): (32, 8, 2, 1),
    (9, "4"): (64, 8, 2, 1),
    (9, "2"): (64, 8, 2, 1),
}


def refuses(key: PackedStream, value: PackedStream) -> str | None:
    """Why `latent_decode` cannot read these streams, or None if it can."""
    if reason := refuses_dtype(key):
        return reason
    if value.tail.shape[-1] not in LATENT_DIMS or key.tail.shape[-1] not in ROPE_DIMS:
        latents, ropes = (", ".join(map(str, dims)) for dims in (LATENT_DIMS, ROPE_DIMS))
        return f"a latent must have {latents} elements, its rope key {ropes}"
    if value.axis != "token":
        return "no kernel for latents with scales per channel"
    for name, stream in (("rope keys", key), ("latents", value)):
        if stream.piece(stream.tail.shape[-1]) < 16:
            return f"groups of {stream.group} cut {name} into pieces under 16 channels"
        if stream.zero is None and stream.bits in ("8", "4", "2"):
            return f"no kernel for symmetric {name}"
    return None


def latent_decode(
    q: Tensor,
    key: PackedStream,
    value: PackedStream,
    block_table: Tensor,
    positions: Tensor,
    visible: Tensor,
    tail_slots: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over packed latents below v(t), and its tail from v(t) to t.

    Nothing is read back to the host and the launch depends on shapes alone, so a CUDA graph can hold it. Agrees with
    `latent_decode_reference` to a relative error of 5e-3 in bf16.

    Args:
        q: [n, H, L + R] bf16 or fp16, what meets the latent and then what meets the rope key.
        key, value: rope keys [.., 1, B, R] and latents [.., 1, B, L]; those of 16 bits and tails have q's dtype.
        block_table: [n, N] integers; positions, visible, tail_slots: [n] integers, as in `KVBatch`.
        scale: multiplies q·k before the softmax.
        out: [n, H, L], contiguous, where the result goes.

    Returns:
        [n, H, L] of q's dtype.
    """
    n, num_heads, width = q.shape
    latent, block_size, tail_tokens = value.tail.shape[-1], value.codes.shape[2], value.tail.shape[2]
    q, out = q.contiguous(), q.new_empty(n, num_heads, latent) if out is None else out
    tokens, num_warps, num_stages, per_sm = TILES[capability(q.device), value.bits]
    tokens, head_blocks = min(tokens, block_size), -(-num_heads // HEADS)
    splits = num_splits(n * head_blocks, block_table.shape[1], bool(tail_tokens), per_sm * num_sms(q.device))
    split_shape = (n, num_heads, splits) if splits > 1 else (0,)
    partial = torch.empty(*split_shape, latent, dtype=torch.float32, device=q.device) if splits > 1 else out
    lse = torch.empty(split_shape, dtype=torch.float32, device=q.device)
    _latent_kernel[(n * head_blocks, splits)](
        q,
        partial,
        lse,
        block_table,
        positions,
        visible,
        tail_slots,
        *key.arrays,
        *value.arrays,
        scale * 1.4426950408889634,  # exp2 is what the hardware has
        block_table.stride(0),
        key.codes.stride(0) * key.codes.itemsize // 16,
        key.tail.stride(0) * key.tail.itemsize // 16,
        num_heads,
        tail_tokens,
        HEADS=HEADS,
        TOKENS=tokens,
        BLOCK=block_size,
        L=latent,
        R=width - latent,
        TAIL=tail_tokens > 0,
        K_BITS=key.bits,
        K_CHANNEL=key.axis == "channel",
        K_PARTS=key.parts,
        K_GROUP=key.group or width - latent,
        V_BITS=value.bits,
        V_PARTS=value.parts,
        V_GROUP=value.group or latent,
        SPLIT=splits > 1,
        num_warps=num_warps,
        num_stages=num_stages,
        **chained(q.device),
    )
    if splits > 1:
        merge(partial, lse, out)
    return out


def latent_decode_reference(
    q: Tensor,
    key: PackedStream,
    value: PackedStream,
    block_table: Tensor,
    positions: Tensor,
    visible: Tensor,
    tail_slots: Tensor,
    *,
    scale: float,
) -> Tensor:
    """What `latent_decode` computes, sequence by sequence in float64; [n, H, L] float64."""
    out = torch.empty(*q.shape[:2], value.tail.shape[-1], dtype=torch.float64, device=q.device)
    for i, (position, first_near) in enumerate(zip(positions.tolist(), visible.tolist(), strict=True)):
        far, near = range(min(first_near, position + 1)), range(first_near, position + 1)
        rope, latents = (
            torch.cat([stream.far(block_table[i], far), stream.near(tail_slots[i], near)], dim=1)[0]
            for stream in (key, value)
        )
        out[i] = (q[i].double() @ torch.cat([latents, rope], -1).T * scale).softmax(-1) @ latents
    return out


@triton.jit(do_not_specialize=["table_stride", "num_heads", "tail_tokens"])
def _latent_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    positions_ptr,
    visible_ptr,
    slots_ptr,
    k_codes,
    k_scale,
    k_zero,
    k_tail,
    v_codes,
    v_scale,
    v_zero,
    v_tail,
    scale,
    table_stride,
    block_stride,  # of 16 bytes, like slot_stride: so the compiler knows how pointers are aligned
    slot_stride,
    num_heads,
    tail_tokens,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (sequence and heads, split)."""
    await_inputs(CHAINED)
    head_blocks = (num_heads + HEADS - 1) // HEADS
    seq, split = (tl.program_id(0) // head_blocks).to(tl.int64), tl.program_id(1)
    head = tl.program_id(0) % head_blocks * HEADS + tl.arange(0, HEADS)
    position = tl.load(positions_ptr + seq).to(tl.int32)
    near = tl.load(visible_ptr + seq).to(tl.int32)
    far = tl.minimum(near, position + 1)

    # A product takes what one part of a stream's bytes holds, channels that lie side by side.
    K_PIECE: tl.constexpr = R // K_PARTS
    V_PIECE: tl.constexpr = L // V_PARTS
    # Rows past the last head repeat it, and are not stored.
    rows = q_ptr + (seq * num_heads + tl.minimum(head, num_heads - 1))[:, None] * (L + R)
    channel = tl.arange(0, L)[None, :]
    q_max = tl.max(tl.abs(tl.load(rows + channel).to(tl.float32)), 1)
    rope = tl.load(rows + L + tl.arange(0, R)[None, :]).to(tl.float32)
    q_max = tl.maximum(tl.maximum(q_max, tl.max(tl.abs(rope), 1)), 1e-20)
    # Packed streams are multiplied in fp16, which holds q over a power of 2 near its largest; that loses no digit.
    q_max = (q_max.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    qs = ()
    for part in tl.static_range(V_PARTS):
        qs += (_query(rows, part * V_PIECE, q_max, V_PIECE, V_BITS),)
    rope_qs = ()
    for part in tl.static_range(K_PARTS):
        rope_qs += (_query(rows, L + part * K_PIECE, q_max, K_PIECE, K_BITS),)
    to_log2 = q_max * scale

    m = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    accs = ()
    for _ in tl.static_range(V_PARTS):
        accs += (tl.zeros([HEADS, V_PIECE], tl.float32),)

    splits = tl.num_programs(1)
    far_splits = splits - 1 if TAIL and SPLIT else splits  # the tail has one for itself
    tiles = (far + TOKENS - 1) // TOKENS
    share = (tiles + far_splits - 1) // far_splits
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    token = tl.arange(0, TOKENS)
    table_ptr += seq * table_stride
    # No tile waits for its block's id, nor for packed bytes: what two products share, with codes between, the compiler
    # does not fetch ahead. 16-bit numbers it does.
    block = _block_of(table_ptr, begin, end, TOKENS, BLOCK) * block_stride
    row = begin * TOKENS % BLOCK + token
    k_next = _fetched(k_codes, k_scale, k_zero, block, row, K_PARTS, K_PIECE, K_GROUP, K_CHANNEL, K_BITS)
    v_next = _fetched(v_codes, v_scale, v_zero, block, row, V_PARTS, V_PIECE, V_GROUP, False, V_BITS)
    for index in range(begin, end):
        next_block = _block_of(table_ptr, index + 1, end, TOKENS, BLOCK) * block_stride
        next_row = (index + 1) * TOKENS % BLOCK + token
        if K_BITS == "16":
            keys = (rows_of(k_codes + block * 8, row, R, 0, R),)
        else:
            keys = _decoded(k_next, K_PARTS, K_PIECE, K_GROUP, K_CHANNEL, K_BITS)
            k_next = _fetched(
                k_codes, k_scale, k_zero, next_block, next_row, K_PARTS, K_PIECE, K_GROUP, K_CHANNEL, K_BITS
            )
        if V_BITS == "16":
            latents = (rows_of(v_codes + block * 8, row, L, 0, L),)
        else:
            latents = _decoded(v_next, V_PARTS, V_PIECE, V_GROUP, False, V_BITS)
            v_next = _fetched(v_codes, v_scale, v_zero, next_block, next_row, V_PARTS, V_PIECE, V_GROUP, False, V_BITS)
        s = tl.zeros([HEADS, TOKENS], tl.float32)
        for part in tl.static_range(K_PARTS):
            s = tl.dot(rope_qs[part], tl.trans(keys[part]), s)
        for part in tl.static_range(V_PARTS):
            s = tl.dot(qs[part], tl.trans(latents[part]), s)
        s = tl.where((index * TOKENS + token < far)[None, :], s, float("-inf"))
        m, total, alpha, p = softmax_step(s, m, total, to_log2)
        new_accs = ()
        for part in tl.static_range(V_PARTS):
            new_accs += (tl.dot(p.to(latents[part].dtype), latents[part], accs[part] * alpha[:, None]),)
        accs = new_accs
        block = next_block
        row = next_row

    if TAIL:  # noqa: SIM102 (one is known when compiling, the other when running)
        if split == splits - 1:
            slot = tl.load(slots_ptr + seq).to(tl.int64) * slot_stride * 8
            q_rope = _query(rows, L, q_max, R, "16")
            for start_row in tl.range(0, tail_tokens, TOKENS, num_stages=1):
                tail_rows = start_row + token
                # The newest position that each row can hold.
                at = position - (position - tail_rows + tail_tokens) % tail_tokens
                s = tl.dot(q_rope, tl.trans(rows_of(k_tail + slot, tail_rows, R, 0, R)))
                for part in tl.static_range(V_PARTS):
                    query = _query(rows, part * V_PIECE, q_max, V_PIECE, "16")
                    values = rows_of(v_tail + slot, tail_rows, L, part * V_PIECE, V_PIECE)
                    s = tl.dot(query, tl.trans(values), s)
                s = tl.where((at >= near)[None, :], s, float("-inf"))
                m, total, alpha, p = softmax_step(s, m, total, to_log2)
                new_accs = ()
                for part in tl.static_range(V_PARTS):
                    values = rows_of(v_tail + slot, tail_rows, L, part * V_PIECE, V_PIECE)
                    new_accs += (tl.dot(p.to(values.dtype), values, accs[part] * alpha[:, None]),)
                accs = new_accs

    total = tl.maximum(total, 1e-37)
    out_row = seq * num_heads + head
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, m + tl.log2(total), mask=head < num_heads)
    for part in tl.static_range(V_PARTS):
        to = out_ptr + out_row[:, None] * L + part * V_PIECE + tl.arange(0, V_PIECE)[None, :]
        gathered = accs[part] / total[:, None]
        tl.store(to, gathered.to(out_ptr.dtype.element_ty), mask=(head < num_heads)[:, None])


@triton.jit
def _block_of(table_ptr, index, end, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The block of the tile at `index`, or of the last before `end`; where nobody has any, one that exists."""
    block = tl.load(table_ptr + tl.maximum(tl.minimum(index, end - 1), 0) * TOKENS // BLOCK)
    return tl.maximum(block, 0).to(tl.int64)


@triton.jit
def _query(rows, start, q_max, PIECE: tl.constexpr, BITS: tl.constexpr):
    """Channels `start` to `start + PIECE` of each head's query over `q_max`: [HEADS, PIECE]."""
    q = tl.load(rows + start + tl.arange(0, PIECE)[None, :])
    q = q.to(tl.float32) / q_max[:, None]
    return q.to(rows.dtype.element_ty if BITS == "16" else tl.float16)


@triton.jit
def _fetched(
    codes,
    scale,
    zero,
    block,
    row,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNEL: tl.constexpr,
    BITS: tl.constexpr,
):
    """Some rows of a block as they are stored: bytes [n, PIECE], then scales and zeros by part. 16 bits: nothing."""
    fetched = ()
    if BITS != "16":
        fetched += (rows_of(codes + block * 16, row, PIECE, 0, PIECE),)
    for part in tl.static_range(PARTS if BITS != "16" else 0):
        fetched += (_of_groups(scale + block * 8, row, part, PARTS, PIECE, GROUP, CHANNEL),)
        if BITS != "fp8":
            fetched += (_of_groups(zero + block * 8, row, part, PARTS, PIECE, GROUP, CHANNEL),)
    return fetched


@triton.jit
def _of_groups(
    ptr, row, PART: tl.constexpr, PARTS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, CHANNEL: tl.constexpr
):
    """One number for each group of a part's channels: [1, PIECE], or [n, groups]."""
    if CHANNEL:
        return tl.load(ptr + PART * PIECE + tl.arange(0, PIECE))[None, :]
    elif GROUP >= PIECE:
        return tl.load(ptr + row * (PARTS * PIECE // GROUP) + PART * PIECE // GROUP)[:, None]
    else:
        GROUPS: tl.constexpr = PIECE // GROUP
        return tl.load(ptr + (row * (PARTS * GROUPS) + PART * GROUPS)[:, None] + tl.arange(0, GROUPS)[None, :])


@triton.jit
def _decoded(
    fetched,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNEL: tl.constexpr,
    BITS: tl.constexpr,
):
    """What `_fetched` rows stand for, in fp16: [n, PIECE] for each part of a byte."""
    EACH: tl.constexpr = 1 if BITS == "fp8" else 2
    parts = ()
    for part in tl.static_range(PARTS):
        x = part_of(fetched[0], part, BITS)
        scales = _spread(fetched[1 + part * EACH], PIECE, GROUP, CHANNEL)
        if BITS == "fp8":
            x *= scales * 256
        else:
            x = x * scales + _spread(fetched[2 + part * EACH], PIECE, GROUP, CHANNEL)
        parts += (x,)
    return parts


@triton.jit
def _spread(each, PIECE: tl.constexpr, GROUP: tl.constexpr, CHANNEL: tl.constexpr):
    """`_of_groups` for every channel: broadcasts to [n, PIECE]."""
    if CHANNEL or GROUP >= PIECE:
        return each
    else:
        wide = tl.broadcast_to(each[:, :, None], [each.shape[0], PIECE // GROUP, GROUP])
        return tl.reshape(wide, [each.shape[0], PIECE])


@triton.jit
def softmax_step(s, m, total, to_log2):
    """Maxima (in units of log2) and sums with the scores s [HEADS, TOKENS], what older sums shrink by, and weights.

    Weights and sums are 256 times as large as they should be, so that small ones keep their digits in fp16.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * to_log2[:, None] - (m_new - 8)[:, None])
    return m_new, total * alpha + tl.sum(p, 1), alpha, p
