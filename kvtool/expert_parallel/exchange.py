"""Ways in which tokens reach experts on other ranks and come back; each one function over the same work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from kvtool.expert_parallel.layer import mix_loop, mix_padded
from kvtool.layers.moe import Experts

CONTROL, DISPATCH, EXPERT, COMBINE = PHASES = ("control", "dispatch", "expert", "combine")


class Ranks:
    """This process among those that share the experts: a thin layer over the default group of torch.distributed.

    Attributes:
        sent_bytes: that have left this rank in tokens and in what goes with them, so far.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent_bytes = rank, size, 0

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def nothing(self) -> list[list[Tensor]]:
        """For each rank."""
        return [[] for _ in range(self.size)]

    def exchange(self, sends: Sequence[Sequence[Tensor]], into: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
        """Send `sends[r]` to each other rank r, and fill `into[r]` with what it sends; what is empty stays at home.

        Returns:
            What waits until it is done: on a GPU the stream, not the host.
        """
        operations = []
        for other in self.others:
            for tensor in sends[other]:
                if tensor.numel():
                    operations.append(dist.P2POp(dist.isend, tensor, other))
                    self.sent_bytes += tensor.nbytes
            operations += [dist.P2POp(dist.irecv, tensor, other) for tensor in into[other] if tensor.numel()]
        return partial(_wait, dist.batch_isend_irecv(operations) if operations else [])

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ...], a part for each rank → the parts that they have for this one."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        self.sent_bytes += x.nbytes // self.size * (self.size - 1)
        return received

    def all_gather(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """x [n, ...] of all ranks, [size * n, ...], and what waits until it is there, as that of `exchange` does."""
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        work = dist.all_gather_into_tensor(gathered, x, async_op=True)
        self.sent_bytes += x.nbytes * (self.size - 1)
        return gathered, partial(_wait, [work])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of x [size * n, ...], of which this rank gets its n rows."""
        reduced = torch.empty(len(x) // self.size, *x.shape[1:], dtype=x.dtype, device=x.device)
        dist.reduce_scatter_tensor(reduced, x)
        self.sent_bytes += reduced.nbytes * (self.size - 1)
        return reduced


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


class Clock:
    """Stamps where the phases of a run begin: of the GPU's stream, so that the host need not wait, or of the CPU.

    Args:
        in_graph: the stamps are captured with the run, and tell of its newest replay.
    """

    def __init__(self, device: torch.device, *, in_graph: bool = False) -> None:
        self.on_gpu, self.in_graph = device.type == "cuda", in_graph
        self.stamps: list[tuple[str, torch.cuda.Event | float]] = []

    def __call__(self, phase: str) -> None:
        """What follows belongs to `phase`; "" ends the run."""
        if not self.on_gpu:
            self.stamps.append((phase, perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True, external=self.in_graph)
        event.record()
        self.stamps.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Of each phase. Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        phases = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self.stamps, self.stamps[1:], strict=False):
            phases[phase] += _seconds(start, end)
        return phases


def _seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Work:
    """One rank's tokens and experts.

    Attributes:
        x: [T, H], its own tokens.
        slots: [T, top_k] int64, where the experts stand that they want.
        weights: [T, top_k] fp32.
        told: both side by side, as they travel with tokens: [T, 2 · top_k] int32, the weights by their bits.
        experts: in its own slots, which are as many on each rank.
    """

    x: Tensor
    slots: Tensor
    weights: Tensor
    told: Tensor
    experts: Experts
    ranks: Ranks

    @classmethod
    def of(cls, x: Tensor, slots: Tensor, weights: Tensor, experts: Experts, ranks: Ranks) -> "Work":
        """A router can write `told` at once; here it is no part of what is timed."""
        told = torch.cat([slots.int(), weights.view(torch.int32)], dim=1)
        return cls(x, slots, weights, told, experts, ranks)

    @property
    def num_slots(self) -> int:
        """Of one rank."""
        return len(self.experts.down)

    def mix(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """What this rank's experts make of tokens, in grouped products. On a GPU, in 16 bits, the host waits for
        nothing in it."""
        mixed: Tensor = self.experts(x, slots, weights)
        return mixed

    def mine(self, slots: Tensor) -> Tensor:
        """Slots counted from this rank's first one on, around all of them: below `num_slots` are those of this rank."""
        return (slots - self.ranks.rank * self.num_slots) % (self.num_slots * self.ranks.size)

    def visits(self) -> Tensor:
        """[T, ranks] bool: which ranks have an expert that a token wants."""
        none = torch.zeros(len(self.x), self.ranks.size, dtype=torch.bool, device=self.x.device)
        return none.scatter_(1, self.slots // self.num_slots, True)

    def heard(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """Slots as `mine` counts them, and weights, of what is `told`."""
        slots, weights = told.chunk(2, dim=1)
        return self.mine(slots), weights.contiguous().view(torch.float32)


def dense_loop(work: Work, clock: Clock) -> Tensor:
    """All experts here, one after the other."""
    clock(EXPERT)
    return mix_loop(work.x, work.experts, work.slots, work.weights)


def dense_grouped(work: Work, clock: Clock) -> Tensor:
    """All experts here, in two grouped products."""
    clock(EXPERT)
    return work.mix(work.x, work.slots, work.weights)


def padded(work: Work, clock: Clock) -> Tensor:
    """Each pair (token, expert) travels; all experts get as many rows as the busiest one, which the host must know
    (GShard, arXiv:2006.16668)."""
    clock(CONTROL)
    (num_tokens, top_k), total = work.slots.shape, work.num_slots * work.ranks.size
    flat = work.slots.flatten()
    counts = torch.zeros(total, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    behind = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    rows = int(counts.max())
    places = flat * rows + torch.empty_like(flat).scatter_(0, order, behind)
    clock(DISPATCH)
    sent = work.x.new_zeros(total * rows, work.x.shape[1])
    sent[places] = work.x.repeat_interleave(top_k, 0)
    received = work.ranks.all_to_all(sent.view(work.ranks.size, work.num_slots, rows, -1))
    clock(EXPERT)
    mixed = mix_padded(received.transpose(0, 1).flatten(1, 2), work.experts)
    clock(COMBINE)
    parts = mixed.unflatten(1, (work.ranks.size, rows)).transpose(0, 1).contiguous()
    back = work.ranks.all_to_all(parts).view(total * rows, -1)[places]
    weighted = back.view(num_tokens, top_k, -1).float() * work.weights[..., None]
    return weighted.sum(dim=1).to(work.x.dtype)


def packed(work: Work, clock: Clock) -> Tensor:
    """A token travels once to each rank that wants it; how many do, the host must know. Experts one after the other."""
    clock(CONTROL)
    ranks, visits, told = work.ranks, work.visits(), work.told
    counts = visits.sum(0)
    there = torch.empty_like(counts)
    dist.all_to_all_single(there, counts)
    incoming = there.tolist()
    chosen = [visits[:, rank].nonzero()[:, 0] for rank in range(ranks.size)]
    clock(DISPATCH)
    sends = [[work.x[rows], told[rows]] for rows in chosen]
    into = [[work.x.new_empty(n, work.x.shape[1]), told.new_empty(n, told.shape[1])] for n in incoming]
    wait = ranks.exchange(sends, into)
    into[ranks.rank] = [work.x, told]
    wait()
    clock(EXPERT)
    mixed = mix_loop(torch.cat([x for x, _ in into]), work.experts, *work.heard(torch.cat([t for _, t in into])))
    clock(COMBINE)
    parts = mixed.split([len(x) for x, _ in into])
    back = [[torch.empty_like(x)] for x, _ in sends]
    ranks.exchange([[part] for part in parts], back)()
    out: Tensor = parts[ranks.rank].clone()
    for other in ranks.others:
        out.index_add_(0, chosen[other], back[other][0])
    return out


@dataclass(frozen=True)
class Grouped:
    """A token travels at most once to each rank, and experts run in two grouped products. Nothing waits for the host,
    because shapes are fixed: a token goes to a rank once, so that there is always room for all.

    Attributes:
        capacity: rows for each other rank, into which the tokens that it wants are packed; None: every rank gets all
            tokens as they are, nobody counts, and the sum of what ranks make of them is scattered.
        meanwhile: own tokens are computed while others are on their way, at the price of reading the weights twice.
    """

    capacity: int | None = None
    meanwhile: bool = False

    def describe(self) -> str:
        packed = f"all-to-all, tokens packed into {self.capacity} rows for each rank"
        sent = "all-gather, all tokens to all ranks" if self.capacity is None else packed
        return sent + (", own ones computed meanwhile" if self.meanwhile else "")

    def __call__(self, work: Work, clock: Clock) -> Tensor:
        return self._gather(work, clock) if self.capacity is None else self._pack(work, clock, self.capacity)

    def _gather(self, work: Work, clock: Clock) -> Tensor:
        clock(DISPATCH)
        told, await_told = work.ranks.all_gather(work.told)
        x, await_x = work.ranks.all_gather(work.x)
        own = self._own(work, clock) if self.meanwhile else None
        await_told()
        slots, weights = work.heard(told)
        if own is not None:  # which are done
            slots[work.ranks.rank * len(own) : (work.ranks.rank + 1) * len(own)] = work.num_slots
        mix = work.experts.expecting(slots, weights)
        await_x()
        clock(EXPERT)
        mixed = mix(x)
        clock(COMBINE)
        summed = work.ranks.reduce_scatter(mixed)
        return summed if own is None else own + summed

    def _pack(self, work: Work, clock: Clock, rows: int) -> Tensor:
        ranks, (num_tokens, hidden) = work.ranks, work.x.shape
        clock(CONTROL)
        packing = Packing.of(work.visits(), rows)
        clock(DISPATCH)
        # Own tokens first, those of the other ranks behind: one memory, so that all are one product.
        x = work.x.new_empty(num_tokens + rows * (ranks.size - 1), hidden)
        told = work.told.new_empty(len(x), work.told.shape[1])
        sends, into = ranks.nothing(), ranks.nothing()
        theirs = zip(x[num_tokens:].split(rows), told[num_tokens:].split(rows), strict=True)
        for other, parts in zip(ranks.others, theirs, strict=True):
            sends[other], into[other] = packing.pack(work, other), list(parts)
        wait = ranks.exchange(sends, into)
        if self.meanwhile:
            own = self._own(work, clock)
            wait()
            clock(EXPERT)
            mixed = work.mix(x[num_tokens:], *work.heard(told[num_tokens:]))
        else:
            x[:num_tokens], told[:num_tokens] = work.x, work.told
            wait()
            clock(EXPERT)
            own, mixed = work.mix(x, *work.heard(told)).tensor_split([num_tokens])
        clock(COMBINE)
        sends, back = ranks.nothing(), ranks.nothing()
        for other, part in zip(ranks.others, mixed.split(rows), strict=True):
            sends[other], back[other] = [part], [torch.empty_like(part)]
        ranks.exchange(sends, back)()
        for other in ranks.others:
            own = own + packing.unpack(back[other][0], other)
        return own

    @staticmethod
    def _own(work: Work, clock: Clock) -> Tensor:
        """Own tokens by own experts, while others are on their way."""
        clock(EXPERT)
        own = work.mix(work.x, work.mine(work.slots), work.weights)
        clock(DISPATCH)
        return own


@dataclass(frozen=True)
class Packing:
    """Where tokens stand among the rows for each rank.

    Attributes:
        rows: [ranks, capacity] int64, the token in each row; the first one where a row is free.
        is_free: [ranks, capacity] bool.
        places: [T, ranks] int64, the row of each token; any where it has none.
        visits: [T, ranks] bool.
    """

    rows: Tensor
    is_free: Tensor
    places: Tensor
    visits: Tensor

    @classmethod
    def of(cls, visits: Tensor, capacity: int) -> "Packing":
        """Raises nothing where tokens exceed `capacity`, which would cost a wait: who chooses it must know."""
        num_tokens, num_ranks = visits.shape
        places = visits.cumsum(0) - 1
        # What has no row goes to one behind the last.
        targets = torch.where(visits & (places < capacity), places, capacity).t()
        tokens = torch.arange(num_tokens, device=visits.device).expand(num_ranks, -1)
        rows = torch.full((num_ranks, capacity + 1), -1, device=visits.device).scatter_(1, targets, tokens)[:, :-1]
        return cls(rows.clamp(min=0), rows < 0, places.clamp(0, capacity - 1), visits)

    def pack(self, work: Work, rank: int) -> list[Tensor]:
        """Tokens for `rank`, and what goes with them; a free row wants experts that are here, and so none there."""
        here = work.ranks.rank * work.num_slots
        return [work.x[self.rows[rank]], work.told[self.rows[rank]].masked_fill_(self.is_free[rank][:, None], here)]

    def unpack(self, mixed: Tensor, rank: int) -> Tensor:
        """[capacity, H] of what `rank` made of them → [T, H], zeros where it was not asked."""
        return mixed[self.places[:, rank]].masked_fill(~self.visits[:, rank, None], 0)


@dataclass(frozen=True)
class Variant:
    """A way to run the layer.

    Attributes:
        waits: the host must wait for a GPU in it.
    """

    name: str
    run: Callable[[Work, Clock], Tensor]
    waits: bool = False


# On one rank, which has all experts and all tokens.
DENSE = (
    Variant("dense loop", dense_loop, waits=True),
    Variant("dense grouped", dense_grouped),
)
SPREAD = (
    Variant("EP padded", padded, waits=True),
    Variant("EP packed", packed, waits=True),
    Variant("all-gather + reduce-scatter", Grouped()),
)  # and `Grouped` once more, with settings that are chosen where they are measured
