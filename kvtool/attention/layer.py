"""What a backend must know of an attention layer, apart from its keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """Shape of one attention layer.

    Attributes:
        num_heads: query heads; each run of num_heads / num_kv_heads shares a KV head.
        scale: multiplies q·k before the softmax.
        head_dim: elements of a query: of a key and, but for `latent_dim`, of a value.
        latent_dim: elements of a latent (MLA, absorbed), of which values consist; a key is a latent and its rope key,
            and the store's streams hold these two apart. None: keys and values are what they seem.
        sliding_window: a query sees this many newest positions, itself included; None sees all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    latent_dim: int | None = None

    def describe(self) -> str:
        if self.latent_dim is not None:
            return f"{self.num_heads} heads over latents of {self.latent_dim} + {self.head_dim - self.latent_dim}"
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}{window}"


def operands(key: Tensor, value: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """What queries are multiplied with, and what they gather, of streams [..., D] as the store has them."""
    return (key, value) if layer.latent_dim is None else (torch.cat([value, key], dim=-1), value)
