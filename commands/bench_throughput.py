"""`kvtool bench-throughput`: how much a target does at once, and how long each request takes then."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .bench import BenchOptions, Rows, finish, instead, int_list, load_option, measured, row_name, workloads
from .output import Chart, Column, OutputOptions, Series, Table

if TYPE_CHECKING:
    from kvtool.bench.arrivals import Arrivals
    from kvtool.bench.measure import Bench, How, Point

PROMPTS, OUTPUTS = "128", "64"
CONCURRENCY = "1,2,4,8"
FEWEST, ROUNDS = 8, 4  # requests of a row, and of each of those that run at once
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
    Column("KV peak", "kv_usage_peak", ".1%"),
    Column("GPU MiB", "gpu_peak_mib", ",.0f"),
    Column("J/token", "joules_per_token", ".3g"),
    Column("", "state"),
)
LATENCIES = (
    *LOAD,
    *(
        Column(f"{name.upper()} {figure}", f"{name}_ms.{figure}", ",.2f")
        for name in ("ttft", "tpot", "itl", "e2e")
        for figure in ("p50", "p90", "p99")
    ),
    Column("TPOT floor", "floor_ms", ",.2f"),
    Column("share", "floor_share", ".0%"),
)


def bench_throughput(
    engine: EngineConfig,
    bench: BenchOptions,
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
) -> None:
    """Throughput and latency under load: of our own engine, or of any server by --url.

    Example: kvtool bench-throughput --url http://127.0.0.1:8000 --concurrency 1,8,32 --prompt-tokens 1024
    """
    asked = workloads(bench, engine.seed, PROMPTS, OUTPUTS)
    loads = loads_of(concurrency, request_rate, burstiness, engine.seed, timed=bench.workload.timed)
    if instead("bench-throughput", bench, output, COLUMNS, tables):
        return

    def how(most: int | None) -> "How":
        requests = bench.how.requests
        if requests is None and bench.how.duration is None and not bench.workload.timed:
            requests = max(FEWEST, ROUNDS * most) if most else UNBOUNDED
        return replace(bench.how, floor="tpot", requests=requests)

    def plan(target: "Bench") -> "Iterator[tuple[Point, How]]":
        from kvtool.bench.measure import point_of

        for workload in asked:
            for most, arrivals in loads:
                yield point_of(target, workload, concurrency=most, arrivals=arrivals), how(most)

    streams = max((most or UNBOUNDED for most, _ in loads), default=1)
    result = measured(engine, bench, streams, plan)
    finish("bench-throughput", engine, bench, output, result, COLUMNS, tables, charts)


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
    return [Table("Latency, ms", LATENCIES, rows)]


def charts(rows: Rows) -> list[Chart]:
    """Throughput against latency, and the KV cache's use over time."""
    shown = [row for row in rows if row["tpot_ms"]]
    curve = Series("", [row["output_tok_s"] for row in shown], [row["tpot_ms"]["p50"] for row in shown])
    use = [Series(row_name(row), row["timeline"]["seconds"], row["timeline"]["kv_usage"]) for row in rows]
    found = [Chart("Throughput and latency", "output tokens/s", "TPOT p50, ms", [curve])] if shown else []
    return [*found, Chart("KV cache", "seconds", "share in use", use)] if use else found
