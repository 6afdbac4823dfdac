"""Where one step's tokens stand in the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvtool.kv.format import KVFormat


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

    @classmethod
    def build(cls, fmt: KVFormat, spans: Sequence[Span], device: torch.device | str = "cpu") -> "KVBatch":
        """Lay out `spans`, of which those of one token must come first."""
        num_decodes = sum(span.length == 1 for span in spans)
        assert all(span.length == 1 for span in spans[:num_decodes]), "spans of one token come first"
        width = max(1, *(len(span.blocks) for span in spans))
        table = [
            [*span.blocks, *[span.blocks[-1] if span.blocks else 0] * (width - len(span.blocks))] for span in spans
        ]
        positions = [position for span in spans for position in range(span.start, span.end)]
        size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
        token_blocks = (
            [span.blocks[p // size] for span in spans for p in range(span.start, span.end)]
            if fmt.packs_on_write
            else []
        )

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            format=fmt,
            spans=tuple(spans),
            num_decodes=num_decodes,
            positions=tensor(positions),
            block_table=tensor(table),
            rows=tensor([position % size for position in positions]),
            token_blocks=tensor(token_blocks),
            tail_slots=tensor([span.tail_slot for span in spans]),
            visible=tensor([fmt.visible(position) for position in positions]),
        )

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
