"""Responses over HTTP/1.1 as they come: connections, framing, server-sent events, and the answer that they make."""

import asyncio
import ssl
from time import perf_counter
from typing import Any, Protocol
from urllib.parse import SplitResult

import msgspec

from kvtool.bench.target import Answer, RequestFailed

MAX_ERROR_BYTES = 64 << 10  # kept of a body that is no stream
MAX_HEAD_BYTES = 64 << 10  # of a response, of a chunk's size line and of trailers
MAX_EVENT_BYTES = 64 << 20  # SGLang's carry the whole answer so far
MAX_CHUNKS = 1 << 20  # of an answer


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
            message = _message(self._rest).strip()
            raise RequestFailed("http_status", f"status {self.status}" + (f": {message}" if message else ""))
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
