"""Ranks that share a model, one process each: what each holds, and how they exchange tensors, by torch.distributed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from kvtool.errors import KVToolError, UnsupportedError
from kvtool.ranges import Range

# Its name up to torch 2.12, which later ones warn of.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ONE_SHOT_BYTES = 2 << 20  # 292 rows of 3,584; what is longer is bound by the link, and NCCL cuts it well
COMMUNICATION = "kvtool::communication"  # as it stands in a profile
FOREVER = timedelta(days=100)
WORDS = 1000  # bytes of what a rank can say is wrong with it


@dataclass(frozen=True)
class Shard:
    """A rank's part of something that is counted: `size` of `total`, from `start` on."""

    total: int
    start: int
    size: int

    @classmethod
    def whole(cls, total: int) -> "Shard":
        """What every rank has all of."""
        return cls(total, 0, total)

    @classmethod
    def of(cls, total: int, index: int, count: int) -> "Shard":
        """One of `count` equal parts. Where there is less than that to share out, several of them are the same.

        `total` is a multiple of `count` or they are one of it.
        """
        assert total % count == 0 or count % total == 0
        return cls(total, index * total // count, max(1, total // count))

    def times(self, n: int) -> "Shard":
        """The same part where each of what is counted is `n`: elements of heads, say."""
        return Shard(self.total * n, self.start * n, self.size * n)


class OneShot:
    """All-reduce of a few rows in memory that the GPUs of a group map from each other (torch's symmetric memory, over
    NVLink or P2P): each reads what all have written and sums it up in the order of the ranks, with one kernel.

    Args:
        number: rendezvous that the rank with most of them has had in its process. torch counts them, and ranks whose
            counts differ never meet: a process started for the first rank's second engine makes up for its fewer alone.

    Raises:
        RuntimeError: the GPUs cannot map each other's memory.
    """

    rendezvous = 0  # of this process so far

    def __init__(self, ranks: dist.ProcessGroup, device: torch.device, number: int) -> None:
        # Multicast is not used here, and setting it up may fail where plain mappings work.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        if OneShot.rendezvous < number:
            alone = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
            while OneShot.rendezvous < number:
                self._map(alone, device)
            dist.destroy_process_group(alone)
        self._buffer = self._map(ranks, device)
        self._name = ranks.group_name

    @staticmethod
    def _map(ranks: dist.ProcessGroup, device: torch.device) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric

        OneShot.rendezvous += 1
        buffer = symmetric.empty(ONE_SHOT_BYTES // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(buffer, ranks)
        return buffer

    def takes(self, x: Tensor) -> bool:
        """It fits, and its rows are whole 16-byte words."""
        return x.dtype == self._buffer.dtype and x.nbytes <= ONE_SHOT_BYTES and x.nbytes % 16 == 0

    def sum(self, x: Tensor) -> Tensor:
        # Copied by a kernel of its own: torch's that copies and sums does not wait for all of its threads in between.
        shared = self._buffer[: x.numel()].view(x.shape).copy_(x)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._name)
        return total


class Group:
    """Ranks that hold shards of the same layers, and compute each step together. For one rank its collectives are the
    identity. They are called by all ranks of a group, in the same order, with tensors of one shape.

    Args:
        rank, size: this one of how many.
        ranks: torch's group of them; None for one alone.
        ep: parts into which a layer's experts are divided (expert parallelism), a divisor of `size`; as many ranks as
            have the same part follow each other, and each has a shard of all of its experts.

    Attributes:
        one_shot: sums up what it takes; the rest goes by NCCL or gloo.
    """

    def __init__(self, rank: int = 0, size: int = 1, ranks: dist.ProcessGroup | None = None, *, ep: int = 1) -> None:
        self.rank, self.size, self.ranks, self.ep = rank, size, ranks, ep
        self.one_shot: OneShot | None = None

    def shard(self, total: int) -> Shard:
        """This rank's part of `total` heads or rows, as `Shard.of` has it."""
        return Shard.of(total, self.rank, self.size)

    def shard_experts(self, num_experts: int, columns: int) -> tuple[Shard, Shard]:
        """Which experts this rank has, and which of the columns of each."""
        sharing = self.size // self.ep
        return Shard.of(num_experts, self.rank // sharing, self.ep), Shard.of(columns, self.rank % sharing, sharing)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten; the same bits on each of them."""
        if self.size == 1:
            return x
        with Range(COMMUNICATION):
            if self.one_shot and self.one_shot.takes(x):
                return self.one_shot.sum(x)
            dist.all_reduce(x, group=self.ranks)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [T, n] side by side: [T, n * size]."""
        if self.size == 1:
            return x
        gathered = torch.empty(self.size * len(x), x.shape[1], dtype=x.dtype, device=x.device)
        with Range(COMMUNICATION):
            all_gather(gathered, x.contiguous(), group=self.ranks)
        return gathered.view(self.size, *x.shape).transpose(0, 1).reshape(len(x), self.size * x.shape[1])

    def broadcast(self, x: Tensor) -> Tensor:
        """The first one's `x`, which the others have room for in theirs; returns it."""
        if self.size > 1:
            dist.broadcast(x, group=self.ranks, group_src=0)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' `x`, in their order, on the first one; nothing on the others."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, group=self.ranks, group_dst=0)
        return parts or []

    def scatter(self, parts: list[Tensor], into: Tensor) -> Tensor:
        """Fill `into` with this rank's one of `parts`, which the first has; returns it."""
        if self.size == 1:
            return into.copy_(parts[0])
        dist.scatter(into, parts if self.rank == 0 else None, group=self.ranks, group_src=0)
        return into


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
        with Range(COMMUNICATION):
            dist.recv(into, self._before)
        return into

    def send(self, x: Tensor) -> Tensor:
        """Hand `x` to the stage behind; returns it."""
        with Range(COMMUNICATION):
            dist.send(x.contiguous(), self._behind)
        return x


@dataclass(frozen=True)
class Parallel:
    """A rank's place among all that run one model.

    Attributes:
        rank, size: this one of how many; ranks of one group follow each other, and so do the groups of a pipeline.
        tp: those that hold shards of the same layers.
        stage: of the pipeline.
    """

    rank: int = 0
    size: int = 1
    tp: Group = ALONE
    stage: Stage = field(default_factory=Stage)

    @property
    def first_of_last_stage(self) -> int:
        """The rank that speaks for the end of the pipeline."""
        return self.size - self.tp.size

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x` of the rank `source`, which all others have room for in theirs; returns it."""
        if self.size > 1:
            dist.broadcast(x, source)
        return x

    def send(self, x: Tensor, rank: int) -> None:
        dist.send(x.contiguous(), rank)

    def receive(self, into: Tensor, rank: int) -> Tensor:
        """Fill `into` with what `rank` sends; returns it."""
        dist.recv(into, rank)
        return into

    def least(self, *values: int) -> tuple[int, ...]:
        """The smallest that any rank has, of each."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def total(self, *values: int) -> tuple[int, ...]:
        """The sum over all ranks, of each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: tuple[int, ...], how: dist.ReduceOp.RedOpType) -> tuple[int, ...]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, how)
        return tuple(tensor.tolist())

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What fails inside on one rank fails on all, so that none waits for it. No rank needs another inside.

        Raises:
            KVToolError: this rank's, or what the first one with an error says.
        """
        problem = None
        try:
            yield
        except KVToolError as error:
            if self.size == 1:
                raise
            problem = error
        if self.size == 1:
            return
        words = str(problem or "").encode()[:WORDS]
        told = torch.zeros(self.size, WORDS, dtype=torch.uint8)
        told[self.rank, : len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8) if words else 0
        dist.all_reduce(told)
        if problem:
            raise problem
        for rank, row in enumerate(told):
            if row.any():
                raise KVToolError(f"rank {rank}: {bytes(row.tolist()).rstrip(bytes(1)).decode(errors='replace')}")

    @contextmanager
    def faults_noted(self, note: Callable[[], None]) -> Iterator[None]:
        """What a format cannot hold is an error at once, but not where other ranks wait for this one in the midst of a
        step: it goes on, and whoever asks the store behind the step hears that it was in vain."""
        try:
            yield
        except UnsupportedError:
            if self.size == 1:
                raise
            note()


ONE_RANK = Parallel()


def join(store: Store, rank: int, tp: int, ep: int, pp: int, device: torch.device) -> Parallel:
    """Take this rank's place among tp * pp, all of which call this; NCCL carries what is on GPUs, gloo the rest.

    Args:
        store: where the ranks find each other.
        ep: as in `Group`.
        device: of this rank, no other's.
    """
    on_gpu, size = device.type == "cuda", tp * pp
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=FOREVER,  # a rank may load its weights for long; who watches them all says when one hangs
        device_id=device if on_gpu else None,
    )
    index, of_group = divmod(rank, tp)
    group = ALONE
    if tp > 1:
        groups = [dist.new_group(list(range(first, first + tp)), timeout=FOREVER) for first in range(0, size, tp)]
        group = Group(of_group, tp, groups[index], ep=ep)
    return Parallel(rank, size, group, Stage(index, pp, rank - tp, rank + tp))


def use_one_shot(parallel: Parallel, device: torch.device) -> str:
    """Let the ranks of each group sum up by `OneShot`, if all can.

    Returns:
        Why not; empty where they do.
    """
    tp, problem = parallel.tp, ""
    first = (device.index or 0) - tp.rank
    peers = [index for index in range(first, first + tp.size) if index != device.index]
    if device.type != "cuda":
        problem = "there are no GPUs"
    elif tp.size == 1:
        problem = "no layer is shared (--tp 1)"
    elif os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        problem = "NCCL_P2P_DISABLE is set"
    elif first < 0 or first + tp.size > torch.cuda.device_count():
        problem = "the GPUs of a group are on several machines"
    elif not all(torch.cuda.can_device_access_peer(device.index, peer) for peer in peers):
        problem = "the GPUs have no P2P access to each other"
    if parallel.least(not problem) == (0,):
        return problem or "another rank cannot"
    assert tp.ranks is not None
    (fewest,) = parallel.least(-OneShot.rendezvous)
    try:
        tp.one_shot = OneShot(tp.ranks, device, -fewest)
        right = _sums_alike(tp, device)
    except RuntimeError as error:
        right, problem = False, str(error).partition("\n")[0]
    if parallel.least(right) == (0,):
        tp.one_shot = None
        return problem or "a trial gave other sums than NCCL"
    return ""


def _sums_alike(tp: Group, device: torch.device) -> bool:
    """A trial: sums are right, and the same bits on all ranks, again and again over the same memory."""
    assert tp.one_shot is not None
    for trial in range(20):
        generator = torch.Generator(device).manual_seed(tp.size * trial + tp.rank)
        x = torch.randn(trial + 1, 4096, generator=generator, device=device).bfloat16()
        exact, total = x.float(), tp.one_shot.sum(x)
        dist.all_reduce(exact, group=tp.ranks)
        most, least = total.float(), total.float()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=tp.ranks)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=tp.ranks)
        if not torch.equal(most, least) or not torch.allclose(total.float(), exact, rtol=0.02, atol=0.02):
            return False
    return True


def leave(parallel: Parallel) -> None:
    """Give the place up, when all that was begun together is done; all ranks do."""
    if parallel.tp.one_shot:  # NCCL's orderly end may not come back where ranks map each other's memory
        torch.cuda.synchronize()
        abort()
    else:
        dist.destroy_process_group()


def abort() -> None:
    """Give the place up at once, whatever was begun, and whether the others are still there."""
    dist.distributed_c10d._abort_process_group()
