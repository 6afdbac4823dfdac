"""A layer of experts on the GPU: routing, tokens grouped by expert, grouped products, and their sum for each token.

A (token, expert) pair is a row of the products. Rows of one expert lie behind each other in an order that the device
finds, cut into tiles of a few rows, so that a program multiplies rows of one expert and its matrix is read once for all
of them. Grids follow from shapes alone, the host learns nothing, and a CUDA graph can hold it all.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.grouped import LEAST_ROWS, MOST_ROWS, Groups, Weights, grouped_product
from kvtool.kernels.launch import await_inputs, chained, power_of_2

COMPARED = 4096  # pairs: up to so many are ranked by comparing each with each, which one launch does
SPAN = 256  # pairs that are counted together where there are more
MIXED = 512  # elements of a token that one program sums


def mix(
    x: Tensor,
    gate_up: Weights,
    down: Weights,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    elsewhere: int = 0,
) -> Tensor:
    """What `kvtool.layers.moe.mix_reference` defines, plus `shared`; sums of products in fp32.

    Args:
        x: [T, K] of 16 bits, contiguous like the rest.
        gate_up: [E, 2 · I, K], the gates first; down: [E, K, I].
        ids: [T, top_k] integers, from E on of experts that are elsewhere; weights: [T, top_k].
        shared: [T, K], added to the result, or None.
        elsewhere: how many experts are elsewhere; what falls to them takes no rows here.

    Returns:
        [T, K] of x's dtype.
    """
    groups = group(ids, len(down), rows_for(ids.numel(), len(down) + elsewhere))
    return mix_groups(x, gate_up, down, groups, ids, weights, shared)


def mix_groups(
    x: Tensor,
    gate_up: Weights,
    down: Weights,
    groups: Groups,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """What `mix` computes, of pairs that are grouped already."""
    inner = grouped_product(x, gate_up, groups, repeat=ids.shape[1], gated=True)
    return combine(grouped_product(inner, down, groups), ids, weights, len(down), shared)


def rows_for(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: enough for most experts' pairs where all are chosen alike."""
    return min(MOST_ROWS, max(LEAST_ROWS, power_of_2(-(-3 * num_pairs // (2 * num_experts)))))


class Routing(Protocol):
    """`kvtool.layers.moe.Routing`."""

    @property
    def top_k(self) -> int: ...
    @property
    def scores(self) -> str: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def scale(self) -> float: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def top_groups(self) -> int: ...


def route(
    logits: Tensor, bias: Tensor | None, routing: Routing, first: int = 0, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `kvtool.layers.moe.route` defines, in one launch: ids [T, top_k] int32, weights [T, top_k] fp32.

    Args:
        first: the expert that ids are counted from, around all of them.
        ids: memory for them, contiguous; None: new memory.

    Of equal scores the first expert's counts as larger. Logits that are NaN give ids of any value from 0 on.
    """
    (tokens, num_experts), top_k = logits.shape, routing.top_k
    if ids is None:
        ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    width = power_of_2(num_experts)
    _route_kernel[(tokens,)](
        logits,
        logits if bias is None else bias,
        ids,
        weights,
        routing.scale,
        first,
        EXPERTS=num_experts,
        WIDTH=width,
        TOP_K=top_k,
        TOP_WIDTH=power_of_2(top_k),
        SIGMOID=routing.scores == "sigmoid",
        BIAS=bias is not None,
        NORMALIZE=routing.normalize,
        GROUPS=routing.num_groups,
        GROUP_WIDTH=power_of_2(routing.num_groups),
        TOP_GROUPS=routing.top_groups,
        num_warps=max(1, min(4, width // 128)),
        **chained(logits.device),
    )
    return ids, weights


def group(ids: Tensor, num_experts: int, rows: int) -> Groups:
    """Pairs of ids [T, top_k] by expert, in tiles of `rows`."""
    num_pairs = ids.numel()
    pairs, tiles, num_tiles = (
        torch.empty(shape, dtype=torch.int32, device=ids.device)
        for shape in ((num_pairs,), (most_tiles(num_pairs, num_experts, rows), 3), (1,))
    )
    groups = Groups(pairs, tiles, num_tiles, rows)
    if num_pairs > COMPARED:
        _count_and_place(ids, groups, num_experts)
        return groups
    _group_kernel[(-(-num_pairs // 32) + 1,)](
        ids,
        pairs,
        tiles,
        num_tiles,
        num_pairs,
        num_experts,
        EXPERTS=power_of_2(num_experts),
        ROWS=rows,
        BLOCK=32,
        STEP=128,
        num_warps=8,
        **chained(ids.device),
    )
    return groups


def _count_and_place(ids: Tensor, groups: Groups, num_experts: int) -> None:
    """Fill `groups` by counting: pairs of each expert in each span, where each span's first one goes, then all."""
    num_pairs, width = ids.numel(), power_of_2(num_experts + 2)
    spans = -(-num_pairs // SPAN)
    counts = torch.empty(spans + 1, width, dtype=torch.int32, device=ids.device)  # a span's; last the experts' firsts
    sizes = {"EXPERTS": width, "num_warps": 8, **chained(ids.device)}
    _count_kernel[(spans,)](ids, counts, num_pairs, num_experts, SPAN=SPAN, STEP=32, **sizes)
    _offsets_kernel[(1,)](
        counts, groups.tiles, groups.num_tiles, spans, num_experts, ROWS=groups.rows, STEP=32, **sizes
    )
    _place_kernel[(spans,)](ids, counts, groups.pairs, num_pairs, num_experts, spans, SPAN=SPAN, STEP=32, **sizes)


def group_reference(ids: Tensor, num_experts: int, rows: int) -> Groups:
    """What `group` does, by sorting. Nothing is read back to the host."""
    experts = ids.flatten().long().clamp(max=num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add_(0, experts, torch.ones_like(experts))
    counts[num_experts:].zero_()  # what is elsewhere has no tiles
    sizes = (counts + rows - 1) // rows
    ends = sizes.cumsum(0)
    tile = torch.arange(most_tiles(len(experts), num_experts, rows), device=ids.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp(max=num_experts)
    before = (tile - (ends - sizes)[expert]) * rows
    first = (counts.cumsum(0) - counts)[expert] + before
    tiles = torch.stack([expert, first, (counts[expert] - before).clamp(max=rows)], 1)
    return Groups(experts.argsort(stable=True).int(), tiles.int(), ends[-1:].int(), rows)


def most_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Tiles that pairs can make, however they fall."""
    return min(num_pairs, num_experts + num_pairs // rows)


def combine(rows: Tensor, ids: Tensor, weights: Tensor, num_experts: int, shared: Tensor | None) -> Tensor:
    """Σ weight · row over each token's pairs, plus `shared` [T, K]: rows [T · top_k, K] → [T, K], summed in fp32."""
    (tokens, top_k), size = ids.shape, rows.shape[1]
    assert ids.is_contiguous() and weights.is_contiguous() and (shared is None or shared.is_contiguous())
    out = torch.empty(tokens, size, dtype=rows.dtype, device=rows.device)
    _combine_kernel[(tokens, -(-size // MIXED))](
        rows,
        ids,
        weights,
        rows if shared is None else shared,
        out,
        num_experts,
        size,
        TOP_K=top_k,
        BLOCK=MIXED,
        SHARED=shared is not None,
        num_warps=2,
        **chained(rows.device),
    )
    return out


@triton.jit(do_not_specialize=["first"])
def _route_kernel(
    logits,
    bias,
    ids,
    weights,
    scale,
    first,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_WIDTH: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    inside = expert < EXPERTS
    await_inputs(CHAINED)
    x = tl.load(logits + token * EXPERTS + expert, mask=inside, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    choice = scores
    if BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0)
    choice = tl.where(inside, choice, -float("inf"))
    if TOP_GROUPS < GROUPS:
        own_group = expert // (EXPERTS // GROUPS)
        at = tl.arange(0, GROUP_WIDTH)
        best = tl.full([GROUP_WIDTH], -float("inf"), tl.float32)
        for index in tl.static_range(GROUPS):
            members = tl.where(own_group == index, choice, -float("inf"))
            value = tl.max(members, 0)
            if SIGMOID:
                value += tl.max(tl.where(expert == tl.argmax(members, 0), -float("inf"), members), 0)
            best = tl.where(at == index, value, best)
        kept = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            chosen_group = tl.argmax(best, 0)
            kept = kept | (own_group == chosen_group)
            best = tl.where(at == chosen_group, -float("inf"), best)
        choice = tl.where(kept, choice, -float("inf"))
    place = tl.arange(0, TOP_WIDTH)
    top_ids = tl.zeros([TOP_WIDTH], tl.int32)
    top_weights = tl.zeros([TOP_WIDTH], tl.float32)
    for index in tl.static_range(TOP_K):
        chosen = tl.argmax(choice, 0)
        is_chosen = expert == chosen
        top_ids = tl.where(place == index, chosen, top_ids)
        top_weights = tl.where(place == index, tl.sum(tl.where(is_chosen, scores, 0), 0), top_weights)
        choice = tl.where(is_chosen, -float("inf"), choice)
    if NORMALIZE:
        top_weights = top_weights / (tl.sum(top_weights, 0) + 1e-20)
    top_ids -= tl.where(top_ids < first, first - EXPERTS, first)
    tl.store(ids + token * TOP_K + place, top_ids, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, top_weights * scale, mask=place < TOP_K)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _group_kernel(
    ids,
    pairs,
    tiles,
    num_tiles,
    num_pairs,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Each program places a few pairs, the last one cuts the tiles."""
    await_inputs(CHAINED)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        _place(ids, pairs, num_pairs, num_experts, BLOCK, STEP)
    else:
        _cut(ids, tiles, num_tiles, num_pairs, num_experts, EXPERTS, ROWS, STEP)


@triton.jit
def _place(ids, pairs, num_pairs, num_experts, BLOCK: tl.constexpr, STEP: tl.constexpr):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(ids, own, num_pairs, num_experts)[:, None]
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, STEP):
        other = start + tl.arange(0, STEP)
        experts = _experts_of(ids, other, num_pairs, num_experts)[None, :]
        is_before = (experts < expert) | ((experts == expert) & (other[None, :] < own[:, None]))
        place += tl.sum(is_before.to(tl.int32), 1)
    tl.store(pairs + place, own, mask=own < num_pairs)


@triton.jit
def _cut(
    ids,
    tiles,
    num_tiles,
    num_pairs,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_pairs, STEP):
        experts = _experts_of(ids, start + tl.arange(0, STEP), num_pairs, num_experts)[None, :]
        counts += tl.sum((experts == expert[:, None]).to(tl.int32), 1)
    _write_tiles(tiles, num_tiles, expert, counts, num_experts, ROWS)


@triton.jit
def _write_tiles(tiles, num_tiles, expert, counts, num_experts, ROWS: tl.constexpr):
    """The tiles of experts, of whose pairs there are `counts`."""
    counts = tl.where(expert < num_experts, counts, 0)
    sizes = (counts + ROWS - 1) // ROWS
    tile = tl.cumsum(sizes, 0) - sizes
    first = tl.cumsum(counts, 0) - counts
    for index in range(0, tl.max(sizes, 0)):
        is_there = index < sizes
        to = tiles + (tile + index) * 3
        tl.store(to, expert, mask=is_there)
        tl.store(to + 1, first + index * ROWS, mask=is_there)
        tl.store(to + 2, tl.minimum(counts - index * ROWS, ROWS), mask=is_there)
    tl.store(num_tiles, tl.sum(sizes, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _count_kernel(
    ids,
    counts,
    num_pairs,
    num_experts,
    EXPERTS: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (span): how many of its pairs each expert has."""
    span = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    own = tl.zeros([EXPERTS], tl.int32)
    await_inputs(CHAINED)
    for start in range(0, SPAN, STEP):
        experts = _experts_of(ids, span * SPAN + start + tl.arange(0, STEP), num_pairs, num_experts)[None, :]
        own += tl.sum((experts == expert[:, None]).to(tl.int32), 1)
    tl.store(counts + span * EXPERTS + expert, own)


@triton.jit(do_not_specialize=["spans", "num_experts"])
def _offsets_kernel(
    counts,
    tiles,
    num_tiles,
    spans,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program: counts become those of the spans before, behind them stands each expert's first place."""
    expert, step = tl.arange(0, EXPERTS), tl.arange(0, STEP)
    total = tl.zeros([EXPERTS], tl.int32)
    await_inputs(CHAINED)
    for start in range(0, spans, STEP):
        span = start + step
        at = counts + span[:, None] * EXPERTS + expert[None, :]
        inside = (span < spans)[:, None]
        own = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(own, 0) - own, mask=inside)
        total += tl.sum(own, 0)
    tl.store(counts + spans * EXPERTS + expert, tl.cumsum(total, 0) - total)
    _write_tiles(tiles, num_tiles, expert, total, num_experts, ROWS)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "spans"])
def _place_kernel(
    ids,
    counts,
    pairs,
    num_pairs,
    num_experts,
    spans,
    EXPERTS: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (span): each pair behind those of its expert that come before it."""
    span = tl.program_id(0)
    own = span * SPAN + tl.arange(0, SPAN)
    await_inputs(CHAINED)
    expert = _experts_of(ids, own, num_pairs, num_experts)
    place = tl.load(counts + span * EXPERTS + expert) + tl.load(counts + spans * EXPERTS + expert)
    for start in range(0, SPAN, STEP):
        other = span * SPAN + start + tl.arange(0, STEP)
        experts = _experts_of(ids, other, num_pairs, num_experts)
        is_before = (experts[None, :] == expert[:, None]) & (other[None, :] < own[:, None])
        place += tl.sum(is_before.to(tl.int32), 1)
    tl.store(pairs + place, own, mask=own < num_pairs)


@triton.jit
def _experts_of(ids, pair, num_pairs, num_experts):
    """One for all experts that are elsewhere, and another behind the last pair."""
    expert = tl.minimum(tl.load(ids + pair, mask=pair < num_pairs, other=0).to(tl.int32), num_experts)
    return tl.where(pair < num_pairs, expert, num_experts + 1)


@triton.jit(do_not_specialize=["num_experts"])
def _combine_kernel(
    rows,
    ids,
    weights,
    shared,
    out,
    num_experts,
    size,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, elements)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    await_inputs(CHAINED)
    total = tl.zeros([BLOCK], tl.float32)
    if SHARED:
        total += tl.load(shared + token * size + column, mask=inside, other=0).to(tl.float32)
    for index in tl.static_range(TOP_K):
        pair = token * TOP_K + index
        is_here = tl.load(ids + pair) < num_experts
        row = tl.load(rows + pair * size + column, mask=tl.where(is_here, inside, False), other=0).to(tl.float32)
        total += row * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)
