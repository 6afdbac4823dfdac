"""The bytes of a model's cache by formula: as its config has it, and as it would be with other attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kvtool.config import KVOptions
from kvtool.errors import ConfigError
from kvtool.gpus import asked_gpu
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.models.fields import Fields
from kvtool.models.resolve import resolve_config
from kvtool.sizing.shapes import ModelShape, count_parameters, read_shape, scheme_of

SCHEMES = ("MHA", "GQA-8", "GQA-4", "MQA", "MLA")  # that every model is sized under, where its heads allow it
ELEMENT_SIZE = 2  # bytes, of a model that is served in 16 bits
MOST_TOKENS = 1 << 50


@dataclass(frozen=True)
class Scheme:
    """A way to attend, as a token's two streams in each layer.

    Attributes:
        name: "MHA", "GQA-n", "MQA" or "MLA".
        native: the model's own; else a counterfactual with as many query heads.
        is_latent: all heads read the same latent.
    """

    name: str
    key: StreamSpec
    value: StreamSpec
    native: bool

    @property
    def is_latent(self) -> bool:
        return self.name == "MLA"

    def spec(self, num_layers: int) -> KVSpec:
        """Of a model that is served in 16 bits."""
        return KVSpec(num_layers, self.key, self.value, ELEMENT_SIZE, self.is_latent)

    def on_rank(self, tp: int) -> "Scheme":
        """What one of `tp` GPUs keeps: its share of the key heads, but a whole one at least, and a latent whole."""
        if self.is_latent:
            return self
        heads = max(1, self.key.heads // tp)
        return replace(self, key=StreamSpec(heads, self.key.dim), value=StreamSpec(heads, self.value.dim))


@dataclass(frozen=True)
class Budget:
    """GPUs that a model is to fit on.

    Attributes:
        gpu: a name that `find_gpu` knows; None: `gpu_memory` says how large it is.
        gpu_memory: bytes of one.
        utilization: share of it that may be used.
        weight_bits: of a weight; scales of quantised ones are left out.
        weight_memory: bytes of all weights; None: they are counted.
    """

    gpu: str | None = None
    gpu_memory: int | None = None
    utilization: float = 0.9
    weight_bits: int = 16
    weight_memory: int | None = None

    def room(self, fields: Fields, tp: int) -> "Room":
        """What one of `tp` GPUs has for the cache of the model of this config.

        Raises:
            ConfigError: the GPU is not known.
            ModelError: the weights cannot be counted.
        """
        name, memory = "GPU", self.gpu_memory
        if self.gpu is not None:
            name, gpu = asked_gpu("--gpu", self.gpu)
            memory = self.gpu_memory or gpu.memory_bytes
        assert memory is not None
        weights = self.weight_memory or count_parameters(fields) * self.weight_bits // 8
        return Room(name, int(memory * self.utilization), -(-weights // tp))


@dataclass(frozen=True)
class Room:
    """What one GPU has for a cache. What a step's activations take is not known without running one.

    Attributes:
        gpu: its name.
        memory: bytes of it that may be used.
        weights: bytes of the model's weights on it.
    """

    gpu: str
    memory: int
    weights: int

    @property
    def for_cache(self) -> int:
        return max(0, self.memory - self.weights)


def schemes_of(shape: ModelShape, asked: Sequence[str] | None = None) -> list[Scheme]:
    """The model's own scheme and its counterfactuals, most key heads first and latents last.

    A counterfactual keeps the query heads and the sizes of a head. As MLA, DeepSeek-V2 (arXiv 2405.04434, 2.1.4) is
    followed: a latent of 4 heads' elements and half a head's for the rope key.

    Args:
        asked: names of schemes; None: `SCHEMES`, less what the model's heads cannot be grouped into.

    Raises:
        ConfigError: a name that is none, or a number of groups that does not divide the query heads.
    """
    native = Scheme(shape.scheme, shape.key, shape.value, native=True)
    found = {shape.scheme: native}
    for name in SCHEMES if asked is None else asked:
        heads = key_heads(name, shape.num_heads)
        if heads is None:
            latent = StreamSpec(1, shape.head_dim // 2), StreamSpec(1, 4 * shape.head_dim)
            found.setdefault("MLA", Scheme("MLA", *latent, native=False))
        elif shape.num_heads % heads == 0:
            streams = StreamSpec(heads, shape.head_dim), StreamSpec(heads, shape.value_dim)
            name = scheme_of(shape.num_heads, heads)
            found.setdefault(name, Scheme(name, *streams, native=False))
        elif asked is not None:
            raise ConfigError(
                f"--schemes {name}: {shape.name} has {shape.num_heads} query heads, no multiple of {heads}"
            )
    return sorted(found.values(), key=lambda scheme: (scheme.is_latent, -scheme.key.heads))


def key_heads(name: str, num_heads: int) -> int | None:
    """Key heads of a scheme by its name; None of a latent."""
    words = {"MHA": num_heads, "MQA": 1, "MLA": None}
    if name in words:
        return words[name]
    groups = name.removeprefix("GQA-")
    if groups == name or not groups.isdecimal() or not 0 < int(groups) < 2**31:
        raise ConfigError(f"--schemes {name}: must be of MHA, GQA-n, MQA, MLA, as in GQA-8")
    return int(groups)


def kv_format(options: KVOptions, scheme: Scheme, num_layers: int) -> KVFormat:
    """What `options` mean for a scheme."""
    return resolve(options, scheme.spec(num_layers))


def describe(scheme: Scheme, fmt: KVFormat) -> str:
    """A format in one line, with its K and V as the scheme has them."""
    return fmt.describe() + (" (K: the rope key, V: the latent)" if scheme.is_latent else "")


@dataclass(frozen=True)
class CacheSize:
    """The bytes of a cache of which a layer may read no more than its newest tokens.

    Attributes:
        groups: layers that read equally far, as a layout of their own, and how far; None: everything.
        state_bytes: of a sequence, whatever its length.
    """

    groups: tuple[tuple[KVLayout, int | None], ...]
    state_bytes: int

    @classmethod
    def of(cls, scheme: Scheme, fmt: KVFormat, windows: Sequence[int | None], state_bytes: int) -> "CacheSize":
        """Args: fmt: of all layers that keep tokens; windows: of each of them."""
        groups = []
        for window in dict.fromkeys(windows):
            layers = tuple(layer for layer, of_it in zip(fmt.layers, windows, strict=True) if of_it == window)
            groups.append((KVLayout(scheme.spec(len(layers)), KVFormat(layers, fmt.block_size, fmt.residual)), window))
        return cls(tuple(groups), state_bytes)

    @property
    def bytes_per_token(self) -> Fraction:
        """Of a packed token in all layers, as long as it is in every window."""
        return sum((Fraction(layout.block_bytes, layout.format.block_size) for layout, _ in self.groups), Fraction(0))

    @property
    def parts(self) -> dict[str, Fraction]:
        """What that is made of, by the names of a layout's fields; the rest is padding."""
        parts = dict.fromkeys(("codes", "scale", "zero"), Fraction(0))
        for layout, _ in self.groups:
            for layer in range(layout.spec.num_layers):
                for field in (field for stream in layout.fields(layer) for field in stream):
                    parts[field.name] += Fraction(field.nbytes, layout.format.block_size)
        return parts

    @property
    def tail_bytes(self) -> int:
        """Of one sequence's newest tokens at full precision."""
        return sum(layout.tail_bytes for layout, _ in self.groups)

    def bytes_for(self, length: int) -> int:
        """Of a sequence of `length` tokens. Blocks that no later token reads are given back."""
        return self.state_bytes + sum(
            layout.bytes_for([length]) - self._left_behind(layout, window, length) for layout, window in self.groups
        )

    def tokens_within(self, nbytes: int) -> int:
        """Tokens of the longest sequence that fits in so many bytes."""
        if self.bytes_for(1) > nbytes:
            return 0
        fits, too_long = 1, 2
        while too_long < MOST_TOKENS and self.bytes_for(too_long) <= nbytes:
            fits, too_long = too_long, 2 * too_long
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (middle, too_long) if self.bytes_for(middle) <= nbytes else (fits, middle)
        return fits

    @staticmethod
    def _left_behind(layout: KVLayout, window: int | None, length: int) -> int:
        """Bytes of the blocks before all that the token at position `length` reads."""
        if window is None:
            return 0
        passed = max(0, length + 1 - window) // layout.format.block_size
        return min(passed, layout.format.num_blocks(length)) * layout.block_bytes


@dataclass(frozen=True)
class ContextSize:
    """Sequences of `context` tokens: bytes of one, over all GPUs and on each, and how many a GPU's room holds."""

    context: int
    nbytes: int
    bytes_per_gpu: int
    largest_batch: int | None


@dataclass(frozen=True)
class SchemeSize:
    """The cache of one model under one scheme.

    Attributes:
        bytes_per_token_per_layer: of a packed token, scales, zeros and padding included, in a layer that keeps tokens.
        bytes_per_token: in all such layers.
        vs_mha: how many more bytes a token takes than with a key head for each query head; -0.75 is a quarter of them.
        bits_per_element: of `bytes_per_token`.
        codes, scales, zeros, padding: what `bytes_per_token` is the sum of.
        tail_bytes: of one sequence's newest tokens at full precision.
        state_bytes: of one sequence in layers that keep a state instead of tokens.
        num_layers, windowed_layers: that keep tokens, and of them those that keep only their newest.
        bytes_per_token_per_gpu: with the heads shared by `tp` GPUs.
        copies: how often each byte is kept among all GPUs, on average; a latent as often as there are GPUs.
        tokens_that_fit: of one sequence in a GPU's room; None: no GPU was named.
    """

    model: str
    scheme: str
    native: bool
    bytes_per_token_per_layer: float
    bytes_per_token: float
    vs_mha: float
    bits_per_element: float
    format: str
    codes: float
    scales: float
    zeros: float
    padding: float
    tail_bytes: int
    state_bytes: int
    num_layers: int
    windowed_layers: int
    tp: int
    bytes_per_token_per_gpu: float
    copies: float
    contexts: tuple[ContextSize, ...]
    tokens_that_fit: int | None


@dataclass(frozen=True)
class ModelSizes:
    """The caches of one model.

    Attributes:
        room: of each GPU; None: none was named.
        schemes: most key heads first, latents last.
    """

    shape: ModelShape
    room: Room | None
    schemes: tuple[SchemeSize, ...]


def model_sizes(
    name: str,
    options: KVOptions,
    contexts: Sequence[int],
    *,
    schemes: Sequence[str] | None = None,
    tp: int = 1,
    budget: Budget | None = None,
) -> ModelSizes:
    """The cache of a model under its own scheme and others.

    Args:
        name: as `resolve_config` takes it.
        contexts: lengths of sequences that bytes are told for.
        schemes: names of counterfactuals; None: `SCHEMES`.
        tp: GPUs that share heads and weights.
        budget: GPUs that it is to fit on; None: nothing is told of what fits.

    Raises:
        ModelError: there is no such model, or its config does not say what its layers keep.
        ConfigError: options that do not go with the model, or heads that `tp` GPUs cannot share.
    """
    fields = resolve_config(name)
    shape = read_shape(name, fields)
    if shape.num_heads % tp:
        raise ConfigError(f"--tp {tp}: {shape.name} has {shape.num_heads} query heads, which so many GPUs cannot share")
    room = budget.room(fields, tp) if budget else None
    (mha,) = (scheme for scheme in schemes_of(shape, ["MHA"]) if scheme.name == "MHA")
    most = cache_size(shape, mha, options).bytes_per_token
    sizes = [_scheme_size(shape, scheme, options, contexts, tp, room, most) for scheme in schemes_of(shape, schemes)]
    return ModelSizes(shape, room, tuple(sizes))


def cache_size(shape: ModelShape, scheme: Scheme, options: KVOptions) -> CacheSize:
    """All layers of `shape` that keep tokens, as `scheme`."""
    fmt = kv_format(options, scheme, len(shape.windows))
    return CacheSize.of(scheme, fmt, shape.windows, shape.state_bytes)


def _scheme_size(
    shape: ModelShape,
    scheme: Scheme,
    options: KVOptions,
    contexts: Sequence[int],
    tp: int,
    room: Room | None,
    mha_bytes: Fraction,
) -> SchemeSize:
    heads, num_layers = scheme.key.heads, len(shape.windows)
    if not scheme.is_latent and heads % tp and tp % heads:
        raise ConfigError(f"--tp {tp}: neither divides the {heads} key heads of {shape.name} nor is a multiple of them")
    size = cache_size(shape, scheme, options)
    rank = cache_size(replace(shape, state_bytes=-(-shape.state_bytes // tp)), scheme.on_rank(tp), options)
    per_token, parts = size.bytes_per_token, size.parts
    return SchemeSize(
        model=shape.name,
        scheme=scheme.name,
        native=scheme.native,
        bytes_per_token_per_layer=number(per_token / num_layers),
        bytes_per_token=number(per_token),
        vs_mha=float(per_token / mha_bytes - 1),
        bits_per_element=number(8 * per_token / (num_layers * (scheme.key.elements + scheme.value.elements))),
        format=describe(scheme, kv_format(options, scheme, num_layers)),
        codes=number(parts["codes"]),
        scales=number(parts["scale"]),
        zeros=number(parts["zero"]),
        padding=number(per_token - sum(parts.values())),
        tail_bytes=size.tail_bytes,
        state_bytes=size.state_bytes,
        num_layers=num_layers,
        windowed_layers=sum(window is not None for window in shape.windows),
        tp=tp,
        bytes_per_token_per_gpu=number(rank.bytes_per_token),
        copies=number(tp * rank.bytes_per_token / per_token),
        contexts=tuple(_context_size(size, rank, context, room) for context in contexts),
        tokens_that_fit=rank.tokens_within(room.for_cache) if room else None,
    )


def _context_size(size: CacheSize, rank: CacheSize, context: int, room: Room | None) -> ContextSize:
    on_gpu = rank.bytes_for(context)
    return ContextSize(context, size.bytes_for(context), on_gpu, room.for_cache // on_gpu if room else None)


def number(value: Fraction) -> float:
    """An int where it is whole."""
    return value.numerator if value.denominator == 1 else float(value)
