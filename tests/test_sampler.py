"""Sampling against exact probabilities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtool.request import SamplingParams
from kvtool.sampler import sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0], dtype=torch.float64)


def exact(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution, by the definition: the k most likely, then the smallest set that reaches top_p of those."""
    probs = (LOGITS / temperature).softmax(0)
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))[: top_k or None]
    total, kept, mass = sum(float(probs[i]) for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += float(probs[i])
        if mass >= top_p * total - 1e-12:
            break
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.9), (1, 1.0), (0, 1e-9)])
def test_frequencies_match_the_exact_distribution(temperature, top_k, top_p):
    n = 20_000
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sample(LOGITS.expand(n, -1), [params] * n, [uniform(11, i) for i in range(n)])
    counts, probs = torch.bincount(drawn, minlength=len(LOGITS)).double(), exact(temperature, top_k, top_p)
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    chi2 = float(((counts - n * probs) ** 2 / (n * probs))[possible].sum())
    freedom = int(possible.sum()) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 5  # far beyond the 99.99th percentile


@given(
    st.lists(
        st.tuples(st.floats(0, 1e-6) | st.floats(1e-3, 3), st.integers(0, 6), st.floats(0.01, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_a_row_is_sampled_as_if_it_were_alone(rows):
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in rows]
    logits = torch.stack([LOGITS.roll(i) for i in range(len(rows))])
    numbers = [uniform(3, i) for i in range(len(rows))]
    together = sample(logits, params, numbers)
    alone = [int(sample(logits[i : i + 1], [params[i]], [numbers[i]])) for i in range(len(rows))]
    assert together.tolist() == alone


def test_temperature_zero_is_greedy_among_sampled_rows():
    params = [SamplingParams(temperature=0), SamplingParams(temperature=100)]
    for i in range(50):
        assert int(sample(LOGITS.expand(2, -1), params, [uniform(i, 0), uniform(i, 1)])[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_temperature_near_zero_is_no_overflow(dtype):
    params = [SamplingParams(temperature=t) for t in (2e-5, 1e-4, 3e-4)]
    assert sample((10 * LOGITS).to(dtype).expand(3, -1), params, [0.99] * 3).tolist() == [0] * 3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_apart(poison):
    logits = LOGITS.repeat(4, 1)
    logits[1:3, 2] = poison
    drawn = sample(logits, [SamplingParams(temperature=t) for t in (0, 0, 1, 1)], [0.5] * 4).tolist()
    assert drawn[0] == 0 and drawn[1:3] == [-1, -1] and drawn[3] >= 0
    assert sample(logits, [SamplingParams(temperature=0)] * 4, [0.5] * 4).tolist() == [0, -1, -1, 0]


def test_uniform_is_spread_and_depends_on_seed_and_position_alone():
    numbers = torch.tensor([uniform(7, i) for i in range(10_000)])
    assert abs(float(numbers.mean()) - 0.5) < 0.02 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert uniform(7, 3) == uniform(7, 3) != uniform(8, 3)
