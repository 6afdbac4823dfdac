"""Rank 0, which leads the others: it tells them of each step, waits for them, and ends all when one is lost."""

import atexit
import contextlib
import os
import queue
import secrets
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock, Thread
from typing import Any, Literal, NoReturn, TypeVar

import msgspec
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store

from kvtool.config import EngineConfig
from kvtool.errors import CapacityError, ConfigError, KVToolError, UnsupportedError
from kvtool.models import load_config, resolve_model
from kvtool.parallel import abort, leave
from kvtool.processes import frame
from kvtool.ranks.link import BEAT_SECONDS, SILENT_SECONDS, STARTING_SECONDS, Link, watch
from kvtool.ranks.messages import Beat, Count, Counted, Done, End, Failed, Launch, Launched, Ready, Start
from kvtool.ranks.node import END_SECONDS, start_followers
from kvtool.ranks.rendezvous import ENV, INTERFACES, Meeting, open_store, own_address, read_hello, take_place
from kvtool.ranks.topology import check_copies, check_model, check_topology, placed
from kvtool.request import Export, Import, ScheduledBatch, StepResult
from kvtool.runner import Handle, Runner

LAUNCH_SECONDS = 60.0  # for the launch of a step, which may compile kernels
STEP_SECONDS = 8.0  # behind it: the device may hang; or, if that is more,
SLOWER = 4  # times what the longest one took
SAY_SECONDS = 1.0  # for last words, where others are being said
LEAVE_SECONDS = 6.0  # for rank 0 to give its place up, behind the others

ANSWERS = (Ready, Launched, Done, Counted)
Answer = TypeVar("Answer", Launched, Done)


class Ranks:
    """The other ranks of a model, as rank 0 sees them. It begins by starting those of this machine.

    A rank that dies or hangs ends this process, and the others with it: who waits for a rank in the midst of a step
    cannot be told otherwise. What is raised here in the midst of one ends the others, and is raised on.

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
        self._last_words: End | Failed | None = None
        self._speaking_last = Lock()
        self._closed = Event()
        self._is_ready = False
        self._most_starting = float(max(config.dist_timeout, STARTING_SECONDS))
        self._named_by_the_user = INTERFACES & os.environ.keys()
        check_copies(config)
        atexit.register(self.close)
        with self.starting():
            address = config.dist_init_addr or "127.0.0.1:0"
            store, address = open_store(address, config.num_ranks, config.dist_timeout, 0)
            self._processes = start_followers(config, address, config.ranks_here[1:])
            self._gather(store, config, address)
            self.tell(Start(config, work, os.getpid()))
            Thread(target=watch, args=[self._links, self._receive, self._lost, self._look], daemon=True).start()
            self.config = placed(config, config.local_rank)
            with self.within("ranks have been taking their places", self._most_starting):
                self.parallel = take_place(store, 0, self.config)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around what this rank makes of its place while the others make the same; an error ends them."""
        try:
            with self.waiting():
                yield
        except BaseException as error:
            self.dismiss(Failed.by(error))
            self.close()
            raise

    def await_ready(self) -> None:
        """Let the others end what they have begun with, which this rank has done."""
        for link in self._links:
            with self.within(f"{link.name} has not been ready", self._most_starting):
                self._answers[link, Ready].get()
            link.patience = SILENT_SECONDS
        self._is_ready = True

    def tell(self, message: object) -> None:
        """Say something to all others, who carry it out in its turn."""
        told = frame(message)
        for link in self._links:
            link.send_frame(told)

    def dismiss(self, last_words: End | Failed) -> None:
        """Tell the followers that it is over, whatever this process is in the midst of. What is said first holds; when
        this returns, it has been said."""
        with self._speaking_last:
            if self._last_words is not None:
                return
            self._last_words = last_words
            if isinstance(last_words, Failed):  # which this machine's need not repeat
                self._kill()
            for link in self._links:
                link.send_within(SAY_SECONDS, last_words)

    def close(self) -> None:
        """Let the followers end, and free what is needed for others to start in this process."""
        atexit.unregister(self.close)
        self.dismiss(End())
        if self._is_ready:
            self._release()
        if dist.is_initialized():
            failed = self._last_words if isinstance(self._last_words, Failed) else None
            who = f"rank 0 {failed.error} and" if failed else "rank 0"
            # NCCL may wait for ranks that are no more, or for a graph that holds its calls.
            with self.within(f"{who} has not got away from the others", LEAVE_SECONDS):
                abort() if failed else leave(self.parallel)
        self._closed.set()
        for variable in INTERFACES - self._named_by_the_user:
            os.environ.pop(variable, None)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        self._kill()
        for process in self._processes:
            process.wait()

    def _release(self) -> None:
        """Give back what the ranks' group must outlive."""

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _gather(self, store: Store, config: EngineConfig, address: str) -> None:
        """Let all followers in, and nobody else.

        Raises:
            ConfigError: one did not come.
            KVToolError: one ended before it came.
        """
        missing = set(range(1, config.num_ranks))
        if config.nnodes > 1 and address != ENV:
            print(f"waiting for the other nodes at {address} ...", file=sys.stderr, flush=True)
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
                    ranks = "ranks" if len(missing) > 1 else "rank"
                    raise ConfigError(
                        f"{ranks} {named} did not come to {address} within --dist-timeout {config.dist_timeout} s: are "
                        "all nodes started, with the same --tp, --ep, --pp, --nnodes and --dist-init-addr?"
                    )
                for link in self._links:
                    link.send_within(0, Beat())  # they would end long before --dist-timeout is over
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    hello = read_hello(connection)
                    if not hello or not secrets.compare_digest(hello.secret, meeting.secret):
                        connection.close()
                        continue
                    link = Link(connection, f"rank {hello.rank} (process {hello.pid} on {hello.host})")
                    self._links.append(link)
                    if hello.size != config.num_ranks or hello.rank not in missing:
                        raise ConfigError(
                            f"{link.name}, of {hello.size}, is none of the {config.num_ranks} that are awaited: start "
                            "all nodes with the same --tp, --ep, --pp and --nnodes, and each with its own --node-rank"
                        )
                    missing.remove(hello.rank)
                    self._answers |= {(link, kind): queue.SimpleQueue() for kind in ANSWERS}

    def _receive(self, link: Link, body: bytes) -> None:
        message = msgspec.msgpack.decode(body, type=Ready | Launched | Done | Counted | Failed | Beat)
        if isinstance(message, Failed):
            self._lost(link, message.error)
        elif not isinstance(message, Beat):
            self._answers[link, type(message)].put(message)

    def _lost(self, link: Link, why: str) -> None:
        if self._last_words is None:
            self.end(f"{link.name} {why}")
        while not self._closed.wait(BEAT_SECONDS):  # they end one by one, and this rank has yet to get away
            self._look()

    def end(self, why: str) -> NoReturn:
        """End all ranks, as each waits for all."""
        print(f"error: {why}; all ranks end with it", file=sys.stderr, flush=True)
        self.dismiss(Failed(f"ends, because {why}", 1))
        self._kill()
        os._exit(1)

    @contextlib.contextmanager
    def within(self, what: str, seconds: float) -> Iterator[None]:
        """Around a wait that ends all ranks where it takes longer than that; `what` then was the case for so long."""
        self._awaited = (what, time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._awaited = None

    def _look(self) -> None:
        awaited = self._awaited
        if awaited and time.monotonic() > awaited[1]:
            self.end(f"{awaited[0]} for {awaited[2]:.0f} s")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what all ranks do together. What is raised in it ends the others, who may wait for this one in the
        midst of it, and for ever; but not a KVToolError, which all of them have met."""
        try:
            yield
        except KVToolError:
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError):
                # Where another rank has ended, torch's complaint comes before ours, and does not say which one.
                time.sleep(SILENT_SECONDS + BEAT_SECONDS)
            failed = Failed.by(error)
            if isinstance(error, Exception):
                print(f"error: rank 0 {failed.error}; all ranks end with it", file=sys.stderr, flush=True)
            self.dismiss(failed)
            raise


class RunnerRanks(Ranks):
    """Rank 0 of an engine and its followers, which launch and collect as one `Runner` does.

    Attributes:
        runner: rank 0's.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, "steps")
        self._step = 0
        self._launched: deque[tuple[int, Handle]] = deque()
        self._token_ids: dict[int, int] = {}
        with self.starting():
            self.runner = Runner(self.config, self.parallel)
            self.await_ready()
        self._longest = self.runner.largest_step_seconds  # that a step has taken behind its launch

    def _release(self) -> None:
        self.runner.graphs = None

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
        with self.waiting(), self.within("rank 0 has been in one step", LAUNCH_SECONDS):
            self.tell(Launch(self._step, batch, mask, self._token_ids, list(exports)))
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
            self._answer_of(link, Launched, step, LAUNCH_SECONDS)
        began, most = time.monotonic(), max(STEP_SECONDS, SLOWER * self._longest)
        answers = [self._answer_of(link, Done, step, most) for link in self._links]
        with self.waiting(), self.within("rank 0 has been in one step", most):
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
        with self.waiting(), self.within("a rank has been in one step", LAUNCH_SECONDS):
            self.tell(Count())
            totals = self.runner.expert_tokens()
            for link in self._links:
                totals |= self._answers[link, Counted].get().expert_tokens
        return dict(sorted(totals.items()))

    def _answer_of(self, link: Link, kind: type[Answer], step: int, seconds: float) -> Answer:
        """What a follower says of a step, whatever it has said of steps before."""
        with self.within(f"{link.name} has been in one step", seconds):
            while True:
                answer: Answer = self._answers[link, kind].get()
                if answer.step == step:
                    return answer
