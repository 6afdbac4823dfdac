"""What latent attention makes of a token before it attends: rotated queries and key, a normalised latent."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2

HEADS = 8  # of one token that a program rotates


def rotate_and_norm(
    q: Tensor, latents: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, eps: float, *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `kvtool.layers.mla.rotate_and_norm` defines, computed in fp32.

    Args:
        q: [T, H, D], of which the last R elements are rotated; latents: [T, L + R], with rope keys behind.
        cos, sin: [T, 1, 2, R / 2] as `kvtool.layers.rotary.Rotary` gives them.
        gain: [L], of the RMSNorm of latents.
        interleaved: rotated elements come in pairs of neighbours; they leave in halves.

    Returns:
        [T, H, L + R], the last R elements filled with rotated queries, [T, L] normalised, and [T, R] rotated.
    """
    tokens, num_heads, dim = q.shape
    latent, half = len(gain), cos.shape[-1]
    assert q.stride(2) == latents.stride(1) == cos.stride(-1) == sin.stride(-1) == 1 and q.stride(1) == dim
    queries = torch.empty(tokens, num_heads, latent + 2 * half, dtype=q.dtype, device=q.device)
    normed = torch.empty(tokens, latent, dtype=q.dtype, device=q.device)
    key = torch.empty(tokens, 2 * half, dtype=q.dtype, device=q.device)
    _rotate_and_norm[(tokens, -(-num_heads // HEADS) + 1)](
        q,
        latents,
        queries,
        normed,
        key,
        cos,
        sin[:, :, 1:],
        gain,
        eps,
        q.stride(0),
        latents.stride(0),
        cos.stride(0),
        sin.stride(0),
        num_heads,
        REST=dim - 2 * half,
        HALF=half,
        WIDTH=power_of_2(half),
        L=latent,
        L_WIDTH=power_of_2(latent),
        INTERLEAVED=interleaved,
        HEADS=HEADS,
        num_warps=2,
        **chained(q.device),
    )
    return queries, normed, key


@triton.jit
def _rotate_and_norm(
    q,
    latents,
    queries,
    normed,
    key,
    cos,
    sin,
    gain,
    eps,
    q_stride,
    latents_stride,
    cos_stride,
    sin_stride,
    num_heads,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    L: tl.constexpr,
    L_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, heads), and a last one of each token for latent and key."""
    token = tl.program_id(0).to(tl.int64)
    await_inputs(CHAINED)
    pair = tl.arange(0, WIDTH)[None, :]
    c = tl.load(cos + token * cos_stride + pair, mask=pair < HALF, other=0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + pair, mask=pair < HALF, other=0).to(tl.float32)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        x = q + token * q_stride + head * (REST + 2 * HALF) + REST
        to = queries + (token * num_heads + head) * (L + 2 * HALF) + L
        _rotate(x, to, c, s, (head < num_heads) & (pair < HALF), pair, HALF, INTERLEAVED)
    else:
        line = latents + token * latents_stride
        _rotate(line + L, key + token * (2 * HALF), c, s, pair < HALF, pair, HALF, INTERLEAVED)
        channel = tl.arange(0, L_WIDTH)
        row = tl.load(line + channel, mask=channel < L, other=0).to(tl.float32)
        row *= tl.rsqrt(tl.sum(row * row, 0) / L + eps)
        row *= tl.load(gain + channel, mask=channel < L, other=0).to(tl.float32)
        tl.store(normed + token * L + channel, row.to(normed.dtype.element_ty), mask=channel < L)


@triton.jit
def _rotate(x, to, c, s, inside, pair, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Pairs of `x` by cosines and sines, to halves."""
    first = tl.load(x + (2 * pair if INTERLEAVED else pair), mask=inside, other=0).to(tl.float32)
    second = tl.load(x + (2 * pair + 1 if INTERLEAVED else HALF + pair), mask=inside, other=0).to(tl.float32)
    tl.store(to + pair, (first * c - second * s).to(to.dtype.element_ty), mask=inside)
    tl.store(to + HALF + pair, (second * c + first * s).to(to.dtype.element_ty), mask=inside)
