"""Packed KV on its way from one store to another: what is sent, who may send it, and over what.

A prefill side *pushes* a sequence's sealed blocks while it still computes, layer by layer, then its tail and its first
token. Each sequence travels alone over one of a few connections, so that what is refused costs that sequence only:

    Hello, Welcome, Proof     both know the secret: HMAC-SHA256 over both nonces, which also give the session's key
    Peer, Peer                model and format must be the same, or the sender holds 16 bits and packs what it sends in
                              the receiver's format; it chooses a transfer that both take
    Choice, Pong …            the choice; the offset of the clocks
    Open → Accepted           for each sequence: tokens, their hash, sizes; the receiver must expect just that
      Part, bytes …             layers and blocks
      Tail, bytes               where the format has one
      Close                     first token and times; a checksum of all the bytes
    → Received

Frames are msgpack of at most 64 KiB, each with a MAC under the session's key and its number, so that a frame recorded
elsewhere or before is no frame here. Bytes go into memory of their own, in the places and of the sizes that the
receiver has worked out for itself; one checksum at the end lets a GPU sum them up while others are on their way, and
nothing reaches a store before it is found right. The MAC covers the checksum and not the bytes: it is no guard against
somebody who rewrites them on their way, which needs a network that encrypts.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from kvtool.errors import KVToolError
from kvtool.kv.blocks import block_digest
from kvtool.kv.channels import Channel
from kvtool.kv.format import KVFormat, StreamFormat
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec

VERSION = 3
MAX_TOKENS = 1 << 20  # of a block, or a window
NONCE_BYTES = MAC_BYTES = 32
PINGS = 5  # by which the offset of the clocks is found
ROW_WORDS = 1024  # of 8 bytes, to one sum of a checksum
PORTION_BYTES = 1 << 20  # whole rows


class TransferError(KVToolError):
    """A transfer that cannot be; costs the sequence that was to travel."""


class Refusal(TransferError):
    """The peer's word that it does not take what was offered; the connection is good for another."""


# What is said, in order


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    version: int
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    nonce: bytes
    mac: bytes


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    mac: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


class Identity(msgspec.Struct, frozen=True):
    """What must fit at both ends.

    Attributes:
        model: fingerprint of configuration and weights; behind a space, how weights are kept.
        values: fingerprint of what is cached of a token, before it is packed: shape and dtype.
        kv_format: for people.
        layout: fingerprint of all bytes: values and format.
        is_exact: nothing is packed.
    """

    model: str
    values: str
    kv_format: str
    layout: str
    is_exact: bool

    @classmethod
    def of(cls, model: str, layout: KVLayout, dtype: torch.dtype) -> "Identity":
        values = hashlib.sha256(repr((layout.spec, dtype)).encode()).hexdigest()
        name = f"{layout.format.describe_layers()}, {str(dtype).removeprefix('torch.')}"
        return cls(model, values, name, _layout_fingerprint(values, layout.format), layout.format.is_exact)

    def takes(self, sender: "Identity") -> bool:
        """Sequences of `sender` can be ours, as they are or packed by it."""
        same = self.layout == sender.layout or (sender.is_exact and self.values == sender.values)
        return self.model == sender.model and same

    def difference(self, other: "Identity") -> str:
        """How `other` is not like this."""
        if self.model != other.model:
            theirs, ours = other.model.partition(" ")[0], self.model.partition(" ")[0]
            if theirs == ours:
                return "it keeps the model's weights otherwise; start both with the same options of it"
            return f"it has another model ({theirs[:12]}, here {ours[:12]}); start both with one --model"
        return (
            f"its KV format is {other.kv_format}; here it is {self.kv_format}; start both with the same options, or "
            "prefill with 16 bits"
        )


def _layout_fingerprint(values: str, fmt: KVFormat) -> str:
    return hashlib.sha256(f"{values} {fmt!r}".encode()).hexdigest()


class Peer(msgspec.Struct, frozen=True, tag="peer"):
    """Who one is, how one stores KV, and which transfers one takes, best first."""

    identity: Identity
    format: KVFormat
    device: str
    transfers: list[str]

    def layout(self, spec: KVSpec) -> KVLayout:
        """What it stores of a model of `spec`.

        Raises:
            TransferError: its format is none of such a model, or not the one of its identity.
        """
        fmt, sizes = self.format, (self.format.block_size, self.format.residual)
        streams = [
            (pair, dim)
            for layer in fmt.layers
            for pair, dim in ((layer.key, spec.key.dim), (layer.value, spec.value.dim))
        ]
        if (
            len(fmt.layers) != spec.num_layers
            or not (0 < sizes[0] <= MAX_TOKENS and 0 <= sizes[1] <= MAX_TOKENS and sizes[1] % sizes[0] == 0)
            or not all(_is_possible(stream, dim, sizes[0]) for stream, dim in streams)
            or self.identity.layout != _layout_fingerprint(self.identity.values, fmt)
        ):
            raise TransferError("its KV format is none of this model")
        return KVLayout(spec, fmt)


def _is_possible(stream: StreamFormat, dim: int, block_size: int) -> bool:
    if stream.bits == "16":
        return True
    if stream.axis == "channel":
        return stream.bits != "fp8" and stream.group == block_size
    return stream.group > 0 and dim % stream.group == 0


class Choice(msgspec.Struct, frozen=True, tag="choice"):
    transfer: str


class Meeting(msgspec.Struct, frozen=True, tag="meeting"):
    """Where a transfer's own connection begins: a port of the receiver's; 0 where there is none."""

    port: int


class Window(msgspec.Struct, frozen=True, tag="window"):
    """Where NIXL may write: a device of -1 is the host."""

    metadata: bytes
    address: int
    device: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    clock: float


class Open(msgspec.Struct, frozen=True, tag="open"):
    """A sequence comes, of `num_tokens` computed tokens whose hash is `tokens`."""

    id: str
    tokens: bytes
    num_tokens: int
    num_blocks: int
    block_bytes: int
    tail_bytes: int


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Part(msgspec.Struct, frozen=True, tag="part"):
    """Bytes follow: layer by layer, from `first_layer` to `end_layer`, blocks `first_block` to `end_block`."""

    first_layer: int
    end_layer: int
    first_block: int
    end_block: int


class Tail(msgspec.Struct, frozen=True, tag="tail"):
    """The tail's bytes follow."""


class Close(msgspec.Struct, frozen=True, tag="close"):
    """All has been sent.

    Attributes:
        first_token: what the prompt was answered with.
        num_cached_tokens: of the prompt, that the sender need not compute.
        scheduled, prefilled: when the first step with this prompt began, and when the first token was there, on the
            receiver's clock.
        checksum: of all bytes of the sequence, in the order in which they were sent.
    """

    first_token: int
    num_cached_tokens: int
    scheduled: float
    prefilled: float
    checksum: bytes


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """The sequence does not come after all."""

    reason: str


class Received(msgspec.Struct, frozen=True, tag="received"):
    pass


def token_hash(token_ids: Sequence[int]) -> bytes:
    """SHA-256 of a sequence's tokens."""
    return block_digest(b"", token_ids)


class Checksum:
    """SHA-256 of sums of 8 KiB each (as 64-bit words, modulo 2^64) of uint8 tensors, whose sizes divide by 8.

    Finds what goes wrong on the way at the speed of memory, on a GPU as well: any change within a word, and rows that
    are lost, doubled or in the wrong place. A tensor may be added in portions of whole rows. A GPU sums up beside what
    the current stream does next, and the host waits for it once, for the digest.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Add what is there, or will be when the current stream has come so far."""
        if pieces[0].is_cuda:
            self._stream = self._stream or torch.cuda.Stream(pieces[0].device)
            self._stream.wait_stream(torch.cuda.current_stream(pieces[0].device))
        with torch.cuda.stream(self._stream):  # None: no other
            for piece in pieces:
                words = piece.view(-1).view(torch.int64)
                whole = len(words) // ROW_WORDS * ROW_WORDS
                for rows in (words[:whole].view(-1, ROW_WORDS), words[whole:][None]):
                    if rows.numel():
                        self._sums.append(_row_sums(rows))

    def digest(self) -> bytes:
        if not self._sums:
            return b""
        with torch.cuda.stream(self._stream):
            sums = torch.cat(self._sums).cpu()
        return hashlib.sha256(sums.numpy().tobytes()).digest()


def _row_sums(rows: Tensor) -> Tensor:
    """Of [n, m] int64. On a CPU by numpy: torch would wake other threads, which takes longer than summing up."""
    return rows.sum(1) if rows.is_cuda else torch.from_numpy(np.add.reduce(rows.numpy(), axis=1))


# An authenticated way


class Session:
    """Frames of one connection, each with its MAC; tensors as the channel moves them.

    Attributes:
        channel: can be replaced by one that moves tensors otherwise, over the same frames.
        nbytes: sent or received, frames and tensors.
    """

    def __init__(self, channel: Channel, key: bytes, is_sender: bool) -> None:
        self.channel, self.nbytes = channel, 0
        self._key, self._names = key, (b"s", b"r") if is_sender else (b"r", b"s")
        self._counts = [0, 0]

    def say(self, message: msgspec.Struct) -> None:
        self.channel.send_frame(self._frame(message))

    def hear(self, kind: Any) -> Any:
        """The next frame, which must be of `kind`.

        Raises:
            TransferError: it is no frame of this session, another one, or a refusal.
        """
        frame = self.channel.receive_frame()
        self.nbytes += len(frame)
        body, mac = frame[:-MAC_BYTES], frame[-MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(1, body)):
            raise TransferError("a frame that is not of this session (forged, replayed or damaged)")
        return decoded(body, kind)

    def send(self, message: msgspec.Struct, pieces: Sequence[Tensor]) -> None:
        """Say what comes, and send it."""
        self.channel.send(pieces, self._frame(message))
        self.nbytes += sum(piece.nbytes for piece in pieces)

    def receive(self, pieces: Sequence[Tensor], total: Checksum) -> None:
        """Fill `pieces` with what is sent; on a GPU they are full when the channel has settled."""
        for portion in self._portions(pieces):
            self.channel.receive(portion)
            total.add(portion)  # while a core's cache has it
        self.nbytes += sum(piece.nbytes for piece in pieces)

    def _frame(self, message: msgspec.Struct) -> bytes:
        body = msgspec.msgpack.encode(message)
        frame = body + self._mac(0, body)
        self.nbytes += len(frame)
        return frame

    def _portions(self, pieces: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """`pieces` as they are taken from the channel."""
        if not self.channel.is_stream or pieces[0].is_cuda:
            yield pieces
            return
        portion: list[Tensor] = []
        room = PORTION_BYTES
        for piece in pieces:
            for part in piece.view(-1).split(PORTION_BYTES):
                if portion and part.nbytes > room:
                    yield portion
                    portion, room = [], PORTION_BYTES
                portion.append(part)
                room -= part.nbytes
        yield portion

    def _mac(self, way: int, body: bytes) -> bytes:
        number = struct.pack("<Q", self._counts[way])
        self._counts[way] += 1
        return hmac.digest(self._key, self._names[way] + number + body, "sha256")


def decoded(body: bytes, kind: Any) -> Any:
    try:
        message = msgspec.msgpack.decode(body, type=kind | Refused)
    except msgspec.DecodeError as error:
        raise TransferError(f"a frame out of turn or of another version ({error})") from error
    if isinstance(message, Refused):
        raise Refusal(message.reason)
    return message


def _prove(secret: bytes, what: bytes, hello: Hello, nonce: bytes) -> bytes:
    return hmac.digest(secret, what + struct.pack("<I", hello.version) + hello.nonce + nonce, "sha256")


def greet(channel: Channel, secret: bytes) -> Session:
    """Begin a session, as the sender.

    Raises:
        TransferError: the peer knows another secret or speaks another version.
    """
    hello = Hello(VERSION, secrets.token_bytes(NONCE_BYTES))
    channel.send_frame(msgspec.msgpack.encode(hello))
    welcome = decoded(channel.receive_frame(), Welcome)
    if not hmac.compare_digest(welcome.mac, _prove(secret, b"receiver", hello, welcome.nonce)):
        raise TransferError("it has another --kv-secret")
    channel.send_frame(msgspec.msgpack.encode(Proof(_prove(secret, b"sender", hello, welcome.nonce))))
    return Session(channel, _prove(secret, b"session", hello, welcome.nonce), is_sender=True)


def admit(channel: Channel, secret: bytes) -> Session:
    """Begin a session, as the receiver.

    Raises:
        TransferError: the peer does not know the secret, or speaks another version.
    """
    hello, nonce = decoded(channel.receive_frame(), Hello), secrets.token_bytes(NONCE_BYTES)
    if hello.version != VERSION or len(hello.nonce) != NONCE_BYTES:
        reason = f"it speaks version {VERSION} of kvtool's transfer; here it is {hello.version}; install one kvtool"
        channel.send_frame(msgspec.msgpack.encode(Refused(reason)))
        raise TransferError(f"a peer of version {hello.version}; this is {VERSION}")
    channel.send_frame(msgspec.msgpack.encode(Welcome(nonce, _prove(secret, b"receiver", hello, nonce))))
    proof = decoded(channel.receive_frame(), Proof)
    if not hmac.compare_digest(proof.mac, _prove(secret, b"sender", hello, nonce)):
        raise TransferError("a peer without the secret")
    return Session(channel, _prove(secret, b"session", hello, nonce), is_sender=False)
