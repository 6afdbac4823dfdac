"""Data sets and traces as files from anywhere: never held whole, and what is wrong in one is said with its line.

All that reads a file raises ConfigError where that cannot be read, or holds something else.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Annotated, TextIO, TypeVar

import msgspec

from kvtool.bench.events import Message
from kvtool.errors import ConfigError

MOST_TOKENS = 2**24  # of a prompt or an answer
MOONCAKE_BLOCK = 512  # tokens to a hash id
MOST_CHARACTERS = 64 << 20  # of one conversation

T = TypeVar("T")
BETWEEN = re.compile(r"[\s,\[]*")  # elements of an array
AZURE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(?:\+00:00|Z)?,(\d{1,9}),(\d{1,9})")


class Problem(msgspec.Struct):
    """A line of GSM8K."""

    question: str
    answer: str


Tokens = Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]


class Asked(msgspec.Struct):
    """A line of a user's own file."""

    prompt: str | list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] | None = None
    messages: list[Message] | None = None
    output_tokens: Tokens | None = None


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class Conversation(msgspec.Struct):
    """An element of ShareGPT's array."""

    conversations: list[_Turn] = []

    def pairs(self) -> list[tuple[str, str]]:
        """Questions and their answers, as long as user and model take turns."""
        turns = [turn for turn in self.conversations if turn.speaker != "system"]
        pairs = []
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            if question.speaker not in ("human", "user") or answer.speaker in ("human", "user"):
                break
            pairs.append((question.value, answer.value))
        return pairs


class TraceRequest(msgspec.Struct):
    """A line of Mooncake's trace; one of Azure's has no hash ids."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # milliseconds
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = []


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: cannot be read: {error.strerror}; correct it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset-path {path}: is no UTF-8 text ({error.reason}); convert it") from error


def digest(path: Path) -> str:
    """SHA-256 of a file, by which it is known wherever it lies."""
    hashed = sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hashed.update(chunk)
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: cannot be read: {error.strerror}; correct it") from error
    return hashed.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def json_lines(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """What each line that is not blank holds, with its number."""
    decoder = msgspec.json.Decoder(kind)
    for number, line in _lines(path):
        try:
            yield number, decoder.decode(line)
        except (ValueError, RecursionError) as error:  # noqa: PERF203 (it ends the loop)
            raise ConfigError(f"{path}, line {number}: {error}; correct it or leave the line out") from error


def json_array(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Elements of one JSON array of objects, with the lines that they begin in; the file is never held whole."""
    decoder, text, position, line = json.JSONDecoder(), "", 0, 1
    chunks = _chunks(path)
    while True:
        blank = BETWEEN.match(text, position)
        assert blank is not None
        line, position = line + blank[0].count("\n"), blank.end()
        if text[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, position)
            element = msgspec.convert(value, kind)
        except json.JSONDecodeError as error:  # also an object that goes on behind what was read
            if len(text) - position > MOST_CHARACTERS or not (more := next(chunks, "")):
                raise ConfigError(f"{path}, line {line}: {error.msg}; it must be one JSON array of objects") from error
            text, position = text[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {line}: {error}; correct it or leave the element out") from error
        yield line, element
        line, position = line + text.count("\n", position, end), end


def _chunks(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def azure_lines(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`, times as `2023-11-16 18:15:46.6805900`, with or without `+00:00`."""
    for number, line in _lines(path):
        if number == 1 and line.startswith("TIMESTAMP,"):
            continue
        match = AZURE.fullmatch(line.strip())
        try:
            if match is None:
                raise ValueError("is no `time,prompt tokens,answer tokens`")
            date = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
            milliseconds = (date.timestamp() + float(match[2] or 0)) * 1000
            fields = {"timestamp": milliseconds, "input_length": int(match[3]), "output_length": int(match[4])}
            yield number, msgspec.convert(fields, TraceRequest)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}; correct it or leave the line out") from error


def mooncake_lines(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    """Times in milliseconds, lengths, and a hash id for each 512 tokens of the prompt."""
    for number, asked in json_lines(path, TraceRequest):
        blocks = -(-asked.input_length // MOONCAKE_BLOCK)
        if len(asked.hash_ids) != blocks:
            raise ConfigError(
                f"{path}, line {number}: {asked.input_length} tokens are {blocks} blocks of {MOONCAKE_BLOCK}, "
                f"but there are {len(asked.hash_ids)} hash_ids; correct it or leave the line out"
            )
        yield number, asked
