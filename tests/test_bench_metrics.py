"""Figures against what they are defined as, and distributions against numpy."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.bench.events import RequestRecord
from kvtool.bench.metrics import DEFINITIONS, EXACT_VALUES, Figures, Sketch

# A chat: the role at once, two chunks of text, the second of three tokens, and the end a while after the last of them.
RECORD = RequestRecord(
    run=0,
    id=0,
    asked_tokens=5,
    scheduled=0.5,
    sent=1.0,
    first_byte=1.1,
    chunk_times=[1.1, 3.0, 4.0, 7.0, 7.5],
    chunk_kinds="ertte",
    chunk_tokens=[0, 1, 1, 3, 0],
    ended=8.0,
    prompt_tokens=9,
    cached_tokens=0,
    output_tokens=5,
)


@pytest.mark.parametrize(
    "definitions, ttft, tpot, itl, e2e",
    [
        ("kvtool", 2.0, 4.0 / 4, [1.0, 3.0, 0.0, 0.0], 6.0),
        ("vllm", 0.1, 6.4 / 4, [1.9, 1.0, 3.0, 0.5], 6.5),
        ("sglang", 2.0, 5.0 / 4, [1.0, 1.0, 1.0, 1.0], 7.0),
        ("guidellm", 2.0, 6.0 / 5, [1.0, 1.0, 1.0, 1.0], 7.0),
        ("aiperf", 2.0, None, [1.0], 6.0),
    ],
)
def test_one_record_under_every_definition(
    definitions: str, ttft: float, tpot: float | None, itl: list[float], e2e: float
) -> None:
    latencies = DEFINITIONS[definitions](RECORD)
    assert latencies.ttft == pytest.approx(ttft)
    assert latencies.tpot == (None if tpot is None else pytest.approx(tpot))
    assert latencies.itl == pytest.approx(itl)
    assert latencies.e2e == pytest.approx(e2e)


gaps = st.lists(st.floats(0, 10), min_size=1, max_size=20)


@given(gaps, st.data())
def test_gaps_add_up_to_the_time_between_first_and_last(times: list[float], data: st.DataObject) -> None:
    arrivals = [sum(times[: n + 1]) for n in range(len(times))]
    tokens = [data.draw(st.integers(1, 4)) for _ in times]
    record = RequestRecord(
        run=0,
        id=0,
        asked_tokens=sum(tokens),
        scheduled=0.0,
        sent=0.0,
        chunk_times=arrivals,
        chunk_kinds="t" * len(times),
        chunk_tokens=tokens,
        ended=arrivals[-1],
        output_tokens=sum(tokens),
    )
    for latencies in (DEFINITIONS[name](record) for name in ("kvtool", "vllm", "sglang", "guidellm")):
        assert sum(latencies.itl) == pytest.approx(arrivals[-1] - arrivals[0]) or len(latencies.itl) == 0
    ours = DEFINITIONS["kvtool"](record)
    assert len(ours.itl) == sum(tokens) - 1
    if ours.tpot is not None:
        assert ours.tpot == pytest.approx((ours.e2e - ours.ttft) / len(ours.itl))
    assert [b - a for a, b in pairwise(arrivals)] == pytest.approx(DEFINITIONS["vllm"](record).itl)


def test_a_row_holds_what_succeeded_and_counts_what_did_not() -> None:
    figures = Figures()
    figures.add(RECORD)
    for number, failure in enumerate(("connect", "cached", "connect")):
        figures.add(
            RequestRecord(
                run=0,
                id=number,
                asked_tokens=5,
                scheduled=1.0,
                sent=1.0,
                ended=2.0 + number,
                chunk_times=[1.001],
                chunk_kinds="t",
                chunk_tokens=[5],
                output_tokens=5,
                failure=failure,
                error=f"the {failure}",
            )
        )
    row = figures.row()
    assert (row["requests"], row["failed"], row["success_rate"]) == (4, 3, 0.25)
    assert row["failures"] == {"connect": 2, "cached": 1}
    assert row["errors"] == ["the connect", "the cached"]
    assert row["ttft_ms"]["min"] == row["ttft_ms"]["p99"] == pytest.approx(2000)
    assert row["ttft_scheduled_ms"]["mean"] == pytest.approx(2500)
    assert row["queue_ms"]["mean"] == pytest.approx(500)
    assert row["first_answer_ms"]["mean"] == pytest.approx(3000)
    assert row["seconds"] == 7.0
    assert (row["requests_per_s"], row["output_tok_s"], row["total_tok_s"]) == pytest.approx((1 / 7, 5 / 7, 2))


def test_nothing_that_succeeded_gives_no_latency() -> None:
    row = Figures().row()
    assert (row["ttft_ms"], row["success_rate"], row["output_tok_s"]) == (None, 0.0, 0.0)


def test_trials_add_their_times() -> None:
    one, both = Figures(), Figures()
    one.add(RECORD)
    both.merge(one)
    both.merge(one)
    assert both.row()["output_tok_s"] == one.row()["output_tok_s"]
    assert both.row()["requests"] == 2
    assert both.row()["ttft_ms"] == one.row()["ttft_ms"]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_small_distribution_is_exact(values: list[float], shares: list[float]) -> None:
    sketch = Sketch(values)
    assert sketch.quantiles(sorted(shares)) == pytest.approx(np.quantile(values, sorted(shares)).tolist())
    assert sorted(sketch.sample()) == sorted(values)
    assert sketch.mean == pytest.approx(np.mean(values))


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=3, deadline=None)
def test_a_large_one_is_off_by_a_tenth_of_a_percent_at_most(seed: int, parts: int) -> None:
    values = np.random.default_rng(seed).lognormal(1, 2, 3 * EXACT_VALUES)
    merged = Sketch()
    for part in np.array_split(values, parts):
        merged.merge(Sketch(part.tolist()))
    shares = [0.0, 0.01, 0.5, 0.9, 0.99, 1.0]
    for share, found in zip(shares, merged.quantiles(shares), strict=True):
        below, above = (np.quantile(values, share, method=method) for method in ("lower", "higher"))
        assert below * 0.9985 <= found <= above * 1.0015
    assert merged.mean == pytest.approx(values.mean())
    assert (merged.least, merged.greatest, merged.count) == (values.min(), values.max(), len(values))
    assert len(merged._buckets) < 20_000 and not merged._values
    assert np.quantile(merged.sample(), 0.5) == pytest.approx(np.quantile(values, 0.5), rel=0.02)
