"""What bench-ttft and bench-throughput share: whom to measure, with what load, and how a result is shown."""

import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .bench_results import Charts, ResultOptions, compared, keep, results_to_plot
from .charts import Chart
from .options import MOST, option, secret
from .output import Column, OutputOptions, Report, Row, Table, show, value_at

if TYPE_CHECKING:
    from kvtool.bench.measure import How, Measured, OnProgress, Plan, Point, Where
    from kvtool.bench.runner import Progress
    from kvtool.bench.workloads import Lengths, Workload

Rows = list[dict[str, Any]]
LINT = (Column("fault", "fault"), Column("seen", "seen"))

target_option = partial(option, panel="Target")
load_option = partial(option, panel="Load")
measure_option = partial(option, panel="Measurement")


@dataclass(frozen=True)
class BenchOptions:
    """The options that both commands have.

    Attributes:
        workload: with lengths and a seed that are still to be filled in.
        how: with requests of None where the user gave none, and one trial.
        trials: None where the user gave none.
    """

    where: "Where"
    workload: "Workload"
    how: "How"
    prompt_tokens: str | None
    output_tokens: str | None
    max_error_rate: float
    events: str | None
    save_events: str | None
    lint_stream: bool
    min_attainment: float
    trials: int | None


def bench_options(
    url: Annotated[
        str | None,
        target_option("--url", help="A server with OpenAI's or SGLang's API (default: our own engine, in process)."),
    ] = None,
    api: Annotated[
        Literal["completions", "chat", "generate"],
        target_option("--api", help="Of --url: OpenAI's completions or chat, or SGLang's /generate."),
    ] = "completions",
    api_key: Annotated[
        str | None,
        target_option("--api-key", callback=secret, metavar="KEY", help="Of --url; KVTOOL_API_KEY hides it from `ps`."),
    ] = None,
    extra_body: Annotated[
        str | None, target_option("--extra-body", metavar="JSON", help="Fields for every request to --url.")
    ] = None,
    timeout: Annotated[
        float, target_option("--timeout", min=0.001, help="Seconds after which a request to --url has failed.")
    ] = 600.0,
    floor: Annotated[
        bool,
        target_option("--floor/--no-floor", help="Measure this machine's rates, and compare with what they allow."),
    ] = True,
    floor_config: Annotated[
        str | None,
        target_option("--floor-config", metavar="FILE", help="config.json of the model behind --url, for its floor."),
    ] = None,
    gpu: Annotated[
        str | None, target_option("--gpu", metavar="NAME[:COUNT]", help="What --url runs on, say H200 or 'RTX 4090:2'.")
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        load_option(
            "--prompt-tokens",
            metavar="LIST",
            help="Tokens of the prompts: 128,1024; also uniform:100-500, poisson:200, lognormal:200:0.8.",
        ),
    ] = None,
    output_tokens: Annotated[
        str | None,
        load_option(
            "--output-tokens",
            "--max-tokens",
            metavar="LIST",
            help="Tokens of the answers, likewise; over what a data set says.",
        ),
    ] = None,
    requests: Annotated[
        int | None, load_option("--requests", min=1, max=MOST, help="Measured requests of each row.")
    ] = None,
    duration: Annotated[
        float | None, load_option("--duration", min=0.001, help="Or: seconds in which requests are sent.")
    ] = None,
    warmup: Annotated[int, load_option("--warmup", min=0, max=MOST, help="Requests before, not counted.")] = 1,
    trials: Annotated[
        int | None,
        load_option(
            "--trials", min=1, max=1000, help="Measure each row so many times (default: 1; bench-throughput: 3)."
        ),
    ] = None,
    dataset: Annotated[
        Literal["random", "sharegpt", "jsonl", "gsm8k", "azure", "mooncake"],
        load_option(
            "--dataset", help="What prompts are: random ids of exact length, or of what kind --dataset-path is."
        ),
    ] = "random",
    dataset_path: Annotated[
        str | None, load_option("--dataset-path", metavar="FILE", help="The data set or trace.")
    ] = None,
    shared_prefix: Annotated[
        int, load_option("--shared-prefix", min=0, max=MOST, help="More tokens, that random prompts have in common.")
    ] = 0,
    prefix_groups: Annotated[
        int, load_option("--prefix-groups", min=1, max=MOST, help="Different --shared-prefix beginnings.")
    ] = 1,
    turns: Annotated[int, load_option("--turns", min=1, max=10_000, help="Questions in a conversation.")] = 1,
    think_time: Annotated[
        float, load_option("--think-time", min=0.0, help="Seconds between an answer and the next question.")
    ] = 0.0,
    trace_speed: Annotated[
        float, load_option("--trace-speed", min=1e-6, help="Replay a trace so many times as fast.")
    ] = 1.0,
    length_scale: Annotated[
        float, load_option("--length-scale", min=1e-6, help="Multiply a trace's lengths, to fit a short context.")
    ] = 1.0,
    flush_cache: Annotated[
        bool, measure_option("--flush-cache", help="Make the target forget all prefixes before each trial.")
    ] = False,
    max_error_rate: Annotated[
        float, measure_option("--max-error-rate", min=0.0, max=1.0, help="Share of failed requests that exits 0.")
    ] = 0.0,
    metric_defs: Annotated[
        Literal["kvtool", "vllm", "sglang", "guidellm", "aiperf"],
        measure_option("--metric-defs", help="Whose definitions of TTFT, TPOT, ITL and E2E."),
    ] = "kvtool",
    events: Annotated[
        str | None,
        measure_option("--events", metavar="FILE", help="Measure nothing: compute the figures of a saved event log."),
    ] = None,
    save_events: Annotated[
        str | None, measure_option("--save-events", metavar="FILE", help="Keep a record of each request as JSON lines.")
    ] = None,
    lint_stream: Annotated[
        bool, measure_option("--lint-stream", help="Measure nothing: look for faults in the streams of --url.")
    ] = False,
    slo: Annotated[
        str | None,
        measure_option(
            "--slo",
            metavar="BOUNDS",
            help="Hold requests to ttft:200ms,tpot:20ms (itl, e2e too), or to default: TTFT by prompt length.",
        ),
    ] = None,
    min_attainment: Annotated[
        float, measure_option("--min-attainment", min=0.0, max=1.0, help="Share of requests that must keep --slo.")
    ] = 0.9,
) -> BenchOptions:
    """The signature is the list of the options that both commands have."""
    from kvtool.bench.measure import How, Where
    from kvtool.bench.slo import SLO
    from kvtool.bench.workloads import Workload

    if url is None:
        of_servers = {"extra-body": extra_body, "floor-config": floor_config, "gpu": gpu, "lint-stream": lint_stream}
        for name in (name for name, value in of_servers.items() if value):
            raise ConfigError(f"--{name}: is for a server; add --url")
    if events and save_events:
        raise ConfigError("--events reads what --save-events has written; leave out one of them")
    workload = Workload(
        dataset=dataset,
        path=dataset_path,
        shared_prefix=shared_prefix,
        prefix_groups=prefix_groups,
        turns=turns,
        think_seconds=think_time,
        trace_speed=trace_speed,
        length_scale=length_scale,
    )
    return BenchOptions(
        Where(url, api, api_key, _json_object(extra_body), timeout, floor, floor_config, gpu),
        workload,
        How(requests, duration, warmup, trials or 1, flush_cache, metric_defs, slo=SLO.parse(slo) if slo else None),
        prompt_tokens,
        output_tokens,
        max_error_rate,
        events,
        save_events,
        lint_stream,
        min_attainment,
        trials,
    )


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra-body: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--extra-body: write a JSON object")
    return value


def int_list(name: str, text: str, most: int = MOST) -> list[int]:
    """The numbers of `1,2,4`."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= most for number in numbers):
        raise ConfigError(f"{name} {text}: write numbers from 1 to {most:,}, separated by commas")
    return numbers


def workloads(options: BenchOptions, seed: int, prompts: str, outputs: str) -> "list[Workload]":
    """One for each pair of lengths.

    Args:
        prompts, outputs: lists of lengths where the user gave none.
    """
    from kvtool.bench.workloads import Lengths

    def lengths(name: str, given: str | None, default: str) -> "list[Lengths]":
        try:
            return [Lengths.parse(word.strip()) for word in (given or default).split(",")]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    if options.workload.dataset != "random":
        if options.prompt_tokens:
            raise ConfigError("--prompt-tokens: a data set's prompts are as long as they are; leave it out")
        prompts = prompts.partition(",")[0]
    return [
        replace(options.workload, seed=seed, prompt=prompt, output=output, output_first=bool(options.output_tokens))
        for prompt in lengths("--prompt-tokens", options.prompt_tokens, prompts)
        for output in lengths("--output-tokens", options.output_tokens, outputs)
    ]


def measured(
    engine: EngineConfig,
    options: BenchOptions,
    results: ResultOptions,
    streams: int,
    plan: "Plan",
) -> "Measured":
    """What the points of `plan` came to."""
    from kvtool.bench.measure import measure_all

    return drive(options, results, partial(measure_all, options.where, engine, plan, streams))


def drive(
    options: BenchOptions, results: ResultOptions, measure: "Callable[..., Coroutine[Any, Any, Measured]]"
) -> "Measured":
    """Run `measure` with news of it on a terminal, and its records in --save-events or the bundle."""
    from kvtool.bench.bundle import EVENTS
    from kvtool.bench.events import EventLog
    from kvtool.bench.measure import to_end

    events = Path(options.save_events) if options.save_events else results.bundle and results.bundle / EVENTS
    with ExitStack() as stack:
        log = stack.enter_context(EventLog.create(events)) if events else None
        on_progress = stack.enter_context(news())
        return to_end(lambda: measure(log=log, on_progress=on_progress))


@contextmanager
def news() -> "Iterator[OnProgress]":
    """A line on stderr, if that is a terminal, that says how the point under way stands."""
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    status = Status("starting ...", console=console)

    def show_progress(point: "Point", how: "How", progress: "Progress") -> None:
        name = " ".join(f"{name}={value}" for name, value in point.label.items() if value is not None)
        rate = progress.done / max(progress.seconds, 1e-9)
        if how.requests is not None:
            left = (how.requests - progress.done) / rate if rate else None
        else:
            left = max(0.0, (how.duration or 0.0) - progress.seconds)
        end = "" if left is None else f", {left:.0f} s left"
        counts = f"{progress.done} done, {progress.running} running, {progress.failed} failed"
        status.update(Text(f"{name}: {counts}, {rate:.1f} requests/s{end}"))

    if not console.is_terminal:
        yield lambda point, how, progress: None
        return
    with status:
        yield show_progress


@dataclass(frozen=True)
class Form:
    """How a command's results look.

    Attributes:
        command: its name.
        charts: of results, which have a name each where there are several.
    """

    command: str
    columns: Sequence[Column]
    tables: Callable[[Rows], Sequence[Table]]
    charts: Charts


def instead(form: Form, options: BenchOptions, results: ResultOptions, output: OutputOptions) -> bool:
    """Do what options ask for in the place of a measurement, if any does."""
    if options.events:
        from kvtool.bench.measure import recompute

        rows = recompute(Path(options.events), options.how.definitions)
        config = {"events": options.events, "metric_defs": options.how.definitions}
        show(report(form.command, config, rows, form.columns, form.tables(rows), (), [meaning(options)]), output)
    elif options.lint_stream:
        from kvtool.bench.lint import lint_stream

        faults = [asdict(fault) for fault in lint_stream(options.where)]
        asked = {"url": options.where.url, "api": options.where.api}
        notes = ["No fault found."] if not faults else []
        show(report(form.command, asked, faults, LINT, (), (), notes), output)
        if faults:
            raise typer.Exit(1)
    elif results.plot:
        drawn = results_to_plot(form.command, results)
        rows = [{"result": name, **row} for name, result in drawn.items() for row in result]
        settings = (Column("setting", "variant"),) if any("variant" in row for row in rows) else ()  # of --ablate
        columns = (Column("result", "result"), *settings, *form.columns)
        stems = [Path(name).stem for name in drawn]
        charts = form.charts(list(zip(stems if len({*stems}) == len(stems) else drawn, drawn.values(), strict=True)))
        notes = [] if output.output else ["Only a table: charts are drawn with --output picture.html or .png."]
        show(report(form.command, {"plot": list(drawn)}, rows, columns, (), charts, notes), output)
    return bool(options.events or options.lint_stream or results.plot)


def config_of(engine: EngineConfig, options: BenchOptions, workloads: "Sequence[Workload]") -> dict[str, Any]:
    """What was asked for, as it stands in a result."""
    return {
        "engine": asdict(engine) if options.where.url is None else None,
        "where": {name: value for name, value in asdict(options.where).items() if name != "api_key"},
        "workload": [workload.describe() for workload in workloads],
        "how": asdict(options.how),
    }


def finish(
    form: Form,
    config: dict[str, Any],
    options: BenchOptions,
    results: ResultOptions,
    output: OutputOptions,
    result: "Measured",
    notes: Sequence[str] = (),
) -> None:
    """Show a result, and exit with what it means: 130 interrupted; 1 for failed, impossible, incomplete, an SLO missed
    or a gate broken; else 0."""
    rows = [row | {"state": state(row, options)} for row in result.rows]
    notes = [*notes_of(options, result), *notes]
    found = report(
        form.command,
        config | {"target": result.target},
        rows,
        form.columns,
        form.tables(rows),
        form.charts([("", rows)]),
        notes,
    )
    broken = False
    if not result.stopped:
        found, broken = compared(found, results)
    keep(found, results)
    show(found, output)
    if result.stopped == "interrupted":
        raise typer.Exit(130)
    nothing_kept = any("kept" in row for row in rows) and not any(row.get("kept") for row in rows)
    if result.stopped or broken or nothing_kept or any(is_bad(row, options) for row in rows):
        raise typer.Exit(1)


def is_bad(row: dict[str, Any], options: BenchOptions) -> bool:
    """It is a finding to fail on; that a search tried a rate that was too high is none."""
    failed = row["failed"] > options.max_error_rate * row["requests"]
    return bool(row["invalid"]) or (row.get("kept", True) and (failed or misses_slo(row, options)))


def misses_slo(row: dict[str, Any], options: BenchOptions) -> bool:
    """Too few requests kept it."""
    return "attainment" in row and row["attainment"]["all"] < options.min_attainment


def report(
    command: str,
    config: dict[str, Any],
    rows: Rows,
    columns: Sequence[Column],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    notes: Sequence[str],
) -> Report:
    """A report without columns that say nothing: no GPU's where there is none."""

    def telling(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
        return [column for column in columns if any(value_at(row, column.path) is not None for row in rows)]

    tables = [replace(table, columns=telling(table.columns, table.rows)) for table in tables]
    return Report(command, config, rows, telling(columns, rows), tables, charts, notes)


def state(row: dict[str, Any], options: BenchOptions) -> str:
    """In a word, what is wrong with a row."""
    words = ["INVALID"] if not row["valid"] else []
    words += [f"{row['failed']} failed"] if row["failed"] else []
    words += ["client-bound"] if row["client_limits"] else []
    words += ["partial"] if row["partial"] else []
    words += ["SLO missed"] if misses_slo(row, options) else []
    return ", ".join(words) or "ok"


def notes_of(options: BenchOptions, result: "Measured") -> list[str]:
    """What figures mean, and what is odd about them."""
    lines = [meaning(options)]
    lines += sorted({f"floor: {row['floor_source']}." for row in result.rows if row["floor_source"]})
    for row in result.rows:
        if row["left_out"]:
            lines.append(f"{row['point']}: {row['left_out']:,} requests do not fit the context and were left out")
        faults = [*row["invalid"], *(f"the client: {limit}" for limit in row["client_limits"])]
        faults += [f"{count} failed ({kind})" for kind, count in row["failures"].items()] + row["errors"]
        lines += [f"{row_name(row)}: {fault}" for fault in faults]
    if result.stopped == "lost":
        lines.append("The target no longer answers; what had been measured until then stands above.")
    return lines


def meaning(options: BenchOptions) -> str:
    from kvtool.bench.metrics import DEFINITIONS

    return "Times in ms. " + " ".join((DEFINITIONS[options.how.definitions].__doc__ or "").split())


def row_name(row: dict[str, Any]) -> str:
    names = ("engine", "batch_size", "prompt_tokens", "output_tokens", "concurrency", "rate")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)
