"""What bench-ttft and bench-throughput do with results: hold one against another, keep one, draw several."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.errors import ConfigError

from .charts import Chart
from .options import option
from .output import Column, Report, Table, as_json, environment

if TYPE_CHECKING:
    from kvtool.bench.compare import Delta, Gate, Result

Rows = Sequence[dict[str, Any]]
Charts = Callable[[Sequence[tuple[str, Rows]]], list[Chart]]
DELTAS = (
    Column("at", "point"),
    Column("metric", "metric"),
    Column("base", "base", ",.4g"),
    Column("now", "current", ",.4g"),
    Column("change", "change"),
    Column("interval", "interval"),
    Column("fails on", "gate"),
    Column("", "verdict"),
)

result_option = partial(option, panel="Results")


@dataclass(frozen=True)
class ResultOptions:
    """What becomes of a result.

    Attributes:
        base: what --compare has read, under its name.
        gates: changes of it that are failures.
        force: compare also what was measured otherwise.
        bundle: a new folder for all that was measured.
        plot: files to draw, in the place of a measurement; None: measure.
    """

    base: "tuple[str, Result] | None"
    gates: "list[Gate]"
    force: bool
    bundle: Path | None
    plot: list[str] | None


def result_options(
    compare: Annotated[
        str | None,
        result_option("--compare", metavar="FILE.json", help="Show what changed since this --output of the same load."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        result_option(
            "--fail-on",
            metavar="METRIC:CHANGE",
            help="Exit 1 if it changed so, beyond noise: ttft_ms.p99:10%, output_tok_s:-5%. Can be repeated.",
        ),
    ] = None,
    force: Annotated[bool, result_option("--force", help="Compare also other workloads and other hardware.")] = False,
    bundle: Annotated[
        str | None,
        result_option("--bundle", metavar="DIR", help="Keep result, events and the command that repeats it there."),
    ] = None,
    plot: Annotated[
        bool, result_option("--plot", help="Measure nothing: draw result files, given as arguments, into --output.")
    ] = False,
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE.json]...", help="What --plot draws.")] = None,
) -> ResultOptions:
    """Checked, and the base read, before anything is measured."""
    from kvtool.bench.bundle import create_bundle
    from kvtool.bench.compare import Gate, read_result

    if files and not plot:
        raise ConfigError(f"{files[0]}: result files go with --plot; to hold one against a new result use --compare")
    if plot and not files:
        raise ConfigError("--plot: name the result files to draw: --plot a.json b.json --output picture.html")
    if fail_on and not compare:
        raise ConfigError("--fail-on: says how a result may differ from --compare FILE.json; add that")
    gates = [Gate.parse(word) for text in fail_on or () for word in text.split(",")]
    base = (compare, read_result(Path(compare))) if compare else None
    if bundle:
        create_bundle(Path(bundle))
    return ResultOptions(base, gates, force, Path(bundle) if bundle else None, files if plot else None)


def check_comparable(results: ResultOptions, command: str, config: dict[str, Any]) -> None:
    """Refuse a base of another kind before time is spent on measuring what cannot be held against it.

    Raises:
        ConfigError: it is another command's, or empty, or was measured otherwise and --force was not given.
    """
    from kvtool.bench.compare import check_gates, differences

    if results.base is None:
        return
    name, base = results.base
    if base["schema"] != f"kvtool.{command}/1" or not base["rows"]:
        raise ConfigError(f"--compare {name}: holds no rows of {command}; its schema is {base['schema']}")
    check_gates(base, results.gates, config["how"]["trials"])
    if not results.force:
        now = {"schema": f"kvtool.{command}/1", "environment": environment(), "config": config, "rows": base["rows"]}
        if different := differences(base, json.loads(json.dumps(now))):
            raise ConfigError(f"--compare {name}: was not measured alike ({'; '.join(different)}); --force compares")


def compared(report: Report, results: ResultOptions) -> tuple[Report, bool]:
    """The report with what changed since the base, and whether a gate is broken."""
    from kvtool.bench.compare import compare, differences

    if results.base is None:
        return report, False
    name, base = results.base
    current = json.loads(as_json(report))
    deltas = compare(base, current, results.gates, results.force)
    rows = [
        {**row, "changes": [asdict(delta) for delta in deltas if delta.point == row["point"]]} for row in report.rows
    ]
    table = Table(f"Compared with {name}", DELTAS, list(map(_delta_row, deltas)))
    broken = [f"{delta.metric} at {delta.point}" for delta in deltas if delta.verdict == "regression"]
    different = differences(base, current)
    notes = [
        *report.notes,
        *([f"Compared by --force, though not measured alike: {'; '.join(different)}."] if different else []),
        f"Regression against {name}: {'; '.join(broken)}." if broken else f"No regression against {name}.",
    ]
    busy, cores = os.getloadavg()[0], environment()["cores"]
    if busy > 2 * cores:
        notes.append(f"This machine has other work to do (load {busy:.1f} on {cores} cores): that changes figures too.")
    if any(delta.verdict == "noise" for delta in deltas):
        notes.append("Noise: beyond the limit, but equal runs differ as much; more --trials can tell.")
    return replace(report, rows=rows, tables=[*report.tables, table], notes=notes), bool(broken)


def _delta_row(delta: "Delta") -> dict[str, Any]:
    relative = delta.gate is None or delta.gate.endswith("%")

    def change(value: float | None) -> str | None:
        return None if value is None else f"{value:+.1%}" if relative else f"{value:+.4g}"

    ends = (change(delta.low), change(delta.high))
    verdict = {"regression": "REGRESSION"}.get(delta.verdict or "", delta.verdict)
    shown = {"change": change(delta.change), "interval": " … ".join(map(str, ends)) if delta.low is not None else ""}
    return asdict(delta) | shown | {"gate": delta.gate or "", "verdict": verdict or ""}


def keep(report: Report, results: ResultOptions) -> None:
    """Fill the bundle, if there is to be one."""
    from kvtool.bench.bundle import fill_bundle

    if results.bundle:
        fill_bundle(results.bundle, as_json(report), sys.argv[1:], os.environ)


def results_to_plot(command: str, results: ResultOptions) -> dict[str, Rows]:
    """The rows of --plot's files, by their names.

    Raises:
        ConfigError: a file is no result of this command.
    """
    from kvtool.bench.compare import read_result

    read = {name: read_result(Path(name)) for name in results.plot or ()}
    for name, result in read.items():
        if result["schema"] != f"kvtool.{command}/1":
            raise ConfigError(f"--plot {name}: is of {result['schema']}; draw it with that command")
    return {name: result["rows"] for name, result in read.items()}
