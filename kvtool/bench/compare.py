"""Two results of the same workload on the same hardware: what changed, and whether it is more than noise."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError

Result = Mapping[str, Any]
Row = Mapping[str, Any]
Verdict = Literal["regression", "noise", "ok"]
Floats = NDArray[np.float64]

ALPHA = 0.05  # chance that a comparison of equals, all its gates together, finds a regression
RESAMPLES = 4_000
FEWEST = 3  # values on each side, below which nothing is said of their noise
MEASURED = ("requests", "duration", "warmup", "definitions")  # fields of `How` that figures depend on
HARDWARE = ("cpu", "cores", "gpus")
SHOWN = ("ttft_ms.p50", "ttft_ms.p99", "tpot_ms.p50", "e2e_ms.p50", "requests_per_s", "output_tok_s")
STATISTICS = {"mean": None, "min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Gate:
    """What must not happen to a metric: `ttft_ms.p99:10%` no rise by more than a tenth, `output_tok_s:-5%` no fall.

    Attributes:
        metric: where it stands in a row, dotted.
        limit: of the change; its sign is the bad direction's.
        relative: the limit is a share of the base.
    """

    metric: str
    limit: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Raises ConfigError: it names no metric and limit."""
        match = re.fullmatch(r"(\w+(?:\.\w+)?):([+-]?\d+(?:\.\d+)?)(%?)", text.strip())
        if match is None:
            raise ConfigError(f"--fail-on {text!r:.60}: write a metric and how it may change: ttft_ms.p99:10%")
        limit, relative = float(match[2]), match[3] == "%"
        if limit == 0 and match[2][0] not in "+-":
            raise ConfigError(f"--fail-on {text!r:.60}: of no change, write +0 if a rise is bad, -0 if a fall is")
        return cls(match[1], limit / 100 if relative else limit, relative)

    @property
    def sign(self) -> float:
        return math.copysign(1.0, self.limit)

    def __str__(self) -> str:
        return f"{self.metric}:{self.limit * 100:+.12g}%" if self.relative else f"{self.metric}:{self.limit:+.12g}"


@dataclass(frozen=True)
class Delta:
    """One metric at one point.

    Attributes:
        base, current: over all that was measured.
        change: of the current one, in shares of the base or, for a gate that is not relative, as it is.
        low, high: confidence interval of the change; None where too little was measured to know.
        gate: what it was held to, if it was.
        verdict: `noise` is beyond the gate's limit, but the interval holds 0; None without a gate.
    """

    point: str
    metric: str
    base: float | None
    current: float | None
    change: float | None
    low: float | None
    high: float | None
    gate: str | None
    verdict: Verdict | None


def read_result(path: Path) -> Result:
    """A result that `--output FILE.json` has written.

    Raises:
        ConfigError: it cannot be read, or is no such thing.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give a file written by --output FILE.json") from error
    parts = {"schema": str, "environment": dict, "config": dict, "rows": list}
    if not isinstance(result, dict) or not all(isinstance(result.get(name), kind) for name, kind in parts.items()):
        raise ConfigError(f"{path}: is no result of kvtool's; give a file written by --output FILE.json")
    if not all(isinstance(row, dict) for row in result["rows"]):
        raise ConfigError(f"{path}: rows: each must be an object; give a file written by --output FILE.json")
    return result


def differences(base: Result, current: Result) -> list[str]:
    """What keeps two results from being compared: another command, workload, set of points, or other hardware."""
    pairs = [("schema", base["schema"], current["schema"])]
    pairs += [(name, base["environment"].get(name), current["environment"].get(name)) for name in HARDWARE]
    how = [result["config"].get("how", {}) for result in (base, current)]
    pairs += [(name, how[0].get(name), how[1].get(name)) for name in MEASURED]
    pairs += list(_leaves("workload", base["config"].get("workload"), current["config"].get("workload")))
    pairs += [("points", sorted(map(point, base["rows"])), sorted(map(point, current["rows"])))]
    return [f"{name}: {before!s:.80}, now {now!s:.80}" for name, before, now in pairs if before != now]


def _leaves(name: str, base: Any, current: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(base, Mapping) and isinstance(current, Mapping):
        for key in sorted({*base, *current}):
            yield from _leaves(f"{name}.{key}", base.get(key), current.get(key))
    elif isinstance(base, list) and isinstance(current, list) and len(base) == len(current):
        for index, (old, new) in enumerate(zip(base, current, strict=True)):
            yield from _leaves(f"{name}.{index}", old, new)
    else:
        yield name, base, current


def check_gates(base: Result, gates: Sequence[Gate], trials: int) -> None:
    """Refuse what could not be judged, before so many `trials` are measured.

    Raises:
        ConfigError: a gate's metric is not in `base`, or is no latency and was, or will be, measured too seldom.
    """
    for gate, row in ((gate, row) for gate in gates for row in base["rows"]):
        if _value(row, gate.metric) is None:
            raise ConfigError(f"--fail-on {gate}: {point(row)}: the base has none; see its rows for metrics")
        is_latency = gate.metric.partition(".")[0] in row.get("samples", {})
        if not is_latency and min(trials, len(row.get("trials", [1]))) < FEWEST:
            raise ConfigError(
                f"--fail-on {gate}: of fewer than {FEWEST} trials nobody can tell a change from noise; "
                f"measure both results with --trials {FEWEST} or more"
            )


def compare(base: Result, current: Result, gates: Sequence[Gate], force: bool = False) -> list[Delta]:
    """Hold each point of `current` against the same point of `base`.

    A gate is broken by a change that is beyond its limit and that the bootstrap interval tells from none. The level of
    the intervals is shared by all gates, so that equal engines break any of them with a probability of about `ALPHA`;
    three trials cannot tell better than one in twenty for each gate, five can. Trials are what is resampled, where both
    sides have three or more; else a latency's requests, which know nothing of how one run differs from the next.

    Args:
        gates: metrics that may not change at will; without any, the usual ones are only shown.
        force: compare what `differences` would keep apart; where no point is in both, points in their order.

    Raises:
        ConfigError: the results cannot be compared, or a gate's metric stands in none of them, or was measured too
            little to tell a change from noise.
    """
    if not force and (different := differences(base, current)):
        raise ConfigError(f"--compare: these were not measured alike ({'; '.join(different)}); --force compares anyway")
    before = {point(row): row for row in base["rows"]}
    shared = [(before[name], row) for row in current["rows"] if (name := point(row)) in before]
    shared = shared or list(zip(base["rows"], current["rows"], strict=False))
    level = ALPHA / max(1, len(gates) * len(shared))
    shown = [metric for metric in SHOWN if metric not in {gate.metric for gate in gates}]
    return [
        _delta(point(new), metric, old, new, gate, level)
        for old, new in shared
        for metric, gate in [*((gate.metric, gate) for gate in gates), *((metric, None) for metric in shown)]
        if gate or _value(old, metric) is not None or _value(new, metric) is not None
    ]


def point(row: Row) -> str:
    """What a row was measured at."""
    return str(row.get("point", ""))


def _delta(name: str, metric: str, old: Row, new: Row, gate: Gate | None, level: float) -> Delta:
    base, current = _value(old, metric), _value(new, metric)
    relative = gate is None or gate.relative
    if base is None or current is None or (relative and base == 0):
        if gate:
            raise ConfigError(f"--fail-on {gate}: {name}: {metric} is not in both results; see their rows for metrics")
        return Delta(name, metric, base, current, None, None, None, None, None)
    change = (current - base) / base if relative else current - base
    samples = _samples(old, new, metric)
    low, high = interval(*samples, relative, level) if samples else (None, None)
    verdict: Verdict | None = None
    if gate:
        if low is None or high is None:
            raise ConfigError(
                f"--fail-on {gate}: {name}: measured too seldom to tell a change from noise; "
                f"use --trials {FEWEST} or more for both results"
            )
        beyond = (change - gate.limit) * gate.sign > 0
        surely = low > 0 if gate.sign > 0 else high < 0
        verdict = "regression" if beyond and surely else "noise" if beyond else "ok"
    return Delta(name, metric, base, current, change, low, high, str(gate) if gate else None, verdict)


def _value(row: Row, metric: str) -> float | None:
    """A number at a dotted path."""
    value: Any = row
    for name in metric.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Sample:
    """Independent values, and what is made of them: their mean, or a quantile."""

    values: Floats
    quantile: float | None = None

    def statistic(self, values: Floats) -> Floats:
        """Over the last axis."""
        made = values.mean(-1) if self.quantile is None else np.quantile(values, self.quantile, axis=-1)
        return np.asarray(made)


def _samples(old: Row, new: Row, metric: str) -> tuple[Sample, Sample] | None:
    """The trials of both, or else their requests; None if there are too few of either."""
    trials = [[_value(trial, metric) for trial in row.get("trials", [])] for row in (old, new)]
    if all(len(values) >= FEWEST and None not in values for values in trials):
        return Sample(np.array(trials[0])), Sample(np.array(trials[1]))
    name, _, statistic = metric.partition(".")
    requests = [row.get("samples", {}).get(name, []) for row in (old, new)]
    if statistic in STATISTICS and all(len(values) >= FEWEST for values in requests):
        quantile = STATISTICS[statistic]
        return Sample(np.array(requests[0]), quantile), Sample(np.array(requests[1]), quantile)
    return None


def interval(base: Sample, current: Sample, relative: bool, level: float) -> tuple[float, float]:
    """Bootstrap interval of the change; each end is wrong with a probability of about `level`.

    The percentile interval, expanded for small samples (Hesterberg, What Teachers Should Know About the Bootstrap,
    2015): its ends lie where a t distribution with the smaller sample's degrees of freedom puts them, since resampled
    values spread too little by √(n / (n - 1)). Seeded: the same results give the same verdict.
    """
    random = np.random.default_rng(0)
    before, now = (
        sample.statistic(random.choice(sample.values, (RESAMPLES, len(sample.values)))) for sample in (base, current)
    )
    changes = (now - before) / before if relative else now - before
    fewest = min(len(base.values), len(current.values))
    tail = NormalDist().cdf(-math.sqrt(fewest / (fewest - 1)) * _t_quantile(1 - level, fewest - 1))
    low, high = np.quantile(changes, [tail, 1 - tail])
    return float(low), float(high)


def _t_quantile(share: float, degrees: int) -> float:
    """Student's t, by integrating its density after t = √degrees · tan θ, which makes it cos(θ)^(degrees - 1)."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    cumulative = np.cumsum(np.cos(angles) ** (degrees - 1))
    return math.sqrt(degrees) * math.tan(float(np.interp(share * cumulative[-1], cumulative, angles)))
