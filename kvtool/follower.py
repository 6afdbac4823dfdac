"""The process of a rank behind rank 0: it computes what rank 0 says, until that says that it is over."""

import contextlib
import gc
import os
import queue
import signal
import sys
import time
import traceback
from threading import Thread, Timer
from typing import NoReturn

import msgspec
import numpy as np

from kvtool.config import EngineConfig
from kvtool.errors import KVToolError, UnsupportedError
from kvtool.handoff import Outgoing, WholeStore
from kvtool.parallel import Parallel, leave
from kvtool.ranks.link import BEAT_SECONDS, ENDED, RANK_0_SILENT_SECONDS, Link, watch
from kvtool.ranks.messages import Beat, Count, Counted, Done, End, Failed, Launch, Launched, Ready, Start
from kvtool.ranks.node import END_SECONDS
from kvtool.ranks.rendezvous import Seat, meet, open_store, take_place
from kvtool.ranks.topology import placed
from kvtool.runner import Handle, Runner
from kvtool.scoring import ScoringModel, ScoringOrder

Order = Start | Launch | Count | ScoringOrder | End
Inbox = queue.SimpleQueue[Order]


def main(seat: str) -> None:
    """A process with its seat, in JSON. It ends when the one that started it does, which holds its stdin."""
    Thread(target=_end_with_stdin, daemon=True).start()
    # Ctrl-C and a service manager's SIGTERM reach the whole group; rank 0 says when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(msgspec.json.decode(seat, type=Seat))


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)  # a read of sys.stdin itself would hold a lock that Python wants when it ends
    os._exit(1)


def follow(seat: Seat) -> NoReturn:
    """Be a rank, until rank 0 says that it is over, or says nothing any more."""
    inbox = Inbox()
    parent, is_over = 0, False

    def receive(link: Link, body: bytes) -> None:
        nonlocal is_over
        message = msgspec.msgpack.decode(body, type=Order | Beat | Failed)
        if isinstance(message, Failed):
            end(f"{link.name} {message.error}", message.status)
        if isinstance(message, End):
            is_over = True
            Timer(END_SECONDS, os._exit, [0]).start()  # whatever this rank is in the midst of
        if not isinstance(message, Beat):
            inbox.put(message)

    def lost(link: Link, why: str) -> None:
        if is_over:
            return
        if why != ENDED and os.getppid() == parent:  # who waits for it would wait forever
            os.kill(parent, signal.SIGKILL)
        end(f"{link.name} {why}", 1)

    def end(why: str, status: int) -> NoReturn:
        print(f"error: {why}; rank {seat.rank} ends with it", file=sys.stderr, flush=True)
        os._exit(status)

    try:
        store, _ = open_store(seat.address, seat.size, seat.timeout, seat.rank)
        link = meet(store, seat)
    except KVToolError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    Thread(target=watch, args=[[link], receive, lost], daemon=True).start()
    start = inbox.get()
    assert isinstance(start, Start)
    parent = start.pid
    try:
        config = placed(start.config, seat.local_rank)
        parallel = take_place(store, seat.rank, config)
        work = {"steps": follow_steps, "scores": follow_scores}[start.work]
        work(config, parallel, link, inbox)
        leave(parallel)
        os._exit(0)
    except Exception as error:
        # Rank 0 may have met the same, or be about to hear of the rank whose end has ended this one.
        time.sleep(2 * BEAT_SECONDS)
        if is_over:
            os._exit(0)
        if not isinstance(error, KVToolError):
            traceback.print_exc()
        link.send(Failed.by(error))
    while True:  # rank 0 ends it
        signal.pause()


def _ready(link: Link) -> None:
    gc.collect()
    gc.freeze()  # as in the engine process
    link.send(Ready())
    link.patience = RANK_0_SILENT_SECONDS


def follow_steps(config: EngineConfig, parallel: Parallel, link: Link, inbox: Inbox) -> None:
    """Launch an engine's steps."""
    runner = Runner(config, parallel)
    store = WholeStore(runner.store, runner.whole_layout, parallel.tp) if config.handoff else None
    _ready(link)
    steps: queue.SimpleQueue[tuple[int, Handle]] = queue.SimpleQueue()
    Thread(target=_answer, args=[runner, steps, link], daemon=True).start()
    while isinstance(message := inbox.get(), Launch | Count):
        if isinstance(message, Count):
            link.send(Counted(runner.expert_tokens()))
            continue
        mask = None
        if message.allowed is not None:
            mask = np.frombuffer(message.allowed, np.int32).reshape(len(message.batch.samples), -1)
        if message.token_ids:
            runner.take_in(message.token_ids)
        if store is None:
            handle = runner.launch(message.batch, mask)
        else:
            outgoing = Outgoing(store, message.exports)
            handle = runner.launch(
                message.batch, mask, lambda imported: store.land(imported.memory, None), outgoing.on_layer
            )
            outgoing.finish()
        link.send(Launched(message.step))
        steps.put((message.step, handle))
    runner.graphs = None  # NCCL lets no rank go while there is a graph that holds its calls


def _answer(runner: Runner, steps: "queue.SimpleQueue[tuple[int, Handle]]", link: Link) -> None:
    """Tell rank 0 of each step that is over, whatever else is being launched."""
    speaks = runner.parallel.stage.is_last and not runner.parallel.stage.is_first and runner.parallel.tp.rank == 0
    while True:
        step, handle = steps.get()
        result, error = None, None
        try:
            result = runner.collect(handle)
        except UnsupportedError as fault:
            error = str(fault)
        except Exception as fault:
            traceback.print_exc()
            return link.send(Failed.by(fault))
        link.send(Done(step, error, result if speaks else None))


def follow_scores(config: EngineConfig, parallel: Parallel, link: Link, inbox: Inbox) -> None:
    """Compute what a text is scored by."""
    model = ScoringModel(config, parallel)
    _ready(link)
    while isinstance(message := inbox.get(), ScoringOrder):
        with contextlib.suppress(KVToolError):  # all ranks have met it, and rank 0 says so
            model.carry_out(message)
