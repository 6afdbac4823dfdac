"""`kvtool perplexity`: what KV formats do to a model's predictions."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .charts import Chart, Series
from .options import MOST, option
from .output import Column, OutputOptions, Report, Table, progress, show

if TYPE_CHECKING:
    from kvtool.perplexity import FormatScore
    from kvtool.protocols import Task
    from kvtool.scoring import ScoringModel

COLUMNS = (
    Column("format", "format.name"),
    Column("bits", "bits_per_element", ".2f"),
    Column("B/token", "bytes_per_token", ",.0f"),
    Column("tail B", "tail_bytes", ",d"),
    Column("PPL", "perplexity", ".3f"),
    Column("ΔPPL", "perplexity_change", "+.3%"),
    Column("±", "perplexity_change_error", ".3%"),
    Column("KLD", "kld_mean", ".2e"),
    Column("same top-1", "top1_agreement", ".2%"),
)
DETAILS = (
    Column("format", "format.name"),
    Column("PPL ±", "perplexity_error", ".2f"),
    Column("KLD ±", "kld_error", ".0e"),
    Column("median", "kld_median", ".1e"),
    Column("90 %", "kld_p90", ".1e"),
    Column("99 %", "kld_p99", ".1e"),
    Column("99.9 %", "kld_p999", ".1e"),
    Column("max", "kld_max", ".1e"),
    Column("top-1 ±", "top1_error", ".2%"),
    Column("s", "seconds", ".1f"),
)
ORIGINAL_TEXT = (
    Column("format", "format.name"),
    Column("word PPL", "word_perplexity", ".4f"),
    Column("byte PPL", "byte_perplexity", ".5f"),
    Column("bits/byte", "bits_per_byte", ".5f"),
)
DEFINITIONS = (
    "KLD: nats, from the predictions with a 16-bit cache and weights as the checkpoint has them; ΔPPL: from paired "
    "differences.",
    "bits of an element, B/token: of packed tokens, scales and zeros included; tail B: newest tokens at full "
    "precision, for each running sequence. All of a model that is served in 16 bits.",
)

text_option = partial(option, panel="Text")
comparison_option = partial(option, panel="Comparison")


def perplexity(
    engine: EngineConfig,
    output: OutputOptions,
    data: Annotated[
        str | None,
        text_option(
            "--data", metavar="FILE", help="A text, .jsonl or .parquet (default: a built-in sample of a novel)."
        ),
    ] = None,
    field: Annotated[
        str | None, text_option("--field", help="Of .jsonl and .parquet: where the text is (default: text).")
    ] = None,
    max_tokens: Annotated[
        int | None, text_option("--max-tokens", min=1, max=MOST, help="Read no more of the text (default: all).")
    ] = None,
    protocol: Annotated[
        str, text_option("--protocol", help="How it is cut and scored: llamacpp, hf-stride, gptq or lm-eval.")
    ] = "gptq",
    window: Annotated[
        int | None,
        text_option(
            "--window", min=4, max=MOST, help="Tokens that are read together (default: 2048, of llamacpp 512)."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        text_option("--stride", min=1, max=MOST, help="Of hf-stride: tokens from window to window (default: 512)."),
    ] = None,
    formats: Annotated[
        str | None,
        comparison_option(
            "--formats", help="What to compare: 16, 8, 4, 2, fp8, pairs such as k8v4, plan:FILE (default: 16,8,4,2)."
        ),
    ] = None,
    save_baseline: Annotated[
        str | None,
        comparison_option("--save-baseline", metavar="FILE", help="Keep what 16 bits predict, as safetensors."),
    ] = None,
    baseline: Annotated[
        str | None, comparison_option("--baseline", metavar="FILE", help="Compare with what --save-baseline has kept.")
    ] = None,
) -> None:
    """Measure what KV formats do to a model's predictions: perplexity, and KL divergence from 16 bits.

    Example: kvtool perplexity --data wiki.test.raw --protocol gptq --formats 16,8,4,2,k8v4,plan:plan.yaml
    """
    from kvtool.perplexity import Interrupted, parse_formats, score_formats
    from kvtool.protocols import SAMPLE, make_task, read_documents
    from kvtool.scoring import ScoringModel
    from kvtool.tokenizer import Tokenizer

    if baseline and save_baseline:
        raise ConfigError("--baseline reads the file that --save-baseline writes; leave out one of them")
    kv_formats = parse_formats(formats, engine.kv)
    documents = read_documents(Path(data) if data else SAMPLE, field)
    with ExitStack() as models:
        model = models.enter_context(closing(ScoringModel(engine)))
        reference = None
        if model.quantization and engine.num_ranks == 1:
            plain = replace(engine, quantization="auto", quantize_head=False, keep_layers=(), calibration=None)
            reference = models.enter_context(closing(ScoringModel(plain)))
        task = make_task(
            protocol,
            documents,
            Tokenizer.load(model.path, model.model_config.vocab_size),
            model.max_model_len,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
        )
        config = {
            "engine": asdict(engine),
            "data": data or "built-in sample",
            "field": field,
            "max_tokens": max_tokens,
            "protocol": protocol,
            "window": task.window,
            "stride": task.stride,
            "formats": list(kv_formats),
            "baseline": baseline,
        }
        kept, keep = (Path(file) if file else None for file in (baseline, save_baseline))
        try:
            with progress("scoring") as on_progress:
                scores = score_formats(
                    model,
                    task,
                    kv_formats,
                    reference=reference,
                    baseline=kept,
                    save_baseline=keep,
                    on_progress=on_progress,
                )
        except Interrupted as interrupt:
            show(score_report(model, task, config, interrupt.scores), output)
            raise
        show(score_report(model, task, config, scores), output)


def score_report(
    model: "ScoringModel", task: "Task", config: Mapping[str, Any], scores: "Sequence[FormatScore]"
) -> Report:
    """Formats side by side; of a run that was stopped, as far as it came."""
    rows = [asdict(score) for score in scores]
    weights = f" with weights in {model.config.quantization}" if model.quantization else ""
    what = (
        f"{model.config.model}{weights} in {model.dtype_name} on {model.device}, protocol {config['protocol']}: "
        f"{len(task.windows):,} windows of {task.window:,} tokens, "
        f"{scores[0].tokens:,} of {task.num_tokens:,} places scored."
    )
    return Report("perplexity", config, rows, COLUMNS, tables(rows), charts(rows), [what, *DEFINITIONS])


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    details = Table("Standard errors, KLD over places, seconds", DETAILS, rows)
    return [details] if rows[0]["bits_per_byte"] is None else [details, Table("Original text", ORIGINAL_TEXT, rows)]


def charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Perplexity and divergence against honest bits; a divergence of nothing has no place on a log scale."""

    def points(field: str) -> list[Series]:
        return [Series(row["format"]["name"], [row["bits_per_element"]], [row[field] or None]) for row in rows]

    bits = "bits per element, scales and zeros included"
    return [
        Chart("Perplexity", bits, "perplexity", points("perplexity"), kind="scatter"),
        Chart("KL divergence from 16 bits", bits, "nats", points("kld_mean"), kind="scatter", log_y=True),
    ]
