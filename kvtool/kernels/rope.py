"""Queries and keys of a step: their normalisation and rotation in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2
from kvtool.kernels.rotary_heads import RotaryHeads

HEADS = 8  # of one token that a program rotates


def norm_rotate(heads: RotaryHeads) -> tuple[Tensor, Tensor]:
    """What `RotaryHeads.rotated` defines, computed in fp32."""
    made, num_heads, num_kv_heads = heads.made, heads.num_heads, heads.num_kv_heads
    tokens, _, dim = made.shape
    q, k = (made.new_empty(tokens, count, dim) for count in (num_heads, num_kv_heads))
    _norm_rotate[(tokens, -(-(num_heads + num_kv_heads) // HEADS))](
        made,
        *rotation(heads),
        num_heads,
        q,
        k,
        num_kv_heads,
        D=dim,
        WIDTH=power_of_2(dim),
        HEADS=HEADS,
        num_warps=2,
        **constants(heads),
        **chained(made.device),
    )
    return q, k


def rotation(heads: RotaryHeads) -> tuple[Tensor, Tensor, int, int, Tensor, float]:
    """What kernels take to normalise and rotate: cos, sin, their strides, and the weights and epsilon of the norm."""
    cos, sin, norm = heads.cos, heads.sin, heads.norm
    assert heads.made.is_contiguous() and cos.stride()[2:] == sin.stride()[2:] == (cos.shape[-1], 1)
    return cos, sin, cos.stride(0), sin.stride(0), norm.weight if norm else heads.made, norm.eps if norm else 0.0


def constants(heads: RotaryHeads) -> dict[str, int]:
    """What such kernels are compiled for."""
    return {"ROTATED": 2 * heads.cos.shape[-1], "NORM": heads.norm is not None}


@triton.jit
def _norm_rotate(
    made,
    cos,
    sin,
    cos_stride,
    sin_stride,
    weight,
    eps,
    num_heads,
    q,
    k,
    num_kv_heads,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None, None]
    channel = tl.arange(0, WIDTH)[None, None, :]
    inside = (head < num_heads + num_kv_heads) & (channel < D)
    await_inputs(CHAINED)
    x = made + (token * (num_heads + 2 * num_kv_heads) + head) * D
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
