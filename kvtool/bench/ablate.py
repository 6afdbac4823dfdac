"""One knob of the engine turned at a time, under the same load: what each setting costs and gives."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from kvtool.bench.baseline import Batch, transformers_rows
from kvtool.bench.events import EventLog, WorkItem
from kvtool.bench.measure import How, Measured, OnProgress, Plan, Where, measure_all, point_of, prompt_ids
from kvtool.bench.offline import UNJUDGED
from kvtool.bench.workloads import Workload
from kvtool.config import EngineConfig, SpeculationConfig
from kvtool.errors import ConfigError, KVToolError, UnsupportedError
from kvtool.request import EngineInfo

Row = dict[str, Any]
Variants = Mapping[str, EngineConfig]  # the first is what the others are held against
SCORED_TOKENS = 8192  # of the built-in sample, for the perplexity of a format


# --- knobs ------------------------------------------------------------------------------------------------------------


def _format(engine: EngineConfig, **options: Any) -> EngineConfig:
    """With these KV options, at 4 bits unless the user said otherwise."""
    kv = engine.kv if engine.kv.nbits or engine.kv.nbits_key or engine.kv.plan else replace(engine.kv, nbits="4")
    return replace(engine, kv=replace(kv, **options))


def _nbits(engine: EngineConfig) -> Variants:
    one = {"nbits_key": None, "nbits_value": None, "plan": None}
    names = {"16": "16 bits", "8": "8 bits", "4": "4 bits", "2": "2 bits", "fp8": "fp8"}
    return {name: _format(engine, nbits=bits, **one) for bits, name in names.items()}


def _axis(engine: EngineConfig) -> Variants:
    pairs = (("channel", "token"), ("token", "token"), ("channel", "channel"), ("token", "channel"))
    return {f"K {key}, V {value}": _format(engine, axis_key=key, axis_value=value) for key, value in pairs}


def _symmetry(engine: EngineConfig) -> Variants:
    return {"asymmetric": _format(engine, symmetric=False), "symmetric": _format(engine, symmetric=True)}


def _residual(engine: EngineConfig) -> Variants:
    return {f"R = {tokens}": _format(engine, residual_length=tokens) for tokens in (0, 64, 128, 256)}


def _group(engine: EngineConfig) -> Variants:
    """Along head_dim, for K and V alike."""
    axes = {"axis_key": "token", "axis_value": "token"}
    return {f"groups of {size}": _format(engine, q_group_size=size, **axes) for size in (64, 32, 128)}


def _block_size(engine: EngineConfig) -> Variants:
    """Tokens that share a key channel's scale, and are packed together."""
    return {f"blocks of {size}": _format(engine, q_group_size=size) for size in (64, 32, 128)}


def _chunk_size(engine: EngineConfig) -> Variants:
    return {f"{size:,} tokens": replace(engine, max_num_batched_tokens=size) for size in (2048, 1024, 512, 256, 128)}


def _prefix_cache(engine: EngineConfig) -> Variants:
    return {name: replace(engine, prefix_caching=name == "on") for name in ("on", "off")}


def _cuda_graph(engine: EngineConfig) -> Variants:
    return {name: replace(engine, cuda_graph=name == "on") for name in ("on", "off")}


def _attention_backend(engine: EngineConfig) -> Variants:
    return {name: replace(engine, attention_backend=name) for name in ("auto", "torch", "triton", "cuda", "flash-attn")}


def _speculation(engine: EngineConfig) -> Variants:
    asked = engine.speculation or SpeculationConfig("ngram")
    methods: dict[str, SpeculationConfig | None] = {
        "off": None,
        "ngram": replace(asked, method="ngram"),
        "draft": replace(asked, method="draft"),
    }
    return {name: replace(engine, speculation=method) for name, method in methods.items()}


def _quantization(engine: EngineConfig) -> Variants:
    methods = {"16 bits": "auto"} | {name: name for name in ("w8a8", "fp8", "w4a16", "gptq", "awq")}
    calibrated = ("gptq", "awq", "fp8")
    return {
        name: replace(
            engine,
            quantization=method,  # type: ignore[arg-type]
            quantize_head=engine.quantize_head and method != "auto",
            keep_layers=engine.keep_layers if method != "auto" else (),
            calibration=engine.calibration if method in calibrated else None,
        )
        for name, method in methods.items()
    }


KNOBS: dict[str, Callable[[EngineConfig], Variants]] = {
    "nbits": _nbits,
    "axis": _axis,
    "symmetry": _symmetry,
    "residual": _residual,
    "group": _group,
    "block-size": _block_size,
    "chunk-size": _chunk_size,
    "prefix-cache": _prefix_cache,
    "cuda-graph": _cuda_graph,
    "attention-backend": _attention_backend,
    "speculation": _speculation,
    "quantization": _quantization,
}
FORMATS = ("nbits", "axis", "symmetry", "residual", "group", "block-size")
SCORED = (*FORMATS, "quantization")  # these change what the model says


def stack(engine: EngineConfig) -> Variants:
    """The engine's techniques, each on top of those before it; below them stand two rows of transformers.

    Continuous batching and pages are one step, since this engine has no other cache than a paged one.
    """
    bare = replace(
        engine,
        attention_backend="torch",
        max_num_batched_tokens=2**17,  # no prompt is cut
        prefix_caching=False,
        cuda_graph=False,
        kv=replace(engine.kv, nbits="16"),
    )
    fused = replace(bare, attention_backend=engine.attention_backend)
    chunked = replace(fused, max_num_batched_tokens=engine.max_num_batched_tokens)
    prefix = replace(chunked, prefix_caching=True)
    graph = replace(prefix, cuda_graph=True)
    return {
        "continuous, paged": bare,
        "+ fused attention": fused,
        "+ chunked prefill": chunked,
        "+ prefix cache": prefix,
        "+ CUDA graphs": graph,
        "+ 4-bit KV": _format(graph, nbits="4"),
    }


# --- measurements -----------------------------------------------------------------------------------------------------


async def measure_variants(
    where: Where,
    variants: Variants,
    workload: Workload,
    concurrency: int,
    how: How,
    *,
    baseline: bool,
    log: EventLog | None,
    on_progress: OnProgress,
) -> Measured:
    """A row for each variant in a process of its own, over the same prompts; cancelled, it keeps what it has.

    Args:
        baseline: put transformers before them, one request at a time and in static batches of `concurrency`.

    Raises:
        UnsupportedError: none of the variants can run here.
    """
    rows: list[Row] = []
    target: dict[str, Any] = {}
    refused: list[str] = []
    stopped = None
    for name, engine in variants.items():
        same = next(first for first, other in variants.items() if _on_a_cpu(other) == _on_a_cpu(engine))
        if same != name and target and target["engine"]["device"] == "cpu":
            refused.append(f"{name}: on a CPU the same as {same}")
            continue
        plan = _one_point(name, workload, concurrency, how)
        try:
            measured = await measure_all(where, engine, plan, concurrency, log=log, on_progress=on_progress)
        except KVToolError as error:
            refused.append(f"{name}: {error}")
            continue
        target, stopped = measured.target, measured.stopped
        rows += [row | _memory(row, measured.target) | _drafts(row) for row in measured.rows]
        if stopped:
            break
    if not rows and not stopped:
        raise UnsupportedError("--ablate: no variant can run here: " + "; ".join(refused))
    if baseline and not stopped:
        try:
            info = msgspec.convert(target["engine"], EngineInfo)
            rows = [*await _transformers(info, workload, concurrency, how), *rows]
        except asyncio.CancelledError:
            stopped = "interrupted"
    return Measured([with_ratio(row, rows[0]) for row in rows], target | {"refused": refused}, stopped)


def _on_a_cpu(engine: EngineConfig) -> EngineConfig:
    """What it comes to there: no graphs, and the one backend that runs."""
    backend = "torch" if engine.attention_backend == "auto" else engine.attention_backend
    return replace(engine, cuda_graph=False, attention_backend=backend)


def _one_point(name: str, workload: Workload, concurrency: int, how: How) -> Plan:
    def plan(bench: Any) -> Any:
        point = point_of(bench, workload, concurrency=concurrency)
        label = {"variant": name} | point.label | {"point": f"{name}: {point.label['point']}"}
        yield replace(point, label=label), how

    return plan


def _memory(row: Row, target: Mapping[str, Any]) -> Row:
    """What the cache takes, by the engine's own word, and what the process took."""
    engine = target["engine"]
    return {
        "kv_format": engine["kv_format"],
        "kv_bytes_per_token": engine["block_bytes"] / engine["block_size"],
        "kv_tokens": engine["kv_tokens"],
        "weight_bytes": engine["weight_bytes"],
        "start_seconds": engine["start_seconds"],
        "memory_mib": row["gpu_peak_mib"] or row["engine_rss_mib"],
        "gpu_utilization": row["gpus"][0].get("utilization") if row["gpus"] else None,
    }


def _drafts(row: Row) -> Row:
    """How many of the drafted tokens were right, and what a verified draft yields: those, and the one behind them."""
    counted = row["server_metrics"] or {}
    drafts, drafted, accepted = (
        counted.get(f"vllm:spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return {
        "acceptance": accepted / drafted if drafted else None,
        "accepted_length": 1 + accepted / drafts if drafts else None,
    }


async def _transformers(info: EngineInfo, workload: Workload, concurrency: int, how: How) -> list[Row]:
    """Of `generate`: one request after the other, then as many as run at once padded to none."""
    if not workload.has_one_length:
        raise ConfigError("--ablate stack: a static batch needs random prompts and answers of one length")
    prompts = [item.prompt for item in islice(workload.items(prompt_ids(info.vocab_size)), concurrency)]
    output = int(workload.output.first)
    names = {1: "transformers, one by one"} | ({concurrency: "static batch"} if concurrency > 1 else {})
    batches = [Batch(prompts[:size], output) for size in names]  # type: ignore[arg-type]
    lengths = {"prompt_tokens": len(prompts[0]), "output_tokens": output}
    rows = []
    async with aclosing(transformers_rows(info, batches, how.warmup, how.trials, how.definitions)) as answered:
        async for row in answered:
            name = names[row["batch_size"]]
            rows.append({"variant": name, "point": name, **lengths, **UNJUDGED, "itl_timeline": None, **row})
    return rows


def with_ratio(row: Row, first: Row) -> Row:
    """A row with its figures as multiples of the first one's."""

    def figures(row: Row) -> dict[str, float | None]:
        p50 = {name: (row[f"{name}_ms"] or {}).get("p50") for name in ("ttft", "tpot")}
        return p50 | {"total_tok_s": row["total_tok_s"]}

    pairs = zip(figures(first).items(), figures(row).values(), strict=True)
    return row | {"ratio": {name: new / old if new and old else None for (name, old), new in pairs}}


def format_scores(variants: Variants) -> dict[str, Row]:
    """Perplexity and KLD of each variant's KV format and weights on the built-in sample, held against the first one's
    weights and a 16-bit cache. Loads the models here, not more than two at once."""
    from kvtool.perplexity import score_formats
    from kvtool.protocols import SAMPLE, make_task, read_documents
    from kvtool.scoring import ScoringModel
    from kvtool.tokenizer import Tokenizer

    first = next(iter(variants.values()))
    with closing(ScoringModel(first)) as plain:
        tokenizer = Tokenizer.load(plain.path, plain.model_config.vocab_size)
        documents = read_documents(SAMPLE)
        task = make_task("gptq", documents, tokenizer, plain.max_model_len, max_tokens=SCORED_TOKENS)
        alike = {name: engine.kv for name, engine in variants.items() if engine.quantization == first.quantization}
        scores = score_formats(plain, task, alike)
        for name in variants.keys() - alike.keys():
            with closing(ScoringModel(variants[name])) as model:
                scores += score_formats(model, task, {name: variants[name].kv}, reference=plain)
    return {
        score.format.name: {"perplexity_change": score.perplexity_change, "kld_mean": score.kld_mean}
        for score in scores
    }


# --- allocation -------------------------------------------------------------------------------------------------------


def kv_allocation(items: Iterable[WorkItem], block_size: int, context: int | None = None) -> list[Row]:
    """Tokens stored over slots reserved while each request runs, by how its cache is laid out (as Figure 2 of Kwon et
    al., SOSP 2023, counts it): summed over all steps of all requests, which each hold what they have so far.

    Args:
        items: with prompts of ids.
        block_size: tokens of a page.
        context: slots that a contiguous cache reserves for each; None: the longest request's.
    """
    spans = [(len(item.prompt), len(item.prompt) + item.output_tokens) for item in items]
    if not spans:
        raise ConfigError("--ablate kv-allocation: the workload has no requests; choose another one")
    whole = context or max(end for _, end in spans)
    schemes: dict[str, Callable[[Any], Any]] = {
        "contiguous": lambda held: np.full_like(held, whole),
        "growing": lambda held: 2 ** np.ceil(np.log2(held)).astype(np.int64),  # doubled and copied when it is full
        "paged": lambda held: -(-held // block_size) * block_size,
    }
    rows = []
    for name, reserve in schemes.items():
        stored = reserved = 0
        for start, end in spans:
            held = np.arange(start, end + 1, dtype=np.int64)
            stored += int(held.sum())
            reserved += int(reserve(held).sum())
        counts = {"requests": len(spans), "stored": stored, "reserved": reserved}
        rows.append({"variant": name, **counts, "utilization": stored / reserved})
    return rows
