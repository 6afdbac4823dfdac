"""The scheduler alone: memory, order and progress, with a runner that makes up tokens."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.errors import RequestError
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.request import Grammar, Request, SamplingParams, ScheduledBatch, StepResult, Tokens
from kvtool.scheduler import STEPS_OF_ROOM, Scheduler

SPEC = KVSpec(2, StreamSpec(2, 32), StreamSpec(2, 32), 4)
FORMATS = [resolve(o, SPEC) for o in (KVOptions(), KVOptions(nbits="4"), KVOptions(nbits="2", residual_length=64))]


def scheduler(
    fmt: KVFormat, num_blocks: int = 8, seqs: int = 4, budget: int = 64, context: int = 512, micro_batches: int = 1
) -> Scheduler:
    return Scheduler(
        fmt,
        num_blocks=num_blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=context,
        eos_token_ids=[1],
        num_micro_batches=micro_batches,
    )


def request(name: str, prompt: int, max_tokens: int | None = None, **params: object) -> Request:
    return Request(name, [5] * prompt, SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


def result(batch: ScheduledBatch, token: Callable[[], int] = lambda: 7) -> StepResult:
    """What a runner would say."""
    return StepResult([token() for _ in batch.samples], [None] * len(batch.samples), [[] for _ in batch.spans])


def step(scheduler: Scheduler) -> list[Tokens]:
    batch = scheduler.schedule()
    return scheduler.update(result(batch))


def check(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """What must hold of every step."""
    lengths = [span.length for span in batch.spans]
    assert 0 < sum(lengths) <= scheduler.max_num_batched_tokens
    assert lengths == sorted(lengths, key=lambda n: n > 1), "spans of one token come first"
    known = [bool(span.token_ids) for span in batch.spans]
    assert known == sorted(known), "decodes come before what the host knows"
    assert len({span.id for span in batch.spans}) == len(batch.spans)
    starts = [span.start for span in batch.spans if not span.token_ids]
    assert starts == sorted(starts, reverse=True), "of decodes, the longest come first"
    owned = [block for sequence in scheduler.running for block in sequence.blocks]
    assert len(owned) == len(set(owned)) == scheduler.blocks.num_used
    assert len({sequence.slot for sequence in scheduler.running}) == len(scheduler.running)
    assert scheduler.slots.num_free + len(scheduler.running) == scheduler.slots.num_slots
    running = {sequence.id: sequence for sequence in scheduler.running}
    for span in batch.spans:
        assert span.blocks == running[span.id].blocks and span.slot == running[span.id].slot
        assert len(span.blocks) >= scheduler.format.num_blocks(span.end)
    complete = [span.id for span in batch.spans if span.end == len(running[span.id].tokens)]
    assert [sample.id for sample in batch.samples if batch.spans[sample.span].id == sample.id] == complete


@settings(deadline=None, max_examples=60)
@given(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 2**31))
def test_every_request_is_answered_in_full_and_all_memory_comes_back(fmt, seed):
    rng = random.Random(seed)
    s = scheduler(fmt, num_blocks=rng.randint(8, 20), seqs=rng.randint(1, 6), budget=rng.choice([7, 64, 1000]))
    expected, got, finished, aborted = {}, {}, {}, set()
    for i in range(20):
        prompt, answer = rng.randint(1, 250), rng.randint(1, 150)
        s.add(request(str(i), prompt, answer, ignore_eos=True), seed=0)
        expected[str(i)] = answer
    computed: dict[str, int] = {}
    while s.has_work:
        batch = s.schedule()
        check(s, batch)
        for span in batch.spans:  # each position once, in order, from 0 again only after preemption
            assert span.start in (0, computed.get(span.id, 0))
            computed[span.id] = span.end
        for tokens in s.update(result(batch, lambda: rng.randint(0, 9))):
            assert tokens.id not in finished and tokens.id not in aborted
            got[tokens.id] = got.get(tokens.id, 0) + len(tokens.token_ids)
            if tokens.finish_reason:
                finished[tokens.id] = tokens.finish_reason
        if rng.random() < 0.02:
            aborted.add(name := str(rng.randrange(20)))
            s.abort(name)
    answered = {name: n for name, n in expected.items() if name not in aborted}
    assert {name: got[name] for name in answered} == answered
    assert all(finished[name] == "length" for name in answered)
    assert s.blocks.num_free == s.blocks.num_blocks and s.slots.num_free == s.slots.num_slots


def test_decodes_run_while_a_long_prompt_is_cut_into_chunks():
    s = scheduler(FORMATS[1], budget=64)
    s.add(request("short", 10, 50), 0)
    step(s)
    s.add(request("long", 300, 5), 0)
    starts = []
    for _ in range(3):
        batch = s.schedule()
        assert [span.id for span in batch.spans] == ["short", "long"]
        starts.append((batch.spans[1].start, batch.spans[1].end))
        s.update(result(batch))
    assert starts == [(0, 63), (63, 126), (126, 189)]


def test_the_youngest_gives_way_and_the_oldest_never_does():
    s = scheduler(FORMATS[0], num_blocks=4, seqs=3, budget=256)
    for name in ("old", "middle", "young"):
        s.add(request(name, 64, 100, ignore_eos=True), 0)
    order = []
    while s.has_work:
        batch = s.schedule()
        check(s, batch)
        assert batch.spans[0].id == "old" or "old" in order
        order += [t.id for t in s.update(result(batch)) if t.finish_reason]
    assert order == ["old", "middle", "young"]


def test_room_is_made_for_several_steps():
    """Every second step of 32 sequences needs a block, but the GPU does not wait for room as often."""
    s = scheduler(FORMATS[0], num_blocks=128, seqs=32, budget=10_000, context=1000)
    for i in range(32):
        s.add(request(str(i), 100 + 2 * i, 400, ignore_eos=True), 0)
    under_way, made, waited = [s.schedule()], [], 0
    for index in range(200):
        before = s.totals["preemptions_total"]
        batch = s.schedule()  # while the one before is under way
        waited += not batch.spans
        under_way += [batch] if batch.spans else []
        s.update(result(under_way.pop(0)))
        under_way = under_way or [s.schedule()]
        made += [index] if s.totals["preemptions_total"] > before else []
        assert not made or s.blocks.num_free < 20, "and little memory is left idle for it"
    assert waited == len(made) >= 3
    assert made[-1] - made[0] >= STEPS_OF_ROOM * (len(made) - 1)


def test_end_of_text_ends_unless_ignored():
    for ignore, reasons in ((False, ["stop"]), (True, [None, None, "length"])):
        s = scheduler(FORMATS[0])
        s.add(request("a", 3, 3, ignore_eos=ignore), 0)
        seen = []
        while s.has_work:
            batch = s.schedule()
            seen += [t.finish_reason for t in s.update(result(batch, lambda: 1))]
        assert seen == reasons


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "says"),
    [
        (0, 5, "prompt", "empty"),
        (512, None, "prompt", "context of 512"),
        (10, 0, "max_tokens", "at least 1"),
        (10, -3, "max_tokens", "at least 1"),
        (10, 503, "max_tokens", "at most 502"),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, max_tokens, param, says):
    s = scheduler(FORMATS[1])
    with pytest.raises(RequestError, match=says) as caught:
        s.add(request("x", prompt, max_tokens), 0)
    assert caught.value.param == param and not s.has_work


@pytest.mark.parametrize(
    ("field", "values"),
    [("temperature", (-0.1, float("nan"), float("inf"))), ("top_p", (0.0, 1.1, float("nan"))), ("top_k", (-1,))],
)
def test_sampling_outside_its_range_is_refused(field, values):
    s = scheduler(FORMATS[0])
    for value in values:
        with pytest.raises(RequestError, match=field) as caught:
            s.add(request("x", 3, 3, **{field: value}), 0)
        assert caught.value.param == field and not s.has_work


def test_a_request_that_exceeds_the_cache_is_refused_and_the_largest_that_fits_runs():
    for fmt in FORMATS:
        s = scheduler(fmt, num_blocks=3, context=10_000)
        fits = max(n for n in range(1, 1000) if fmt.num_blocks(n - 1) <= 3)
        with pytest.raises(RequestError, match="KV cache"):
            s.add(request("x", 10, fits - 9), 0)
        s.add(request("y", 10, fits - 10, ignore_eos=True), 0)
        while s.has_work:
            batch = s.schedule()
            check(s, batch)
            s.update(result(batch))


def test_a_grammar_waits_for_its_own_tokens_only():
    tested = scheduler(FORMATS[0], budget=16)
    tested.add(request("free", 5, 9), 0)
    tested.add(request("bound", 30, 2, grammar=Grammar("regex", "a+")), 0)
    steps, awaited = [], []
    while tested.has_work:
        batch = tested.schedule()
        steps.append(sorted(sample.id for sample in batch.samples))
        awaited.append(tested.awaits_tokens)
        tested.update(result(batch))
        assert not tested.awaits_tokens
    assert awaited == ["bound" in samples for samples in steps]
    assert awaited[:2] == [False, False] and sum(awaited) == 2


def test_stages_of_a_pipeline_have_steps_of_their_own():
    """Each sequence is in one of them, none before its last token is known; a prompt's chunks follow each other."""
    s = scheduler(FORMATS[0], num_blocks=40, seqs=6, budget=64, micro_batches=3)
    s.add(request("long", 150, 9), seed=0)
    assert [[span.length for span in s.schedule().spans] for _ in range(4)] == [[64], [64], [22], []]
    for _ in range(2):
        assert s.update(StepResult([], [], [[]])) == []
    assert [tokens.id for tokens in s.update(StepResult([7], [None], [[]]))] == ["long"]
    for name in "abcde":
        s.add(request(name, 5, 9), seed=0)
    step(s)
    batches = [s.schedule() for _ in range(4)]
    assert [sorted(span.id for span in batch.spans) for batch in batches] == [["a", "long"], ["b", "c"], ["d", "e"], []]
    for batch in batches[:3]:
        assert len(s.update(result(batch))) == 2
    while s.has_work:
        step(s)
    assert s.blocks.num_used == 0
