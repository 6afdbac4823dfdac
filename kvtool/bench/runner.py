"""Sends a workload to a target when it should be sent, and makes a record of each request."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter

from kvtool.bench.events import Failure, RequestRecord, WorkItem
from kvtool.bench.metrics import Sketch
from kvtool.bench.target import Answer, Prompt, RequestFailed, Target

STALL_PERIOD = 0.01  # seconds between looks at the event loop
LOST_AFTER = 8  # connections refused in a row, and the target is gone


@dataclass
class Progress:
    """How a run stands, for whoever watches it.

    Attributes:
        start: of the run, of `perf_counter`.
        send_lags: milliseconds from when a request could have been sent, being due and a slot free, until it was.
        stalls: milliseconds by which the event loop was late, each time it was looked at.
        lost: the target no longer answers; the rest of the workload was not sent.
        interrupted: the user stopped it; what was under way left no record.
    """

    start: float = field(default_factory=perf_counter)
    sent: int = 0
    done: int = 0
    failed: int = 0
    most_running: int = 0
    send_lags: Sketch = field(default_factory=Sketch)
    stalls: Sketch = field(default_factory=Sketch)
    lost: bool = False
    interrupted: bool = False

    @property
    def running(self) -> int:
        return self.sent - self.done

    def merge(self, other: "Progress") -> None:
        """Take in what another run said of the client."""
        self.most_running = max(self.most_running, other.most_running)
        self.send_lags.merge(other.send_lags)
        self.stalls.merge(other.stalls)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return perf_counter() - self.start


async def run(
    target: Target,
    items: Iterable[WorkItem],
    on_record: Callable[[RequestRecord], None],
    *,
    run_id: int = 0,
    concurrency: int | None = None,
    duration: float | None = None,
    progress: Progress | None = None,
) -> Progress:
    """Send `items`, each at its time, and wait for all answers. Cancelled, it abandons what is under way.

    Args:
        items: in the order of their times; turns of a session one after the other.
        on_record: is given each request's record when it has ended.
        run_id: of the records.
        concurrency: sessions, or requests without one, that run at once; None: as many as their times make it.
        duration: seconds after which nothing more is sent.
        progress: is kept up to date.
    """
    progress = progress or Progress()
    sender = _Sender(target, on_record, run_id, progress)
    slots = asyncio.Semaphore(concurrency) if concurrency else None
    tasks: set[asyncio.Task[None]] = set()
    faults: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if slots:
            slots.release()
        if not task.cancelled() and (fault := task.exception()):
            faults.append(fault)

    watch = asyncio.create_task(_watch(progress.stalls))
    try:
        for turns in sessions(items):
            due = await _due(turns[0], progress.start)
            if slots:
                await slots.acquire()
            if faults or progress.lost or (duration is not None and progress.seconds >= duration):
                break
            task = asyncio.create_task(sender.session(turns, perf_counter() if due is None else due))
            tasks.add(task)
            task.add_done_callback(ended)
        while tasks:
            await asyncio.wait(tasks)
    except asyncio.CancelledError:
        progress.interrupted = True
    finally:
        watch.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
    if faults:
        raise faults[0]
    return progress


def sessions(items: Iterable[WorkItem]) -> Iterator[list[WorkItem]]:
    """The turns of each session; an item without one is alone."""
    for session, turns in groupby(items, lambda item: item.session):
        if session is None:
            yield from ([item] for item in turns)
        else:
            yield list(turns)


async def _due(item: WorkItem, start: float) -> float | None:
    """Wait until `item` is due; returns when that is."""
    if item.scheduled is None:
        return None
    await asyncio.sleep(start + item.scheduled - perf_counter())
    return start + item.scheduled


async def _watch(stalls: Sketch) -> None:
    """See how late the event loop is: whatever arrives meanwhile is stamped as late."""
    while True:
        before = perf_counter()
        await asyncio.sleep(STALL_PERIOD)
        stalls.add((perf_counter() - before - STALL_PERIOD) * 1e3)


class _Sender:
    """Sends the requests of one run."""

    def __init__(
        self, target: Target, on_record: Callable[[RequestRecord], None], run_id: int, progress: Progress
    ) -> None:
        self._target, self._on_record, self._run_id, self._progress = target, on_record, run_id, progress
        self._refused = 0

    async def session(self, turns: list[WorkItem], due: float) -> None:
        """Turns one after the other, each behind what was said before; they end with the first that fails."""
        said: Prompt | None = None
        free = perf_counter()
        for item in turns:
            if item.turn > 0:
                free = perf_counter() + item.think_seconds
                due = max(free, self._progress.start + (item.scheduled or 0.0))
                await asyncio.sleep(due - perf_counter())
            prompt = item.prompt if said is None else joined(said, item.prompt)
            answer = await self._request(item, prompt, due, max(due, free))
            if answer is None:
                break
            said = with_answer(prompt, answer)

    async def _request(self, item: WorkItem, prompt: Prompt, due: float, could: float) -> Answer | None:
        """One request, from when it `could` be sent to its record; returns the answer unless it failed."""
        answer, progress = Answer(), self._progress
        failure: Failure | None = None
        error = ""
        progress.sent += 1
        progress.most_running = max(progress.most_running, progress.running)
        try:
            await self._target.send(prompt, item, answer)
            check(item, prompt, answer)
        except RequestFailed as failed:
            failure, error = failed.failure, str(failed)
        progress.send_lags.add((answer.sent - could) * 1e3)
        progress.done += 1
        progress.failed += failure is not None
        self._refused = self._refused + 1 if failure == "connect" else 0
        progress.lost |= self._refused >= LOST_AFTER
        self._on_record(_record(self._run_id, item, answer, due, progress.start, failure, error))
        return answer if failure is None else None


def joined(said: Prompt, prompt: Prompt) -> Prompt:
    """A conversation and what follows it, both texts, ids or messages."""
    return said + prompt  # type: ignore[operator]


def with_answer(prompt: Prompt, answer: Answer) -> Prompt:
    """A prompt and its answer, as the beginning of the next turn's prompt."""
    if isinstance(prompt, str):
        return prompt + answer.text
    if prompt and isinstance(prompt[0], dict):
        return [*prompt, {"role": "assistant", "content": answer.text}]
    return [*prompt, *answer.token_ids]


def check(item: WorkItem, prompt: Prompt, answer: Answer) -> None:
    """Make sure that a complete answer is one that can be timed.

    Raises:
        RequestFailed: it is empty, or of another length than asked for, or had its prompt computed before.
    """
    if answer.output_tokens is None and answer.chunk_tokens and min(answer.chunk_tokens) >= 0:
        answer.output_tokens = sum(answer.chunk_tokens)
    if not any(kind != "e" for kind in answer.chunk_kinds):
        raise RequestFailed("empty", "the answer holds no token")
    if answer.output_tokens is None:
        raise RequestFailed("wrong_length", "the server says neither how many tokens it sent (usage) nor their ids")
    if answer.output_tokens != item.output_tokens and not (item.stops and answer.output_tokens < item.output_tokens):
        raise RequestFailed("wrong_length", f"{answer.output_tokens} tokens came, not {item.output_tokens}")
    is_ids = not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt[:1])
    if is_ids and answer.prompt_tokens not in (None, len(prompt)):
        raise RequestFailed("wrong_length", f"the server saw {answer.prompt_tokens} prompt tokens, not {len(prompt)}")
    if item.unique and item.turn == 0 and (answer.cached_tokens or 0) > answer.template_tokens:
        raise RequestFailed(
            "cached",
            f"{answer.cached_tokens} tokens of a new prompt were in the cache; add --flush-cache or change --seed",
        )


def _record(
    run_id: int, item: WorkItem, answer: Answer, due: float, start: float, failure: Failure | None, error: str
) -> RequestRecord:
    def since(time: float) -> float:
        return round(time - start, 7)

    return RequestRecord(
        run=run_id,
        id=item.id,
        session=item.session,
        turn=item.turn,
        group=item.group,
        asked_tokens=item.output_tokens,
        scheduled=since(due),
        sent=since(answer.sent),
        first_byte=None if answer.first_byte is None else since(answer.first_byte),
        chunk_times=[since(time) for time in answer.chunk_times],
        chunk_kinds="".join(answer.chunk_kinds),
        chunk_tokens=answer.chunk_tokens,
        ended=since(answer.ended),
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        output_tokens=answer.output_tokens,
        queue_seconds=answer.queue_seconds,
        finish_reason=answer.finish_reason,
        failure=failure,
        error=error,
    )
