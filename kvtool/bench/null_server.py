"""A server that computes nothing: what a client measures of it beyond the known delay is the client's own doing."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import msgspec

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'{"choices":[{"index":0,"text":"%s","finish_reason":%s,"token_ids":[%d]}]}'
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
USAGE = b'{"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}'


class Asked(msgspec.Struct):
    """What it reads of a body."""

    prompt: list[int] | str
    max_tokens: int


class NullConnection(asyncio.Protocol):
    """Answers /v1/completions: the first token after `delay` seconds, then one every `gap` seconds.

    The text of the first token is the delay that there really was, in seconds, timers being what they are.
    """

    def __init__(self, delay: float, gap: float) -> None:
        self._delay, self._gap, self._received = delay, gap, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        arrived = perf_counter()
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if head.startswith(b"GET "):
            self._received = b""
            self._transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        elif length and len(body) == int(length[1]):
            self._received = b""
            self._answer(msgspec.json.decode(body, type=Asked), arrived)

    def _answer(self, asked: Asked, arrived: float) -> None:
        loop = asyncio.get_running_loop()
        first = loop.time() + self._delay

        def token(index: int) -> None:
            if self._transport.is_closing():
                return
            last = index == asked.max_tokens - 1
            text = b" x" if index else b"%.7f" % (perf_counter() - arrived)
            head = b"" if index else HEAD
            self._transport.write(head + event(TOKEN % (text, b'"length"' if last else b"null", index)))
            if not last:
                loop.call_at(first + (index + 1) * self._gap, token, index + 1)
                return
            usage = USAGE % (len(asked.prompt), asked.max_tokens)
            self._transport.write(event(usage) + event(b"[DONE]") + b"0\r\n\r\n")

        loop.call_at(first, token, 0)


def event(data: bytes) -> bytes:
    """A server-sent event as one chunk of a body."""
    return b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data)


@contextlib.contextmanager
def null_server(delay: float, gap: float) -> Iterator[str]:
    """URL of a null server in a process of its own, which ends with the block."""
    code = "import sys; sys.path[0] = sys.argv[1]; from kvtool.bench import null_server as n; n.main(*sys.argv[2:])"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(delay), str(gap)]
    pipe = subprocess.PIPE
    # In a session of its own, so that Ctrl-C ends what measures, and that ends this.
    with subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def main(delay: str, gap: str) -> None:
    """The process: print the port, and serve until stdin ends."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: NullConnection(float(delay), float(gap)), "127.0.0.1", 0, backlog=1024
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        gone = asyncio.Event()
        loop.add_reader(sys.stdin.fileno(), gone.set)
        await gone.wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
