"""Where one step's tokens stand in the store."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.kv.format import KVFormat

Integers = NDArray[np.int64]
KEPT = ("kept_tokens", "kept_slots", "kept_rows")
ALIGNED = 2  # int64 of 16 bytes: where every array starts, or kernels are compiled again for those that do not
PIECE_STEP = 128  # keys: pieces of a tile end where a block and a kernel's step over keys do
SHORTEST_PIECE = 512  # keys, fewer of which are read before two pieces could be merged


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence that a step computes: positions `start` to `end`, and the memory it owns or shares.

    `blocks` covers at least the packed tokens of a sequence of `end` tokens; `tail_slot` is unused (any number)
    where the format packs on write.
    """

    start: int
    end: int
    blocks: Sequence[int]
    tail_slot: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Cut(NamedTuple):
    """How a kernel shares prompts out among its programs.

    Attributes:
        tokens: in a tile of queries.
        most_pieces: that run at once. Where there are fewer tiles, these are cut into pieces of the keys they read, as
            short as may be with all of them running at once; 0: tiles stay whole.
    """

    tokens: int
    most_pieces: int = 0


@dataclass(frozen=True)
class Prompts:
    """What the P spans behind the decodes need beside `KVBatch`, whose tokens are counted here as there.

    A span's *near* tokens are those that it computes and, where the format has a tail, the older ones from the first
    that any of its queries reads at full precision. The near tokens of all spans lie behind each other.

    Attributes:
        spans: [P, 5] on the host: first token in the batch, start, end, first near position, its row among all near
            tokens.
        near_sources: [n] int64, where each is found: token i of the batch as i, row r of tail slot s as
            -1 - (s * tail_tokens + r); empty where the near tokens are the spans' own.
        sealed_blocks, sealed_rows: [n] int64, blocks that the spans complete, and the near row each one starts in.
        kept_tokens, kept_slots, kept_rows: [n] int64, tokens of the whole batch that are written to a tail, and where.
        far_blocks: [F] int64, the blocks that the spans read, span behind span.
        far_table: [P, N] int64, each span's blocks as indices into `far_blocks`, one behind the other.
    """

    spans: Integers
    near_sources: Tensor
    sealed_blocks: Tensor
    sealed_rows: Tensor
    kept_tokens: Tensor
    kept_slots: Tensor
    kept_rows: Tensor
    far_blocks: Tensor
    far_table: Tensor
    _tiles: dict[Cut, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """[P + 1] int32: sums of the spans' queries before each, and of their sequences' tokens up to `end`."""
        _, start, end = self.spans.T[:3]
        sums = np.zeros((2, len(start) + 1), np.int64)
        sums[:, 1:] = np.cumsum([end - start, end], axis=1)
        both = on_device({"sums": sums}, self.far_table.device)["sums"].int()
        return both[0], both[1]

    def tiles(self, tokens: int, most_pieces: int = 0) -> Tensor:
        """The spans cut into tiles and pieces as `Cut` says, the tiles that read most first.

        Returns:
            [n, 10] int64: span, the tile's first position, then the span's row of `spans`; which piece of the tile it
            is, of how many, which lie behind each other, and the keys of each but the last. The same tensor each time.
        """
        how = Cut(tokens, most_pieces)
        if how not in self._tiles:
            self._tiles[how] = on_device({"tiles": cut(self.spans, how)}, self.far_table.device)["tiles"]
        return self._tiles[how]


@dataclass(frozen=True)
class Contexts:
    """The blocks that each of the spans behind the decodes reads, span behind span.

    Attributes:
        blocks: [F] int64.
        firsts: [P] int64, where in them each span's lie.
    """

    blocks: Tensor
    firsts: Tensor


@dataclass(frozen=True)
class KVBatch:
    """One step's spans as tensors. Tokens are flat, in the spans' order; spans of one token come first ("decodes").

    Attributes:
        format: of the store that the spans live in.
        spans: as given.
        num_decodes: how many spans, from the first, compute one token.
        positions: [T] int64, of every token.
        block_table: [S, N] int64, block ids of each span; behind its last the same again, because what a mask leaves
            out must be finite, too, and of other sequences that is not known (0 where a span has none).
        rows: [T] int64, the row of each token, in its block where the format packs on write, else in its tail.
        token_blocks: [T] int64, the block of each token; empty where it is written to the tail.
        tail_slots: [S] int64.
        visible: [T] int64, the first position that each token reads at full precision.
        prompts: of the spans behind the decodes; None where there are none.
    """

    format: KVFormat
    spans: tuple[Span, ...]
    num_decodes: int
    positions: Tensor
    block_table: Tensor
    rows: Tensor
    token_blocks: Tensor
    tail_slots: Tensor
    visible: Tensor
    prompts: Prompts | None = None
    _contexts: dict[bool, Contexts] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(cls, fmt: KVFormat, spans: Sequence[Span], device: torch.device | str = "cpu") -> "KVBatch":
        """Lay out `spans`, of which those of one token must come first; one transfer to a GPU."""
        laid = LaidOut.of(fmt, spans)
        if laid.num_decodes == len(spans):
            tensors = on_device(laid.arrays, torch.device(device))
            return cls(fmt, tuple(spans), laid.num_decodes, prompts=None, **tensors)
        _, start, _, first_near, _ = laid.spans.T
        if (first_near == start).all():
            laid.of_prompts["near_sources"] = start[:0]
        read = laid.read_columns
        far_blocks, far_table = laid.prompt_table[read], np.zeros_like(laid.prompt_table)
        far_table[read] = np.arange(len(far_blocks))
        of_prompts = laid.of_prompts | {"far_blocks": far_blocks, "far_table": far_table}
        tensors = on_device(laid.arrays | of_prompts, torch.device(device))
        prompts = Prompts(laid.spans, **{name: tensors.pop(name) for name in of_prompts})
        return cls(fmt, tuple(spans), laid.num_decodes, prompts=prompts, **tensors)

    @property
    def first_prompt(self) -> int:
        """The token from which on the spans behind the decodes may lie."""
        return self.num_decodes

    @cached_property
    def decodes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Block table [num_decodes, N], positions, visible and tail slots [num_decodes] of the decodes."""
        n = self.num_decodes
        return self.block_table[:n], self.positions[:n], self.visible[:n], self.tail_slots[:n]

    @cached_property
    def prompt_table(self) -> Tensor:
        """[P, N], the block table of the spans behind the decodes."""
        return self.block_table[self.num_decodes :]

    def contexts(self, *, older: bool) -> Contexts:
        """What the spans behind the decodes read from blocks; the same tensors each time.

        Args:
            older: tokens of earlier steps only, as blocks that lose nothing are read.
        """
        if older not in self._contexts:
            assert self.prompts
            _, _, end, first_near, _ = self.prompts.spans.T
            counts = -(-(first_near if older else self.format.visible(end - 1)) // self.format.block_size)
            spans, columns = each(np.zeros_like(counts), counts)
            sent = on_device(
                {"spans": spans, "columns": columns, "firsts": exclusive_sums(counts)}, self.positions.device
            )
            blocks = self.prompt_table[sent["spans"], sent["columns"]]
            self._contexts[older] = Contexts(blocks, sent["firsts"])
        return self._contexts[older]

    @cached_property
    def pages(self) -> Tensor:
        """`block_table` as int32."""
        return self.block_table.int()

    @cached_property
    def decode_lengths(self) -> Tensor:
        """[num_decodes] int32, tokens of each sequence, the new one included."""
        return (self.positions[: self.num_decodes] + 1).int()

    @cached_property
    def decode_columns(self) -> tuple[Tensor, Tensor]:
        """What the decodes read: their blocks [n, width], and the position in each column of blocks and then tail.

        A column that a query may not read holds -1, in [n, width * B + tail_tokens].
        """
        n, fmt, device = self.num_decodes, self.format, self.positions.device
        width = max(-(-fmt.visible(span.start) // fmt.block_size) for span in self.spans[:n])
        position, first_near = self.positions[:n, None], self.visible[:n, None]
        far = torch.arange(width * fmt.block_size, device=device).expand(n, -1)
        columns = [far.masked_fill(far >= first_near, -1)]
        if fmt.tail_tokens:
            rows = torch.arange(fmt.tail_tokens, device=device)
            near = position - (position - rows) % fmt.tail_tokens  # the newest position that each row can hold
            columns.append(near.masked_fill(near < first_near, -1))
        return self.block_table[:n, :width], torch.cat(columns, dim=1)


@dataclass(frozen=True)
class LaidOut:
    """Spans as integers on the host.

    Attributes:
        arrays: of `KVBatch`, by name.
        spans, of_prompts: of `Prompts`, but for the far part; `near_sources` are of all near tokens.
        num_far: [P], blocks that each of its spans reads.
    """

    num_decodes: int
    arrays: dict[str, Integers]
    spans: Integers
    of_prompts: dict[str, Integers]
    num_far: Integers

    @classmethod
    def of(cls, fmt: KVFormat, spans: Sequence[Span]) -> "LaidOut":
        """Lay out `spans`, of which those of one token must come first."""
        bounds = np.array([(span.start, span.end, span.tail_slot) for span in spans], np.int64)
        starts, ends, slots = bounds.reshape(-1, 3).T
        is_decode = ends - starts == 1
        num_decodes = int(is_decode.sum())
        assert is_decode[:num_decodes].all(), "spans of one token come first"
        (owners, positions), table = each(starts, ends), _block_table(spans)
        size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
        arrays = {
            "positions": positions,
            "block_table": table,
            "rows": positions % size,
            "token_blocks": table[owners, positions // size] if fmt.packs_on_write else positions[:0],
            "tail_slots": slots,
            "visible": fmt.visible(positions),
        }
        tokens, (start, end) = exclusive_sums(ends - starts), (starts[num_decodes:], ends[num_decodes:])
        if fmt.packs_on_write:
            first_near, num_far = start, -(-end // fmt.block_size)
            writes = dict.fromkeys(("near_sources", "sealed_blocks", "sealed_rows", *KEPT), starts[:0])
        else:
            first_near, num_far = fmt.visible(start), fmt.visible(end - 1) // fmt.block_size
            writes = _kept(fmt, starts, ends, slots, tokens, num_decodes)
            writes |= _near_sources(fmt, start, end, slots[num_decodes:], tokens[num_decodes:])
            writes |= _sealed(fmt, start, end, table[num_decodes:])
        near_rows = exclusive_sums(end - first_near)
        of_prompts = np.empty((len(start), 5), np.int64)
        for column, values in enumerate((tokens[num_decodes:], start, end, first_near, near_rows)):
            of_prompts[:, column] = values
        return cls(num_decodes, arrays, of_prompts, writes, num_far)

    @property
    def prompt_table(self) -> Integers:
        """[P, N], the block table of the spans behind the decodes."""
        return self.arrays["block_table"][self.num_decodes :]

    @property
    def read_columns(self) -> NDArray[np.bool_]:
        """[P, N], which blocks of `prompt_table` are read."""
        read: NDArray[np.bool_] = np.arange(self.prompt_table.shape[1]) < self.num_far[:, None]
        return read


def cut(spans: Integers, how: Cut) -> Integers:
    """`Prompts.tiles` of `spans`, on the host."""
    _, start, end = spans.T[:3]
    span, index = each(np.zeros_like(start), -(-(end - start) // how.tokens))
    first = start[span] + how.tokens * index
    order = np.argsort(-first, kind="stable")
    span, first = span[order], first[order]
    past = np.minimum(first + how.tokens, end[span])  # the keys that a tile reads
    length = _piece_length(past, how.most_pieces)
    counts = -(-past // length)
    tile, index = each(np.zeros_like(counts), counts)
    span, rows = span[tile], np.empty((len(tile), 10), np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2:7] = span, first[tile], spans[span]
    rows[:, 7], rows[:, 8], rows[:, 9] = index, counts[tile], length
    return rows


def _piece_length(keys: Integers, most: int) -> int:
    """The shortest pieces of tiles that read so many `keys` each, so that there are no more than `most` of them."""
    longest = int(keys.max(initial=0))
    if most <= len(keys) or longest <= SHORTEST_PIECE:
        return max(1, longest)
    lengths = range(SHORTEST_PIECE, longest + PIECE_STEP, PIECE_STEP)
    return lengths[bisect_left(lengths, -most, key=lambda length: -int((-(-keys // length)).sum()))]


def _near_sources(
    fmt: KVFormat, start: Integers, end: Integers, slot: Integers, token: Integers
) -> dict[str, Integers]:
    span, position = each(fmt.visible(start), end)
    old = -1 - (slot[span] * fmt.tail_tokens + position % fmt.tail_tokens)
    return {"near_sources": np.where(position < start[span], old, (token - start)[span] + position)}


def _sealed(fmt: KVFormat, start: Integers, end: Integers, table: Integers) -> dict[str, Integers]:
    size, first_near = fmt.block_size, fmt.visible(start)
    span, column = each(first_near // size, fmt.visible(end) // size)
    first_row = exclusive_sums(end - first_near) - first_near
    return {"sealed_blocks": table[span, column], "sealed_rows": first_row[span] + column * size}


def _kept(
    fmt: KVFormat, starts: Integers, ends: Integers, slots: Integers, tokens: Integers, num_decodes: int
) -> dict[str, Integers]:
    first_kept = np.maximum(starts, fmt.visible(ends))
    first_kept[:num_decodes] = starts[:num_decodes]  # a block that a decode completes is sealed from the tail
    span, position = each(first_kept, ends)
    return dict(zip(KEPT, ((tokens - starts)[span] + position, slots[span], position % fmt.tail_tokens), strict=True))


def _block_table(spans: Sequence[Span]) -> Integers:
    counts = integers((len(span.blocks) for span in spans), len(spans))
    table = np.zeros((len(spans), max(1, counts.max(initial=0))), np.int64)
    held = np.arange(table.shape[1]) < counts[:, None]
    table[held] = integers(chain.from_iterable(span.blocks for span in spans), int(counts.sum()))
    last = table[np.arange(len(spans)), np.maximum(counts - 1, 0)]
    return np.where(held, table, last[:, None])


def integers(values: Iterable[int], count: int) -> Integers:
    return np.fromiter(values, np.int64, count)


def exclusive_sums(counts: Integers) -> Integers:
    """The sum of all before each."""
    sums: Integers = counts.cumsum()
    return sums - counts


def each(firsts: Integers, ends: Integers) -> tuple[Integers, Integers]:
    """All integers from `firsts[i]` to `ends[i]`, one i behind the other: i, and the integer."""
    counts = ends - firsts
    owners = np.arange(len(counts)).repeat(counts)
    return owners, np.arange(len(owners)) + (firsts - exclusive_sums(counts))[owners]


def on_device(arrays: dict[str, Integers], device: torch.device) -> dict[str, Tensor]:
    """`arrays` as tensors on `device`, in one transfer that the host does not wait for."""
    padding = [np.empty(-array.size % ALIGNED, np.int64) for array in arrays.values()]
    pieces = [piece for pair in zip(arrays.values(), padding, strict=True) for piece in pair]
    sizes, is_sent = [piece.size for piece in pieces], device.type == "cuda"
    memory = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=is_sent)
    # Not by torch, whose threads take milliseconds to meet where a step has many tokens.
    np.concatenate([piece.ravel() for piece in pieces], out=memory.numpy())
    if is_sent:
        memory = memory.to(device, non_blocking=True)
    tensors = memory.split(sizes)[::2]
    named = zip(arrays.items(), tensors, strict=True)
    return {name: tensor if array.ndim == 1 else tensor.view(array.shape) for (name, array), tensor in named}


def to_host(x: Tensor) -> Tensor:
    """`x` on the host; what comes from a GPU is on its way there, behind all that was launched before."""
    if x.device.type == "cpu":
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
