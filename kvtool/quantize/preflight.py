"""The guard: would the asked format ruin this model's attention? Told from calibration text before a cache is laid out.

A few key channels of some models hold huge outliers. Qwen2.5-7B with 4-bit per-token keys answers 0.8 % of GSM8K
instead of 77.6 %, and nothing before the answers says so. Attention of each layer, computed once exactly and once
through the format, does.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec
import torch
from torch import Tensor

from kvtool.config import Bits, EngineConfig, KVOptions
from kvtool.device import choose_device
from kvtool.errors import CapacityError, UnsupportedError
from kvtool.kv.format import KVFormat, StreamFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.plan import completed, sidecar_of
from kvtool.kv.spec import KVSpec
from kvtool.layers.mla import MLA
from kvtool.models import Decoder, resolve_model
from kvtool.models.decoder import Attention
from kvtool.models.resolve import EMBEDDED, fingerprint
from kvtool.quantize.layer_errors import LayerActivations, attend_packed, calibrate, outlier, relative_error
from kvtool.scoring import ScoringModel
from kvtool.tokenizer import Tokenizer

# Of what attention adds to the residual stream, its mean aside. On tiny's twins 0.2 stands for 2 % of perplexity, 0.3
# for 4 %, 0.6 for 28 % and 1.4 for 220 % (scripts/choose_recipes.py).
LIMIT = 0.3
OUTLIER = 8.0  # a channel this many times the median one explains a collapse; without outliers it is 2 to 4
UNHELD = 1e9  # the error of a format whose fp16 scales cannot hold the numbers
TOKENS = 1024  # of calibration text
EDITION = 2  # of verdicts: another one when what is stored, or what options mean, changes
WIDTHS: dict[Bits, int] = {"2": 2, "4": 4, "8": 8, "fp8": 8, "16": 16}


@dataclass(frozen=True)
class Collapse:
    """A layer that the asked format ruins.

    Attributes:
        error: of what its attention adds to the residual stream; at 1 as large as that itself, its mean aside.
        cause: which stream does it, "keys" or "values".
        outlier: the largest channel of that stream over the median one, in the same head.
    """

    layer: int
    error: float
    cause: str
    outlier: float


@dataclass(frozen=True)
class Verdict:
    """What a preflight has found.

    Attributes:
        asked: the format, in words.
        worst: the largest error of any layer under it.
        collapses: layers whose error is above `LIMIT`.
        survivor: the cheapest options under which no layer's is; as asked where there is nothing to save.
        survivor_format, survivor_bits: in words, and in honest bits per element.
        kv: what to run: the survivor where nothing but `nbits` was asked for, else as asked.
    """

    asked: str
    worst: float
    collapses: tuple[Collapse, ...]
    survivor: KVOptions
    survivor_format: str
    survivor_bits: float
    kv: KVOptions

    def lines(self) -> Iterator[str]:
        """For people."""
        if not self.collapses:
            yield f"preflight: {self.asked}: attention is off by {self.worst:.1%} at most"
            return
        layers = as_ranges([collapse.layer for collapse in self.collapses])
        worst = max(self.collapses, key=lambda collapse: collapse.error)
        what = "beyond fp16" if worst.error == UNHELD else f"off by {worst.error:.0%}"
        why = f"attention is {what} in layer {worst.layer}, through its {worst.cause}"
        if worst.outlier > OUTLIER:
            why += f", whose largest channel is {worst.outlier:,.0f} times the median one"
        survives = f"{self.survivor_format} ({self.survivor_bits:.4g} bits an element)"
        if self.kv == self.survivor:
            yield f"preflight: {self.asked} would collapse in layers {layers}: {why}"
            yield f"preflight: runs {survives} instead"
        else:
            yield f"warning: {self.asked} collapse in layers {layers}: {why}"
            yield f"warning: runs all the same, as asked; what would hold: {survives}"


def preflight(config: EngineConfig) -> EngineConfig:
    """`config` with KV options that the model survives; on stderr, why.

    Where nothing but `nbits` was asked for, options that would collapse are replaced by the cheapest that hold; all
    others are obeyed, with a warning. Verdicts are kept in `$XDG_CACHE_HOME/kvtool/preflight`, so that a model is
    loaded for this once. Nothing happens at 16 bits and to dummy weights.

    Raises:
        KVToolError: the model cannot be loaded, or the options do not fit it.
    """
    kv = config.kv
    if config.load_format == "dummy" or not (kv.plan or {kv.nbits, kv.nbits_key, kv.nbits_value} - {None, "16"}):
        return config
    file = _file_of(config)
    verdict = _read(file)
    if verdict is None:
        try:
            verdict = _examine_folder(config)
        except (CapacityError, torch.OutOfMemoryError):
            if config.num_ranks == 1:
                raise
            print("warning: no preflight: the model is too large for one device", file=sys.stderr, flush=True)
            return config
        _write(file, verdict)
    for line in verdict.lines():
        print(line, file=sys.stderr, flush=True)
    return replace(config, kv=verdict.kv)


def examine(model: Decoder, windows: Tensor, spec: KVSpec, kv: KVOptions) -> Verdict:
    """Try `kv` on a model.

    Args:
        windows: [W, T] int64, token ids of calibration text.
        spec: of the model's cache.

    Raises:
        ConfigError, UnsupportedError: options that do not fit the model, or keys and values that are not finite.
    """
    fmt = resolve(kv, spec)
    probes = [_Probe.of(model, exact, index) for index, exact in enumerate(calibrate(model, windows))]
    errors = _errors(probes, fmt)
    survivor, layout = kv, KVLayout(spec, fmt)
    if max(errors) > LIMIT:
        found = [_with_more_bits(candidate, probes, spec) for candidate in _candidates(kv, fmt)]
        layouts = [KVLayout(spec, resolve(options, spec)) for options in found]
        lengths = [model.config.max_position]
        survivor, layout = min(zip(found, layouts, strict=True), key=lambda pair: pair[1].bytes_for(lengths))
    return Verdict(
        asked=fmt.describe_layers(),
        worst=max(errors),
        collapses=tuple(
            _explain(probes[layer], fmt, layer, error) for layer, error in enumerate(errors) if error > LIMIT
        ),
        survivor=survivor,
        survivor_format=layout.format.describe_layers(),
        survivor_bits=layout.bits_per_element,
        kv=survivor if kv == KVOptions(nbits=kv.nbits) else kv,
    )


@dataclass(frozen=True)
class _Probe:
    """One layer on calibration text.

    Attributes:
        attention: whose output it is.
        mean: [Hq, D], the output's, which biases can make as large as they please.
        change: what attention adds to the residual stream beside its mean, [W, T, hidden_size].
    """

    exact: LayerActivations
    attention: Attention | MLA
    mean: Tensor
    change: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Decoder, exact: LayerActivations, index: int) -> "_Probe":
        attention, mean = model.get_submodule(f"layers.{index}.self_attn"), exact.output.mean(dim=(0, 1))
        assert isinstance(attention, Attention | MLA)
        return cls(exact, attention, mean, attention.project(exact.output - mean))

    @torch.inference_mode()
    def error(self, fmt: KVFormat, key: StreamFormat, value: StreamFormat) -> float:
        """How far `change` is off where keys and values of these formats are read from blocks; `UNHELD` if they cannot
        be stored."""
        exact = self.exact
        try:
            output = attend_packed(exact.query, exact.key, exact.value, key, value, fmt, exact.layer)
        except UnsupportedError:
            return UNHELD
        return relative_error(self.attention.project(output - self.mean), self.change)


def _errors(probes: Sequence[_Probe], fmt: KVFormat) -> list[float]:
    return [probe.error(fmt, kind.key, kind.value) for probe, kind in zip(probes, fmt.layers, strict=True)]


def _explain(probe: _Probe, fmt: KVFormat, layer: int, error: float) -> Collapse:
    kind, plain = fmt.layers[layer], StreamFormat()
    by_keys = probe.error(fmt, kind.key, plain) >= probe.error(fmt, plain, kind.value)
    ratio = outlier(probe.exact.key if by_keys else probe.exact.value).ratio
    return Collapse(layer, error, "keys" if by_keys else "values", ratio)


def _candidates(kv: KVOptions, fmt: KVFormat) -> list[KVOptions]:
    """What to add bits to: the options as asked and, if that means another, with a scale for each key channel."""
    keys = [layer.key for layer in fmt.layers]
    if any(key.bits == "fp8" for key in keys) or all(key.axis == "channel" or key.bits == "16" for key in keys):
        return [kv]
    return [kv, replace(kv, axis_key="channel", rotate=None)]


def _with_more_bits(kv: KVOptions, probes: Sequence[_Probe], spec: KVSpec) -> KVOptions:
    """`kv` with as many more bits in each layer as it takes."""
    bits = [(layer.key.bits, layer.value.bits) for layer in resolve(kv, spec).layers]
    more = [_more(*pair) for pair in bits]
    options = kv
    while max(errors := _errors(probes, resolve(options, spec))) > LIMIT:
        for layer in [layer for layer, error in enumerate(errors) if error > LIMIT]:
            bits[layer] = next(more[layer])
        if set(bits) == {("16", "16")}:
            return KVOptions()
        options = replace(completed(kv), plan=None, layer_bits=tuple(bits))
    return options


def _more(key: Bits, value: Bits) -> Iterator[tuple[Bits, Bits]]:
    """Pairs of more bits for a layer, the cheapest first, up to (16, 16), which holds for certain."""
    keys, values = ([bits for bits in WIDTHS if bits == asked or _widens(asked, bits)] for asked in (key, value))
    pairs = sorted(product(keys, values), key=lambda pair: WIDTHS[pair[0]] + WIDTHS[pair[1]])
    return iter(pairs[1:])


def _widens(asked: Bits, bits: Bits) -> bool:
    return WIDTHS[bits] > WIDTHS[asked] and bits != "fp8"


def as_ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` of [0, 1, 2, 5]."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def calibration_windows(tokenizer: Tokenizer, most: int, device: torch.device) -> Tensor:
    """[1, T] int64: the beginning of a novel, no more than `most` tokens of it."""
    ids = tokenizer.encode((EMBEDDED["tiny"] / "sample.txt").read_text("utf-8"))
    return torch.tensor([ids[:most]], device=device)


def _examine_folder(config: EngineConfig) -> Verdict:
    # On one device, and the text may be longer than what will be served.
    alone = replace(config, tp=1, ep=1, pp=1, nnodes=1, max_model_len=None, profile=None)
    model = ScoringModel(alone)
    tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
    windows = calibration_windows(tokenizer, min(TOKENS, model.model_config.max_position), model.device)
    verdict = examine(model.model, windows, model.layout(KVOptions()).spec, config.kv)
    if model.device.type == "cuda":
        del model
        torch.cuda.empty_cache()  # the engine measures what is free
    return verdict


def _file_of(config: EngineConfig) -> Path:
    """Where the verdict on these weights and options, as computed on this kind of device, is kept."""
    plans = [Path(config.kv.plan), sidecar_of(Path(config.kv.plan))] if config.kv.plan else []
    identity = [
        EDITION,
        LIMIT,
        fingerprint(resolve_model(config.model)),
        asdict(config.kv),
        [config.quantization, config.quantize_head, config.keep_layers, config.calibration],
        config.dtype,
        choose_device(config.device).type,
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in plans if file.is_file()],
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kvtool" / "preflight" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.json"


def _read(file: Path) -> Verdict | None:
    """A stored verdict; None where there is none that can be read."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None


def _write(file: Path, verdict: Verdict) -> None:
    """Whole or not at all, whoever else writes it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, delete=False) as stream:
            stream.write(msgspec.json.encode(verdict))
        Path(stream.name).replace(file)
    except OSError as error:
        print(f"warning: {file.parent}: {error.strerror}; the next start checks again", file=sys.stderr, flush=True)
