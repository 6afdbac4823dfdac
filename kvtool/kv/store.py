"""The KV store: packed blocks and full-precision tails of all layers, each in one allocation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import CODECS, Arrays
from kvtool.kv.format import KVFormat, StreamFormat
from kvtool.kv.layout import Field, KVLayout


class KVStore:
    """All KV memory of one engine. A block id or a tail slot is good for all layers.

    Args:
        layout: spec and format; the sizes follow from it.
        num_blocks: packed blocks.
        num_tail_slots: sequences that can run at once; they cost nothing where the format packs on write.
        dtype: the model's precision, of `layout.spec.element_size` bytes.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        num_tail_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        spec, self.format = layout.spec, layout.format
        assert dtype.itemsize == spec.element_size
        self.layout, self.num_blocks, self.dtype = layout, num_blocks, dtype
        # Zeros, not empty: what a mask leaves out still meets a probability of 0, and 0 x NaN is NaN.
        self.blocks = torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device)
        self.tails = torch.zeros(num_tail_slots * layout.tail_bytes, dtype=torch.uint8, device=device)
        self.layers: list[LayerKV] = []
        self._layer_blocks: list[Tensor] = []  # [num_blocks, bytes] of each layer
        block_offset = tail_offset = 0
        for index, layer_format in enumerate(self.format.layers):
            streams = []
            for stream, stream_format, fields in zip(
                (spec.key, spec.value), (layer_format.key, layer_format.value), layout.fields(index), strict=True
            ):
                arrays = {field.name: self._block_view(index, block_offset, field) for field in fields}
                shape = (num_tail_slots, stream.heads, self.format.tail_tokens, stream.dim)
                streams.append(Stream(stream_format, arrays, self._tail_view(tail_offset, shape)))
                tail_offset += self.format.tail_tokens * stream.elements
            self.layers.append(LayerKV(self.format, *streams))
            nbytes = layout.layer_block_bytes(index)
            self._layer_blocks.append(self.blocks[block_offset:][: num_blocks * nbytes].view(num_blocks, nbytes))
            block_offset += num_blocks * nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated: blocks and tails."""
        return self.blocks.nbytes + self.tails.nbytes

    def seal(self, batch: KVBatch) -> None:
        """Pack the blocks that this step's decodes completed; `LayerKV.write` has packed those of longer spans."""
        if self.format.packs_on_write:
            return
        size = self.format.block_size
        full = [
            (span.tail_slot, self.format.visible(span.start), span.blocks)
            for span in batch.spans[: batch.num_decodes]
            if self.format.visible(span.end) > self.format.visible(span.start)
        ]
        if not full:
            return
        device = self.blocks.device
        slots = torch.tensor([slot for slot, _, _ in full], device=device)
        blocks = torch.tensor([owned[first // size] for _, first, owned in full], device=device)
        rows = torch.tensor(
            [_rows(first, first + size, self.format.tail_tokens) for _, first, _ in full], device=device
        )
        for layer in self.layers:
            for stream in (layer.key, layer.value):
                stream.write_blocks(stream.tail[slots[:, None], :, rows].transpose(1, 2), blocks)

    def clear(self, blocks: Sequence[int], tail_slot: int) -> None:
        """Overwrite blocks and a tail with zeros."""
        for layer in self._layer_blocks:
            layer[list(blocks)] = 0
        self.tail(tail_slot).zero_()

    def fork(self, source_block: int, source_slot: int, block: int, slot: int) -> None:
        """Copy one block (unless it is -1) and one tail."""
        for layer in self._layer_blocks if block >= 0 else ():
            layer[block] = layer[source_block]
        self.tail(slot).copy_(self.tail(source_slot))

    def gather_blocks(self, blocks: Sequence[int]) -> Tensor:
        """The bytes of `blocks`, [n, block_bytes] uint8, each with its layers behind each other."""
        return torch.cat([layer[list(blocks)] for layer in self._layer_blocks], dim=1)

    def scatter_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        """Write what `gather_blocks` gave."""
        parts = data.split([layer.shape[1] for layer in self._layer_blocks], dim=1)
        for layer, part in zip(self._layer_blocks, parts, strict=True):
            layer[list(blocks)] = part

    def tail(self, slot: int) -> Tensor:
        """The bytes of one tail slot, [tail_bytes] uint8."""
        return self.tails[slot * self.layout.tail_bytes : (slot + 1) * self.layout.tail_bytes]

    def _block_view(self, layer: int, layer_offset: int, field: Field) -> Tensor:
        """[num_blocks, heads, rows, n] of one field of one layer."""
        memory = self.blocks.view(self.dtype if field.dtype == "model" else getattr(torch, field.dtype))
        heads, rows, n = field.shape
        stride = self.layout.layer_block_bytes(layer) // memory.itemsize
        offset = (layer_offset + field.offset) // memory.itemsize
        return memory.as_strided((self.num_blocks, heads, rows, n), (stride, rows * n, n, 1), offset)

    def _tail_view(self, offset: int, shape: tuple[int, int, int, int]) -> Tensor:
        """[slots, heads, tail tokens, D] of one stream of one layer; a slot's layers lie behind each other."""
        memory, (_, _, tokens, dim) = self.tails.view(self.dtype), shape
        return memory.as_strided(shape, (self.layout.tail_bytes // memory.itemsize, tokens * dim, dim, 1), offset)


@dataclass(frozen=True)
class Stream:
    """Keys or values of one layer.

    Attributes:
        format: how its blocks are packed.
        arrays: "codes", "scale", "zero" by name, each [num_blocks, heads, rows, n].
        tail: [slots, heads, tail tokens, D], position p in row p mod tail tokens.
    """

    format: StreamFormat
    arrays: Arrays
    tail: Tensor

    def write_tokens(self, x: Tensor, blocks: Tensor, rows: Tensor) -> None:
        """Pack tokens `x` [T, heads, D] for good, each in its block and row."""
        for name, value in CODECS[self.format.bits].encode(x.unsqueeze(2), self.format).items():
            self.arrays[name][blocks, :, rows] = value.squeeze(2)

    def write_blocks(self, x: Tensor, blocks: Tensor) -> None:
        """Pack whole blocks `x` [n, heads, B, D]."""
        for name, value in CODECS[self.format.bits].encode(x, self.format).items():
            self.arrays[name][blocks] = value

    def read_blocks(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens of `blocks` [n, width], decoded: [n, heads, width * B, D]."""
        # index_select: on CPU, array[blocks] takes ten times as long. Codes change places before they grow.
        flat = blocks.flatten()
        gathered = {
            name: array.index_select(0, flat).unflatten(0, blocks.shape).transpose(1, 2).contiguous()
            for name, array in self.arrays.items()
        }
        return CODECS[self.format.bits].decode(gathered, self.format, dtype).flatten(2, 3)

    def read_tail(self, slot: int, first: int, end: int) -> Tensor:
        """Positions `first` to `end` of the tail in `slot`, [heads, n, D]."""
        return self.tail[slot][:, _rows(first, end, self.tail.shape[2])]

    def write_tail(self, x: Tensor, slot: int, first: int) -> None:
        """Keep `x` [heads, n, D], whose first token stands at position `first`."""
        self.tail[slot][:, _rows(first, first + x.shape[1], self.tail.shape[2])] = x


@dataclass(frozen=True)
class Near:
    """A span's keys and values at full precision: positions `first` to its end, [heads, n, D]."""

    first: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class LayerKV:
    """The store as one attention layer sees it."""

    format: KVFormat
    key: Stream
    value: Stream

    def write(self, key: Tensor, value: Tensor, batch: KVBatch) -> list[Near]:
        """Store this step's keys [T, heads, D] and values, so that each token reads all up to itself.

        Returns:
            For each span behind the decodes, what its queries read at full precision (a decode reads its tail);
            nothing where the format packs on write.
        """
        if self.format.packs_on_write:
            self.key.write_tokens(key, batch.token_blocks, batch.rows)
            self.value.write_tokens(value, batch.token_blocks, batch.rows)
            return []
        n = batch.num_decodes
        if n:
            self.key.tail[batch.tail_slots[:n], :, batch.rows[:n]] = key[:n]
            self.value.tail[batch.tail_slots[:n], :, batch.rows[:n]] = value[:n]
        near = []
        for span in batch.spans[n:]:
            near.append(self._write_span(key[n : n + span.length], value[n : n + span.length], span))
            n += span.length
        return near

    def _write_span(self, key: Tensor, value: Tensor, span: Span) -> Near:
        """Pack every block that the span completes, and keep what it leaves over in its tail."""
        size, first, packed = self.format.block_size, self.format.visible(span.start), self.format.visible(span.end)
        blocks = torch.tensor(list(span.blocks[first // size : packed // size]), device=key.device)
        near = []
        for stream, new in ((self.key, key.transpose(0, 1)), (self.value, value.transpose(0, 1))):
            x = torch.cat([stream.read_tail(span.tail_slot, first, span.start), new], dim=1)
            if packed > first:
                stream.write_blocks(x[:, : packed - first].unflatten(1, (-1, size)).transpose(0, 1), blocks)
            kept = max(packed, span.start)
            stream.write_tail(new[:, kept - span.start :], span.tail_slot, kept)
            near.append(x)
        return Near(first, *near)


def _rows(first: int, end: int, tail_tokens: int) -> list[int]:
    return [position % tail_tokens for position in range(first, end)]
