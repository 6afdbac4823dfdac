"""Token embedding, and the scores of tokens."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.layers.linear import Slot, empty_parameter, linear
from kvtool.layers.quantized import Matrix
from kvtool.parallel import Group

FEW_ROWS = 64  # of scores: they are copied in no time, and `linear` has kernels of its own for them


class Embedding(nn.Module):
    """One row per token id, to look ids up or to score them. Each rank has as many rows, the last ones fewer.

    Attributes:
        scorer: the same rows in fewer bits, to score ids with; None: the weight does.
    """

    weight: Tensor
    scorer: Matrix | None

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: Group, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.vocab_size, self.tp = vocab_size, tp
        self.num_rows = -(-vocab_size // tp.size)
        self.first = tp.rank * self.num_rows
        self.weight = empty_parameter(self.num_rows, hidden_size, dtype=dtype, device=device)
        self.scorer = None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of `ids` [T] int64: [T, hidden_size]."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        rows = ids - self.first
        theirs = (rows < 0) | (rows >= self.num_rows)
        found = F.embedding(rows.masked_fill(theirs, 0), self.weight)
        return self.tp.all_reduce(found.masked_fill_(theirs[:, None], 0))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores of all ids: hidden [N, hidden_size] → [N, vocab_size], in `out` if that is given."""
        rows = self.weight if self.scorer is None else self.scorer
        if out is not None and len(hidden) > FEW_ROWS and self.tp.size == 1 and isinstance(rows, Tensor):
            return torch.mm(hidden, rows.t(), out=out)
        scores = self.tp.all_gather(linear(hidden, rows))[:, : self.vocab_size]
        return scores.contiguous() if out is None else out.copy_(scores)

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint name of the weight, and where it goes."""
        held, width = max(0, min(self.num_rows, self.vocab_size - self.first)), self.weight.shape[1]
        yield f"{path}.weight", Slot(self.weight[:held], (self.vocab_size, width), (self.first, 0))
