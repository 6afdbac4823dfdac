"""From a free port to a serving one, and back with no process left behind."""

import asyncio
import contextlib
import errno
import importlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import uvicorn

from kvtool.client import EngineClient
from kvtool.config import EngineConfig
from kvtool.errors import ConfigError, EngineDeadError
from kvtool.request import EngineInfo
from kvtool.server.app import create_app
from kvtool.server.generation import TextEngine
from kvtool.tokenizer import Tokenizer

GRACE_SECONDS = 5  # for answers under way when the server is told to stop

OnReady = Callable[[EngineInfo, str], None]


def run(config: EngineConfig, host: str, port: int, name: str | None, on_ready: OnReady) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for answers under way.

    Args:
        config: of the engine, which runs in a process of its own.
        host, port: where to listen; port 0 picks a free one.
        name: of the model in requests; None: as the config has it.
        on_ready: called with the engine and the server's address once requests can come.

    Raises:
        ConfigError: host and port cannot be listened on.
        KVToolError: the engine or the tokenizer could not be loaded.
        EngineDeadError: the engine ended while it was needed.
        KeyboardInterrupt: after SIGINT, when all is closed.
    """
    with bind(host, port) as listener:
        if signal.SIGINT in asyncio.run(serve(config, listener, host, name, on_ready)):
            raise KeyboardInterrupt


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, so that a port in use shows before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}; use an address of this machine") from error
    except OSError as error:
        raise unusable(host, port, error) from error
    return listener


def unusable(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; choose another with --port")
    return ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; change --host or --port")


async def serve(
    config: EngineConfig, listener: socket.socket, host: str, name: str | None, on_ready: OnReady
) -> list[signal.Signals]:
    """Start engine and server, wait for their end; returns the signals that asked for it."""
    server: Server | None = None
    received: list[signal.Signals] = []
    task = asyncio.current_task()
    assert task is not None

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if server is None:
            task.cancel()
        else:
            server.force_exit = server.should_exit
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        async with engine(config) as client:
            info = client.info
            tokenizer = await asyncio.to_thread(Tokenizer.load, Path(info.path), info.vocab_size)
            app = create_app(TextEngine(client, tokenizer, name or info.model))
            server = Server(
                uvicorn.Config(
                    app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_SECONDS
                )
            )
            port = listener.getsockname()[1]
            try:
                listener.listen()
            except OSError as error:  # somebody was faster
                raise unusable(host, port, error) from error
            on_ready(info, f"http://{f'[{host}]' if ':' in host else host}:{port}")
            await server.serve_beside(client, listener)
    except asyncio.CancelledError:
        if not received:
            raise
    return received


@contextlib.asynccontextmanager
async def engine(config: EngineConfig) -> AsyncIterator[EngineClient]:
    """An engine, started and closed again."""
    print(f"loading {config.model} ...", file=sys.stderr, flush=True)
    # The tokenizer will need it, and importing takes about as long as starting an engine.
    transformers = asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "transformers")
    client = await EngineClient.start(config)
    try:
        await transformers
        yield client
    finally:
        await client.close()


class Server(uvicorn.Server):
    """uvicorn's, stopped by `serve` and by the engine's end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `serve` has them, also while the model loads

    async def serve_beside(self, client: EngineClient, listener: socket.socket) -> None:
        """Serve as long as the engine lives.

        Raises:
            EngineDeadError: it did not outlive the server.
        """

        async def follow() -> int:
            status = await client.wait_closed()
            self.should_exit = True
            return status

        follower = asyncio.create_task(follow())
        await self.serve(sockets=[listener])
        if follower.done():
            raise EngineDeadError(f"the engine ended (status {follower.result()}); the server ends with it")
        follower.cancel()
