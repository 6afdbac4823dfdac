"""From a free port to a serving one, and back with no process left behind."""

import asyncio
import contextlib
import errno
import gc
import importlib
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from kvtool.client import EngineClient
from kvtool.config import EngineConfig, ServerConfig
from kvtool.errors import ConfigError, EngineDeadError
from kvtool.request import EngineInfo
from kvtool.server.app import create_app
from kvtool.server.generation import TextEngine
from kvtool.server.guard import MAX_HEADER_BYTES, Guard
from kvtool.server.metrics import Metrics
from kvtool.tokenizer import Tokenizer

INTERRUPT_SECONDS = 5  # for answers under way after Ctrl-C; somebody waits
LAST_SECONDS = 0.5  # for what is written already to be read, when there is nothing else to wait for

OnReady = Callable[[EngineInfo, str], None]


def run(engine: EngineConfig, config: ServerConfig, on_ready: OnReady) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for answers under way.

    Args:
        engine: runs in a process of its own.
        config: of the server.
        on_ready: called with the engine and the server's address once requests can come.

    Raises:
        ConfigError: host and port cannot be listened on.
        KVToolError: the engine or the tokenizer could not be loaded.
        EngineDeadError: the engine ended while it was needed.
        KeyboardInterrupt: after SIGINT, when all is closed.
    """
    with address_of(config) as listener:
        try:
            if signal.SIGINT in asyncio.run(serve(engine, config, listener, on_ready)):
                raise KeyboardInterrupt
        finally:
            gc.freeze()  # or Python looks through all of transformers for garbage before it ends, a second long


def address_of(config: ServerConfig) -> socket.socket:
    """A socket that holds the server's address, for as many connections as may be; warns if anybody can use it.

    Raises:
        ConfigError: host and port cannot be listened on.
    """
    # A connection is a file, and the usual soft limit of 1,024 is for programs that use select().
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = bind(config.host, config.port)
    if config.api_key is None and not ip_address(listener.getsockname()[0]).is_loopback:
        print(f"warning: who reaches {config.host} can use this server; set --api-key", file=sys.stderr, flush=True)
    return listener


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, so that a port in use shows before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's algorithm off only on sockets that name their protocol; with it, a first token waits for
        # the client's delayed acknowledgement of the response's head, 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What it accepts inherits this. asyncio sets it only where a socket names its protocol, and without it a
        # response's body waits 40 ms for the client to acknowledge its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    engine: EngineConfig, config: ServerConfig, listener: socket.socket, on_ready: OnReady
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
        elif len(received) == 1:
            most = INTERRUPT_SECONDS if number == signal.SIGINT else config.shutdown_timeout
            server.stop(min(most, config.shutdown_timeout))
        else:
            server.stop_at_once()

    async def serve_engine() -> None:
        nonlocal server
        async with running(engine, config.preflight) as client:
            server = await server_of(client, engine, config)
            host, port = config.host, listener.getsockname()[1]
            try:
                listener.listen()
            except OSError as error:  # somebody was faster
                raise unusable(host, port, error) from error
            on_ready(client.info, f"http://{f'[{host}]' if ':' in host else host}:{port}")
            await server.serve_beside(listener.dup())

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        while True:
            try:
                await serve_engine()
                break
            except EngineDeadError:
                if server is None or received or not engine.restart:
                    raise
                print("the engine ended; starting it again", file=sys.stderr, flush=True)
                server = None
    except asyncio.CancelledError:
        if not received:
            raise
    return received


async def server_of(client: EngineClient, engine: EngineConfig, config: ServerConfig) -> "Server":
    """What answers requests with this engine; it tells its configuration, but for secrets."""
    info, name = client.info, config.served_model_name or client.info.model
    handoff = engine.handoff and replace(engine.handoff, secret="")
    configuration = {
        "engine": asdict(replace(engine, handoff=handoff)),
        "server": asdict(replace(config, api_key=None)),
    }
    metrics = Metrics(client, name)
    text_engine = TextEngine(
        client,
        await asyncio.to_thread(Tokenizer.load, Path(info.path), info.vocab_size),
        name,
        observer=metrics,
        max_queue=config.max_queue,
        trust_request_chat_template=config.trust_request_chat_template,
    )
    return Server(Guard(create_app(text_engine, metrics, configuration), config.api_key), client)


@contextlib.asynccontextmanager
async def running(config: EngineConfig, preflight: bool) -> AsyncIterator[EngineClient]:
    """An engine, started and closed again."""
    print(f"loading {config.model} ...", file=sys.stderr, flush=True)
    # The tokenizer will need it, and importing takes about as long as starting an engine.
    transformers = asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "transformers")
    client = await EngineClient.start(config, preflight)
    try:
        await transformers
        yield client
    finally:
        await client.close()


class GuardedServer(uvicorn.Server):
    """uvicorn's, as all that kvtool serves is served; whoever starts it also says when it stops."""

    def __init__(self, guard: Guard, shutdown_timeout: int | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                guard,
                http="h11",  # whatever else is installed: its limit on headers is the one that is tested
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=shutdown_timeout,
            )
        )
        self.guard = guard

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # whoever starts it has them, also while a model loads


class Server(GuardedServer):
    """Stopped by `serve` and by the engine's end."""

    def __init__(self, guard: Guard, client: EngineClient) -> None:
        super().__init__(guard)
        self.client = client

    async def serve_beside(self, listener: socket.socket) -> None:
        """Serve as long as the engine lives.

        Raises:
            EngineDeadError: it did not outlive the server.
        """
        self._follower = asyncio.create_task(self._follow())
        await self.serve(sockets=[listener])
        if self._follower.cancelled():
            return
        if not self.client.alive:
            raise EngineDeadError(f"the engine ended (status {await self._follower}); the server ends with it")
        self._follower.cancel()

    async def _follow(self) -> int:
        status = await self.client.wait_closed()
        await asyncio.sleep(LAST_SECONDS)  # streams get their last event, and probes see what has happened
        self._end_within(0)
        return status

    def stop(self, seconds: float) -> None:
        """Refuse new requests, and end when those under way are answered. What takes longer than `seconds` ends with
        finish reason "abort"."""
        if count := self.guard.num_under_way:
            what = f"{count} request{'s' * (count > 1)}"
            print(
                f"finishing {what}, for {seconds:g} s at most; stop again to end at once", file=sys.stderr, flush=True
            )

        async def drain() -> None:
            deadline = asyncio.get_running_loop().time() + seconds
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.guard.drain(), seconds)
            for request_id in list(self.client.request_ids):
                self.client.abort(request_id)
            self._end_within(deadline - asyncio.get_running_loop().time())

        self._draining = asyncio.create_task(drain())  # kept here, because the loop itself would forget it

    def stop_at_once(self) -> None:
        """End, whoever is still waiting for an answer."""
        self._follower.cancel()  # it ends because we want it to
        self.client.kill()
        self.should_exit = True
        self._drop_connections()

    def _end_within(self, seconds: float) -> None:
        """End when all that is written has been read."""
        self.should_exit = True
        asyncio.get_running_loop().call_later(max(seconds, LAST_SECONDS), self._drop_connections)

    def _drop_connections(self) -> None:
        """Requests see that their client is gone, also those that wait for it to read."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()
