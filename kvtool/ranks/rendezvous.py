"""How ranks find each other, by which network, and take their places."""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import msgspec
import torch
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError
from kvtool.parallel import Parallel, join, use_one_shot
from kvtool.processes import frame
from kvtool.ranks.link import Link

ENV = "env://"  # an address: that of the environment's variables, as torchrun sets them
INTERFACES = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # environment variables
HELLO_BYTES = 1 << 12


class Seat(msgspec.Struct, frozen=True):
    """What a follower must know to find the others; `address` as in `EngineConfig.dist_init_addr`."""

    rank: int
    size: int
    local_rank: int
    address: str
    timeout: int


class Meeting(msgspec.Struct, frozen=True):
    """Where rank 0 listens for followers, and what they show it."""

    host: str
    port: int
    secret: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    rank: int
    size: int
    pid: int
    host: str
    secret: str


def split_address(address: str) -> tuple[str, int]:
    """Raises ConfigError unless it is HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--dist-init-addr {address:.80}: write HOST:PORT, the address of node 0 and a free port")
    return host.strip("[]"), int(port)


def open_store(address: str, size: int, timeout: int, rank: int) -> tuple[Store, str]:
    """The table in which ranks find each other, which rank 0 holds, and its address: port 0 becomes a free one.

    Raises:
        ConfigError: nobody answers there, or rank 0 cannot listen.
    """
    seconds = timedelta(seconds=timeout)
    if address == ENV:
        store, _, _ = next(rendezvous(ENV, timeout=seconds))
        return store, address
    host, port = split_address(address)
    try:
        if rank == 0:
            family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.create_server(bound[:2], family=family) as listener:
                port = listener.getsockname()[1]
                fd = os.dup(listener.fileno())  # the store owns and closes it
            store = TCPStore(host, port, size, True, seconds, wait_for_workers=False, master_listen_fd=fd)
            return store, f"{host}:{port}"
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigError(f"--dist-init-addr {address}: {reason}; give an address of node 0 and a free port") from error
    await_port(address, timeout)
    joining = ThreadPoolExecutor(1).submit(TCPStore, host, port, size, False, seconds, wait_for_workers=False)
    try:
        return joining.result(timeout), address  # by itself it would wait for ever for who never says a word
    except (RuntimeError, concurrent.futures.TimeoutError) as error:
        raise ConfigError(
            f"--dist-init-addr {address}: what answers there is not node 0; give the address that node 0 was given"
        ) from error


def await_port(address: str, timeout: int) -> None:
    """Raises ConfigError if nobody listens there before the time is over."""
    host, port = split_address(address)
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), min(left, 5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise ConfigError(
        f"--dist-init-addr {address} did not answer within --dist-timeout {timeout} s ({reason}): is node 0 "
        "running, and can this machine reach it?"
    )


def meet(store: Store, seat: Seat) -> Link:
    """This follower's link to rank 0.

    Raises:
        ConfigError: it does not answer.
    """
    try:
        meeting = msgspec.json.decode(store.get("meeting"), type=Meeting)
        use_interface(meeting.host)
        connection = socket.create_connection((meeting.host, meeting.port), seat.timeout)
        connection.sendall(frame(Hello(seat.rank, seat.size, os.getpid(), socket.gethostname(), meeting.secret)))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"rank {seat.rank}: rank 0 does not answer at {seat.address}: {error}") from error
    return Link(connection, "rank 0")


def read_hello(connection: socket.socket) -> Hello | None:
    """What who connects says first; None for anything but a Hello."""
    try:
        connection.settimeout(5)
        size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")
        if size > HELLO_BYTES:
            return None
        return msgspec.msgpack.decode(connection.recv(size, socket.MSG_WAITALL), type=Hello)
    except (OSError, msgspec.DecodeError):
        return None


def own_address(address: str) -> str:
    """By which others reach this machine, whose rank 0 stands at `address`."""
    host = os.environ["MASTER_ADDR"] if address == ENV else split_address(address)[0]
    own = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    use_interface(str(own))
    return str(own)


def use_interface(address: str) -> None:
    """Let gloo and NCCL use the network interface that leads to rank 0, unless the user has named one: by themselves
    they go by the machine's name, which often stands for an address that no other machine can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect((address, 9))
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == own:
                    for variable in INTERFACES:
                        os.environ.setdefault(variable, name)


def take_place(store: Store, rank: int, config: EngineConfig) -> Parallel:
    """Join the others, and find out how to sum up with them.

    Raises:
        ConfigError: not in the way that was asked for.
    """
    device = torch.device(config.device)
    parallel = join(store, rank, config.tp, config.ep, config.pp, device)
    if config.all_reduce == "nccl" or (config.all_reduce == "auto" and device.type == "cpu"):
        return parallel
    refusal = use_one_shot(parallel, device)
    if refusal and config.all_reduce == "symmetric-memory":
        raise ConfigError(f"--all-reduce symmetric-memory: {refusal}; leave it out")
    if rank == 0 and config.tp > 1:
        how = f"by NCCL, because {refusal}" if refusal else "in symmetric memory"
        print(f"ranks sum up {how}", file=sys.stderr, flush=True)
    return parallel
