"""What is asked of an engine and what came of it: one record a request, kept as JSON lines.

A log can be read again by `kvtool bench-throughput --events FILE.jsonl`, under any tool's definitions.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from kvtool.errors import ConfigError

Failure = Literal["connect", "http_status", "timeout", "mid_stream", "empty", "wrong_length", "cached"]
Message = dict[str, str]  # role and content


class WorkItem(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload.

    Attributes:
        id: unique in its run, from 0.
        prompt: token ids, a text, or the messages of a chat.
        output_tokens: tokens that the answer shall have; end of text is ignored unless `stops`.
        scheduled: when to send it, in seconds from the start of the run; None: as soon as there is a free slot.
        session, turn: a turn above 0 is sent once its session's turn before it has been answered, `think_seconds`
            later, and behind that session's earlier prompts and answers.
        unique: shares no beginning with any other prompt, so that a cached token is a fault.
        stops: the answer may end before `output_tokens`.
        group: what the request belongs to, for figures of its own: a hit rate, a data set's part.
    """

    id: int
    prompt: list[int] | str | list[Message]
    output_tokens: int
    scheduled: float | None = None
    session: str | None = None
    turn: int = 0
    think_seconds: float = 0.0
    unique: bool = True
    stops: bool = False
    group: str = ""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, tag="request", omit_defaults=True):
    """What came of one request. Times are seconds from the start of its run.

    Attributes:
        run: id of the `Run` that it belongs to.
        id, session, turn, group: of its `WorkItem`.
        asked_tokens: `output_tokens` of its `WorkItem`.
        scheduled: when it should have been sent; in a closed loop, when its slot was free.
        sent: when the client began to send it (also to connect, where no open connection was free).
        first_byte: of the response, headers included.
        chunk_times: arrival of each chunk that holds a choice.
        chunk_kinds: a letter for each: `t`ext, `r`easoning, `i`ds without text, or `e`mpty (a role, say).
        chunk_tokens: tokens in each, by their ids or by the server's running count; -1 where it says neither.
        ended: when the response was complete, or failed.
        prompt_tokens, cached_tokens, output_tokens: as the server counts them (usage); None where it does not say.
        queue_seconds: from its arrival to the first step that computed it, by the server's own word.
        finish_reason: the server's.
        failure: why it is in no figure; None: it is in all of them.
        error: the failure in one line.
    """

    run: int
    id: int
    session: str | None = None
    turn: int = 0
    group: str = ""
    asked_tokens: int
    scheduled: float
    sent: float
    first_byte: float | None = None
    chunk_times: list[float] = []
    chunk_kinds: str = ""
    chunk_tokens: list[int] = []
    ended: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    queue_seconds: float | None = None
    finish_reason: str | None = None
    failure: Failure | None = None
    error: str = ""

    @property
    def token_times(self) -> list[float]:
        """Arrival of each chunk that carried text, reasoning or ids."""
        return [time for time, kind in zip(self.chunk_times, self.chunk_kinds, strict=True) if kind != "e"]

    @property
    def first_token(self) -> float | None:
        """Arrival of the first of these."""
        return next(iter(self.token_times), None)


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """One trial of one point of a grid or sweep, written before its records.

    Attributes:
        id: its place in the log, from 0.
        point: what names the point, as it stands in the result's row: lengths, concurrency, rate.
        target: what was measured.
        started: seconds of the Unix epoch.
    """

    id: int
    point: dict[str, Any] = {}
    trial: int = 0
    target: dict[str, Any] = {}
    started: float = 0.0


Event = Run | RequestRecord


class EventLog:
    """Appends events to a JSONL file; a log that is cut off is whole up to its last line."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._encoder = file, msgspec.json.Encoder()

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path) -> "Iterator[EventLog]":
        """A new log at `path`, in the place of what is there.

        Raises:
            ConfigError: nothing can be written there.
        """
        try:
            file = path.open("wb")
        except OSError as error:
            raise ConfigError(
                f"--save-events {path}: cannot be written: {error.strerror}; choose another file"
            ) from error
        with file:
            yield cls(file)

    def write(self, event: Event) -> None:
        self._file.write(self._encoder.encode(event) + b"\n")


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log, one at a time.

    Raises:
        ConfigError: it cannot be read, or a line is no event.
    """
    decoder, number = msgspec.json.Decoder(Event), 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (the handler below names it)
                yield decoder.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}, line {number}: is no event of kvtool's: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
