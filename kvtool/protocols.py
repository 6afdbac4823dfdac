"""Texts, and the windows that protocols cut from them: those that published figures come from."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.errors import ConfigError
from kvtool.models.resolve import EMBEDDED
from kvtool.scoring import Window
from kvtool.tokenizer import Tokenizer

SAMPLE = EMBEDDED["tiny"] / "sample.txt"  # the opening of Treasure Island, which tiny never saw


@dataclass(frozen=True)
class Task:
    """What a protocol makes of a text.

    Attributes:
        windows: what the model reads and which of it is scored.
        weights: how much each window's mean counts for a scored token of it; 1 but where a protocol counts otherwise.
        window: tokens of a whole one.
        stride: tokens from one to the next, where they overlap.
        num_words, num_bytes: of the original text, where every token of it is scored.
    """

    windows: Sequence[Window]
    weights: Sequence[float]
    window: int
    stride: int | None = None
    num_words: int | None = None
    num_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(window.targets) for window in self.windows)


@dataclass(frozen=True)
class Protocol:
    """A way to cut a text into windows.

    Attributes:
        window: tokens of one, unless asked otherwise or the model's context is shorter.
        stride: tokens from one window to the next; None where that is not asked for.
        cut: (documents, tokenizer, window, stride) to a task.
    """

    window: int
    stride: int | None
    cut: Callable[[Sequence[str], Tokenizer, int, int], Task]


def llamacpp(documents: Sequence[str], tokenizer: Tokenizer, window: int, stride: int) -> Task:
    """llama.cpp's `llama-perplexity`: separate windows of n_ctx tokens, of which the second half is scored.

    Where the model's tokenizer begins a text with BOS, BOS replaces the first token of each window. A rest is dropped.
    """
    ids = tokenizer.encode("\n\n".join(documents))
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []
    starts = range(0, len(ids) - window + 1, window)
    windows = [Window([*begin, *ids[start + len(begin) : start + window]], window // 2 + 1) for start in starts]
    return _unweighted(windows, len(ids), window)


def gptq(documents: Sequence[str], tokenizer: Tokenizer, window: int, stride: int) -> Task:
    """GPTQ's evaluation (Frantar et al. 2023): separate windows, all but their first tokens scored; a rest is dropped.

    The mean of the windows' means, which here is the mean over tokens.
    """
    ids = tokenizer.encode("\n\n".join(documents))
    windows = [Window(ids[start : start + window]) for start in range(0, len(ids) - window + 1, window)]
    return _unweighted(windows, len(ids), window)


def hf_stride(documents: Sequence[str], tokenizer: Tokenizer, window: int, stride: int) -> Task:
    """Hugging Face's guide "Perplexity of fixed-length models": windows that overlap, each scored where it is new.

    As written there: a window's mean counts for one token less than it is new to, also where all of these are scored.
    """
    ids = tokenizer.encode("\n\n".join(documents))
    windows, weights = [], []
    end = 0
    for start in range(0, len(ids), stride):
        before, end = end, min(start + window, len(ids))
        num_scored = min(end - before, end - start - 1)
        if num_scored:
            windows.append(Window(ids[start:end], end - start - num_scored))
            weights.append((end - before - 1) / num_scored)
        if end == len(ids):
            break
    if not sum(weights):
        raise _too_short(len(ids), 2)
    return Task(windows, weights, window, stride)


def lm_eval(documents: Sequence[str], tokenizer: Tokenizer, window: int, stride: int) -> Task:
    """lm-evaluation-harness's rolling log-likelihood: every token of each document is scored once.

    The first window of a document begins with BOS (the end-of-text token where there is none), the others with the last
    token before them, the last one with as many as make it full.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ConfigError("--protocol lm-eval: the tokenizer has no BOS or end-of-text token; choose another protocol")
    encoded = [(text, [prefix, *tokenizer.encode(text, add_special_tokens=False)]) for text in documents]
    scored = [(text, ids) for text, ids in encoded if len(ids) > 1]
    windows = []
    for _, ids in scored:
        for first in range(1, len(ids), window):
            end = min(first + window, len(ids))
            start = max(0, end - window - 1)
            windows.append(Window(ids[start:end], first - start))
    if not windows:
        raise _too_short(0, 1)
    num_words = sum(len(re.split(r"\s+", text)) for text, _ in scored)
    num_bytes = sum(len(text.encode()) for text, _ in scored)
    return Task(windows, [1.0] * len(windows), window, num_words=num_words, num_bytes=num_bytes)


PROTOCOLS = {
    "llamacpp": Protocol(512, None, llamacpp),
    "hf-stride": Protocol(2048, 512, hf_stride),
    "gptq": Protocol(2048, None, gptq),
    "lm-eval": Protocol(2048, None, lm_eval),
}


def make_task(
    protocol: str,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    context: int,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Task:
    """Cut `documents` as `protocol` does.

    Args:
        protocol: a key of PROTOCOLS.
        context: tokens that the model can read.
        max_tokens: read no more of the text than these.

    Raises:
        ConfigError: an unknown protocol, a window or stride that it cannot take, or a text too short for one window.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol}: must be one of {', '.join(PROTOCOLS)}")
    chosen = PROTOCOLS[protocol]
    size = min(chosen.window, context) if window is None else window
    if size > context:
        raise ConfigError(f"--window {size}: the model's context is {context} tokens")
    if stride is not None and chosen.stride is None:
        raise ConfigError(f"--stride is for hf-stride; the windows of {protocol} follow each other")
    step = min(chosen.stride or size, size) if stride is None else stride
    if step > size:
        raise ConfigError(f"--stride {step}: would skip tokens between windows of {size}; make it {size} or less")
    texts = documents if max_tokens is None else _first_tokens(documents, tokenizer, max_tokens)
    return chosen.cut(texts, tokenizer, size, step)


def read_documents(path: Path, field: str | None = None) -> list[str]:
    """The texts of a file: the `field` ("text" unless given) of every row of .jsonl and .parquet, else all of it.

    Raises:
        ConfigError: the file cannot be read, is no such file, or has no such field.
    """
    try:
        if path.suffix == ".jsonl":
            return _jsonl(path, field or "text")
        if path.suffix == ".parquet":
            return _parquet(path, field or "text")
        if field is not None:
            raise ConfigError(f"--field {field}: is for .jsonl and .parquet; --data {path} is read as one text")
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data {path}: is no UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise ConfigError(f"--data {path}: {error.strerror or error}") from error


def _unweighted(windows: list[Window], num_tokens: int, window: int) -> Task:
    if not windows:
        raise _too_short(num_tokens, window)
    return Task(windows, [1.0] * len(windows), window)


def _too_short(num_tokens: int, needed: int) -> ConfigError:
    return ConfigError(
        f"--data: {num_tokens} tokens are too short for one window of {needed}; give more text or a smaller --window"
    )


def _first_tokens(documents: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """`documents` up to where `max_tokens` tokens end."""
    kept: list[str] = []
    for text in documents:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        if len(encoding) >= max_tokens:
            return [*kept, text[: encoding.offsets[max_tokens - 1][1]]]
        kept.append(text)
        max_tokens -= len(encoding)
    return kept


def _jsonl(path: Path, field: str) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--data {path}: line {number} is no JSON") from error
        texts.append(_text_of(row if isinstance(row, dict) else {}, field, f"--data {path}: line {number}"))
    return texts


def _parquet(path: Path, field: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ConfigError(f"--data {path}: parquet needs pyarrow; run pip install 'kvtool[parquet]'") from error
    try:
        names = parquet.read_schema(path).names
        rows = parquet.read_table(path, columns=[field]).to_pylist() if field in names else [dict.fromkeys(names)]
    except pyarrow.ArrowException as error:
        raise ConfigError(f"--data {path}: is no parquet file ({error})") from error
    return [_text_of(row, field, f"--data {path}: row {number}") for number, row in enumerate(rows, 1)]


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ConfigError(
            f"{where} has no field {field!r}, but {', '.join(map(repr, row)) or 'none'}; choose by --field"
        )
    text = row[field]
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # lone surrogates, which JSON can spell
        raise ConfigError(f"{where}: {field!r} is no text; choose another by --field")
    return text
