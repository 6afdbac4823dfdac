"""One request served by two engines: this one pushes the KV of prompts that it computes, or takes in that of others."""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.config import HandoffConfig
from kvtool.errors import ConfigError, RequestError
from kvtool.kv.channels import Channel, FaultyChannel
from kvtool.kv.layout import KVLayout
from kvtool.kv.receiver import Arrival, Loss, Receiver
from kvtool.kv.sender import Push, Sender
from kvtool.kv.shares import Share
from kvtool.kv.staging import Staged
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import dial_tcp
from kvtool.kv.wire import Close, Identity
from kvtool.parallel import Group
from kvtool.request import Export, Import, Memory, Request, ScheduledBatch, ScheduledSpan, Tokens

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
            part = torch.empty(
                len(blocks), store.layout.layer_block_bytes(layer), dtype=torch.uint8, device=index.device
            )
            store.gather_layer(layer, index, part)
            parts[layer] = self._tp.gather(part)

        def write(layer: int, out: Tensor) -> None:
            for share, part in zip(self._shares, parts[layer], strict=True):
                share.into_blocks(layer, part, out)

        return write

    def take_tail(self, slot: int) -> Callable[[Tensor], None]:
        """What writes a whole tail where it is told, on the first rank."""
        parts = self._tp.gather(self.store.tail(slot))

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
        deliver: takes what the first rank has of an export, by its index, once for each of its parts; None on others.
    """

    def __init__(self, store: WholeStore, exports: Sequence[Export], deliver: "Deliver | None" = None) -> None:
        self.exports = exports
        self._store, self._deliver = store, deliver
        self._layers = range(store.layout.spec.num_layers)
        self._num_done = 0  # layers, of those that go one by one

    def on_layer(self, layer: int) -> None:
        """A layer has written its keys and values."""
        for index, export in enumerate(self.exports):
            if export.by_layer:
                self._take(index, range(layer, layer + 1))
        self._num_done = layer + 1

    def finish(self) -> None:
        """All layers have."""
        for index, export in enumerate(self.exports):
            self._take(index, self._layers[self._num_done :] if export.by_layer else self._layers)
            if export.slot >= 0:
                tail = self._store.take_tail(export.slot)
                if self._deliver:
                    self._deliver.tail(index, tail)

    def _take(self, index: int, layers: range) -> None:
        if self.exports[index].blocks and layers:
            write = self._store.take_blocks(layers, self.exports[index].blocks)
            if self._deliver:
                self._deliver.blocks(index, layers, write)


class Deliver(Protocol):
    """Who is given what a step yields for other engines: what writes it where it is to be."""

    def blocks(self, export: int, layers: range, write: Callable[[int, Tensor], None]) -> None: ...

    def tail(self, export: int, write: Callable[[Tensor], None]) -> None: ...


@dataclass
class Pushed:
    """A request whose KV is on its way to another engine.

    Attributes:
        scheduled: when its first step began; 0 before that.
        is_whole: all of the prompt has been computed.
    """

    request: Request
    push: Push
    scheduled: float = 0.0
    is_whole: bool = False

    def end_block(self, span: ScheduledSpan) -> int:
        """Blocks that are complete behind a span, or what there is where that is the prompt's last."""
        fmt = self.push.layout.format
        is_last = span.end == len(self.request.prompt)
        return fmt.num_blocks(span.end) if is_last else fmt.packed_tokens(span.end) // fmt.block_size


class Parcels(NamedTuple):
    """What is exported of a step's requests, in their order, up to which block."""

    pushed: list[Pushed]
    end_blocks: list[int]

    def blocks(self, export: int, layers: range, write: Callable[[int, Tensor], None]) -> None:
        self.pushed[export].push.put(layers, self.end_blocks[export], write)

    def tail(self, export: int, write: Callable[[Tensor], None]) -> None:
        self.pushed[export].push.write_tail(write)


class Pusher:
    """Sends the KV of prompts on while they are computed: a layer's sealed blocks while the next layer runs.

    Raises:
        ConfigError: a peer does not answer in time.
        TransferError: a peer does not fit.
    """

    def __init__(self, config: HandoffConfig, store: WholeStore, identity: Identity, most_bytes: int) -> None:
        self._store = store
        self._pushed: dict[str, Pushed] = {}
        self._senders: dict[str, Sender] = {}
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

    def check(self, request: Request) -> None:
        """Raises RequestError if it is to go to nobody we know."""
        assert request.push_to is not None
        if _resolved(request.push_to) not in self._senders:
            names = ", ".join(sender.name for sender in self._senders.values())
            raise RequestError(f"push_to: {request.push_to:.80} is no --peer of this engine; it has {names}", "push_to")

    def begin(self, request: Request) -> None:
        """Announce a request that has been queued."""
        assert request.push_to is not None
        push = self._senders[_resolved(request.push_to)].begin(request.id, request.prompt)
        self._pushed[request.id] = Pushed(request, push)

    def abort(self, request_id: str, reason: str = "it was aborted") -> None:
        if pushed := self._pushed.pop(request_id, None):
            pushed.push.drop(reason)

    def outgoing(self, batch: ScheduledBatch) -> Outgoing | None:
        """What a step is to yield; None: nothing."""
        now, exports, parcels = time.perf_counter(), [], Parcels([], [])
        for span in batch.spans:
            pushed = self._pushed.get(span.id)
            if pushed is None:
                continue
            pushed.scheduled = pushed.scheduled or now
            pushed.is_whole = span.end == len(pushed.request.prompt)
            end = pushed.end_block(span)
            blocks = span.blocks[pushed.push.num_sent[0] : end]
            slot = span.slot if pushed.is_whole and self._store.layout.tail_bytes else -1
            # A single token's block is sealed behind the last layer.
            exports.append(Export(blocks, slot, by_layer=span.length > 1))
            parcels.pushed.append(pushed)
            parcels.end_blocks.append(end)
        return Outgoing(self._store, exports, parcels) if exports else None

    def follow(self, tokens: Tokens) -> None:
        """A request's first token ends its push; an error does, too."""
        pushed = self._pushed.pop(tokens.id, None)
        if pushed is None:
            return
        if not pushed.is_whole or not tokens.token_ids:
            pushed.push.drop(tokens.error or "it was not computed")
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
            raise ConfigError(
                f"cannot listen for KV on {config.host}, port {config.port}: {error.strerror}; change --kv-port"
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
