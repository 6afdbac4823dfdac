"""Queries and keys of a step: their normalisation and rotation in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2

HEADS = 8  # of one token that a program rotates


def norm_rotate(
    heads: Tensor, num_heads: int, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What `kvtool.layers.rotary.rotate` makes of queries and keys, normalised before that where there is a `weight`.

    Computed in fp32.

    Args:
        heads: [T, Hq + 2 · Hkv, D]: queries, keys and values; values are not looked at.
        num_heads: Hq.
        cos, sin: [T, 1, 2, dim / 2] as `kvtool.layers.rotary.Rotary` gives them, dim elements of a head being rotated.
        weight: [2, D], of the RMSNorm of queries and of keys (`kvtool.layers.norm.QKNorm`).

    Returns:
        Queries [T, Hq, D] and keys [T, Hkv, D].
    """
    tokens, count, dim = heads.shape
    num_kv_heads, rotated = (count - num_heads) // 2, 2 * cos.shape[-1]
    assert heads.is_contiguous() and cos.stride(-1) == sin.stride(-1) == 1 and sin.stride(2) == rotated // 2
    q = torch.empty(tokens, num_heads, dim, dtype=heads.dtype, device=heads.device)
    k = torch.empty(tokens, num_kv_heads, dim, dtype=heads.dtype, device=heads.device)
    _norm_rotate[(tokens, -(-(num_heads + num_kv_heads) // HEADS))](
        heads,
        q,
        k,
        cos,
        sin,
        cos.stride(0),
        sin.stride(0),
        heads if weight is None else weight,
        eps,
        num_heads,
        num_kv_heads,
        D=dim,
        HALF=rotated // 2,
        HALF_WIDTH=power_of_2(rotated // 2),
        REST=dim - rotated,
        REST_WIDTH=power_of_2(max(1, dim - rotated)),
        HEADS=HEADS,
        NORM=weight is not None,
        num_warps=2,
        **chained(heads.device),
    )
    return q, k


@triton.jit
def _norm_rotate(
    heads,
    q,
    k,
    cos,
    sin,
    cos_stride,
    sin_stride,
    weight,
    eps,
    num_heads,
    num_kv_heads,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_WIDTH)[None, :]
    inside = (head < num_heads + num_kv_heads) & (pair < HALF)
    await_inputs(CHAINED)
    x = heads + (token * (num_heads + 2 * num_kv_heads) + head) * D
    first = tl.load(x + pair, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + HALF + pair, mask=inside, other=0).to(tl.float32)
    past = tl.arange(0, REST_WIDTH)[None, :]
    inside_rest = (head < num_heads + num_kv_heads) & (past < REST)
    rest = tl.zeros([HEADS, REST_WIDTH], tl.float32)
    if REST:
        rest = tl.load(x + 2 * HALF + past, mask=inside_rest, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)) / D + eps)[:, None]
        gain = weight + (head >= num_heads) * D
        first *= scale * tl.load(gain + pair, mask=inside, other=0).to(tl.float32)
        second *= scale * tl.load(gain + HALF + pair, mask=inside, other=0).to(tl.float32)
        if REST:
            rest *= scale * tl.load(gain + 2 * HALF + past, mask=inside_rest, other=0).to(tl.float32)
    c = tl.load(cos + token * cos_stride + pair, mask=pair < HALF, other=0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + HALF + pair, mask=pair < HALF, other=0).to(tl.float32)
    first, second = first * c - second * s, second * c + first * s
    as_query = q + (token * num_heads + head) * D
    as_key = k + (token * num_kv_heads + head - num_heads) * D
    to = tl.where(head < num_heads, as_query, as_key)
    tl.store(to + pair, first.to(q.dtype.element_ty), mask=inside)
    tl.store(to + HALF + pair, second.to(q.dtype.element_ty), mask=inside)
    if REST:
        tl.store(to + 2 * HALF + past, rest.to(q.dtype.element_ty), mask=inside_rest)
