"""The receiving end of a transfer: what comes is checked, and only then an engine's to store."""

import hmac
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread

import torch

from kvtool.errors import UnsupportedError
from kvtool.kv.channels import Channel, QueueChannel, SocketChannel
from kvtool.kv.layout import KVLayout
from kvtool.kv.staging import Staged, Staging
from kvtool.kv.transfer import TRANSFERS, Route, meet_as_receiver, select
from kvtool.kv.wire import (
    PINGS,
    Accepted,
    Checksum,
    Choice,
    Close,
    Drop,
    Identity,
    Open,
    Part,
    Peer,
    Ping,
    Pong,
    Received,
    Refused,
    Session,
    Tail,
    TransferError,
    admit,
    token_hash,
)

HANDSHAKE_SECONDS = 10.0
REGISTER_SECONDS = 5.0  # by which the news that a sequence comes may be later than the sequence
WATCH_SECONDS = 0.25
MAX_CONNECTIONS = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """A sequence that has been received and checked.

    Attributes:
        origin: the format that the sender has packed it from; empty where both have one format.
        opened, received: when it was announced, and when all of it was there and checked, on this clock.
        nbytes: that came for it, frames included.
    """

    id: str
    staged: Staged
    close: Close
    origin: str
    opened: float
    received: float
    nbytes: int


@dataclass(frozen=True)
class Loss:
    """A sequence that will not come, and why."""

    id: str
    reason: str


@dataclass
class Expected:
    """A sequence that may come, until `deadline`.

    Attributes:
        session: over which it is coming.
    """

    num_tokens: int
    tokens: bytes
    deadline: float
    session: Session | None = None


class Receiver:
    """Takes in the sequences that are expected, and nothing else.

    Each connection has a thread. What comes of a sequence is an `Arrival` or a `Loss`, in the order of its happening;
    `wake` is called with each, from one of these threads.

    Args:
        layout: of the store that it is for.
        secret: that peers share.
        device: of the store.
        most_bytes: of sequences that have arrived, or are about to, and are in no store yet.
    """

    def __init__(
        self,
        layout: KVLayout,
        identity: Identity,
        secret: bytes,
        *,
        device: torch.device | str = "cpu",
        most_bytes: int = 4 << 30,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout, self.identity = layout, identity
        self._secret, self._device, self._wake = secret, torch.device(device), wake
        self.staging = Staging(layout, self._device, most_bytes)
        self.transfers: list[str] = []  # of the connections that came, in order
        self._expected: dict[str, Expected] = {}
        self._changed = Condition()
        self._events: deque[Arrival | Loss] = deque()
        self._channels: set[Channel] = set()
        self._listener: socket.socket | None = None
        self._closed = False
        Thread(target=self._watch, daemon=True).start()

    def listen(self, listener: socket.socket) -> None:
        """Take connections from a bound socket."""
        listener.listen()
        self._listener = listener
        Thread(target=self._accept, args=[listener], daemon=True).start()

    def attach(self) -> Channel:
        """A way here for a sender in this process."""
        theirs, ours = QueueChannel.pair()
        self._serve_beside(ours)
        return theirs

    def expect(self, request_id: str, token_ids: Sequence[int], seconds: float) -> None:
        """Let a sequence of these computed tokens come, once, within so many seconds; else it is lost."""
        with self._changed:
            self._expected[request_id] = Expected(len(token_ids), token_hash(token_ids), time.perf_counter() + seconds)
            self._changed.notify_all()

    def forget(self, request_id: str) -> None:
        """Nobody wants the sequence any more."""
        with self._changed:
            expected = self._expected.pop(request_id, None)
        if expected and expected.session:
            expected.session.channel.close()

    def take(self) -> list[Arrival | Loss]:
        """What has happened since this was last called; what is staged of an arrival is the caller's to give
        back."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def close(self) -> None:
        """End all connections."""
        with self._changed:
            self._closed = True
            channels = list(self._channels)
            self._changed.notify_all()
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for channel in channels:
            channel.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if len(self._channels) >= MAX_CONNECTIONS:
                logger.warning("KV transfer: %d connections at once; one more is refused", MAX_CONNECTIONS)
                connection.close()
                continue
            channel = SocketChannel(connection)
            channel.limit(HANDSHAKE_SECONDS)
            self._serve_beside(channel)

    def _serve_beside(self, channel: Channel) -> None:
        with self._changed:
            self._channels.add(channel)
        Thread(target=self._serve, args=[channel], daemon=True).start()

    def _serve(self, channel: Channel) -> None:
        """One connection, from its first to its last frame."""
        # On a GPU beside what the engine computes, not behind it.
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                session, on_device, origin = self._meet(channel)
                while True:
                    self._take_sequence(session, on_device, origin)
        except (OSError, TransferError) as error:
            if isinstance(error, TransferError):
                logger.warning("KV transfer: refused: %s", error)
        finally:
            with self._changed:
                self._channels.discard(channel)
            channel.close()

    def _meet(self, channel: Channel) -> tuple[Session, bool, str]:
        """A session, whether tensors arrive on the device, and the sender's own format where it is another one."""
        session = admit(channel, self._secret)
        peer = session.hear(Peer)
        if not self.identity.takes(peer.identity):
            session.say(Refused(peer.identity.difference(self.identity)))
            raise TransferError(f"a peer: {self.identity.difference(peer.identity)}")
        route = Route(self._device.type, peer.device, isinstance(channel, QueueChannel))
        transfers = [t.name for t in TRANSFERS if t.refuses(route) is None]
        session.say(Peer(self.identity, self.layout.format, self._device.type, transfers))
        chosen = session.hear(Choice).transfer
        try:
            transfer = select(route, chosen)
        except UnsupportedError as error:
            session.say(Refused(str(error)))
            raise TransferError(str(error)) from error
        meet_as_receiver(session, transfer, self._device)
        self.transfers.append(transfer.name)
        for _ in range(PINGS):
            session.hear(Ping)
            session.say(Pong(time.perf_counter()))
        if isinstance(channel, SocketChannel):
            channel.limit(0)  # a connection may be idle; `_watch` ends those that keep a sequence
        origin = "" if peer.identity.layout == self.identity.layout else peer.identity.kv_format
        return session, transfer.lands_on_device, origin

    def _take_sequence(self, session: Session, on_device: bool, origin: str) -> None:
        """The next sequence of a connection.

        Raises:
            OSError: the peer has gone.
            TransferError: it breaks off in a place from which the connection cannot go on.
        """
        opening = session.hear(Open)
        begun, before = time.perf_counter(), session.nbytes
        staged, reason = self._admit(session, opening, on_device)
        if staged is None:
            logger.warning("KV transfer: refused %.80r: %s", opening.id, reason)
            session.say(Refused(reason))
            return
        session.say(Accepted())
        try:
            close = self._fill(session, staged)
        except (OSError, TransferError) as error:
            with suppress(OSError):
                session.say(Refused(str(error)))
            session.channel.close()  # or a GPU might still receive into what is given back
            self._finish(opening.id, Loss(opening.id, str(error)), staged)
            raise
        if isinstance(close, Drop):
            self._finish(opening.id, Loss(opening.id, close.reason), staged)
            return
        received = time.perf_counter()
        arrival = Arrival(opening.id, staged, close, origin, begun, received, session.nbytes - before)
        if self._finish(opening.id, arrival, None):
            session.say(Received())
        else:
            self.staging.give_back(staged)
            session.say(Refused("nobody waits for it any more"))

    def _admit(self, session: Session, opening: Open, on_device: bool) -> tuple[Staged | None, str]:
        """Memory for a sequence that is expected as it is; or None, and why not."""
        layout = self.layout
        with self._changed:
            self._changed.wait_for(lambda: opening.id in self._expected or self._closed, REGISTER_SECONDS)
            expected = self._expected.get(opening.id)
            if expected is None or expected.session:
                return None, "an unknown request"
            sizes = (opening.num_tokens, opening.num_blocks, opening.block_bytes, opening.tail_bytes)
            ours = (
                expected.num_tokens,
                layout.format.num_blocks(expected.num_tokens),
                layout.block_bytes,
                layout.tail_bytes,
            )
            if sizes != ours:
                return None, f"tokens, blocks, bytes of a block and of a tail are {sizes}, but should be {ours}"
            if not hmac.compare_digest(opening.tokens, expected.tokens):
                return None, "other tokens than those of the request"
            staged = self.staging.take(expected.num_tokens, on_device)
            if staged is None:
                return None, f"no room: {self.staging.free_bytes} bytes are free"
            expected.session = session
        return staged, ""

    def _fill(self, session: Session, staged: Staged) -> Close | Drop:
        """Receive all parts and the tail, and check them."""
        num_layers, num_blocks = len(staged.layers), len(staged.layers[0])
        have = [0] * num_layers  # blocks of each layer, from the first
        lacks_tail, total = len(staged.tail) > 0, Checksum()
        while isinstance(message := session.hear(Part | Tail | Close | Drop), Part | Tail):
            if isinstance(message, Tail):
                if not lacks_tail:
                    raise TransferError("a tail that is not due")
                session.receive([staged.tail], total)
                lacks_tail = False
                continue
            layers = range(message.first_layer, message.end_layer)
            inside = 0 <= message.first_layer < message.end_layer <= num_layers and message.end_block <= num_blocks
            if not inside or not all(have[layer] == message.first_block < message.end_block for layer in layers):
                raise TransferError("a part that is not the next of its layers")
            session.receive(staged.part(layers, message.first_block, message.end_block), total)
            for layer in layers:
                have[layer] = message.end_block
        session.channel.settle()
        if isinstance(message, Close):
            if lacks_tail or have != [num_blocks] * num_layers:
                raise TransferError("parts are missing")
            if not hmac.compare_digest(message.checksum, total.digest()):
                raise TransferError("bytes whose checksum is wrong")
        assert isinstance(message, Close | Drop)
        return message

    def _finish(self, request_id: str, event: Arrival | Loss, unused: Staged | None) -> bool:
        """Say what has come of a sequence, if anybody still waits."""
        if unused:
            self.staging.give_back(unused)
        with self._changed:
            if self._expected.pop(request_id, None) is None:
                return False
            self._events.append(event)
        self._wake()
        return True

    def _watch(self) -> None:
        """Give up what does not come in time."""
        while not self._closed:
            time.sleep(WATCH_SECONDS)
            now = time.perf_counter()
            with self._changed:
                late = {name: e for name, e in self._expected.items() if e.deadline < now}
            for name, expected in late.items():
                if expected.session:
                    expected.session.channel.close()
                self._finish(name, Loss(name, "it did not come in time"), None)
