"""The engine process: an Engine behind the socket of an `EngineClient`."""

import contextlib
import gc
import os
import select
import signal
import socket
import traceback
from collections.abc import Iterator
from threading import Thread

import msgspec
import torch

from kvtool.client import HEADER_BYTES, frame
from kvtool.config import EngineConfig
from kvtool.engine import Engine
from kvtool.errors import KVToolError, RequestError
from kvtool.quantize.preflight import preflight
from kvtool.request import Abort, EngineFailed, FlushCache, Request, Tokens, Update


def serve(connection: socket.socket) -> None:
    """Be the engine process of an `EngineClient`: until the other end closes, take requests and send tokens."""
    inbox = Inbox(connection)
    config, has_preflight = msgspec.msgpack.decode(next(inbox.wait()), type=tuple[EngineConfig, bool])
    try:
        engine = Engine(preflight(config) if has_preflight else config)
        ready = frame(engine.info)
    except KVToolError as error:
        connection.sendall(frame(EngineFailed(str(error))))
        return
    except Exception as error:
        traceback.print_exc()
        connection.sendall(frame(EngineFailed(f"{type(error).__name__}: {error} (a bug in kvtool)")))
        return
    gc.collect()
    gc.freeze()  # or Python looks through torch and the model time and again, between steps
    connection.sendall(ready)
    inbox.bell = engine.bell
    Thread(target=_prepare, args=[engine], daemon=True).start()
    decoder = msgspec.msgpack.Decoder(Request | Abort | FlushCache)
    while True:
        news = []
        for body in inbox.poll() if engine.has_work else inbox.wait():
            news += _take(engine, decoder.decode(body))
        news += engine.take_arrivals()
        if engine.has_work:
            news += engine.step()
        connection.sendall(frame(Update(news, engine.stats())))


def _prepare(engine: Engine) -> None:
    """What need not be ready for the first request, and should be for the first that asks for it."""
    with contextlib.suppress(KVToolError):  # who asks will be told
        engine.prepare_grammars()


def _take(engine: Engine, message: Request | Abort | FlushCache) -> list[Tokens]:
    """Carry out one message; a request that can never run is answered at once."""
    if isinstance(message, Abort):
        engine.abort(message.id)
        return []
    if isinstance(message, FlushCache):
        engine.flush_cache()
        return []
    try:
        engine.submit(message)
    except RequestError as error:
        return [Tokens(message.id, [], error=str(error), param=error.param)]
    return []


class Inbox:
    """Frames that have arrived on a socket.

    Attributes:
        bell: a socket that ends the waiting, too; None: there is no other.

    Raises:
        EOFError: the other end has closed.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, bytearray()
        self.bell: socket.socket | None = None

    def poll(self) -> Iterator[bytes]:
        """Frames that are here already."""
        while select.select([self._connection], [], [], 0)[0]:
            self._receive()
        while (body := self._next()) is not None:
            yield body

    def wait(self) -> Iterator[bytes]:
        """At least one frame, unless the bell rings."""
        while (body := self._next()) is None:
            if self.bell in select.select([self._connection, *filter(None, [self.bell])], [], [])[0]:
                return
            self._receive()
        yield body
        yield from self.poll()

    def _receive(self) -> None:
        data = self._connection.recv(1 << 20)
        if not data:
            raise EOFError
        self._buffer += data

    def _next(self) -> bytes | None:
        end = HEADER_BYTES + int.from_bytes(self._buffer[:HEADER_BYTES], "little")
        if len(self._buffer) < HEADER_BYTES or len(self._buffer) < end:
            return None
        body = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return body


def cpu_threads() -> int:
    """Threads for the model on a CPU: one core is left to the HTTP server, because a thread that waits for a core that
    another process holds stops all the others at every operation."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _end_with(connection: socket.socket) -> None:
    """End this process when the other end closes, also in the midst of a long step."""
    hangup = select.poll()
    hangup.register(connection, select.POLLRDHUP)
    hangup.poll()
    os._exit(0)


def main(fd: int) -> None:
    """The process that `EngineClient` starts, with its end of the socket."""
    torch.set_num_threads(cpu_threads())
    # Ctrl-C and a service manager's SIGTERM reach the whole group. The server decides what they mean: it closes the
    # socket when the last answer is out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    Thread(target=_end_with, args=[connection], daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        serve(connection)
    gc.freeze()  # or Python looks through all of torch for garbage before it ends, a second long
