"""Was it the server, or was it the client that could do no more?"""

import asyncio
from dataclasses import asdict, dataclass
from time import process_time
from typing import Any

from kvtool.bench.client import HttpTarget
from kvtool.bench.events import WorkItem
from kvtool.bench.metrics import Sketch
from kvtool.bench.null_server import null_server
from kvtool.bench.runner import Progress
from kvtool.bench.target import Answer

DELAY, GAP, TOKENS = 0.05, 0.02, 16  # of the null server's answers
BUSY = 0.8  # of a core: a client that is beyond this keeps chunks waiting
LATE_MS, LATE_SHARE = 5.0, 0.1  # milliseconds, or of TTFT: what is later than both distorts a figure


@dataclass(frozen=True)
class Calibration:
    """What this client adds of its own, against a server that computes nothing.

    Attributes:
        streams: that ran at once.
        ttft_error_ms: median and 99th percentile of TTFT beyond the delay that there was.
        chunks_per_s: that one core could take in.
    """

    streams: int
    ttft_error_ms: dict[str, float]
    chunks_per_s: float


async def calibrate(streams: int) -> Calibration:
    """Measure a null server on this machine with so many streams at once."""
    with null_server(DELAY, GAP) as url:
        target, errors, chunks = HttpTarget(url), Sketch(), 0

        async def one(delay: float) -> None:
            nonlocal chunks
            await asyncio.sleep(delay)
            answer = Answer()
            await target.send([0], WorkItem(id=0, prompt=[0], output_tokens=TOKENS), answer)
            errors.add(max(0.0, answer.chunk_times[0] - answer.sent - float(answer.text.split()[0])) * 1e3)
            chunks += len(answer.chunk_times)

        before, spread = process_time(), TOKENS * GAP
        await asyncio.gather(*(one(spread * index / streams) for index in range(streams)))
        busy = process_time() - before
        await target.close()
    p50, p99 = errors.quantiles([0.5, 0.99])
    return Calibration(streams, {"p50": p50, "p99": p99}, chunks / busy)


def client_row(progress: Progress, cpu: float, calibration: Calibration | None) -> dict[str, Any]:
    """What a result says of the client; `cpu` is the share of a core that it used."""
    return {
        "cpu": cpu,
        "send_lag_ms": progress.send_lags.figures(),
        "stall_ms": progress.stalls.figures(),
        "calibration": asdict(calibration) if calibration else None,
    }


def limits(progress: Progress, cpu: float, calibration: Calibration | None, ttft: Sketch) -> list[str]:
    """Why figures may be the client's and not the server's, in words."""
    late = max(LATE_MS, LATE_SHARE * ttft.quantiles([0.5])[0]) if ttft.count else LATE_MS
    found = [f"it used {cpu:.0%} of a core"] if cpu > BUSY else []
    for what, sketch in (("send lag", progress.send_lags), ("event loop stalls", progress.stalls)):
        if sketch.count and (p90 := sketch.quantiles([0.9])[0]) > late:
            found.append(f"{what} of {p90:.1f} ms (p90)")
    if calibration and calibration.ttft_error_ms["p50"] > late:
        found.append(f"{calibration.ttft_error_ms['p50']:.1f} ms in the TTFT of a server that computes nothing")
    return found
