"""What is measured, what an answer of it leaves behind, and the target in process: our engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from kvtool.bench.events import Failure, Message, WorkItem
from kvtool.client import EngineClient
from kvtool.config import EngineConfig
from kvtool.errors import EngineDeadError, KVToolError
from kvtool.request import EngineInfo, Request, SamplingParams

if TYPE_CHECKING:
    from kvtool.tokenizer import Tokenizer

Prompt = list[int] | str | list[Message]


class RequestFailed(Exception):
    """One request failed, and how."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(" ".join(message.split())[:500])
        self.failure = failure


@dataclass
class Answer:
    """One response as it comes in. Times are of `perf_counter`; most attributes are `RequestRecord`'s.

    Attributes:
        template_tokens: of the prompt, that the server's chat template puts around every question.
    """

    sent: float = 0.0
    first_byte: float | None = None
    ended: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_kinds: list[str] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    queue_seconds: float | None = None
    finish_reason: str | None = None
    template_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def add(self, time: float, kind: str, tokens: int) -> None:
        """A chunk that holds a choice."""
        self.chunk_times.append(time)
        self.chunk_kinds.append(kind)
        self.chunk_tokens.append(tokens)


class Target(Protocol):
    """What is measured.

    Attributes:
        name: of the model.
        vocab_size, max_model_len: where they are known.
        count_tokens: of a text; None where no tokenizer is at hand.
    """

    name: str
    vocab_size: int | None
    max_model_len: int | None
    count_tokens: Callable[[str], int] | None

    async def send(self, prompt: Prompt, item: WorkItem, answer: Answer) -> None:
        """Ask for an answer and fill in `answer` as it comes.

        Raises:
            RequestFailed: and `answer` holds what had come until then.
        """

    async def flush_cache(self) -> None:
        """Make it forget every prefix, if it can."""

    async def metrics(self) -> dict[str, float]:
        """What it says of its doings: counters and gauges, by Prometheus' names; empty where it says nothing."""

    def describe(self) -> dict[str, Any]:
        """What a result says of it."""


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a chat; a text is what the user says."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt  # type: ignore[return-value]


class EngineTarget:
    """Our own engine, without HTTP: a process of its own behind an EngineClient."""

    def __init__(self, client: EngineClient) -> None:
        info = client.info
        self.name = info.model
        self.vocab_size: int | None = info.vocab_size
        self.max_model_len: int | None = info.max_model_len
        self.client, self._count = client, 0
        self.count_tokens: Callable[[str], int] | None = token_counter(info)

    async def send(self, prompt: Prompt, item: WorkItem, answer: Answer) -> None:
        token_ids = await self._ids(prompt)
        self._count += 1
        params = SamplingParams(temperature=0, max_tokens=item.output_tokens, ignore_eos=not item.stops)
        answer.sent = perf_counter()
        try:
            answer.prompt_tokens, answer.output_tokens = len(token_ids), 0
            async for tokens in self.client.submit(Request(f"bench-{self._count}", token_ids, params)):
                now = perf_counter()
                if answer.first_byte is None:
                    answer.first_byte, answer.queue_seconds = now, tokens.queue_seconds
                    answer.cached_tokens = tokens.num_cached_tokens
                answer.add(now, "i" if tokens.token_ids else "e", len(tokens.token_ids))
                answer.token_ids += tokens.token_ids
                answer.output_tokens += len(tokens.token_ids)
                answer.finish_reason = tokens.finish_reason
        except EngineDeadError as error:
            raise RequestFailed("connect" if answer.first_byte is None else "mid_stream", str(error)) from error
        except KVToolError as error:
            raise RequestFailed("http_status", str(error)) from error  # a server would answer with one
        finally:
            answer.ended = perf_counter()

    async def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
            return prompt  # type: ignore[return-value]
        tokenizer = await asyncio.to_thread(tokenizer_of, self.client.info.path, self.client.info.vocab_size)
        return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(as_messages(prompt))

    async def flush_cache(self) -> None:
        self.client.flush_cache()

    async def metrics(self) -> dict[str, float]:
        from kvtool.server.metrics import counters, gauges

        info, stats = self.client.info, self.client.stats
        totals = {f"{name}_total": float(value) for name, value, _ in counters(stats)}
        return totals | {name: float(value) for name, value, _ in gauges(info, stats)}

    def describe(self) -> dict[str, Any]:
        return {"engine": msgspec.structs.asdict(self.client.info)}


@lru_cache(1)
def tokenizer_of(path: str, vocab_size: int) -> "Tokenizer":
    """The tokenizer of a model folder; loading one takes seconds."""
    from kvtool.tokenizer import Tokenizer

    return Tokenizer.load(Path(path), vocab_size)


def token_counter(info: EngineInfo) -> Callable[[str], int] | None:
    """What counts the tokens of a text as the engine does; None where its model is on another machine."""
    if not Path(info.path).is_dir():
        return None
    return lambda text: len(tokenizer_of(info.path, info.vocab_size).encode(text))


@contextlib.asynccontextmanager
async def engine_target(config: EngineConfig) -> AsyncIterator[EngineTarget]:
    """An engine, started and closed again.

    Raises:
        KVToolError: it could not start.
    """
    client = await EngineClient.start(config)
    try:
        yield EngineTarget(client)
    finally:
        await client.close()
