"""Pictures of what bench-ttft and bench-throughput found, of one result or of several over each other."""

from collections.abc import Callable, Sequence
from typing import Any

from .charts import Chart, Series
from .output import value_at

Rows = Sequence[dict[str, Any]]
Results = Sequence[tuple[str, Rows]]  # with names, which one alone does not need


def ttft_charts(results: Results) -> list[Chart]:
    """TTFT against the length of the prompt, or against the share of it that was cached."""
    figures = (("p50", "ttft_ms.p50"), ("p99", "ttft_ms.p99"), ("floor", "floor_ms"))
    lengths = [
        line
        for key, figure in figures
        for name, rows in _families(results, "prompt")
        for line in _line(name, key, rows, "prompt_tokens", figure)
    ]
    hits = [
        line
        for name, rows in _families(results, "prefix hit")
        for line in _line(name, "p50", rows, "hit_rate", "ttft_ms.p50")
    ]
    if any(row.get("prefix_hit") is not None for _, rows in results for row in rows):
        return [Chart("Time to first token and prefix hits", "share of the prompt cached", "TTFT p50, ms", hits)]
    return [Chart("Time to first token", "prompt tokens", "ms", lengths, log_x=True, log_y=True)] if lengths else []


def throughput_charts(results: Results) -> list[Chart]:
    """Throughput against latency, what a user gets against what a GPU gives, and what happened over time."""
    loads = _families(results, "concurrency", "rate")
    curves = [
        line
        for name, rows in loads
        for key, latency in (("TTFT", "ttft_ms.p50"), ("TPOT", "tpot_ms.p50"))
        for line in _line(name, f"{key} p50", rows, "output_tok_s", latency)
    ]
    pareto = [line for name, rows in loads for line in _line(name, "", rows, _per_user, _per_gpu)]
    gaps = [line for name, rows in results for row in rows for line in _over_time(name, row, "itl_timeline", "max_ms")]
    use = [
        line for name, rows in results for row in rows for line in _over_time(name, row, "timeline", "kv_usage", 100)
    ]
    charts = [
        Chart("Throughput and latency", "output tokens/s", "ms", curves, log_y=True),
        Chart("What users get and what a GPU gives", "tokens/s for each user", "tokens/s from each GPU", pareto),
        Chart("Longest gap between tokens", "seconds", "ms", gaps, log_y=True),
        Chart("KV cache in use", "seconds", "% of the blocks", use),
    ]
    return [chart for chart in charts if chart.series]


def ablation_charts(knob: str, results: Results) -> list[Chart]:
    """What each setting of a knob came to, side by side."""
    figures = (
        ("Throughput", "total tokens/s", "total_tok_s", 1),
        ("Time to first token", "TTFT p50, ms", "ttft_ms.p50", 1),
        ("Time per token", "TPOT p50, ms", "tpot_ms.p50", 1),
        ("Perplexity", "change, %", "perplexity_change", 100),
    )
    return [
        Chart(title, knob, unit, bars, kind="bar")
        for title, unit, figure, scale in figures
        if (bars := [bar for name, rows in results for bar in _bars(name, rows, figure, scale)])
    ]


def _bars(name: str, rows: Rows, figure: str, scale: float) -> list[Series]:
    found = [(row["variant"], scale * value) for row in rows if (value := value_at(row, figure)) is not None]
    return [Series(name, [variant for variant, _ in found], [value for _, value in found])] if found else []


def _families(results: Results, *along: str) -> Results:
    """Rows whose points differ in nothing but what a line goes along, by what else tells them from others."""
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, rows in results:
        for row in rows:
            words = row.get("point", "").split(", ")
            families.setdefault((name, *(word for word in words if not word.startswith(along))), []).append(row)
    common = set.intersection(*map(set, families)) if len(families) > 1 else set(*families)
    return [(" ".join(word for word in words if word not in common), rows) for words, rows in families.items()]


Get = str | Callable[[dict[str, Any]], Any]


def _line(name: str, what: str, rows: Rows, x: Get, y: Get) -> list[Series]:
    """One line through the rows that have both, if any has."""
    points = [(_get(row, x), _get(row, y)) for row in rows]
    found = [(x, y) for x, y in points if x is not None and y is not None]
    label = " ".join(filter(None, (name, what)))
    return [Series(label, [x for x, _ in found], [y for _, y in found])] if found else []


def _over_time(name: str, row: dict[str, Any], timeline: str, figure: str, scale: float = 1) -> list[Series]:
    seconds, values = value_at(row, f"{timeline}.seconds"), value_at(row, f"{timeline}.{figure}")
    if not seconds or not values or all(value is None for value in values):
        return []
    scaled = [None if value is None else scale * value for value in values]
    return [Series(" ".join(filter(None, (name, load_name(row)))), seconds, scaled)]


def load_name(row: dict[str, Any]) -> str:
    """What a row was asked, in a few words."""
    words = [row["variant"]] if "variant" in row else []
    words += [f"{row[name]:,} tokens" for name in ("prompt_tokens",) if row.get(name) is not None]
    words += [f"{row['concurrency']} at once"] if row.get("concurrency") is not None else []
    words += [f"{row['rate']} requests/s"] if row.get("rate") is not None else []
    return ", ".join(words)


def _get(row: dict[str, Any], key: Get) -> Any:
    return value_at(row, key) if isinstance(key, str) else key(row)


def _per_user(row: dict[str, Any]) -> float | None:
    tpot = value_at(row, "tpot_ms.p50")
    return 1e3 / tpot if tpot else None


def _per_gpu(row: dict[str, Any]) -> float | None:
    rate = row.get("output_tok_s")
    return rate / max(1, len(row.get("gpus") or ())) if rate else None
