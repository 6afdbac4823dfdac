"""How fast packed KV travels between two processes of this machine, and how fast bytes do that are nothing more."""

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from threading import Event

import msgspec
import torch

from kvtool.errors import KVToolError
from kvtool.kv.layout import KVLayout
from kvtool.kv.receiver import Arrival, Receiver
from kvtool.kv.sender import Sender
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import dial_tcp
from kvtool.kv.wire import Close, Identity

PLAIN_BYTES, WRITE_BYTES = 256 << 20, 4 << 20
LIMIT_SECONDS = 60.0


class Case(msgspec.Struct, frozen=True):
    """A sequence to send again and again.

    Attributes:
        dtype: the model's, by torch's name.
        source, target: devices of the two stores.
        transfer: by name, or "auto".
        part_bytes: of one layer that are sent at once; 0: a layer's whole part.
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
    """What a case took, in the median.

    Attributes:
        num_bytes: that came for one sequence, headers included.
        predicted_bytes: by the layout.
        transport_seconds: from the first block gathered to the last byte checked.
        seconds: until all is in the store.
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
    """What the process at the other end does."""

    port: int
    secret: str
    case: Case | None = None


def plain_speed(repeats: int = 3) -> float:
    """GB/s of the best of a few times that 256 MiB go from one process to another through a TCP socket."""
    buffer = memoryview(bytearray(WRITE_BYTES))
    best = 0.0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_SECONDS)
        with _other_end(Job(listener.getsockname()[1], "")):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(LIMIT_SECONDS)
                for _ in range(repeats):
                    started, left = time.perf_counter(), PLAIN_BYTES
                    connection.send(b"!")
                    while left:
                        count = connection.recv_into(buffer)
                        if not count:
                            raise KVToolError("the process at the other end of the socket has ended")
                        left -= count
                    best = max(best, PLAIN_BYTES / (time.perf_counter() - started) / 1e9)
    return best


def speed(case: Case) -> Speed:
    """Send a sequence from another process to a store in this one.

    Raises:
        KVToolError: it does not arrive.
    """
    layout, secret = case.layout, secrets.token_hex()
    dtype: torch.dtype = getattr(torch, case.dtype)
    num_blocks = layout.format.num_blocks(case.num_tokens)
    store = KVStore(layout, num_blocks, 1, dtype, case.target)
    identity = Identity.of("", layout, dtype)
    arrived = Event()
    receiver = Receiver(
        layout, identity, secret.encode(), device=case.target, most_bytes=1 << 40, wake=arrived.set
    )
    taken: list[tuple[Arrival, float]] = []
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(receiver.close)
        receiver.listen(listener)
        for index in range(case.repeats + 1):
            receiver.expect(str(index), range(case.num_tokens), LIMIT_SECONDS)
        stack.enter_context(_other_end(Job(listener.getsockname()[1], secret, case)))
        while len(taken) <= case.repeats:
            arrived.wait(LIMIT_SECONDS)
            arrived.clear()
            for event in receiver.take():
                if not isinstance(event, Arrival):
                    raise KVToolError(f"{case.transfer}: {event.reason}")
                event.landing.store_in(store, range(num_blocks), 0)
                if store.blocks.is_cuda:
                    torch.cuda.synchronize(store.blocks.device)
                taken.append((event, time.perf_counter()))
                receiver.release(event.landing)
    counted = taken[1:]
    return Speed(
        num_bytes=counted[0][0].nbytes,
        predicted_bytes=layout.bytes_for([case.num_tokens]),
        transport_seconds=median(arrival.received - arrival.close.scheduled for arrival, _ in counted),
        seconds=median(stored - arrival.close.scheduled for arrival, stored in counted),
        transfer=receiver.transfers[-1],
    )


@contextmanager
def _other_end(job: Job) -> Iterator[None]:
    """A process that does a job, and has ended when this does."""
    code = "import sys; sys.path[0] = sys.argv[1]; from kvtool.disagg.link import main; main()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
        yield
    finally:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """The process at the other end."""
    torch.set_num_threads(1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    if job.case is None:
        _write_plainly(job.port)
    else:
        _push(job, job.case)


def _write_plainly(port: int) -> None:
    data = memoryview(bytearray(WRITE_BYTES))
    with socket.create_connection(("127.0.0.1", port), LIMIT_SECONDS) as connection:
        while connection.recv(1):
            for _ in range(PLAIN_BYTES // WRITE_BYTES):
                connection.sendall(data)


def _push(job: Job, case: Case) -> None:
    layout, dtype = case.layout, getattr(torch, case.dtype)
    num_blocks, num_layers = layout.format.num_blocks(case.num_tokens), layout.spec.num_layers
    store = KVStore(layout, num_blocks, 1, dtype, case.source)
    identity = Identity.of("", layout, dtype)
    sender = Sender(
        "the other end",
        lambda: dial_tcp("127.0.0.1", job.port),
        layout,
        identity,
        job.secret.encode(),
        device=case.source,
        asked=case.transfer,
    )
    sender.connect(LIMIT_SECONDS)
    for index in range(case.repeats + 1):
        started = time.perf_counter()
        push = sender.begin(str(index), range(case.num_tokens))
        for layer in range(num_layers):
            at_once = max(1, case.part_bytes // layout.layer_block_bytes(layer)) if case.part_bytes else num_blocks
            for end in [*range(at_once, num_blocks, at_once), num_blocks]:
                push.put_blocks(range(layer, layer + 1), end, store, range(num_blocks))
        push.close(store.tail(0).clone(), Close(0, 0, started, time.perf_counter(), b""))
        push.wait(LIMIT_SECONDS)
    sender.close()


def bake_off(cases: Sequence[Case]) -> Iterator[tuple[Case, Speed | KVToolError]]:
    """Speeds of several cases; one that cannot run here says why."""
    for case in cases:
        try:
            yield case, speed(case)
        except KVToolError as error:
            yield case, error
