"""Measures every KV format: a server restarted for each, bench-ttft, bench-throughput, and perplexity of them all.

usage: scripts/suite [--formats 16,8,4,2] [--folder suite] [--ttft "OPTIONS"] [--throughput "OPTIONS"]
                     [--perplexity "OPTIONS"] [-- ENGINE OPTIONS]

Writes suite-TIME.json and suite-TIME.html into the folder. Exits 1 if any command did; what the others found is kept.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvtool.commands.bench_charts import throughput_charts, ttft_charts
from kvtool.commands.output import (
    WRITERS,
    Column,
    OutputOptions,
    Report,
    Table,
    check_output,
    show,
    value_at,
    write,
)

ROOT = Path(__file__).parents[1]
SUMMARY = (
    Column("format", "format"),
    Column("bits", "engine.bits_per_element", ".2f"),
    Column("tokens that fit", "engine.kv_tokens", ",d"),
    Column("TTFT p50, ms", "summary.ttft_ms", ",.1f"),
    Column("TPOT p50, ms", "summary.tpot_ms", ",.2f"),
    Column("output tok/s", "summary.output_tok_s", ",.0f"),
    Column("PPL", "perplexity.perplexity", ".4f"),
    Column("ΔPPL", "perplexity.perplexity_change", "+.3%"),
    Column("KLD", "perplexity.kld_mean", ".2e"),
    Column("failed", "failed"),
)
TTFT = (
    Column("format", "format"),
    Column("prompt", "prompt_tokens", ",d"),
    *(Column(f"TTFT {name}, ms", f"ttft_ms.{name}", ",.2f") for name in ("p50", "p90", "p99")),
    Column("floor", "floor_ms", ",.2f"),
)
THROUGHPUT = (
    Column("format", "format"),
    Column("at once", "concurrency", ",d"),
    Column("requests/s", "requests_per_s", ",.2f"),
    Column("output tok/s", "output_tok_s", ",.0f"),
    Column("total tok/s", "total_tok_s", ",.0f"),
    *(Column(f"{name.upper()} p50, ms", f"{name}_ms.p50", ",.2f") for name in ("ttft", "tpot", "e2e")),
)


@dataclass
class Measured:
    """What was found of one format.

    Attributes:
        engine: what its server said of itself.
        ttft, throughput: rows of the two commands.
        perplexity: its row; empty where it was not scored.
        failed: the commands that exited with anything but 0, and with what.
    """

    format: str
    engine: dict[str, Any] = field(default_factory=dict)
    ttft: list[dict[str, Any]] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    perplexity: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """With the figures that stand for it: the longest prompt's TTFT, and what most requests at once came to."""
        summary = {
            "ttft_ms": value_at(self.ttft[-1], "ttft_ms.p50") if self.ttft else None,
            "tpot_ms": value_at(self.throughput[-1], "tpot_ms.p50") if self.throughput else None,
            "output_tok_s": self.throughput[-1]["output_tok_s"] if self.throughput else None,
        }
        failed = ", ".join(f"{name} ({code})" for name, code in self.failed.items())
        return asdict(self) | {"summary": summary, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="16,8,4,2")
    parser.add_argument("--folder", type=Path, default=Path("suite"))
    for command in ("ttft", "throughput", "perplexity"):
        parser.add_argument(f"--{command}", default="", help="more options for this command, as one word")
    parser.add_argument("engine", nargs="*", help="options of the engine, behind --")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"suite-{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    page = path.with_suffix(".html")
    check_output(OutputOptions(output=str(path)))
    formats = args.formats.split(",")
    with TemporaryDirectory() as folder:
        measured = [serve_and_measure(name, args, Path(folder)) for name in formats]
        score(measured, args, Path(folder))
    report = report_of(measured, vars(args) | {"folder": str(args.folder)})
    show(report, OutputOptions(output=str(path)))
    write(page, WRITERS[".html"](report))
    print(f"{path}\n{page}")
    sys.exit(any(found.failed for found in measured))


def serve_and_measure(name: str, args: argparse.Namespace, folder: Path) -> Measured:
    """One format behind a server of its own."""
    found = Measured(name)
    with serving("--nbits", name, *args.engine) as url:
        for command, options in (("bench-ttft", args.ttft), ("bench-throughput", args.throughput)):
            result = run(found, folder, command, "--url", url, "--flush-cache", *shlex.split(options))
            rows = result.get("rows", [])
            found.engine = value_at(result, "config.target.server.engine") or found.engine
            if command == "bench-ttft":
                found.ttft = rows
            else:
                found.throughput = rows
    return found


def score(measured: Sequence[Measured], args: argparse.Namespace, folder: Path) -> None:
    """Perplexity of all formats in one run, beside 16 bits."""
    names = ",".join(found.format for found in measured)
    result = run(measured[0], folder, "perplexity", "--formats", names, *args.engine, *shlex.split(args.perplexity))
    rows = {row["format"]["name"]: row for row in result.get("rows", [])}
    for found in measured:
        found.perplexity = rows.get(found.format, {})


def run(found: Measured, folder: Path, command: str, *options: str) -> dict[str, Any]:
    """A command's result; empty if it has none."""
    output = folder / f"{command}-{found.format}.json"
    print(f"{found.format} bits: kvtool {command} {shlex.join(options)}", file=sys.stderr)
    done = subprocess.run([*kvtool(command), *options, "--output", output], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        found.failed[command] = done.returncode
    result: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return result


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of `kvtool serve`, from ready to ended."""
    command = [*kvtool("serve"), "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next((match[0] for line in process.stdout if (match := re.search(r"http://[\w.:]+", line))), None)
        if address is None:
            sys.exit(f"error: kvtool serve {shlex.join(options)} did not start; its reason stands above")
        yield address
    finally:
        process.terminate()
        process.communicate()


def kvtool(command: str) -> list[str]:
    return [sys.executable, "-m", "commands", command]


def report_of(measured: Sequence[Measured], config: dict[str, Any]) -> Report:
    """All formats beside each other."""

    def of_all(name: str) -> list[dict[str, Any]]:
        return [{**row, "format": found.format} for found in measured for row in getattr(found, name)]

    tables = [Table("Time to first token", TTFT, of_all("ttft")), Table("Throughput", THROUGHPUT, of_all("throughput"))]
    charts = [
        *ttft_charts([(f"{found.format} bits", found.ttft) for found in measured]),
        *throughput_charts([(f"{found.format} bits", found.throughput) for found in measured]),
    ]
    notes = ["TTFT of the longest prompt, TPOT and output of the most requests at once; PPL against 16 bits."]
    return Report("suite", config, [found.row() for found in measured], SUMMARY, tables, charts, notes)


if __name__ == "__main__":
    main()
