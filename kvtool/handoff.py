"""One request served by two engines: this one pushes the KV of prompts that it computes, or takes in that of others."""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from kvtool.config import HandoffConfig
from kvtool.errors import ConfigError, RequestError
from kvtool.kv.channels import Channel, FaultyChannel
from kvtool.kv.receiver import Arrival, Loss, Receiver
from kvtool.kv.sender import Push, Sender
from kvtool.kv.staging import Staged
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import dial_tcp
from kvtool.kv.wire import Close, Identity
from kvtool.request import Request, ScheduledBatch, ScheduledSpan, Tokens

logger = logging.getLogger(__name__)


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


class Pusher:
    """Sends the KV of prompts on while they are computed: a layer's sealed blocks while the next layer runs.

    Raises:
        ConfigError: a peer does not answer in time.
        TransferError: a peer does not fit.
    """

    def __init__(self, config: HandoffConfig, store: KVStore, identity: Identity, most_bytes: int) -> None:
        self._store, self._format = store, store.format
        self._layers = range(store.layout.spec.num_layers)
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
                device=store.blocks.device,
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

    def on_layer(self, batch: ScheduledBatch) -> Callable[[int], None] | None:
        """What is to be done in a step when a layer has written its keys and values; None: nothing."""
        now = time.perf_counter()
        work = []
        for span in batch.spans:
            if pushed := self._pushed.get(span.id):
                pushed.scheduled = pushed.scheduled or now
                if span.length > 1:  # a single token's block is sealed behind the last layer
                    work.append((pushed, span))

        def send(layer: int) -> None:
            for pushed, span in work:
                self._put(pushed, span, range(layer, layer + 1))

        return send if work else None

    def launched(self, batch: ScheduledBatch) -> None:
        """All layers of a step have been launched: send what no layer has, and keep the tails of whole prompts."""
        for span in batch.spans:
            if pushed := self._pushed.get(span.id):
                self._put(pushed, span, self._layers)
                if span.end == len(pushed.request.prompt):
                    pushed.push.put_tail(self._store.tail(span.slot))
                    pushed.is_whole = True

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

    def _put(self, pushed: Pushed, span: ScheduledSpan, layers: range) -> None:
        whole = span.end == len(pushed.request.prompt)
        complete = self._format.packed_tokens(span.end) // self._format.block_size
        end_block = self._format.num_blocks(span.end) if whole else complete
        pushed.push.put_blocks(layers, end_block, self._store, span.blocks)


class Inlet:
    """Takes in what other engines have computed of the requests that are announced here.

    Attributes:
        address: HOST:PORT where it arrives.
        bell: readable when there is news.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, config: HandoffConfig, store: KVStore, identity: Identity, most_bytes: int) -> None:
        self._seconds = config.timeout
        self.bell, self._ring = socket.socketpair()
        self.bell.setblocking(False)
        self._ring.setblocking(False)
        self._receiver = Receiver(
            store.layout,
            identity,
            config.secret.encode(),
            device=store.blocks.device,
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

    @property
    def landings(self) -> dict[str, Staged]:
        """What has come, and is in no store yet, by request."""
        return {request_id: arrival.staged for request_id, arrival in self._landed.items()}

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
