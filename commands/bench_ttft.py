"""`kvtool bench-ttft`: how long the first token takes, by the length of the prompt."""

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .bench import BenchOptions, Form, Rows, config_of, finish, instead, load_option, measured, workloads
from .bench_charts import ttft_charts
from .bench_results import ResultOptions, check_comparable
from .output import Column, OutputOptions, Table

if TYPE_CHECKING:
    from kvtool.bench.measure import Bench, How, Point

PROMPTS, LONG, OUTPUTS, REQUESTS = "10,50,100,500,1000", "1000", "1", 5

COLUMNS = (
    Column("prompt", "prompt_tokens", ",d"),
    Column("output", "output_tokens", ",d"),
    Column("hit asked", "prefix_hit", ".0%"),
    Column("hit rate", "hit_rate", ".1%"),
    *(Column(name, f"ttft_ms.{name}", ",.2f") for name in ("mean", "min", "max", "p50", "p90", "p99")),
    Column("floor", "floor_ms", ",.2f"),
    Column("share", "floor_share", ".0%"),
    Column("cached", "cached_tokens", ",d"),
    Column("goodput/s", "goodput", ",.2f"),
    Column("SLO kept", "attainment.all", ".1%"),
    Column("", "state"),
)
LATER = (
    *COLUMNS[:4],
    *(
        Column(f"{name.upper()} {figure}", f"{name}_ms.{figure}", ",.2f")
        for name in ("tpot", "itl", "e2e")
        for figure in ("p50", "p90", "p99")
    ),
)


def bench_ttft(
    engine: EngineConfig,
    bench: BenchOptions,
    results: ResultOptions,
    output: OutputOptions,
    prefix_hit: Annotated[
        str | None,
        load_option("--prefix-hit", metavar="LIST", help="Shares of each prompt that are cached before: 0,0.5,0.95."),
    ] = None,
) -> None:
    """Time to first token by prompt length: of our own engine, or of any server by --url, one request at a time.

    Beside each figure stands the floor that the machine's own rates allow, and the share of it that was reached.

    Example: kvtool bench-ttft --url http://127.0.0.1:8000 --prompt-tokens 128,1024,8192 --requests 20
    """
    if instead(FORM, bench, results, output):
        return
    shares = [None] if prefix_hit is None else share_list("--prefix-hit", prefix_hit)
    asked = workloads(bench, engine.seed, PROMPTS if prefix_hit is None else LONG, OUTPUTS)
    how = replace(bench.how, floor="ttft", requests=bench.how.requests or (None if bench.how.duration else REQUESTS))
    bench = replace(bench, how=how)
    config = config_of(engine, bench, asked)
    check_comparable(results, FORM.command, config)

    def plan(target: "Bench") -> "Generator[tuple[Point, How], dict[str, Any], None]":
        from kvtool.bench.measure import point_of

        for workload in asked:
            for share in shares:
                yield point_of(target, workload, concurrency=1, prefix_hit=share), how

    finish(FORM, config, bench, results, output, measured(engine, bench, results, 1, plan))


def share_list(name: str, text: str) -> list[float]:
    """The numbers of `0,0.5,0.95`."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"{name} {text}: write shares from 0 to 1, separated by commas")
    return shares


def tables(rows: Rows) -> list[Table]:
    """More about answers of more than one token, where there are such."""
    longer = [row for row in rows if row["tpot_ms"]]
    return [Table("After the first token, ms", LATER, longer)] if longer else []


FORM = Form("bench-ttft", COLUMNS, tables, ttft_charts)
