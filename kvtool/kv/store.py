"""The KV store: packed blocks and full-precision tails of all layers, each in one allocation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool.kv.batch import KVBatch, integers, on_device
from kvtool.kv.codecs import CODECS, Arrays
from kvtool.kv.format import KVFormat, StreamFormat
from kvtool.kv.layout import Field, KVLayout
from kvtool.kv.spec import StreamSpec
from kvtool.ranges import Range

if TYPE_CHECKING:
    from kvtool.kernels.encode import Packing
    from kvtool.kernels.pack import LayerWriter, Sealer
    from kvtool.kernels.rotary_heads import RotaryHeads
    from kvtool.kernels.streams import PackedStream

ARRIVALS = 4096  # more results than have two programs that run at once, on any GPU


class KVStore:
    """All KV memory of one engine. A block id or a tail slot is good for all layers.

    Args:
        layout: spec and format; the sizes follow from it.
        num_blocks: packed blocks.
        num_tail_slots: sequences that can run at once; they cost nothing where the format packs on write.
        dtype: the model's precision, of `layout.spec.element_size` bytes.

    Attributes:
        sealer: packs the blocks that decodes complete, of all layers, without the host; None where torch does it.
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
        self._faults = torch.zeros(1, dtype=torch.int32, device=device)
        arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        with_kernels = runs_kernels(self.blocks.device, dtype)
        tails = self.tails.view(dtype).view(num_tail_slots, layout.tail_bytes // spec.element_size)
        layer_tail = self.format.tail_tokens * (spec.key.elements + spec.value.elements)
        block_offset = tail_offset = 0
        for index, layer_format in enumerate(self.format.layers):
            nbytes = layout.layer_block_bytes(index)
            blocks = self.blocks[block_offset:][: num_blocks * nbytes].view(num_blocks, nbytes)
            self._layer_blocks.append(blocks)
            writer = self._writer(index, blocks, tails[:, tail_offset:][:, :layer_tail]) if with_kernels else None
            streams = []
            for stream, stream_format, fields in zip(
                (spec.key, spec.value), (layer_format.key, layer_format.value), layout.fields(index), strict=True
            ):
                arrays = {field.name: self._block_view(index, block_offset, field) for field in fields}
                shape = (num_tail_slots, stream.heads, self.format.tail_tokens, stream.dim)
                streams.append(Stream(stream_format, arrays, self._tail_view(tail_offset, shape)))
                tail_offset += self.format.tail_tokens * stream.elements
            key, value = streams
            self.layers.append(LayerKV(self.format, key, value, arrivals, writer))
            block_offset += num_blocks * nbytes
        self.sealer = self._sealer() if with_kernels and not self.format.packs_on_write else None

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
        if self.sealer:
            self.sealer.seal(batch.positions[: batch.num_decodes], batch.tail_slots, batch.block_table)
            return
        device = self.blocks.device
        slots = torch.tensor([slot for slot, _, _ in full], device=device)
        blocks = torch.tensor([owned[first // size] for _, first, owned in full], device=device)
        firsts = torch.tensor([first for _, first, _ in full], device=device)
        rows = (firsts[:, None] + torch.arange(size, device=device)) % self.format.tail_tokens
        with Range("kvtool::seal"):
            for layer in self.layers:
                for stream in (layer.key, layer.value):
                    stream.write_blocks(stream.tail[slots[:, None], :, rows].transpose(1, 2), blocks)

    def take_fault(self) -> Tensor:
        """Whether a kernel met what the format cannot hold since this was last called: [1] int32 on the device.

        A kernel cannot raise: who reads this back gives it to `codecs.check_fits`. Where torch packs, it raises itself.
        """
        fault = self._faults.clone()
        self._faults.zero_()
        return fault

    def note_fault(self) -> None:
        """As a kernel would: what torch has met, and the caller cannot end the step for."""
        self._faults.fill_(1)

    def clear(self, blocks: Sequence[int], tail_slot: int) -> None:
        """Overwrite blocks and a tail with zeros."""
        index = self.index(blocks)
        for layer in self._layer_blocks:
            layer.index_fill_(0, index, 0)
        self.tail(tail_slot).zero_()

    def fork(self, source_block: int, source_slot: int, block: int, slot: int) -> None:
        """Copy one block (unless it is -1) and one tail."""
        for layer in self._layer_blocks if block >= 0 else ():
            layer[block] = layer[source_block]
        self.tail(slot).copy_(self.tail(source_slot))

    def gather_blocks(self, blocks: Sequence[int]) -> Tensor:
        """The bytes of `blocks`, [n, block_bytes] uint8, each with its layers behind each other."""
        index = self.index(blocks)
        return torch.cat([_words(layer).index_select(0, index) for layer in self._layer_blocks], dim=1).view(
            torch.uint8
        )

    def scatter_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        """Write what `gather_blocks` gave."""
        parts = data.split([layer.shape[1] for layer in self._layer_blocks], dim=1)
        index = self.index(blocks)
        for layer, part in enumerate(parts):
            self.scatter_layer(layer, index, part.contiguous())

    def gather_layer(self, layer: int, index: Tensor, out: Tensor) -> None:
        """Copy the bytes that are one layer's of the blocks of an `index` to `out`, [n, layer_block_bytes] uint8."""
        torch.index_select(_words(self._layer_blocks[layer]), 0, index, out=_words(out))

    def scatter_layer(self, layer: int, index: Tensor, data: Tensor) -> None:
        """Write what `gather_layer` gave, from whatever device."""
        data = data.to(self.blocks.device, non_blocking=True)
        _words(self._layer_blocks[layer]).index_copy_(0, index, _words(data))

    def tail(self, slot: int) -> Tensor:
        """The bytes of one tail slot, [tail_bytes] uint8."""
        return self.tails[slot * self.layout.tail_bytes : (slot + 1) * self.layout.tail_bytes]

    def index(self, blocks: Sequence[int]) -> Tensor:
        """`blocks` on the device; with a list torch would wait for the GPU, once for each layer."""
        return on_device({"blocks": integers(blocks, len(blocks))}, self.blocks.device)["blocks"]

    def _writer(self, layer: int, blocks: Tensor, tails: Tensor) -> "LayerWriter":
        from kvtool.kernels.pack import LayerWriter

        spec, tokens, layer_format = self.layout.spec, self.format.tail_tokens, self.format.layers[layer]
        key, value = self.layout.fields(layer)
        exact = StreamFormat()
        return LayerWriter(
            blocks,
            tails,
            _packing(spec.key, layer_format.key, self.format.block_size, {field.name: field.offset for field in key}),
            _packing(spec.value, layer_format.value, self.format.block_size, {f.name: f.offset for f in value}),
            _packing(spec.key, exact, tokens, {"codes": 0}),
            _packing(spec.value, exact, tokens, {"codes": tokens * spec.key.elements * spec.element_size}),
            self._faults,
        )

    def _sealer(self) -> "Sealer":
        from kvtool.kernels.pack import Sealer

        writers = [layer.writer for layer in self.layers if layer.writer]
        return Sealer(writers, self.blocks, self.tails.view(self.dtype), self.format.residual)

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

    @cached_property
    def packed(self) -> "PackedStream":
        """As kernels read it."""
        from kvtool.kernels.streams import PackedStream

        fmt, scale, zero = self.format, self.arrays.get("scale"), self.arrays.get("zero")
        return PackedStream(fmt.bits, fmt.axis, fmt.group, self.arrays["codes"], scale, zero, self.tail)

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


@dataclass(frozen=True)
class Near:
    """What the spans behind the decodes read at full precision, [n, heads, D]: see `Prompts`."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class LayerKV:
    """The store as one attention layer sees it.

    Attributes:
        arrivals: [ARRIVALS] int32, zeros between kernels: programs that share a result count here who is done.
        writer: the kernels that write it; None where torch does.
    """

    format: KVFormat
    key: Stream
    value: Stream
    arrivals: Tensor
    writer: "LayerWriter | None" = None

    @property
    def is_exact(self) -> bool:
        """Blocks give back what was written."""
        return self.format.packs_on_write and self.key.format.bits == self.value.format.bits == "16"

    def write(self, key: Tensor, value: Tensor, batch: KVBatch) -> Near | None:
        """Store this step's keys [T, heads, D] and values, so that each token reads all up to itself.

        Returns:
            What the queries of the spans behind the decodes read at full precision, while a decode reads its tail;
            None where there are no such spans, or blocks hold it all.
        """
        first, prompts = batch.first_prompt, batch.prompts
        if self.format.packs_on_write:
            self._write_tokens(key, value, batch.token_blocks, batch.rows)
            return Near(key[first:], value[first:]) if prompts and self.is_exact else None
        if prompts is None:
            self._write_tails(key, value, None, batch.tail_slots, batch.rows)
            return None
        near = self._read_near(key, value, batch)
        if len(prompts.sealed_blocks):
            with Range("kvtool::seal"):
                self.write_blocks(near, prompts.sealed_rows, prompts.sealed_blocks)
        self._write_tails(key, value, prompts.kept_tokens, prompts.kept_slots, prompts.kept_rows)
        return near

    def rotates(self, batch: KVBatch) -> bool:
        """`rotate_and_write` takes the step: every token goes to one place, and as the model made it."""
        is_turned = self.key.format.rotate or self.value.format.rotate
        return bool(self.writer) and not is_turned and (self.format.packs_on_write or not batch.prompts)

    def rotate_and_write(self, heads: "RotaryHeads", batch: KVBatch) -> tuple[Tensor, Near | None]:
        """The step's queries [T, Hq, D], ready, and what `write` of its keys and values returns, in one kernel."""
        assert self.writer and self.rotates(batch)
        to_tails, first = not self.format.packs_on_write, batch.first_prompt
        owners, key = batch.tail_slots if to_tails else batch.token_blocks, None
        if batch.prompts and self.is_exact:
            key = torch.empty_like(heads.key, memory_format=torch.contiguous_format)
        q = self.writer.rotate_and_write(heads, owners, batch.rows, key, to_tails=to_tails)
        return q, None if key is None else Near(key[first:], heads.value[first:])

    def _read_near(self, key: Tensor, value: Tensor, batch: KVBatch) -> Near:
        prompts = batch.prompts
        assert prompts
        sources = prompts.near_sources
        if not len(sources):
            return Near(key[batch.first_prompt :], value[batch.first_prompt :])
        if self.writer:
            return Near(*self.writer.read_near(key, value, sources))
        is_old, slots, rows = (
            sources < 0,
            (-1 - sources) // self.format.tail_tokens,
            (-1 - sources) % self.format.tail_tokens,
        )

        def read(stream: Stream, x: Tensor) -> Tensor:
            near = x[sources.clamp(min=0)]
            near[is_old] = stream.tail[slots[is_old], :, rows[is_old]]
            return near

        return Near(read(self.key, key), read(self.value, value))

    def _write_tokens(self, key: Tensor, value: Tensor, blocks: Tensor, rows: Tensor) -> None:
        if self.writer:
            self.writer.write_tokens(key, value, blocks, rows)
        else:
            self.key.write_tokens(key, blocks, rows)
            self.value.write_tokens(value, blocks, rows)

    def _write_tails(self, key: Tensor, value: Tensor, tokens: Tensor | None, slots: Tensor, rows: Tensor) -> None:
        """Keep `tokens` of key and value [T, heads, D]; None: all."""
        if self.writer:
            self.writer.write_tails(key, value, tokens, slots, rows)
        else:
            self.key.tail[slots, :, rows] = key if tokens is None else key[tokens]
            self.value.tail[slots, :, rows] = value if tokens is None else value[tokens]

    def write_blocks(self, near: Near, rows: Tensor, blocks: Tensor) -> None:
        """Pack whole blocks: the B near tokens from each of `rows` on."""
        if self.writer:
            self.writer.write_blocks(near.key, near.value, rows, blocks)
        else:
            tokens = rows[:, None] + torch.arange(self.format.block_size, device=rows.device)
            for stream, x in ((self.key, near.key), (self.value, near.value)):
                stream.write_blocks(x[tokens].transpose(1, 2), blocks)


def _words(data: Tensor) -> Tensor:
    """Bytes eight at a time: torch copies rows on a CPU by element."""
    return data.view(torch.int64)


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels write the store; elsewhere, and in float64, torch does."""
    return device.type == "cuda" and dtype != torch.float64


def _packing(stream: StreamSpec, fmt: StreamFormat, tokens: int, offsets: dict[str, int]) -> "Packing":
    """How a kernel finds the arrays of a stream, which start `offsets` bytes into a layer's part of a block."""
    from kvtool.kernels.encode import Packing

    shape = (stream.heads, tokens, stream.dim)
    return Packing(fmt.bits, fmt.axis, fmt.group, fmt.symmetric, *shape, **offsets)
