"""Figures from records: what TTFT, TPOT, ITL and E2E mean, here and elsewhere, and their distributions."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kvtool.bench.events import RequestRecord

EXACT_VALUES = 8192  # up to so many are kept as they are
BUCKET_GROWTH = 1.002  # from there on a quantile is off by a tenth of a percent at most
SMALLEST = 1e-6  # below, all is one bucket
MAX_SAMPLES = 512
MAX_ERRORS = 5

# --- definitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latencies:
    """One request's, in seconds.

    Attributes:
        tpot: None where the definition gives none for it.
        itl: gaps between tokens.
    """

    ttft: float
    tpot: float | None
    itl: list[float]
    e2e: float


def kvtool(record: RequestRecord) -> Latencies:
    """TTFT: sent to the first text, reasoning or id. E2E: to the last. TPOT: (E2E - TTFT) / (n - 1). ITL: the gaps
    between tokens; those that come in one chunk have none between them."""
    times = _times(record, "tri")
    counts = [
        max(1, tokens) for tokens, kind in zip(record.chunk_tokens, record.chunk_kinds, strict=True) if kind != "e"
    ]
    ttft, e2e = times[0] - record.sent, times[-1] - record.sent
    gaps = [0.0] * (counts[0] - 1)
    for (before, time), count in zip(pairwise(times), counts[1:], strict=True):
        gaps += [time - before, *([0.0] * (count - 1))]
    return Latencies(ttft, _per_token(e2e - ttft, record, 1), gaps, e2e)


def vllm(record: RequestRecord) -> Latencies:
    """`vllm bench serve`: every chunk with a choice counts, also an empty one, and as one token in ITL."""
    times = _times(record, "trie")
    ttft, e2e = times[0] - record.sent, times[-1] - record.sent
    return Latencies(ttft, _per_token(e2e - ttft, record, 1), [b - a for a, b in pairwise(times)], e2e)


def sglang(record: RequestRecord) -> Latencies:
    """`sglang.bench_serving`: chunks with text count; E2E, and with it TPOT, runs to the end of the stream; a chunk of
    several tokens is as many equal gaps."""
    chunks = zip(record.chunk_times, record.chunk_kinds, record.chunk_tokens, strict=True)
    shown = [(time, tokens) for time, kind, tokens in chunks if kind in "tr"] or [(record.chunk_times[0], 1)]
    ttft, e2e = shown[0][0] - record.sent, record.ended - record.sent
    gaps: list[float] = []
    for (before, _), (time, tokens) in pairwise(shown):
        count = max(1, tokens)
        gaps += [(time - before) / count] * count
    return Latencies(ttft, _per_token(e2e - ttft, record, 1), gaps, e2e)


def guidellm(record: RequestRecord) -> Latencies:
    """guidellm: TPOT is the time to the last token over all tokens, the first included; ITL is (last - first) / (n - 1)
    once for each of these tokens; E2E runs to the end of the response."""
    times = _times(record, "tri")
    itl = _per_token(times[-1] - times[0], record, 1)
    gaps = [] if itl is None else [itl] * ((record.output_tokens or 0) - 1)
    tpot = _per_token(times[-1] - record.sent, record, 0)
    return Latencies(times[0] - record.sent, tpot, gaps, record.ended - record.sent)


def aiperf(record: RequestRecord) -> Latencies:
    """aiperf: E2E runs to the last chunk with content; ITL is (E2E - TTFT) / (n - 1), once a request, and there is no
    TPOT beside it."""
    times = _times(record, "tri")
    itl = _per_token(times[-1] - times[0], record, 1)
    return Latencies(times[0] - record.sent, None, [] if itl is None else [itl], times[-1] - record.sent)


DEFINITIONS: dict[str, Callable[[RequestRecord], Latencies]] = {
    "kvtool": kvtool,
    "vllm": vllm,
    "sglang": sglang,
    "guidellm": guidellm,
    "aiperf": aiperf,
}


def _times(record: RequestRecord, kinds: str) -> list[float]:
    return [time for time, kind in zip(record.chunk_times, record.chunk_kinds, strict=True) if kind in kinds]


def _per_token(seconds: float, record: RequestRecord, without: int) -> float | None:
    tokens = (record.output_tokens or 0) - without
    return seconds / tokens if tokens > 0 else None


# --- distributions ---------------------------------------------------------------------------------------------------


class Sketch:
    """A distribution of numbers of 0 or more in bounded memory, that can be merged with others.

    Exact up to 8,192 values; beyond them a histogram of buckets that grow by 0.2 % (DDSketch, Masson et al., VLDB
    2019), whose mean, least and greatest value stay exact.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.count, self.total, self.least, self.greatest = 0, 0.0, math.inf, -math.inf
        self._values: list[float] = []
        self._buckets: Counter[int] = Counter()
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.greatest = min(self.least, value), max(self.greatest, value)
        if self._buckets:
            self._buckets[_bucket(value)] += 1
            return
        self._values.append(value)
        if len(self._values) > EXACT_VALUES:
            self._fold()

    def merge(self, other: "Sketch") -> None:
        """Take in all that `other` has seen."""
        self.count += other.count
        self.total += other.total
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        self._values += other._values
        self._buckets += other._buckets
        if self._buckets or len(self._values) > EXACT_VALUES:
            self._fold()

    @property
    def mean(self) -> float:
        return self.total / self.count

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """For each of `shares`, which rise, the value below which so many lie: interpolated as numpy does, where all
        values are known."""
        if not self._buckets:
            return [float(value) for value in np.quantile(self._values, shares)]
        buckets = sorted(self._buckets.items())
        ranks = np.cumsum([count for _, count in buckets])
        places = np.searchsorted(ranks, np.asarray(shares) * (self.count - 1), side="right")
        return [min(max(_value(buckets[place][0]), self.least), self.greatest) for place in places]

    def sample(self) -> list[float]:
        """At most 512 values that are distributed as all are; all of them, if there are no more."""
        if self.count <= MAX_SAMPLES:
            return list(self._values)
        return self.quantiles([(index + 0.5) / MAX_SAMPLES for index in range(MAX_SAMPLES)])

    def figures(self) -> dict[str, float] | None:
        """Mean, min, max and percentiles, as they stand in a row; None where there is nothing to tell."""
        if not self.count:
            return None
        p50, p90, p99 = self.quantiles([0.5, 0.9, 0.99])
        return {"mean": self.mean, "min": self.least, "max": self.greatest, "p50": p50, "p90": p90, "p99": p99}

    def _fold(self) -> None:
        self._buckets.update(map(_bucket, self._values))
        self._values.clear()


_LOG_GROWTH = math.log(BUCKET_GROWTH)


def _bucket(value: float) -> int:
    return math.ceil(math.log(max(value, SMALLEST)) / _LOG_GROWTH)


def _value(bucket: int) -> float:
    """In the middle of a bucket, in relative terms."""
    return 2 * math.exp(bucket * _LOG_GROWTH) / (BUCKET_GROWTH + 1)


# --- a point's figures -----------------------------------------------------------------------------------------------


class Figures:
    """What the records of one run come to. Those that failed are counted and in no latency.

    Args:
        definitions: a key of `DEFINITIONS`.
    """

    def __init__(self, definitions: str = "kvtool") -> None:
        self._latencies = DEFINITIONS[definitions]
        self.requests, self.failures = 0, Counter[str]()
        self.errors: list[str] = []
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.least_prompt, self.most_cached = 1 << 62, 0
        self.seconds = 0.0
        self.ttft, self.tpot, self.itl, self.e2e = Sketch(), Sketch(), Sketch(), Sketch()
        self.ttft_scheduled, self.queue, self.server_queue, self.answer = Sketch(), Sketch(), Sketch(), Sketch()
        self._first_sent, self._last_ended = math.inf, -math.inf

    def add(self, record: RequestRecord) -> None:
        self.requests += 1
        self._first_sent, self._last_ended = min(self._first_sent, record.sent), max(self._last_ended, record.ended)
        self.seconds = self._last_ended - self._first_sent
        if record.failure is not None:
            self.failures[record.failure] += 1
            if len(self.errors) < MAX_ERRORS and record.error not in self.errors:
                self.errors.append(record.error)
            return
        self.prompt_tokens += record.prompt_tokens or 0
        self.cached_tokens += record.cached_tokens or 0
        self.output_tokens += record.output_tokens or 0
        self.least_prompt = min(self.least_prompt, record.prompt_tokens or 1)
        self.most_cached = max(self.most_cached, record.cached_tokens or 0)
        latencies = self._latencies(record)
        self.ttft.add(latencies.ttft * 1e3)
        self.ttft_scheduled.add((latencies.ttft + record.sent - record.scheduled) * 1e3)
        self.e2e.add(latencies.e2e * 1e3)
        if latencies.tpot is not None:
            self.tpot.add(latencies.tpot * 1e3)
        for gap in latencies.itl:
            self.itl.add(gap * 1e3)
        self.queue.add(max(0.0, record.sent - record.scheduled) * 1e3)
        if record.queue_seconds is not None:
            self.server_queue.add(record.queue_seconds * 1e3)
        if "r" in record.chunk_kinds and (answered := _times(record, "t")):
            self.answer.add((answered[0] - record.sent) * 1e3)

    def merge(self, other: "Figures") -> None:
        """Take in another trial of the same point; its time is added, not laid beside."""
        self.requests += other.requests
        self.failures += other.failures
        self.errors = [*dict.fromkeys([*self.errors, *other.errors])][:MAX_ERRORS]
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.least_prompt = min(self.least_prompt, other.least_prompt)
        self.most_cached = max(self.most_cached, other.most_cached)
        self.seconds += other.seconds
        for name in ("ttft", "tpot", "itl", "e2e", "ttft_scheduled", "queue", "server_queue", "answer"):
            getattr(self, name).merge(getattr(other, name))

    @property
    def failed(self) -> int:
        return self.failures.total()

    def row(self, samples: bool = True) -> dict[str, Any]:
        """As in a result; times in milliseconds, rates a second of wall clock.

        Args:
            samples: with values of each latency, as they are distributed.
        """
        good, seconds = self.requests - self.failed, self.seconds or math.inf
        row: dict[str, Any] = {
            "requests": self.requests,
            "failed": self.failed,
            "ttft_ms": self.ttft.figures(),
            "tpot_ms": self.tpot.figures(),
            "itl_ms": self.itl.figures(),
            "e2e_ms": self.e2e.figures(),
            "requests_per_s": good / seconds,
            "input_tok_s": self.prompt_tokens / seconds,
            "output_tok_s": self.output_tokens / seconds,
            "total_tok_s": (self.prompt_tokens + self.output_tokens) / seconds,
            "success_rate": good / self.requests if self.requests else 0.0,
            "cached_tokens": self.cached_tokens,
            "hit_rate": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None,
            "prompt_tokens_total": self.prompt_tokens,
            "output_tokens_total": self.output_tokens,
            "seconds": self.seconds,
            "ttft_scheduled_ms": self.ttft_scheduled.figures(),
            "queue_ms": self.queue.figures(),
            "server_queue_ms": self.server_queue.figures(),
            "first_answer_ms": self.answer.figures(),
            "failures": dict(self.failures),
            "errors": self.errors,
        }
        if samples:
            latencies = {"ttft_ms": self.ttft, "tpot_ms": self.tpot, "itl_ms": self.itl, "e2e_ms": self.e2e}
            row["samples"] = {name: sketch.sample() for name, sketch in latencies.items()}
        return row
