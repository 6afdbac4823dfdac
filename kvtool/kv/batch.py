"""Where one step's tokens stand in the store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.kv.format import KVFormat

Integers = NDArray[np.int64]
ALIGNED = 2  # int64 of 16 bytes: where every array starts, or kernels are compiled again for those that do not


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
        far_blocks: [F] int64, the blocks that the spans read, each once.
        far_table: [P, N] int64, each span's blocks as indices into `far_blocks`.
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
    _tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """[P + 1] int32: sums of the spans' queries before each, and of their sequences' tokens up to `end`."""
        _, start, end = self.spans.T[:3]
        sums = np.zeros((2, len(start) + 1), np.int32)
        sums[:, 1:] = np.cumsum([end - start, end], axis=1)
        both = torch.from_numpy(sums).to(self.far_table.device)
        return both[0], both[1]

    def tiles(self, num_tokens: int) -> Tensor:
        """The spans cut into tiles of up to `num_tokens` queries, those that read most first.

        Returns:
            [n, 7] int64: span, the tile's first position, then the span's row of `spans`. The same tensor each time.
        """
        if num_tokens not in self._tiles:
            _, start, end = self.spans.T[:3]
            counts = -(-(end - start) // num_tokens)
            span = np.repeat(np.arange(len(counts)), counts)
            position = start[span] + num_tokens * ranges(np.zeros_like(counts), counts)
            order = np.argsort(-position, kind="stable")
            tiles = np.concatenate([np.stack([span, position], 1), self.spans[span]], 1)[order]
            self._tiles[num_tokens] = on_device({"tiles": tiles}, self.far_table.device)["tiles"]
        return self._tiles[num_tokens]


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

    @classmethod
    def build(cls, fmt: KVFormat, spans: Sequence[Span], device: torch.device | str = "cpu") -> "KVBatch":
        """Lay out `spans`, of which those of one token must come first; one transfer to a GPU."""
        starts = integers((span.start for span in spans), len(spans))
        ends = integers((span.end for span in spans), len(spans))
        slots = integers((span.tail_slot for span in spans), len(spans))
        lengths = ends - starts
        num_decodes = int((lengths == 1).sum())
        assert (lengths[:num_decodes] == 1).all(), "spans of one token come first"
        positions, table = ranges(starts, lengths), _block_table(spans)
        size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
        owners = np.repeat(np.arange(len(spans)), lengths)
        token_blocks = table[owners, positions // size] if fmt.packs_on_write else positions[:0]
        arrays = {
            "positions": positions,
            "block_table": table,
            "rows": positions % size,
            "token_blocks": token_blocks,
            "tail_slots": slots,
            "visible": fmt.visible(positions),
        }
        if num_decodes == len(spans):
            return cls(fmt, tuple(spans), num_decodes, prompts=None, **on_device(arrays, torch.device(device)))
        near, of_prompts = _prompts(fmt, starts, ends, slots, table, num_decodes)
        tensors = on_device(arrays | of_prompts, torch.device(device))
        prompts = Prompts(near, **{name: tensors.pop(name) for name in of_prompts})
        return cls(fmt, tuple(spans), num_decodes, prompts=prompts, **tensors)

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


def _prompts(
    fmt: KVFormat, starts: Integers, ends: Integers, slots: Integers, table: Integers, num_decodes: int
) -> tuple[Integers, dict[str, Integers]]:
    """`Prompts` of the spans behind the decodes: its `spans`, and all else by name."""
    size, lengths, none = fmt.block_size, ends - starts, starts[:0]
    tokens = exclusive_sums(lengths)  # each span's first
    prompts = slice(num_decodes, None)
    start, end, first_token, slot = starts[prompts], ends[prompts], tokens[prompts], slots[prompts]
    if fmt.packs_on_write:
        first_near, near_sources, sealed_blocks, sealed_rows, kept = start, none, none, none, [none] * 3
        num_far = -(-end // size)
    else:
        first_near, first_unsealed = fmt.visible(start), fmt.visible(end)
        num_old, owner = start - first_near, np.repeat(np.arange(len(start)), end - first_near)
        position = ranges(first_near, end - first_near)
        own = (first_token - start)[owner] + position
        old = -1 - (slot[owner] * fmt.tail_tokens + position % fmt.tail_tokens)
        near_sources = np.where(position < start[owner], old, own) if num_old.any() else none
        num_sealed = (first_unsealed - first_near) // size
        owner, column = np.repeat(np.arange(len(start)), num_sealed), ranges(first_near // size, num_sealed)
        sealed_blocks = table[prompts][owner, column]
        sealed_rows = (exclusive_sums(end - first_near) - first_near)[owner] + column * size
        # A decode's token goes to the tail even if it completes a block: that is sealed when the step is over.
        first_kept = np.where(np.arange(len(starts)) < num_decodes, starts, np.maximum(starts, fmt.visible(ends)))
        num_kept = ends - first_kept
        owner, position = np.repeat(np.arange(len(starts)), num_kept), ranges(first_kept, num_kept)
        kept = [(tokens - starts)[owner] + position, slots[owner], position % fmt.tail_tokens]
        num_far = fmt.visible(end - 1) // size
    near_rows = exclusive_sums(end - first_near)
    spans = np.stack([first_token, start, end, first_near, near_rows], 1)
    read = np.arange(table.shape[1]) < num_far[:, None]
    far_blocks, indices = np.unique(table[prompts][read], return_inverse=True)
    far_table = np.zeros_like(table[prompts])
    far_table[read] = indices
    return spans, {
        "near_sources": near_sources,
        "sealed_blocks": sealed_blocks,
        "sealed_rows": sealed_rows,
        "kept_tokens": kept[0],
        "kept_slots": kept[1],
        "kept_rows": kept[2],
        "far_blocks": far_blocks,
        "far_table": far_table,
    }


def _block_table(spans: Sequence[Span]) -> Integers:
    counts = integers((len(span.blocks) for span in spans), len(spans))
    table = np.zeros((len(spans), max(1, counts.max(initial=0))), np.int64)
    held = np.arange(table.shape[1]) < counts[:, None]
    table[held] = integers(chain.from_iterable(span.blocks for span in spans), int(counts.sum()))
    last = np.take_along_axis(table, np.maximum(counts - 1, 0)[:, None], 1)
    return np.where(held, table, last)


def integers(values: Iterable[int], count: int) -> Integers:
    return np.fromiter(values, np.int64, count)


def exclusive_sums(counts: Integers) -> Integers:
    """The sum of all before each."""
    return np.cumsum(counts) - counts


def ranges(firsts: Integers, counts: Integers) -> Integers:
    """Each first and the `count - 1` integers after it, behind each other."""
    total = int(counts.sum())
    return np.arange(total) + np.repeat(firsts - exclusive_sums(counts), counts)


def on_device(arrays: dict[str, Integers], device: torch.device) -> dict[str, Tensor]:
    """`arrays` as tensors on `device`, in one transfer that the host does not wait for."""
    sizes = integers((array.size for array in arrays.values()), len(arrays))
    starts = exclusive_sums(-(-sizes // ALIGNED) * ALIGNED).tolist()
    flat = np.zeros(starts[-1] + sizes[-1], np.int64)
    for start, array in zip(starts, arrays.values(), strict=True):
        flat[start : start + array.size] = array.ravel()
    memory = torch.from_numpy(flat)
    if device.type == "cuda":
        memory = memory.pin_memory().to(device, non_blocking=True)
    parts = zip(starts, arrays.items(), strict=True)
    return {name: memory[start : start + array.size].view(array.shape) for start, (name, array) in parts}
