"""One request served by two engines: this one pushes the KV of prompts that it computes, or takes in that of others.

Where both have one format, the answer is that of one engine. Where the prefill side holds 16 bits and packs for a
decode side of fewer, the prompt's own queries have read full precision where one engine's would have read codes
(`visible(t)` is that of 16 bits until the prompt ends): the answer is what follows from a cache packed behind a 16-bit
prefill, and may differ from the one that the decode side gives alone, as it does to a prompt whose KV has been lost.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kvtool.config import HandoffConfig
from kvtool.errors import ConfigError, RequestError, UnsupportedError
from kvtool.kv.channels import Channel, FaultyChannel
from kvtool.kv.layout import KVLayout
from kvtool.kv.packer import Packer
from kvtool.kv.receiver import Arrival, Loss, Receiver
from kvtool.kv.sender import Push, Sender
from kvtool.kv.shares import Share
from kvtool.kv.staging import Staged
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import dial_tcp
from kvtool.kv.wire import Close, Identity
from kvtool.parallel import Group
from kvtool.request import Export, Import, Memory, Request, ScheduledBatch, ScheduledSpan, Tokens

BEYOND = "the receiver's format cannot hold what the model made of it"

logger = logging.getLogger(__name__)


class WholeStore:
    """A store as other engines see it, with all heads. Where several ranks have shares of it, all of them call this
    alike and in the same order, and the first has the whole.

    Args:
        store: this rank's share.
        whole: layout of all heads.
        tp: those that share the heads; a head that several of them have is taken from each.
    """

    def __init__(self, store: KVStore, whole: KVLayout, tp: Group) -> None:
        self.store, self.layout, self._tp = store, whole, tp
        heads = (whole.spec.key.heads, whole.spec.value.heads)
        self._shares = [
            Share(whole, store.layout, _first_heads(heads, Group(rank, tp.size))) for rank in range(tp.size)
        ]

    def take_blocks(self, layers: range, blocks: Sequence[int]) -> Callable[[int, Tensor], None]:
        """What writes a layer's whole blocks where it is told, on the first rank."""
        store, index = self.store, self.store.index(blocks)
        if self._tp.size == 1:
            return lambda layer, out: store.gather_layer(layer, index, out)
        parts = {}
        for layer in layers:
            store.gather_layer(layer, index, part := self._room(layer, len(blocks)))
            parts[layer] = self._tp.gather(part)

        def write(layer: int, out: Tensor) -> None:
            for share, part in zip(self._shares, parts[layer], strict=True):
                share.into_blocks(layer, part, out)

        return write

    def take_tail(self, slot: int) -> Callable[[Tensor], object]:
        """What writes a whole tail where it is told, on the first rank."""
        tail = self.store.tail(slot)
        if self._tp.size == 1:
            return lambda out: out.copy_(tail)
        parts = self._tp.gather(tail)

        def write(out: Tensor) -> None:
            for share, part in zip(self._shares, parts, strict=True):
                share.into_tail(part, out)

        return write

    def land(self, memory: Memory, staged: Staged | None) -> None:
        """Put the last blocks of a whole sequence, which the first rank has, and its tail where they belong."""
        store, blocks = self.store, memory.blocks
        if self._tp.size == 1:
            assert staged
            staged.store_in(store, blocks, memory.slot)
            return
        device, index = store.blocks.device, store.index(blocks)
        for layer in range(self.layout.spec.num_layers) if blocks else ():
            parts = []
            if staged:
                whole = staged.layers[layer][-len(blocks) :].to(device, non_blocking=True)
                parts = [share.of_blocks(layer, whole) for share in self._shares]
            store.scatter_layer(layer, index, self._tp.scatter(parts, self._room(layer, len(blocks))))
        if self.layout.tail_bytes:
            parts = []
            if staged:
                tail = staged.tail.to(device, non_blocking=True)
                parts = [share.of_tail(tail) for share in self._shares]
            self._tp.scatter(parts, store.tail(memory.slot))
        if staged:
            staged.note_read(device)

    def _room(self, layer: int, num_blocks: int) -> Tensor:
        """For this rank's part of so many blocks."""
        shape = (num_blocks, self.store.layout.layer_block_bytes(layer))
        return torch.empty(shape, dtype=torch.uint8, device=self.store.blocks.device)


def _first_heads(heads: tuple[int, int], place: Group) -> tuple[int, int]:
    """Of keys and of values, the first that a rank has; a single one, such as a latent, all have."""
    key, value = (place.shard(count).start for count in heads)
    return key, value


class Outgoing:
    """What a step yields for other engines: layer by layer while it runs, and the rest when all layers have been
    launched. All ranks that share heads go through it alike.

    Args:
        takers: of the exports, on the first rank.
    """

    def __init__(self, store: WholeStore, exports: Sequence[Export], takers: "Sequence[Parcel] | None" = None) -> None:
        self.exports = exports
        self._store = store
        self._takers: Sequence[Parcel | None] = [None] * len(exports) if takers is None else takers
        self._layers = range(store.layout.spec.num_layers)
        self._num_done = 0  # layers, of those that go one by one

    def on_layer(self, layer: int) -> None:
        """A layer has written its keys and values."""
        for export, taker in zip(self.exports, self._takers, strict=True):
            if export.by_layer:
                self._take(export, taker, range(layer, layer + 1))
        self._num_done = layer + 1

    def finish(self) -> None:
        """All layers have."""
        for export, taker in zip(self.exports, self._takers, strict=True):
            self._take(export, taker, self._layers[self._num_done :] if export.by_layer else self._layers)
            if export.slot >= 0:
                write = self._store.take_tail(export.slot)
                if taker:
                    taker.push.write_tail(write)

    def _take(self, export: Export, taker: "Parcel | None", layers: range) -> None:
        if export.blocks and layers:
            write = self._store.take_blocks(layers, export.blocks)
            if taker:
                taker.take(layers, write)


@dataclass
class Pushed:
    """A request whose KV is on its way to another engine.

    Attributes:
        packer: makes the other's format of ours, where that is another one.
        scheduled: when its first step began; 0 before that.
        is_whole: all of the prompt has been computed.
        faults: whether there was what the other's format cannot hold, as a GPU will have found, [1] int32 each.
    """

    request: Request
    push: Push
    packer: Packer | None
    scheduled: float = 0.0
    is_whole: bool = False
    faults: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Parcel:
    """What one step adds to what is pushed of a request.

    Attributes:
        first_block, end_block: of what is sent; those between are new.
        end_token: of those that have been computed.
        is_last: the prompt ends there.
    """

    pushed: Pushed
    first_block: int
    end_block: int
    end_token: int
    is_last: bool

    @property
    def push(self) -> Push:
        return self.pushed.push

    @classmethod
    def of(cls, pushed: Pushed, span: ScheduledSpan) -> "Parcel":
        fmt, is_last = pushed.push.layout.format, span.end == len(pushed.request.prompt)
        complete = fmt.packed_tokens(span.end) // fmt.block_size
        end = fmt.num_blocks(span.end) if is_last else complete
        return cls(pushed, pushed.push.num_sent[0], end, span.end, is_last)

    @property
    def last_token(self) -> int:
        """Where that ends which is packed on the way."""
        fmt = self.push.layout.format
        return self.end_token if self.is_last else min(self.end_token, self.end_block * fmt.block_size)

    def export(self, span: ScheduledSpan, has_tail: bool) -> Export:
        """What it takes out of the store; with the tail, if there is one, behind the prompt's end."""
        if packer := self.pushed.packer:
            sources = packer.sources(self.first_block, self.last_token)
            return Export(span.blocks[sources.start : sources.stop], -1, by_layer=True)
        blocks = span.blocks[self.first_block : self.end_block]
        # A single token's block is sealed behind the last layer.
        return Export(blocks, span.slot if self.is_last and has_tail else -1, by_layer=span.length > 1)

    def take(self, layers: range, write: Callable[[int, Tensor], None]) -> None:
        """Send the exported blocks of a layer, which `write` puts where it is told."""
        packer = self.pushed.packer
        if packer is None:
            self.push.put(layers, self.end_block, write)
            return
        try:
            for layer in layers:
                self._repack(packer, layer, write)
            self.pushed.faults.append(packer.take_fault())
        except UnsupportedError as error:
            self.push.drop(str(error))

    def _repack(self, packer: Packer, layer: int, write: Callable[[int, Tensor], None]) -> None:
        exact = packer.room(layer, self.first_block, self.last_token)
        write(layer, exact)
        known = (layer, exact, self.first_block, self.last_token)
        self.push.put(range(layer, layer + 1), self.end_block, lambda _, out: packer.pack(*known, out))
        if self.is_last and packer.packed.tail_bytes:
            self.push.write_tail(lambda tail: packer.write_tail(*known, tail))


class Pusher:
    """Sends the KV of prompts on while they are computed: a layer's sealed blocks while the next layer runs. Where this
    engine holds 16 bits, and a receiver fewer, they are packed on the way.

    Raises:
        ConfigError: a peer does not answer in time.
        TransferError: a peer does not fit.
    """

    def __init__(self, config: HandoffConfig, store: WholeStore, identity: Identity, most_bytes: int) -> None:
        self._store = store
        self._pushed: dict[str, Pushed] = {}
        self._senders: dict[str, Sender] = {}
        self._packers: dict[str, Packer] = {}  # for those that have another format
        for peer in config.peers:
            dial = partial(_dial, *split_address("--peer", peer), config.fault)
            sender = Sender(
                peer,
                dial,
                store.layout,
                identity,
                config.secret.encode(),
                device=store.store.blocks.device,
                asked="tcp" if config.fault else config.transfer,
                most_bytes=most_bytes,
            )
            sender.connect(config.timeout)
            self._senders[_resolved(peer)] = sender
            if sender.layout != store.layout:
                memory = store.store.blocks
                self._packers[_resolved(peer)] = Packer(store.layout, sender.layout, store.store.dtype, memory.device)

    def check(self, request: Request) -> None:
        """Raises RequestError if it is to go to nobody we know."""
        assert request.push_to is not None
        if _resolved(request.push_to) not in self._senders:
            names = ", ".join(sender.name for sender in self._senders.values())
            raise RequestError(f"push_to: {request.push_to:.80} is no --peer of this engine; it has {names}", "push_to")

    def begin(self, request: Request) -> None:
        """Announce a request that has been queued."""
        assert request.push_to is not None
        address = _resolved(request.push_to)
        push = self._senders[address].begin(request.id, request.prompt)
        self._pushed[request.id] = Pushed(request, push, self._packers.get(address))

    def abort(self, request_id: str) -> None:
        if pushed := self._pushed.pop(request_id, None):
            pushed.push.drop("it was aborted")

    def outgoing(self, batch: ScheduledBatch) -> Outgoing | None:
        """What a step is to yield; None: nothing."""
        now, exports, parcels = time.perf_counter(), [], []
        for span in batch.spans:
            pushed = self._pushed.get(span.id)
            if pushed and not pushed.push.failed:
                pushed.scheduled = pushed.scheduled or now
                parcel = Parcel.of(pushed, span)
                pushed.is_whole = parcel.is_last
                parcels.append(parcel)
                exports.append(parcel.export(span, self._store.layout.tail_bytes > 0))
        return Outgoing(self._store, exports, parcels) if exports else None

    def follow(self, tokens: Tokens) -> None:
        """A request's first token ends its push; an error does, too."""
        pushed = self._pushed.pop(tokens.id, None)
        if pushed is None:
            return
        if not pushed.is_whole or not tokens.token_ids:
            pushed.push.drop(tokens.error or "it was not computed")
            return
        if pushed.faults and torch.cat(pushed.faults).any():
            pushed.push.drop(BEYOND)
            return
        times = (pushed.scheduled, time.perf_counter())
        pushed.push.close(Close(tokens.token_ids[0], tokens.num_cached_tokens, *times, b""))


class Inlet:
    """Takes in what other engines have computed of the requests that are announced here.

    Attributes:
        address: HOST:PORT where it arrives.
        bell: readable when there is news.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, config: HandoffConfig, store: WholeStore, identity: Identity, most_bytes: int) -> None:
        self._store, self._seconds = store, config.timeout
        self.bell, self._ring = socket.socketpair()
        self.bell.setblocking(False)
        self._ring.setblocking(False)
        self._receiver = Receiver(
            store.layout,
            identity,
            config.secret.encode(),
            device=store.store.blocks.device,
            most_bytes=most_bytes,
            wake=self._wake,
        )
        try:
            listener = socket.create_server((config.host, config.port))
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error.strerror  # Python adds the address once more
            raise ConfigError(
                f"cannot listen for KV on {config.host}, port {config.port}: {why}; change --kv-port"
            ) from error
        self.address = f"{config.host}:{listener.getsockname()[1]}"
        self._receiver.listen(listener)
        self._awaited: dict[str, Request] = {}
        self._landed: dict[str, Arrival] = {}

    @property
    def num_awaited(self) -> int:
        """Requests whose KV has not come."""
        return len(self._awaited)

    def expect(self, request: Request) -> None:
        """A request whose prompt somebody else computes."""
        self._awaited[request.id] = request
        self._receiver.expect(request.id, request.prompt, self._seconds)

    def abort(self, request_id: str) -> None:
        if self._awaited.pop(request_id, None):
            self._receiver.forget(request_id)
        self.release(request_id)

    def release(self, request_id: str) -> None:
        """What has come of a request is in the store, or nobody wants it."""
        if arrival := self._landed.pop(request_id, None):
            self._receiver.staging.give_back(arrival.staged)

    def take(self) -> list[tuple[Request, Arrival | Loss]]:
        """Requests whose waiting has ended since this was last called, and how."""
        with suppress(BlockingIOError):
            while self.bell.recv(4096):
                pass
        news: list[tuple[Request, Arrival | Loss]] = []
        for event in self._receiver.take():
            request = self._awaited.pop(event.id, None)
            if request is None:  # it was aborted a moment ago
                if isinstance(event, Arrival):
                    self._receiver.staging.give_back(event.staged)
                continue
            if isinstance(event, Arrival):
                self._landed[event.id] = event
            else:
                logger.warning("KV transfer: %.80s: %s; its prompt is computed here", event.id, event.reason)
            news.append((request, event))
        return news

    def land(self, imported: Import) -> None:
        """Put what has come of a request into the store; others are told of by `release`."""
        self._store.land(imported.memory, self._landed[imported.id].staged)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it rings already
            self._ring.send(b"!")


def split_address(option: str, address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{option} {address}: is no address; write HOST:PORT")
    return host.strip("[]"), int(port)


def _resolved(address: str) -> str:
    """The address with the host's number: names of one host are many."""
    host, port = split_address("push_to", address)
    with suppress(OSError):
        return f"{socket.gethostbyname(host)}:{port}"
    return address


def _dial(host: str, port: int, fault: str | None) -> Channel:
    channel = dial_tcp(host, port)
    return FaultyChannel(channel, fault) if fault else channel
