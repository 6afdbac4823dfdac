"""A step's spans at shapes that do not depend on them, as a CUDA graph needs them. What is left over is nobody's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvtool.kernels import MOST_PIECES
from kvtool.kv.batch import KEPT, Cut, Integers, KVBatch, LaidOut, Prompts, Span, cut, exclusive_sums
from kvtool.kv.format import KVFormat

MOST_PROMPTS = 32
MOST_FAR = 512  # blocks that they read in all
LEAST_TILE = 2  # tokens: of 32 rows and 16 heads


@dataclass(frozen=True)
class Room:
    """What a step may hold: any decodes and prompts that have so many tokens together, behind each other.

    Attributes:
        decodes: spans of one token, at most.
        tokens: of all spans; of those of several tokens there are at most `MOST_PROMPTS`.
    """

    decodes: int
    tokens: int

    def holds(self, fmt: KVFormat, spans: Sequence[Span]) -> bool:
        """Whether `spans`, those of one token first, find room."""
        prompts = [span for span in spans if span.length > 1]
        num_far = sum(_num_far(fmt, span) for span in prompts)
        return (
            len(spans) - len(prompts) <= self.decodes
            and sum(span.length for span in spans) <= self.tokens
            and len(prompts) <= MOST_PROMPTS
            and num_far <= MOST_FAR
            and sum(span.start - _first_near(fmt, span) for span in prompts) <= self._most_old(fmt)
        )

    def shapes(self, fmt: KVFormat) -> dict[str, tuple[int, ...]]:
        """Of all arrays that `lay_out` fills."""
        every, tailed = self.tokens, not fmt.packs_on_write
        sealed = tailed * (self.tokens // fmt.block_size + MOST_PROMPTS)
        kept = tailed * (self.decodes + min(self.tokens, MOST_PROMPTS * fmt.tail_tokens))
        return {
            "num_decodes": (1,),
            "positions": (every,),
            "rows": (every,),
            "visible": (every,),
            "token_blocks": (0 if tailed else every,),
            "near_sources": (tailed * (self.tokens + self._most_old(fmt)),),
            "sealed_blocks": (sealed,),
            "sealed_rows": (sealed,),
            "kept_tokens": (kept,),
            "kept_slots": (kept,),
            "kept_rows": (kept,),
            "far_blocks": (MOST_FAR,),
            "far_firsts": (MOST_PROMPTS,),
            "tiles": (max(self.tokens // LEAST_TILE + MOST_PROMPTS, MOST_PIECES), 10),
        }

    def lay_out(self, fmt: KVFormat, spans: Sequence[Span], how: Cut) -> dict[str, Integers]:
        """`spans` as `KVBatch.build` lays them out, and how many of them decode.

        Args:
            how: the kernels cut prompts.

        Returns:
            arrays no longer than `shapes` says. Behind them -1 must stand, which kernels take for nobody's.
        """
        laid = LaidOut.of(fmt, spans)
        if fmt.packs_on_write:  # the near tokens are those of the step, decodes among them
            laid.spans[:, 4] += laid.num_decodes
        far = {"far_blocks": laid.prompt_table[laid.read_columns], "far_firsts": exclusive_sums(laid.num_far)}
        arrays = {name: laid.arrays[name] for name in ("positions", "rows", "visible", "token_blocks")}
        arrays["num_decodes"] = np.array([laid.num_decodes])
        return arrays | laid.of_prompts | far | {"tiles": cut(laid.spans, how)}

    def _most_old(self, fmt: KVFormat) -> int:
        """Near tokens of earlier steps: those of two tails, as few spans start between blocks."""
        return 2 * fmt.tail_tokens


@dataclass(frozen=True)
class FixedPrompts(Prompts):
    """Prompts in memory that is filled before each run.

    Attributes:
        num_tokens: of the spans, at most.
        tile_memory: [n, 10] int64, for tiles of any size; how the kernels cut is known once they have asked for it.
    """

    num_tokens: int
    tile_memory: Tensor

    @property
    def how(self) -> Cut:
        """Kernels cut them."""
        (how,) = self._tiles
        return how

    def tiles(self, tokens: int, most_pieces: int = 0) -> Tensor:
        how = Cut(tokens, most_pieces)
        if how not in self._tiles:
            assert not self._tiles and tokens >= LEAST_TILE, "all layers cut alike"
            most = max(-(-self.num_tokens // tokens) + MOST_PROMPTS, most_pieces)
            self._tiles[how] = self.tile_memory[:most]
        return self._tiles[how]


@dataclass(frozen=True, kw_only=True)
class FixedBatch(KVBatch):
    """Decodes and prompts in memory that is filled before each run. The first prompt follows the last decode, wherever
    that is, so that only the tokens of all of them fill a room.

    Attributes:
        num_decodes: at most.
        count: [1] int64, decodes that are somebody's.
    """

    count: Tensor

    @property
    def first_prompt(self) -> int:
        return 0

    @cached_property
    def decodes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of any batch; what is nobody's has no position and sees nothing, whatever prompt is in its place."""
        n = self.num_decodes
        is_nobodys = torch.arange(n, device=self.positions.device) >= self.count
        positions, visible = self.positions[:n].masked_fill(is_nobodys, -1), self.visible[:n].masked_fill(is_nobodys, 0)
        return self.block_table[:n], positions, visible, self.tail_slots


def fixed_batch(
    fmt: KVFormat, room: Room, tensors: dict[str, Tensor], slots: Tensor, table: Tensor
) -> tuple[FixedBatch, FixedPrompts]:
    """The batch of whatever `Room.lay_out` has put into `tensors`, as computed on their device, and its prompts.

    Args:
        slots: [room.decodes], of the decodes; what is nobody's needs one that exists.
        table: [slots, N], their blocks.
    """
    far_table = tensors["far_firsts"][:, None] + torch.arange(table.shape[1], device=table.device)
    far_table = far_table.clamp_(0, MOST_FAR - 1)
    names = ("near_sources", "sealed_blocks", "sealed_rows", *KEPT, "far_blocks")
    prompts = FixedPrompts(
        np.zeros((0, 5), np.int64),
        **{name: tensors[name] for name in names},
        far_table=far_table,
        num_tokens=room.tokens,
        tile_memory=tensors["tiles"],
    )
    batch = FixedBatch(
        format=fmt,
        spans=(),
        num_decodes=room.decodes,
        **{name: tensors[name] for name in ("positions", "rows", "visible", "token_blocks")},
        block_table=torch.cat([table[slots], tensors["far_blocks"][far_table]]),
        tail_slots=slots,
        prompts=prompts,
        count=tensors["num_decodes"],
    )
    return batch, prompts


def _first_near(fmt: KVFormat, span: Span) -> int:
    return span.start if fmt.packs_on_write else fmt.visible(span.start)


def _num_far(fmt: KVFormat, span: Span) -> int:
    return -(-min(span.end, fmt.visible(span.end - 1)) // fmt.block_size)
