"""When requests are sent: distributions of gaps, rates that rise, and what is said of a rate."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.bench.arrivals import Arrivals, scheduled
from kvtool.bench.events import WorkItem
from kvtool.errors import ConfigError

N = 4000


def gaps(arrivals: Arrivals, count: int = N) -> np.ndarray:
    return np.diff(list(islice(arrivals.times(), count + 1)))


def ks_distance(values: np.ndarray, cdf: np.ndarray) -> float:
    """The largest difference between a sample and a distribution, given at the sorted values."""
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1])))


def critical(count: int) -> float:
    """Exceeded by one true sample in a thousand; seeds are fixed, so a test never flips."""
    return 1.95 / math.sqrt(count)


def test_poisson_gaps_are_exponential() -> None:
    values = np.sort(gaps(Arrivals(8.0)))
    assert ks_distance(values, 1 - np.exp(-8.0 * values)) < critical(N)
    assert ks_distance(values, 1 - np.exp(-9.0 * values)) > critical(N)  # and the test can tell


def test_gamma_gaps_of_shape_two() -> None:
    values = np.sort(gaps(Arrivals(5.0, burstiness=2.0)))
    x = 10.0 * values  # Erlang of shape 2 and mean 1/5 has a closed form
    assert ks_distance(values, 1 - np.exp(-x) * (1 + x)) < critical(N)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    values = gaps(Arrivals(10.0, burstiness=burstiness), 20_000)
    assert values.mean() == pytest.approx(0.1, rel=0.06)
    assert values.std() / values.mean() == pytest.approx(burstiness**-0.5, rel=0.06)


def test_constant_gaps_and_all_at_once() -> None:
    assert gaps(Arrivals(4.0, burstiness=math.inf), 100) == pytest.approx(0.25)
    assert set(islice(Arrivals(math.inf).times(), 100)) == {0.0}


@given(
    first=st.floats(0.01, 1000), last=st.floats(0.01, 1000), ramp=st.floats(0.1, 1000), expected=st.floats(0.0, 10_000)
)
def test_a_ramp_inverts_the_count_expected(first: float, last: float, ramp: float, expected: float) -> None:
    time = Arrivals(first, last, ramp)._when(expected)
    inside = min(time, ramp)
    so_many = first * inside + (last - first) / ramp / 2 * inside**2 + last * max(0.0, time - ramp)
    assert so_many == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_requests_follow_a_rate_that_rises() -> None:
    times = np.array(list(islice(Arrivals(10.0, 110.0, 20.0).times(), 1200)))
    counts, _ = np.histogram(times, bins=4, range=(0, 20))
    expected = np.array([112.5, 237.5, 362.5, 487.5])  # the rate's integral over each 5 s: 1,200 in all
    in_range = counts * (1200 / counts.sum())
    assert float(np.sum((in_range - expected) ** 2 / expected)) < 16.3  # chi-square of 3 degrees, one in a thousand


@given(st.integers(0, 2**32), st.floats(0.1, 10), st.floats(0.1, 100))
def test_times_rise_and_depend_on_the_seed_alone(seed: int, burstiness: float, rate: float) -> None:
    arrivals = Arrivals(rate, burstiness=burstiness, seed=seed)
    times = list(islice(arrivals.times(), 50))
    assert times[0] == 0.0
    assert all(before <= after for before, after in pairwise(times))
    assert times == list(islice(arrivals.times(), 50))


@given(
    st.one_of(
        st.builds(Arrivals, st.integers(1, 10**6).map(float)),
        st.builds(Arrivals, *[st.integers(1, 1000).map(float)] * 3),
        st.just(Arrivals(math.inf)),
    )
)
def test_a_rate_is_read_as_it_is_written(arrivals: Arrivals) -> None:
    assert Arrivals.parse(str(arrivals)) == arrivals


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "fast", "1-2", "1-2:60", "1-0:60s", "1-2:0s", "inf-2:3s", "1e9", "nan"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no rate|a rate is|a ramp takes"):
        Arrivals.parse(text)


@pytest.mark.parametrize("burstiness", [0.0, -1.0, math.nan])
def test_burstiness_is_above_zero(burstiness: float) -> None:
    with pytest.raises(ConfigError, match="--burstiness"):
        Arrivals.parse("1", burstiness)


def test_only_the_first_turn_of_a_session_has_a_time() -> None:
    items = [WorkItem(id=n, prompt=[1], output_tokens=1, session=str(n // 3), turn=n % 3) for n in range(6)]
    times = [item.scheduled for item in scheduled(items, Arrivals(2.0, burstiness=math.inf))]
    assert times == [0.0, None, None, 0.5, None, None]
