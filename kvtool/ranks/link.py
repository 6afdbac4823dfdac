"""A socket between two ranks, by which each also sees whether the other is still there."""

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from threading import Lock

import msgspec

from kvtool.processes import Inbox, frame
from kvtool.ranks.messages import Beat

BEAT_SECONDS = 1.0
SILENT_SECONDS = 6.0  # a rank that says nothing for so long hangs
RANK_0_SILENT_SECONDS = 8.0  # which also prepares grammars, and may be slow to speak meanwhile
STARTING_SECONDS = 60.0  # while it starts: what is imported, allocated or compiled may stop all of its threads
ENDED = "has ended"


class Link:
    """A socket to another rank.

    Attributes:
        name: of that rank, for people.
        heard: when it last said something.
        patience: seconds after which its silence means that it hangs.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.inbox, self.name = connection, Inbox(connection), name
        self.heard, self.patience = time.monotonic(), STARTING_SECONDS
        self._sending = Lock()

    def send(self, message: object) -> None:
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):  # who reads from it will see that it has closed
            self.socket.sendall(data)

    def send_within(self, seconds: float, message: object) -> None:
        """Say something short, unless something else is being said, or the other end does not take it, for so long."""
        if self._sending.acquire(timeout=seconds):
            try:
                if select.select([], [self.socket], [], seconds)[1]:
                    self.socket.sendall(frame(message))
            except OSError:
                pass
            finally:
                self._sending.release()


def watch(
    links: Sequence[Link],
    receive: Callable[[Link, bytes], None],
    lost: Callable[[Link, str], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Take in what comes and tell the others that this rank lives, until one of them does not: `lost` hears why.

    Args:
        look: called once a second, or more often.
    """
    beaten = 0.0
    while True:
        readable = select.select([link.socket for link in links], [], [], BEAT_SECONDS)[0]
        for link in links:
            if link.socket in readable:
                link.heard = time.monotonic()
                try:
                    for body in link.inbox.poll():
                        receive(link, body)
                except (EOFError, OSError):
                    return lost(link, ENDED)
                except msgspec.MsgspecError as error:
                    return lost(link, f"cannot be understood: {error}")
        look()
        now = time.monotonic()
        if now - beaten >= BEAT_SECONDS:
            beaten = now
            for link in links:
                link.send_within(0, Beat())
        for link in links:
            if now - link.heard > link.patience:
                return lost(link, f"has not answered for {link.patience:g} s")
