"""`kvtool moe-ep`: what spreading a layer's experts over ranks costs and gains."""

from dataclasses import asdict, astuple
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtool.errors import ConfigError

from .charts import Chart, Series
from .options import MOST, model_option, option
from .output import Column, OutputOptions, Report, Row, Table, progress, show

if TYPE_CHECKING:
    from kvtool.expert_parallel.bench import Findings
    from kvtool.expert_parallel.layer import LayerShape
    from kvtool.expert_parallel.worker import Choice

TOY = {"hidden-size": 512, "intermediate-size": 1024, "num-experts": 8, "top-k": 2}

SPEED = (
    Column("variant", "variant"),
    Column("experts", "placement"),
    Column("tokens/s", "tokens_per_s", ",.0f"),
    Column("× loop", "vs_dense_loop", ".2f"),
    Column("× grouped", "vs_dense_grouped", ".2f"),
    Column("p50 ms", "ms.p50", ",.3f"),
    Column("p99", "ms.p99", ",.3f"),
    Column("exchange", "communication_share", ".1%"),
    Column("control", "control_share", ".1%"),
    Column("rows", "rows_over_needed", ".2f"),
    Column("wire KiB", "wire_kib", ",.0f"),
    Column("over least", "wire_over_least", ".2f"),
    Column("shard", "shard_ratio", ".3f"),
    Column("MiB", "workspace_mib", ",.1f"),
    Column("equal", "verdict"),
)
PHASES = (
    Column("variant", "variant"),
    Column("experts", "placement"),
    Column("control p50", "control_ms.p50", ",.3f"),
    Column("p99", "control_ms.p99", ",.3f"),
    Column("dispatch p50", "dispatch_ms.p50", ",.3f"),
    Column("p99", "dispatch_ms.p99", ",.3f"),
    Column("expert p50", "expert_ms.p50", ",.3f"),
    Column("p99", "expert_ms.p99", ",.3f"),
    Column("combine p50", "combine_ms.p50", ",.3f"),
    Column("p99", "combine_ms.p99", ",.3f"),
)
LOADS = (
    Column("routing", "routing"),
    Column("experts", "placement"),
    Column("busiest expert", "load.expert_imbalance", ".2f"),
    Column("busiest rank", "load.rank_imbalance", ".3f"),
    Column("local pairs", "load.local_pairs", ".1%"),
    Column("tokens with a local expert", "load.local_tokens", ".1%"),
    Column("pairs to travel", "load.remote_pairs", ",d"),
    Column("rows to travel", "load.remote_rows", ",d"),
)

layer_option = partial(option, panel="Layer")
rank_option = partial(option, panel="Ranks")
measure_option = partial(option, panel="Measurement")


def moe_ep(
    output: OutputOptions,
    model: Annotated[
        str | None,
        model_option(
            "--model", help="Take the shape of its experts: a folder, config.json, hub id or published model's name."
        ),
    ] = None,
    batch_size: Annotated[int, layer_option("--batch-size", min=1, max=MOST, help="Sequences, of all ranks.")] = 4,
    seq_len: Annotated[int, layer_option("--seq-len", min=1, max=MOST, help="Tokens of each.")] = 16,
    hidden_size: Annotated[
        int | None, layer_option("--hidden-size", min=1, max=2**17, help="Elements of a token (default: 512).")
    ] = None,
    intermediate_size: Annotated[
        int | None, layer_option("--intermediate-size", min=1, max=2**17, help="Of an expert (default: 1024).")
    ] = None,
    num_experts: Annotated[
        int | None, layer_option("--num-experts", min=1, max=2**14, help="Of the layer (default: 8).")
    ] = None,
    top_k: Annotated[
        int | None, layer_option("--top-k", min=1, max=2**10, help="Experts of a token (default: 2).")
    ] = None,
    routing: Annotated[
        str,
        layer_option(
            "--routing", help="uniform, zipf, zipf:S, or a file with the list of a token's expert ids in each line."
        ),
    ] = "uniform",
    ranks: Annotated[int, rank_option("--ranks", min=2, max=64, help="Processes that share the experts.")] = 2,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        rank_option("--device", help="auto: a GPU for each rank (NCCL), or the CPU where there are fewer (gloo)."),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        rank_option("--dtype", help="auto: float16 on GPUs, float32 on a CPU, which 16 bits take far longer on."),
    ] = "auto",
    balance: Annotated[
        bool, rank_option("--balance", help="Place experts by load, with replicas (EPLB), and measure what it gains.")
    ] = False,
    replicas: Annotated[
        int | None,
        rank_option(
            "--replicas", min=0, max=2**14, help="Of --balance: slots beside the experts' (default: an eighth)."
        ),
    ] = None,
    warmup: Annotated[int, measure_option("--warmup", min=0, max=10**6, help="Runs that are not timed.")] = 5,
    runs: Annotated[int, measure_option("--runs", min=1, max=10**6, help="Runs that are timed.")] = 20,
    seed: Annotated[int, measure_option("--seed", min=0, max=2**31, help="Of weights, tokens and routing.")] = 0,
    timeout: Annotated[float, measure_option("--timeout", min=1, max=86400, help="Seconds for all of it.")] = 600.0,
) -> None:
    """Run a layer of experts on one rank and spread over several: same outputs, then times, loads and bytes.

    Example: kvtool moe-ep --model Qwen3-30B-A3B --seq-len 1024 --dtype bfloat16 --balance --routing zipf
    """
    from kvtool.expert_parallel.bench import Interrupted, Settings, measure_layer

    given = dict(zip(TOY, (hidden_size, intermediate_size, num_experts, top_k), strict=True))
    if balance is False and replicas is not None:
        raise ConfigError("--replicas is for --balance; add it")
    settings = Settings(
        shape=layer_shape(model, given),
        num_tokens=batch_size * seq_len,
        num_ranks=ranks,
        routing=routing,
        dtype=dtype,
        device=device,
        seed=seed,
        warmup=warmup,
        runs=runs,
        balance=balance,
        replicas=replicas,
        timeout_s=timeout,
    )
    try:
        with progress("measuring") as on_progress:
            found = measure_layer(settings, on_progress)
    except Interrupted as interrupt:
        show(report(interrupt.findings, model), output)
        raise
    show(report(found, model), output)
    if not found.equal:
        raise typer.Exit(1)


def report(found: "Findings", model: str | None) -> Report:
    rows = [asdict(row) for row in found.rows]
    config = {**asdict(found.settings), "model": model}
    return Report("moe-ep", config, rows, (), tables(found), charts(found), notes(found))


def layer_shape(model: str | None, given: dict[str, int | None]) -> "LayerShape":
    """A model's, or that of the usual toy, with what was given in its place."""
    from kvtool.expert_parallel.layer import LayerShape, read_layer
    from kvtool.models.resolve import resolve_config

    found = tuple(TOY.values()) if model is None else astuple(read_layer(resolve_config(model)))
    return LayerShape(*(own if asked is None else asked for asked, own in zip(given.values(), found, strict=True)))


def tables(found: "Findings") -> list[Table]:
    """Speed, phases, loads."""
    lines = [readable(asdict(row)) for row in found.rows]
    loads = [asdict(row) for row in found.loads]
    return [Table("", SPEED, lines), Table("Phases, ms", PHASES, lines), Table("Loads", LOADS, loads)]


def readable(row: Row) -> dict[str, Any]:
    workspace = row["workspace"]
    return {
        **row,
        "wire_kib": row["wire_bytes"] / 2**10,
        "workspace_mib": None if workspace is None else workspace / 2**20,
        "verdict": "yes" if row["equal"] else f"NO, off by {row['error']:.1e}",
    }


def charts(found: "Findings") -> list[Chart]:
    """What the time goes to, and how evenly ranks are loaded."""
    timed = [row for row in found.rows if row.equal]
    names = [f"{row.variant} {row.placement.replace('in order', '')}".strip() for row in timed]
    rows = [asdict(row) for row in timed]
    phases = [
        Series(phase, names, [row[f"{phase}_ms"]["p50"] for row in rows])
        for phase in ("control", "dispatch", "expert", "combine")
    ]
    placements = list(dict.fromkeys(row.placement for row in found.loads))
    kinds = list(dict.fromkeys(row.routing for row in found.loads))
    busiest = {(row.routing, row.placement): row.load.rank_imbalance for row in found.loads}
    loads = [Series(placement, kinds, [busiest[kind, placement] for kind in kinds]) for placement in placements]
    return [
        Chart("Where the time goes", "ms, p50 of each", "", phases, kind="timeline"),
        Chart("Busiest rank over the mean", "routing", "times", loads, kind="bar"),
    ]


def notes(found: "Findings") -> list[str]:
    """What was run, what was chosen, and what figures mean."""
    settings, choice, gain = found.settings, found.choice, found.gain
    shape = settings.shape
    lines = [
        f"{settings.num_tokens:,} tokens of {shape.hidden_size:,}, {shape.num_experts} experts of "
        f"{shape.intermediate_size:,}, {shape.top_k} of a token, {settings.routing} routing; {settings.num_ranks} "
        f"ranks on {found.hardware}, {settings.dtype}.",
    ]
    if found.hardware == "CPU":
        lines.append(f"There are fewer than {settings.num_ranks} GPUs or the CPU was asked for: ranks share its cores.")
    else:
        lines.append("Ways in which the host waits for nothing ran as CUDA graphs, as the steps of a served model do.")
    lines += [
        "Dense: all experts and all tokens on one rank, the others idle. More than "
        f"{settings.num_ranks} × as fast is possible against the loop alone, which launches expert by expert.",
        "Exchange: dispatch and combine, waiting for the slowest rank included. Over least: bytes sent over each token "
        "once to each rank that wants it and back. Rows: computed over (token, expert) pairs. Shard: experts' bytes on "
        "a rank over all.",
    ]
    if choice:
        lines.append(f"EP grouped was quickest as {choice.chosen}: {packing(choice)}")
    if gain:
        lines.append(
            f"Balanced: {gain.num_slots} slots for {shape.num_experts} experts. The busiest rank was predicted to be "
            f"done {gain.predicted:.2f} × as fast (other tokens of the same kind), {gain.expected:.2f} × with these "
            f"tokens; measured {number(gain.experts)} × in its experts, {number(gain.layer)} × in the whole layer."
        )
    return lines


def packing(choice: "Choice") -> str:
    """When an all-gather, which sends all tokens, or an all-to-all, which packs those that are wanted, is quicker."""
    share = f"ranks want {choice.needed:.0%} of each other's tokens"
    if choice.break_even >= 1:
        return f"{share}, and packing them costs nothing that could be measured."
    if choice.break_even <= 0:
        return f"{share}, and packing them costs more than sending all."
    return f"{share}, and an all-to-all pays below {choice.break_even:.0%}."


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
