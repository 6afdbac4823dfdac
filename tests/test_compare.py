"""Two results held against each other: equal ones pass, slower ones do not, and unlike ones are not compared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.bench.compare import ALPHA, Gate, Sample, compare, differences, interval, read_result
from kvtool.errors import ConfigError

TTFT, RATE = Gate.parse("ttft_ms.p99:10%"), Gate.parse("output_tok_s:-5%")


def row(ttft: list[float], rate: list[float], concurrency: int = 1) -> dict[str, Any]:
    """A row of so many trials, with what a command writes into it as far as it is compared."""
    trials = [{"ttft_ms": {"p99": t}, "output_tok_s": r} for t, r in zip(ttft, rate, strict=True)]
    whole = {"ttft_ms": {"p99": float(np.mean(ttft))}, "output_tok_s": float(np.mean(rate))}
    return {"point": f"concurrency {concurrency}", **whole, "trials": trials}


def result(*rows: dict[str, Any], **workload: Any) -> dict[str, Any]:
    return {
        "schema": "kvtool.bench-throughput/1",
        "environment": {"cpu": "EPYC", "cores": 2, "gpus": [], "torch": "2.13"},
        "config": {"workload": [{"dataset": "random", "prompt": "512"} | workload], "how": {"requests": 5}},
        "rows": list(rows),
    }


def noisy(random: np.random.Generator, slower: float = 1.0, trials: int = 5, noise: float = 0.04) -> dict[str, Any]:
    """Two points, whose trials scatter."""
    return result(
        *(
            row(
                list(slower * 100 * n * random.lognormal(0, noise, trials)),
                list(1000 * n / slower * random.lognormal(0, noise, trials)),
                concurrency=n,
            )
            for n in (1, 2)
        )
    )


def test_equal_engines_pass_as_often_as_stated() -> None:
    """Without a tolerance: any change that is taken for real is a false alarm."""
    random, gates = np.random.default_rng(2), [Gate.parse("ttft_ms.p99:+0%"), Gate.parse("output_tok_s:-0%")]
    runs = 200
    alarms = 0
    for _ in range(runs):
        deltas = compare(noisy(random), noisy(random), gates)
        alarms += any(delta.verdict == "regression" for delta in deltas)
    assert alarms / runs < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


@pytest.mark.parametrize(
    ("draw", "trials"),
    [
        (lambda random, n: random.normal(100, 5, n), 5),
        (lambda random, n: random.exponential(20, n) + 80, 5),
        (lambda random, n: random.lognormal(4, 0.3, n), 8),
    ],
)
def test_intervals_cover_the_truth_as_often_as_stated(draw: Any, trials: int) -> None:
    random, runs = np.random.default_rng(3), 200
    missed = 0
    for _ in range(runs):
        low, high = interval(Sample(draw(random, trials)), Sample(draw(random, trials)), relative=True, level=0.05)
        missed += not low <= 0 <= high
    assert missed / runs < 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)


def test_an_engine_slower_by_a_fifth_is_found() -> None:
    random = np.random.default_rng(4)
    for _ in range(20):
        deltas = compare(noisy(random), noisy(random, slower=1.2), [TTFT, RATE])
        assert [delta.verdict for delta in deltas if delta.gate] == ["regression"] * 4


def test_a_faster_engine_and_a_small_change_pass() -> None:
    random = np.random.default_rng(5)
    for slower in (0.8, 1.02):
        deltas = compare(noisy(random, noise=0.01), noisy(random, slower=slower, noise=0.01), [TTFT, RATE])
        assert {delta.verdict for delta in deltas if delta.gate} == {"ok"}


def test_a_change_within_the_noise_is_called_so() -> None:
    base, current = result(row([80, 100, 120], [10, 10, 10])), result(row([90, 115, 170], [10, 10, 10]))
    (delta,) = [d for d in compare(base, current, [TTFT]) if d.gate]
    assert delta.verdict == "noise"
    assert delta.change == pytest.approx(0.25)
    assert delta.low is not None
    assert delta.low < 0 < delta.change


def test_of_single_trials_the_requests_are_resampled() -> None:
    random = np.random.default_rng(6)

    def single(scale: float) -> dict[str, Any]:
        values = list(scale * random.lognormal(3, 0.1, 60))
        return result(
            {"point": "concurrency 1", "ttft_ms": {"p50": float(np.median(values))}, "samples": {"ttft_ms": values}}
        )

    gate = Gate.parse("ttft_ms.p50:10%")
    assert compare(single(1.0), single(1.3), [gate])[0].verdict == "regression"
    assert compare(single(1.0), single(1.0), [gate])[0].verdict == "ok"


def test_rates_of_single_trials_are_not_judged() -> None:
    once = result({"point": "concurrency 1", "output_tok_s": 10.0})
    with pytest.raises(ConfigError, match="--trials 3"):
        compare(once, once, [RATE])
    (shown,) = compare(once, once, [])
    assert (shown.change, shown.low, shown.verdict) == (0.0, None, None)


def test_unlike_results_are_not_compared_without_force() -> None:
    base = result(row([1, 1, 1], [1, 1, 1]))
    other = result(row([1, 1, 1], [1, 1, 1]), prompt="1024")
    elsewhere = base | {"environment": base["environment"] | {"gpus": ["H200"]}}
    newer = base | {"environment": base["environment"] | {"torch": "2.14"}}
    assert differences(base, newer) == []
    for current, word in ((other, "workload.0.prompt: 512, now 1024"), (elsewhere, "gpus")):
        with pytest.raises(ConfigError, match=word):
            compare(base, current, [TTFT])
        assert compare(base, current, [TTFT], force=True)
    with pytest.raises(ConfigError, match="points"):
        compare(base, result(row([1, 1, 1], [1, 1, 1], concurrency=2)), [TTFT])


def test_forced_points_of_other_names_are_paired_in_their_order() -> None:
    base = result(row([1, 1, 1], [1, 1, 1]), row([2, 2, 2], [1, 1, 1], concurrency=2))
    other = result(row([3, 3, 3], [1, 1, 1], concurrency=4), row([4, 4, 4], [1, 1, 1], concurrency=8))
    first, second = (delta for delta in compare(base, other, [TTFT], force=True) if delta.metric == TTFT.metric)
    assert (first.point, first.base, first.current) == ("concurrency 4", 1, 3)
    assert (second.point, second.base, second.current) == ("concurrency 8", 2, 4)
    overlapping = result(*other["rows"], base["rows"][1])
    (only,) = (delta for delta in compare(base, overlapping, [TTFT], force=True) if delta.metric == TTFT.metric)
    assert (only.point, only.base, only.current) == ("concurrency 2", 2, 2)


def test_a_gate_on_what_is_not_there_is_an_error() -> None:
    base = result(row([1, 1, 1], [1, 1, 1]))
    with pytest.raises(ConfigError, match=r"ttft_ms\.p98 is not in both"):
        compare(base, base, [Gate.parse("ttft_ms.p98:10%")])


@given(st.sampled_from(["ttft_ms.p99", "output_tok_s", "x"]), st.integers(-500, 500), st.booleans())
def test_gates_are_read_as_they_are_written(metric: str, limit: int, relative: bool) -> None:
    gate = Gate(metric, limit / 100 if relative else float(limit), relative)
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize("text", ["", "ttft_ms.p99", "ttft_ms.p99:", "ttft_ms.p99:ten%", "a.b.c:1%", "x:0%", "x:1%%"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--fail-on"):
        Gate.parse(text)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"rows": []}', "[" * 100_000, "null"])
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "base.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"--output FILE\.json"):
        read_result(path)


def test_a_result_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(result(row([1], [1]))))
    assert read_result(path) == result(row([1], [1]))
