"""What one format costs a model: errors by layer, memory, quality, right answers and, on a GPU, time."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from kvtool.config import EngineConfig, KVOptions
from kvtool.kv.format import resolve
from kvtool.kv.layout import Field, KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.models.resolve import EMBEDDED
from kvtool.quantize.layer_errors import Outlier, calibrate, layer_errors, outlier, propagated_errors
from kvtool.runner import Runner
from kvtool.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class StreamCost:
    """Keys or values of one layer.

    Attributes:
        format: in words.
        error: ‖x − packed(x)‖ / ‖x‖ of what stands in blocks.
        outlier: the channel that stands out most.
    """

    format: str
    error: float
    outlier: Outlier
    memory: Memory


@dataclass(frozen=True)
class LayerCost:
    """One layer.

    Attributes:
        output_error: of its attention's output, as if all layers before it were exact.
        propagated_error: the same with those packed too.
    """

    layer: int
    key: StreamCost
    value: StreamCost
    output_error: float
    propagated_error: float


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


@dataclass(frozen=True)
class FormatCost:
    """One format on one model.

    Attributes:
        format: in words.
        bits_per_element: codes, scales, zeros and padding of packed tokens.
    """

    format: str
    bits_per_element: float
    layers: tuple[LayerCost, ...]
    memory: Memory


class Examiner:
    """A model, and what all formats are measured on.

    Args:
        config: of the model; its `kv` is left aside.
        num_seqs, context: sequences and tokens of each that memory and time are told for.
    """

    def __init__(self, config: EngineConfig, num_seqs: int = 1, context: int | None = None) -> None:
        self.runner = Runner(replace(config, kv=KVOptions(), swap_space=0, cuda_graph=False, max_num_seqs=1))
        model = self.runner.model_config
        self.num_seqs, self.context = num_seqs, context or min(model.max_position, 32768)
        stream = StreamSpec(model.num_kv_heads, model.head_dim)
        self.spec = KVSpec(model.num_layers, stream, stream, 2)
        tokenizer = Tokenizer.load(self.runner.path, model.vocab_size)
        ids = tokenizer.encode((EMBEDDED["tiny"] / "sample.txt").read_text("utf-8"))
        self.windows = torch.tensor(ids[:2048], device=self.runner.device)[None]
        self.activations = calibrate(self.runner.model, self.windows)

    def measure(self, kv: KVOptions) -> FormatCost:
        """What the format that `kv` asks for costs.

        Raises:
            ConfigError, UnsupportedError: the format does not fit the model.
        """
        layout = KVLayout(self.spec, resolve(kv, self.spec))
        layers = self._layers(layout)
        return FormatCost(
            format=layout.format.describe(),
            bits_per_element=layout.bits_per_element,
            layers=layers,
            memory=Memory.sum([stream.memory for layer in layers for stream in (layer.key, layer.value)]),
        )

    def _layers(self, layout: KVLayout) -> tuple[LayerCost, ...]:
        fmt = layout.format
        own = layer_errors(self.activations, fmt)
        propagated = propagated_errors(self.runner.model, self.windows, self.activations, fmt)
        costs = []
        for index, (exact, kind) in enumerate(zip(self.activations, fmt.layers, strict=True)):
            key_memory, value_memory = layer_memory(layout, index, self.num_seqs, self.context)
            costs.append(
                LayerCost(
                    layer=index,
                    key=StreamCost(kind.key.kind, own[index].key, outlier(exact.key), key_memory),
                    value=StreamCost(kind.value.kind, own[index].value, outlier(exact.value), value_memory),
                    output_error=own[index].output,
                    propagated_error=propagated[index],
                )
            )
        return tuple(costs)
