"""Which blocks, tail and swap space a sequence has. Integers only; the runner moves the bytes."""

from collections import Counter
from collections.abc import Sequence as Items
from typing import NamedTuple

from kvtool.kv.blocks import BlockPool, SlotPool
from kvtool.kv.format import KVFormat
from kvtool.request import Fork, Import, Memory, Swap
from kvtool.sequence import Sequence


class Moves(NamedTuple):
    """What must happen to memory around the next step, as `ScheduledBatch` says it."""

    swap_outs: list[Swap]
    wipes: list[Memory]
    swap_ins: list[Swap]
    imports: list[Import]
    forks: list[Fork]

    @classmethod
    def none(cls) -> "Moves":
        return cls([], [], [], [], [])


class SequenceMemory:
    """Gives sequences memory and takes it back; who gets it, and who must make room, its caller says.

    Args:
        fmt: of the KV store.
        blocks, slots, swap: of the store and of the swap space.
        tail_units: units of swap space that one tail takes.
        totals: of EngineStats.

    Attributes:
        moves: that the next step is yet to be told of.
    """

    def __init__(
        self,
        fmt: KVFormat,
        blocks: BlockPool,
        slots: SlotPool,
        swap: BlockPool,
        tail_units: int,
        totals: Counter[str],
    ) -> None:
        self.format, self.blocks, self.slots, self.swap = fmt, blocks, slots, swap
        self.tail_units, self._totals = tail_units, totals
        self.moves = Moves.none()

    def take_moves(self) -> Moves:
        """`moves`, of which the step that is being made is told."""
        moves, self.moves = self.moves, Moves.none()
        return moves

    def admit(self, sequence: Sequence, found: Items[int], spare: int) -> bool:
        """Give a sequence a slot, a share of the blocks `found`, which hold its beginning, and blocks for the rest of
        its tokens, if there are enough.

        Args:
            spare: blocks that others may need.
        """
        needed = self.format.num_blocks(len(sequence.tokens)) - len(found)
        available = self.blocks.num_free - sum(self.blocks.owners(block) == 0 for block in found)
        if available < needed + spare:
            return False
        self._share(sequence, found)
        self.own(sequence, needed)
        sequence.num_sealed = len(found)
        if sequence.units:
            self._swap_in(sequence)
        elif sequence.is_imported:
            self.moves.imports.append(Import(sequence.id, Memory(self._computed(sequence), sequence.slot)))
            sequence.is_imported = False
        else:
            sequence.num_computed_tokens = len(found) * self.format.block_size
        return True

    def fork(self, parent: Sequence, child: Sequence, spare: int) -> bool:
        """Give `child` a share of the complete blocks of `parent`, and memory for what is copied of the rest once the
        next step has computed it, if there are enough blocks beside `spare` others."""
        full = self.format.packed_tokens(len(parent.tokens)) // self.format.block_size
        partial = parent.blocks[full:]
        if self.blocks.num_free < len(partial) + spare:
            return False
        self._share(child, parent.blocks[:full])
        self.own(child, len(partial))
        child.num_sealed = parent.num_sealed
        last = (partial[0], child.blocks[-1]) if partial else (-1, -1)
        self.moves.forks.append(Fork(parent.slot, last[0], child.slot, last[1]))
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block that its next token needs, if it needs one and there is one."""
        if sequence.num_computed_tokens < sequence.num_held_tokens:
            return True
        if self.blocks.num_free == 0:
            return False
        self.own(sequence, 1)
        return True

    def own(self, sequence: Sequence, num_blocks: int) -> None:
        """Give a sequence so many blocks more."""
        sequence.blocks.extend(self.blocks.allocate() for _ in range(num_blocks))
        sequence.num_held_tokens = self.format.tokens_within(len(sequence.blocks))

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks and tail back."""
        if sequence.unfit or sequence.num_generated == 0:  # before its first token nobody has looked
            own = [block for block in sequence.blocks[sequence.num_sealed :] if self.blocks.owners(block) == 1]
            self.moves.wipes.append(Memory(own, sequence.slot))
        for block in reversed(sequence.blocks):  # the end of a prefix is of no use without its beginning
            self.blocks.free(block)
        self.slots.free(sequence.slot)
        sequence.blocks, sequence.slot = [], -1

    def swap_out(self, sequence: Sequence) -> bool:
        """Have what a sequence has computed saved, so that it can be released, if there is room for it."""
        computed = sequence.blocks[: self.format.num_blocks(sequence.num_computed_tokens)]
        num_units = len(computed) + self.tail_units
        if num_units > self.swap.num_free:
            return False
        sequence.units = [self.swap.allocate() for _ in range(num_units)]
        self.moves.swap_outs.append(Swap(Memory(computed, sequence.slot), sequence.units))
        self._totals["swap_outs_total"] += len(computed)
        return True

    def free_units(self, sequence: Sequence) -> None:
        """Take a sequence's swap space back."""
        for unit in sequence.units:
            self.swap.free(unit)
        sequence.units = []

    def _swap_in(self, sequence: Sequence) -> None:
        """Have what is not shared again brought back, and free the units."""
        blocks = self._computed(sequence)
        self.moves.swap_ins.append(Swap(Memory(blocks, sequence.slot), sequence.units[sequence.num_sealed :]))
        self._totals["swap_ins_total"] += len(blocks)
        self.free_units(sequence)

    def _computed(self, sequence: Sequence) -> list[int]:
        """Blocks of what a sequence has computed, as far as they are its own."""
        return sequence.blocks[sequence.num_sealed : self.format.num_blocks(sequence.num_computed_tokens)]

    def _share(self, sequence: Sequence, blocks: Items[int]) -> None:
        """Give a sequence that has nothing a slot and a share of `blocks`."""
        for block in blocks:
            self.blocks.share(block)
        sequence.slot, sequence.blocks = self.slots.allocate(), list(blocks)
