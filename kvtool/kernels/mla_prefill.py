"""Prefill attention over latents (MLA, absorbed) of all spans of a step in one launch.

As `kvtool.kernels.prefill`: packed blocks are decoded once into a workspace, tokens from v(t) on are read at full
precision. A tile's rows are 16 heads of a few positions, which share every latent.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import capability
from kvtool.kernels.mla_decode import HEADS, _softmax_step
from kvtool.kernels.prefill import _first_near, _keys, _tile, _unpack_kernel
from kvtool.kernels.streams import PackedStream

# Rows, keys at a time, warps and stages by compute capability: what compiles without spills; neither was timed yet.
TILES: dict[int, tuple[int, int, int, int]] = {8: (32, 16, 8, 2), 9: (32, 32, 8, 2)}


def latent_prefill(
    q: Tensor,
    near_key: Tensor | None,
    near_value: Tensor | None,
    key: PackedStream,
    value: PackedStream,
    table: Tensor,
    far_blocks: Tensor | None,
    tiles: Callable[[int], Tensor],
    visible: Tensor,
    *,
    first_token: int,
    scale: float,
    out: Tensor,
) -> None:
    """`kvtool.kernels.prefill.paged_prefill` for latents: attention of the spans behind the decodes.

    Agrees with `TorchAttention` in float64 to a relative error of 5e-3 in bf16.

    Args:
        q: [T, H, L + R] bf16 or fp16, of the tokens behind the decodes.
        near_key, near_value: [n, 1, R] and [n, 1, L] of q's dtype, or None where blocks hold everything.
        out: [T, H, L], contiguous, where the result goes. The rest is as there.
    """
    _, num_heads, width = q.shape
    latent, block_size = value.tail.shape[-1], value.codes.shape[2]
    rows, keys, num_warps, num_stages = TILES[capability(q.device)]
    cut, head_blocks = tiles(rows // HEADS), -(-num_heads // HEADS)
    if far_blocks is None:
        far_key, far_value = key.codes, value.codes
    else:
        far_key, far_value = (
            q.new_empty(
                len(far_blocks),
                1,
                block_size,
                stream.tail.shape[-1],
                dtype=None if stream.bits == "16" else torch.float16,  # as in `kvtool.kernels.prefill.unpack`
            )
            for stream in (key, value)
        )
        unpack(key, far_blocks, far_key)
        unpack(value, far_blocks, far_value)
    nears = (q, q) if near_key is None or near_value is None else (near_key, near_value)
    assert nears[0].stride(-1) == nears[1].stride(-1) == 1
    _latent_prefill_kernel[(len(cut) * head_blocks,)](
        q.contiguous(),
        out,
        *nears,
        far_key,
        far_value,
        table,
        cut,
        visible,
        scale * 1.4426950408889634,
        first_token,
        nears[0].stride(0),
        nears[1].stride(0),
        far_key.stride(0),
        far_value.stride(0),
        table.stride(0),
        num_heads,
        HEADS=HEADS,
        M=rows,
        N=keys,
        BLOCK=block_size,
        L=latent,
        R=width - latent,
        EXACT=far_blocks is None,
        NEAR=near_key is not None,
        K_CODED=key.bits != "16",
        V_CODED=value.bits != "16",
        num_warps=num_warps,
        num_stages=num_stages,
    )


def unpack(stream: PackedStream, blocks: Tensor, out: Tensor) -> None:
    """Decode blocks [F] of a stream to `out` [F or more, 1, B, D], of the model's dtype where they are of 16 bits."""
    block_size, dim = out.shape[2:]
    arrays = (*stream.arrays[:3], out)
    kind = {"BITS": stream.bits, "CHANNEL": stream.axis == "channel", "GROUP": stream.group or dim}
    kind["ZERO"] = stream.zero is not None
    if len(blocks):
        _unpack_kernel[(len(blocks), 1, 1)](  # one stream: what would be the second is not looked at
            *arrays,
            *arrays,
            blocks,
            stream.codes.stride(0) * stream.codes.itemsize // 16,
            0,
            D=dim,
            BLOCK=block_size,
            **{f"{letter}_{name}": value for letter in "KV" for name, value in kind.items()},
            num_warps=8,
        )


@triton.jit(
    do_not_specialize=["first_token", "table_stride", "num_heads"],
    do_not_specialize_on_alignment=["table_ptr", "visible_ptr"],
)
def _latent_prefill_kernel(
    q_ptr,
    out_ptr,
    near_k,
    near_v,
    far_k,
    far_v,
    table_ptr,
    tiles_ptr,
    visible_ptr,
    scale,
    first_token,
    near_k_stride,
    near_v_stride,
    far_k_stride,
    far_v_stride,
    table_stride,
    num_heads,
    HEADS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    NEAR: tl.constexpr,
    K_CODED: tl.constexpr,
    V_CODED: tl.constexpr,
):
    """Program (tile, heads). Names are those of `kvtool.kernels.prefill`."""
    TOKENS: tl.constexpr = M // HEADS
    head_blocks = (num_heads + HEADS - 1) // HEADS
    tile = tl.program_id(0) // head_blocks
    span, token, t_first, t_last, near_first, near_row = _tile(tiles_ptr, tile, TOKENS)
    if span < 0:  # nobody's
        return
    table_ptr += span * table_stride

    # Rows past the last query or head repeat it, and are not stored.
    row = tl.arange(0, M)
    position = tl.minimum(t_first + row // HEADS, t_last)
    head = tl.program_id(0) % head_blocks * HEADS + row % HEADS
    line = (token - first_token + position) * num_heads + tl.minimum(head, num_heads - 1)
    latent_q = tl.load(q_ptr + line[:, None] * (L + R) + tl.arange(0, L)[None, :])
    rope_q = tl.load(q_ptr + line[:, None] * (L + R) + L + tl.arange(0, R)[None, :])

    v_first, v_last, v = _first_near(visible_ptr, token, t_first, t_last, position, near_first, EXACT, NEAR)

    # Queries over a power of 2 near their largest meet what codes have become within fp16.
    q_max = tl.maximum(tl.max(tl.abs(latent_q.to(tl.float32)), 1), tl.max(tl.abs(rope_q.to(tl.float32)), 1))
    q_max = (tl.maximum(q_max, 1e-20).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    latent_q = (latent_q.to(tl.float32) / q_max[:, None]).to(latent_q.dtype)
    rope_q = (rope_q.to(tl.float32) / q_max[:, None]).to(rope_q.dtype)
    state = (tl.zeros([M, L], tl.float32), tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), q_max * scale)
    far_latent_q = latent_q.to(tl.float16) if V_CODED else latent_q
    far_rope_q = rope_q.to(tl.float16) if K_CODED else rope_q
    far = (far_k, far_v, far_k_stride, far_v_stride, table_ptr)
    full = v_first // N * N
    state = _far_latents(state, far_latent_q, far_rope_q, far, 0, full, v, N, L, R, BLOCK, False)
    state = _far_latents(state, far_latent_q, far_rope_q, far, full, v_last, v, N, L, R, BLOCK, True)
    if NEAR:
        near = (near_k, near_v, near_k_stride, near_v_stride, near_row)
        full = v_first
        if EXACT:
            full += tl.maximum(t_first + 1 - v_first, 0) // N * N
            state = _near_latents(state, latent_q, rope_q, near, v_first, full, v, position, N, L, R, False)
        state = _near_latents(state, latent_q, rope_q, near, full, t_last + 1, v, position, N, L, R, True)
    acc, _, total, _ = state

    is_query = (t_first + row // HEADS <= t_last) & (head < num_heads)
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + line[:, None] * L + tl.arange(0, L)[None, :], result, mask=is_query[:, None])


@triton.jit
def _far_latents(
    state,
    latent_q,
    rope_q,
    far,
    begin,
    end,
    v,
    N: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions `begin`, a multiple of N, to `end` out of blocks; MASKED: each row those below `v`."""
    k_ptr, v_ptr, k_stride, v_stride, table_ptr = far
    last = tl.maximum(end - 1, 0)
    block = tl.load(table_ptr + tl.minimum(begin, last) // BLOCK)
    for key in range(begin, end, N):
        next_block = tl.load(table_ptr + tl.minimum(key + N, last) // BLOCK)  # none waits for its block's id
        ropes = _keys(k_ptr + block * k_stride + key % BLOCK * R, R, end - key, N, R, MASKED)
        latents = _keys(v_ptr + block * v_stride + key % BLOCK * L, L, end - key, N, L, MASKED)
        keep = (key + tl.arange(0, N))[None, :] < v[:, None]
        state = _attend_latents(state, latent_q, rope_q, latents, ropes, keep, MASKED)
        block = next_block
    return state


@triton.jit
def _near_latents(
    state,
    latent_q,
    rope_q,
    near,
    begin,
    end,
    v,
    position,
    N: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions `begin` to `end` at full precision; MASKED: each row those from `v` to its own."""
    k_ptr, v_ptr, k_stride, v_stride, row = near
    for key in range(begin, end, N):
        ropes = _keys(k_ptr + (row + key) * k_stride, k_stride, end - key, N, R, MASKED)
        latents = _keys(v_ptr + (row + key) * v_stride, v_stride, end - key, N, L, MASKED)
        at = (key + tl.arange(0, N))[None, :]
        keep = (at >= v[:, None]) & (at <= position[:, None])
        state = _attend_latents(state, latent_q, rope_q, latents, ropes, keep, MASKED)
    return state


@triton.jit
def _attend_latents(state, latent_q, rope_q, latents, ropes, keep, MASKED: tl.constexpr):
    """One step of softmax(q kᵀ) v."""
    acc, m, total, to_log2 = state
    s = tl.dot(latent_q, tl.trans(latents), tl.dot(rope_q, tl.trans(ropes)))
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    m, total, alpha, p = _softmax_step(s, m, total, to_log2)
    return tl.dot(p.to(latents.dtype), latents, acc * alpha[:, None]), m, total, to_log2
