"""Ranks that share a model, one process each: what each holds, and how they exchange tensors, by torch.distributed."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A rank's part of something that is counted: `size` of `total`, from `start` on."""

    total: int
    start: int
    size: int

    def times(self, n: int) -> "Shard":
        """The same part where each of what is counted is `n`: elements of heads, say."""
        return Shard(self.total * n, self.start * n, self.size * n)


class Group:
    """Ranks that hold shards of the same layers, and compute each step together. For one rank its collectives are the
    identity. They are called by all ranks of a group, in the same order, with tensors of one shape.

    Args:
        rank, size: this one of how many.
        ranks: torch's group of them; None for one alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, ranks: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._ranks = rank, size, ranks

    def shard(self, total: int) -> Shard:
        """This rank's part of `total` heads or rows. Where there are fewer than ranks, several hold the same one.

        `total` is a multiple of the ranks or they are one of it.
        """
        assert total % self.size == 0 or self.size % total == 0
        size = max(1, total // self.size)
        return Shard(total, self.rank * total // self.size, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten; the same bits on each of them."""
        if self.size > 1:
            dist.all_reduce(x, group=self._ranks)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [T, n] side by side: [T, n * size]."""
        if self.size == 1:
            return x
        gathered = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self._ranks)
        return gathered.transpose(0, 1).reshape(len(x), -1)


ALONE = Group()


class Stage:
    """A rank's place in a pipeline: hidden states come from the stage before it and go to the one behind.

    Args:
        index, count: this stage of how many.
        before, behind: ranks of those two stages that hold the same shard.
    """

    def __init__(self, index: int = 0, count: int = 1, before: int = -1, behind: int = -1) -> None:
        self.index, self.count, self._before, self._behind = index, count, before, behind

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Those of this stage."""
        return range(self.index * num_layers // self.count, (self.index + 1) * num_layers // self.count)

    def receive(self, into: Tensor) -> Tensor:
        """Fill `into` with what the stage before has sent; returns it."""
        dist.recv(into, self._before)
        return into

    def send(self, x: Tensor) -> Tensor:
        """Hand `x` to the stage behind; returns it."""
        dist.send(x.contiguous(), self._behind)
        return x


@dataclass(frozen=True)
class Parallel:
    """A rank's place among all that run one model.

    Attributes:
        tp: those that hold shards of the same layers.
        stage: of the pipeline.
    """

    tp: Group = ALONE
    stage: Stage = field(default_factory=Stage)
