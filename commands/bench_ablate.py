"""`kvtool bench-throughput --ablate`: a table of the settings of one knob of our engine."""

from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from kvtool.config import EngineConfig

from .bench import BenchOptions, Form, drive, finish
from .bench_charts import ablation_charts
from .bench_results import ResultOptions
from .output import Column, OutputOptions, Report, show

if TYPE_CHECKING:
    from kvtool.bench.workloads import Workload

UNTIMED = 1000  # requests whose allocation is counted, where the workload has no end
ABLATION = (
    Column("TTFT p50, ms", "ttft_ms.p50", ",.1f"),
    Column("×", "ratio.ttft", ".2f"),
    Column("TPOT p50, ms", "tpot_ms.p50", ",.2f"),
    Column("×", "ratio.tpot", ".2f"),
    Column("total tok/s", "total_tok_s", ",.0f"),
    Column("×", "ratio.total_tok_s", ".2f"),
    Column("hit rate", "hit_rate", ".0%"),
    Column("KV B/token", "kv_bytes_per_token", ",.0f"),
    Column("tokens that fit", "kv_tokens", ",d"),
    Column("weights, B", "weight_bytes", ",d"),
    Column("up in, s", "start_seconds", ",.1f"),
    Column("memory, MiB", "memory_mib", ",.0f"),
    Column("GPU use", "gpu_utilization", ".0%"),
    Column("ΔPPL", "perplexity_change", "+.3%"),
    Column("KLD", "kld_mean", ".2e"),
    Column("", "state"),
)
SPECULATION = (Column("accepted", "acceptance", ".0%"), Column("tokens/draft", "accepted_length", ".2f"))
ALLOCATION = (
    Column("allocation", "variant"),
    Column("tokens stored", "stored", ",d"),
    Column("slots reserved", "reserved", ",d"),
    Column("in use", "utilization", ".1%"),
)
Knob = Literal[
    "nbits",
    "axis",
    "symmetry",
    "residual",
    "group",
    "block-size",
    "chunk-size",
    "prefix-cache",
    "cuda-graph",
    "attention-backend",
    "speculation",
    "quantization",
    "kv-allocation",
    "stack",
]


def ablation(
    command: str,
    knob: Knob,
    engine: EngineConfig,
    bench: BenchOptions,
    results: ResultOptions,
    output: OutputOptions,
    config: dict[str, Any],
    workload: "Workload",
    concurrency: int,
) -> None:
    """Measure each setting in an engine of its own, and hold it against the first."""
    from kvtool.bench.ablate import FORMATS, KNOBS, SCORED, format_scores, measure_variants, stack

    config = config | {"workload": [workload.describe()], "ablate": knob}
    if knob in ("prefix-cache", "stack") and workload.dataset == "random" and not workload.shared_prefix:
        workload = workload.with_prefix_hit(0.5)  # without anything to share there is nothing to see
    variants = stack(engine) if knob == "stack" else KNOBS[knob](engine)
    where = replace(bench.where, floor=False)
    measure = partial(measure_variants, where, variants, workload, concurrency, bench.how, baseline=knob == "stack")
    result = drive(bench, results, measure)
    if knob in SCORED and not result.stopped:
        scores = format_scores({row["variant"]: variants[row["variant"]] for row in result.rows})
        result = replace(result, rows=[row | scores[row["variant"]] for row in result.rows])
    added = SPECULATION if knob == "speculation" else ()
    form = Form(command, (Column(knob, "variant"), *added, *ABLATION), lambda rows: (), partial(ablation_charts, knob))
    told = result.rows if knob in FORMATS else ()
    notes = [f"{row['variant']}: {row['kv_format']}." for row in told]
    notes += [f"left out: {reason}" for reason in result.target.get("refused", ())]
    finish(form, config, bench, results, output, result, notes)


def show_allocation(
    command: str,
    engine: EngineConfig,
    bench: BenchOptions,
    output: OutputOptions,
    config: dict[str, Any],
    workload: "Workload",
) -> None:
    """What three layouts of the cache would reserve for the workload; nothing is run."""
    from kvtool.bench.ablate import kv_allocation
    from kvtool.bench.measure import prompt_ids

    most = bench.how.requests or (None if workload.timed else UNTIMED)
    block, context = engine.kv.q_group_size or 64, engine.max_model_len
    items = replace(workload, max_model_len=context).items(prompt_ids(None))
    rows = kv_allocation(islice(items, most), block, context)
    lengths = f"prompts of {workload.prompt}, answers of {workload.output}"
    notes = [
        f"{rows[0]['requests']:,} requests ({lengths if workload.dataset == 'random' else workload.dataset}): "
        "tokens stored over slots reserved, summed over all their steps. Nothing was run.",
        f"contiguous: {f'{context:,} slots' if context else 'as many as the longest takes'} for each; "
        f"growing: doubled when full; paged: by {block}.",
    ]
    config = config | {"workload": [workload.describe()], "ablate": "kv-allocation"}
    show(Report(command, config, rows, ALLOCATION, notes=notes), output)
