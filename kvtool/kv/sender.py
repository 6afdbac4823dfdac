"""The sending end of a transfer: sequences are pushed while they are computed."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock, Thread

import msgspec
import torch
from torch import Tensor

from kvtool.errors import ConfigError, UnsupportedError
from kvtool.kv.channels import Channel, QueueChannel, SocketChannel
from kvtool.kv.layout import KVLayout
from kvtool.kv.staging import Staged, Staging
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import IDLE_SECONDS, Route, Transfer, meet_as_sender, select
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
    Refusal,
    Session,
    Tail,
    TransferError,
    greet,
    token_hash,
)

RETRY_SECONDS = 0.25
PART_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of several layers, so that some are sent while others are gathered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A message and the bytes behind it, gathered.

    Attributes:
        ready: when they are there, on a GPU.
    """

    message: Part | Tail
    tensors: list[Tensor]
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, message: Part | Tail, tensors: list[Tensor]) -> "Piece":
        device = tensors[0].device
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return cls(message, tensors, ready)


@dataclass
class Push:
    """A sequence on its way: what is put here is sent as soon as its peer takes it.

    Attributes:
        layout: of what is sent.
        staging: where what is put waits.
        num_sent: blocks of each layer that have been put, from the first.
        total: checksum of what has been put.
        staged: room for all of it, once something has been put.
        failed: it does not arrive; what is put is forgotten.
    """

    opening: Open
    layout: KVLayout
    staging: Staging
    num_sent: list[int]
    total: Checksum = field(default_factory=Checksum)
    staged: Staged | None = None
    pieces: "SimpleQueue[Piece | Close | Drop]" = field(default_factory=SimpleQueue)
    failed: bool = False
    _lock: Lock = field(default_factory=Lock)
    _ended: Event = field(default_factory=Event)

    def put_blocks(self, layers: range, end_block: int, store: KVStore, blocks: Sequence[int]) -> None:
        """Send what is new of the first `end_block` of the sequence's `blocks`, in `layers` that are equally far."""
        index = store.index(blocks[self.num_sent[layers.start] : end_block])
        self.put(layers, end_block, lambda layer, out: store.gather_layer(layer, index, out))

    def put(self, layers: range, end_block: int, write: Callable[[int, Tensor], None]) -> None:
        """Send what is new of the first `end_block` blocks, in `layers` that are equally far.

        Args:
            write: puts a layer's part of the new ones, [n, layer_block_bytes] uint8, where it is told.
        """
        first = self.num_sent[layers.start]
        staged = self._room() if end_block > first else None
        if staged is None:
            return
        nbytes, start = 0, layers.start
        for layer in layers:
            write(layer, out := staged.layers[layer][first:end_block])
            self.num_sent[layer], nbytes = end_block, nbytes + out.nbytes
            if layer + 1 == layers.stop or nbytes + out.nbytes > PART_BYTES[out.device.type]:
                part = Part(start, layer + 1, first, end_block)
                self._send(part, staged.part(range(start, layer + 1), first, end_block))
                nbytes, start = 0, layer + 1

    def put_tail(self, tail: Tensor) -> None:
        """Keep the tail, which goes last."""
        self.write_tail(lambda room: room.copy_(tail))

    def write_tail(self, write: Callable[[Tensor], object]) -> None:
        """Let the tail, or some of it, be written where it waits."""
        if staged := self._room():
            write(staged.tail)

    def close(self, closing: Close) -> None:
        """Send the tail and the first token; all blocks have been put."""
        if staged := self._room():
            if len(staged.tail):
                self._send(Tail(), [staged.tail])
            self.pieces.put(closing)

    def drop(self, reason: str) -> None:
        """It is not to arrive."""
        self.failed = True
        self.pieces.put(Drop(reason))

    def _send(self, message: Part | Tail, tensors: list[Tensor]) -> None:
        self.pieces.put(Piece.of(message, tensors))
        self.total.add(tensors)  # while a core's cache has them

    def _room(self) -> Staged | None:
        """Where it waits; None: it does not arrive, for one because there is none."""
        with self._lock:
            if self.staged is None and not self.failed:
                self.staged = self.staging.take(self.opening.num_tokens, on_device=True)
                if self.staged is None:
                    self.drop(f"too much waits to be sent: {self.staging.free_bytes} bytes are free")
            return self.staged

    def end(self, failed: bool) -> None:
        """The sender is done with it; what still comes has no room any more."""
        with self._lock:
            self.failed |= failed
            staged, self.staged = self.staged, None
        if staged:
            self.staging.give_back(staged, again=not self.failed)
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has arrived; returns at once when that is known."""
        return self._ended.wait(seconds) and not self.failed


class Sender:
    """Pushes sequences to one receiver, over a few connections that last.

    Args:
        name: of the peer, for errors.
        layout: of the store that is sent from.
        dial: opens a way to it; raises an OSError while there is none.
        asked: transfer, "auto" or by name.
        most_bytes: of sequences that have been computed and wait for the peer.

    Attributes:
        layout: of what is sent, which is the receiver's, and known once it is connected; it differs from that of the
            store where that is exact.
    """

    def __init__(
        self,
        name: str,
        dial: Callable[[], Channel],
        layout: KVLayout,
        identity: Identity,
        secret: bytes,
        *,
        device: torch.device | str = "cpu",
        asked: str = "auto",
        most_bytes: int = 4 << 30,
    ) -> None:
        self.name, self.layout, self.identity = name, layout, identity
        self._own, self._most_bytes = layout, most_bytes
        self._dial, self._secret, self._device, self._asked = dial, secret, torch.device(device), asked
        self._waiting: SimpleQueue[Push | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._links: list[Link] = []
        self._lock = Lock()
        self._staging = Staging(layout, self._device, most_bytes)
        self.transfer: Transfer | None = None

    def connect(self, seconds: float) -> None:
        """Open the first connection, trying for so long.

        Raises:
            ConfigError: nobody answers.
            TransferError: the peer does not fit.
        """
        deadline = time.perf_counter() + seconds
        while True:
            try:
                link = self._link()
                break
            except OSError as error:
                if time.perf_counter() > deadline:
                    why = "it says nothing" if isinstance(error, BlockingIOError) else error.strerror or str(error)
                    raise ConfigError(
                        f"--peer {self.name}: no decode side answers there ({why}; tried for {seconds:g} s); start it, "
                        "and give the address of its --kv-port"
                    ) from error
                time.sleep(RETRY_SECONDS)
        self.transfer = link.transfer
        if link.layout != self.layout:
            self.layout, self._staging = link.layout, Staging(link.layout, self._device, self._most_bytes)
        with self._lock:
            self._links.append(link)
        for _ in range(link.transfer.connections):
            thread = Thread(target=self._run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin(self, request_id: str, token_ids: Sequence[int]) -> Push:
        """Announce a sequence of these computed tokens."""
        layout = self.layout
        num_blocks = layout.format.num_blocks(len(token_ids))
        sizes = (len(token_ids), num_blocks, layout.block_bytes, layout.tail_bytes)
        opening = Open(request_id, token_hash(token_ids), *sizes)
        push = Push(opening, layout, self._staging, [0] * layout.spec.num_layers)
        self._waiting.put(push)
        return push

    def close(self) -> None:
        """Send what has been put, and end."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(IDLE_SECONDS)
        for link in self._links:
            link.session.channel.close()

    def _run(self) -> None:
        """One connection's thread: a sequence at a time."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        while (push := self._waiting.get()) is not None:
            link: Link | None = None
            try:
                with self._lock:
                    link = self._links.pop() if self._links else None
                link = link or self._link()
                with torch.cuda.stream(stream):  # None: no other
                    link.carry(push)
                push.end(failed=False)
            except (TransferError, OSError) as error:
                push.end(failed=True)
                logger.warning("KV transfer: %.80r does not reach %s: %s", push.opening.id, self.name, error)
            if link and link.is_good:
                with self._lock:
                    self._links.append(link)
            elif link:
                link.session.channel.close()

    def _link(self) -> "Link":
        channel = self._dial()
        try:
            session = greet(channel, self._secret)
            session.say(Peer(self.identity, self._own.format, self._device.type, []))
            peer = session.hear(Peer)
            layout = peer.layout(self._own.spec)
            if self.transfer and layout != self.layout:
                raise TransferError("it has another KV format than before; start this side again")
            route = Route(self._device.type, peer.device, isinstance(channel, QueueChannel))
            transfer = select(route, self._asked, peer.transfers)
            session.say(Choice(transfer.name))
            meet_as_sender(session, transfer, self._device)
            offsets = []
            for _ in range(PINGS):
                sent = time.perf_counter()
                session.say(Ping())
                clock = session.hear(Pong).clock
                gone = time.perf_counter() - sent
                offsets.append((gone, clock - sent - gone / 2))
        except (TransferError, UnsupportedError) as error:
            channel.close()
            raise TransferError(f"--peer {self.name}: {error}") from error
        except BaseException:
            channel.close()
            raise
        gone, offset = min(offsets)
        if isinstance(channel, SocketChannel):
            channel.limit(IDLE_SECONDS)
        # Less than what is uncertain about it is none: on one machine the clock is the same.
        return Link(session, transfer, layout, offset if abs(offset) > gone / 2 else 0.0)


class Link:
    """One connection of a sender.

    Attributes:
        layout: of the receiver's store.
        clock_offset: seconds that the receiver's clock is ahead, measured on the quickest of a few round trips.
        is_good: can take another sequence.
    """

    def __init__(self, session: Session, transfer: Transfer, layout: KVLayout, clock_offset: float) -> None:
        self.session, self.transfer, self.layout, self.clock_offset = session, transfer, layout, clock_offset
        self.is_good = True

    def carry(self, push: Push) -> None:
        """Send a sequence while it is being computed.

        Raises:
            TransferError: the peer refuses it; the connection is good as long as it had not begun.
            OSError: the peer has gone.
        """
        session = self.session
        self.is_good = False  # until all of it is through
        session.say(push.opening)
        try:
            session.hear(Accepted)
        except Refusal:
            self.is_good = True
            raise
        while isinstance(piece := push.pieces.get(), Piece):
            if piece.ready:
                torch.cuda.current_stream().wait_event(piece.ready)
            session.send(piece.message, piece.tensors)
        if isinstance(piece, Drop):
            session.say(piece)
        else:
            times = {name: getattr(piece, name) + self.clock_offset for name in ("scheduled", "prefilled")}
            session.say(msgspec.structs.replace(piece, **times, checksum=push.total.digest()))
            session.hear(Received)
        self.is_good = True
