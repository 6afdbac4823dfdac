"""KV formats: what the user's options mean for a model. Integers only; `codecs.py` does the arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from kvtool.config import Axis, Bits, KVOptions
from kvtool.errors import ConfigError, UnsupportedError
from kvtool.kv.plan import BIT_OPTIONS, BITS, completed, load_plan
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.visibility import Position, visible

GROUP_SIZES = (32, 64, 128)
INTEGERS = ("8", "4", "2")
BLOCK_SIZE, SMALL_BLOCK_SIZE = 64, 32
TWO_BIT_RESIDUAL = 32  # a model leans on its newest tokens; 2 bits without it lose more than twice as much
KEY_AXIS: Axis = "channel"  # keys have a few channels of huge outliers, values have not
VALUE_AXIS: Axis = "token"


@dataclass(frozen=True)
class StreamFormat:
    """How one stream of one layer is stored.

    Attributes:
        bits: "16" is the model's dtype as it is; "fp8" is e4m3 with one scale per token and head.
        axis: "token": a scale serves `group` neighbours along head_dim; "channel": it serves one channel of a block.
        group: elements to a scale; 0 at 16 bits.
        symmetric: no zero point; 2 bits are then ternary.
        rotate: stored after a Hadamard rotation along head_dim.
    """

    bits: Bits = "16"
    axis: Axis = "token"
    group: int = 0
    symmetric: bool = True
    rotate: bool = False

    @property
    def kind(self) -> str:
        """What is stored, for people."""
        if self.bits == "16":
            return "at the model's precision"
        return "fp8 e4m3 per token and head" if self.bits == "fp8" else f"{self.bits} bits per {self.axis}"

    @property
    def grouping(self) -> str:
        """How scales are shared, for people."""
        if self.bits in ("16", "fp8"):
            return ""
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f", {symmetry} in groups of {self.group}" + (", rotated" if self.rotate else "")


@dataclass(frozen=True)
class LayerFormat:
    key: StreamFormat
    value: StreamFormat


@dataclass(frozen=True)
class KVFormat:
    """How a model's whole cache is stored.

    Attributes:
        layers: one format per layer.
        block_size: tokens per packed block, B.
        residual: tokens kept at full precision behind every query, a multiple of B.
        keeps_tail: none of these layers needs one, but others of the same model do.
    """

    layers: tuple[LayerFormat, ...]
    block_size: int
    residual: int
    keeps_tail: bool = False

    def of_layers(self, layers: range) -> "KVFormat":
        """Of some of the layers, in the same blocks and tails."""
        if len(layers) == len(self.layers):
            return self
        return replace(self, layers=self.layers[layers.start : layers.stop], keeps_tail=not self.packs_on_write)

    @cached_property
    def packs_on_write(self) -> bool:
        """Every token can be stored for good when it is written: no scale spans tokens and no window is kept."""
        streams = (stream for layer in self.layers for stream in (layer.key, layer.value))
        return self.residual == 0 and not self.keeps_tail and all(stream.axis == "token" for stream in streams)

    @property
    def is_exact(self) -> bool:
        """Everything is stored at the model's precision."""
        return all(stream.bits == "16" for layer in self.layers for stream in (layer.key, layer.value))

    @property
    def tail_tokens(self) -> int:
        """Tokens that a sequence's private tail holds; its position p stands in row p mod tail_tokens."""
        return 0 if self.packs_on_write else self.residual + self.block_size

    def visible(self, position: Position) -> Position:
        """First position that a query at `position` reads at full precision; `position + 1` where none is."""
        return position + 1 if self.packs_on_write else visible(position, self.block_size, self.residual)

    def packed_tokens(self, num_tokens: int) -> int:
        """Tokens of a sequence of `num_tokens` that stand in blocks; the rest is its tail."""
        return num_tokens if self.packs_on_write else self.visible(num_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` computed tokens owns or shares."""
        return -(-self.packed_tokens(num_tokens) // self.block_size)

    def tokens_within(self, num_blocks: int) -> int:
        """Most computed tokens of a sequence that needs no more than `num_blocks` blocks."""
        return num_blocks * self.block_size + max(0, self.tail_tokens - 1)

    def describe(self) -> str:
        """One line for people."""
        tail = f"; the newest {self.residual + 1} to {self.tail_tokens} tokens at full precision"
        return self.describe_layers() + ("" if self.packs_on_write else tail)

    def describe_layers(self) -> str:
        """What is stored of each token, for people."""
        if len(set(self.layers)) > 1:
            runs = groupby(f"K{layer.key.bits}V{layer.value.bits}" for layer in self.layers)
            return "by layer: " + " ".join(f"{len(list(same))}×{pair}" for pair, same in runs)
        key, value = self.layers[0].key, self.layers[0].value
        if key == value:
            return f"K and V {key.kind}{key.grouping}"
        if key.grouping == value.grouping:
            return f"K {key.kind}, V {value.kind}{key.grouping}"
        return f"K {key.kind}{key.grouping}; V {value.kind}{value.grouping}"


def resolve(options: KVOptions, spec: KVSpec, block_size: int = BLOCK_SIZE) -> KVFormat:
    """The format that `options` ask for on a model of `spec`.

    Args:
        block_size: tokens of a block where no scale spans them.

    Raises:
        ConfigError: options that contradict each other, or a plan that does not fit the model.
        UnsupportedError: a head_dim that the bits cannot pack.
    """
    options = completed(options)
    bits = _layer_bits(options, spec)
    _check(options, bits)
    axes = options.axis_key or KEY_AXIS, options.axis_value or VALUE_AXIS
    residual = options.residual_length or 0
    if any(axis == "channel" and b in INTEGERS for pair in bits for axis, b in zip(axes, pair, strict=True)):
        if options.residual_length is None and options.q_group_size is None and set(bits) == {_pair("2", spec)}:
            residual = TWO_BIT_RESIDUAL
        # A window that fits in a small block has one: the tail, a window and a block, is then half as long.
        small = 0 < residual <= SMALL_BLOCK_SIZE
        block_size = options.q_group_size or (SMALL_BLOCK_SIZE if small else BLOCK_SIZE)
    layers = tuple(
        LayerFormat(
            _stream_format(options, key_bits, axes[0], block_size, spec.key),
            _stream_format(options, value_bits, axes[1], block_size, spec.value),
        )
        for key_bits, value_bits in bits
    )
    return KVFormat(layers, block_size, -(-residual // block_size) * block_size)


def _layer_bits(options: KVOptions, spec: KVSpec) -> Sequence[tuple[Bits, Bits]]:
    num_layers = spec.num_layers
    if options.layer_bits is not None:
        if len(options.layer_bits) != num_layers:
            raise ConfigError(f"bits for {len(options.layer_bits)} layers do not fit a model of {num_layers}")
        return options.layer_bits
    if options.plan is None:
        key, value = _pair(options.nbits or "16", spec)
        return [(options.nbits_key or key, options.nbits_value or value)] * num_layers
    for name in ("nbits", "nbits_key", "nbits_value"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--kv-plan sets the bits of every layer; leave out --{name.replace('_', '-')}")
    return load_plan(options.plan, num_layers)


def _pair(nbits: Bits, spec: KVSpec) -> tuple[Bits, Bits]:
    """Bits of keys and values that `nbits` stands for: a rope key is a ninth of its latent, and is kept better."""
    return ("8" if spec.latent and nbits in ("4", "2") else nbits), nbits


def _check(options: KVOptions, bits: Sequence[tuple[Bits, Bits]]) -> None:
    """Refuse what could only be a mistake."""
    if options.q_group_size is not None and options.q_group_size not in GROUP_SIZES:
        raise ConfigError(f"--q-group-size {options.q_group_size}: must be one of {', '.join(map(str, GROUP_SIZES))}")
    if options.residual_length is not None and options.residual_length < 0:
        raise ConfigError(f"--residual-length {options.residual_length}: must be 0 or more tokens")
    unknown = {stream for pair in bits for stream in pair} - set(BITS)
    if unknown:
        raise ConfigError(f"--nbits {unknown.pop()!r}: must be one of {', '.join(BITS)}")
    used: set[Bits] = {stream for pair in bits for stream in pair}
    if used == {"16"}:
        given = [name for name, value in vars(options).items() if value and name not in BIT_OPTIONS]
        if given:
            option = given[0].replace("_", "-").replace("symmetric", "sym")
            raise ConfigError(f"--{option} means nothing for a 16-bit cache; add --nbits 8, 4, 2 or fp8")
    for name, axis, index in (("key", options.axis_key, 0), ("value", options.axis_value, 1)):
        if axis == "channel" and "fp8" in {pair[index] for pair in bits}:
            raise ConfigError(f"--axis-{name} channel: fp8 has one scale per token and head; leave the axis out")
    if used <= {"16", "fp8"} and (options.rotate or options.symmetric is not None or options.q_group_size):
        raise ConfigError("--rotate, --sym, --asym and --q-group-size are for 8, 4 and 2 bits; leave them out")
    axes = (("key", options.axis_key or KEY_AXIS, 0), ("value", options.axis_value or VALUE_AXIS, 1))
    for name, axis, index in axes if options.rotate else ():
        if axis == "channel" and {pair[index] for pair in bits} - {"16", "fp8"}:
            raise ConfigError(f"--rotate mixes the channels of a token, so it needs --axis-{name} token")


def _stream_format(options: KVOptions, bits: Bits, axis: Axis, block_size: int, stream: StreamSpec) -> StreamFormat:
    if bits == "16":
        return StreamFormat()
    if bits == "fp8":
        return StreamFormat("fp8", "token", stream.dim, symmetric=True)
    if stream.dim % (8 // int(bits)):
        raise UnsupportedError(f"head_dim {stream.dim} is not a whole number of bytes at {bits} bits; use more --nbits")
    group = block_size if axis == "channel" else _largest_divisor(stream.dim, options.q_group_size or BLOCK_SIZE)
    return StreamFormat(bits, axis, group, bool(options.symmetric), bool(options.rotate))


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
