"""The bytes that sequences take in a cache, by what they are for."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from kvtool.kv.layout import Field, KVLayout
from kvtool.kv.spec import StreamSpec


@dataclass(frozen=True)
class Memory:
    """Bytes of keys or values, or of both together, of sequences in a cache.

    Attributes:
        codes, scales, zeros: of packed blocks.
        padding: that fields of blocks end with.
        window: of full-precision tails, as allocated.
        exact: the same tokens at 16 bits an element.
    """

    codes: int
    scales: int
    zeros: int
    padding: int
    window: int
    exact: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.zeros + self.padding + self.window

    @property
    def saved(self) -> float:
        """Share of the 16-bit bytes; negative where the window outweighs all."""
        return 1 - self.total / self.exact

    @classmethod
    def sum(cls, parts: "Sequence[Memory]") -> "Memory":
        return cls(*map(sum, zip(*map(astuple, parts), strict=True)))


def nominal_saved(layout: KVLayout) -> float:
    """Share of 16 bits that codes without scales, zeros and window would save."""
    spec = layout.spec
    bits = sum(
        stream.elements * (8 if fmt.bits == "fp8" else int(fmt.bits))
        for layer in layout.format.layers
        for stream, fmt in ((spec.key, layer.key), (spec.value, layer.value))
    )
    return 1 - bits / (16 * spec.elements)


def layer_memory(layout: KVLayout, layer: int, num_seqs: int, context: int) -> tuple[Memory, Memory]:
    """Of the keys and of the values of one layer, for `num_seqs` sequences of `context` tokens each."""
    key, value = layout.fields(layer)
    ends = [*(field.offset for field in (*key, *value)), layout.layer_block_bytes(layer)][1:]
    padding = [end - field.offset - field.nbytes for field, end in zip((*key, *value), ends, strict=True)]
    return (
        _stream_memory(layout, layout.spec.key, key, sum(padding[: len(key)]), num_seqs, context),
        _stream_memory(layout, layout.spec.value, value, sum(padding[len(key) :]), num_seqs, context),
    )


def _stream_memory(
    layout: KVLayout, stream: StreamSpec, fields: Sequence[Field], padding: int, num_seqs: int, context: int
) -> Memory:
    blocks = num_seqs * layout.format.num_blocks(context)
    nbytes = {field.name: blocks * field.nbytes for field in fields}
    return Memory(
        codes=nbytes["codes"],
        scales=nbytes.get("scale", 0),
        zeros=nbytes.get("zero", 0),
        padding=blocks * padding,
        window=num_seqs * layout.format.tail_tokens * stream.elements * layout.spec.element_size,
        exact=num_seqs * context * stream.elements * 2,
    )
