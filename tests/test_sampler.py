"""Sampling against exact probabilities, and each rule against its definition in plain Python."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from kvtool.request import Sample, SamplingParams
from kvtool.sampler import Sampler, adjust, uniform
from kvtool.token_scores import token_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0], dtype=torch.float64)
VOCAB = len(LOGITS)
EOS = [1]


def row(
    seed: int = 11,
    position: int = 0,
    num_generated: int = 0,
    prompt: tuple[int, ...] = (),
    answer: tuple[int, ...] = (),
    **params: Any,
) -> Sample:
    return Sample(
        id="r",
        span=0,
        slot=0,
        position=position,
        params=SamplingParams(**params),
        seed=seed,
        num_generated=len(answer) if prompt or answer else num_generated,
        history=[*prompt, *answer],
    )


def in_slots(samples: list[Sample]) -> list[Sample]:
    """Each in a slot of its own."""
    return [msgspec.structs.replace(s, slot=slot) for slot, s in enumerate(samples)]


def sample(
    logits: torch.Tensor, samples: list[Sample], eos: list[int] | None = None, allowed: NDArray[np.int32] | None = None
) -> torch.Tensor:
    sampler = Sampler(torch.zeros(len(samples), dtype=torch.int64), eos or [])
    return sampler.sample(logits, in_slots(samples), allowed)


def adjusted_logits(
    logits: torch.Tensor, samples: list[Sample], eos: list[int] | None = None, allowed: NDArray[np.int32] | None = None
) -> torch.Tensor:
    sampler = Sampler(torch.zeros(len(samples), dtype=torch.int64), eos or [])
    return adjust(logits, *sampler.prepare(in_slots(samples), logits, allowed))


def bitmask(allowed: list[set[int]], vocab: int = VOCAB) -> NDArray[np.int32]:
    """The definition: bit i % 32 of word i // 32."""
    words = np.zeros((len(allowed), -(-vocab // 32)), dtype=np.uint32)
    for mask, ids in zip(words, allowed, strict=True):
        for i in ids:
            mask[i // 32] |= np.uint32(1) << np.uint32(i % 32)
    return words.view(np.int32)


def adjusted(s: Sample, allowed: set[int] | None = None) -> list[float]:
    """The definition of grammar, min_tokens, logit_bias and penalties, token by token."""
    params, logits = s.params, LOGITS.tolist()
    may = set(range(VOCAB)) if allowed is None else allowed
    held_back = {*EOS, *params.stop_token_ids} if s.num_generated < params.min_tokens else set()
    may = may - held_back or may
    for i in range(VOCAB):
        if i not in may:
            logits[i] = -math.inf
            continue
        logits[i] += params.logit_bias.get(i, 0)
        answer = s.history[len(s.history) - s.num_generated :] if s.history else []
        if i in s.history:
            logits[i] *= 1 / params.repetition_penalty if logits[i] > 0 else params.repetition_penalty
        if i in answer:
            logits[i] -= params.presence_penalty + params.frequency_penalty * answer.count(i)
    return logits


def exact(s: Sample) -> torch.Tensor:
    """The distribution, by the definition: min_p, then the k most likely, then the smallest set that reaches top_p."""
    params = s.params
    probs = (torch.tensor(adjusted(s), dtype=torch.float64) / params.temperature).softmax(0)
    order = sorted(range(VOCAB), key=lambda i: -float(probs[i]))
    order = [i for i in order if probs[i] > 0 and probs[i] >= params.min_p * probs.max()][: params.top_k or None]
    total, kept, mass = sum(float(probs[i]) for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += float(probs[i])
        if mass >= params.top_p * total - 1e-12:
            break
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def assert_drawn_as(probs: torch.Tensor, drawn: torch.Tensor) -> None:
    n, counts, possible = len(drawn), torch.bincount(drawn, minlength=VOCAB).double(), probs > 0
    assert counts[~possible].sum() == 0
    chi2 = float(((counts - n * probs) ** 2 / (n * probs))[possible].sum())
    freedom = int(possible.sum()) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 5  # far beyond the 99.99th percentile


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.9},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"min_p": 0.2, "top_k": 3, "top_p": 0.8},
        {"logit_bias": {5: 6.0, 0: -100.0}},
        {"logit_bias": {4: 1.5}, "min_p": 0.15, "top_p": 0.95},
        {"repetition_penalty": 1.7, "prompt": (0, 4), "answer": (4, 5)},
        {"repetition_penalty": 0.6, "prompt": (0, 4), "answer": (2,)},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "prompt": (1, 1), "answer": (0, 0, 3)},
        {"presence_penalty": -2.0, "frequency_penalty": -0.5, "answer": (5, 5, 4), "top_k": 4},
        {"min_tokens": 3, "num_generated": 2, "stop_token_ids": [0]},
        {"min_tokens": 3, "num_generated": 3, "stop_token_ids": [0]},
        {
            "min_tokens": 9,
            "logit_bias": {1: 50.0, 3: 2.0},
            "repetition_penalty": 1.3,
            "presence_penalty": 0.3,
            "prompt": (3,),
            "answer": (0, 2, 2),
            "min_p": 0.02,
            "top_k": 4,
            "top_p": 0.97,
        },
    ],
    ids=str,
)
def test_frequencies_match_the_exact_distribution(temperature: float, params: dict[str, Any]) -> None:
    n = 20_000
    samples = [row(position=i, temperature=temperature, **params) for i in range(n)]
    assert_drawn_as(exact(samples[0]), sample(LOGITS.expand(n, -1), samples, EOS))


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=5).map(tuple)
ROWS = st.builds(
    row,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10_000),
    num_generated=st.integers(0, 3),
    prompt=TOKENS,
    answer=TOKENS,
    temperature=st.floats(0, 1e-6) | st.floats(1e-3, 3),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.1, 3),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=3),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=VOCAB),
)
ALLOWED = st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1)


@settings(deadline=None)
@given(st.lists(st.tuples(ROWS, ALLOWED), min_size=1, max_size=8))
def test_a_row_is_sampled_as_if_it_were_alone(rows: list[tuple[Sample, set[int] | None]]) -> None:
    logits = torch.stack([LOGITS.roll(i) for i in range(len(rows))])
    before = logits.clone()
    samples = [s for s, _ in rows]
    masks = bitmask([set(range(32)) if allowed is None else allowed for _, allowed in rows])
    together = sample(logits, samples, EOS, masks)
    alone = [
        sample(logits[i : i + 1], [s], EOS, None if allowed is None else bitmask([allowed])).item()
        for i, (s, allowed) in enumerate(rows)
    ]
    assert together.tolist() == alone
    assert all(token in (allowed or range(VOCAB)) for token, (_, allowed) in zip(alone, rows, strict=True))
    assert torch.equal(logits, before)


@settings(deadline=None)
@given(st.lists(st.tuples(ROWS, ALLOWED), min_size=1, max_size=5))
def test_logits_are_adjusted_by_the_definition(rows: list[tuple[Sample, set[int] | None]]) -> None:
    masks = bitmask([set(range(32)) if allowed is None else allowed for _, allowed in rows])
    got = adjusted_logits(LOGITS.expand(len(rows), -1), [s for s, _ in rows], EOS, masks)
    expected = torch.tensor([adjusted(s, allowed) for s, allowed in rows], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_logits_that_nobody_adjusts_are_not_copied() -> None:
    logits = LOGITS.repeat(2, 1)
    assert adjusted_logits(logits, [row(), row(temperature=0)], EOS) is logits


@settings(deadline=None)
@given(TOKENS.filter(bool), st.floats(0.1, 5))
def test_the_repetition_penalty_is_that_of_transformers(seen: tuple[int, ...], penalty: float) -> None:
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), LOGITS[None].clone())
    for prompt, answer in ((seen, ()), ((), seen), (seen[:1], seen[1:])):
        ours = adjusted_logits(LOGITS[None], [row(repetition_penalty=penalty, prompt=prompt, answer=answer)])
        torch.testing.assert_close(ours, theirs)


def test_a_history_is_told_once_for_each_sequence_of_a_slot() -> None:
    """What follows counts as if all of it had been told again; another sequence's slot is left alone."""
    n, vocab, rng = 3, 50, np.random.default_rng(3)
    sampler = Sampler(torch.zeros(2 * n, dtype=torch.int64))
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "temperature": 0.9}
    told = [row(seed=i, prompt=tuple(rng.integers(0, vocab, 9).tolist()), **params) for i in range(n)]
    tokens, slots = [list(s.history) for s in told], [4, 0, 3]
    for step in range(30):
        if step == 20:  # another takes the second slot
            told[1] = row(seed=77, prompt=(5, 6, 5), **params)
            tokens[1] = [5, 6, 5]
        whole = [
            msgspec.structs.replace(
                s, slot=slot, position=len(seen), num_generated=len(seen) - len(s.history), history=seen
            )
            for s, seen, slot in zip(told, tokens, slots, strict=True)
        ]
        is_new = [step == 0 or (step == 20 and i == 1) for i in range(n)]
        now = [s if new else msgspec.structs.replace(s, history=[]) for s, new in zip(whole, is_new, strict=True)]
        logits = torch.from_numpy(rng.standard_normal((n, vocab)))
        drawn = sampler.sample(logits, now).tolist()
        assert drawn == sample(logits, whole).tolist()
        for seen, token in zip(tokens, drawn, strict=True):
            seen.append(token)


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.3, 0.9])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    theirs = MinPLogitsWarper(min_p)(torch.tensor([[0]]), LOGITS[None]).softmax(-1)[0]
    samples = [row(position=i, min_p=min_p) for i in range(20_000)]
    assert_drawn_as(theirs, sample(LOGITS.expand(20_000, -1), samples))


def test_a_seed_gives_the_same_tokens_whatever_the_batch() -> None:
    def draw(others: int) -> list[int]:
        mine = [row(seed=5, position=i, temperature=1.3) for i in range(100)]
        return [int(sample(LOGITS.expand(others + 1, -1), [*[row(seed=9)] * others, s])[-1]) for s in mine]

    assert draw(0) == draw(1) == draw(7)
    assert len(set(draw(0))) > 3


def test_temperature_zero_is_greedy_among_sampled_rows() -> None:
    for i in range(50):
        samples = [row(seed=i, temperature=0), row(seed=i, temperature=100)]
        assert int(sample(LOGITS.expand(2, -1), samples)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_temperature_near_zero_is_no_overflow(dtype: torch.dtype) -> None:
    samples = [row(temperature=t, seed=i) for t in (2e-5, 1e-4, 3e-4) for i in range(20)]
    assert sample((10 * LOGITS).to(dtype).expand(60, -1), samples).tolist() == [0] * 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adjustments_are_not_rounded_to_the_models_precision(dtype: torch.dtype) -> None:
    logits = torch.tensor([[100.0, 100.0, 99.0]], dtype=dtype)
    assert sample(logits, [row(temperature=0, logit_bias={1: 1e-3})]).tolist() == [1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_apart(poison: float) -> None:
    logits = LOGITS.repeat(4, 1)
    logits[1:3, 2] = poison
    drawn = sample(logits, [row(temperature=t) for t in (0, 0, 1, 1)]).tolist()
    assert drawn[0] == 0 and drawn[1:3] == [-1, -1] and drawn[3] >= 0
    masks = bitmask([{0, 5}] * 4)
    assert sample(logits, [row(temperature=0, min_tokens=1)] * 4, EOS, masks).tolist() == [0, -1, -1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_allows_only_the_end_outranks_min_tokens(temperature: float) -> None:
    samples = [row(temperature=temperature, min_tokens=5, seed=i) for i in range(20)]
    assert sample(LOGITS.expand(20, -1), samples, EOS, bitmask([set(EOS)] * 20)).tolist() == EOS * 20


@settings(deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1))
def test_masks_reach_over_words_and_a_last_one_that_is_not_full(allowed: set[int]) -> None:
    logits = torch.linspace(1, 0, 100)[None]
    assert sample(logits, [row(temperature=0)], allowed=bitmask([allowed], 100)).tolist() == [min(allowed)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    token_ids = torch.arange(7) * 7
    chosen, top_ids, top = token_logprobs(logits, token_ids, 5)
    exactly = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), exactly[range(7), token_ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.double(), exactly.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.double(), exactly.gather(-1, top_ids), rtol=1e-5, atol=1e-5)
    assert top.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_the_greedy_token_leads_the_most_likely_with_the_very_same_number(num_top: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 4, (200, 64), generator=generator).to(torch.bfloat16)  # full of equals
    greedy = sample(logits, [row(temperature=0)] * 200)
    chosen, top_ids, top = token_logprobs(logits, greedy, num_top)
    assert top_ids.shape == top.shape == (200, num_top)
    if num_top:
        assert torch.equal(top_ids[:, 0], greedy)
        assert torch.equal(top[:, 0], chosen)


def test_uniform_is_spread_and_depends_on_seed_and_position_alone() -> None:
    numbers = torch.tensor([uniform(7, i) for i in range(10_000)])
    assert abs(float(numbers.mean()) - 0.5) < 0.02 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert uniform(7, 3) == uniform(7, 3) != uniform(8, 3)
