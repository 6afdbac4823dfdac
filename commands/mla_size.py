"""`kvtool mla-size`: how large a model's cache is, and would be with other attention."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kvtool.config import KVOptions

from .bench import int_list
from .options import memory_size, model_option, option
from .output import Chart, Column, OutputOptions, Report, Row, Series, Table, show

if TYPE_CHECKING:
    from kvtool.sizing.theory import ModelSizes, SchemeSize

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

size_option = partial(option, panel="Sizes")


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
    context: Annotated[str, size_option("--context", help="Tokens of a sequence, comma-separated.")] = "4096,32768",
    gpu: Annotated[
        str | None, size_option("--gpu", metavar="NAME", help="Tell what fits on such GPUs: RTX 4090, H200, …")
    ] = None,
    gpu_memory: Annotated[
        int | None, size_option("--gpu-memory", parser=memory_size, metavar="SIZE", help="Of one, if it is another.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, size_option("--gpu-memory-utilization", min=0.01, max=1.0, help="Share of it that may be used.")
    ] = 0.9,
    tp: Annotated[int, size_option("--tp", min=1, max=1024, help="GPUs that share heads and weights.")] = 1,
    weight_bits: Annotated[
        Literal["16", "8", "4"], size_option("--weight-bits", help="Of a weight; scales are left out.")
    ] = "16",
    weight_memory: Annotated[
        int | None,
        size_option("--weight-memory", parser=memory_size, metavar="SIZE", help="Of all weights, if it is known."),
    ] = None,
) -> None:
    """How many bytes a model keeps of each token, and would keep under MHA, GQA, MQA and MLA.

    Example: kvtool mla-size --model DeepSeek-V2-Lite --model ./Qwen3-8B --nbits 4 --gpu 'RTX 4090' --tp 2
    """
    from kvtool.sizing.theory import Budget, model_sizes

    contexts = int_list("--context", context)
    asked = [name.strip().upper() for name in schemes.split(",")] if schemes else None
    known = gpu is not None or gpu_memory is not None
    budget = Budget(gpu, gpu_memory, gpu_memory_utilization, int(weight_bits), weight_memory) if known else None
    found = [model_sizes(name, kv, contexts, schemes=asked, tp=tp, budget=budget) for name in (model or DEFAULT_MODELS)]
    config = {
        "kv": asdict(kv),
        "models": [sizes.shape.name for sizes in found],
        "schemes": asked,
        "contexts": contexts,
        "tp": tp,
        "gpus": budget and asdict(budget),
    }
    rows = [asdict(scheme) for sizes in found for scheme in sizes.schemes]
    show(Report("mla-size", config, rows, (), tables(rows, contexts), charts(rows, contexts), notes(found)), output)


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
    found = {(row["model"], row["scheme"]): row["bytes_per_token_per_layer"] for row in rows}
    schemes = dict.fromkeys(row["scheme"] for row in rows)
    bars = [Series(scheme, models, [found.get((model, scheme)) for model in models]) for scheme in schemes]
    lines = [
        Series(f"{row['model']}, {row['scheme']}", contexts, [c["nbytes"] / 2**20 for c in row["contexts"]])
        for row in rows
        if row["native"]
    ]
    return [
        Chart("A token in a layer", "", "bytes", bars, kind="bar"),
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
            lines.append(f"{shape.name}: {own.tp} GPUs keep each byte {own.copies:.3g} times.")
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
