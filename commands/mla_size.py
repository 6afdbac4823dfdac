"""`kvtool mla-size`: how large a model's cache is, and would be with other attention."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError

from .bench import int_list
from .charts import Chart, Series
from .options import MOST, memory_size, model_option, option
from .output import Column, OutputOptions, Report, Row, Table, progress, show

if TYPE_CHECKING:
    import torch

    from kvtool.sizing.theory import Budget, ModelSizes, SchemeSize

DEFAULT_MODELS = ("tiny", "DeepSeek-V2-Lite")
SECTIONS = {"1": "theory", "2": "measured", "3": "latency"}

SIZES = (
    Column("model", "model"),
    Column("scheme", "scheme"),
    Column("", "own"),
    Column("B/token/layer", "bytes_per_token_per_layer", ",.6g"),
    Column("B/token", "bytes_per_token", ",.8g"),
    Column("vs MHA", "vs_mha", "+.2%"),
)
PARTS = (
    Column("model", "model"),
    Column("scheme", "scheme"),
    Column("bits", "bits_per_element", ".2f"),
    Column("codes", "codes", ",.8g"),
    Column("scales", "scales", ",.8g"),
    Column("zeros", "zeros", ",.8g"),
    Column("padding", "padding", ",.8g"),
    Column("tail B", "tail_bytes", ",d"),
)

MEASURED = (
    Column("model", "model"),
    Column("scheme", "scheme"),
    Column("B/token", "bytes_per_token", ",.8g"),
    Column("packed B", "measured.packed", ",d"),
    Column("unused", "measured.unused_rows", ",d"),
    Column("tails", "measured.tails", ",d"),
    Column("predicted", "measured.predicted", ",d"),
    Column("allocated", "measured.allocated", ",d"),
    Column("other", "measured.rounding", "+,d"),
)
LATENCY = (
    Column("model", "model"),
    Column("form", "form"),
    Column("reads", "cache"),
    Column("MiB", "mib", ",.1f"),
    Column("µs", "microseconds", ",.1f"),
    Column("× expanded", "speedup", ".2f"),
    Column("of bandwidth", "share", ".1%"),
    Column("error", "error", ".1e"),
)

FIT = (
    Column("model", "model"),
    Column("GPUs", "gpus"),
    Column("sequences", "sequences"),
    Column("weights", "gib.weights", ",.2f"),
    Column("KV codes", "gib.codes", ",.2f"),
    Column("scales, zeros", "gib.metadata", ",.2f"),
    Column("windows", "gib.windows", ",.2f"),
    Column("workspace", "gib.workspace", ",.2f"),
    Column("graphs", "gib.graphs", ",.2f"),
    Column("reserve", "gib.reserve", ",.2f"),
    Column("in all", "gib.total", ",.2f"),
    Column("of", "gib.usable", ",.2f"),
    Column("", "finding"),
    Column("most sequences", "largest_batch", ",d"),
    Column("longest context", "longest_context", ",d"),
)

size_option = partial(option, panel="Sizes")
fit_option = partial(option, panel="What fits")


def mla_size(
    kv: KVOptions,
    output: OutputOptions,
    model: Annotated[
        list[str] | None,
        model_option(
            "--model",
            help="A folder, a config.json, a hub id or a published model's name; once for each model "
            "(default: tiny and DeepSeek-V2-Lite).",
        ),
    ] = None,
    section: Annotated[
        Literal["theory", "measured", "latency", "1", "2", "3"],
        size_option(
            "--section",
            help="theory: by formula; measured: as allocated; latency: what reading it takes. Or 1, 2, 3.",
        ),
    ] = "theory",
    schemes: Annotated[
        str | None,
        size_option("--schemes", help="To size beside the model's own (default: MHA,GQA-8,GQA-4,MQA,MLA)."),
    ] = None,
    context: Annotated[
        str | None,
        size_option(
            "--context",
            help="Tokens of a sequence (default: 4096,32768 of theory; of --fit the model's context; else 1000; of "
            "latency on a GPU 32000).",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        size_option(
            "--batch", min=1, max=2**16, help="Sequences: of measured, latency and --fit (default: 1; 16 on a GPU)."
        ),
    ] = None,
    device: Annotated[
        str, size_option("--device", help="Of measured and latency: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    gpu: Annotated[
        str | None,
        size_option("--gpu", metavar="NAME", help="Tell how many tokens fit beside the weights: RTX 4090, …"),
    ] = None,
    fit: Annotated[
        list[str] | None,
        fit_option(
            "--fit",
            metavar="GPU",
            help="Tell in all parts whether our engine fits on such GPUs, with --context and --batch; once for each.",
        ),
    ] = None,
    ep: Annotated[
        int | None, fit_option("--ep", min=1, max=1024, help="Of --fit: parts into which --tp GPUs divide experts.")
    ] = None,
    pp: Annotated[
        int | None, fit_option("--pp", min=1, max=1024, help="Of --fit: stages of layers, of --tp GPUs each.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        fit_option("--max-num-batched-tokens", min=1, max=MOST, help="Of --fit: tokens of a step (default: 2048)."),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        size_option(
            "--gpu-memory", parser=memory_size, metavar="SIZE", help="Of one of them (default: what the driver says)."
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, size_option("--gpu-memory-utilization", min=0.01, max=1.0, help="Share of it that may be used.")
    ] = 0.9,
    tp: Annotated[
        int | None,
        size_option(
            "--tp", min=1, max=1024, help="GPUs that share heads and weights (default: 1, or as --ep of --fit)."
        ),
    ] = None,
    weight_bits: Annotated[
        Literal["16", "8", "4"],
        size_option("--weight-bits", help="Of a weight; scales are left out, but of --fit counted."),
    ] = "16",
    weight_memory: Annotated[
        int | None,
        size_option("--weight-memory", parser=memory_size, metavar="SIZE", help="Of all weights, if it is known."),
    ] = None,
) -> None:
    """How many bytes a model keeps of each token, and would keep under MHA, GQA, MQA and MLA.

    Example: kvtool mla-size --model DeepSeek-V2-Lite --model ./Qwen3-8B --nbits 4 --gpu 'RTX 4090' --tp 2

    Example: kvtool mla-size --model Qwen2.5-7B --fit 4090 --fit H200 --nbits 4 --context 32768 --batch 16
    """
    chosen = SECTIONS.get(section, section)
    if fit:
        if chosen != "theory" or schemes or gpu or weight_memory or device != "auto":
            raise ConfigError(
                "--fit counts what our engine will hold; leave out --section, --schemes, --gpu, --weight-memory and "
                "--device"
            )
        engine = EngineConfig(
            kv=kv,
            tp=tp or ep or 1,
            ep=ep or 1,
            pp=pp or 1,
            max_num_seqs=batch or 1,
            max_num_batched_tokens=max_num_batched_tokens or EngineConfig.max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        contexts = int_list("--context", context) if context else [None]
        report = fit_report(model or [EngineConfig.model], fit, engine, contexts, gpu_memory, weight_bits)
        show(report, output)
        if not all(row["fits"] for row in report.rows):
            raise typer.Exit(1)
        return
    if ep or pp or max_num_batched_tokens:
        raise ConfigError("--ep, --pp and --max-num-batched-tokens are for --fit; add it")
    names = model or DEFAULT_MODELS
    asked = [name.strip().upper() for name in schemes.split(",")] if schemes else None
    if chosen == "theory":
        if batch or device != "auto":
            raise ConfigError("--batch and --device are for what is measured; add --section measured or latency")
        from kvtool.sizing.theory import Budget

        known = gpu is not None or gpu_memory is not None
        if not known and (weight_memory or weight_bits != "16"):
            raise ConfigError("--weight-bits and --weight-memory say what is left for a cache; add --gpu or --fit")
        budget = Budget(gpu, gpu_memory, gpu_memory_utilization, int(weight_bits), weight_memory) if known else None
        contexts = int_list("--context", context or "4096,32768")
        show(theory_report(names, kv, contexts, asked, tp or 1, budget), output)
        return
    if gpu or gpu_memory or weight_memory or weight_bits != "16" or (tp or 1) > 1:
        raise ConfigError(
            "--gpu, --gpu-memory, --weight-bits, --weight-memory and --tp are for --section theory; leave them out"
        )
    from kvtool.device import choose_device

    where = choose_device(device)
    on_gpu = where.type == "cuda"
    contexts = int_list("--context", context or ("32000" if on_gpu and chosen == "latency" else "1000"))
    if len(contexts) > 1:
        raise ConfigError(f"--context {context}: what is measured has one length; give one")
    sequences = batch or (16 if on_gpu else 1)
    if chosen == "measured":
        show(measured_report(names, kv, asked, sequences, contexts[0], where), output)
        return
    if asked:
        raise ConfigError("--schemes are for other sections; --section latency runs a model's own")
    show(latency_report(model or DEFAULT_MODELS[1:], kv, sequences, contexts[0], where), output)


def fit_report(
    names: Sequence[str],
    gpus: Sequence[str],
    engine: EngineConfig,
    contexts: Sequence[int | None],
    gpu_memory: int | None,
    weight_bits: str,
) -> Report:
    """What our engine will hold of GPUs, and whether it fits."""
    from kvtool.sizing.fit import fit

    found = [
        fit(name, replace(engine, max_model_len=context), gpu, gpu_memory, weight_bits)
        for name in names
        for gpu in gpus
        for context in contexts
    ]
    rows: list[dict[str, Any]] = [{**asdict(each), "total": each.parts.total, "fits": each.fits} for each in found]
    config = {
        "fit": list(gpus),
        "models": list(names),
        "contexts": list(contexts),
        "gpu_memory": gpu_memory,
        "weight_bits": weight_bits,
        "engine": {name: value for name, value in asdict(engine).items() if name not in ("model", "max_model_len")},
    }
    shown = [fit_row(row) for row in rows]
    ranks = "".join(f" --{name} {count}" for name in ("tp", "ep", "pp") if (count := getattr(engine, name)) > 1)
    notes = [
        "GiB of the GPU that holds most, of what --gpu-memory-utilization allows. Most sequences: of that context; "
        "longest context: of so many sequences.",
        f"As `kvtool serve --max-num-seqs {engine.max_num_seqs} --max-model-len CONTEXT --max-num-batched-tokens "
        f"{engine.max_num_batched_tokens}{ranks}` holds it, computing in 16 bits. Workspace: of the largest step; "
        "reserve: of CUDA itself and the kernels' code.",
        *(f"Format: {text}." for text in dict.fromkeys(each.format for each in found)),
    ]
    if weight_bits != "16":
        notes.append("Embedding, head, norms and gates stay in 16 bits; so do experts but with 4-bit weights.")
    return Report("mla-size", config, rows, (), [Table("", FIT, shown)], (), notes)


def fit_row(row: Row) -> dict[str, Any]:
    """A row in GiB and words."""
    count, bits = row["tp"] * row["pp"], row["weight_bits"]
    nbytes = {**row["parts"], "total": row["total"], "usable": row["usable"]}
    return {
        **row,
        "model": row["model"] if bits == 16 else f"{row['model']}, {bits} bits",
        "gpus": row["gpu"] if count == 1 else f"{count} × {row['gpu']}",
        "sequences": f"{row['batch']:,} × {row['context']:,}",
        "gib": {name: part / 2**30 for name, part in nbytes.items()},
        "finding": "fits" if row["fits"] else "too much",
    }


def theory_report(
    names: Sequence[str],
    kv: KVOptions,
    contexts: Sequence[int],
    asked: Sequence[str] | None,
    tp: int,
    budget: "Budget | None",
) -> Report:
    """Bytes by formula."""
    from kvtool.sizing.theory import model_sizes

    found = [model_sizes(name, kv, contexts, schemes=asked, tp=tp, budget=budget) for name in names]
    config = {
        "section": "theory",
        "kv": asdict(kv),
        "models": list(names),
        "schemes": asked,
        "contexts": contexts,
        "tp": tp,
        "gpus": budget and asdict(budget),
    }
    rows = [asdict(scheme) for sizes in found for scheme in sizes.schemes]
    return Report("mla-size", config, rows, (), tables(rows, contexts), charts(rows, contexts), notes(found))


def measured_report(
    names: Sequence[str], kv: KVOptions, asked: Sequence[str] | None, batch: int, context: int, device: "torch.device"
) -> Report:
    """Bytes as they are allocated, beside the formula's."""
    from kvtool.sizing.measured import measured_size
    from kvtool.sizing.theory import model_sizes, schemes_of

    rows = []
    with progress("filling stores") as on_progress:
        for name in names:
            sizes = model_sizes(name, kv, [context], schemes=asked)
            for theory, scheme in zip(sizes.schemes, schemes_of(sizes.shape, asked), strict=True):
                measured = measured_size(sizes.shape, scheme, kv, batch, context, device)
                rows.append({**asdict(theory), "measured": asdict(measured)})
                on_progress(len(rows), len(names) * len(sizes.schemes))
    config = {
        "section": "measured",
        "kv": asdict(kv),
        "models": list(names),
        "schemes": asked,
        "batch": batch,
        "context": context,
        "device": str(device),
    }
    lines = [
        f"Stores of {batch} × {context:,} tokens on {device}, filled. Packed: tokens in blocks; unused: rows of blocks "
        "behind them; tails: the newest tokens at full precision; predicted: all three.",
        "Other: allocated less predicted, "
        + ("what the allocator rounds up." if device.type == "cuda" else "views and other objects that malloc holds."),
    ]
    sums = Series("predicted", labels(rows), [row["measured"]["predicted"] / 2**20 for row in rows])
    held = Series("allocated", labels(rows), [row["measured"]["allocated"] / 2**20 for row in rows])
    chart = Chart("Predicted and allocated", "", "MiB", [sums, held], kind="bar")
    return Report("mla-size", config, rows, MEASURED, (), [chart], lines)


def latency_report(names: Sequence[str], kv: KVOptions, batch: int, context: int, device: "torch.device") -> Report:
    """What reading latents takes."""
    from kvtool.models.resolve import resolve_config
    from kvtool.sizing.latency import latencies
    from kvtool.sizing.shapes import read_shape

    rows: list[dict[str, Any]] = []
    for name in names:
        shape = read_shape(name, resolve_config(name))
        found = latencies(shape, kv, batch, context, device)
        rows += [
            {"model": name, **asdict(each), "share": each.share, "speedup": found[0].seconds / each.seconds}
            for each in found
        ]
    config = {
        "section": "latency",
        "kv": asdict(kv),
        "models": list(names),
        "batch": batch,
        "context": context,
        "device": str(device),
    }
    lines = [
        f"Attention of one decode step in one layer, {batch} × {context:,} tokens on {device}, in "
        f"{'bfloat16' if device.type == 'cuda' else 'float32'}; random weights, the same in all forms.",
        "Floor: bytes that must be read, at the rate of a plain sum. Error: of the output, against float64; of packed "
        "latents that are random, and so have no structure that packing could use.",
    ]
    if any(row["share"] > 1 for row in rows):
        lines.append(
            "Above 100%: the processor's caches hold it and outdo memory; a longer --context does not fit there."
        )
    forms = [f"{row['form']},\n{row['cache']}" for row in rows]
    bars = [
        Series(name, forms, [row[path] * 1e6 for row in rows])
        for name, path in (("measured", "seconds"), ("floor", "floor"))
    ]
    shown = [{**row, "microseconds": row["seconds"] * 1e6, "mib": row["nbytes"] / 2**20} for row in rows]
    chart = Chart("Decode attention in one layer", "", "µs", bars, kind="bar", log_y=True)
    return Report("mla-size", config, rows, (), [Table("", LATENCY, shown)], [chart], lines)


def labels(rows: Sequence[Row]) -> list[str]:
    return [f"{row['model']} {row['scheme']}" for row in rows]


def tables(rows: Sequence[Row], contexts: Sequence[int]) -> list[Table]:
    """Sizes; what a token's bytes are where they are packed; what fits on a GPU."""
    lines = [readable(row) for row in rows]
    at = [Column(f"MiB at {context:,}", f"at.{context}.mib", ",.1f") for context in contexts]
    on_gpus = (
        [
            Column("B/token on a GPU", "bytes_per_token_per_gpu", ",.8g"),
            Column("copies", "copies", ".3g"),
        ]
        if rows[0]["tp"] > 1
        else []
    )
    found = [Table("", [*SIZES, *on_gpus, *at], lines)]
    if any(row["scales"] or row["tail_bytes"] for row in rows):
        found.append(Table("What a token's bytes are", PARTS, lines))
    if rows[0]["tokens_that_fit"] is not None:
        batches = [Column(f"batch at {context:,}", f"at.{context}.batch", ",d") for context in contexts]
        fit = [*SIZES[:3], Column("tokens that fit", "tokens_that_fit", ",d"), *batches]
        found.append(Table("What fits on each GPU", fit, lines))
    return found


def readable(row: Row) -> dict[str, Any]:
    """A row with a mark at a model's own scheme, and contexts by their length."""
    at = {str(c["context"]): {"mib": c["nbytes"] / 2**20, "batch": c["largest_batch"]} for c in row["contexts"]}
    return {**row, "own": "own" if row["native"] else "", "at": at}


def charts(rows: Sequence[Row], contexts: Sequence[int]) -> list[Chart]:
    """A token's bytes in a layer, under each scheme; a sequence's, by its length, as the models are."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    stems = [Path(model.removesuffix("/config.json")).name for model in models]
    short = dict(zip(models, stems if len({*stems}) == len(stems) else models, strict=True))
    found = {(row["model"], row["scheme"]): row["bytes_per_token_per_layer"] for row in rows}
    heads = {"MHA": math.inf, "MQA": 1, "MLA": 0}
    schemes = sorted({row["scheme"] for row in rows}, key=lambda s: -heads.get(s, int(s.partition("-")[2] or 0)))
    names = list(short.values())
    bars = [Series(scheme, names, [found.get((model, scheme)) for model in models]) for scheme in schemes]
    lines = [
        Series(f"{short[row['model']]}, {row['scheme']}", contexts, [c["nbytes"] / 2**20 for c in row["contexts"]])
        for row in rows
        if row["native"]
    ]
    return [
        Chart(
            "A token in a layer", "", "bytes", bars, kind="bar", log_y=max(found.values()) > 100 * min(found.values())
        ),
        Chart("A sequence", "tokens", "MiB", lines, log_x=True, log_y=True),
    ]


def notes(found: "Sequence[ModelSizes]") -> list[str]:
    """What figures mean, and what is easily got wrong about them."""
    lines = [
        "B/token: of a packed token, scales, zeros and padding included, at 2 bytes an element where 16 bits are kept. "
        "A sequence's tail stands apart; MiB have all in them.",
        "Schemes that are not a model's own keep its query heads and their size; MLA has then a latent of 4 heads and "
        "a rope key of half a head, as DeepSeek-V2 chose them.",
    ]
    formats = dict.fromkeys(scheme.format for sizes in found for scheme in sizes.schemes)
    lines += [f"Format: {fmt}." for fmt in formats]
    for sizes in found:
        shape, room = sizes.shape, sizes.room
        (own,) = (scheme for scheme in sizes.schemes if scheme.native)
        others = [scheme for scheme in sizes.schemes if not scheme.native]
        if shape.has_latent and others:
            lines.append(f"{shape.name}: " + "; ".join(against(own, other) for other in others) + ".")
        windowed, state = own.windowed_layers, shape.state_bytes
        if windowed:
            lines.append(
                f"{shape.name}: {windowed} of {own.num_layers} layers read no further back than their window, and give "
                "back the blocks behind it. (kvtool's own engine keeps them.)"
            )
        if state:
            lines.append(
                f"{shape.name}: {shape.num_layers - own.num_layers} of {shape.num_layers} layers keep no tokens but a "
                f"state, {state / 2**20:,.1f} MiB of a sequence."
            )
        if own.copies > 1:
            lines.append(
                f"{shape.name}: {own.tp} GPUs hold its cache {own.copies:.3g} times over: none has less than a latent "
                "or a KV head."
            )
        if room:
            lines.append(
                f"{shape.name}: each {room.gpu} has {room.memory / 2**30:,.1f} GiB to use, of which weights take "
                f"{room.weights / 2**30:,.1f}. A step's activations are not in it."
            )
    return lines


def against(own: "SchemeSize", other: "SchemeSize") -> str:
    """How a model's own scheme compares with another, both ways that people say it."""
    share = own.bytes_per_token / other.bytes_per_token
    return f"{share - 1:+.2%} against {other.scheme} ({share:.2%} of its {other.bytes_per_token_per_layer:,.6g} bytes)"
