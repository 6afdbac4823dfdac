"""The table of transfers: over what packed KV travels from one store to another."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kvtool.errors import UnsupportedError
from kvtool.kv.channels import Channel, GroupChannel, NixlChannel, SocketChannel
from kvtool.kv.wire import Meeting, Session, Window

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 60.0  # that a peer may take for a frame or its bytes


@dataclass(frozen=True)
class Route:
    """Where a transfer would run.

    Attributes:
        here, there: kinds of device: "cpu" or "cuda".
    """

    here: str
    there: str
    same_process: bool


@dataclass(frozen=True)
class Transfer:
    """One way to move tensors.

    Attributes:
        name: as in --kv-transfer.
        refuses: why it cannot take a route, or None if it can.
        lands_on_device: tensors arrive in the receiver's own memory, not in the host's.
        connections: that a sender opens to one receiver.
    """

    name: str
    refuses: Callable[[Route], str | None]
    lands_on_device: bool = False
    connections: int = 4


def _in_process(route: Route) -> str | None:
    return None if route.same_process else "the peer is another process"


def _nccl(route: Route) -> str | None:
    if (route.here, route.there) != ("cuda", "cuda"):
        return "it moves memory of GPUs, and an end is on a CPU"
    if route.same_process:
        return "both ends are one process"
    return None if dist.is_nccl_available() else "torch was built without NCCL"


def _gloo(route: Route) -> str | None:
    if "cuda" in (route.here, route.there):
        return "it moves memory of the host, and an end is on a GPU"
    if route.same_process:
        return "both ends are one process"
    return None if dist.is_gloo_available() else "torch was built without Gloo"


def _tcp(route: Route) -> str | None:
    return "both ends are one process" if route.same_process else None


def _nixl(route: Route) -> str | None:
    if route.same_process:
        return "both ends are one process"
    return None if find_spec("nixl") else "it is not installed; pip install nixl"


TRANSFERS = (  # best first
    Transfer("in-process", _in_process, lands_on_device=True),
    Transfer("nccl", _nccl, lands_on_device=True, connections=1),
    Transfer("tcp", _tcp),
    Transfer("nixl", _nixl, lands_on_device=True, connections=1),  # behind tcp until it is measured to be faster
    Transfer("gloo", _gloo),
)


def select(route: Route, asked: str = "auto", offered: Sequence[str] | None = None) -> Transfer:
    """The first transfer that takes the route, among those that the peer offers.

    Raises:
        UnsupportedError: with every transfer's reason.
    """
    refusals = {}
    for transfer in TRANSFERS:
        if asked in ("auto", transfer.name):
            reason = transfer.refuses(route)
            if reason is None and offered is not None and transfer.name not in offered:
                reason = "the peer does not take it"
            if reason is None:
                return transfer
            refusals[transfer.name] = reason
    if not refusals:
        raise UnsupportedError(f"--kv-transfer {asked}: must be one of {', '.join(transfer_names())}")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise UnsupportedError(f"--kv-transfer {asked}: no way to the peer: {reasons}")


def transfer_names() -> list[str]:
    return ["auto", *(transfer.name for transfer in TRANSFERS)]


def dial_tcp(host: str, port: int) -> Channel:
    """Raises an OSError while nobody listens there."""
    channel = SocketChannel(socket.create_connection((host, port), CONNECT_SECONDS))
    channel.limit(CONNECT_SECONDS)  # until both have met: what listens there may be something else, and say nothing
    return channel


def meet_as_receiver(session: Session, transfer: Transfer, device: torch.device) -> None:
    """Begin what a transfer needs beside the connection, for tensors on a device."""
    if transfer.name == "nixl":
        assert isinstance(session.channel, SocketChannel)
        channel = NixlChannel(session.channel, device)
        number = channel.window.get_device()  # -1 on the host
        session.say(Window(channel.metadata, channel.window.data_ptr(), number))
        session.channel = channel
    if transfer.name in ("nccl", "gloo"):
        frames = session.channel
        assert isinstance(frames, SocketChannel)
        host = frames.connection.getsockname()[0]
        store = TCPStore(host, 0, 2, True, wait_for_workers=False)
        session.say(Meeting(store.port))
        session.channel = GroupChannel(frames, transfer.name, 0, store, IDLE_SECONDS, device)


def meet_as_sender(session: Session, transfer: Transfer, device: torch.device) -> None:
    """The same, at the other end."""
    if transfer.name == "nixl":
        assert isinstance(session.channel, SocketChannel)
        window, channel = session.hear(Window), NixlChannel(session.channel, device)
        channel.meet(window.metadata, window.address, window.device)
        session.channel = channel
    if transfer.name in ("nccl", "gloo"):
        frames = session.channel
        assert isinstance(frames, SocketChannel)
        host, port = frames.connection.getpeername()[0], session.hear(Meeting).port
        store = TCPStore(host, port, 2, False)
        session.channel = GroupChannel(frames, transfer.name, 1, store, IDLE_SECONDS, device)
