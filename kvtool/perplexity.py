"""Perplexity and KL divergence of KV formats over the windows of a protocol."""

import hashlib
import json
import math
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.config import Bits, KVOptions
from kvtool.errors import ConfigError
from kvtool.kv.format import KVFormat
from kvtool.kv.layout import KVLayout
from kvtool.kv.plan import BITS
from kvtool.models.kv import kv_spec
from kvtool.models.weights import STORED_DTYPES
from kvtool.protocols import Task
from kvtool.scoring import SIXTEEN_BITS, ScoringModel

DEFAULT_FORMATS = "16,8,4,2"


def parse_formats(text: str | None, base: KVOptions) -> dict[str, KVOptions]:
    """Formats by the words of a list such as "16,8,4,2,fp8,k8v4,plan:FILE", in its order.

    Args:
        text: None is 16 bits and what `base` asks for; if that is nothing, 16, 8, 4 and 2 bits.
        base: the options that all of them share; what means nothing for a word is left out of it.

    Raises:
        ConfigError: a word that names no bits, one that comes twice, or bits in `base` as well as in `text`.
    """
    asked = _word(base)
    if text is None and asked is not None:
        return {"16": SIXTEEN_BITS} if asked == "16" else {"16": SIXTEEN_BITS, asked: base}
    if asked is not None:
        raise ConfigError("--formats names the bits of every format; leave out --nbits and --kv-plan")
    words = [word.strip() for word in (text if text is not None else DEFAULT_FORMATS).split(",")]
    formats = {word: _format(word, base) for word in words}
    if len(formats) < len(words):
        raise ConfigError(f"--formats {text}: names a format twice")
    return formats


def _word(kv: KVOptions) -> str | None:
    """The word for the bits of `kv`; None where it asks for none."""
    if kv.plan:
        return f"plan:{kv.plan}"
    if not (kv.nbits or kv.nbits_key or kv.nbits_value):
        return None
    key, value = (bits or kv.nbits or "16" for bits in (kv.nbits_key, kv.nbits_value))
    return key if key == value else f"k{key}v{value}"


def _format(word: str, base: KVOptions) -> KVOptions:
    if word.startswith("plan:"):
        return replace(base, plan=word.removeprefix("plan:"))
    pair = re.fullmatch("k(.+)v(.+)", word, re.IGNORECASE)
    key, value = pair.groups() if pair else (word, word)
    if key not in BITS or value not in BITS:
        raise ConfigError(f"--formats {word!r:.40}: write {', '.join(BITS)}, a pair such as k8v4, or plan:FILE")
    kv = replace(
        base,
        nbits_key=cast(Bits, key),
        nbits_value=cast(Bits, value),
        axis_key=None if key == "fp8" else base.axis_key,
        axis_value=None if value == "fp8" else base.axis_value,
    )
    if {key, value} == {"16"}:
        return SIXTEEN_BITS
    return kv if {key, value} - {"16", "fp8"} else replace(kv, rotate=None, symmetric=None, q_group_size=None)


@dataclass(frozen=True)
class ScoredFormat:
    """A KV format: the name that it was asked for by, what that means, and the bits of each layer."""

    name: str
    description: str
    nbits_key: tuple[Bits, ...]
    nbits_value: tuple[Bits, ...]


@dataclass(frozen=True)
class FormatScore:
    """What one KV format does to a model's predictions. The fields, in this order, are a row of the command's JSON.

    Attributes:
        perplexity: by the protocol; `_error` everywhere: the standard error of the figure before it.
        tokens: that are scored.
        kld_mean: Kullback-Leibler divergence from the 16-bit cache's next-token distribution, in nats.
        top1_agreement: share of places where the likeliest token is the same as at 16 bits.
        bits_per_element: codes, scales, zeros and padding of a packed element, of a model that is served in 16 bits.
        bytes_per_token: the same over all layers.
        tail_bytes: of the newest tokens at full precision, for each running sequence.
        perplexity_change: relative to 16 bits, its error from differences token by token.
        kld_median, kld_p90, kld_p99, kld_p999, kld_max: of the distribution of divergences over tokens.
        word_perplexity, byte_perplexity, bits_per_byte: of the original text, where all of it is scored.
        seconds: that the scoring took.
    """

    format: ScoredFormat
    perplexity: float
    tokens: int
    kld_mean: float
    top1_agreement: float
    bits_per_element: float
    bytes_per_token: float
    tail_bytes: int
    perplexity_error: float
    perplexity_change: float
    perplexity_change_error: float
    kld_error: float
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1_error: float
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None
    seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while scoring.

    Attributes:
        scores: as `score_formats` returns them, of the places that all formats had done by then.
    """

    def __init__(self, scores: list[FormatScore]) -> None:
        super().__init__()
        self.scores = scores


def score_formats(
    model: ScoringModel,
    task: Task,
    formats: Mapping[str, KVOptions],
    *,
    reference: ScoringModel | None = None,
    baseline: Path | None = None,
    save_baseline: Path | None = None,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[FormatScore]:
    """Score `task` under each of `formats`, and compare with a 16-bit cache place by place.

    All formats and the baseline advance together, a few places at a time; of each place a few numbers are kept.

    Args:
        formats: by name; what it returns is in their order.
        reference: the model, with other weights, that has that cache; None: `model`.
        baseline, save_baseline: a file of that model's final hidden states, from which its log-probabilities
            follow exactly: to read instead of running it, or to write.
        on_progress: called with the places that are done and all.

    Raises:
        ConfigError: a format that does not fit the model, or a baseline of another model, text or protocol.
        UnsupportedError: a format that cannot hold what the model makes of the text.
        Interrupted: by Ctrl-C, with the figures so far, if there are any.
    """
    kv_formats = {name: model.layout(kv).format for name, kv in formats.items()}
    compared = {name: kv for name, kv in formats.items() if reference or kv != SIXTEEN_BITS}
    sources = {name: model.log_probs(task.windows, kv) for name, kv in compared.items()}
    judge = reference or model
    hidden = read_baseline(baseline, judge, task) if baseline else judge.hidden_states(task.windows, SIXTEEN_BITS)
    if save_baseline:
        hidden = write_baseline(save_baseline, judge, task, hidden)
    right = (
        piece for window, rows in zip(task.windows, hidden, strict=True) for piece in judge.log_probs_of(window, rows)
    )
    exact, tallies = _Tally(task.num_tokens), {name: _Tally(task.num_tokens) for name in sources}

    def scores(num_tokens: int) -> list[FormatScore]:
        return [
            _score(name, kv_formats[name], model, task, tallies.get(name, exact), exact, num_tokens) for name in formats
        ]

    try:
        while (expected := exact.take(right)) is not None:
            for name, source in sources.items():
                tallies[name].take(source, expected)
            on_progress(exact.num_tokens, task.num_tokens)
    except KeyboardInterrupt as interrupt:
        done = min(tally.num_tokens for tally in (exact, *tallies.values()))
        raise (Interrupted(scores(done)) if done else interrupt) from None
    return scores(task.num_tokens)


class _Tally:
    """What is kept of each scored place, [num_tokens] float64 each, allocated once: many small pieces, each above
    freed rows of log-probabilities, would keep the allocator from using these again.

    Attributes:
        nll: negative log-likelihood of the token.
        kld: divergence from what is expected.
        same_top: 1 where the likeliest token is the expected one.
        num_tokens: places that are done.
        seconds: that drawing and comparing took.
    """

    def __init__(self, num_tokens: int) -> None:
        self.nll, self.kld, self.same_top = torch.empty(3, num_tokens, dtype=torch.float64)
        self.num_tokens, self.seconds = 0, 0.0

    def take(self, source: Iterator[tuple[Tensor, Tensor]], expected: Tensor | None = None) -> Tensor | None:
        """Draw the next rows of log-probabilities and compare them with `expected` ones; None where there are none."""
        began = time.perf_counter()
        piece = next(source, None)
        if piece is None:
            return None
        found, ids = piece
        expected = found if expected is None else expected
        new = slice(self.num_tokens, self.num_tokens + len(ids))
        self.nll[new] = -found.gather(1, ids[:, None])[:, 0]
        self.kld[new] = (expected.exp() * (expected - found)).sum(-1)
        self.same_top[new] = expected.argmax(-1) == found.argmax(-1)
        self.num_tokens = new.stop
        self.seconds += time.perf_counter() - began  # copying has waited for what a GPU computes
        return found


def _score(
    name: str, fmt: KVFormat, model: ScoringModel, task: Task, tally: _Tally, exact: _Tally, num_tokens: int
) -> FormatScore:
    """The figures of the first `num_tokens` places."""
    nll, exact_nll, kld, same_top = (x[:num_tokens] for x in (tally.nll, exact.nll, tally.kld, tally.same_top))
    counts = torch.tensor([len(window.targets) for window in task.windows])
    weights = torch.tensor(task.weights, dtype=torch.float64).repeat_interleave(counts)[:num_tokens]
    perplexity = _exp((weights * nll).sum() / weights.sum())
    ratio = _exp((weights * (nll - exact_nll)).sum() / weights.sum())
    median, p90, p99, p999 = np.quantile(kld.numpy(), (0.5, 0.9, 0.99, 0.999)).tolist()
    num_words, num_bytes = (task.num_words, task.num_bytes) if num_tokens == task.num_tokens else (None, None)
    layout = KVLayout(kv_spec(model.model_config, torch.bfloat16), fmt)
    return FormatScore(
        format=ScoredFormat(
            name,
            fmt.describe(),
            tuple(layer.key.bits for layer in fmt.layers),
            tuple(layer.value.bits for layer in fmt.layers),
        ),
        perplexity=perplexity,
        tokens=num_tokens,
        kld_mean=kld.mean().item(),
        top1_agreement=same_top.mean().item(),
        bits_per_element=layout.bits_per_element,
        bytes_per_token=layout.block_bytes / fmt.block_size,
        tail_bytes=layout.tail_bytes,
        perplexity_error=perplexity * _error(nll),
        perplexity_change=ratio - 1,
        perplexity_change_error=ratio * _error(nll - exact_nll),
        kld_error=_error(kld),
        kld_median=median,
        kld_p90=p90,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=kld.max().item(),
        top1_error=_error(same_top),
        word_perplexity=_exp(nll.sum() / num_words) if num_words else None,
        byte_perplexity=_exp(nll.sum() / num_bytes) if num_bytes else None,
        bits_per_byte=nll.sum().item() / num_bytes / math.log(2) if num_bytes else None,
        seconds=tally.seconds,
    )


def _exp(x: Tensor) -> float:
    return x.exp().item()  # infinity where `math.exp` raises


def _error(values: Tensor) -> float:
    """Standard error of the mean of `values`."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def write_baseline(path: Path, model: ScoringModel, task: Task, hidden: Iterator[Tensor]) -> Iterator[Tensor]:
    """Hand on final hidden states, and write them to a safetensors file on their way; whole or not at all."""
    shape, dtype = _baseline_form(model, task)
    tensor = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [0, math.prod(shape) * model.dtype.itemsize],
    }
    header = json.dumps({"__metadata__": _identity(model, task), "hidden_states": tensor}).encode()
    header += b" " * (-len(header) % 8)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for rows in hidden:
                file.write(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())
                yield rows
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--save-baseline {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def read_baseline(path: Path, model: ScoringModel, task: Task) -> Iterator[Tensor]:
    """What `write_baseline` has written, window by window.

    Raises:
        ConfigError: no such file, one of another model, dtype or task, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            found, tensor = file.metadata() or {}, file.get_slice("hidden_states")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--baseline {path}: no file of --save-baseline ({error})") from error
    for name, value in _identity(model, task).items():
        if found.get(name) != value:
            raise ConfigError(f"--baseline {path}: made with another {name}; make one with --save-baseline")
    shape, dtype = _baseline_form(model, task)
    if (tensor.get_shape(), tensor.get_dtype()) != (shape, dtype):
        raise ConfigError(f"--baseline {path}: is damaged; make one with --save-baseline")
    counts = [len(window.targets) for window in task.windows]
    ends = list(accumulate(counts))
    return (tensor[end - count : end].to(model.device) for count, end in zip(counts, ends, strict=True))


def _baseline_form(model: ScoringModel, task: Task) -> tuple[list[int], str]:
    """Shape and safetensors' dtype of final hidden states."""
    dtypes = {dtype: name for name, dtype in STORED_DTYPES.items()}
    return [task.num_tokens, model.model_config.hidden_size], dtypes[model.dtype]


def _identity(model: ScoringModel, task: Task) -> dict[str, str]:
    """What final hidden states depend on, under the words that say so when it differs."""
    windows = hashlib.sha256()
    for window in task.windows:
        windows.update(array("q", [len(window.token_ids), window.first, *window.token_ids]).tobytes())
    return {
        "model or dtype": f"{model.dtype_name} {model.fingerprint()}",
        "text, protocol or window": windows.hexdigest(),
    }
