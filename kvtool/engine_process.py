"""The engine process: an Engine behind the socket of an `EngineClient`."""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback
from threading import Thread

import msgspec
import torch

from kvtool.config import EngineConfig
from kvtool.engine import Engine
from kvtool.errors import KVToolError, RequestError
from kvtool.processes import Inbox, cpu_threads, frame
from kvtool.quantize.preflight import preflight
from kvtool.ranks.messages import End, Failed
from kvtool.request import Abort, CountExperts, EngineFailed, FlushCache, Request, Tokens, Update


def serve(connection: socket.socket, started: list[Engine]) -> None:
    """Be the engine process of an `EngineClient`: until the other end closes, take requests and send tokens.

    Args:
        started: gets the engine.
    """
    inbox = Inbox(connection)
    config, has_preflight = msgspec.msgpack.decode(next(inbox.wait()), type=tuple[EngineConfig, bool])
    try:
        engine = Engine(preflight(config) if has_preflight else config)
        started.append(engine)
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
    decoder = msgspec.msgpack.Decoder(Request | Abort | FlushCache | CountExperts)
    while True:
        news, counts = [], False
        for body in inbox.poll() if engine.has_work else inbox.wait():
            message = decoder.decode(body)
            if isinstance(message, CountExperts):
                counts = True
            else:
                news += _take(engine, message)
        news += engine.take_arrivals()
        if engine.has_work:
            news += engine.step()
        connection.sendall(frame(Update(news, engine.stats(), engine.expert_tokens() if counts else None)))


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


def _end_with(connection: socket.socket, started: list[Engine]) -> None:
    """End this process when the other end closes, also in the midst of a long step."""
    hangup = select.poll()
    hangup.register(connection, select.POLLRDHUP)
    hangup.poll()
    _dismiss(started, End())
    os._exit(0)


def _dismiss(started: list[Engine], last_words: End | Failed) -> None:
    """Let other ranks know that this one ends."""
    for engine in started:
        if engine.ranks:
            engine.ranks.dismiss(last_words)


def main(fd: str) -> None:
    """The process that `EngineClient` starts, with its end of the socket."""
    torch.set_num_threads(cpu_threads())
    # Ctrl-C and a service manager's SIGTERM reach the whole group. The server decides what they mean: it closes the
    # socket when the last answer is out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(fd))
    started: list[Engine] = []
    Thread(target=_end_with, args=[connection, started], daemon=True).start()
    status = 0
    last_words: End | Failed = End()
    try:
        with contextlib.suppress(EOFError, ConnectionError):
            serve(connection, started)
    except Exception as error:
        traceback.print_exc()
        status, last_words = 1, Failed.by(error)
    _dismiss(started, last_words)
    sys.stderr.flush()
    # Python would look through all of torch for garbage first, a second long, and Triton lists what is left; and NCCL
    # would wait for ranks that are no more.
    os._exit(status)
