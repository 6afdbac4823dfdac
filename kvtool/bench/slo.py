"""What users were promised: bounds on latencies, the requests that keep them, and the highest rate that does."""

import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtool.bench.events import RequestRecord
from kvtool.bench.metrics import kvtool as latencies
from kvtool.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2e")
UNITS = {"ms": 1e-3, "s": 1.0}
# Prompts below so many tokens, and the seconds until their first token.
DEFAULT_TTFT = ((100, 0.05), (500, 0.2), (2000, 1.0))
LEAST_RATE, MOST_RATE = 0.01, 1e5  # requests/s; a search gives up there
RATE_PRECISION = 0.05  # the rate found and the lowest one missed differ by so much at most


@dataclass(frozen=True)
class SLO:
    """Bounds on each request, in seconds: TTFT, TPOT, the longest gap between tokens (itl), E2E.

    Attributes:
        bounds: by metric; None: TTFT by the length of the prompt, as in `DEFAULT_TTFT`.
    """

    bounds: Mapping[str, float] | None = None

    @classmethod
    def parse(cls, text: str) -> "SLO":
        """`ttft:200ms,tpot:20ms`, or `default`.

        Raises:
            ConfigError: it is neither.
        """
        if text == "default":
            return cls()
        bounds: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)(ms|s)", part.strip())
            if match is None or match[1] not in METRICS or not float(match[2]):
                raise ConfigError(
                    f"--slo {part!r:.40}: write bounds as ttft:200ms,tpot:20ms; metrics are {', '.join(METRICS)}"
                )
            if match[1] in bounds:
                raise ConfigError(f"--slo: {match[1]} is bounded twice; leave one out")
            bounds[match[1]] = float(match[2]) * UNITS[match[3]]
        return cls(bounds)

    def kept(self, record: RequestRecord) -> dict[str, bool]:
        """Whether a request kept each bound that there is for it; one that failed kept none."""
        bounds = self.bounds
        if bounds is None:
            ttft = next((bound for below, bound in DEFAULT_TTFT if (record.prompt_tokens or 0) < below), None)
            bounds = {} if ttft is None else {"ttft": ttft}
        if record.failure is not None:
            return dict.fromkeys(bounds, False)
        measured = latencies(record)
        seconds = {
            "ttft": measured.ttft,
            "tpot": measured.tpot or 0.0,  # an answer of one token has none, and keeps it
            "itl": max(measured.itl, default=0.0),
            "e2e": measured.e2e,
        }
        return {metric: seconds[metric] <= bound for metric, bound in bounds.items()}

    def __str__(self) -> str:
        if self.bounds is None:
            return "default"
        return ",".join(f"{metric}:{bound * 1e3:.12g}ms" for metric, bound in self.bounds.items())


@dataclass
class Goodput:
    """How many requests kept an SLO (DistServe, OSDI 2024).

    Attributes:
        requests: that there was a bound for.
        good: of these, those that kept all of their bounds.
        bounded, kept: requests that had a bound on a metric, and that kept it.
    """

    slo: SLO
    requests: int = 0
    good: int = 0
    bounded: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, record: RequestRecord) -> None:
        kept = self.slo.kept(record)
        self.requests += bool(kept)
        self.good += bool(kept) and all(kept.values())
        self.bounded.update(kept.keys())
        self.kept.update(metric for metric, was in kept.items() if was)

    @property
    def attainment(self) -> float:
        """Share of the requests that kept all of their bounds; 1 where there were no bounds to keep."""
        return self.good / self.requests if self.requests else 1.0

    def row(self, seconds: float) -> dict[str, Any]:
        """As in a result: what the goodput was over so many seconds, and the share that kept each bound."""
        return {
            "slo": str(self.slo),
            "goodput": self.good / seconds if seconds else 0.0,
            "attainment": {"all": self.attainment}
            | {metric: self.kept[metric] / bounded for metric, bounded in self.bounded.items()},
        }


def goodput(records: Iterable[RequestRecord], slo: SLO) -> Goodput:
    """Of all records of a run."""
    total = Goodput(slo)
    for record in records:
        total.add(record)
    return total


def max_rate(start: float) -> Generator[float, bool, float | None]:
    """Search the highest rate that is kept up with: yields a rate to try, is sent whether it was; returns the highest,
    or None if not even `LEAST_RATE` was.

    It doubles or halves until the answer changes, then closes in between (in ratios). Since rates are measured with
    noise, what it returns was itself kept, and the lowest rate above it that was tried was not.

    Args:
        start: the first rate, requests/s.
    """
    kept, missed = 0.0, math.inf
    rate = _rounded(min(max(start, LEAST_RATE), MOST_RATE))
    while True:
        if (yield rate):
            kept = rate
        else:
            missed = rate
        if kept >= MOST_RATE or missed <= LEAST_RATE or missed <= kept * (1 + RATE_PRECISION):
            return kept or None
        if missed == math.inf:
            rate = _rounded(min(2 * kept, MOST_RATE))
        else:
            rate = _rounded(math.sqrt(kept * missed) if kept else max(missed / 2, LEAST_RATE))


def _rounded(rate: float) -> float:
    """A rate that can be said and asked for again."""
    return float(f"{rate:.3g}")
