"""What users were promised: bounds that are read and kept, and the search for the highest rate that keeps them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.bench.events import RequestRecord
from kvtool.bench.slo import METRICS, SLO, goodput, max_rate
from kvtool.errors import ConfigError


def record(*times: float, prompt: int = 10, failure: str | None = None) -> RequestRecord:
    """An answer of one token at each of these times."""
    return RequestRecord(
        run=0,
        id=0,
        asked_tokens=len(times),
        scheduled=0.0,
        sent=0.0,
        chunk_times=list(times),
        chunk_kinds="t" * len(times),
        chunk_tokens=[1] * len(times),
        ended=times[-1] if times else 0.0,
        prompt_tokens=prompt,
        output_tokens=len(times),
        failure=failure,  # type: ignore[arg-type]
    )


def test_each_bound_is_on_its_metric() -> None:
    answer = record(0.1, 0.12, 0.2)  # TTFT 100, TPOT 50, longest gap 80, E2E 200 ms
    kept = SLO.parse("ttft:100ms,tpot:49ms,itl:80.1ms,e2e:0.2s").kept(answer)
    assert kept == {"ttft": True, "tpot": False, "itl": True, "e2e": True}


@pytest.mark.parametrize(
    ("prompt", "seconds", "kept"),
    [
        (99, 0.05, True), (99, 0.06, False), (100, 0.06, True), (499, 0.21, False),
        (500, 0.9, True), (1999, 1.1, False), (2000, 9.0, None),
    ],
)  # fmt: skip
def test_default_bounds_follow_the_length_of_the_prompt(prompt: int, seconds: float, kept: bool | None) -> None:
    assert SLO.parse("default").kept(record(seconds, prompt=prompt)).get("ttft") is kept


def test_goodput_counts_what_kept_all_of_its_bounds() -> None:
    slo = SLO.parse("ttft:100ms,e2e:300ms")
    total = goodput([record(0.1, 0.2), record(0.2, 0.25), record(0.05, 0.5), record(failure="timeout")], slo)
    assert total.row(seconds=2.0) == {
        "slo": "ttft:100ms,e2e:300ms",
        "goodput": 0.5,
        "attainment": {"all": 0.25, "ttft": 0.5, "e2e": 0.5},
    }


@given(st.dictionaries(st.sampled_from(METRICS), st.integers(1, 10**6), min_size=1))
def test_bounds_are_read_as_they_are_written(milliseconds: dict[str, int]) -> None:
    slo = SLO({metric: bound / 1000 for metric, bound in milliseconds.items()})
    read = SLO.parse(str(slo)).bounds
    assert read is not None
    assert read == pytest.approx(slo.bounds)


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft:20", "ttft:0ms", "ttft:-1ms", "tfft:20ms", "e2e:1s,e2e:2s", "itl:1h"]
)
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        SLO.parse(text)


@given(capacity=st.floats(0.02, 90_000), start=st.floats(0.01, 100_000))
def test_the_search_closes_in_on_the_capacity(capacity: float, start: float) -> None:
    search, tried = max_rate(start), []
    with pytest.raises(StopIteration) as ended:
        rate = next(search)
        while True:
            tried.append(rate)
            rate = search.send(rate <= capacity)
    found = ended.value.value
    assert found in tried
    assert capacity / 1.06 <= found <= capacity  # rates have three digits
    assert len(tried) <= 35


def test_the_search_gives_up_where_no_rate_is_kept_or_all_are() -> None:
    for answer, result in ((False, None), (True, 1e5)):
        search = max_rate(8.0)
        with pytest.raises(StopIteration) as ended:
            next(search)
            while True:
                search.send(answer)
        assert ended.value.value == result
