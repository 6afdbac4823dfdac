"""Everything at once: batches of several sizes through our engine and, beside it, through transformers."""

import asyncio
from collections.abc import Generator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from typing import Any

import msgspec

from kvtool.bench.baseline import Batch, transformers_rows
from kvtool.bench.events import EventLog
from kvtool.bench.measure import Bench, How, Measured, OnProgress, Point, Row, Where, measure_all, point_of, prompt_ids
from kvtool.bench.workloads import Workload
from kvtool.config import EngineConfig
from kvtool.errors import ConfigError
from kvtool.request import EngineInfo

UNJUDGED = {"valid": True, "invalid": [], "client_limits": [], "partial": False, "floor_source": None, "left_out": 0}


async def measure_offline(
    where: Where,
    engine: EngineConfig,
    workload: Workload,
    sizes: Sequence[int],
    how: How,
    *,
    baseline: bool,
    log: EventLog | None,
    on_progress: OnProgress,
) -> Measured:
    """A row for each batch size, of our engine and with `baseline` of transformers; cancelled, it keeps what it has.

    Memory is what the process used at most, on a GPU what all of the card's did; our cache is allocated before it is
    used.

    Raises:
        ConfigError: transformers would have to pad.
    """
    if baseline and not workload.has_one_length:
        raise ConfigError("--baseline transformers: a static batch needs random prompts and answers of one length")
    engine = replace(engine, max_num_seqs=max(engine.max_num_seqs, *sizes))

    def plan(bench: Bench) -> Generator[tuple[Point, How], Row, None]:
        for size in sizes:
            point = point_of(bench, workload)
            name = f"{point.label['point']}, batch {size}"
            label = {"engine": "kvtool", "batch_size": size} | point.label | {"point": name}
            yield replace(point, label=label), replace(how, requests=size)

    ours = await measure_all(where, engine, plan, max(sizes), log=log, on_progress=on_progress)
    rows = [row | {"memory_mib": row["gpu_peak_mib"] or row["engine_rss_mib"]} for row in ours.rows]
    if not baseline or ours.stopped:
        return replace(ours, rows=rows)
    info = msgspec.convert(ours.target["engine"], EngineInfo)
    theirs: dict[int, dict[str, Any]] = {}
    try:
        items = islice(workload.items(prompt_ids(info.vocab_size)), max(sizes))
        prompts = [item.prompt for item in items]
        batches = [Batch(prompts[:size], int(workload.output.first)) for size in sizes]  # type: ignore[arg-type]
        async with aclosing(transformers_rows(info, batches, how.warmup, how.trials, how.definitions)) as answered:
            async for row in answered:
                name = f"transformers, batch {row['batch_size']}"
                lengths = {"prompt_tokens": int(workload.prompt.first), "output_tokens": int(workload.output.first)}
                theirs[row["batch_size"]] = {"point": name, "engine": "transformers", **lengths, **UNJUDGED, **row}
    except asyncio.CancelledError:
        ours = replace(ours, stopped="interrupted")
    for row in rows:
        peer = theirs.get(row["batch_size"])
        row["ratio"] = row["output_tok_s"] / peer["output_tok_s"] if peer and peer["output_tok_s"] else None
    return replace(ours, rows=[*rows, *theirs.values()])
