"""The process boundary: the engine runs in a process of its own, reached through a private socket."""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, KeysView

import msgspec

from kvtool.config import EngineConfig
from kvtool.errors import EngineDeadError, KVToolError, RequestError
from kvtool.processes import HEADER_BYTES, command, frame
from kvtool.request import (
    Abort,
    CountExperts,
    EngineFailed,
    EngineInfo,
    EngineStats,
    FlushCache,
    Request,
    Tokens,
    Update,
)

COUNT_SECONDS = 1.0  # between counts of experts' tokens, for each of which the engine waits for a step


class EngineClient:
    """Starts an engine process and talks to it in frames.

    Attributes:
        info: what the engine said of itself when it was ready.
        stats: what it last said of its doings.
        expert_tokens: tokens that have chosen each expert, by layer, as last told to `count_experts`.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ) -> None:
        self.info, self.stats = info, EngineStats()
        self._process, self._reader, self._writer = process, reader, writer
        self.expert_tokens: dict[int, list[int]] = {}
        self._asked, self._counted = -COUNT_SECONDS, asyncio.Event()
        self._queues: dict[str, asyncio.Queue[Tokens | None]] = {}
        self._dispatcher = asyncio.create_task(self._dispatch())

    @classmethod
    async def start(cls, config: EngineConfig, preflight: bool = False) -> "EngineClient":
        """Start an engine and wait until it can take requests.

        Raises:
            KVToolError: the engine could not start, in its own words.
        """
        ours, theirs = socket.socketpair()
        argv = command("kvtool.engine_process", str(theirs.fileno()))
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(frame((config, preflight)))
            answer = msgspec.msgpack.decode(await _read(reader), type=EngineInfo | EngineFailed)
        except BaseException as error:
            writer.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # its own status says more than ours
            process.kill()
            status = process.wait()
            if isinstance(error, asyncio.IncompleteReadError | OSError):
                raise EngineDeadError(f"the engine ended while it started (status {status})") from error
            raise
        if isinstance(answer, EngineFailed):
            writer.close()
            process.wait()
            raise KVToolError(answer.error)
        return cls(process, reader, writer, answer)

    @property
    def alive(self) -> bool:
        """The engine can take requests."""
        return not self._dispatcher.done()

    @property
    def num_requests(self) -> int:
        """Requests that have been submitted and not answered in full."""
        return len(self._queues)

    @property
    def request_ids(self) -> KeysView[str]:
        """Ids of the requests that have been submitted and not answered in full."""
        return self._queues.keys()

    async def submit(self, request: Request) -> AsyncGenerator[Tokens, None]:
        """New tokens of `request` as they come; the last message carries its finish reason.

        Leaving the iterator early, or being cancelled in it, aborts the request.

        Raises:
            RequestError: the request can never run.
            KVToolError: it ran, and the model could not answer it.
            EngineDeadError: the engine ended meanwhile.
        """
        if not self.alive:
            raise EngineDeadError("the engine has ended; try again when another has been started")
        assert request.id not in self._queues, "request ids are unique"
        queue = self._queues[request.id] = asyncio.Queue()
        finished = False
        try:
            self._writer.write(frame(request))
            while not finished:
                tokens = await queue.get()
                finished = tokens is None or tokens.error is not None or tokens.finish_reason is not None
                if tokens is None:
                    raise EngineDeadError("the engine ended before the answer did")
                if tokens.error is not None:
                    raise RequestError(tokens.error, tokens.param) if tokens.param else KVToolError(tokens.error)
                yield tokens
        finally:
            del self._queues[request.id]
            if not finished and self.alive:
                self._writer.write(frame(Abort(request.id)))

    def abort(self, request_id: str) -> None:
        """End a request where it stands; its iterator gets a last message with finish reason "abort"."""
        if (queue := self._queues.get(request_id)) and self.alive:
            self._writer.write(frame(Abort(request_id)))
            queue.put_nowait(Tokens(request_id, [], "abort"))

    def flush_cache(self) -> None:
        """Make the engine forget every prefix."""
        if self.alive:
            self._writer.write(frame(FlushCache()))

    async def count_experts(self) -> None:
        """Bring `expert_tokens` up to date, to a second. An engine in the midst of a long step is not waited for."""
        now = time.monotonic()
        if self.info.num_experts and self.alive and now - self._asked >= COUNT_SECONDS:
            self._asked = now
            self._counted.clear()
            self._writer.write(frame(CountExperts()))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._counted.wait(), COUNT_SECONDS)

    def kill(self) -> None:
        """End the engine in the midst of what it does."""
        self._process.kill()

    async def wait_closed(self) -> int:
        """Wait until the engine has ended, for whatever reason; returns its exit status."""
        await asyncio.wait([self._dispatcher])
        return await asyncio.to_thread(self._process.wait)

    async def close(self) -> None:
        """End the engine; whoever still waits for tokens gets an EngineDeadError."""
        self._writer.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, 5)
        self._process.kill()
        await self.wait_closed()

    async def _dispatch(self) -> None:
        """Hand each message to the request that it belongs to, until the engine closes its end."""
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while True:
                    update = msgspec.msgpack.decode(await _read(self._reader), type=Update)
                    self.stats = update.stats
                    if update.expert_tokens is not None:
                        self.expert_tokens = update.expert_tokens
                        self._counted.set()
                    for tokens in update.tokens:
                        if queue := self._queues.get(tokens.id):
                            queue.put_nowait(tokens)
        finally:
            self._counted.set()
            for queue in self._queues.values():
                queue.put_nowait(None)


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(HEADER_BYTES), "little")
    return await reader.readexactly(size)
