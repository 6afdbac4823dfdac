"""Where every byte of the cache lies: the only source of sizes for allocation, transfer and reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kvtool.kv.format import KVFormat, StreamFormat
from kvtool.kv.spec import KVSpec, StreamSpec

ALIGNMENT = 16  # bytes: the widest load of a GPU thread


@dataclass(frozen=True)
class Field:
    """One array of a packed stream, as it lies in a block.

    Attributes:
        name: "codes", "scale" or "zero".
        dtype: a torch dtype's name, or "model" for the model's own.
        shape: [heads, tokens or 1, elements], of one block.
        offset: bytes from the start of the layer's part of a block.
        nbytes: its size, without the padding behind it.
    """

    name: str
    dtype: str
    shape: tuple[int, int, int]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class KVLayout:
    """The bytes of a cache of `spec` in `format`.

    A block holds `block_size` tokens of all layers; within it each layer has its key's and then its value's fields,
    each padded to 16 bytes. A tail slot holds `tail_tokens` of all layers at the model's precision.
    """

    spec: KVSpec
    format: KVFormat

    def fields(self, layer: int) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
        """Fields of the key and of the value stream of `layer`."""
        layer_format = self.format.layers[layer]
        key = self._place(_arrays(self.spec.key, layer_format.key, self.format.block_size), 0)
        value_start = _aligned(key[-1].offset + key[-1].nbytes)
        value = self._place(_arrays(self.spec.value, layer_format.value, self.format.block_size), value_start)
        return key, value

    def layer_block_bytes(self, layer: int) -> int:
        """Bytes of a block that are `layer`'s, padding included."""
        return self._layer_block_bytes[layer]

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one packed block over all layers, padding included."""
        return sum(self._layer_block_bytes)

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in one packed block over all layers; the rest is scales, zeros and padding."""
        fields = (field for layer in range(self.spec.num_layers) for stream in self.fields(layer) for field in stream)
        return sum(field.nbytes for field in fields if field.name == "codes")

    @property
    def tail_bytes(self) -> int:
        """Bytes of one sequence's full-precision tail over all layers."""
        return self.format.tail_tokens * self.spec.elements * self.spec.element_size

    @property
    def tail_units(self) -> int:
        """Pieces of `block_bytes` that hold a tail, where blocks and tails lie in one memory."""
        return -(-self.tail_bytes // self.block_bytes)

    @property
    def bits_per_element(self) -> float:
        """Honest bits of a packed element: codes, scales, zeros and padding. The tail is not in it."""
        return 8 * self.block_bytes / (self.format.block_size * self.spec.elements)

    def bytes_for(self, lengths: Iterable[int]) -> int:
        """Bytes that sequences of these many tokens hold: their blocks and their tails."""
        return sum(self.format.num_blocks(length) * self.block_bytes + self.tail_bytes for length in lengths)

    def num_blocks_within(self, nbytes: int, num_tail_slots: int) -> int:
        """Blocks that fit in `nbytes` beside the tails; negative where not even the tails do."""
        return (nbytes - num_tail_slots * self.tail_bytes) // self.block_bytes

    @cached_property
    def _layer_block_bytes(self) -> list[int]:
        lasts = [self.fields(layer)[1][-1] for layer in range(self.spec.num_layers)]
        return [_aligned(last.offset + last.nbytes) for last in lasts]

    def _place(self, arrays: list[tuple[str, str, tuple[int, int, int]]], start: int) -> tuple[Field, ...]:
        fields = []
        for name, dtype, shape in arrays:
            itemsize = self.spec.element_size if dtype == "model" else _ITEMSIZE[dtype]
            field = Field(name, dtype, shape, start, itemsize * shape[0] * shape[1] * shape[2])
            fields.append(field)
            start = _aligned(start + field.nbytes)
        return tuple(fields)


_ITEMSIZE = {"uint8": 1, "float16": 2}


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _arrays(stream: StreamSpec, fmt: StreamFormat, block_size: int) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Name, dtype and shape of the arrays that a block of `stream` consists of."""
    heads, dim = stream.heads, stream.dim
    if fmt.bits == "16":
        return [("codes", "model", (heads, block_size, dim))]
    scales = (heads, 1, dim) if fmt.axis == "channel" else (heads, block_size, dim // fmt.group)
    if fmt.bits == "fp8":
        return [("codes", "uint8", (heads, block_size, dim)), ("scale", "float16", scales)]
    arrays = [("codes", "uint8", (heads, block_size, dim * int(fmt.bits) // 8)), ("scale", "float16", scales)]
    return arrays if fmt.symmetric else [*arrays, ("zero", "float16", scales)]
