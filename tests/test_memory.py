"""The scheduler's memory plans, carried out on a machine whose blocks and tails hold plain token ids.

Whatever is shared, swapped, forked, computed again or aborted: every span must find all tokens before it where the
format says that they stand.
"""

import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.request import EngineStats, Memory, Request, SamplingParams, ScheduledBatch, StepResult, Tokens
from kvtool.scheduler import Scheduler

SPEC = KVSpec(2, StreamSpec(2, 32), StreamSpec(2, 32), 4)
FORMATS = {
    "on write": resolve(KVOptions(), SPEC),
    "sealed": resolve(KVOptions(nbits="4", q_group_size=32), SPEC),
    "window": resolve(KVOptions(nbits="2", q_group_size=32, residual_length=64), SPEC),
}
TAIL_UNITS = 3
NAN = -2  # a token whose keys and values are not finite; an answer after it is not either


class Machine:
    """A runner of token ids. `truth` holds each request's tokens, those that the scheduler has yet to hear of, too.

    Args:
        ahead: a step is scheduled and run before the scheduler hears what the one before it yielded.
    """

    def __init__(self, fmt: KVFormat, scheduler: Scheduler, ahead: bool = False) -> None:
        self.format, self.scheduler, self.truth = fmt, scheduler, dict[str, list[int]]()
        self.ahead, self.under_way = ahead, deque[tuple[ScheduledBatch, list[int]]]()
        self.blocks = [[-1] * fmt.block_size for _ in range(scheduler.blocks.num_blocks)]
        self.tails = [[-1] * fmt.tail_tokens for _ in range(scheduler.slots.num_slots)]
        self.units: list[list[int]] = [[] for _ in range(scheduler.swap.num_blocks)]
        self.newest = [-1] * scheduler.slots.num_slots
        self.seen: list[list[int]] = [[] for _ in self.newest]
        self.said = dict[str, int]()  # of `truth`, by the scheduler

    def submit(self, request: Request) -> None:
        self.truth[request.id], self.said[request.id] = list(request.prompt), len(request.prompt)
        self.scheduler.add(request, seed=0)

    def step(self, rng: random.Random) -> list[Tokens]:
        batch = self.scheduler.schedule()
        if batch.spans:
            self.under_way.append((batch, self._run(batch, rng)))
            if self.ahead and len(self.under_way) == 1:
                return []
        batch, tokens = self.under_way.popleft()
        news = self.scheduler.update(StepResult(tokens, [None] * len(tokens), [[] for _ in batch.spans]))
        for tokens_of_one in news:
            for token in tokens_of_one.token_ids:
                assert token == self.truth[tokens_of_one.id][self.said[tokens_of_one.id]]
                self.said[tokens_of_one.id] += 1
        self._check_ownership()
        self._check_what_is_left()
        return news

    def _run(self, batch: ScheduledBatch, rng: random.Random) -> list[int]:
        assert sum(span.length for span in batch.spans) <= self.scheduler.max_num_batched_tokens
        self._move(batch)
        for span in batch.spans:
            truth = self.truth[span.id]
            ids = span.token_ids or [self.newest[span.slot]]
            assert ids == truth[span.start : span.end], "these tokens are computed"
            assert self._read(span.blocks, span.slot, span.start) == truth[: span.start], "and read those before"
            self._write(ids, span.blocks, span.slot, span.start)
        for fork in batch.forks:
            self.tails[fork.slot] = self.tails[fork.source_slot].copy()
            if fork.block >= 0:
                self.blocks[fork.block] = self.blocks[fork.source_block].copy()
        tokens = [-1 if NAN in self.truth[sample.id] else rng.randrange(5) for sample in batch.samples]
        for sample, token in zip(batch.samples, tokens, strict=True):
            assert len(self.truth[sample.id]) == sample.position
            assert batch.spans[sample.span].end == sample.position
            if sample.params.looks_back:
                self.seen[sample.slot] = sample.history or self.seen[sample.slot]
                assert self.seen[sample.slot] == self.truth[sample.id], "penalties count these"
                self.seen[sample.slot] = [*self.seen[sample.slot], max(0, token)]
            self.newest[sample.slot] = max(0, token)  # what a runner goes on with if it must
            self.truth[sample.id].append(max(0, token))
        return tokens

    def _move(self, batch: ScheduledBatch) -> None:
        for out in batch.swap_outs:
            images = [self.blocks[block].copy() for block in out.memory.blocks]
            images += [self.tails[out.memory.slot].copy()] * self.scheduler.memory.tail_units
            for unit, image in zip(out.units, images, strict=True):
                self.units[unit] = image
        for memory in batch.wipes:
            self._wipe(memory)
        for back in batch.swap_ins:
            for unit, block in zip(back.units, back.memory.blocks, strict=False):
                self.blocks[block] = self.units[unit].copy()
            if self.scheduler.memory.tail_units:
                assert len(back.units) == len(back.memory.blocks) + self.scheduler.memory.tail_units
                self.tails[back.memory.slot] = self.units[back.units[-1]].copy()

    def _wipe(self, memory: Memory) -> None:
        for block in memory.blocks:
            self.blocks[block] = [-1] * self.format.block_size
        self.tails[memory.slot] = [-1] * self.format.tail_tokens

    def _read(self, blocks: list[int], slot: int, start: int) -> list[int]:
        """What a query at `start` finds before itself."""
        packed, size = min(start, self.format.visible(start)), self.format.block_size
        far = [self.blocks[blocks[p // size]][p % size] for p in range(packed)]
        return far + [self.tails[slot][p % self.format.tail_tokens] for p in range(packed, start)]

    def _write(self, ids: list[int], blocks: list[int], slot: int, start: int) -> None:
        """One token after the other, as if each were a decode: chunks must not differ from that."""
        size = self.format.block_size
        for position, token in enumerate(ids, start):
            if self.format.packs_on_write:
                self.blocks[blocks[position // size]][position % size] = token
                continue
            self.tails[slot][position % self.format.tail_tokens] = token
            first = self.format.visible(position)
            if self.format.visible(position + 1) > first:
                ring = [self.tails[slot][p % self.format.tail_tokens] for p in range(first, first + size)]
                self.blocks[blocks[first // size]] = ring

    def _check_ownership(self) -> None:
        """Sequences share complete blocks only, and count each once."""
        s, size = self.scheduler, self.format.block_size
        owners = Counter(block for sequence in s.running for block in sequence.blocks)
        assert len(owners) == s.blocks.num_used
        assert all(s.blocks.owners(block) == count for block, count in owners.items())
        for sequence in s.running:
            complete = self.format.packed_tokens(sequence.num_computed_tokens) // size
            assert all(owners[block] == 1 for block in sequence.blocks[complete:]), "what is written has one owner"
        units = [unit for sequence in s.waiting for unit in sequence.units]
        assert len(units) == len(set(units)) == s.swap.num_used
        slots = [sequence.slot for sequence in s.running]
        assert len(slots) == len(set(slots)) == s.slots.num_slots - s.slots.num_free

    def _check_what_is_left(self) -> None:
        """What is not finite lies with those alone who have yet to fail of it, or is about to be wiped."""
        failing = [sequence for sequence in self.scheduler.running if NAN in self.truth[sequence.id]]
        wipes = self.scheduler.memory.moves.wipes
        memories = [*(Memory(sequence.blocks, sequence.slot) for sequence in failing), *wipes]
        blocks, slots = {block for memory in memories for block in memory.blocks}, {memory.slot for memory in memories}
        assert not any(NAN in tokens for block, tokens in enumerate(self.blocks) if block not in blocks)
        assert not any(NAN in tokens for slot, tokens in enumerate(self.tails) if slot not in slots)


def machine(
    fmt: KVFormat,
    *,
    blocks: int,
    seqs: int,
    budget: int = 64,
    swap: int = 0,
    caching: bool = True,
    ahead: bool = False,
) -> Machine:
    scheduler = Scheduler(
        fmt,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=600,
        eos_token_ids=[],
        num_swap_units=swap,
        tail_units=TAIL_UNITS if fmt.tail_tokens else 0,
        cache_identity=b"test" if caching else None,
    )
    return Machine(fmt, scheduler, ahead)


def idle(m: Machine) -> None:
    """All memory has come back."""
    s = m.scheduler
    assert not s.has_work
    assert s.blocks.num_used == s.swap.num_used == 0 and s.slots.num_free == s.slots.num_slots


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_every_span_finds_what_came_before_it(fmt, seed):
    rng = random.Random(seed)
    m = machine(
        fmt,
        blocks=rng.randint(576, 1000) // fmt.block_size,
        seqs=rng.randint(1, 8),
        budget=rng.choice([3, 40, 300]),
        swap=rng.choice([0, 6, 30, 200]),
        caching=rng.random() < 0.8,
        ahead=rng.random() < 0.6,
    )
    beginnings = [[rng.randrange(5) for _ in range(200)] for _ in range(3)]
    if rng.random() < 0.3:
        beginnings[0][70] = NAN
    expected: dict[str, int] = {}
    for i in range(12):
        shared = rng.choice(beginnings)[: rng.choice([0, 0, 31, 32, 64, 100, 128, 200])]
        prompt = shared + [rng.randrange(5) for _ in range(rng.randint(1, 60))]
        if rng.random() < 0.1:
            prompt[rng.randrange(len(prompt))] = NAN
        salt = rng.choice(["", "", "other"])
        for fork in range(rng.choice([1, 1, 1, 4])):
            name = f"{i}.{fork}"
            expected[name] = rng.randint(1, 300)
            stop = [4] if rng.random() < 0.3 else []
            params = SamplingParams(max_tokens=expected[name], stop_token_ids=stop)
            m.submit(Request(name, prompt, params, salt, f"{i}.0" if fork else None))
    got: Counter[str] = Counter()
    while m.scheduler.has_work:
        for tokens in m.step(rng):
            got[tokens.id] += len(tokens.token_ids)
            if tokens.error:
                assert NAN in m.truth[tokens.id]
                expected.pop(tokens.id, None)
        if expected and rng.random() < 0.05:
            m.scheduler.abort(name := rng.choice(list(expected)))
            del expected[name]
        if rng.random() < 0.01:
            m.scheduler.flush_cache()
    for name, length in expected.items():
        answer = m.truth[name][m.said[name] - got[name] : m.said[name]]
        assert len(answer) == length or answer.index(4) == len(answer) - 1
    idle(m)


def run_all(m: Machine, seed: int = 0) -> EngineStats:
    rng = random.Random(seed)
    while m.scheduler.has_work:
        m.step(rng)
    idle(m)
    return m.scheduler.stats()


@pytest.mark.parametrize(("fmt", "ahead"), [*((fmt, False) for fmt in FORMATS.values()), (FORMATS["sealed"], True)])
def test_a_thousand_requests_are_served_in_turn_and_none_starves(fmt, ahead):
    """Arrivals at random, a pool that is far too small: who came first gets its first token first."""
    rng = random.Random(3)
    m = machine(fmt, blocks=1000 // fmt.block_size, seqs=12, budget=128, swap=24, ahead=ahead)
    arrived, answered, first, started = 0, 0, list[str](), set[str]()
    while answered < 1000:
        while arrived < 1000 and rng.random() < 0.3:
            prompt = [arrived % 7] * rng.randint(0, 90) + [rng.randrange(5) for _ in range(rng.randint(1, 90))]
            m.submit(Request(str(arrived), prompt, SamplingParams(max_tokens=rng.randint(1, 250))))
            arrived += 1
        if not m.scheduler.has_work:
            continue
        for tokens in m.step(rng):
            if tokens.id not in started:
                first.append(tokens.id)
                started.add(tokens.id)
            answered += tokens.finish_reason is not None
    idle(m)
    late = [place - int(name) for place, name in enumerate(first)]
    assert max(map(abs, late)) <= 12, "no later than those that ran beside it"
    stats = m.scheduler.stats()
    assert stats.preemptions_total > 10 and stats.swap_ins_total > 10


def test_a_prefix_is_found_as_far_as_it_is_sealed():
    for name, hit in (("on write", 128), ("sealed", 128), ("window", 0)):
        m = machine(FORMATS[name], blocks=30, seqs=2)
        m.submit(Request("a", list(range(150)), SamplingParams(max_tokens=3)))
        run_all(m)
        m.submit(Request("b", list(range(150)), SamplingParams(max_tokens=3)))
        m.submit(Request("c", [*range(140), 0, 0], SamplingParams(max_tokens=3)))
        m.submit(Request("d", list(range(128)), SamplingParams(max_tokens=3)))
        cached = {}
        while m.scheduler.has_work:
            for tokens in m.step(random.Random(0)):
                cached.setdefault(tokens.id, tokens.num_cached_tokens)
        size = FORMATS[name].block_size
        full = {"b": hit, "c": hit, "d": hit and 128 - size}  # the last token must be computed
        assert cached == full


def test_a_salt_keeps_prefixes_apart():
    m = machine(FORMATS["sealed"], blocks=30, seqs=2)
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        m.submit(Request(name, list(range(100)), SamplingParams(max_tokens=1), salt))
        run_all(m)
    stats = m.scheduler.stats()
    assert (stats.full_hits_total, stats.prefix_hits_total, stats.prefix_queries_total) == (1, 96, 300)


def test_a_flush_forgets_what_runs_and_what_is_swapped_too():
    m, rng = machine(FORMATS["sealed"], blocks=8, seqs=4, swap=100), random.Random(0)
    for i in range(4):
        m.submit(Request(str(i), [i] * 60, SamplingParams(max_tokens=150)))
    while m.scheduler.stats().swapped == 0:
        m.step(rng)
    m.scheduler.flush_cache()
    assert m.scheduler.stats().sealed_blocks == 0
    run_all(m)
    for i in reversed(range(4)):  # whose blocks were given up last, first: nothing has evicted them yet
        m.submit(Request(f"again {i}", m.truth[str(i)][:190], SamplingParams(max_tokens=1)))
        assert run_all(m).prefix_hits_total == 0


def test_forks_share_the_prompt_and_its_cost():
    for fmt in FORMATS.values():
        m = machine(fmt, blocks=30, seqs=8, budget=1000, caching=False)
        for i in range(4):
            m.submit(Request(str(i), list(range(150)), SamplingParams(max_tokens=40), fork_of="0" if i else None))
        m.step(random.Random(0))
        assert [s.num_computed_tokens for s in m.scheduler.running] == [150] * 4
        whole = fmt.packed_tokens(150) // fmt.block_size
        partial = fmt.num_blocks(150) - whole
        assert m.scheduler.blocks.num_used == whole + 4 * partial
        run_all(m)


def test_swap_needs_no_computing_again_and_a_full_one_falls_back_to_it():
    for swap, recomputes in ((100, False), (0, True)):
        m = machine(FORMATS["sealed"], blocks=8, seqs=4, swap=swap, caching=False)
        for i in range(4):
            m.submit(Request(str(i), [i] * 60, SamplingParams(max_tokens=150)))
        stats = run_all(m)
        assert stats.preemptions_total > 0
        assert (stats.recomputations_total == stats.preemptions_total) is recomputes
        assert (stats.swap_outs_total == stats.swap_ins_total > 0) is not recomputes


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("swap", [100, 0])
@pytest.mark.parametrize("ahead", [False, True])
def test_who_makes_room_before_its_first_token_leaves_nothing_unfit_behind(fmt, swap, ahead):
    """Nobody has looked yet whether what it stored is finite: `_check_what_is_left` does, after each step."""
    m = machine(fmt, blocks=fmt.num_blocks(300) + fmt.num_blocks(40) + 1, seqs=2, budget=3, swap=swap, ahead=ahead)
    m.submit(Request("old", [0] * 40, SamplingParams(max_tokens=240)))
    m.submit(Request("bad", [1, 1, NAN, *[1] * 297], SamplingParams(max_tokens=2)))
    stats = run_all(m)
    assert stats.preemptions_total > 0
