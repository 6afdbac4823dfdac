"""`kvtool quantize-kv`: what a cache in fewer bits costs a model, and what it saves."""

from dataclasses import asdict, replace
from typing import Annotated

from kvtool.config import Bits, EngineConfig, KVOptions

from .options import MOST, option
from .output import Column, OutputOptions, Report, Table, show

PANEL = "Measurement"
DEFAULT_BITS: Bits = "4"

LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("keys", "key.format"),
    Column("error", "key.error", ".2%"),
    Column("outlier", "key.outlier.ratio", ".1f"),
    Column("values", "value.format"),
    Column("error", "value.error", ".2%"),
    Column("outlier", "value.outlier.ratio", ".1f"),
    Column("output error", "output_error", ".2%"),
    Column("propagated", "propagated_error", ".2%"),
)


def quantize_kv(
    engine: EngineConfig,
    output: OutputOptions,
    batch: Annotated[
        int, option("--batch", panel=PANEL, min=1, max=2**16, help="Sequences that memory and time are told for.")
    ] = 1,
    context: Annotated[
        int | None,
        option(
            "--context",
            panel=PANEL,
            min=1,
            max=MOST,
            help="Tokens of each (default: the model's context or 32,768).",
        ),
    ] = None,
) -> None:
    """What a KV cache in fewer bits costs a model, layer by layer, and what it saves (4 bits unless asked otherwise).

    Example: kvtool quantize-kv --nbits 2 --residual-length 64 --show-answers 3
    """
    from kvtool.quantize.report import Examiner

    examiner = Examiner(engine, batch, context)
    cost = asdict(examiner.measure(with_bits(engine.kv)))
    show(
        Report("quantize-kv", asdict(engine), [cost], (), [Table("", LAYER_COLUMNS, cost["layers"])]),
        output,
    )


def with_bits(kv: KVOptions) -> KVOptions:
    """`kv`, in `DEFAULT_BITS` where no option says how many."""
    asked = kv.nbits or kv.nbits_key or kv.nbits_value or kv.plan
    return kv if asked else replace(kv, nbits=DEFAULT_BITS)
