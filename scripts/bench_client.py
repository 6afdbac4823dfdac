#!/usr/bin/env python3
"""What the measuring client itself can do: streams of a server that computes nothing, and what it makes of them.

usage: scripts/bench_client.py [--streams 256] [--chunks-per-s 5000] [--seconds 20] [--requests 100000] [--json]

First so many streams at once, by Poisson arrivals, with so many chunks a second in all: TTFT against the delay that the
server says there was. Then many short requests: memory after a tenth of them and after all.
"""

import argparse
import asyncio
import gc
import json
import resource
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import process_time

from rich import box
from rich.console import Console
from rich.table import Table

from kvtool.bench.arrivals import Arrivals, scheduled
from kvtool.bench.client import HttpTarget
from kvtool.bench.events import EventLog, RequestRecord, WorkItem
from kvtool.bench.metrics import Figures, Sketch
from kvtool.bench.null_server import null_server
from kvtool.bench.runner import run
from kvtool.bench.target import Answer, Prompt

TOKENS, DELAY = 128, 0.05
CLOSED, SHORT = 64, 16  # streams and tokens of the many requests


@dataclass(frozen=True)
class Row:
    what: str
    figure: str
    target: str
    met: bool


class Timed(HttpTarget):
    """Holds each TTFT against what the null server says."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.errors, self.arrivals = Sketch(), Counter[int]()

    async def send(self, prompt: Prompt, item: WorkItem, answer: Answer) -> None:
        await super().send(prompt, item, answer)
        self.errors.add(max(0.0, answer.chunk_times[0] - answer.sent - float(answer.text.split()[0])) * 1e3)
        self.arrivals.update(map(int, answer.chunk_times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--chunks-per-s", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    gc.freeze()
    rows = asyncio.run(streams(args.streams, args.chunks_per_s, args.seconds))
    rows += asyncio.run(memory(args.requests))
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


async def streams(count: int, chunks_per_s: int, seconds: float) -> list[Row]:
    gap = count / chunks_per_s
    rate = count / (DELAY + (TOKENS - 1) * gap)
    items = (WorkItem(id=n, prompt=[1], output_tokens=TOKENS) for n in range(int(rate * seconds)))
    with null_server(DELAY, gap) as url:
        target, figures = Timed(url), Figures()
        cpu = process_time()
        progress = await run(target, scheduled(items, Arrivals(rate)), figures.add)
        cpu = process_time() - cpu
        await target.close()
    chunks, best = target.arrivals.total(), sorted(target.arrivals.values())[-5:]
    p50, p99 = target.errors.quantiles([0.5, 0.99])
    return [
        Row("streams at once, at most", f"{progress.most_running}", f"≥ {count}", progress.most_running >= count),
        Row("chunks/s, in the five fullest seconds", f"{min(best):,} to {max(best):,}", "", True),
        Row("chunks in a second of CPU time", f"{chunks / cpu:,.0f}", "≥ 5,000", chunks / cpu >= 5000),
        Row("TTFT error, median", f"{p50:.2f} ms", "≤ 1 ms", p50 <= 1),
        Row("TTFT error, p99", f"{p99:.2f} ms", "≤ 5 ms", p99 <= 5),
        Row("failed requests", f"{figures.failed}", "0", figures.failed == 0),
    ]


async def memory(requests: int) -> list[Row]:
    figures, used = Figures(), list[float]()
    with null_server(0.0, 0.0) as url, EventLog.create(Path("/dev/null")) as log:
        target = HttpTarget(url)

        def record(record: RequestRecord) -> None:
            figures.add(record)
            log.write(record)
            if figures.requests in (requests // 10, requests):
                used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

        items = (WorkItem(id=n, prompt=[1], output_tokens=SHORT) for n in range(requests))
        await run(target, islice(items, requests), record, concurrency=CLOSED)
        await target.close()
    early, late = used
    rate = figures.requests / figures.seconds
    return [
        Row("short requests/s", f"{rate:,.0f}", "", True),
        Row(f"memory after {requests // 10:,} requests", f"{early:.0f} MiB", "", True),
        Row(f"memory after {requests:,} requests", f"{late:.0f} MiB", "≤ + 10 %", late <= 1.1 * early),
    ]


def show(rows: list[Row]) -> None:
    table = Table("", "measured", "target", "met", box=box.MARKDOWN)
    for row in rows:
        table.add_row(row.what, row.figure, row.target, ("yes" if row.met else "NO") * bool(row.target))
    Console().print(table)


if __name__ == "__main__":
    main()
