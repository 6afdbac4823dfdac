"""Decode attention over packed blocks and the full-precision tail: split-K, codes never leave the chip unpacked.

Scales are folded into what meets the codes, so that a code enters the tensor cores as the small integer it is (exact in
fp16): per-channel keys give q·k = (q∘s)·code + q·z, per-token keys s_t (q·code) + z_t Σq, per-token values
(p∘s)·code + Σ p∘z. Tokens are the rows of the first product and head channels those of the second; the query heads of
one KV head are the columns of both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import (
    await_inputs,
    capability,
    chained,
    next_power_of_2,
    num_sms,
    num_splits,
    power_of_2,
    prefetch,
    start_next,
)
from kvtool.kernels.splits import merge
from kvtool.kernels.streams import PackedStream, part_of, refuses_heads, rows_of

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUP_HEADS = 16
# What the kernel reads, as (bits, axis); a key and a value of it go together as they please. Integers are asymmetric.
KEYS = (("16", "token"), ("fp8", "token"), ("8", "channel"), ("4", "channel"), ("2", "channel"))
KEYS += (("8", "token"), ("4", "token"))
VALUES = (("16", "token"), ("fp8", "token"), ("8", "token"), ("4", "token"), ("2", "token"))
SHORT_READ = tl.constexpr(8192)  # tokens of a step
AHEAD = tl.constexpr(2)  # blocks that a program asks for before its inputs are there
LARGE_BLOCK = 64 * 128  # elements: of larger ones fewer are on their way at once
MIN_PIECE = 16  # channels: the shortest inner dimension of a tensor-core product

# Warps, pipeline stages, programs per SM and most registers by (compute capability, bits of the wider stream), for
# head_dim 128 and up to 8 query heads to a KV head. Few warps share a tile of packed codes on sm_90, where instructions
# bound it before memory. At 16 bits so many blocks are on their way that two programs fill an SM: were there room for a
# third, 256 programs would not be dealt out evenly. More share the work of few sequences, which evens out their ends.
# sm_89 was never timed: its rows are those that compile without spills.
TILES: dict[tuple[int, str], tuple[int, int, int, int | None]] = {
    (8, "16"): (4, 2, 2, None),
    (8, "fp8"): (4, 2, 3, None),
    (8, "8"): (4, 2, 3, None),
    (8, "4"): (4, 2, 3, None),
    (8, "2"): (4, 2, 3, None),
    (9, "16"): (4, 5, 3, None),
    (9, "fp8"): (4, 3, 4, None),
    (9, "8"): (1, 3, 8, None),
    (9, "4"): (1, 3, 8, None),
    (9, "2"): (2, 3, 6, 168),
}


def refuses(key: PackedStream, value: PackedStream, num_heads: int) -> str | None:
    """Why `paged_decode` cannot read these streams, or None if it can."""
    if reason := refuses_heads(key, value, num_heads, HEAD_DIMS, MAX_GROUP_HEADS):
        return reason
    head_dim = key.tail.shape[-1]
    for name, stream, known in (("key", key, KEYS), ("value", value, VALUES)):
        if (stream.bits, stream.axis) not in known:
            return f"no kernel for {name}s of {stream.bits} bits per {stream.axis}"
        if stream.piece(head_dim) < MIN_PIECE:
            return f"groups of {stream.group} cut {name}s of head_dim {head_dim} into pieces under {MIN_PIECE} channels"
        if stream.zero is None and stream.bits in ("8", "4", "2"):
            return f"no kernel for symmetric {name}s"
    return None


def paged_decode(
    q: Tensor,
    key: PackedStream,
    value: PackedStream,
    block_table: Tensor,
    positions: Tensor,
    visible: Tensor,
    tail_slots: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence: over packed blocks below v(t), and its tail from v(t) to t.

    Nothing is read back to the host and the launch depends on shapes alone, so a CUDA graph can hold it. Agrees with
    `paged_decode_reference` to a relative error of 5e-3 in bf16. Where kernels are chained (`launch.chained`) it reads
    the four tables before the kernel in front has ended, so that one must not be what writes them.

    Args:
        q: [n, Hq, D] bf16 or fp16; keys and values of 16 bits and tails have its dtype.
        block_table: [n, N] integers; positions, visible, tail_slots: [n] integers, as in `KVBatch`.
        scale: multiplies q·k before the softmax.
        sliding_window: a query sees this many newest positions, itself included; None sees all.
        out: [n, Hq, D], where the result goes.

    Returns:
        [n, Hq, D] of q's dtype.
    """
    n, num_heads, head_dim = q.shape
    q, out = q.contiguous(), torch.empty_like(q) if out is None else out
    _, kv_heads, block_size, _ = key.codes.shape
    tail_tokens = key.tail.shape[2]
    bits = max((key.bits, value.bits), key=lambda bits: 8 if bits == "fp8" else int(bits))
    group_heads = num_heads // kv_heads
    columns = max(8, power_of_2(group_heads))
    compute = capability(q.device)
    num_warps, num_stages, per_sm, registers = TILES[compute, bits]
    if head_dim * block_size > LARGE_BLOCK:
        num_stages = min(num_stages, 3)
    elements = power_of_2(head_dim) * columns  # of the accumulator
    num_warps = _fitting_warps(num_warps, elements, columns, compute)
    splits = num_splits(n * kv_heads, block_table.shape[1], bool(tail_tokens), per_sm * num_sms(q.device))
    partial = torch.empty(n, num_heads, splits, head_dim, dtype=torch.float32, device=q.device) if splits > 1 else out
    lse = torch.empty(n, num_heads, splits, dtype=torch.float32, device=q.device) if splits > 1 else out
    _decode_kernel[(n * kv_heads, splits)](
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
        kv_heads,
        group_heads,
        tail_tokens,
        sliding_window or 1 << 30,
        N=columns,
        D=head_dim,
        BLOCK=block_size,
        TAIL=tail_tokens > 0,
        K_BITS=key.bits,
        K_CHANNEL=key.axis == "channel",
        K_PARTS=key.parts,
        K_PIECE=key.piece(head_dim),
        K_GROUP=key.group or head_dim,
        V_BITS=value.bits,
        V_PARTS=value.parts,
        V_PIECE=value.piece(head_dim),
        V_GROUP=value.group or head_dim,
        SPLIT=splits > 1,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=registers if elements <= 1024 else None,
        **chained(q.device),
    )
    if splits > 1:
        merge(partial, lse, out)
    return out


def paged_decode_reference(
    q: Tensor,
    key: PackedStream,
    value: PackedStream,
    block_table: Tensor,
    positions: Tensor,
    visible: Tensor,
    tail_slots: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """What `paged_decode` computes, sequence by sequence in float64; [n, Hq, D] float64."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for i, (position, first_near) in enumerate(zip(positions.tolist(), visible.tolist(), strict=True)):
        first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
        far, near = range(first, min(first_near, position + 1)), range(max(first, first_near), position + 1)
        keys, values = (
            torch.cat([stream.far(block_table[i], far), stream.near(tail_slots[i], near)], dim=1)
            for stream in (key, value)
        )
        heads = q[i].double().unflatten(0, (keys.shape[0], -1))
        probs = (heads @ keys.transpose(1, 2) * scale).softmax(-1)
        out[i] = (probs @ values).flatten(0, 1)
    return out


def _fitting_warps(num_warps: int, elements: int, columns: int, capability: int) -> int:
    """Warps for an accumulator of `elements`, so that it stays in registers.

    Four warps and 16 columns would make Triton choose sm_90's own product, whose operands from registers come out wrong
    in a pipelined loop (seen with Triton 3.6).
    """
    most = 8 if capability < 9 else 4 if columns == 8 else 2
    return min(num_warps * max(1, elements // 1024), most)


@triton.jit(do_not_specialize=["table_stride", "kv_heads", "group_heads", "tail_tokens", "window"])
def _decode_kernel(
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
    kv_heads,
    group_heads,
    tail_tokens,
    window,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_PIECE: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_PIECE: tl.constexpr,
    V_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    seq, head, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    position = tl.load(positions_ptr + seq).to(tl.int32)
    # A product that comes soon fetches its weights to L2 as it starts: a long read would drive them out again.
    if tl.num_programs(0) // kv_heads * position < SHORT_READ:
        start_next(CHAINED)
    near = tl.load(visible_ptr + seq).to(tl.int32)
    far = tl.minimum(near, position + 1)
    first = tl.maximum(0, position + 1 - window)

    # Programs share the blocks, as many as there are shares. The last has the tail too, which weighs as much as a block
    # for each 16 tokens.
    splits = tl.num_programs(1)
    begin = first // BLOCK
    end = tl.cdiv(far, BLOCK)
    units = tl.maximum(tl.maximum(end - begin, 0) + tail_tokens // 16, 1)
    share = tl.cdiv(units, splits)
    begin += split * share
    end = tl.minimum(begin + share, end)
    rows = tl.arange(0, BLOCK)
    table_ptr += seq * table_stride

    # Tables were there before the kernel in front, and so was most of what they lead to.
    K_BYTES: tl.constexpr = BLOCK * (D // K_PARTS) * k_codes.dtype.element_ty.primitive_bitwidth // 8  # of a head
    V_BYTES: tl.constexpr = BLOCK * (D // V_PARTS) * v_codes.dtype.element_ty.primitive_bitwidth // 8
    if CHAINED:
        for index in tl.range(begin, tl.minimum(begin + AHEAD, end), num_stages=1):
            block = tl.load(table_ptr + index).to(tl.int64) * (block_stride * 16)
            prefetch(k_codes.to(tl.pointer_type(tl.uint8)) + block + head * K_BYTES, K_BYTES)
            prefetch(v_codes.to(tl.pointer_type(tl.uint8)) + block + head * V_BYTES, V_BYTES)
    await_inputs(CHAINED, START_NEXT=False)
    q_ptr += (seq.to(tl.int64) * kv_heads + head) * group_heads * D

    K_SEGMENTS: tl.constexpr = D // K_PARTS // K_PIECE
    V_SEGMENTS: tl.constexpr = D // V_PARTS // V_PIECE
    V_PAD: tl.constexpr = next_power_of_2(V_PIECE)
    GROUPS: tl.constexpr = D // V_GROUP if V_BITS == "8" or V_BITS == "4" or V_BITS == "2" else 0  # that have zeros

    # Queries as columns, one [piece, N] for each product; q / max|q| keeps q∘s within fp16.
    q_all = _queries(q_ptr, 0, D, D, group_heads, N)
    q_max = tl.maximum(tl.max(tl.abs(q_all.to(tl.float32)), 0), 1e-20)
    q_pieces = ()
    q_sums = ()
    for segment in tl.static_range(K_SEGMENTS):
        for part in tl.static_range(K_PARTS):
            piece = _queries(q_ptr, part * (D // K_PARTS) + segment * K_PIECE, K_PIECE, D, group_heads, N)
            if K_BITS != "16":
                piece = piece.to(tl.float32) / q_max[None, :]
                q_sums += (tl.sum(piece, 0),)
                piece = piece.to(tl.float16)
            q_pieces += (piece,)
    to_log2 = tl.full([N], 1, tl.float32) * scale if K_BITS == "16" else q_max * scale * (256 if K_BITS == "fp8" else 1)

    # Rows of zeros for each group of values, over and over: their product with p is Σ p∘z.
    side = tl.arange(0, 16)
    m = tl.full([N], -1e30, tl.float32)
    p_sum = tl.zeros([BLOCK, N], tl.float32)
    zero_sums = tl.zeros([16, N], tl.float32)
    accs = ()
    for _ in tl.static_range(V_SEGMENTS * V_PARTS):
        accs += (tl.zeros([V_PAD, N], tl.float32),)

    # Values' scales are too narrow for the compiler to fetch ahead.
    scale_rows = head * BLOCK + rows
    v_scales = _value_scales(v_scale, table_ptr, begin, end, block_stride, scale_rows, V_BITS, D // V_GROUP)
    for index in range(begin, end):
        next_v_scales = _value_scales(
            v_scale, table_ptr, index + 1, end, block_stride, scale_rows, V_BITS, D // V_GROUP
        )
        block = tl.load(table_ptr + index).to(tl.int64) * block_stride
        at = index * BLOCK + rows

        # Scores [BLOCK, N], over `to_log2`.
        s = tl.zeros([BLOCK, N], tl.float32)
        if K_BITS == "16":
            s = tl.dot(rows_of(k_codes + block * 8 + head * (BLOCK * D), rows, D, 0, D), q_pieces[0])
        if K_CHANNEL:
            offset = tl.zeros([next_power_of_2(K_PIECE), N], tl.float32)
        for segment in tl.static_range(K_SEGMENTS if K_BITS != "16" else 0):
            k_bytes = k_codes + block * 16 + head * (BLOCK * (D // K_PARTS))
            packed = rows_of(k_bytes, rows, D // K_PARTS, segment * K_PIECE, K_PIECE)
            for part in tl.static_range(K_PARTS):
                codes = part_of(packed, part, K_BITS)
                query = q_pieces[segment * K_PARTS + part]
                start = part * (D // K_PARTS) + segment * K_PIECE
                if K_CHANNEL:
                    k_s = _columns_of(k_scale + block * 8 + head * D + start, K_PIECE)
                    s = tl.dot(codes, query * k_s[:, None], s)
                    k_z = _columns_of(k_zero + block * 8 + head * D + start, K_PIECE)
                    offset += query.to(tl.float32) * k_z[:, None].to(tl.float32)
                else:
                    group = (head * BLOCK + rows) * (D // K_GROUP) + start // K_GROUP
                    k_s = tl.load(k_scale + block * 8 + group).to(tl.float32)
                    s += tl.dot(codes, query) * k_s[:, None]
                    if K_BITS != "fp8":
                        k_z = tl.load(k_zero + block * 8 + group).to(tl.float32)
                        s += k_z[:, None] * q_sums[segment * K_PARTS + part][None, :]
        if K_CHANNEL:
            s += tl.sum(offset, 0)[None, :]
        s = tl.where(((at >= first) & (at < far))[:, None], s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 0) * to_log2)
        alpha = tl.exp2(m - m_new)
        # p·s stays below fp16's 65,504, as s is at most 2 * 65,504 / (2^bits - 1), and small scales keep their digits.
        p = tl.exp2(s * to_log2[None, :] - (m_new - _boost(V_BITS))[None, :])
        p_sum = p_sum * alpha[None, :] + p
        m = m_new

        # Values: one [piece, N] for each product.
        new_accs = ()
        v_bytes = v_codes + block * (8 if V_BITS == "16" else 16) + head * (BLOCK * (D // V_PARTS))
        for segment in tl.static_range(V_SEGMENTS):
            packed = _columns_by_rows(v_bytes, rows, D // V_PARTS, segment * V_PIECE, V_PIECE)
            for part in tl.static_range(V_PARTS):
                codes = part_of(packed, part, V_BITS)
                if V_BITS == "16":
                    weights = p.to(codes.dtype)
                else:
                    v_s = v_scales[_start(segment, part, D // V_PARTS, V_PIECE) // V_GROUP].to(tl.float32)
                    weights = (p * v_s[:, None]).to(tl.float16)
                new_accs += (tl.dot(codes, weights, accs[segment * V_PARTS + part] * alpha[None, :]),)
        accs = new_accs
        if GROUPS:
            v_z = v_zero + block * 8 + scale_rows * GROUPS
            zeros = tl.load(v_z[None, :] + (side % GROUPS)[:, None])
            zero_sums = tl.dot(zeros, p.to(tl.float16), zero_sums * alpha[None, :])
        v_scales = next_v_scales
    start_next(CHAINED)  # of long reads: the next kernel gets ready while the last programs end

    if TAIL:  # noqa: SIM102 (one is known when compiling, the other when running)
        if split == tl.cdiv(units, share) - 1:
            slot = tl.load(slots_ptr + seq).to(tl.int64) * slot_stride * 8 + head * tail_tokens * D
            q_tail = _queries(q_ptr, 0, D, D, group_heads, N)
            for start_row in tl.range(0, tail_tokens, BLOCK, num_stages=1):
                tail_rows = start_row + rows
                # The newest position that each row can hold.
                at = position - (position - tail_rows + tail_tokens) % tail_tokens
                keys = rows_of(k_tail + slot, tail_rows, D, 0, D)
                s = tl.dot(keys, q_tail) * scale
                s = tl.where(((at >= near) & (at >= first))[:, None], s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 0))
                alpha = tl.exp2(m - m_new)
                p = tl.exp2(s - (m_new - _boost(V_BITS))[None, :])
                p_sum = p_sum * alpha[None, :] + p
                zero_sums *= alpha[None, :]
                m = m_new
                new_accs = ()
                for segment in tl.static_range(V_SEGMENTS):
                    for part in tl.static_range(V_PARTS):
                        start = part * (D // V_PARTS) + segment * V_PIECE
                        values = _columns_by_rows(v_tail + slot, tail_rows, D, start, V_PIECE)
                        new_accs += (
                            tl.dot(values, p.to(values.dtype), accs[segment * V_PARTS + part] * alpha[None, :]),
                        )
                accs = new_accs

    total = tl.maximum(tl.sum(p_sum, 0), 1e-37)
    columns = tl.arange(0, N)
    row = (seq.to(tl.int64) * kv_heads + head) * group_heads + columns
    if SPLIT:
        row = row * splits + split
        tl.store(lse_ptr + row, m + tl.log2(total), mask=columns < group_heads)
    channels = tl.arange(0, V_PAD)
    for segment in tl.static_range(V_SEGMENTS):
        for part in tl.static_range(V_PARTS):
            acc = accs[segment * V_PARTS + part]
            start = part * (D // V_PARTS) + segment * V_PIECE
            if V_BITS == "fp8":
                acc *= 256
            if GROUPS:
                acc += tl.sum(tl.where(side[:, None] == start // V_GROUP, zero_sums, 0), 0)[None, :]
            to = out_ptr + row[None, :] * D + start + channels[:, None]
            value = (acc / total[None, :]).to(out_ptr.dtype.element_ty)
            tl.store(to, value, mask=(channels < V_PIECE)[:, None] & (columns < group_heads)[None, :])


@triton.jit
def _queries(q_ptr, start, PIECE: tl.constexpr, D: tl.constexpr, group_heads, N: tl.constexpr):
    """Channels `start` to `start + PIECE` of a KV head's queries as columns, [PIECE padded, N]; zeros elsewhere."""
    channels = tl.arange(0, next_power_of_2(PIECE))[:, None]
    heads = tl.arange(0, N)[None, :]
    return tl.load(q_ptr + heads * D + start + channels, mask=(channels < PIECE) & (heads < group_heads), other=0)


@triton.jit
def _columns_by_rows(ptr, rows, STRIDE: tl.constexpr, START: tl.constexpr, PIECE: tl.constexpr):
    """The transpose of `rows_of`."""
    PAD: tl.constexpr = next_power_of_2(PIECE)
    columns = tl.arange(0, PAD)[:, None]
    if PAD == PIECE:
        return tl.load(ptr + rows[None, :] * STRIDE + START + columns)
    return tl.load(ptr + rows[None, :] * STRIDE + START + columns, mask=columns < PIECE, other=0)


@triton.jit
def _value_scales(scale_ptr, table_ptr, index, end, block_stride, rows, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Scales of each group, [rows] fp16, of the block at `index` of the table, or the last before `end`."""
    scales = ()
    if BITS != "16":
        block = tl.load(table_ptr + tl.maximum(tl.minimum(index, end - 1), 0)).to(tl.int64) * block_stride
        for group in tl.static_range(GROUPS):
            scales += (tl.load(scale_ptr + block * 8 + rows * GROUPS + group),)
    return scales


@triton.jit
def _columns_of(ptr, PIECE: tl.constexpr):
    """[PIECE padded], with zeros in the padding."""
    columns = tl.arange(0, next_power_of_2(PIECE))
    return tl.load(ptr + columns, mask=columns < PIECE, other=0)


@triton.constexpr_function
def _start(segment, part, run, piece):
    """First channel of a piece."""
    return part * run + segment * piece


@triton.constexpr_function
def _boost(bits):
    return {"16": 0, "fp8": 8, "8": 6, "4": 2, "2": 0}[bits]
