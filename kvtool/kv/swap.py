"""Host memory for sequences that must make room: their blocks and tails, bit for bit."""

from collections.abc import Sequence

import torch

from kvtool.errors import CapacityError
from kvtool.kv.store import KVStore

PIECE_BYTES = 64 << 20  # gathered on the device at a time: who must make room may be long, and little is free then


class SwapSpace:
    """`num_units` units of a block's bytes each; a tail takes as many as hold it.

    On a GPU the memory is pinned, so that copies run beside the host, in order with all else on the stream.

    Raises:
        CapacityError: the host has not so much.
    """

    def __init__(self, store: KVStore, num_units: int) -> None:
        self._store = store
        on_gpu = store.blocks.device.type == "cuda"
        self._at_once = max(1, PIECE_BYTES // store.layout.block_bytes)  # blocks
        try:
            self.units = torch.empty(num_units, store.layout.block_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        except RuntimeError as error:  # torch's word for a failed allocation
            nbytes = num_units * store.layout.block_bytes
            raise CapacityError(f"--swap-space: the host has no {nbytes / 2**30:.1f} GiB to give; lower it") from error

    def save(self, blocks: Sequence[int], tail_slot: int, units: Sequence[int]) -> None:
        """Copy blocks, and then the tail, to `units`."""
        for first in range(0, len(blocks), self._at_once):
            data = self._store.gather_blocks(blocks[first : first + self._at_once])
            for unit, row in zip(units[first:], data, strict=False):
                self.units[unit].copy_(row, non_blocking=True)
        tail = self._store.tail(tail_slot)
        for unit, data in zip(units[len(blocks) :], tail.split(self.units.shape[1]), strict=False):
            self.units[unit, : len(data)].copy_(data, non_blocking=True)

    def load(self, units: Sequence[int], blocks: Sequence[int], tail_slot: int) -> None:
        """Copy `units` back, to blocks and a tail that need not be the same as before."""
        for first in range(0, len(blocks), self._at_once):
            piece = blocks[first : first + self._at_once]
            data = torch.empty(len(piece), self.units.shape[1], dtype=torch.uint8, device=self._store.blocks.device)
            for row, unit in zip(data, units[first:], strict=False):
                row.copy_(self.units[unit], non_blocking=True)
            self._store.scatter_blocks(piece, data)
        tail = self._store.tail(tail_slot)
        for unit, part in zip(units[len(blocks) :], tail.split(self.units.shape[1]), strict=False):
            part.copy_(self.units[unit, : len(part)], non_blocking=True)
