"""Heads that are yet to be normalised and rotated, and how that is done.

This is the definition; on a GPU it is one kernel (`rope`), or happens on the way into the store (`pack`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvtool.ranges import Range


class HeadNorm(Protocol):
    """RMSNorm of heads [T, Hq + Hkv, D], queries first; `weight` [2, D] is of queries and of keys."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RotaryHeads:
    """Queries of T tokens that are yet to be normalised, where the model does that, and rotated, and so are their keys.

    Attributes:
        made: [T, Hq + 2 · Hkv, D]: queries, keys and values, as a product made them.
        num_heads: Hq.
        cos, sin: [T, 1, 2, dim / 2] of the tokens' positions, the first sines negative; dim elements of a head are
            rotated.
    """

    made: Tensor
    num_heads: int
    cos: Tensor
    sin: Tensor
    norm: HeadNorm | None

    @property
    def num_kv_heads(self) -> int:
        return (self.made.shape[1] - self.num_heads) // 2

    @property
    def key(self) -> Tensor:
        """[T, Hkv, D], as made."""
        return self.made[:, self.num_heads : -self.num_kv_heads]

    @property
    def value(self) -> Tensor:
        """[T, Hkv, D]"""
        return self.made[:, -self.num_kv_heads :]

    def rotated(self) -> tuple[Tensor, Tensor]:
        """Queries [T, Hq, D] and keys [T, Hkv, D], ready."""
        x = self.made[:, : -self.num_kv_heads]
        with Range("kvtool::rope"):
            x = rotate(self.norm(x) if self.norm else x, self.cos, self.sin)
        return x[:, : self.num_heads], x[:, self.num_heads :]

    def empty(self) -> Tensor:
        """[T, Hq, D], where values go."""
        return self.made.new_empty(len(self.made), self.num_heads, self.made.shape[2])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` elements of every head, pairing element i with i + dim / 2.

    Shapes: x [T, H, D]; cos and sin [T, 1, 2, dim / 2] as `RotaryHeads` has them. Returns [T, H, D].
    """
    dim = 2 * cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    halves = x.view(*x.shape[:-1], 2, -1)
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2)
