"""How frames and tensors reach one peer: a queue, a socket, and what moves tensors beside a socket."""

import logging
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 16
AT_ONCE = 512  # buffers to one system call; Linux takes 1,024
WINDOW_BYTES, WRITE_SECONDS = 16 << 20, 60.0  # of NIXL
DELAY_SECONDS, WATCH_SECONDS = 0.5, 2e-5
NEAR_BYTES = 128 << 10  # that a socket holds of what goes to a process of the same machine
STAGING_BYTES = 16 << 20  # of pinned memory, between a GPU and a socket


class Channel(Protocol):
    """An ordered way to one peer, used by one thread at a time at each end.

    What is sent as tensors (uint8, contiguous) arrives in tensors of the same sizes, known from the frame before.
    Every method raises an OSError once the peer or the way to it is gone.

    Attributes:
        is_stream: tensors are bytes on their way, which may be taken in other portions than they were sent in.
    """

    is_stream: bool

    def send_frame(self, body: bytes) -> None: ...

    def receive_frame(self) -> bytes: ...

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        """Send a frame, and tensors behind it."""

    def receive(self, pieces: Sequence[Tensor]) -> None:
        """Fill tensors: those on a GPU, as what comes next on the current stream sees them."""

    def settle(self) -> None:
        """Wait until all that was to be received is there."""

    def close(self) -> None:
        """End it for both ends, also under a thread that waits here."""


class QueueChannel:
    """Both ends in one process: tensors are handed over, and copied once, where they are received."""

    is_stream = False

    def __init__(self, inbox: "SimpleQueue[Any]", outbox: "SimpleQueue[Any]") -> None:
        self._inbox, self._outbox = inbox, outbox

    @classmethod
    def pair(cls) -> tuple["QueueChannel", "QueueChannel"]:
        one, two = SimpleQueue[Any](), SimpleQueue[Any]()
        return cls(one, two), cls(two, one)

    def send_frame(self, body: bytes) -> None:
        self._outbox.put(body)

    def receive_frame(self) -> bytes:
        body: bytes = self._next()
        return body

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        self.send_frame(frame)
        if pieces[0].is_cuda:  # the peer reads them on a stream of its own
            torch.cuda.current_stream(pieces[0].device).synchronize()
        self._outbox.put(pieces)

    def receive(self, pieces: Sequence[Tensor]) -> None:
        for piece, sent in zip(pieces, self._next(), strict=True):
            piece.copy_(sent)

    def settle(self) -> None:
        pass

    def _next(self) -> Any:
        item = self._inbox.get()
        if item is None:
            self._inbox.put(None)
            raise ConnectionError("the peer has closed")
        return item

    def close(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()
        self._outbox.put(None)
        self._inbox.put(None)


class SocketChannel:
    """TCP. Tensors on a GPU pass through pinned memory on either side."""

    is_stream = True

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.getsockname()[0] == connection.getpeername()[0]:
            keep_near(connection)
        self.connection = connection
        self._staging: Tensor | None = None

    def send_frame(self, body: bytes) -> None:
        self.connection.sendall(_with_length(body))

    def receive_frame(self) -> bytes:
        size = int.from_bytes(self._read(LENGTH_BYTES), "little")
        if size > MAX_FRAME_BYTES:
            raise ConnectionError(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} are taken")
        return self._read(size)

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        head = [memoryview(_with_length(frame))]
        if pieces[0].is_cuda:
            for piece in pieces:
                for part in piece.view(-1).split(STAGING_BYTES):
                    self._send_all([*head, _view(self._staged(part).copy_(part))])
                    head = []
        else:
            self._send_all([*head, *map(_view, pieces)])

    def receive(self, pieces: Sequence[Tensor]) -> None:
        for piece in pieces:
            if piece.is_cuda:
                for part in piece.view(-1).split(STAGING_BYTES):
                    staged = self._staged(part)
                    self._fill(_view(staged))
                    part.copy_(staged)
            else:
                self._fill(_view(piece))

    def settle(self) -> None:
        pass

    def limit(self, seconds: float) -> None:
        """Let an operation fail that makes no headway for so long; 0: never. The kernel watches: with a timeout of
        Python's own a socket does not block, and nothing can wait for all that was asked for."""
        self.connection.setblocking(True)
        for which in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            whole, part = divmod(seconds, 1)
            self.connection.setsockopt(socket.SOL_SOCKET, which, struct.pack("@ll", int(whole), int(part * 1e6)))

    def close(self) -> None:
        with suppress(OSError):  # the peer was first
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _staged(self, part: Tensor) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._staging[: part.numel()]

    def _send_all(self, views: list[memoryview]) -> None:
        while views:
            sent = self.connection.sendmsg(views[:AT_ONCE])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            # Waiting for all of it in the kernel saves a wait for Python's lock at every packet.
            count = self.connection.recv_into(view, len(view), socket.MSG_WAITALL)
            if count == 0:
                raise ConnectionError("the peer has closed")
            view = view[count:]


class GroupChannel:
    """Frames over a socket, tensors by torch.distributed in a group of these two ends alone.

    The group's own connections know no secret: they carry bytes whose checksum comes in an authenticated frame. Both
    ends meet there at once: NCCL connects with the first tensor, and would wait for good for a peer that dies before.
    """

    is_stream = False

    def __init__(
        self, frames: SocketChannel, backend: str, rank: int, store: TCPStore, timeout: float, device: torch.device
    ) -> None:
        self._frames, self._other = frames, 1 - rank
        self._received: torch.cuda.Event | None = None
        self._on_gpu, limit = backend == "nccl", timedelta(seconds=timeout)
        if self._on_gpu:
            # A peer that has gone ends a transfer; torch would end this process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, 2, limit)
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        if rank == 0:
            self.receive([first])
            self.settle()
        else:
            self._wait([self._group.send([first], self._other, 0)])

    def send_frame(self, body: bytes) -> None:
        self._frames.send_frame(body)

    def receive_frame(self) -> bytes:
        return self._frames.receive_frame()

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        self.send_frame(frame)
        works = [self._group.send([piece], self._other, 0) for piece in pieces]
        if not self._on_gpu:  # there the stream of what is sent next need not wait, and the peer says what has come
            self._wait(works)

    def receive(self, pieces: Sequence[Tensor]) -> None:
        self._wait([self._group.recv([piece], self._other, 0) for piece in pieces])  # on a GPU its stream waits
        if self._on_gpu:
            self._received = torch.cuda.current_stream(pieces[0].device).record_event()

    def settle(self) -> None:
        """Wait for the GPU, as long as the peer is there: NCCL would wait for it for good."""
        if self._received is None:
            return
        hangup = select.poll()
        hangup.register(self._frames.connection, select.POLLRDHUP)
        while not self._received.query():
            if hangup.poll(0):
                self.close()
                raise ConnectionError("the peer has closed")
            time.sleep(WATCH_SECONDS)

    def close(self) -> None:
        self._frames.close()
        if self._on_gpu:
            self._group.abort()

    def _wait(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:  # torch's word for a peer that has gone
            raise ConnectionError(str(error).partition("\n")[0]) from error


class NixlChannel:
    """Frames over a socket, tensors by NIXL: the sender writes into a window of the receiver's memory.

    Both ends have such a window, registered once: to register what each tensor lies in would cost as much as to send
    it, and so nobody writes anywhere else. While one part is on its way the other end empties the window, in turn.
    """

    is_stream = False

    def __init__(self, frames: SocketChannel, device: torch.device) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        log = logging.getLogger("nixl")  # which writes to stdout, where results go
        log.handlers.clear()
        log.setLevel(logging.WARNING)
        self._frames = frames
        self.window = torch.zeros(WINDOW_BYTES, dtype=torch.uint8, device=device)
        self._agent = nixl_agent(uuid4().hex, nixl_agent_config(backends=["UCX"]))
        self._registered = self._agent.register_memory(self.window)
        self._there: Any = None

    @property
    def metadata(self) -> bytes:
        """What the sender must know to write here."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def meet(self, metadata: bytes, address: int, device: int) -> None:
        """Write to the window of the receiver: device -1 is the host."""
        self._peer = self._agent.add_remote_agent(metadata)
        kind, where = ("DRAM", 0) if device < 0 else ("VRAM", device)
        self._there = lambda size: self._agent.get_xfer_descs([(address, size, where)], kind)

    def send_frame(self, body: bytes) -> None:
        self._frames.send_frame(body)

    def receive_frame(self) -> bytes:
        return self._frames.receive_frame()

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        self.send_frame(frame)
        for piece in pieces:
            for part in piece.view(-1).split(WINDOW_BYTES):
                self._write(part)
                self._frames.send_frame(b"written")
                self._frames.receive_frame()  # it is emptied

    def receive(self, pieces: Sequence[Tensor]) -> None:
        for piece in pieces:
            for part in piece.view(-1).split(WINDOW_BYTES):
                self._frames.receive_frame()
                part.copy_(self.window[: len(part)])
                if part.is_cuda:
                    torch.cuda.current_stream(part.device).synchronize()
                self._frames.send_frame(b"emptied")

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self._frames.close()

    def _write(self, part: Tensor) -> None:
        here = self.window[: len(part)]
        here.copy_(part)
        if here.is_cuda:
            torch.cuda.current_stream(here.device).synchronize()
        local = self._agent.get_xfer_descs(here)
        handle = self._agent.initialize_xfer("WRITE", local, self._there(len(part)), self._peer)
        try:
            state, deadline = self._agent.transfer(handle), time.monotonic() + WRITE_SECONDS
            while state == "PROC" and time.monotonic() < deadline:
                state = self._agent.check_xfer_state(handle)
        finally:
            self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise ConnectionError(f"NIXL could not write ({state})")


class FaultyChannel:
    """Another channel whose sender fails on purpose, at all tensors: to see what becomes of a request.

    Args:
        fault: "corrupt" changes a bit, "drop" ends the connection, "delay" is late by half a second.
    """

    def __init__(self, channel: Channel, fault: str) -> None:
        self._channel, self._fault, self.is_stream = channel, fault, channel.is_stream
        self.send_frame, self.receive_frame = channel.send_frame, channel.receive_frame
        self.receive, self.settle, self.close = channel.receive, channel.settle, channel.close

    def send(self, pieces: Sequence[Tensor], frame: bytes) -> None:
        if self._fault == "drop":
            self.close()
            raise ConnectionError("dropped on purpose")
        if self._fault == "delay":
            time.sleep(DELAY_SECONDS)
        if self._fault == "corrupt":
            pieces = [pieces[0].clone(), *pieces[1:]]
            pieces[0].view(-1)[:1] ^= 1
        self._channel.send(pieces, frame)


def keep_near(connection: socket.socket) -> None:
    """Let little wait in a socket: on one machine the bytes between two processes are better in a cache than in a long
    queue."""
    for which in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, which, NEAR_BYTES)


def _with_length(frame: bytes) -> bytes:
    assert len(frame) <= MAX_FRAME_BYTES
    return len(frame).to_bytes(LENGTH_BYTES, "little") + frame


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return memoryview(tensor.view(-1).numpy())  # type: ignore[arg-type]
