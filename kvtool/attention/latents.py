"""Queries over latents (MLA), and the two ways in which they can meet them.

*Absorbed*: a head's key product goes over to its query and its value product to its output, so that attention reads
latents as they are stored, as one KV head that is key and value at once. *Expanded*: the products make keys and values
of every head. Attention then multiplies fewer elements, once the making is paid for (DeepSeek-V2, arXiv:2405.04434).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvtool.kv.batch import Integers
from kvtool.kv.hadamard import hadamard


@dataclass(frozen=True)
class LatentQueries:
    """Queries of T tokens that have met no product yet.

    Attributes:
        nope: [T, H, N], for keys that are made of latents.
        absorbing: [T, H, L + R], of which the last R elements are for rope keys; the rest is room for `absorbed`.
        products: [H, N + V, L], for each head what makes its keys of a latent, and then what makes its values.
    """

    nope: Tensor
    absorbing: Tensor
    products: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.nope.dtype

    @property
    def latent_dim(self) -> int:
        return self.products.shape[2]

    @property
    def rope(self) -> Tensor:
        """[T, H, R]"""
        return self.absorbing[..., self.latent_dim :]

    @property
    def value_dim(self) -> int:
        return self.products.shape[1] - self.nope.shape[2]

    def rows(self, rows: slice) -> "LatentQueries":
        """Those of some of the tokens."""
        return replace(self, nope=self.nope[rows], absorbing=self.absorbing[rows])

    def rotated(self, *, key: bool, latent: bool) -> "LatentQueries":
        """As expanded ones meet rope keys and latents that are stored rotated."""
        if not key and not latent:
            return self
        rope = hadamard(self.rope) if key else self.rope
        return LatentQueries(
            self.nope,
            torch.cat([self.absorbing[..., : self.latent_dim], rope], dim=-1),
            hadamard(self.products) if latent else self.products,
        )

    def absorbed(self) -> Tensor:
        """[T, H, L + R], as they meet a latent and its rope key."""
        into = self.absorbing[..., : self.latent_dim].transpose(0, 1)
        torch.bmm(self.nope.transpose(0, 1), self.products[:, : self.nope.shape[2]], out=into)
        return self.absorbing

    def values(self, gathered: Tensor) -> Tensor:
        """What absorbed queries have gathered of latents [T, H, L], as values [T, H, V]."""
        out = self.empty()
        products = self.products[:, self.nope.shape[2] :].transpose(1, 2)
        torch.bmm(gathered.transpose(0, 1), products, out=out.transpose(0, 1))
        return out

    def expanded(self, key: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, n, N + R] and values [H, n, V] of n tokens' rope keys [n, R] and latents [n, L]."""
        made = latent @ self.products.transpose(1, 2)
        nope, value = made.split([self.nope.shape[2], self.value_dim], dim=-1)
        return torch.cat([nope, key.expand(len(made), -1, -1)], dim=-1), value

    def empty(self) -> Tensor:
        """[T, H, V], where values go."""
        return self.nope.new_empty(*self.nope.shape[:2], self.value_dim)

    def expand(self, spans: Integers) -> bool:
        """Whether expanding costs fewer multiplications than absorbing, for spans [P, 5] as in `Prompts`.

        Both take a token that the step computes through all products once. To expand an older one takes L (N + V) for
        each head; that saves (2 L + R) - (N + R + V) for each query that sees it, or sees a new one. So a prompt
        without context expands, and one with it from 171 queries on at DeepSeek's sizes (L 512, N and V 128), more if
        several spans are short. What a graph reads is not known here (it has no spans): it absorbs.
        """
        start, end = spans.T[1:3]
        widths, pairs = self.products.shape[1], (end - start) * (start + end + 1) // 2
        cost, saved = start.sum() * self.latent_dim * widths, pairs.sum() * (2 * self.latent_dim - widths)
        return bool(cost < saved)
