"""kvtool's own processes: how one starts another, and the messages between them."""

import os
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

HEADER_BYTES = 4


def command(module: str, argument: str) -> list[str]:
    """The command line of a process that calls `main(argument)` of a module of kvtool."""
    # Not `-m`: that would import whatever Python files lie in the current folder, a model's among them.
    code = f"import sys; sys.path[0] = sys.argv[2]; from {module} import main; main(sys.argv[1])"
    return [sys.executable, "-c", code, argument, str(Path(__file__).parents[1])]


def cpu_threads(processes: int = 1) -> int:
    """Threads for the model on a CPU, in each of so many processes: one core is left to the HTTP server, because a
    thread that waits for a core that another process holds stops all the others at every operation."""
    return max(1, (len(os.sched_getaffinity(0)) - 1) // processes)


def frame(message: object) -> bytes:
    """`message` as it crosses a socket: a 4-byte little-endian length, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


class Inbox:
    """Frames that have arrived on a socket.

    Attributes:
        bell: another socket, which ends a wait when it is readable; None: there is none.

    Raises:
        EOFError: the other end has closed.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, bytearray()
        self.bell: socket.socket | None = None

    def poll(self) -> Iterator[bytes]:
        """Frames that are here already, before an EOFError."""
        is_open = True
        while is_open and select.select([self._connection], [], [], 0)[0]:
            is_open = self._receive()
        while (body := self._next()) is not None:
            yield body
        if not is_open:
            raise EOFError

    def wait(self) -> Iterator[bytes]:
        """At least one frame, unless the bell rings."""
        while (body := self._next()) is None:
            if self.bell and self.bell in select.select([self._connection, self.bell], [], [])[0]:
                return
            if not self._receive():
                raise EOFError
        yield body
        yield from self.poll()

    def _receive(self) -> bool:
        """Take in what has come; False at the end."""
        try:
            data = self._connection.recv(1 << 20)
        except ConnectionError:  # closed with something unread, which takes nothing from what came before
            return False
        self._buffer += data
        return bool(data)

    def _next(self) -> bytes | None:
        end = HEADER_BYTES + int.from_bytes(self._buffer[:HEADER_BYTES], "little")
        if len(self._buffer) < HEADER_BYTES or len(self._buffer) < end:
            return None
        body = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return body
