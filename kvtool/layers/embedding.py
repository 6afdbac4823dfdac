"""Token embedding."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.layers.linear import empty_parameter


class Embedding(nn.Module):
    """One row per token id: ids [T] int64 → [T, hidden_size]."""

    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def slots(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint name of the weight, and where it goes."""
        yield f"{path}.weight", self.weight
