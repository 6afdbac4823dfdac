"""`kvtool quantize-kv`: what a cache in fewer bits costs a model, and what it saves."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvtool.config import Bits, EngineConfig, KVOptions
from kvtool.errors import ConfigError

from .charts import Chart, Series
from .options import MOST, memory_size, option
from .output import Column, OutputOptions, Report, Row, Table, progress, show

if TYPE_CHECKING:
    from kvtool.quantize.report import Exam
    from kvtool.quantize.search import SearchResult

DEFAULT_BITS: Bits = "4"
RETRIEVAL, RETRIEVAL_QUESTIONS = "retrieval", 24  # asked of tiny, which learnt it
TRIALS, PLAN_FILE = 200, "kv-plan.yaml"  # of a search
SHOWN_CHARACTERS = 100  # of the end of a question

QUALITY = (
    Column("cache", "format.name"),
    Column("PPL", "perplexity", ".2f"),
    Column("ΔPPL", "perplexity_change", "+.3%"),
    Column("±", "perplexity_change_error", ".3%"),
    Column("KLD", "kld_mean", ".1e"),
    Column("same top-1", "top1_agreement", ".1%"),
)
TASK = (Column("right", "task.accuracy", ".1%"), Column("±", "task.error", ".1%"))
SIZE = (
    Column("bits", "bits_per_element", ".2f"),
    Column("MiB", "memory_mib", ",.2f"),
    Column("saved", "memory.saved", ".1%"),
)
DECODE = (
    Column("decode µs", "decode.microseconds", ",.1f"),
    Column("GB/s", "decode.gb_per_s", ",.0f"),
    Column("of peak", "decode.of_peak", ".0%"),
)
LAYER = (
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
MEMORY = (
    Column("KiB of", "name"),
    Column("codes", "codes", ",.0f"),
    Column("scales", "scales", ",.0f"),
    Column("zeros", "zeros", ",.0f"),
    Column("padding", "padding", ",.0f"),
    Column("window", "window", ",.0f"),
    Column("total", "total", ",.0f"),
    Column("16 bits", "exact", ",.0f"),
    Column("saved", "saved", ".1%"),
)
ANSWERS = (
    Column("question", "question"),
    Column("expected", "expected"),
    Column("16 bits", "exact"),
    Column("", "exact_right"),
    Column("packed", "packed"),
    Column("", "packed_right"),
)
ABLATION = (
    Column("", "variant"),
    *QUALITY[1:],
    Column("output error", "output_error.mean", ".2%"),
    Column("bits", "bits_per_element", ".2f"),
    Column("nominal", "nominal_saved", ".1%"),
    Column("saved", "memory.saved", ".1%"),
)

PLANS = (
    Column("cache", "format.name"),
    Column("bits", "bits_per_element", ".2f"),
    Column("KLD", "kld_mean", ".2e"),
    Column("±", "kld_error", ".0e"),
    Column("uniform", "uniform_kld", ".2e"),
    Column("ΔPPL", "perplexity_change", "+.3%"),
    Column("same top-1", "top1_agreement", ".2%"),
    Column("B/token", "bytes_per_token", ",.0f"),
    Column("tail B", "tail_bytes", ",.0f"),
)
PLAN = (Column("layer", "layer"), Column("K", "keys"), Column("V", "values"))

STREAMS = {"keys": "key", "values": "value"}

measure_option = partial(option, panel="Measurement")


def quantize_kv(
    engine: EngineConfig,
    output: OutputOptions,
    data: Annotated[
        str | None,
        measure_option("--data", metavar="FILE", help="A text, .jsonl or .parquet (default: a built-in sample)."),
    ] = None,
    field: Annotated[
        str | None, measure_option("--field", help="Of .jsonl and .parquet: where the text is (default: text).")
    ] = None,
    max_tokens: Annotated[
        int, measure_option("--max-tokens", min=1, max=MOST, help="Read no more of the text, in whole windows.")
    ] = 8192,
    window: Annotated[
        int | None,
        measure_option("--window", min=4, max=MOST, help="Tokens that are read together (default: 2048)."),
    ] = None,
    batch: Annotated[
        int, measure_option("--batch", min=1, max=2**16, help="Sequences that memory and time are told for.")
    ] = 1,
    context: Annotated[
        int | None,
        measure_option(
            "--context", min=1, max=2**24, help="Tokens of each (default: the model's context, 32768 at most)."
        ),
    ] = None,
    task: Annotated[
        str | None,
        measure_option(
            "--task", metavar="FILE", help="Questions and answers, JSONL as GSM8K's; or retrieval, which tiny is asked."
        ),
    ] = None,
    questions: Annotated[
        int | None,
        measure_option(
            "--questions", min=0, max=MOST, help="Ask no more of them, 0: none (default: all; 24 of retrieval)."
        ),
    ] = None,
    answer_tokens: Annotated[
        int, measure_option("--answer-tokens", min=1, max=MOST, help="Of an answer at most.")
    ] = 512,
    show_answers: Annotated[
        int, measure_option("--show-answers", min=0, max=MOST, help="Show so many answers side by side.")
    ] = 0,
    dump: Annotated[
        str | None,
        measure_option(
            "--dump", metavar="FILE", help="Write the packed cache of a prompt as safetensors, and read it back."
        ),
    ] = None,
    prompt: Annotated[str | None, measure_option("--prompt", help="Of --dump (default: from the sample).")] = None,
    ablate: Annotated[
        str | None,
        measure_option(
            "--ablate", help="Vary one choice at a time: bits, axis, symmetry, residual, group, rotation, or all."
        ),
    ] = None,
    find: Annotated[
        bool, measure_option("--search", help="Find bits for each layer within a budget, and write a plan.")
    ] = False,
    budget_bits: Annotated[
        float | None,
        measure_option("--budget-bits", min=0, max=16, help="Of --search: honest bits an element, say 4.0."),
    ] = None,
    budget_memory: Annotated[
        int | None,
        measure_option(
            "--budget-memory",
            parser=memory_size,
            metavar="SIZE",
            help="Of --search: what the cache may take, say 6GiB.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, measure_option("--tokens", min=1, max=2**40, help="That --budget-memory must hold.")
    ] = None,
    trials: Annotated[
        int | None, measure_option("--trials", min=1, max=10**6, help=f"Of --search: plans to look at ({TRIALS}).")
    ] = None,
    save_plan: Annotated[
        str | None,
        measure_option(
            "--save-plan", metavar="FILE", help=f"Where --search writes what `serve --kv-plan` takes ({PLAN_FILE})."
        ),
    ] = None,
    preflight: Annotated[
        bool,
        measure_option(
            "--preflight/--no-preflight",
            help="Try the format on text first; where --nbits alone would ruin a layer, take what does not.",
        ),
    ] = True,
) -> None:
    """Measure what a KV cache in fewer bits costs a model, and what it saves (4 bits unless asked otherwise).

    Example: kvtool quantize-kv --nbits 2 --residual-length 64 --show-answers 3

    Example: kvtool quantize-kv --ablate all --output report.html

    Example: kvtool quantize-kv --search --budget-bits 4.0 --save-plan plan.yaml
    """
    of_one_format = {"task": task, "questions": questions, "show-answers": show_answers, "dump": dump, "prompt": prompt}
    of_search = {"trials": trials, "save-plan": save_plan}
    check_search(find, {"ablate": ablate, **of_one_format}, of_search, budget_bits, budget_memory, tokens)
    from kvtool.quantize.report import Exam

    if find:
        exam = Exam(data, field, window, max_tokens, batch, context)
        show(
            plan_report(
                engine, exam, budget_bits, budget_memory, tokens, trials or TRIALS, Path(save_plan or PLAN_FILE)
            ),
            output,
        )
        return
    engine = replace(engine, kv=with_bits(engine.kv))
    if ablate is not None:
        for name, given in of_one_format.items():
            if given:
                raise ConfigError(f"--{name} is for one format; leave out --ablate")
        exam = Exam(data, field, window, max_tokens, batch, context)
        journal = Path(f"{output.output}.part.jsonl") if output.output else None
        show(ablation_report(engine, exam, ablate, journal), output)
        if journal:
            journal.unlink(missing_ok=True)
        return
    if task is None and engine.model == "tiny":
        task = RETRIEVAL
    if task == RETRIEVAL and questions is None:
        questions = RETRIEVAL_QUESTIONS
    if task is None and (questions or show_answers):
        raise ConfigError("--questions and --show-answers: this model is asked nothing yet; give a --task")
    exam = Exam(data, field, window, max_tokens, batch, context, task, questions, answer_tokens)
    if preflight:
        from kvtool.quantize.preflight import preflight as survive

        engine = survive(engine)
    dumped = dump_notes(engine, prompt, dump)  # first, because a file that cannot be written must not cost a run
    report = format_report(engine, exam, show_answers)
    show(replace(report, notes=[*report.notes, *dumped]), output)


def with_bits(kv: KVOptions) -> KVOptions:
    """`kv`, in `DEFAULT_BITS` where no option says how many."""
    asked = kv.nbits or kv.nbits_key or kv.nbits_value or kv.plan
    return kv if asked else replace(kv, nbits=DEFAULT_BITS)


def format_report(engine: EngineConfig, exam: "Exam", num_shown: int) -> Report:
    """What one format costs, beside 16 bits."""
    from kvtool.quantize.report import examine

    costs = examine(engine, exam, progress)
    rows = [cost.row() for cost in costs]
    exact, packed = rows
    columns = (*QUALITY, *(TASK if exact["task"] else ()), *SIZE, *(DECODE if exact["decode"] else ()))
    tables = [
        Table("", columns, list(map(readable, rows))),
        Table("Errors by layer", LAYER, packed["layers"]),
        Table(f"Memory of {sequences(rows)}", MEMORY, memory_rows(packed)),
    ]
    if costs[0].task and costs[1].task and num_shown:
        pairs = list(zip(costs[0].task.answers, costs[1].task.answers, strict=True))[:num_shown]
        for row, answers in zip(rows, zip(*pairs, strict=True), strict=True):
            row["answers"] = list(map(asdict, answers))
        tables.append(Table("Answers", ANSWERS, [answer_row(*map(asdict, pair)) for pair in pairs]))
    notes = [
        f"{packed['format']['name']}: {packed['format']['description']}.",
        f"{engine.model}: {packed['tokens']:,} tokens scored, each from the cache that decoding would read. KLD: nats "
        "from what 16 bits predict.",
        "Errors: norm of the difference over that of the exact, of packed keys and values, and of the attention's "
        "output, alone or with all layers before packed too. Outlier: largest channel over the median one.",
        "bits: codes, scales, zeros and padding of a packed element; memory holds windows too. Both of a model that is "
        "served in 16 bits.",
    ]
    if packs_nothing(packed):
        notes.append("These windows are too short for any token to be packed: choose a longer --window.")
    if exact["decode"] and not packed["decode"]:
        notes.append("Decode time is n/a where no GPU kernel reads the format.")
    return Report("quantize-kv", settings(engine, exam), rows, (), tables, layer_charts(packed), notes)


def ablation_report(engine: EngineConfig, exam: "Exam", asked: str, journal: Path | None) -> Report:
    """Formats that differ from that of `engine` in one choice each."""
    from kvtool.quantize.ablate import ablate

    if journal and journal.exists():
        print(f"going on from {journal}", file=sys.stderr)
    try:
        rows = ablate(engine, asked, exam, journal, progress)
    except KeyboardInterrupt:
        if journal and journal.exists():
            print(f"stopped; the same command goes on from {journal}", file=sys.stderr)
        raise
    tables = [
        Table(f"{name}; saved: of {sequences(rows)}", ABLATION, group) for name, group in by_ablation(rows).items()
    ]
    notes = [f"{row['ablation']} {row['variant']}: n/a, {row['reason']}." for row in rows if row["reason"]]
    notes += [
        f"{row['ablation']} {row['variant']}: the windows are too short for any token to be packed."
        for row in rows
        if not row["reason"] and packs_nothing(row)
    ]
    config = {**settings(engine, exam), "ablate": asked}
    return Report("quantize-kv", config, rows, (), tables, ablation_charts(rows), notes)


def check_search(
    find: bool,
    asked: Mapping[str, object],
    of_search: Mapping[str, object],
    bits: float | None,
    memory: int | None,
    tokens: int | None,
) -> None:
    """Refuse a search without a budget, a budget without a search, and what else cannot be asked for together."""
    if not find:
        budget = {"budget-bits": bits, "budget-memory": memory, "tokens": tokens}
        for name, given in {**budget, **of_search}.items():
            if given is not None:
                raise ConfigError(f"--{name} is for --search; add it")
        return
    for name, given in asked.items():
        if given:
            raise ConfigError(f"--{name} is for formats that are given; leave out --search")
    if (bits is None) == (memory is None):
        raise ConfigError("--search needs a budget: --budget-bits 4.0, or --budget-memory 6GiB and --tokens 200000")
    if (memory is None) != (tokens is None):
        raise ConfigError("--budget-memory and --tokens go together: so many bytes must hold so many tokens")


def plan_report(
    engine: EngineConfig,
    exam: "Exam",
    bits: float | None,
    memory: int | None,
    tokens: int | None,
    trials: int,
    path: Path,
) -> Report:
    """A plan of bits by layer, found within a budget and written to `path`."""
    from kvtool.quantize.search import PAIRS, Budget, find_plan

    budget = Budget(bits, memory, tokens or 0, engine.max_num_seqs)
    part = Path(f"{path}.part")
    if part.exists():
        print(f"going on from {part}", file=sys.stderr)
    try:
        result = find_plan(engine, exam, budget, path, num_trials=trials, progress=progress)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {part}", file=sys.stderr)
        raise
    found = result.found
    rows: list[dict[str, Any]] = [
        {**asdict(score), "uniform_kld": result.expected_kld(score.bits_per_element)}
        for score in (*result.uniform, found)
    ]
    words = [f"K{key}V{value}" for key, value in PAIRS]
    plan = [
        {"layer": layer, "keys": key, "values": value, **dict(zip(words, errors, strict=True))}
        for layer, ((key, value), errors) in enumerate(
            zip(result.plan.kv.layer_bits or (), result.sensitivity, strict=True)
        )
    ]
    rows[-1]["plan"] = plan
    tables = [
        Table("On held-out text", PLANS, rows),
        Table("The plan, and each layer's sensitivity", (*PLAN, *(Column(w, w, ".2%") for w in words)), plan),
    ]
    notes = [
        f"{path}: {found.format.description}; serve it with --kv-plan {path}.",
        f"{result.num_tried} plans tried for {len(result.groups)} groups of layers; KLD {result.plan.kld:.2e} on the "
        f"text it was searched on, {found.kld_mean:.2e} on held-out text, {found.tokens:,} tokens of it.",
        "uniform: what the nine uniform formats come to at these bits, by a line through the logarithms of their KLD.",
        "Sensitivity: attention-output error, all layers before in the same bits.",
    ]
    if result.plan.kv.residual_length:
        notes.append("Its window of full-precision tokens rules out prefix hits; --residual-length 0 keeps them.")
    config = {**settings(engine, exam), "budget": asdict(budget), "trials": trials, "save_plan": str(path)}
    return Report("quantize-kv", config, rows, (), tables, plan_charts(result, plan, words), notes)


def plan_charts(result: "SearchResult", plan: Sequence[Row], words: Sequence[str]) -> list[Chart]:
    found, layers = result.found, [str(row["layer"]) for row in plan]
    points = {
        "uniform": [(score.bits_per_element, score.kld_mean) for score in result.uniform],
        "best tried, on its own text": [(tried.bits_per_element, tried.kld) for tried in result.front],
        "plan": [(found.bits_per_element, found.kld_mean)],
    }
    return [
        Chart(
            "Divergence against honest bits",
            "bits per element, scales and zeros included",
            "KL divergence from 16 bits, nats",
            [Series(name, *map(list, zip(*pairs, strict=True))) for name, pairs in points.items()],
            kind="scatter",
            log_y=True,
        ),
        Chart(
            "Sensitivity of layers",
            "layer",
            "attention-output error",
            [Series(word, layers, [row[word] for row in plan]) for word in words],
            kind="heat",
            log_y=True,
        ),
    ]


def dump_notes(engine: EngineConfig, prompt: str | None, dump: str | None) -> list[str]:
    """Write the packed cache of a prompt, if asked to, and say what stands there."""
    if dump is None:
        if prompt is not None:
            raise ConfigError("--prompt is what --dump caches; name a file with it")
        return []
    from kvtool.quantize.report import dump_cache

    cached = dump_cache(engine, prompt, Path(dump))
    packed = cached.first_near
    return [
        f"{dump}: the cache of {len(cached.token_ids):,} tokens, {packed:,} of them packed, "
        f"{Path(dump).stat().st_size:,} bytes; read back bit for bit."
    ]


def settings(engine: EngineConfig, exam: "Exam") -> dict[str, Any]:
    return {"engine": asdict(engine), **asdict(exam)}


def sequences(rows: Sequence[Row]) -> str:
    """What memory is told for, as any row that was measured says."""
    row = next(row for row in rows if "batch" in row)
    return f"{row['batch']:,} × {row['context']:,} tokens"


def packs_nothing(row: Row) -> bool:
    """All queries read full precision, though the format packs."""
    return bool(row["nominal_saved"] > 0 and row["output_error"]["max"] == 0)


def by_ablation(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: list(group) for name, group in groupby(rows, key=lambda row: row["ablation"])}


def readable(row: Row) -> Row:
    """`row` with figures in the units of the tables; what was not measured is left out."""
    decode, memory = row.get("decode"), row.get("memory")
    return {
        **row,
        "memory_mib": memory and memory["total"] / 2**20,
        "decode": decode
        and {
            "microseconds": decode["seconds"] * 1e6,
            "gb_per_s": decode["bytes_per_second"] / 1e9,
            "of_peak": decode["bytes_per_second"] / decode["bandwidth"],
        },
    }


def memory_rows(row: Row) -> list[Row]:
    """Keys, values and both, over all layers, in KiB."""
    parts = ("codes", "scales", "zeros", "padding", "window", "exact")
    streams = {name: [layer[stream]["memory"] for layer in row["layers"]] for name, stream in STREAMS.items()}
    streams["both"] = [memory for memories in streams.values() for memory in memories]
    rows: list[Row] = []
    for name, memories in streams.items():
        kib = {part: sum(memory[part] for memory in memories) / 1024 for part in parts}
        total = sum(kib.values()) - kib["exact"]
        rows.append({"name": name, **kib, "total": total, "saved": 1 - total / kib["exact"]})
    return rows


def answer_row(exact: Row, packed: Row) -> Row:
    verdict = {True: "right", False: "wrong"}
    return {
        "question": "…" + " ".join(exact["question"].split())[-SHOWN_CHARACTERS:],
        "expected": exact["expected"].rpartition("####")[2].strip()[-SHOWN_CHARACTERS:],
        "exact": exact["text"].strip(),
        "exact_right": verdict[exact["is_right"]],
        "packed": packed["text"].strip(),
        "packed_right": verdict[packed["is_right"]],
    }


def layer_charts(row: Row) -> list[Chart]:
    layers = row["layers"]
    names = [str(layer["layer"]) for layer in layers]
    errors = {
        "keys": [layer["key"]["error"] for layer in layers],
        "values": [layer["value"]["error"] for layer in layers],
        "attention output": [layer["output_error"] for layer in layers],
        "with layers before": [layer["propagated_error"] for layer in layers],
    }
    outliers = {name: [layer[stream]["outlier"]["ratio"] for layer in layers] for name, stream in STREAMS.items()}
    name = row["format"]["name"]
    return [
        Chart(f"Relative errors at {name}", "layer", "error", series(names, errors), kind="bar"),
        Chart("Outlier channels", "layer", "largest / median channel", series(names, outliers), kind="bar"),
    ]


def ablation_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """What is exact has no place on a logarithmic scale."""
    measured = [row for row in rows if not row["reason"] and row["output_error"]["max"]]
    if not measured:
        return []
    groups = by_ablation(measured)
    if len(groups) == 1:  # then there is room for a name at each point
        groups = {row["variant"]: [row] for row in measured}

    def points(x: Callable[[Row], float], y: Callable[[Row], float]) -> list[Series]:
        return [Series(name, list(map(x, group)), list(map(y, group))) for name, group in groups.items()]

    sensitivity = [
        Series(
            f"{row['ablation']}: {row['variant']}",
            [str(layer["layer"]) for layer in row["layers"]],
            [layer["output_error"] for layer in row["layers"]],
        )
        for row in measured
    ]
    return [
        Chart(
            "Error against honest bits",
            "bits per element, scales and zeros included",
            "attention-output error",
            points(lambda row: row["bits_per_element"], lambda row: row["output_error"]["mean"]),
            kind="scatter",
            log_y=True,
        ),
        Chart(
            f"Quality against memory, {sequences(rows)}",
            "MiB, windows included",
            "KL divergence from 16 bits, nats",
            points(lambda row: row["memory"]["total"] / 2**20, lambda row: row["kld_mean"]),
            kind="scatter",
            log_y=True,
        ),
        Chart("Sensitivity of layers", "layer", "attention-output error", sensitivity, kind="heat", log_y=True),
    ]


def series(x: Sequence[str], lines: Mapping[str, Sequence[float]]) -> list[Series]:
    return [Series(name, x, y) for name, y in lines.items()]
