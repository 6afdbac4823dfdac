"""Sampling in Triton against its definition in float64: the same token for the same uniform number.

Where there is a GPU the kernels run on it; elsewhere Triton interprets them on small vocabularies. That they compile
for an RTX 4090 needs no GPU.
"""

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.cuda_graph import known as definition_of_known
from kvtool.request import VOID, Sample, SamplingParams
from kvtool.sampler import Choices, Drafts, Row, Sampler
from kvtool.sampler import choose as definition
from kvtool.sampler import greedy as sampler_greedy
from kvtool.sampler import verify as sampler_verify

pytest.importorskip("triton")

from compiled import ON_GPU, check_compiled, compiles, runs

from kvtool.kernels.sampling import choose, greedy, known, verify

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
VOCABS = [1000, 32_000, 151_936, 152_064] if ON_GPU else [40, 1024, 5000]
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float16, torch.float32]
SLOTS = 12
TOLERANCE = 1e-5

examples = settings(deadline=None, max_examples=300 if ON_GPU else 12)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.7, 1.0, 1.0, 5.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 20, 500, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.8, 0.95, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {}, {3: 4.0}, {0: -100.0, 39: 2.5, 7: 0.25}]),
)


def drawn_samples(rng: np.random.Generator, many: list[SamplingParams], vocab: int) -> list[Sample]:
    slots, samples = rng.permutation(SLOTS).tolist(), []
    for index, each in enumerate(many):
        seen = rng.integers(0, vocab, rng.integers(1, 30)).tolist()
        samples.append(
            Sample(
                id=str(index),
                span=0,
                slot=slots[index],
                position=len(seen),
                params=each,
                seed=int(rng.integers(1 << 60)),
                num_generated=int(rng.integers(len(seen))),
                history=seen if each.looks_back else [],
            )
        )
    return samples


def drawn_logits(rng: np.random.Generator, shape: tuple[int, int], spread: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * spread).to(dtype)


def shifted(choices: Choices, column: str, shift: float) -> Choices:
    rows = choices.rows.clone()
    at = Row._fields.index(column)
    rows[:, at] = (rows[:, at] + shift).clamp(0, 1) if column == "uniform" else rows[:, at] * (1 + shift)
    return replace(choices, rows=rows)


def may_be(token: int, logits: torch.Tensor, choices: Choices, mask: torch.Tensor | None, counts: torch.Tensor | None,
           row: int) -> bool:  # fmt: skip
    """Whether the definition chooses this token, or would if a number were other by as much as fp32 errs."""
    for column in ("uniform", "top_p", "min_p"):
        for shift in (0, -TOLERANCE, TOLERANCE):
            near = shifted(choices, column, shift)
            ends = [
                int(definition(logits, shifted(near, "uniform", end), mask, counts)[row])
                for end in (-TOLERANCE, 0, TOLERANCE)
            ]
            if min(ends) <= token <= max(ends):
                return True
    return False


@runs
@examples
@given(
    st.lists(params, min_size=1, max_size=SLOTS if ON_GPU else 2),
    st.sampled_from(VOCABS),
    st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_tokens_are_those_of_the_definition(
    many: list[SamplingParams], vocab: int, spread: float, masked: bool, dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = drawn_samples(rng, many, vocab)
    logits = drawn_logits(rng, (len(many), vocab), spread, dtype)
    allowed = rng.integers(-(2**31), 2**31, (len(many), -(-vocab // 32))).astype(np.int32) if masked else None
    newest = torch.zeros(SLOTS, dtype=torch.int64)
    choices, mask, counts = Sampler(newest).prepare(samples, logits, allowed)
    c, device_counts = choices, None if counts is None else counts.to(DEVICE, copy=True)
    inputs = (x.to(DEVICE) for x in (logits, c.rows, c.bias_ends, c.bias_ids, c.biases))
    device_mask, newest = None if mask is None else mask.to(DEVICE), newest.to(DEVICE)
    token_ids = choose(*inputs, device_mask, device_counts, newest).cpu()
    for row, (token, expected) in enumerate(
        zip(token_ids.tolist(), definition(logits, choices, mask, counts).tolist(), strict=True)
    ):
        assert token == expected or may_be(token, logits, choices, mask, counts, row), (row, token, expected)
        assert newest[samples[row].slot] == token
        if counts is not None and device_counts is not None:
            counts[samples[row].slot, token] += 2 * samples[row].params.looks_back
    if counts is not None and device_counts is not None:
        assert torch.equal(device_counts.cpu(), counts)


@runs
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_told_apart(poison: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=temperature, repetition_penalty=1.2)
    samples = drawn_samples(rng, [params] * 3, 3000)
    logits = drawn_logits(rng, (3, 3000), 2.0, DTYPES[0])
    logits[1, 2077] = poison
    choices, _, counts = Sampler(torch.zeros(SLOTS, dtype=torch.int64)).prepare(samples, logits)
    assert counts is not None
    device_counts, newest = counts.to(DEVICE, copy=True), torch.full((SLOTS,), 7, device=DEVICE)
    c = choices
    inputs = (x.to(DEVICE) for x in (logits, c.rows, c.bias_ends, c.bias_ids, c.biases))
    token_ids = choose(*inputs, None, device_counts, newest).tolist()
    assert token_ids[1] == -1 and min(token_ids[0], token_ids[2]) >= 0
    assert newest[samples[1].slot] == 0
    assert torch.equal(device_counts.cpu()[samples[1].slot], counts[samples[1].slot])


@runs
@examples
@given(
    st.integers(1, 9),
    st.sampled_from([5, 4096, *VOCABS]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_first_largest_logit_is_the_greedy_token(
    n: int, vocab: int, spread: float, poisoned: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = drawn_logits(rng, (n, vocab), spread, DTYPES[0])
    if poisoned:
        logits[rng.integers(n), rng.integers(vocab)] = rng.choice([math.nan, math.inf, -math.inf])
    slots, newest = torch.from_numpy(rng.permutation(SLOTS)[:n]), torch.full((SLOTS,), 7)
    expected_newest = newest.clone()
    expected = sampler_greedy(logits, expected_newest, slots)
    device_newest = newest.to(DEVICE)
    assert torch.equal(greedy(logits.to(DEVICE), device_newest, slots.to(DEVICE)).cpu(), expected)
    assert torch.equal(device_newest.cpu(), expected_newest)


@runs
def test_equals_are_drawn_alike_and_the_first_are_kept() -> None:
    """All logits the same: what is kept are the first ids, each as often as any other."""
    n, vocab = 1000 if ON_GPU else 25, 3000
    params = SamplingParams(top_k=2 * 1024 + 5)
    samples = [Sample(id=str(i), span=0, slot=i, position=1, params=params, seed=i, num_generated=0) for i in range(n)]
    logits = torch.ones(n, vocab, dtype=DTYPES[0], device=DEVICE)
    c = Choices.send(samples, DEVICE)
    newest = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    token_ids = choose(logits, c.rows, c.bias_ends, c.bias_ids, c.biases, None, None, newest)
    expected = (c.column("uniform")[:, 0] * params.top_k).floor().long()
    assert (token_ids - expected).abs().max() <= 1
    assert (token_ids == expected).float().mean() > 0.9


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_sequence_that_looks_back_counts_what_it_samples_on_the_device() -> None:
    """Steps without a history go on from the last one's counts, and a new sequence in the slot starts afresh."""
    rng, vocab = np.random.default_rng(1), 5000
    params = SamplingParams(temperature=0.7, frequency_penalty=0.5, repetition_penalty=1.1)
    sampler = Sampler(torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE))
    for _ in range(2):
        (sample,) = drawn_samples(rng, [params], vocab)
        sample = msgspec.structs.replace(sample, slot=4, num_generated=0)
        tokens = list(sample.history)
        for step in range(6):
            logits = drawn_logits(rng, (1, vocab), 3.0, torch.float32)
            now = msgspec.structs.replace(
                sample, position=len(tokens), num_generated=step, history=sample.history if step == 0 else []
            )
            token = int(sampler.sample(logits.to(DEVICE), [now]))
            whole = msgspec.structs.replace(now, history=tokens)
            on_host = Sampler(torch.zeros(SLOTS, dtype=torch.int64))
            choices, mask, counts = on_host.prepare([whole], logits)
            assert may_be(token, logits, choices, mask, counts, 0)
            tokens.append(token)


@runs
@examples
@given(data=st.data(), most=st.integers(1, 6))
def test_drafts_hold_as_far_as_the_definition_says(data: st.DataObject, most: int) -> None:
    counts = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=4))
    slots = data.draw(st.permutations(range(SLOTS)))[: len(counts)]
    tokens = st.integers(-1, 2)  # few, so that many are as drafted
    token_ids = torch.tensor(data.draw(st.lists(tokens, min_size=(n := sum(counts) + len(counts)), max_size=n)))
    recent = torch.tensor(data.draw(st.lists(tokens, min_size=(n := (1 + most) * SLOTS), max_size=n))).view(-1, SLOTS)
    samples = [
        Sample(id="", span=0, slot=slot, position=0, params=SamplingParams(), seed=0, num_generated=0)
        for slot, count in zip(slots, counts, strict=True)
        for _ in range(1 + count)
    ]
    drafts, brought = Drafts.send(samples, DEVICE), recent.to(DEVICE)
    got = verify(token_ids.to(DEVICE), drafts.slots, drafts.firsts, drafts.counts, brought, VOID)
    assert got.tolist() == sampler_verify(token_ids, Drafts.send(samples, torch.device("cpu")), recent).tolist()
    assert brought.tolist() == recent.tolist()


@runs
@examples
@given(count=st.integers(1, 600), drafts=st.integers(0, 4), slots=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_what_stands_for_tokens_is_found(count: int, drafts: int, slots: int, seed: int) -> None:
    torch.manual_seed(seed)
    recent = torch.randint(1000, (1 + drafts, slots))
    ids = torch.randint(-recent.numel(), 1000, (count,))
    assert torch.equal(known(ids.to(DEVICE), recent.to(DEVICE)).cpu(), definition_of_known(ids, recent))


@compiles
def test_the_kernels_compile_for_a_4090_without_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(2, len(Row._fields), dtype=torch.float64)
    counts, newest = torch.zeros(2, 151_936, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)

    def launch() -> None:
        for logits, allowed in ((counts.bfloat16(), None), (counts.float(), counts[:, :4748])):
            choose(logits, rows, rows[0], rows[0], rows[0], allowed, counts, newest)
            greedy(logits, newest, newest)
        verify(newest, newest, newest, newest, newest.new_zeros(5, 2), VOID)
        known(newest, counts.long())

    assert check_compiled(launch, monkeypatch) == 10
