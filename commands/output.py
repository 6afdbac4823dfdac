"""What a command found, shown: a table, JSON, Markdown or CSV on stdout, and a file in the format of its suffix."""

import csv
import errno
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from kvtool.errors import ConfigError

from .charts import Chart, png, svg

Row = Mapping[str, Any]
ABSENT = "n/a"
BESIDE = 2  # spaces between columns
PACKAGES = ("kvtool", "torch", "transformers", "triton", "flash-attn", "numpy")


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes; at most one of the first three, which replace the table on stdout.

    Attributes:
        output: a file to write as well; its suffix, one of `WRITERS`, says in which format.
    """

    json: bool = False
    markdown: bool = False
    csv: bool = False
    output: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: with the unit, if there is one.
        path: where the value stands in a row, dotted: "kld.mean".
        form: as after the colon of an f-string; a value that is missing, None or not finite is n/a.
    """

    title: str
    path: str
    form: str = ""


@dataclass(frozen=True)
class Table:
    """Rows seen through columns."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Report:
    """The result of one run of a command.

    Attributes:
        command: its name, for the schema `kvtool.<command>/1`.
        config: what it was asked for; goes into JSON and HTML as it is.
        rows: what it found, as plain values.
        columns: of the table over all rows; none leaves it out.
        tables: more of them below, over parts of the rows or other columns.
        charts: for .html and .png.
        notes: lines for people: what figures mean, what is odd about them.
        summary: of all rows, in JSON beside them; None leaves it out.
    """

    command: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    columns: Sequence[Column]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    summary: Mapping[str, Any] | None = None

    @property
    def all_tables(self) -> list[Table]:
        return [*([Table("", self.columns, self.rows)] if self.columns else []), *self.tables]


def show(report: Report, options: OutputOptions) -> None:
    """Print `report` on stdout, and write `options.output`."""
    if options.json:
        put(as_json(report))
    elif options.markdown:
        put(as_markdown(report))
    elif options.csv:
        put(as_csv(report))
    else:
        put(as_text(report))
    if options.output:
        write(Path(options.output), WRITERS[Path(options.output).suffix](report))


def put(text: str) -> None:
    """Print `text`; whoever reads stdout may have left."""
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:  # what is buffered must still go somewhere when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def check_output(options: OutputOptions) -> OutputOptions:
    """`options`, refused while nothing has been computed yet.

    Raises:
        ConfigError: formats that exclude each other, or a file of unknown format or in no folder that can be written.
    """
    if options.json + options.markdown + options.csv > 1:
        raise ConfigError("--json, --markdown and --csv: stdout takes one of them; use --output for another")
    if options.output is None:
        return options
    path = Path(options.output)
    if path.suffix not in WRITERS:
        raise ConfigError(f"--output {path}: the format follows the suffix; choose {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):  # root may write anywhere, but not to every file system
            pass
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}; choose another file") from error
    return options


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, float], None]]:
    """A bar with the time left on stderr, if that is a terminal; move it by calling what this gives: (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    times = TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")
    columns = TextColumn("{task.description}"), BarColumn(), *times
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def environment() -> dict[str, Any]:
    """Versions and hardware that a figure depends on."""
    versions = {package: _version(package) for package in PACKAGES}
    return {
        **{package: found for package, found in versions.items() if found},
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this runs from, with a + where files differ from it."""
    import kvtool

    root = Path(kvtool.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, asked of the driver: torch would take seconds, and hold memory of each."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [pynvml.nvmlDeviceGetName(handle) for handle in handles]


def as_json(report: Report) -> str:
    """One document; what is not finite becomes null, which JSON has a word for."""
    document = {
        "schema": f"kvtool.{report.command}/1",
        "environment": environment(),
        "config": report.config,
        "rows": report.rows,
        **({} if report.summary is None else {"summary": report.summary}),
    }
    return json.dumps(_plain(document), indent=2, allow_nan=False) + "\n"


def as_jsonl(report: Report) -> str:
    """A row a line."""
    return "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in report.rows)


def as_csv(report: Report) -> str:
    """All fields of all rows, nested ones under dotted names; lists as JSON."""
    rows = [dict(_flat(_plain(row))) for row in report.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(report: Report) -> str:
    parts = []
    for table in report.all_tables:
        lines = [f"**{table.title}**\n"] if table.title else []
        lines.append(_markdown_line([column.title for column in table.columns]))
        lines.append("|" + "".join(" --: |" if right else " --- |" for right in _to_the_right(table)))
        lines += [_markdown_line([cell(row, column) for column in table.columns]) for row in table.rows]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *report.notes]) + "\n"


def as_text(report: Report) -> str:
    """Tables and notes, as wide as the terminal; piped, as wide as they are. Lines end between words: a table that
    would break figures goes on below, behind its first column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 10_000)
    with console.capture() as capture:
        for table in report.all_tables:
            if table.title:
                console.print(Text(table.title))
            for part, widths in _abreast(table, console.width):
                rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
                for column, right, width in zip(part.columns, _to_the_right(part), widths, strict=True):
                    side: Literal["right", "left"] = "right" if right else "left"
                    rich.add_column(Text(column.title), justify=side, overflow="fold", width=width)
                for row in part.rows:
                    rich.add_row(*(Text(cell(row, column)) for column in part.columns))
                console.print(rich)
        for note in report.notes:
            console.print(Text(note))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _abreast(table: Table, width: int) -> Iterator[tuple[Table, list[int]]]:
    """The table, or parts of it that have its first column and whichever others stand side by side within `width`, with
    the widths of their columns."""
    from rich.cells import cell_len

    columns: list[tuple[Column, int, int]] = []  # with the least and the best width
    for column in table.columns:
        texts = [column.title, *(cell(row, column) for row in table.rows)]
        least = max(cell_len(word) for text in texts for word in (text.split() or [""]))
        columns.append((column, min(least, width // 2), max(map(cell_len, texts))))
    parts = [columns[:1]]
    for each in columns[1:]:
        if sum(least + BESIDE for _, least, _ in (*parts[-1], each)) > width:
            parts.append(columns[:1])
        parts[-1].append(each)
    for part in parts:
        widths = [best for _, _, best in part]
        while sum(best + BESIDE for best in widths) > width:
            spare = [i for i, (_, least, _) in enumerate(part) if widths[i] > least]
            if not spare:
                break
            widths[max(spare, key=widths.__getitem__)] -= 1
        yield Table(table.title, [column for column, _, _ in part], table.rows), widths


def as_html(report: Report) -> str:
    """A page that needs nothing else: tables, charts as SVG, configuration and environment."""
    title = f"kvtool {report.command}"
    about = {"config": _plain(report.config), "environment": environment()}
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }}
.right {{ text-align: right; }}
td:first-child {{ white-space: nowrap; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{escape(title)}</h1>
{"".join(map(_html_table, report.all_tables))}
{"".join(f"<p>{escape(note)}</p>" for note in report.notes)}
{"".join(f"<p>{svg(chart)}</p>" for chart in report.charts)}
<details><summary>Configuration and environment</summary><pre>{escape(json.dumps(about, indent=2))}</pre></details>
</html>
"""


def as_png(report: Report) -> bytes:
    """All charts below each other.

    Raises:
        ConfigError: the report has none.
    """
    if not report.charts:
        raise ConfigError("--output FILE.png: there is no chart of this; choose another suffix")
    return png(report.charts)


WRITERS: dict[str, Callable[[Report], bytes]] = {
    ".json": lambda report: as_json(report).encode(),
    ".jsonl": lambda report: as_jsonl(report).encode(),
    ".csv": lambda report: as_csv(report).encode(),
    ".md": lambda report: as_markdown(report).encode(),
    ".html": lambda report: as_html(report).encode(),
    ".png": as_png,
}


def value_at(row: Row, path: str) -> Any:
    """What stands in `row` at a dotted path; None where the path leads nowhere."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def cell(row: Row, column: Column) -> str:
    """A value as tables show it."""
    value = _plain(value_at(row, column.path))
    return ABSENT if value is None else format(value, column.form)


def _to_the_right(table: Table) -> list[bool]:
    """Columns that hold numbers."""
    found = [[value_at(row, column.path) for row in table.rows] for column in table.columns]
    return [any(isinstance(value, int | float) for value in values) for values in found]


def _plain(value: Any) -> Any:
    """Without infinities and NaN."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else value


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"


def _html_table(table: Table) -> str:
    sides = ["right" if right else "left" for right in _to_the_right(table)]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(cells, sides, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{side}">{escape(text)}</{tag}>' for text, side in pairs) + "</tr>\n"

    heading = f"<h2>{escape(table.title)}</h2>\n" if table.title else ""
    head = line("th", [column.title for column in table.columns])
    return (
        heading
        + f"<table>\n{head}"
        + "".join(line("td", [cell(row, column) for column in table.columns]) for row in table.rows)
        + "</table>\n"
    )
