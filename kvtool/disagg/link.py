"""How fast packed KV travels between two processes of this machine, and how fast bytes do that are nothing more."""

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from threading import Event

import msgspec
import torch

from kvtool.attention import block_size
from kvtool.config import Bits, EngineConfig, KVOptions
from kvtool.device import choose_device, choose_dtype
from kvtool.errors import KVToolError, UnsupportedError
from kvtool.kv.channels import keep_near
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.receiver import Arrival, Receiver
from kvtool.kv.sender import Sender
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import TRANSFERS, Route, dial_tcp, select
from kvtool.kv.wire import Close, Identity
from kvtool.models import load_config, resolve_model
from kvtool.models.kv import kv_spec
from kvtool.processes import command, cpu_threads

PLAIN_BYTES, PLAIN_REPEATS = 64 << 20, 2
LIMIT_SECONDS = 60.0
PAUSE_SECONDS = 0.03  # in which a sequence is announced, as one that is queued, and the one before it is stored
BITS: tuple[Bits, ...] = ("16", "8", "4", "2")
PART_BYTES = (64 << 10, 1 << 20, 16 << 20)  # that a bake-off sends at once
LARGE_BYTES, LARGE_REPEATS = 64 << 20, 16
SHORT = 8  # times shorter than the longest prompt


class Case(msgspec.Struct, frozen=True):
    """A sequence to send again and again.

    Attributes:
        dtype: the model's, by torch's name.
        source, target: devices of the two stores.
        transfer: by name, or "auto".
        part_bytes: of one layer that are sent at once; 0: all layers.
        repeats: times that count; one goes before.
    """

    layout: KVLayout
    dtype: str
    num_tokens: int
    source: str = "cpu"
    target: str = "cpu"
    transfer: str = "auto"
    part_bytes: int = 0
    repeats: int = 5


class Speed(msgspec.Struct, frozen=True):
    """What a case took.

    Attributes:
        num_bytes: that came for one sequence, headers included.
        predicted_bytes: by the layout.
        transport_seconds: from the first block gathered to the last byte checked, at best.
        seconds: until all is in the store, in the median.
        transfer: that was chosen.
    """

    num_bytes: int
    predicted_bytes: int
    transport_seconds: float
    seconds: float
    transfer: str

    @property
    def gb_s(self) -> float:
        return self.num_bytes / self.transport_seconds / 1e9


class Job(msgspec.Struct):
    """What the process at the other end does next: push a case, or write plain bytes, `near` as our sockets are."""

    port: int
    secret: str = ""
    case: Case | None = None
    near: bool = False


class OtherEnd:
    """A process that does one job after the other, until this is left; both ends have an engine's threads."""

    def __enter__(self) -> "OtherEnd":
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(cpu_threads())
        argv = command("kvtool.disagg.link", str(cpu_threads()))
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._hear()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def plain_speed(self) -> float:
        """GB/s of the best of a few times that 64 MiB come from memory to memory through a TCP socket."""
        return max(self._plain_speed(near) for near in (False, True))

    def _plain_speed(self, near: bool) -> float:
        buffer, best = memoryview(bytearray(PLAIN_BYTES)), 0.0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(LIMIT_SECONDS)
            self._begin(Job(listener.getsockname()[1], near=near))
            connection, _ = listener.accept()
            with connection:
                if near:
                    keep_near(connection)
                for _ in range(PLAIN_REPEATS):
                    started = time.perf_counter()
                    connection.sendall(b"!")
                    if connection.recv_into(buffer, PLAIN_BYTES, socket.MSG_WAITALL) < PLAIN_BYTES:
                        raise KVToolError("the process at the other end of the socket has ended")
                    best = max(best, PLAIN_BYTES / (time.perf_counter() - started) / 1e9)
        self._hear()
        return best

    def speed(self, case: Case) -> Speed:
        """Send a sequence from there to a store in this process.

        Raises:
            UnsupportedError: the transfer cannot take this way.
            KVToolError: it does not arrive.
        """
        select(Route(torch.device(case.source).type, torch.device(case.target).type, False), case.transfer)
        layout, secret = case.layout, secrets.token_hex()
        dtype: torch.dtype = getattr(torch, case.dtype)
        num_blocks = layout.format.num_blocks(case.num_tokens)
        store = KVStore(layout, num_blocks, 1, dtype, case.target)
        arrived = Event()
        receiver = Receiver(
            layout,
            Identity.of("", layout, dtype),
            secret.encode(),
            device=case.target,
            most_bytes=1 << 40,
            wake=arrived.set,
        )
        taken: list[tuple[Arrival, float]] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            receiver.listen(listener)
            for index in range(case.repeats + 1):
                receiver.expect(str(index), range(case.num_tokens), LIMIT_SECONDS)
            self._begin(Job(listener.getsockname()[1], secret, case))
            while len(taken) <= case.repeats:
                if not arrived.wait(1) and self._process.poll() is not None:
                    raise KVToolError(f"{case.transfer}: the process at the other end has ended")
                arrived.clear()
                for event in receiver.take():
                    if not isinstance(event, Arrival):
                        raise KVToolError(f"{case.transfer}: {event.reason}")
                    event.staged.store_in(store, range(num_blocks), 0)
                    if store.blocks.is_cuda:
                        torch.cuda.synchronize(store.blocks.device)
                    taken.append((event, time.perf_counter()))
                    receiver.staging.give_back(event.staged)
            self._hear()
            receiver.close()
        counted = taken[1:]
        return Speed(
            num_bytes=counted[0][0].nbytes,
            predicted_bytes=layout.bytes_for([case.num_tokens]),
            transport_seconds=min(arrival.received - arrival.close.scheduled for arrival, _ in counted),
            seconds=median(stored - arrival.close.scheduled for arrival, stored in counted),
            transfer=receiver.transfers[-1],
        )

    def _begin(self, job: Job) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise KVToolError("the process at the other end has ended") from error

    def _hear(self) -> None:
        """Wait until the other end is ready, or done as well."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise KVToolError("the process at the other end has ended")


def main(threads: str) -> None:
    """The process at the other end: jobs come on stdin, a line each."""
    torch.set_num_threads(int(threads))
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=Job)
        if job.case is None:
            _write_plainly(job.port, job.near)
        else:
            _push(job, job.case)
        print("done", flush=True)


def _write_plainly(port: int, near: bool) -> None:
    data = memoryview(bytearray(PLAIN_BYTES))
    with socket.create_connection(("127.0.0.1", port), LIMIT_SECONDS) as connection:
        connection.settimeout(None)
        if near:
            keep_near(connection)
        while connection.recv(1):
            connection.sendall(data)


def _push(job: Job, case: Case) -> None:
    layout, dtype = case.layout, getattr(torch, case.dtype)
    num_blocks, num_layers = layout.format.num_blocks(case.num_tokens), layout.spec.num_layers
    store = KVStore(layout, num_blocks, 1, dtype, case.source)
    sender = Sender(
        "the other end",
        lambda: dial_tcp("127.0.0.1", job.port),
        layout,
        Identity.of("", layout, dtype),
        job.secret.encode(),
        device=case.source,
        asked=case.transfer,
    )
    sender.connect(LIMIT_SECONDS)
    for index in range(case.repeats + 1):
        push = sender.begin(str(index), range(case.num_tokens))
        time.sleep(PAUSE_SECONDS)
        started = time.perf_counter()
        for layer in range(num_layers) if case.part_bytes else ():
            at_once = max(1, case.part_bytes // layout.layer_block_bytes(layer))
            for end in [*range(at_once, num_blocks, at_once), num_blocks]:
                push.put_blocks(range(layer, layer + 1), end, store, range(num_blocks))
        push.put_blocks(range(num_layers), num_blocks, store, range(num_blocks))  # what is not yet on its way
        push.put_tail(store.tail(0))
        push.close(Close(0, 0, started, time.perf_counter(), b""))
        push.wait(LIMIT_SECONDS)
    sender.close()


@dataclass(frozen=True)
class Link:
    """What a link carries.

    Attributes:
        plain_gb_s: plain bytes through a TCP socket, from memory to memory.
        large: a sequence of 64 MiB in the format asked for.
        formats: sequences at 16, 8, 4 and 2 bits: the longest prompt, and what has 64 MiB at 16 bits, if that is more.
        lengths: sequences of several lengths in the format asked for.
    """

    plain_gb_s: float
    large: Speed
    formats: list[tuple[Case, Speed]]
    lengths: list[tuple[Case, Speed]]


def check_transfer(devices: tuple[str, str], transfer: str) -> None:
    """Raises UnsupportedError where a transfer cannot go from one device to another."""
    here, there = (torch.device(choose_device(device)).type for device in devices)
    select(Route(here, there, False), transfer)


def survey(
    engine: EngineConfig,
    longest: int,
    devices: tuple[str, str],
    transfer: str = "auto",
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> Link:
    """Measure the link from one device to another, with sequences of up to `longest` tokens of the engine's model.

    Raises:
        KVToolError: nothing travels there.
    """
    source, target = (str(choose_device(device)) for device in devices)
    dtype = _dtype(engine, source)
    layouts = [layout_of(engine, KVOptions(nbits=bits), dtype) for bits in BITS]
    whole = [
        Case(layout, dtype, tokens, source, target, transfer)
        for tokens in dict.fromkeys([longest, max(longest, _large(layouts[0]))])
        for layout in layouts
    ]
    asked = Case(layout_of(engine, engine.kv, dtype), dtype, longest, source, target, transfer)
    large = max(longest, _large(asked.layout))
    cases = [
        *whole,
        msgspec.structs.replace(asked, num_tokens=max(1, longest // SHORT)),
        asked,
        # In parts, as an engine sends it: what is gathered on a CPU must not hold up what is sent.
        msgspec.structs.replace(
            asked, num_tokens=large, part_bytes=PART_BYTES[-1] if source == "cpu" else 0, repeats=LARGE_REPEATS
        ),
    ]
    speeds: list[tuple[Case, Speed]] = []
    with OtherEnd() as other:
        plain = 0.0
        for case in cases:  # each beside the other, as the machine may have other work to do
            plain = max(plain, other.plain_speed())
            speeds.append((case, other.speed(case)))
            on_progress(len(speeds), len(cases))
        plain = max(plain, other.plain_speed())
    return Link(plain, speeds[-1][1], speeds[: len(whole)], speeds[len(whole) : -1])


def _large(layout: KVLayout) -> int:
    """Tokens of a sequence of 64 MiB."""
    return LARGE_BYTES // layout.block_bytes * layout.format.block_size


def bake_off(
    engine: EngineConfig,
    devices: tuple[str, str],
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> tuple[float, list[tuple[Case, Speed | str]]]:
    """GB/s of plain bytes, and each transfer between two devices, by what is sent at once and by direction; what cannot
    run here says why."""
    source, target = (str(choose_device(device)) for device in devices)
    dtype = _dtype(engine, source)
    layout = layout_of(engine, KVOptions(), dtype)
    tokens = _large(layout)
    ways = dict.fromkeys([(source, target), (target, source)])
    cases = [
        Case(layout, dtype, tokens, *way, transfer.name, part_bytes)
        for transfer in TRANSFERS
        for way in ways
        for part_bytes in PART_BYTES
    ]
    found: list[tuple[Case, Speed | str]] = []
    with OtherEnd() as other:
        plain = 0.0
        for case in cases:
            plain = max(plain, other.plain_speed())
            found.append((case, _speed_or_why(other, case)))
            on_progress(len(found), len(cases))
    return plain, found


def _speed_or_why(other: OtherEnd, case: Case) -> Speed | str:
    try:
        return other.speed(case)
    except UnsupportedError as error:
        return str(error).rpartition(f"{case.transfer}: ")[2]


def layout_of(engine: EngineConfig, kv: KVOptions, dtype: str) -> KVLayout:
    """The bytes of a cache of the engine's model in a format."""
    spec = kv_spec(load_config(resolve_model(engine.model)), getattr(torch, dtype))
    return KVLayout(spec, resolve(kv, spec, block_size(engine.attention_backend)))


def _dtype(engine: EngineConfig, device: str) -> str:
    dtype = choose_dtype(engine, load_config(resolve_model(engine.model)), torch.device(device))
    return str(dtype).removeprefix("torch.")
