"""Memory for sequences on their way between two stores."""

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore

MAX_SPARE = 4


class Staged:
    """Room for one sequence outside any store: its blocks, layer by layer, and its tail.

    Attributes:
        memory: what it lies in, uint8, perhaps more than it needs.
        nbytes: that it needs.
        layers: [num_blocks, bytes of the layer's part of a block] uint8 each.
        tail: [tail_bytes] uint8.
        read: when a store on a GPU has it all.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, memory: Tensor) -> None:
        sizes = [layout.layer_block_bytes(layer) for layer in range(layout.spec.num_layers)]
        self.read: torch.cuda.Event | None = None
        self.memory, self.nbytes = memory, num_blocks * sum(sizes) + layout.tail_bytes
        *layers, self.tail = memory[: self.nbytes].split([*(num_blocks * size for size in sizes), layout.tail_bytes])
        self.layers = [layer.view(num_blocks, size) for layer, size in zip(layers, sizes, strict=True)]

    def part(self, layers: range, first_block: int, end_block: int) -> list[Tensor]:
        """Those blocks of some layers, in their order and in as few tensors as they lie in."""
        if end_block - first_block < len(self.layers[0]):
            return [self.layers[layer][first_block:end_block] for layer in layers]
        start = sum(layer.nbytes for layer in self.layers[: layers.start])
        return [self.memory[start:][: sum(layer.nbytes for layer in self.layers[layers.start : layers.stop])]]

    def store_in(self, store: KVStore, blocks: Sequence[int], slot: int) -> None:
        """Copy the last of the blocks to `blocks`, and the tail to `slot`; those before are in the store already."""
        if blocks:
            index = store.index(blocks)
            for layer, data in enumerate(self.layers):
                store.scatter_layer(layer, index, data[len(data) - len(blocks) :])
        store.tail(slot).copy_(self.tail, non_blocking=True)
        self.note_read(store.blocks.device)

    def note_read(self, device: torch.device) -> None:
        """All that reads it has been launched on `device`."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self.read = stream.record_event()
            if self.memory.is_cuda:  # it was allocated for another stream
                self.memory.record_stream(stream)


class Staging:
    """Gives room to sequences, up to a bound, and the same again: memory that is new to a process costs as much time as
    to send what it holds.

    Args:
        device: of the store.
        most_bytes: of all that has been given and not come back.
    """

    def __init__(self, layout: KVLayout, device: torch.device, most_bytes: int) -> None:
        self._layout, self._device = layout, device
        self.free_bytes = most_bytes
        self._spare: list[Staged] = []
        self._lock = Lock()

    def take(self, num_tokens: int, on_device: bool) -> Staged | None:
        """Room for a sequence of so many computed tokens, on the store's device or the host; None: there is none."""
        layout = self._layout
        nbytes, num_blocks = layout.bytes_for([num_tokens]), layout.format.num_blocks(num_tokens)
        with self._lock:
            if nbytes > self.free_bytes:
                return None
            self.free_bytes -= nbytes
            fits = [index for index, spare in enumerate(self._spare) if spare.memory.nbytes >= nbytes]
            spare = self._spare.pop(fits[-1]) if fits else None
        if spare is not None:
            if spare.read:
                spare.read.synchronize()
            return Staged(layout, num_blocks, spare.memory)
        pinned = self._device.type == "cuda" and not on_device
        device = self._device if on_device else torch.device("cpu")
        try:
            with torch.inference_mode(False):  # it is written by who runs no model, too
                memory = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        except RuntimeError:  # torch's word for a failed allocation
            with self._lock:
                self.free_bytes += nbytes
            return None
        return Staged(layout, num_blocks, memory)

    def give_back(self, staged: Staged, again: bool = True) -> None:
        """It is not used any more; `again` is False where a GPU may still read it."""
        with self._lock:
            self.free_bytes += staged.nbytes
            if again:
                self._spare = [*self._spare[1 - MAX_SPARE :], staged]
