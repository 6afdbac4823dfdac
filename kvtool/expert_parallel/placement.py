"""Which rank holds which expert, and how evenly that spreads the work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Slots for experts, as many on each rank: those of rank 0 first.

    Attributes:
        experts: the expert in each slot; one that many tokens want may stand in several.
        num_ranks: that share the slots.
    """

    experts: tuple[int, ...]
    num_ranks: int

    @property
    def slots_per_rank(self) -> int:
        return len(self.experts) // self.num_ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Experts of one rank."""
        return self.experts[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def slots(self, ids: Tensor) -> Tensor:
        """Slots [T, top_k] of tokens' experts `ids`; where an expert has several, tokens take them in turn."""
        num_experts = max(self.experts) + 1
        places: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.experts):
            places[expert].append(slot)
        most = max(map(len, places))
        table = torch.tensor([[slots[i % len(slots)] for i in range(most)] for slots in places])
        turns = torch.tensor(list(map(len, places)))[ids]
        return table[ids, torch.arange(len(ids))[:, None] % turns]


def in_order(num_experts: int, num_ranks: int) -> Placement:
    """Each expert once, in the order of their numbers."""
    return Placement(tuple(range(num_experts)), num_ranks)


def balanced(loads: Sequence[float], num_slots: int, num_ranks: int) -> Placement:
    """Experts placed so that ranks have about as much to do, as DeepSeek's EPLB does it (github.com/deepseek-ai/EPLB,
    its global policy): the expert with most work for each of its slots gets the next one; then the heaviest slot goes
    to the rank that has least to do and room.

    Args:
        loads: tokens that want each expert.
        num_slots: of all ranks together, a multiple of them and no fewer than the experts.
    """
    assert num_slots % num_ranks == 0 and num_slots >= len(loads)
    copies = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        copies[max(range(len(loads)), key=lambda expert: loads[expert] / copies[expert])] += 1
    slots = [(loads[expert] / copies[expert], expert) for expert in range(len(loads)) for _ in range(copies[expert])]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    work = [0.0] * num_ranks
    for load, expert in sorted(slots, key=lambda slot: (-slot[0], slot[1])):
        free = [rank for rank in range(num_ranks) if len(ranks[rank]) < num_slots // num_ranks]
        rank = min(free, key=lambda rank: (work[rank], len(ranks[rank])))
        ranks[rank].append(expert)
        work[rank] += load
    return Placement(tuple(expert for rank in ranks for expert in sorted(rank)), num_ranks)


@dataclass(frozen=True)
class Load:
    """How a routing spreads over a placement. Tokens stand on ranks in order, as many on each.

    Attributes:
        expert_imbalance: pairs (token, expert) of the busiest slot over the mean of all.
        rank_imbalance: of the busiest rank over the mean.
        local_pairs: share of pairs whose expert is on the token's own rank.
        local_tokens: share of tokens that have at least one such expert.
        remote_pairs: number of pairs whose expert is elsewhere.
        remote_rows: number of tokens that go to another rank, counted once for each rank.
    """

    expert_imbalance: float
    rank_imbalance: float
    local_pairs: float
    local_tokens: float
    remote_pairs: int
    remote_rows: int


def load_of(slots: Tensor, placement: Placement) -> Load:
    """Args: slots: [T, top_k], T a multiple of the ranks."""
    num_ranks, per_rank = placement.num_ranks, placement.slots_per_rank
    counts = slots.flatten().bincount(minlength=len(placement.experts)).double()
    home = torch.arange(num_ranks).repeat_interleave(len(slots) // num_ranks)[:, None]
    to = slots // per_rank
    is_local = to == home
    visited = torch.zeros(len(slots), num_ranks, dtype=torch.bool).scatter_(1, to, True)
    remote_rows = int(visited.sum() - visited.gather(1, home).sum())
    return Load(
        expert_imbalance=float(counts.max() / counts.mean()),
        rank_imbalance=float(counts.view(num_ranks, per_rank).sum(1).max() / (counts.sum() / num_ranks)),
        local_pairs=float(is_local.double().mean()),
        local_tokens=float(is_local.any(1).double().mean()),
        remote_pairs=int((~is_local).sum()),
        remote_rows=remote_rows,
    )
