"""What prefill kernels share: tiles of a step's queries, and one step of the softmax over their keys."""

from dataclasses import dataclass

import triton
import triton.language as tl

from kvtool.kernels.launch import next_power_of_2

FIELDS = tl.constexpr(10)  # of a row of `Prompts.tiles`


@dataclass(frozen=True)
class Tile:
    """Queries times heads, and keys, that a program multiplies at a time; its warps and pipeline stages, and how many
    programs an SM runs at once."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    per_sm: int = 1


@triton.jit
def tile_at(tiles_ptr, index, TOKENS: tl.constexpr):
    """A tile's span, the token of position 0, its first and last position, the first near position, and the near row of
    position 0."""
    tile = tiles_ptr + index * FIELDS
    t_first, start = tl.load(tile + 1).to(tl.int32), tl.load(tile + 3).to(tl.int32)
    t_last = tl.minimum(t_first + TOKENS, tl.load(tile + 4).to(tl.int32)) - 1
    near_first = tl.load(tile + 5).to(tl.int32)
    return tl.load(tile), tl.load(tile + 2) - start, t_first, t_last, near_first, tl.load(tile + 6) - near_first


@triton.jit
def first_near(visible_ptr, token, t_first, t_last, position, near_first, EXACT: tl.constexpr, NEAR: tl.constexpr):
    """v(t) of the first query, of the last and of each: all read blocks below the first, none from the second on."""
    if EXACT:
        return near_first, near_first, tl.zeros_like(position) + near_first
    elif NEAR:
        v_first = tl.load(visible_ptr + token + t_first).to(tl.int32)
        v_last = tl.load(visible_ptr + token + t_last).to(tl.int32)
        return v_first, v_last, tl.load(visible_ptr + token + position).to(tl.int32)
    else:
        return t_first + 1, t_last + 1, position + 1


@triton.jit
def load_keys(ptr, stride, count, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """[N, D padded] of keys or values, zeros in the padding and, if MASKED, from `count` on."""
    PAD: tl.constexpr = next_power_of_2(D)
    key = tl.arange(0, N)[:, None]
    channel = tl.arange(0, PAD)[None, :]
    if MASKED:  # what lies there may be NaN, and 0 x NaN is NaN
        return tl.load(ptr + key * stride + channel, mask=(key < count) & (channel < D), other=0)
    elif PAD != D:
        return tl.load(ptr + key * stride + channel, mask=channel < D, other=0)
    else:
        return tl.load(ptr + key * stride + channel)


@triton.jit
def gather(acc, m, total, s, v, to_log2, keep, MASKED: tl.constexpr):
    """One step of softmax(s) v: maxima `m` in units of log2, sums `total`, both [M], and `acc` [M, D]."""
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
    p = tl.exp2(s * to_log2[:, None] - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, total * alpha + tl.sum(p, 1)
