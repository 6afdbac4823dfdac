"""`kvtool bench-ttft`: how long the first token takes, by the length of the prompt."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvtool.config import EngineConfig

from .bench import BenchOptions, Rows, finish, instead, measured, workloads
from .output import Chart, Column, OutputOptions, Series, Table

if TYPE_CHECKING:
    from kvtool.bench.measure import Bench, How, Point

PROMPTS, OUTPUTS, REQUESTS = "10,50,100,500,1000", "1", 5

COLUMNS = (
    Column("prompt", "prompt_tokens", ",d"),
    Column("output", "output_tokens", ",d"),
    *(Column(name, f"ttft_ms.{name}", ",.2f") for name in ("mean", "min", "max", "p50", "p90", "p99")),
    Column("floor", "floor_ms", ",.2f"),
    Column("share", "floor_share", ".0%"),
    Column("cached", "cached_tokens", ",d"),
    Column("", "state"),
)
LATER = (
    *COLUMNS[:2],
    *(
        Column(f"{name.upper()} {figure}", f"{name}_ms.{figure}", ",.2f")
        for name in ("tpot", "itl", "e2e")
        for figure in ("p50", "p90", "p99")
    ),
)


def bench_ttft(engine: EngineConfig, bench: BenchOptions, output: OutputOptions) -> None:
    """Time to first token by prompt length: of our own engine, or of any server by --url, one request at a time.

    Beside each figure stands the floor that the machine's own rates allow, and the share of it that was reached.

    Example: kvtool bench-ttft --url http://127.0.0.1:8000 --prompt-tokens 128,1024,8192 --requests 20
    """
    asked = workloads(bench, engine.seed, PROMPTS, OUTPUTS)
    if instead("bench-ttft", bench, output, COLUMNS, tables):
        return
    how = replace(bench.how, floor="ttft", requests=bench.how.requests or (None if bench.how.duration else REQUESTS))

    def plan(target: "Bench") -> "Iterator[tuple[Point, How]]":
        from kvtool.bench.measure import point_of

        return ((point_of(target, workload, concurrency=1), how) for workload in asked)

    finish("bench-ttft", engine, bench, output, measured(engine, bench, 1, plan), COLUMNS, tables, charts)


def tables(rows: Rows) -> list[Table]:
    """More about answers of more than one token, where there are such."""
    longer = [row for row in rows if row["tpot_ms"]]
    return [Table("After the first token, ms", LATER, longer)] if longer else []


def charts(rows: Rows) -> list[Chart]:
    """TTFT against the length of the prompt."""
    x = [row["prompt_tokens"] for row in rows]
    lines = [Series(name, x, [(row["ttft_ms"] or {}).get(name) for row in rows]) for name in ("p50", "p99")]
    lines.append(Series("floor", x, [row["floor_ms"] for row in rows]))
    return [Chart("Time to first token", "prompt tokens", "ms", lines, log_x=True, log_y=True)] if rows else []
