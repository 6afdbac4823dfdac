"""Clients that stream answers and note when each part came: of an OpenAI-compatible or SGLang server, or our engine."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import SplitResult, urlsplit

import httpx
import msgspec

from kvtool.bench.events import Failure, Message, WorkItem
from kvtool.client import EngineClient
from kvtool.config import EngineConfig
from kvtool.errors import ConfigError, EngineDeadError, KVToolError
from kvtool.request import EngineInfo, Request, SamplingParams

if TYPE_CHECKING:
    from kvtool.tokenizer import Tokenizer

API = Literal["completions", "chat", "generate"]
PATHS: dict[API, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
MAX_ERROR_BYTES = 64 << 10  # kept of a body that is no stream
MAX_HEAD_BYTES = 64 << 10  # of a response, of a chunk's size line and of trailers
MAX_EVENT_BYTES = 64 << 20  # SGLang's carry the whole answer so far
MAX_CHUNKS = 1 << 20  # of an answer
MAX_SHORT_BYTES, SHORT_SECONDS = 16 << 20, 30.0  # of what is no stream: models, metrics

# One token each, with the space before, wherever English was among the texts.
COMMON_WORDS = (
    "the of and to in that was he it his is with as had you not be her on at by which have from this him but all she "
    "they were are my one so there been their we who an when no would them will or if what said up out into man do "
    "time could now then some more like"
)
WORDS = COMMON_WORDS.split()

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


# --- over HTTP --------------------------------------------------------------------------------------------------------


class HttpTarget:
    """A server with OpenAI's API or SGLang's `/generate`.

    Attributes:
        url: of the server, without `/v1`.
        info: what the server says of itself; empty where it says nothing.
        engine: the same of its engine, if it is ours.

    Args:
        api: which of its routes is asked.
        extra_body: goes into every request, over all that is there.
        timeout: seconds for one request.
    """

    def __init__(
        self,
        url: str,
        api: API = "completions",
        *,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.url, self.api, self.name = base_url(url), api, ""
        self.vocab_size: int | None = None
        self.max_model_len: int | None = None
        self.count_tokens: Callable[[str], int] | None = None
        self.info: dict[str, Any] = {}
        self.engine: EngineInfo | None = None
        self._extra_body, self._timeout = extra_body or {}, timeout
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False)
        self._pool = Pool(urlsplit(self.url), headers)
        self._template_tokens: int | None = None  # of a chat; asked for when the first prompt of ids comes

    async def open(self, model: str | None = None) -> None:
        """See what is there.

        Args:
            model: as the server knows it; None: the first that it names.

        Raises:
            ConfigError: nobody answers there, or not for this model.
        """
        try:
            status, models = await self._ask("/v1/models")
            if status in (401, 403):
                raise ConfigError(f"--url {self.url}: the server wants a key; give it with --api-key or KVTOOL_API_KEY")
            about = _json(*await self._ask("/get_model_info"))
            self.info = _json(*await self._ask("/get_server_info"))
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ConfigError(
                f"--url {self.url}: cannot be reached ({why}); start the server, or correct it"
            ) from error
        try:
            cards = msgspec.convert(_json(status, models), Models).data
        except msgspec.ValidationError as error:
            raise ConfigError(f"--url {self.url}: its /v1/models is not OpenAI's: {error}; correct it") from error
        names = [card.id for card in cards]
        if model is not None and names and model not in names:
            raise ConfigError(f"--model {model}: the server at {self.url} has {', '.join(names)}; choose one of these")
        self.name = model or next(iter(names), "")
        card = next((card for card in cards if card.id == self.name), ModelCard(self.name))
        vocab_size = about.get("vocab_size")
        self.vocab_size = vocab_size if isinstance(vocab_size, int) else None
        self.max_model_len = card.max_model_len
        with contextlib.suppress(msgspec.ValidationError):
            self.engine = msgspec.convert(self.info.get("engine"), EngineInfo)
            self.count_tokens = token_counter(self.engine)

    async def close(self) -> None:
        self._pool.close()
        await self._http.aclose()

    async def _ask(self, route: str, method: str = "GET") -> tuple[int, bytes]:
        """Status and body of what is no stream.

        Raises:
            httpx.HTTPError: nothing came, or too much, or for too long.
        """

        async def read() -> tuple[int, bytes]:
            async with self._http.stream(method, route) as response:
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_SHORT_BYTES:
                        raise httpx.ReadError(f"{route} has over {MAX_SHORT_BYTES >> 20} MiB")
                return response.status_code, bytes(body)

        try:
            return await asyncio.wait_for(read(), SHORT_SECONDS)
        except asyncio.TimeoutError:
            raise httpx.ReadTimeout(f"{route} has no end after {SHORT_SECONDS:g} s") from None

    async def send(self, prompt: Prompt, item: WorkItem, answer: Answer) -> None:
        if self.api == "chat" and (ids := [token for token in prompt if isinstance(token, int)]):
            prompt = await self._question(ids, answer)
        reader = StreamReader(answer)
        body = msgspec.json.encode(self.body(prompt, item) | self._extra_body)
        answer.sent = perf_counter()
        try:
            await asyncio.wait_for(self._pool.post(PATHS[self.api], body, reader), self._timeout)
        except asyncio.TimeoutError:
            raise RequestFailed("timeout", f"no end after {self._timeout:g} s") from None
        finally:
            answer.ended = perf_counter()
        reader.finish()

    def body(self, prompt: Prompt, item: WorkItem) -> dict[str, Any]:
        """What is sent for a request, but for `extra_body`."""
        if self.api == "generate":
            sampling = {"max_new_tokens": item.output_tokens, "temperature": 0, "ignore_eos": not item.stops}
            prompt_field = "text" if isinstance(prompt, str) else "input_ids"
            return {prompt_field: prompt, "sampling_params": sampling, "stream": True}
        if self.api == "chat":
            asked: dict[str, Any] = {"messages": as_messages(prompt)}
        else:
            asked = {"prompt": prompt}
        if self.name:
            asked["model"] = self.name
        return asked | {
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "ignore_eos": not item.stops,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _question(self, ids: list[int], answer: Answer) -> str:
        """A question that the server will see as so many tokens as there are `ids`, by the words that these choose.

        Raises:
            ConfigError: there can be none.
        """
        if self._template_tokens is None:
            self._template_tokens = await self._measure_template()
        answer.template_tokens = self._template_tokens
        if len(ids) <= self._template_tokens:
            raise ConfigError(
                f"--prompt-tokens {len(ids)}: the server's chat template alone takes {self._template_tokens}; ask for "
                "more, or choose --api completions"
            )
        return " ".join(WORDS[token % len(WORDS)] for token in ids[self._template_tokens :])

    async def _measure_template(self) -> int:
        """Tokens of a chat beside its words, by what the server says of two chats."""
        counts = []
        for words in (WORDS[:8], WORDS):
            answer, question = Answer(), " ".join(words)
            await self.send(question, WorkItem(id=0, prompt=question, output_tokens=1), answer)
            counts.append((answer.prompt_tokens or 0) - len(words))
        if counts[0] != counts[1] or counts[0] < 0:
            raise ConfigError(
                "--api chat: the server splits words so that no exact length can be asked for; choose --api completions"
            )
        return counts[0]

    async def flush_cache(self) -> None:
        try:
            for route in ("/flush_cache", "/reset_prefix_cache"):  # ours and SGLang's, vLLM's
                if (await self._ask(route, "POST"))[0] == 200:
                    return
        except httpx.HTTPError:
            return  # a server that has gone; the requests that follow will tell
        raise ConfigError(f"--flush-cache: {self.url} has neither /flush_cache nor /reset_prefix_cache; leave it out")

    async def metrics(self) -> dict[str, float]:
        try:
            status, exposition = await self._ask("/metrics")
        except httpx.HTTPError:
            return {}
        return samples(exposition.decode(errors="replace")) if status == 200 else {}

    def describe(self) -> dict[str, Any]:
        return {"url": self.url, "api": self.api, "model": self.name, "server": self.info}


class ModelCard(msgspec.Struct):
    """What `/v1/models` says of one."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[ModelCard] = []


def base_url(url: str) -> str:
    """The server's address without route.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("no address")
    except ValueError as error:
        raise ConfigError(f"--url {url}: is no address of a server; write http://HOST:PORT") from error
    return f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/').removesuffix('/v1')}"


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a chat; a text is what the user says."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt  # type: ignore[return-value]


SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", re.MULTILINE)


def samples(exposition: str) -> dict[str, float]:
    """Values of Prometheus' text format by name, summed over labels; no buckets. Prometheus' own parser would keep the
    streams waiting."""
    values: dict[str, float] = {}
    for name, value in SAMPLE.findall(exposition):
        if not name.endswith("_bucket"):
            with contextlib.suppress(ValueError):
                values[name] = values.get(name, 0.0) + float(value)
    return values


def _json(status: int, body: bytes) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        value = msgspec.json.decode(body) if status == 200 else {}
    except (msgspec.DecodeError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


class Pool:
    """Connections to one server, kept open for the next request."""

    def __init__(self, url: SplitResult, headers: dict[str, str]) -> None:
        self._url, self._free = url, list[Connection]()
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        fields = {"host": url.netloc.rpartition("@")[2], "content-type": "application/json"} | headers
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    async def post(self, path: str, body: bytes, reader: "StreamReader") -> None:
        """Send a request, and feed the response to `reader` until it ends.

        Raises:
            RequestFailed: it cannot be sent, or what comes back is no whole response.
        """
        head = f"POST {self._url.path}{path} HTTP/1.1\r\n{self._fields}content-length: {len(body)}\r\n\r\n"
        while True:
            self._free = [connection for connection in self._free if connection.reusable]
            used = bool(self._free)
            connection = self._free.pop() if used else await self._connect()
            try:
                await connection.exchange(head.encode() + body, reader)
            except ConnectionError as error:
                if used and reader.status is None:
                    continue  # the server has hung up on the idle connection just when we used it
                raise RequestFailed("connect" if reader.status is None else "mid_stream", str(error)) from error
            finally:
                if connection.reusable:
                    self._free.append(connection)
                else:
                    connection.close()
            return

    async def _connect(self) -> "Connection":
        assert self._url.hostname is not None
        port = self._url.port or (443 if self._tls else 80)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self._url.hostname, port, ssl=self._tls
            )
        except OSError as error:
            raise RequestFailed("connect", error.strerror or str(error)) from error
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.close()


class Connection(asyncio.Protocol):
    """HTTP/1.1 as a client needs it for streams (RFC 9112), one request at a time.

    What arrives is stamped before anything else is done with it, and little is: the libraries' own parsers take as long
    for a chunk as all the rest together.

    Attributes:
        reusable: it can take a request.
    """

    def __init__(self) -> None:
        self.reusable = True
        self._reader: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def close(self) -> None:
        self.reusable = False
        self._transport.abort()

    async def exchange(self, request: bytes, reader: "StreamReader") -> None:
        """Send a request, and feed `reader` until the response ends.

        Raises:
            ConnectionError: the connection ended before, or what came is no HTTP.
            RequestFailed: the reader can make nothing of it.
        """
        self.reusable, self._reader, self._head = False, reader, b""
        self._body: Body | None = None
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._reader is None:  # nobody asked
            self.close()
            return
        try:
            if self._body is None:
                self._head += data
                head, end, data = self._head.partition(b"\r\n\r\n")
                if not end:
                    if len(self._head) > MAX_HEAD_BYTES:
                        raise ValueError(f"its head has over {MAX_HEAD_BYTES >> 10} KiB")
                    return
                self._body = self._begin(self._reader, head.decode("latin-1"), now)
            if content := self._body.take(data):
                self._reader.data(content, now)
            if self._body.ended:
                self._end(None)
        except ValueError as error:
            self._end(ConnectionError(f"the response is no HTTP: {error}"))
        except RequestFailed as error:
            self._end(error)

    def _begin(self, reader: "StreamReader", head: str, now: float) -> "Body":
        """Read status and headers; returns what takes the framing off the body."""
        status_line, *lines = head.split("\r\n")
        protocol, _, rest = status_line.partition(" ")
        if not protocol.startswith("HTTP/1."):
            raise ValueError(f"it begins with {status_line:.40}")
        reader.begin(int(rest[:3]), now)
        pairs = (line.lower().partition(":") for line in lines)
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        self._keep = protocol == "HTTP/1.1" and "close" not in fields.get("connection", "")
        if "chunked" in fields.get("transfer-encoding", ""):
            return ChunkedBody()
        return PlainBody(int(fields["content-length"]) if "content-length" in fields else None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        until_now = isinstance(self._body, PlainBody) and self._body.left is None if self._reader else False
        self._keep = False
        whole = exc is None and until_now
        self._end(None if whole else ConnectionError("the server closed the connection before the response was whole"))

    def _end(self, error: Exception | None) -> None:
        if self._reader is None:
            return
        self._reader, self.reusable = None, error is None and self._keep
        if not self._ended.done():
            self._ended.set_exception(error) if error else self._ended.set_result(None)


class Body(Protocol):
    """Takes the framing off a body.

    Attributes:
        ended: all of it has come.
    """

    ended: bool

    def take(self, data: bytes) -> bytes:
        """What is new of the content.

        Raises:
            ValueError: the framing is broken.
        """


class ChunkedBody:
    def __init__(self) -> None:
        self.ended, self._rest = False, b""

    def take(self, data: bytes) -> bytes:
        rest, at, parts = self._rest + data, 0, []
        while (line_end := rest.find(b"\r\n", at)) >= 0:
            size = int(rest[at:line_end].partition(b";")[0], 16)
            if not 0 <= size <= MAX_EVENT_BYTES:
                raise ValueError(f"a chunk of {size} bytes")
            start, end = line_end + 2, line_end + 2 + size
            if size == 0:
                self.ended = rest.find(b"\r\n\r\n", line_end) >= 0
                break
            if len(rest) < end + 2:
                break
            parts.append(rest[start:end])
            at = end + 2
        self._rest = rest[at:]
        if (self.ended or line_end < 0 or size == 0) and len(self._rest) > MAX_HEAD_BYTES:
            raise ValueError(f"a size line or trailers of over {MAX_HEAD_BYTES >> 10} KiB")
        return b"".join(parts)


class PlainBody:
    """So many bytes, or with None all up to the connection's end.

    Attributes:
        left: bytes still to come.
    """

    def __init__(self, length: int | None) -> None:
        self.left, self.ended = length, length == 0

    def take(self, data: bytes) -> bytes:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
            self.ended = self.left == 0
        return data


class StreamReader:
    """Fills an `Answer` from the server-sent events of a response.

    Attributes:
        status: of the response, once it has begun.
    """

    def __init__(self, answer: Answer) -> None:
        self.status: int | None = None
        self._answer, self._rest, self._data, self._done = answer, b"", list[bytes](), False
        self._data_bytes = 0

    def begin(self, status: int, now: float) -> None:
        self.status, self._answer.first_byte = status, now

    def data(self, data: bytes, now: float) -> None:
        """Bytes of the body that arrived at `now`."""
        if self.status != 200:
            self._rest = (self._rest + data)[:MAX_ERROR_BYTES]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
                self._data_bytes += len(line)
            elif not line.strip() and self._data:
                self._event(b"\n".join(self._data), now)
                self._data.clear()
                self._data_bytes = 0
        if self._data_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise RequestFailed("mid_stream", f"an event has over {MAX_EVENT_BYTES >> 20} MiB")
        if len(self._answer.chunk_times) > MAX_CHUNKS or len(self._answer.text) > MAX_EVENT_BYTES:
            raise RequestFailed("mid_stream", "the answer has no end")

    def finish(self) -> None:
        """The body is complete.

        Raises:
            RequestFailed: the answer is not.
        """
        if self.status != 200:
            raise RequestFailed("http_status", f"status {self.status}: {_message(self._rest)}")
        if not self._done and self._answer.finish_reason is None and self._answer.chunk_times:
            raise RequestFailed("mid_stream", "the stream ended before the answer did")

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            chunk = DECODER.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestFailed("mid_stream", f"an event is not what it should be: {error}") from error
        if chunk.error is not None:
            raise RequestFailed("mid_stream", _message(data))
        if chunk.meta_info is not None:
            self._so_far(chunk, chunk.meta_info, now)
        for choice in chunk.choices[:1]:
            self._choice(choice, chunk.usage, now)
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            self._answer.prompt_tokens = chunk.usage.prompt_tokens
            self._answer.output_tokens = chunk.usage.completion_tokens
            self._answer.cached_tokens = details.cached_tokens if details else None

    def _choice(self, choice: "Choice", usage: "Usage | None", now: float) -> None:
        """OpenAI's: what is new of an answer."""
        answer, delta = self._answer, choice.delta or Delta()
        text, reasoning = choice.text or delta.content or "", delta.reasoning_content or delta.reasoning
        if choice.token_ids is not None:
            tokens = len(choice.token_ids)
            answer.token_ids += choice.token_ids
        else:
            tokens = usage.completion_tokens - (answer.output_tokens or 0) if usage else -1
        kind = "t" if text or delta.tool_calls else "r" if reasoning else "i" if tokens > 0 else "e"
        answer.add(now, kind, tokens)
        answer.text += text
        answer.finish_reason = choice.finish_reason or answer.finish_reason

    def _so_far(self, chunk: "Chunk", meta: "MetaInfo", now: float) -> None:
        """SGLang's: the answer up to now."""
        answer = self._answer
        tokens = meta.completion_tokens - (answer.output_tokens or 0)
        text = chunk.text or ""
        answer.add(now, "t" if len(text) > len(answer.text) else "i" if tokens > 0 else "e", tokens)
        answer.text, answer.token_ids = text, chunk.output_ids or []
        answer.prompt_tokens, answer.output_tokens = meta.prompt_tokens, meta.completion_tokens
        answer.cached_tokens = meta.cached_tokens
        if meta.finish_reason is not None:
            reason = meta.finish_reason
            answer.finish_reason = str(reason.get("type") if isinstance(reason, dict) else reason)


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # SGLang's, and vLLM's until 0.11
    reasoning: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class MetaInfo(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    finish_reason: Any = None


class Chunk(msgspec.Struct):
    """All that is read of an event, OpenAI's or SGLang's."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    text: str | None = None
    output_ids: list[int] | None = None
    meta_info: MetaInfo | None = None


DECODER = msgspec.json.Decoder(Chunk)


class Fault(msgspec.Struct):
    message: str


class ErrorBody(msgspec.Struct):
    error: Fault


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's form or any."""
    try:
        return msgspec.json.decode(body, type=ErrorBody).error.message
    except (msgspec.DecodeError, RecursionError):
        return body.decode(errors="replace")


# --- in process -------------------------------------------------------------------------------------------------------


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
