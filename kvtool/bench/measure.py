"""Measures points, one after the other, on one target: warm-up, trials, figures, floor and verdict."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from pathlib import Path
from time import perf_counter, process_time, time
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from kvtool.bench.arrivals import Arrivals, scheduled
from kvtool.bench.client import API, HttpTarget
from kvtool.bench.events import EventLog, RequestRecord, Run, WorkItem, read_events
from kvtool.bench.floors import Floors, floor_probe, foreign_floors
from kvtool.bench.metrics import Figures
from kvtool.bench.runner import Progress, run
from kvtool.bench.selfcheck import Calibration, calibrate, client_row, limits
from kvtool.bench.slo import SLO, Goodput
from kvtool.bench.target import Answer, RequestFailed, Target, engine_target
from kvtool.bench.telemetry import Telemetry
from kvtool.bench.timeline import Timeline
from kvtool.bench.workloads import Hashed, Lengths, Vocabulary, Workload
from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

T = TypeVar("T")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TICK = 0.25  # seconds between news of progress
MOST_STREAMS = 256  # of the calibration
# Counters of prompt tokens that were found in a cache, vLLM's (older name last) and SGLang's.
HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total", "sglang:cached_tokens_total")
USUAL_VOCABULARIES = (32_000, 16_000, 8_000, 4_000, 2_000, 1_000)


@dataclass(frozen=True)
class Where:
    """What to measure.

    Attributes:
        url: of a server; None: our own engine, in a process of its own.
        api: the server's route.
        extra_body: fields for every request to it.
        timeout: seconds for one request to it.
        floor: compute floors; of a server that is not ours from `floor_config` (a model's config.json) and `gpu`.
    """

    url: str | None = None
    api: API = "completions"
    api_key: str | None = field(default=None, repr=False)
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    floor: bool = True
    floor_config: str | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class How:
    """How to measure a point.

    Attributes:
        requests: measured in each trial; None: as many as `duration` lets in.
        duration: seconds in which requests are sent.
        warmup: requests before, which are not counted.
        flush_cache: before each trial.
        definitions: a key of `DEFINITIONS`.
        floor: whose floor stands in the row.
        slo: what each request is held to; None: to nothing.
    """

    requests: int | None = 5
    duration: float | None = None
    warmup: int = 1
    trials: int = 1
    flush_cache: bool = False
    definitions: str = "kvtool"
    floor: Literal["ttft", "tpot"] = "ttft"
    slo: SLO | None = None


@dataclass(frozen=True)
class Point:
    """One row.

    Attributes:
        label: what makes it this one: prompt_tokens, output_tokens, concurrency, rate; `point` is its name.
        items: its requests, for each repeat others; the second argument is called for each that does not fit.
        primers: what is asked before, unmeasured, for each repeat.
        concurrency: sessions that run at once; None: as many as the items' times make it.
    """

    label: dict[str, Any]
    items: Callable[[int, Callable[[], None]], Iterator[WorkItem]]
    primers: Callable[[int], list[WorkItem]] = lambda repeat: []
    concurrency: int | None = None


OnProgress = Callable[[Point, How, Progress], None]
Row = dict[str, Any]
Plan = Callable[["Bench"], Generator[tuple[Point, How], Row, None]]  # each point is answered by its row


@dataclass(frozen=True)
class Measured:
    """What the points of a plan came to.

    Attributes:
        target: what it says of itself.
        stopped: why there are not all points: the user or the target's end.
    """

    rows: list[dict[str, Any]]
    target: dict[str, Any]
    stopped: Literal["interrupted", "lost"] | None


class Seen:
    """What is kept of a point beside its figures: of the SLO, gaps over time, what was asked and what was not."""

    def __init__(self, how: How) -> None:
        self._goodput = Goodput(how.slo) if how.slo else None
        self._timeline, self._left_out = Timeline(), 0
        self.asked, self._all_unique, self._tells_cached = Hashed(), True, False

    def ask(self, items: Iterable[WorkItem]) -> Iterator[WorkItem]:
        """Pass requests on that are to be asked."""
        for item in self.asked(items):
            self._all_unique &= item.unique and item.turn == 0
            yield item

    def add(self, record: RequestRecord) -> None:
        self._timeline.add(record)
        self._tells_cached |= record.cached_tokens is not None
        if self._goodput:
            self._goodput.add(record)

    def hidden_hits(self, counted: dict[str, float]) -> list[str]:
        """What a server's counters say of prompts that were to be new, where its answers say nothing of a cache."""
        hits = next((counted[name] for name in HITS if counted.get(name, 0.0) > 0), 0.0)
        if self._tells_cached or not self._all_unique or not hits:
            return []
        return [f"{hits:,.0f} tokens of new prompts were in the server's cache; add --flush-cache or change --seed"]

    def leave_out(self) -> None:
        self._left_out += 1

    def row(self, seconds: float) -> dict[str, Any]:
        return {
            **(self._goodput.row(seconds) if self._goodput else {}),
            "itl_timeline": self._timeline.row(),
            "prompts_sha256": self.asked.digest.hexdigest(),
            "left_out": self._left_out,
        }


@dataclass
class Bench:
    """A target and what has been found out about it.

    Attributes:
        local: the target runs on this machine.
        floors: None where they are not known.
        calibration: of the client; None where no HTTP is in between.
        log: where events go.
        chat: all prompts begin with the target's chat template, which a cache may well hold.
        stopped: why no more is measured: the user or the target's end.
    """

    target: Target
    local: bool
    floors: Floors | None = None
    calibration: Calibration | None = None
    log: EventLog | None = None
    on_progress: OnProgress = lambda point, how, progress: None
    chat: bool = False
    stopped: Literal["interrupted", "lost"] | None = None

    def __post_init__(self) -> None:
        self._telemetry = Telemetry(self.target, self.local)
        self._repeats, self._runs = count(), count()
        gc.collect()
        gc.freeze()  # what has been imported is not searched for garbage while chunks wait

    @property
    def vocabulary(self) -> Vocabulary:
        """What prompts for the target can be made of."""
        return replace(prompt_ids(self.target.vocab_size), count=self.target.count_tokens)

    async def measure(self, point: Point, how: How) -> dict[str, Any]:
        """A row: what `point` came to, in all trials together and, where there are several, in each."""
        total, trials, client = Figures(how.definitions), list[Figures](), Progress()
        seen = Seen(how)
        await self._unmeasured(point, islice(point.items(next(self._repeats), lambda: None), how.warmup))
        cpu, start = process_time(), perf_counter()
        async with self._telemetry.watching() as readings:
            for trial in range(how.trials):
                if self.stopped is None:
                    figures = await self._trial(point, how, trial, client, seen)
                    total.merge(figures)
                    trials.append(figures)
        cpu = (process_time() - cpu) / (perf_counter() - start)
        row = point.label | lengths(point, total) | total.row()
        row |= readings.row(total.output_tokens) | self._judge(how, total, client.most_running)
        row |= seen.row(total.seconds)
        if not self.chat:
            row["invalid"] = [*row["invalid"], *seen.hidden_hits(row["server_metrics"])]
            row["valid"] = not row["invalid"]
        row["client"] = client_row(client, cpu, self.calibration)
        row["client_limits"] = limits(client, cpu, self.calibration, total.ttft)
        row["partial"] = self.stopped is not None
        if how.trials > 1:
            row["trials"] = [figures.row(samples=False) for figures in trials]
        return row

    async def _trial(self, point: Point, how: How, trial: int, client: Progress, seen: "Seen") -> Figures:
        if how.flush_cache:
            await self.target.flush_cache()
        repeat, run_id = next(self._repeats), next(self._runs)
        await self._unmeasured(point, point.primers(repeat))
        figures = Figures(how.definitions)
        if self.log:
            self.log.write(
                Run(id=run_id, point=point.label, trial=trial, target=self.target.describe(), started=time())
            )

        def record(record: RequestRecord) -> None:
            figures.add(record)
            seen.add(record)
            if self.log:
                self.log.write(record)

        progress = Progress()
        ticker = asyncio.create_task(self._tick(point, how, progress))
        try:
            items = seen.ask(islice(point.items(repeat, seen.leave_out), how.requests))
            options = {"run_id": run_id, "concurrency": point.concurrency, "duration": how.duration}
            await run(self.target, items, record, progress=progress, **options)  # type: ignore[arg-type]
        finally:
            ticker.cancel()
        client.merge(progress)
        self.stopped = "interrupted" if progress.interrupted else "lost" if progress.lost else None
        return figures

    async def _unmeasured(self, point: Point, items: Iterable[WorkItem]) -> None:
        """Ask these and forget the answers."""
        progress = await run(self.target, items, lambda record: None, concurrency=point.concurrency or MOST_STREAMS)
        if progress.interrupted:
            raise asyncio.CancelledError

    async def _tick(self, point: Point, how: How, progress: Progress) -> None:
        while True:
            self.on_progress(point, how, progress)
            await asyncio.sleep(TICK)

    def _judge(self, how: How, figures: Figures, sequences: int) -> dict[str, Any]:
        """Floor, the share of it that was reached, and whether the figures are possible at all."""
        count = figures.ttft.count
        if self.floors is None or not count:
            return {"floor_ms": None, "floor_share": None, "floor_source": None, "valid": True, "invalid": []}
        prompt = figures.prompt_tokens / count
        if how.floor == "ttft":
            floor, reached = self.floors.ttft_ms(round(prompt), figures.cached_tokens // count), figures.ttft
        else:
            context = prompt + figures.output_tokens / count / 2
            floor, reached = self.floors.tpot_ms(context, sequences), figures.tpot
        invalid = self.floors.impossible(figures, sequences)
        return {
            "floor_ms": floor,
            "floor_share": floor / reached.quantiles([0.5])[0] if reached.count else None,
            "floor_source": self.floors.rates.source,
            "valid": not invalid,
            "invalid": invalid,
        }


@contextlib.asynccontextmanager
async def opened(where: Where, engine: EngineConfig, streams: int) -> AsyncIterator[Bench]:
    """The target, ready; closed with the block.

    Args:
        streams: that will be open at once, for the calibration.

    Raises:
        ConfigError: there is no such server, or it has not this model.
        KVToolError: the engine could not start.
    """
    if where.url is None:
        async with contextlib.AsyncExitStack() as stack:
            probe = await stack.enter_async_context(floor_probe()) if where.floor else None
            target = await stack.enter_async_context(engine_target(engine))
            yield Bench(target, local=True, floors=await probe(target.client.info) if probe else None)
        return
    if engine.profile:
        raise ConfigError("--profile: traces our own engine; give it to the server, and leave it out here")
    floors = None
    if where.floor_config or where.gpu:
        if not (where.floor_config and where.gpu):
            raise ConfigError("--floor-config and --gpu: a floor needs both, what is computed and on what")
        floors = foreign_floors(Path(where.floor_config), where.gpu)
    server = HttpTarget(where.url, where.api, api_key=where.api_key, extra_body=where.extra_body, timeout=where.timeout)
    try:
        await server.open(None if engine.model == EngineConfig.model else engine.model)
        if server.vocab_size is None and where.api != "chat":  # which is asked in words
            server.vocab_size = await find_vocabulary(server)
        local = urlsplit(server.url).hostname in LOOPBACK
        if floors is None and where.floor and local and server.engine is not None:
            async with floor_probe() as probe:
                floors = await probe(server.engine)
        calibration = await calibrate(min(max(1, streams), MOST_STREAMS))
        yield Bench(server, local, floors, calibration, chat=where.api == "chat")
    finally:
        await server.close()


def prompt_ids(vocab_size: int | None) -> Vocabulary:
    """Ids that prompts can be made of: none of the special ones, which stand at the ends of a vocabulary."""
    size = USUAL_VOCABULARIES[0] if vocab_size is None else vocab_size
    return Vocabulary(range(size // 32, size - size // 16))


async def find_vocabulary(server: HttpTarget) -> int | None:
    """The most ids, of a few usual numbers, from which a server takes a prompt that does not say how many it knows."""
    for size in USUAL_VOCABULARIES:
        prompt = [prompt_ids(size).ids[-1]]
        with contextlib.suppress(RequestFailed):
            await server.send(prompt, WorkItem(id=0, prompt=prompt, output_tokens=1), Answer())
            return size
    return None


async def measure_all(
    where: Where,
    engine: EngineConfig,
    plan: Plan,
    streams: int,
    *,
    log: EventLog | None = None,
    on_progress: OnProgress = lambda point, how, progress: None,
) -> Measured:
    """Measure the points of `plan`, until it or the target ends; cancelled, it keeps what it has.

    Args:
        streams: that will be open at once.
        log: where events go.
    """
    rows: list[dict[str, Any]] = []
    bench: Bench | None = None
    try:
        async with opened(where, engine, streams) as bench:
            bench.log, bench.on_progress = log, on_progress
            steps = plan(bench)
            with contextlib.suppress(StopIteration):
                point, how = next(steps)
                while True:
                    rows.append(await bench.measure(point, how))
                    if bench.stopped:
                        break
                    point, how = steps.send(rows[-1])
            return Measured(rows, bench.target.describe(), bench.stopped)
    except asyncio.CancelledError:
        return Measured(rows, bench.target.describe() if bench else {}, "interrupted")


def point_of(
    bench: Bench,
    workload: Workload,
    *,
    concurrency: int | None = None,
    arrivals: Arrivals | None = None,
    prefix_hit: float | None = None,
) -> Point:
    """A workload, in a closed loop of `concurrency` or at the times of `arrivals`, as a row.

    Args:
        prefix_hit: share of each prompt that primers have brought into the target's cache.

    Raises:
        ConfigError: its prompts are too long for the target.
    """
    most, vocabulary, made = bench.target.max_model_len, bench.vocabulary, workload.dataset == "random"
    prompt, output = fixed(workload.prompt), fixed(workload.output)
    if made and most is not None and prompt and output and workload.shared_prefix + prompt + output > most:
        raise ConfigError(
            f"--prompt-tokens {prompt} and --output-tokens {output}: the target's context is {most:,} tokens; "
            "ask for less, or serve with a greater --max-model-len"
        )
    fitting = replace(workload if prefix_hit is None else workload.with_prefix_hit(prefix_hit), max_model_len=most)

    def items(repeat: int, on_left_out: Callable[[], None]) -> Iterator[WorkItem]:
        asked = fitting.items(vocabulary, repeat, on_left_out)
        return scheduled(asked, arrivals) if arrivals else asked

    asked_for = {
        "": None if made else workload.dataset,
        "prompt": str(workload.prompt) if made else None,
        "output": str(workload.output),
        "concurrency": concurrency,
        "rate": str(arrivals) if arrivals else None,
        "prefix hit": prefix_hit,
    }
    label = {
        "point": ", ".join(f"{name} {value}".strip() for name, value in asked_for.items() if value is not None),
        "prompt_tokens": workload.shared_prefix + prompt if made and prompt else None,
        "output_tokens": output if made else None,
        "concurrency": concurrency,
        "rate": str(arrivals) if arrivals else None,
        "prefix_hit": prefix_hit,
    }
    return Point(label, items, lambda repeat: fitting.primers(vocabulary, repeat), concurrency)


def fixed(lengths: Lengths) -> int | None:
    """The length, if there is but one."""
    return int(lengths.first) if lengths.kind == "fixed" else None


def lengths(point: Point, figures: Figures) -> dict[str, Any]:
    """Tokens of prompts and answers on average, where the point names none."""
    count = figures.ttft.count
    means = {"prompt_tokens": figures.prompt_tokens, "output_tokens": figures.output_tokens}
    return {name: round(total / count) for name, total in means.items() if point.label.get(name) is None and count}


def recompute(path: Path, definitions: str) -> list[dict[str, Any]]:
    """The rows of a saved log under any tool's definitions; trials of a point together.

    Raises:
        ConfigError: the log cannot be read.
    """
    runs: dict[int, Run] = {}
    figures: dict[int, Figures] = {}
    for event in read_events(path):
        if isinstance(event, Run):
            runs[event.id], figures[event.id] = event, Figures(definitions)
        elif event.run in runs:
            figures[event.run].add(event)
        else:
            raise ConfigError(f"{path}: request {event.id} belongs to a run that the log does not name")
    rows = []
    for point, trials in groupby(runs.values(), lambda run: run.point):
        total = Figures(definitions)
        for trial in trials:
            total.merge(figures[trial.id])
        rows.append(point | total.row())
    return rows


def to_end(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work`; Ctrl-C cancels it once, so that it can keep what it has."""

    async def main() -> T:
        task = asyncio.ensure_future(work())
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        return await task

    return asyncio.run(main())
