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
    """What `kvtool.attention.heads.rotate` makes of queries and keys, normalised before that where there is a `weight`.

    Computed in fp32.

    Args:
        heads: [T, Hq + 2 · Hkv, D]: queries, keys and values; values are not looked at.
        num_heads: Hq.
        cos, sin: [T, 1, 2, dim / 2] as `kvtool.attention.heads.RotaryHeads` has them.
        weight: [2, D], of the RMSNorm of queries and of keys (`kvtool.layers.norm.QKNorm`).

    Returns:
        Queries [T, Hq, D] and keys [T, Hkv, D].
    """
    tokens, count, dim = heads.shape
    num_kv_heads = (count - num_heads) // 2
    assert heads.is_contiguous() and all(x[0].is_contiguous() for x in (cos, sin))
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
        ROTATED=2 * cos.shape[-1],
        WIDTH=power_of_2(dim),
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
    ROTATED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None, None]
    channel = tl.arange(0, WIDTH)[None, None, :]
    inside = (head < num_heads + num_kv_heads) & (channel < D)
    await_inputs(CHAINED)
    x = heads + (token * (num_heads + 2 * num_kv_heads) + head) * D
    gain = weight + (head >= num_heads) * D
    cos += token * cos_stride
    sin += token * sin_stride
    value = rotated(x, channel, inside, cos, sin, gain, eps, D, ROTATED, NORM)
    as_query = q + (token * num_heads + head) * D
    as_key = k + (token * num_kv_heads + head - num_heads) * D
    tl.store(tl.where(head < num_heads, as_query, as_key) + channel, value, mask=inside)


@triton.jit
def rotated(
    x, channel, inside, cos, sin, gain, eps, D: tl.constexpr, ROTATED: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Channels of heads, normalised and rotated, in the dtype of `x`.

    Args:
        x: [heads, 1, 1], where each head begins; gain: [heads, 1, 1] or a scalar, where the weights of its norm do.
        channel: [1, parts, width], all of a head; inside: which of them are some, of heads that there are.
        cos, sin: of the token, `ROTATED` each.
    """
    turned = channel < ROTATED
    partner = tl.where(turned, (channel + ROTATED // 2) % ROTATED, channel)
    one = tl.load(x + channel, mask=inside, other=0).to(tl.float32)
    other = tl.load(x + partner, mask=inside, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(one * one, 2, keep_dims=True), 1, keep_dims=True) / D + eps)
        one *= scale * tl.load(gain + channel, mask=inside, other=0).to(tl.float32)
        other *= scale * tl.load(gain + partner, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + channel, mask=turned, other=0).to(tl.float32)
    s = tl.load(sin + channel, mask=turned, other=0).to(tl.float32)
    return (one * tl.where(turned, c, 1) + other * s).to(x.dtype.element_ty)
