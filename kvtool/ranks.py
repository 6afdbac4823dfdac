"""A model of several processes: how rank 0 finds the others, tells them what to compute, and sees who is lost.

Tensors go by torch.distributed. What rank 0 tells the others, and what they answer, goes over a socket to each, which
also shows who has died or hangs. What the others do all the while stands in `kvtool.follower`.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import queue
import secrets
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from threading import Lock, Thread
from typing import Any, Literal, NoReturn, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from kvtool.config import EngineConfig
from kvtool.errors import CapacityError, ConfigError, KVToolError, UnsupportedError
from kvtool.models import ModelConfig, load_config, resolve_model
from kvtool.p2p import all_on_nvlink
from kvtool.parallel import Parallel, join, leave, use_one_shot
from kvtool.processes import Inbox, command, cpu_threads, frame
from kvtool.request import Export, Import, ScheduledBatch, StepResult
from kvtool.runner import Handle, Runner, choose_device

INTERFACES = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # environment variables
BEAT_SECONDS = 1.0
SILENT_SECONDS = 6.0  # a rank that says nothing for so long hangs
RANK_0_SILENT_SECONDS = 8.0  # which also prepares grammars, and may be slow to speak meanwhile
STARTING_SECONDS = 60.0  # while it starts: what is imported, allocated or compiled may stop all of its threads
STEP_SECONDS = 8.0  # behind the launch of a step, whose device may hang; or, if that is more,
SLOWER = 4  # times what the longest one took
END_SECONDS = 3  # for those that need not be killed
COPY_SECONDS = 60  # to start a process and copy a few megabytes between all GPUs
ENDED = "has ended"
HELLO_BYTES = 1 << 12
ENV = "env://"


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
    pid: int
    host: str
    secret: str


class Start(msgspec.Struct, frozen=True, tag="start"):
    """What for: an engine's steps, or to score texts. `pid` is rank 0's, on its machine."""

    config: EngineConfig
    work: Literal["steps", "scores"]
    pid: int


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """A step; first, `token_ids` are those that the last stage has sampled, by slot."""

    step: int
    batch: ScheduledBatch
    allowed: bytes | None
    token_ids: dict[int, int]
    exports: list[Export]


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Say how many tokens have chosen each expert, in all steps so far."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """Nothing more will come."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """I am here."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Steps can come."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """I cannot go on."""

    error: str


class Launched(msgspec.Struct, frozen=True, tag="launched"):
    """All of a step is on its way to the device; no kernel is compiled for it any more."""

    step: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A step is over; `error` is for its requests. The result is the last stage's."""

    step: int
    error: str | None
    result: StepResult | None


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """Tokens of each expert, by layer, of a rank's own stage."""

    expert_tokens: dict[int, list[int]]


ANSWERS = (Ready, Launched, Done, Counted)
Answer = TypeVar("Answer", Launched, Done)


class Link:
    """A socket to another rank.

    Attributes:
        name: of that rank, for people.
        heard: when it last said something.
        patience: seconds after which its silence means that it hangs.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.inbox, self.name = connection, Inbox(connection), name
        self.heard, self.patience = time.monotonic(), STARTING_SECONDS
        self._sending = Lock()

    def send(self, message: object) -> None:
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):  # who reads from it will see that it has closed
            self.socket.sendall(data)

    def send_soon(self, message: object) -> None:
        """Say something short, unless something else is being said or the other end does not take it."""
        if self._sending.acquire(blocking=False):
            try:
                if select.select([], [self.socket], [], 0)[1]:
                    self.socket.sendall(frame(message))
            except OSError:
                pass
            finally:
                self._sending.release()


def watch(
    links: Sequence[Link],
    receive: Callable[[Link, bytes], None],
    lost: Callable[[Link, str], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Take in what comes and tell the others that this rank lives, until one of them does not: `lost` hears why.

    Args:
        look: called once a second, or more often.
    """
    beaten = 0.0
    while True:
        readable = select.select([link.socket for link in links], [], [], BEAT_SECONDS)[0]
        for link in links:
            if link.socket in readable:
                link.heard = time.monotonic()
                try:
                    for body in link.inbox.poll():
                        receive(link, body)
                except (EOFError, OSError):
                    return lost(link, ENDED)
        look()
        now = time.monotonic()
        if now - beaten >= BEAT_SECONDS:
            beaten = now
            for link in links:
                link.send_soon(Beat())
        for link in links:
            if now - link.heard > link.patience:
                return lost(link, f"has not answered for {link.patience:g} s")


class Ranks:
    """The other ranks of a model, as rank 0 sees them. It begins by starting those of this machine.

    A rank that dies or hangs ends this process, and the others with it: who waits for a rank in the midst of a step
    cannot be told otherwise.

    Attributes:
        config: of rank 0, on its own device.
        parallel: its place.

    Raises:
        ConfigError: ranks that do not fit the model or the machine, or that did not find each other in time.
        KVToolError: a rank could not start.
    """

    def __init__(self, config: EngineConfig, work: Literal["steps", "scores"]) -> None:
        check_topology(config)
        check_model(config, load_config(resolve_model(config.model)))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Link] = []
        self._answers: dict[tuple[Link, type], queue.SimpleQueue[Any]] = {}  # by kind, each kind in its order
        self._awaited: tuple[str, float, float] | None = None
        self._closing = False
        self._named_by_the_user = INTERFACES & os.environ.keys()
        check_copies(config)
        atexit.register(self.dismiss)
        with self.starting():
            address = config.dist_init_addr or "127.0.0.1:0"
            store, address = open_store(address, config.num_ranks, config.dist_timeout, 0)
            self._processes = start_followers(config, address, config.ranks_here[1:])
            self._gather(store, config, address)
            self.tell(Start(config, work, os.getpid()))
            Thread(target=watch, args=[self._links, self._receive, self._lost, self._look], daemon=True).start()
            self.config = placed(config, config.local_rank)
            self.parallel = take_place(store, 0, self.config)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around what this rank makes of its place while the others make the same; an error ends them."""
        try:
            with self.waiting():
                yield
        except BaseException:
            self.close()
            raise

    def await_ready(self) -> None:
        """Let the others end what they have begun with."""
        for link in self._links:
            self._answers[link, Ready].get()
            link.patience = SILENT_SECONDS

    def tell(self, message: object) -> None:
        """Say something to all others, who carry it out in its turn."""
        told = frame(message)
        for link in self._links:
            link.send_frame(told)

    def dismiss(self) -> None:
        """Tell the followers that it is over, whatever this process is in the midst of."""
        self._closing = True
        for link in self._links:
            link.send_soon(End())

    def close(self) -> None:
        """Let the followers end, and free what is needed for others to start in this process."""
        atexit.unregister(self.dismiss)
        self.dismiss()
        if dist.is_initialized():
            leave()
        for variable in INTERFACES - self._named_by_the_user:
            os.environ.pop(variable, None)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            process.wait()

    def _gather(self, store: Store, config: EngineConfig, address: str) -> None:
        """Let all followers in, and nobody else.

        Raises:
            ConfigError: one did not come.
            KVToolError: one ended before it came.
        """
        missing = set(range(1, config.num_ranks))
        deadline = time.monotonic() + config.dist_timeout
        own = own_address(address)
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        with socket.create_server((own, 0), family=family) as listener:
            host, port = listener.getsockname()[:2]
            meeting = Meeting(host, port, secrets.token_hex(16))
            store.set("meeting", msgspec.json.encode(meeting).decode())
            listener.settimeout(BEAT_SECONDS)
            while missing:
                ended = [process.poll() for process in self._processes if process.poll() is not None]
                if ended:
                    raise KVToolError(f"a rank of this machine ended while it started (status {ended[0]})")
                if time.monotonic() > deadline:
                    named = ", ".join(f"{rank} (node {rank // len(config.ranks_here)})" for rank in sorted(missing))
                    raise ConfigError(
                        f"rank {named} did not come to {address} within --dist-timeout {config.dist_timeout} s: are "
                        "all nodes started, with the same --tp, --ep, --pp, --nnodes and --dist-init-addr?"
                    )
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    hello = read_hello(connection)
                    if hello and hello.rank in missing and secrets.compare_digest(hello.secret, meeting.secret):
                        missing.remove(hello.rank)
                        name = f"rank {hello.rank} (process {hello.pid} on {hello.host})"
                        self._links.append(link := Link(connection, name))
                        self._answers |= {(link, kind): queue.SimpleQueue() for kind in ANSWERS}
                    else:
                        connection.close()

    def _receive(self, link: Link, body: bytes) -> None:
        message = msgspec.msgpack.decode(body, type=Ready | Launched | Done | Counted | Failed | Beat)
        if isinstance(message, Failed):
            self._lost(link, message.error)
        elif not isinstance(message, Beat):
            self._answers[link, type(message)].put(message)

    def _lost(self, link: Link, why: str) -> None:
        if not self._closing:
            self.end(f"{link.name} {why}")

    def end(self, why: str) -> NoReturn:
        """End all ranks, as each waits for all."""
        print(f"error: {why}; all ranks end with it", file=sys.stderr, flush=True)
        for process in self._processes:
            process.kill()
        os._exit(1)

    @contextlib.contextmanager
    def within(self, rank: str, seconds: float) -> Iterator[None]:
        """While `rank` is waited for in the midst of a step, which ends all ranks where it takes longer than that."""
        self._awaited = (rank, time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._awaited = None

    def _look(self) -> None:
        awaited = self._awaited
        if awaited and time.monotonic() > awaited[1] and not self._closing:
            self.end(f"{awaited[0]} has been in one step for {awaited[2]:.0f} s")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Where another rank has ended, torch's complaint comes before ours, and does not say which one."""
        try:
            yield
        except RuntimeError:
            time.sleep(SILENT_SECONDS + BEAT_SECONDS)
            raise


class RunnerRanks(Ranks):
    """Rank 0 of an engine and its followers, which launch and collect as one `Runner` does.

    Attributes:
        runner: rank 0's.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, "steps")
        self._step = 0
        self._patience = max(config.dist_timeout, 60)  # for the launch of a step, which may compile kernels
        self._launched: deque[tuple[int, Handle]] = deque()
        self._token_ids: dict[int, int] = {}
        with self.starting():
            self.runner = Runner(self.config, self.parallel)
            self.await_ready()
        self._longest = self.runner.largest_step_seconds  # that a step has taken behind its launch

    def launch(
        self,
        batch: ScheduledBatch,
        allowed: NDArray[np.int32] | None = None,
        exports: Sequence[Export] = (),
        land: Callable[[Import], None] | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Handle:
        """Start one step on all ranks; the last three are those of `Runner.launch`, and what `on_layer` takes out."""
        self._step += 1
        mask = None if allowed is None else allowed.tobytes()
        self.tell(Launch(self._step, batch, mask, self._token_ids, list(exports)))
        with self.waiting(), self.within("rank 0", self._patience):
            if self._token_ids:
                self.runner.take_in(self._token_ids)
            try:
                handle = self.runner.launch(batch, allowed, land, on_layer)
            except CapacityError as error:  # the others wait for it in the midst of the step
                self.end(f"rank 0 has failed: {error}")
        self._token_ids = {}
        self._launched.append((self._step, handle))
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """What a launched step yielded, once all ranks are through with it.

        Raises:
            UnsupportedError: the cache's format cannot hold what the model made of these tokens, on some rank.
        """
        step = 0
        while not step:  # steps before it may have been given up
            number, launched = self._launched.popleft()
            step = number if launched is handle else 0
        for link in self._links:
            self._answer_of(link, Launched, step, self._patience)
        began, most = time.monotonic(), max(STEP_SECONDS, SLOWER * self._longest)
        answers = [self._answer_of(link, Done, step, most) for link in self._links]
        with self.waiting(), self.within("rank 0", most):
            result = self.runner.collect(handle)
        self._longest = max(self._longest, time.monotonic() - began)
        for done in answers:
            if done.error:
                raise UnsupportedError(done.error)
            result = done.result or result
        if not self.runner.parallel.stage.is_last:
            slots = [sample.slot for sample in handle.batch.samples]
            self._token_ids |= {slot: max(token, 0) for slot, token in zip(slots, result.token_ids, strict=True)}
        return result

    def expert_tokens(self) -> dict[int, list[int]]:
        """What `Runner.expert_tokens` says on all stages."""
        self.tell(Count())
        with self.waiting(), self.within("a rank", self._patience):
            totals = self.runner.expert_tokens()
            for link in self._links:
                totals |= self._answers[link, Counted].get().expert_tokens
        return dict(sorted(totals.items()))

    def _answer_of(self, link: Link, kind: type[Answer], step: int, seconds: float) -> Answer:
        """What a follower says of a step, whatever it has said of steps before."""
        with self.within(link.name, seconds):
            while True:
                answer: Answer = self._answers[link, kind].get()
                if answer.step == step:
                    return answer


# Starting


def start_followers(config: EngineConfig, address: str, ranks: Sequence[int]) -> list[subprocess.Popen[bytes]]:
    """Processes of `ranks`, on this machine. They end with this one."""
    processes = []
    for rank in ranks:
        local_rank = config.local_rank + rank - config.ranks_here.start
        seat = msgspec.json.encode(Seat(rank, config.num_ranks, local_rank, address, config.dist_timeout)).decode()
        argv = command("kvtool.follower", seat)
        processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    return processes


def run_node(config: EngineConfig) -> int:
    """Be a machine that is not the first: run its ranks until rank 0 says that it is over.

    Returns:
        0, or the exit status of the first rank that ended otherwise.

    Raises:
        ConfigError: ranks that do not fit the machine.
    """
    check_topology(config)
    check_copies(config)
    assert config.dist_init_addr
    ranks, address = config.ranks_here, config.dist_init_addr
    print(f"node {config.node_rank}: rank {ranks[0]} to {ranks[-1]} for {address} ...", file=sys.stderr, flush=True)
    while True:
        processes = start_followers(config, address, ranks)
        try:
            while all(process.poll() is None for process in processes):
                time.sleep(BEAT_SECONDS / 10)
            # Those that hang do not end by themselves, and those that end in order do so together.
            deadline = time.monotonic() + END_SECONDS
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(BEAT_SECONDS / 10)
        finally:
            for process in processes:
                process.kill()
        status = next((code for process in processes if (code := process.wait())), 0)
        if status == 0 or status == 2 or not config.restart:
            return status
        print(f"node {config.node_rank}: starting again", file=sys.stderr, flush=True)


def placed(config: EngineConfig, local_rank: int) -> EngineConfig:
    """`config` on this rank's own device, or with its share of the cores."""
    device = asked_device(config)
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(len(config.ranks_here)))
        return replace(config, device="cpu")
    index = (device.index or 0) + local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(f"{config.rank_options}: this machine has no GPU {index}")
    return replace(config, device=str(choose_device(f"cuda:{index}")))


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


def asked_device(config: EngineConfig) -> torch.device:
    """Where the first rank of a machine without `local_rank` runs; nothing is allocated there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError:
        return choose_device(config.device)  # which says what is wrong with it


def check_topology(config: EngineConfig) -> None:
    """Raises ConfigError where ranks do not fit the nodes, or those here the machine's GPUs."""
    ranks, nodes = config.rank_options, config.nnodes
    if config.tp % config.ep:
        raise ConfigError(f"--ep {config.ep}: does not divide --tp {config.tp}, whose ranks share the experts out")
    if config.num_ranks % nodes:
        raise ConfigError(f"{ranks}: {config.num_ranks} ranks cannot be shared out among --nnodes {nodes}")
    if config.node_rank >= nodes:
        raise ConfigError(f"--node-rank {config.node_rank}: --nnodes {nodes} are counted from 0")
    if nodes > 1 and not config.dist_init_addr:
        raise ConfigError(f"--nnodes {nodes}: needs --dist-init-addr HOST:PORT of node 0, the same on all nodes")
    if config.dist_init_addr not in (None, ENV):
        split_address(config.dist_init_addr or "")
    device = asked_device(config)
    needed = (device.index or 0) + config.local_rank + len(config.ranks_here)
    if device.type == "cuda" and needed > torch.cuda.device_count():
        here = f" on each of {nodes} nodes" if nodes > 1 else ""
        raise ConfigError(
            f"{ranks} --device {config.device}: {len(config.ranks_here)} ranks need as many GPUs{here}; "
            f"there are {torch.cuda.device_count()}"
        )


def check_copies(config: EngineConfig) -> None:
    """Try what NCCL will rely on, copies between this machine's GPUs, where they are on PCIe: behind an IOMMU, or where
    the driver claims what the cards have not, they arrive wrong or never. A process that can be killed tries it.

    Raises:
        ConfigError: they did; it says what to set.
    """
    device, count = asked_device(config), len(config.ranks_here)
    first = (device.index or 0) + config.local_rank
    gpus = range(first, first + count)
    if device.type != "cuda" or count == 1 or os.environ.get("NCCL_P2P_DISABLE", "0") != "0" or all_on_nvlink(gpus):
        return
    argv = command("kvtool.p2p", ",".join(map(str, gpus)))
    try:
        tried = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COPY_SECONDS, text=True)
        problem = tried.stdout.strip()
    except subprocess.TimeoutExpired:
        problem = f"copies between cuda:{gpus[0]} and cuda:{gpus[-1]} hang"
    if problem:
        raise ConfigError(
            f"{problem}; set NCCL_P2P_DISABLE=1, so that NCCL goes through host memory, or switch the IOMMU and ACS off"
        )


def check_model(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError where a model cannot be shared out among so many ranks."""
    tp, ep, heads = config.tp, config.ep, model.num_kv_heads
    if ep > 1 and not any(model.experts):
        raise ConfigError(f"--ep {ep}: a {model.model_type} model has no experts to share out; use --tp")
    counts = {"query heads": model.num_heads}
    for experts in model.experts:
        if experts is None:
            counts["columns of its MLP"] = model.intermediate_size
            continue
        counts["columns of its shared experts"] = experts.shared_size
        if experts.routing.num_experts % ep:
            raise ConfigError(f"--ep {ep}: does not divide the model's {experts.routing.num_experts} experts")
        if experts.intermediate_size % (tp // ep):
            raise ConfigError(
                f"{config.rank_options}: {tp // ep} ranks cannot share the {experts.intermediate_size} columns of an "
                f"expert; with --ep {tp} they need not"
            )
    for name, count in counts.items():
        if count % tp:
            raise ConfigError(f"--tp {tp}: does not divide the model's {count} {name}")
    if heads % tp and tp % heads:
        raise ConfigError(f"--tp {tp}: neither divides the model's {heads} KV heads nor is a multiple of them")
    if config.pp > model.num_layers:
        raise ConfigError(f"--pp {config.pp}: the model has only {model.num_layers} layers")
    if config.quantization in ("gptq", "awq") and model.quantization is None:
        raise ConfigError(
            f"--quantization {config.quantization}: several ranks cannot look at a text together; "
            "save the weights with scripts/quantize_weights.py first"
        )


# Finding each other


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
        await_port(host, port, timeout)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigError(f"--dist-init-addr {address}: {reason}; give an address of node 0 and a free port") from error
    return TCPStore(host, port, size, False, seconds, wait_for_workers=False), address


def await_port(host: str, port: int, timeout: int) -> None:
    """Raises ConfigError if nobody listens there before the time is over."""
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), min(left, 5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise ConfigError(
        f"--dist-init-addr {host}:{port} did not answer within --dist-timeout {timeout} s ({reason}): is node 0 "
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
        connection.sendall(frame(Hello(seat.rank, os.getpid(), socket.gethostname(), meeting.secret)))
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
