"""`kvtool bench-throughput`: how much a target does at once, and how long each request takes then."""

import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .bench import (
    BenchOptions,
    Form,
    Rows,
    config_of,
    drive,
    finish,
    instead,
    int_list,
    load_option,
    measured,
    workloads,
)
from .bench_ablate import Knob, ablation, show_allocation
from .bench_charts import throughput_charts
from .bench_results import ResultOptions, check_comparable
from .output import Column, OutputOptions, Table

if TYPE_CHECKING:
    from kvtool.bench.arrivals import Arrivals
    from kvtool.bench.measure import Bench, How, Point
    from kvtool.bench.workloads import Workload

    Steps = Generator[tuple[Point, How], dict[str, Any], None]

PROMPTS, OUTPUTS = "128", "64"
CONCURRENCY, BATCH_SIZES = "1,2,4,8", "1,4,8,16,32,64,128"
LONG, ABLATED = "512", "4"  # tokens of a prompt, and requests at once, where a knob is turned
VARYING = ("lognormal:256:0.8", "lognormal:128:0.8")  # of prompts and answers where their slots are counted
TRIALS = 3  # the fewest that tell what is noise
FEWEST, ROUNDS = 8, 4  # requests of a row, and of each of those that run at once
KEEPS_UP = 0.75  # of the rate asked for; less is served by one that falls behind, or asked too short a time to tell
UNBOUNDED = 64  # requests of a row that come at times of their own
MOST_STREAMS = 65_536

LOAD = (
    Column("prompt", "prompt_tokens", ",d"),
    Column("output", "output_tokens", ",d"),
    Column("at once", "concurrency", ",d"),
    Column("rate", "rate"),
)
COLUMNS = (
    *LOAD,
    Column("requests", "requests", ",d"),
    Column("requests/s", "requests_per_s", ",.2f"),
    Column("input tok/s", "input_tok_s", ",.0f"),
    Column("output tok/s", "output_tok_s", ",.0f"),
    Column("total tok/s", "total_tok_s", ",.0f"),
    Column("success", "success_rate", ".1%"),
    Column("goodput/s", "goodput", ",.2f"),
    Column("SLO kept", "attainment.all", ".1%"),
    *(Column(f"{name.upper()} kept", f"attainment.{name}", ".1%") for name in ("ttft", "tpot", "itl", "e2e")),
    Column("KV peak", "kv_usage_peak", ".1%"),
    Column("GPU MiB", "gpu_peak_mib", ",.0f"),
    Column("J/token", "joules_per_token", ".3g"),
    Column("", "state"),
)
OFFLINE = (
    Column("", "engine"),
    *LOAD[:2],
    Column("batch", "batch_size", ",d"),
    Column("output tok/s", "output_tok_s", ",.1f"),
    Column("× transformers", "ratio", ".2f"),
    Column("total tok/s", "total_tok_s", ",.1f"),
    Column("TPOT ms", "tpot_ms.p50", ",.2f"),
    Column("floor", "floor_ms", ",.2f"),
    Column("share", "floor_share", ".0%"),
    Column("memory MiB", "memory_mib", ",.0f"),
    Column("", "state"),
)
LATENCIES = (
    *LOAD,
    Column("", "latency"),
    *(Column(figure, figure, ",.2f") for figure in ("mean", "p50", "p90", "p99")),
    Column("floor", "floor_ms", ",.2f"),
    Column("share", "floor_share", ".0%"),
)


def bench_throughput(
    engine: EngineConfig,
    bench: BenchOptions,
    results: ResultOptions,
    output: OutputOptions,
    concurrency: Annotated[
        str | None,
        load_option("--concurrency", metavar="LIST", help=f"Requests at once, a row each (default: {CONCURRENCY})."),
    ] = None,
    request_rate: Annotated[
        str | None,
        load_option(
            "--request-rate", metavar="LIST", help="Or: requests/s, whatever the answers do: 2,8,inf or 1-10:60s."
        ),
    ] = None,
    burstiness: Annotated[
        float, load_option("--burstiness", min=0.0, help="Of --request-rate: 1 is Poisson, less bursty, inf even.")
    ] = 1.0,
    find_max_rate: Annotated[
        bool, load_option("--find-max-rate", help="Search the highest rate at which --slo is kept.")
    ] = False,
    offline: Annotated[
        bool, load_option("--offline", help="Give our engine everything at once: a row for each of --batch-sizes.")
    ] = False,
    batch_sizes: Annotated[
        str | None, load_option("--batch-sizes", metavar="LIST", help=f"Of --offline (default: {BATCH_SIZES}).")
    ] = None,
    baseline: Annotated[
        Literal["transformers"] | None,
        load_option("--baseline", help="Of --offline: the same batches through transformers' generate, beside."),
    ] = None,
    ablate: Annotated[
        Knob | None,
        load_option(
            "--ablate", help="Turn one knob of our engine, a row for each setting; stack: one on top of the other."
        ),
    ] = None,
) -> None:
    """Throughput and latency under load: of our own engine, or of any server by --url.

    Example: kvtool bench-throughput --url http://127.0.0.1:8000 --concurrency 1,8,32 --prompt-tokens 1024
    """
    if instead(FORM, bench, results, output):
        return
    bench = replace(bench, how=replace(bench.how, trials=bench.trials or TRIALS))
    asked = workloads(bench, engine.seed, PROMPTS, OUTPUTS)
    config = config_of(engine, bench, asked)
    check_comparable(results, FORM.command, config)

    def how(most: int | None) -> "How":
        requests = bench.how.requests
        if requests is None and bench.how.duration is None and not bench.workload.timed:
            requests = max(FEWEST, ROUNDS * most) if most else UNBOUNDED
        return replace(bench.how, floor="tpot", requests=requests)

    if offline:
        if bench.where.url or concurrency or request_rate:
            raise ConfigError(
                "--offline is our own engine with all at once; leave out --url, --concurrency and --request-rate"
            )
        sizes = int_list("--batch-sizes", batch_sizes or BATCH_SIZES, MOST_STREAMS)
        offline_throughput(engine, bench, results, output, config, asked, sizes, baseline is not None)
        return
    if ablate:
        if bench.where.url or request_rate:
            raise ConfigError("--ablate is about our own engine, in a closed loop; leave out --url and --request-rate")
        counted = ablate == "kv-allocation"
        workload, *grid = workloads(bench, engine.seed, *(VARYING if counted else (LONG, OUTPUTS)))
        most, *more = int_list("--concurrency", concurrency or ABLATED)
        if grid or more:
            raise ConfigError("--ablate: its rows are the knob's settings; give one length of each and one concurrency")
        if counted:
            show_allocation(FORM.command, engine, bench, output, config, workload)
        else:
            bench = replace(bench, how=how(most))
            ablation(FORM.command, ablate, engine, bench, results, output, config, workload, most)
        return
    if batch_sizes or baseline:
        raise ConfigError("--batch-sizes and --baseline belong to --offline; add it")
    if find_max_rate:
        request_rate = check_search(bench, request_rate)
    loads = loads_of(concurrency, request_rate, burstiness, engine.seed, timed=bench.workload.timed)
    notes: list[str] = []

    def plan(target: "Bench") -> "Steps":
        from kvtool.bench.measure import point_of

        for workload in asked:
            for most, arrivals in loads:
                if find_max_rate and arrivals:
                    notes.append((yield from search(target, bench, workload, most, arrivals, how(most))))
                else:
                    yield point_of(target, workload, concurrency=most, arrivals=arrivals), how(most)

    streams = max((most or UNBOUNDED for most, _ in loads), default=1)
    result = measured(engine, bench, results, streams, plan)
    finish(FORM, config, bench, results, output, result, notes)


def check_search(bench: BenchOptions, request_rate: str | None) -> str:
    """Where to begin.

    Raises:
        ConfigError: there is nothing to keep, or nothing to vary.
    """
    from kvtool.bench.arrivals import Arrivals

    if bench.how.slo is None:
        raise ConfigError("--find-max-rate: says nothing without --slo, as ttft:200ms,tpot:20ms or default")
    if bench.workload.timed:
        raise ConfigError("--find-max-rate: a trace has times of its own; try --trace-speed, or another --dataset")
    start = Arrivals.parse(request_rate or "1")
    if start.rate == math.inf or start.final_rate is not None:
        raise ConfigError(f"--request-rate {request_rate}: the search begins at one rate; write a number")
    return request_rate or "1"


def search(
    target: "Bench", bench: BenchOptions, workload: "Workload", most: int | None, arrivals: "Arrivals", how: "How"
) -> "Generator[tuple[Point, How], dict[str, Any], str]":
    """Points of rising and falling rates, each chosen by what the last came to; returns what was found, in words."""
    from kvtool.bench.measure import point_of
    from kvtool.bench.slo import max_rate

    rates = max_rate(arrivals.rate)
    rate = next(rates)
    while True:
        row = yield point_of(target, workload, concurrency=most, arrivals=replace(arrivals, rate=rate)), how
        row["kept"] = (
            not row["failed"]
            and row["attainment"]["all"] >= bench.min_attainment
            and row["requests_per_s"] >= KEEPS_UP * rate
        )
        try:
            rate = rates.send(row["kept"])
        except StopIteration as end:
            found = "none that was tried" if end.value is None else f"{end.value:.3g} requests/s"
            return (
                f"Highest rate at which {bench.min_attainment:.0%} of the requests keep {how.slo} and at least "
                f"{KEEPS_UP:.0%} of the rate is served, to the last answer: {found}. More --requests tell more."
            )


def offline_throughput(
    engine: EngineConfig,
    bench: BenchOptions,
    results: ResultOptions,
    output: OutputOptions,
    config: dict[str, Any],
    asked: "list[Workload]",
    sizes: list[int],
    baseline: bool,
) -> None:
    from kvtool.bench.offline import measure_offline

    if len(asked) > 1:
        raise ConfigError("--offline: its grid is --batch-sizes; give one length of prompts and one of answers")
    how = replace(bench.how, floor="tpot")
    result = drive(
        bench, results, partial(measure_offline, bench.where, engine, asked[0], sizes, how, baseline=baseline)
    )
    form = Form(FORM.command, OFFLINE, lambda rows: (), lambda results: [])
    finish(form, config, bench, results, output, result)


def loads_of(
    concurrency: str | None, request_rate: str | None, burstiness: float, seed: int, timed: bool
) -> "list[tuple[int | None, Arrivals | None]]":
    """Requests at once, and when they come: one pair for each row."""
    from kvtool.bench.arrivals import Arrivals

    if request_rate is None and not timed:
        return [(most, None) for most in int_list("--concurrency", concurrency or CONCURRENCY, MOST_STREAMS)]
    if timed and request_rate:
        raise ConfigError("--request-rate: a trace has times of its own; scale them with --trace-speed")
    at_most = int_list("--concurrency", concurrency, MOST_STREAMS) if concurrency else [None]
    if len(at_most) > 1:
        raise ConfigError("--concurrency: where requests have times it is the most at once; give one number")
    if request_rate is None:
        return [(at_most[0], None)]
    return [(at_most[0], Arrivals.parse(rate, burstiness, seed)) for rate in request_rate.split(",")]


def tables(rows: Rows) -> list[Table]:
    latencies = []
    for row in rows:
        load = {column.path: row.get(column.path) for column in LOAD}
        floor = {name: row.get(name) for name in ("floor_ms", "floor_share")}
        latencies += [
            {"latency": name.upper()} | load | row[f"{name}_ms"] | (floor if name == "tpot" else {})
            for name in ("ttft", "tpot", "itl", "e2e")
            if row.get(f"{name}_ms")
        ]
    return [Table("Latency, ms", LATENCIES, latencies)] if latencies else []


FORM = Form("bench-throughput", COLUMNS, tables, throughput_charts)
