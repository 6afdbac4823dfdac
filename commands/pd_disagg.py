"""`kvtool pd-disagg`: what it takes to let one engine prefill and another decode."""

import asyncio
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError

from .charts import Chart, Series
from .options import MOST, option
from .output import Column, OutputOptions, Report, Table, progress, show

if TYPE_CHECKING:
    from kvtool.disagg.link import Case, Link
    from kvtool.disagg.measure import Found, Outcome, Phase

STAGES = ("queue", "prefill", "transfer", "first_decode")
COLUMNS = (
    Column("request", "request"),
    Column("prompt", "prompt_tokens", ",d"),
    Column("TTFT", "ttft_ms", ",.2f"),
    *(Column(stage.replace("_", " "), f"stages_ms.{stage}", ",.2f") for stage in STAGES),
    Column("residual", "residual", ".2%"),
    Column("bytes sent", "bytes_sent", ",d"),
    Column("predicted", "bytes_predicted", ",d"),
    Column("same tokens", "same"),
    Column("", "state"),
)
PERCENTILES = (
    Column("", "figure"),
    *(Column(name, name, ",.2f") for name in ("p50", "p90", "p99", "max")),
)
FORMATS = (
    Column("bits", "bits"),
    Column("tokens", "tokens", ",d"),
    Column("bytes sent", "num_bytes", ",d"),
    Column("predicted", "predicted_bytes", ",d"),
    Column("GB/s", "gb_s", ".2f"),
    Column("of the link", "share", ".0%"),
    Column("into the store, ms", "ms", ",.2f"),
    Column("× 16 bits", "ratio", ".2f"),
)
BAKE_OFF = (
    Column("transfer", "transfer"),
    Column("from", "source"),
    Column("to", "target"),
    Column("at once, KiB", "part_kib", ",d"),
    Column("GB/s", "gb_s", ".2f"),
    Column("of the link", "share", ".0%"),
    Column("", "state"),
)
DEFINITIONS = (
    "Times in ms. TTFT: sent to the first token at the client. prefill: until the first token is known there; "
    "transfer: until its KV is here, checked; first decode: until the step with which the first token is given out.",
    "bytes: predicted from format and length; sent with headers. GB/s: from the first block gathered to the last byte "
    "checked; of the link: of what plain bytes make through a TCP socket between two processes here.",
)

load_option = partial(option, panel="Load")
transfer_option = partial(option, panel="Transfer")


def pd_disagg(
    engine: EngineConfig,
    output: OutputOptions,
    prompt_tokens: Annotated[
        str, load_option("--prompt-tokens", metavar="LIST", help="Lengths of the prompts, in tokens.")
    ] = "128,512,1536",
    output_tokens: Annotated[
        int, load_option("--output-tokens", "--max-tokens", min=2, max=MOST, help="Tokens of each answer.")
    ] = 16,
    requests: Annotated[int, load_option("--requests", min=1, max=10_000, help="Requests of each length.")] = 4,
    decodes: Annotated[
        int, load_option("--decodes", min=0, max=1024, help="Answers that are being written all the while.")
    ] = 4,
    prefill_device: Annotated[
        str | None,
        transfer_option("--prefill-device", help="Where prompts are computed (default: --device, or the first GPU)."),
    ] = None,
    decode_device: Annotated[
        str | None,
        transfer_option("--decode-device", help="Where answers are (default: --device, or the second GPU)."),
    ] = None,
    kv_transfer: Annotated[
        str, transfer_option("--kv-transfer", help="How KV travels: auto, or the name of a transfer.")
    ] = "auto",
    bake_off: Annotated[
        bool, transfer_option("--bake-off", help="Measure each transfer by size and direction, and nothing else.")
    ] = False,
    fault: Annotated[
        Literal["kill-prefill", "kill-decode", "corrupt", "drop", "delay"] | None,
        transfer_option("--fault", help="Let this happen, and show what clients see."),
    ] = None,
) -> None:
    """Serve the same requests by two engines that do everything, and by one that prefills and one that decodes.

    Shows where the time to the first token goes, what travels and how fast, and how evenly other answers go on.

    Example: kvtool pd-disagg --nbits 4 --prompt-tokens 256,1024 --output timeline.png
    """
    from kvtool.disagg.link import check_transfer, survey
    from kvtool.disagg.measure import Found, Load, measure, model_context

    if bake_off and fault:
        raise ConfigError("--bake-off and --fault do not go together: a bake-off serves no requests; leave one out")
    lengths = length_list(prompt_tokens)
    devices = device_pair(engine, prefill_device, decode_device)
    config = {
        "engine": asdict(engine),
        "prompt_tokens": lengths,
        "output_tokens": output_tokens,
        "requests": requests,
        "decodes": decodes,
        "devices": devices,
        "kv_transfer": kv_transfer,
        "fault": fault,
    }
    if bake_off:
        show_bake_off(engine, config, devices, output)
        return
    found, load = Found(), Load(tuple(lengths), output_tokens, requests, decodes)
    load.check(engine.max_model_len or model_context(engine))
    check_transfer(devices, kv_transfer)
    link = None
    try:
        with progress("serving") as on_progress:
            settings = {"devices": devices, "transfer": kv_transfer, "fault": fault, "on_progress": on_progress}
            asyncio.run(measure(engine, load, found, **settings))  # type: ignore[arg-type]
        if fault is None:
            with progress("link") as on_progress:
                link = survey(engine, max(lengths), devices, kv_transfer, on_progress)
    except KeyboardInterrupt:
        if found.shared.outcomes:
            show(report(config, found, link), output)
        raise
    show(report(config, found, link), output)
    failed = [outcome for outcome in found.shared.outcomes if outcome.error]
    if found.leaks or any(found.matches(o) is False for o in found.shared.outcomes) or (failed and not fault):
        raise typer.Exit(1)


def length_list(text: str) -> list[int]:
    """The numbers of `128,512`."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 0 < int(word) <= MOST for word in words):
        raise ConfigError(f"--prompt-tokens {text}: write lengths in tokens, separated by commas")
    return [int(word) for word in words]


def device_pair(engine: EngineConfig, prefill: str | None, decode: str | None) -> tuple[str, str]:
    """Where the two engines begin: on GPUs of their own, where there are enough and nothing else was asked for."""
    if engine.device == "auto" and not (prefill or decode):
        from .output import environment

        if len(environment()["gpus"]) >= 2 * engine.num_ranks:
            return "cuda:0", f"cuda:{engine.num_ranks}"
    return prefill or engine.device, decode or engine.device


def report(config: dict[str, Any], found: "Found", link: "Link | None") -> Report:
    """Rows for machines; for people tables, where more stands in each. Without a link nothing is said of its speed."""
    outcomes = found.shared.outcomes
    rows = [row_of(found, outcome) for outcome in outcomes]
    detailed = [
        {
            **row,
            "prompt_tokens": outcome.prompt_tokens,
            "residual": residual(outcome),
            "same": {True: "yes", False: "NO", None: "n/a"}[row["outputs_match"]],
            "state": state(outcome),
        }
        for outcome, row in zip(outcomes, rows, strict=True)
    ]
    summary = summary_of(found)
    tables = [
        Table("", COLUMNS, detailed),
        Table("Percentiles, ms", PERCENTILES, percentile_rows(summary)),
    ]
    if link:
        summary |= link_summary(found, link)
        what = f"Sequences alone: the longest prompt, and 64 MiB at 16 bits; {link.formats[0][1].transfer}"
        tables.append(Table(what, FORMATS, summary["formats"]))
    return Report("pd-disagg", config, rows, (), tables, charts(found), [*notes(found, summary), *DEFINITIONS], summary)


def state(outcome: "Outcome") -> str:
    """What became of a request."""
    if outcome.error:
        return f"error: {outcome.error}"
    return outcome.served or ("ok" if outcome.handoff else "computed again by the decode side")


def row_of(found: "Found", outcome: "Outcome") -> dict[str, Any]:
    assert found.layout is not None
    stages = outcome.stages
    return {
        "request": outcome.request,
        "ttft_ms": milliseconds(outcome.ttft),
        "stages_ms": {name: milliseconds(seconds) for name, seconds in stages.items()} if stages else None,
        "bytes_sent": outcome.handoff.num_bytes if outcome.handoff else None,
        "bytes_predicted": found.layout.bytes_for([outcome.prompt_tokens]),
        "outputs_match": found.matches(outcome),
    }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def residual(outcome: "Outcome") -> float | None:
    """Share of the TTFT that no stage accounts for."""
    return 1 - sum(outcome.stages.values()) / outcome.ttft if outcome.stages and outcome.ttft else None


def summary_of(found: "Found") -> dict[str, Any]:
    """Figures over all requests."""
    from kvtool.disagg.measure import percentiles

    def itl(phase: "Phase") -> dict[str, float]:
        return percentiles([1e3 * gap for _, gap in phase.gaps])

    def ttft(phase: "Phase") -> dict[str, float]:
        return percentiles([1e3 * outcome.ttft for outcome in phase.outcomes if outcome.ttft])

    staged = [outcome.stages for outcome in found.shared.outcomes if outcome.stages]
    return {
        "ttft_ms": {"colocated": ttft(found.colocated), "disaggregated": ttft(found.shared)},
        "stages_ms": {name: percentiles([1e3 * stages[name] for stages in staged]) for name in STAGES},
        "itl_ms": {"colocated": itl(found.colocated), "disaggregated": itl(found.shared)},
        "residual": found.residual,
        "arrivals": found.arrivals,
        "losses": found.losses,
        "leaks": found.leaks,
    }


def link_summary(found: "Found", link: "Link") -> dict[str, Any]:
    """What travels how fast, and from which length on that pays."""
    from kvtool.disagg.measure import break_even

    sixteen = {case.num_tokens: speed.seconds for case, speed in link.formats if bits_of(case) == "16"}
    outcomes = [(outcome, outcome.stages) for outcome in found.shared.outcomes]
    prefill = [(float(outcome.prompt_tokens), stages["prefill"]) for outcome, stages in outcomes if stages]
    transfer = [(float(case.num_tokens), speed.seconds) for case, speed in link.lengths]
    return {
        "plain_gb_s": link.plain_gb_s,
        "large_gb_s": link.large.gb_s,
        "large_share": link.large.gb_s / link.plain_gb_s,
        "formats": [
            {
                "bits": bits_of(case),
                "tokens": case.num_tokens,
                "num_bytes": speed.num_bytes,
                "predicted_bytes": speed.predicted_bytes,
                "gb_s": speed.gb_s,
                "share": speed.gb_s / link.plain_gb_s,
                "ms": 1e3 * speed.seconds,
                "ratio": speed.seconds / sixteen[case.num_tokens],
            }
            for case, speed in link.formats
        ],
        "break_even_tokens": break_even(prefill, transfer) if prefill else None,
    }


def bits_of(case: "Case") -> str:
    return case.layout.format.layers[0].key.bits


def percentile_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    named = {
        "TTFT, colocated": summary["ttft_ms"]["colocated"],
        "TTFT, disaggregated": summary["ttft_ms"]["disaggregated"],
        **{f"  {stage.replace('_', ' ')}": figures for stage, figures in summary["stages_ms"].items()},
        "ITL of other answers, colocated": summary["itl_ms"]["colocated"],
        "ITL of other answers, disaggregated": summary["itl_ms"]["disaggregated"],
    }
    return [{"figure": name, **figures} for name, figures in named.items() if figures]


def notes(found: "Found", summary: dict[str, Any]) -> list[str]:
    lines = [
        "Colocated: both engines do everything, and take turns. Disaggregated: the same two, one prefills and one "
        "decodes. Prompts come one after the other, among answers that are being written."
    ]
    if found.residual is not None:
        lines.append(f"The stages add up to {1 - found.residual:.2%} of the TTFT; the rest is the way to the client.")
    if "formats" in summary:
        tokens = summary["break_even_tokens"]
        large = f"{summary['large_gb_s']:.2f} GB/s of a sequence of 64 MiB in parts, as an engine sends it"
        lines += [
            f"From {tokens:,.0f} tokens on this link brings a prompt's KV sooner than the decode side computes it."
            if tokens
            else "On this link no prompt's KV comes sooner than the decode side computes it.",
            f"Transport: {large}, {summary['large_share']:.0%} of the {summary['plain_gb_s']:.2f} of the link.",
        ]
    if found.losses:
        lines.append(f"{found.losses} transfers failed; their prompts were computed again by the decode side.")
    wrong = [o.request for o in found.shared.outcomes if found.matches(o) is False]
    if wrong:
        lines.append(f"Other tokens than colocated: requests {', '.join(wrong)}; --dtype float64 leaves no doubt why.")
    lines += [f"LEAK: {leak}." for leak in found.leaks]
    return lines


def charts(found: "Found") -> list[Chart]:
    """How long each request was in which stage, and how evenly other answers went on meanwhile."""
    staged = [(f"{o.request}: {o.prompt_tokens:,}", o.stages) for o in found.shared.outcomes if o.stages]
    if not staged:
        return []
    names = [name for name, _ in staged]
    timeline = [
        Series(stage.replace("_", " "), names, [1e3 * stages[stage] for _, stages in staged]) for stage in STAGES
    ]
    gaps = [
        Series(name, [at - phase.gaps[0][0] for at, _ in phase.gaps], [1e3 * gap for _, gap in phase.gaps])
        for name, phase in (("colocated", found.colocated), ("disaggregated", found.shared))
        if phase.gaps
    ]
    return [
        Chart("Requests until their first token", "ms since they were sent", "request: tokens", timeline, "timeline"),
        *(
            [Chart("Gaps between tokens of other answers", "seconds", "ms", gaps, "scatter", log_y=True)]
            if gaps
            else []
        ),
    ]


def show_bake_off(
    engine: EngineConfig, config: dict[str, Any], devices: tuple[str, str], output: OutputOptions
) -> None:
    """Each transfer by what is sent at once; the best is named."""
    from kvtool.disagg.link import bake_off

    with progress("transfers") as on_progress:
        plain, found = bake_off(engine, devices, on_progress)
    rows: list[dict[str, Any]] = []
    for case, speed in found:
        measured = None if isinstance(speed, str) else speed.gb_s
        rows.append(
            {
                "transfer": case.transfer,
                "source": case.source,
                "target": case.target,
                "part_kib": case.part_bytes >> 10,
                "gb_s": measured,
                "share": measured and measured / plain,
                "state": speed if isinstance(speed, str) else "ok",
            }
        )
    good = [row for row in rows if row["gb_s"]]
    best = max(good, key=lambda row: float(row["gb_s"]))
    said = [
        f"Best here: {best['transfer']}, {best['part_kib']:,} KiB of a layer at once, {best['gb_s']:.2f} GB/s.",
        f"The link: {plain:.2f} GB/s of plain bytes through a TCP socket.",
    ]
    ways = dict.fromkeys((row["transfer"], row["source"], row["target"]) for row in good)
    lines = []
    for way in ways:
        of = [row for row in good if (row["transfer"], row["source"], row["target"]) == way]
        name = f"{way[0]}, {way[1]} to {way[2]}"
        lines.append(Series(name, [row["part_kib"] for row in of], [row["gb_s"] for row in of]))
    chart = Chart("Transfers", "KiB of a layer at once", "GB/s", lines, log_x=True)
    summary = {"plain_gb_s": plain, "best": best}
    show(Report("pd-disagg", config | {"bake_off": True}, rows, BAKE_OFF, (), [chart], said, summary), output)
