"""Speculative decoding: what comes out is what would have come out without it, in fewer steps."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions, SpeculationConfig
from kvtool.engine import Engine
from kvtool.errors import KVToolError
from kvtool.kv.blocks import BlockPool
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.visibility import visible
from kvtool.request import VOID, Request, Sample, SamplingParams, ScheduledSpan, StepResult, Tokens
from kvtool.sampler import Drafts, Sampler, reject, verify
from kvtool.scheduler import Scheduler
from kvtool.server.metrics import EngineCollector
from kvtool.speculation import LONGEST, SHORTEST, DraftCache, NGrams, Pace, other_seed

MIB = 1 << 20
FORMATS = {
    "16": KVOptions(),
    "4": KVOptions(nbits="4", q_group_size=32),
    "2, window": KVOptions(nbits="2", q_group_size=32, residual_length=32),
    "4, on write": KVOptions(nbits="4", axis_key="token", rotate=True),
}
SPEC = KVSpec(1, StreamSpec(1, 32), StreamSpec(1, 32), 4)
SCHEDULED = [resolve(options, SPEC) for options in FORMATS.values()]
NGRAM = SpeculationConfig("ngram")
OWN = SpeculationConfig("draft", draft_model="the model itself")


def scheduler(
    fmt: KVFormat, num_blocks: int, seqs: int = 4, budget: int = 1000, draft_cache: DraftCache | None = None
) -> Scheduler:
    return Scheduler(
        fmt,
        num_blocks=num_blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=512,
        eos_token_ids=[],
        speculation=SpeculationConfig("draft" if draft_cache else "ngram"),
        draft_cache=draft_cache,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that looks at its newest token above all, so that it soon repeats itself."""
    folder = tmp_path_factory.mktemp("model")
    oracle = make_checkpoint("qwen2", folder, tie_word_embeddings=True)
    for layer in oracle.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.2
    oracle.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def make(model: str) -> Callable[..., Engine]:
    def make(speculation: SpeculationConfig | None, kv: KVOptions = FORMATS["16"], **overrides: object) -> Engine:
        if speculation is OWN:
            speculation = replace(OWN, draft_model=model)
        settings = {"dtype": "float64", "device": "cpu", "kv_cache_memory": 16 * MIB, "max_num_seqs": 8} | overrides
        made = Engine(EngineConfig(model=model, kv=kv, speculation=speculation, **settings))  # type: ignore[arg-type]
        made.scheduler.drafting.pace.observe = lambda *step: None  # type: ignore[method-assign]  # whatever it costs here
        return made

    return make


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(8, 199) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def answers(engine: Engine, asked: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], int]:
    """What is answered, and in how many steps."""
    steps, step = 0, engine.step

    def counted() -> list[object]:
        nonlocal steps
        steps += 1
        return step()  # type: ignore[return-value]

    engine.step = counted  # type: ignore[method-assign, assignment]
    return [completion.token_ids for completion in engine.generate(asked, params)], steps


def sealed(engine: Engine) -> dict[bytes, bytes]:
    """The bytes of all blocks that can be found again, by digest."""
    found = engine.scheduler.blocks._by_digest
    return {digest: engine.runner.store.gather_blocks([block]).numpy().tobytes() for digest, block in found.items()}


@pytest.mark.parametrize("speculation", [NGRAM, OWN], ids=["ngram", "draft"])
@pytest.mark.parametrize(
    ("kv", "temperature", "top_p"),
    [*((kv, 0, 1) for kv in FORMATS.values()), (FORMATS["4"], 0.4, 0.9)],
    ids=[*FORMATS, "4, sampled"],
)
def test_tokens_and_packed_bytes_are_those_without_it_and_steps_are_fewer(make, kv, speculation, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=2, max_tokens=100, ignore_eos=True)
    asked, plain, drafting = prompts(3), make(None, kv), make(speculation, kv, run_ahead=True)
    expected, steps = answers(plain, asked, params)
    assert len(set(map(tuple, expected))) == 3
    got, fewer = answers(drafting, asked, params)
    assert got == expected
    stats = drafting.stats()
    assert stats.drafted_total > 0 and (stats.accepted_total > 0 or speculation is NGRAM)
    if speculation is OWN:
        assert stats.accepted_total == stats.drafted_total, "it agrees with itself, so nothing is taken back"
        assert fewer <= steps // 3
    if kv == FORMATS["16"]:  # the last bit depends on what runs beside; in packed formats it flips no code
        pairs = zip(*(sorted(sealed(tested).items()) for tested in (drafting, plain)), strict=True)
        assert all(a == b and np.allclose(*map(np.frombuffer, (x, y))) for (a, x), (b, y) in pairs)
    else:
        assert sealed(drafting) == sealed(plain)
    assert drafting.scheduler.blocks.num_used == 0


def log_probabilities(engine: Engine, token_ids: list[int]) -> dict[int, float]:
    """Of the most likely next tokens."""
    engine.submit(Request("0", token_ids, SamplingParams(temperature=0, max_tokens=1, logprobs=8)))
    news = [tokens for _ in iter(lambda: engine.has_work, False) for tokens in engine.step()]
    (row,) = (row for tokens in news for row in tokens.logprobs or ())
    return dict(zip(row.top_ids, row.top_logprobs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("nbits", ["16", "4"])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_graphs_draft_and_verify(nbits, cuda_graph):
    """In bf16: `tiny` drafts for itself, and says what it says without, but where two tokens are as good."""
    config = EngineConfig(kv=KVOptions(nbits=nbits), kv_cache_memory=256 * MIB, cuda_graph=cuda_graph, max_num_seqs=8)
    asked = [[256 + 7 * i + n for i in range(30 + n)] for n in range(6)]
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    plain = Engine(config)
    expected = [completion.token_ids for completion in plain.generate(asked, params)]
    drafting = Engine(replace(config, speculation=SpeculationConfig("draft", draft_model="tiny")))
    drafting.scheduler.drafting.pace.observe = lambda *step: None
    got = [completion.token_ids for completion in drafting.generate(asked, params)]
    stats = drafting.stats()
    assert stats.accepted_total > 0.9 * stats.drafted_total > 0
    for prompt, said, unaided in zip(asked, got, expected, strict=True):
        apart = next((i for i, pair in enumerate(zip(said, unaided, strict=True)) if pair[0] != pair[1]), None)
        if apart is not None:
            likely = log_probabilities(plain, prompt + unaided[:apart])
            assert likely[unaided[apart]] - likely.get(said[apart], -math.inf) < 0.2
    sampled = drafting.generate(asked, SamplingParams(temperature=1, top_p=0.9, max_tokens=60, ignore_eos=True))
    assert all(len(completion.token_ids) == 60 for completion in sampled)


def test_a_request_can_go_without_it_and_some_must(make):
    tested, plain = make(NGRAM), make(None)
    asked = {
        "switched off": SamplingParams(temperature=0, max_tokens=30, speculate=False),
        "penalised": SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.2),
        "scored": SamplingParams(temperature=0, max_tokens=30, logprobs=3, min_tokens=20),
        "stopped": SamplingParams(temperature=0, max_tokens=100, stop_token_ids=[9, 77, 150]),
    }
    for params in asked.values():
        assert answers(tested, prompts(4), params)[0] == answers(plain, prompts(4), params)[0]


def test_log_probabilities_are_those_without_it(make):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    said = []
    for tested in (make(OWN), make(None)):
        tested.submit(Request("0", prompts(1)[0], params))
        news = [tokens for _ in iter(lambda tested=tested: tested.has_work, False) for tokens in tested.step()]
        assert all(len(tokens.logprobs or ()) == len(tokens.token_ids) for tokens in news)
        said.append([row for tokens in news for row in tokens.logprobs or ()])
    assert [row.top_ids for row in said[0]] == [row.top_ids for row in said[1]]
    values = [[value for row in rows for value in (row.logprob, *row.top_logprobs)] for rows in said]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


@pytest.mark.parametrize("speculation", [NGRAM, OWN], ids=["ngram", "draft"])
def test_tokens_are_the_same_when_sequences_make_room_and_share_beginnings(make, speculation):
    params, kv = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True), FORMATS["4"]
    asked = prompts(4)
    asked += [asked[3] * 2, [*asked[3], *asked[3], 9]]
    roomy = make(None, kv, prefix_caching=False)
    layout = roomy.runner.store.layout
    memory = (layout.format.num_blocks(280) + 4) * layout.block_bytes + 4 * layout.tail_bytes
    memory *= 2 if speculation is OWN else 1  # half is the draft model's
    tight = make(speculation, kv, max_num_seqs=4, kv_cache_memory=memory, swap_space=MIB, max_num_batched_tokens=40)
    assert answers(tight, asked, params)[0] == answers(roomy, asked, params)[0]
    stats = tight.stats()
    assert stats.preemptions_total > 0 and stats.prefix_hits_total > 0 and stats.drafted_total > 0


@pytest.mark.parametrize("speculation", [NGRAM, OWN], ids=["ngram", "draft"])
def test_ranks_together_answer_as_one_does(make, speculation):
    params, kv = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), FORMATS["4"]
    ranks = make(speculation, kv, tp=2)
    try:
        assert answers(ranks, prompts(3), params)[0] == answers(make(None, kv), prompts(3), params)[0]
        assert ranks.stats().drafted_total > 0
    finally:
        ranks.close()


def test_drafts_that_spoil_a_cache_are_taken_back_with_it():
    """A step that failed with drafts is tried again without; so is one in which a wrong draft made NaN."""
    tested = scheduler(SCHEDULED[0], num_blocks=8)
    tested.add(Request("0", [5, 6] * 20, SamplingParams(max_tokens=9, ignore_eos=True)), seed=0)

    def step(token_ids: list[int]) -> list[Tokens]:
        batch = tested.schedule()
        assert len(batch.samples) == len(token_ids)
        return tested.update(StepResult(token_ids, [None] * len(token_ids), [[] for _ in batch.spans]))

    assert step([5])[0].token_ids == [5]
    assert step([6, 9, VOID, VOID, VOID - 1])[0].token_ids == [6, 9]
    (again,) = tested.schedule().spans
    assert (again.start, again.end) == (0, 43), "computed again"
    tested.update(StepResult([5], [None], [[]]))
    assert step([6])[0].token_ids == [6], "without drafts"
    tested = scheduler(SCHEDULED[0], num_blocks=8)
    tested.add(Request("0", [5, 6] * 20, SamplingParams(max_tokens=9, ignore_eos=True)), seed=0)
    assert step([5])[0].token_ids == [5]
    assert len(tested.schedule().samples) == 5
    assert tested.fail("the format cannot hold it") == []
    assert step([6])[0].token_ids == [6]
    assert len(tested.schedule().samples) == 1
    assert tested.fail("the format cannot hold it")[0].error


@pytest.mark.parametrize(
    ("speculation", "others", "says"),
    [
        (SpeculationConfig("ngram", 17), {}, "--num-speculative-tokens 17: must be from 1 to 16"),
        (NGRAM, {"pp": 2}, "--speculate and --pp do not go together"),
        (SpeculationConfig("draft"), {}, "--speculate draft needs --draft-model"),
        (SpeculationConfig("draft", draft_model="tiny"), {}, "--draft-model tiny: its vocabulary is not that of"),
        (SpeculationConfig("draft", draft_model="/no/such"), {}, "--draft-model /no/such: no such folder"),
    ],
)
def test_what_cannot_be_is_refused(make, speculation, others, says):
    with pytest.raises(KVToolError, match=says):
        make(speculation, **others)


# What is drafted, and what becomes of it


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 7))
def test_what_followed_the_longest_ngram_last_is_proposed(tokens, count, stride):
    ngrams = NGrams()
    for length in range(1, len(tokens) + 1, stride):
        known, proposed = tokens[:length], ngrams.propose(tokens[:length], count)
        for n in range(LONGEST, SHORTEST - 1, -1):
            ends = [end for end in range(n, length) if n <= length and known[end - n : end] == known[-n:]]
            if ends:
                continued = known[ends[-1] :]
                assert proposed == (continued * count)[:count]
                break
        else:
            assert proposed == []


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=5))
def test_tokens_count_up_to_the_first_that_is_not_as_drafted(rows):
    """Each row: the tokens sampled, -1 where not finite, and whether the draft before each was right."""
    recent = torch.full((4, len(rows) + 1), 99)
    token_ids, samples, expected, newest = [], [], [], []
    for slot, row in enumerate(rows):
        drawn = [token - 1 for token, _ in row]
        for index, (_, right) in enumerate(row[1:]):
            recent[1 + index, slot] = drawn[index] if right and drawn[index] >= 0 else 50
        count = next((i for i, (_, right) in enumerate(row[1:]) if not (right and drawn[i] >= 0)), len(row) - 1)
        voids = [VOID - (token < 0) for token in drawn[count + 1 :]]
        expected += [*drawn[: count + 1], *voids]
        newest.append(max(drawn[count], 0))
        token_ids += drawn
        samples += [sample(slot, position) for position in range(len(row))]
    got = verify(torch.tensor(token_ids), Drafts.send(samples, torch.device("cpu")), recent)
    assert got.tolist() == expected
    assert recent[0].tolist() == [*newest, 99]


def sample(slot: int, position: int, seed: int = 0, **params: float) -> Sample:
    return Sample(
        id=str(slot),
        span=0,
        slot=slot,
        position=position,
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=seed,
        num_generated=position,
    )


def p_value(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square test: how often so much would come by chance."""
    statistic = ((seen - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item()


@pytest.mark.parametrize("params", [{"temperature": 0.5}, {"temperature": 1}, {"temperature": 1.6, "top_p": 0.8}])
def test_what_is_accepted_and_what_replaces_it_has_the_targets_distribution(params):
    """4,000 sequences draft the same two tokens. Chi-square of the first token, and of the second where it counts."""
    count, vocab = 4000, 6
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    recent = torch.zeros(3, count + 1, dtype=torch.int64)
    recent[1], recent[2] = 2, 4
    samples = [sample(slot, position, seed=slot, **params) for slot in range(count) for position in (0, 1, 2)]
    token_ids = Sampler(recent[0]).sample(logits[[0, 1, 0]].repeat(count, 1), samples)
    kept = verify(token_ids, Drafts.send(samples, torch.device("cpu")), recent).view(count, 3)
    for column, tokens in enumerate((kept[:, 0], kept[kept[:, 0] == 2, 1])):
        probs = distribution(logits[column], **params)
        seen = torch.bincount(tokens, minlength=vocab)
        assert seen[probs == 0].sum() == 0
        assert len(tokens) > 200
        assert p_value(seen[probs > 0], len(tokens) * probs[probs > 0]) > 0.001
    assert (kept[kept[:, 0] != 2][:, 1:] == VOID).all()


@pytest.mark.parametrize("params", [{"temperature": 0.5}, {"temperature": 1}, {"temperature": 1.6, "top_p": 0.8}])
def test_rejection_keeps_the_targets_distribution_and_accepts_the_overlap_of_both(params):
    """8,000 sequences draw two tokens each from a draft's distributions, which know fewer ids than the target's."""
    count, vocab = 8000, 7
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    draft_logits = torch.randn(2, vocab - 1, generator=generator, dtype=torch.float64) + logits[:2, :-1]
    recent = torch.zeros(3, count + 1, dtype=torch.int64)
    drawn = [sample(slot, index, seed=other_seed(slot), **params) for index in (0, 1) for slot in range(count)]
    for index in (0, 1):
        Sampler(recent[1 + index]).sample(draft_logits[[index]].expand(count, -1), drawn[index * count :][:count])
    samples = [sample(slot, index, seed=slot, **params) for slot in range(count) for index in (0, 1, 2)]
    token_ids = Sampler(recent[0]).sample(logits.repeat(count, 1), samples).view(count, 3)
    for index in (0, 1):
        rows = [samples[3 * slot + index] for slot in range(count)]
        sides = (x[[index]].expand(count, -1) for x in (logits, draft_logits))
        token_ids[:, index] = reject(token_ids[:, index], *sides, recent[1 + index, :count], rows)
    kept = verify(token_ids.flatten(), Drafts.send(samples, torch.device("cpu")), recent).view(count, 3)
    first, second = recent[1, :count], recent[2, :count]
    for column, tokens in enumerate((kept[:, 0], kept[kept[:, 0] == first, 1], kept[kept[:, 2] != VOID, 2])):
        probs = distribution(logits[column], **params)
        seen = torch.bincount(tokens, minlength=vocab)
        assert seen[probs == 0].sum() == 0
        assert p_value(seen[probs > 0], len(tokens) * probs[probs > 0]) > 0.001
    for column, drafted, reached in ((0, first, first == first), (1, second, kept[:, 0] == first)):
        q = torch.cat([distribution(draft_logits[column], **params), torch.zeros(1, dtype=torch.float64)])
        overlap = torch.minimum(distribution(logits[column], **params), q).sum().item()
        assert (kept[reached, column] == drafted[reached]).double().mean().item() == pytest.approx(overlap, abs=0.03)


def distribution(logits: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """What is sampled from: the most likely tokens that make up top_p."""
    probs = (logits / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    below = probs[order].cumsum(0) - probs[order] < top_p
    probs = torch.zeros_like(probs).index_put((order[below],), probs[order[below]])
    return probs / probs.sum()


def test_requests_without_a_seed_are_drafted_by_rejection(make):
    """A model that drafts for itself is always right then, too: p and q are the same."""
    tested = make(OWN)
    params = SamplingParams(temperature=1.2, top_p=0.9, max_tokens=80, ignore_eos=True)
    assert len({tuple(answer) for answer in answers(tested, [[9, 10]] * 3, params)[0]}) == 3
    stats = tested.stats()
    assert stats.accepted_total == stats.drafted_total > 100
    answers(tested, prompts(3), msgspec.structs.replace(params, seed=4))
    assert tested.stats().accepted_total > stats.accepted_total


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_no_verification_completes_a_block(make, kv):
    """Blocks that hold several tokens' scales are sealed by a step of one token; rows are never written twice."""
    tested = make(NGRAM, kv)
    fmt, schedule = tested.runner.store.format, tested.scheduler.schedule
    lengths: Counter[int] = Counter()

    def watched():
        batch = schedule()
        drafted = {span.id for span in batch.spans if span.draft}
        for span in batch.spans:
            lengths[span.draft] += 1
            if span.id in drafted and not fmt.packs_on_write:
                first = visible(span.start, fmt.block_size, fmt.residual)
                assert visible(span.end, fmt.block_size, fmt.residual) == first
        return batch

    tested.scheduler.schedule = watched
    answers(tested, prompts(3), SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    assert set(lengths) == {0, 1, 2, 3, 4}


# What is computed of whom


class Memory:
    """A cache that remembers which token stands where: in the row of a block, or of a tail."""

    def __init__(self, fmt: KVFormat) -> None:
        self.format, self.rows = fmt, {}

    def place(self, span: ScheduledSpan, position: int) -> tuple[str, int, int]:
        fmt = self.format
        if fmt.packs_on_write:
            return "block", span.blocks[position // fmt.block_size], position % fmt.block_size
        return "tail", span.slot, position % fmt.tail_tokens

    def read(self, span: ScheduledSpan, position: int) -> int:
        fmt = self.format
        if position < fmt.packed_tokens(span.start):
            return self.rows["block", span.blocks[position // fmt.block_size], position % fmt.block_size]
        return self.rows[self.place(span, position)]

    def write(self, span: ScheduledSpan, tokens: list[int]) -> None:
        """One after the other, and into blocks what a token completes."""
        fmt = self.format
        for position, token in zip(range(span.start, span.end), tokens, strict=True):
            self.rows[self.place(span, position)] = token
            for packed in range(fmt.packed_tokens(position), fmt.packed_tokens(position + 1)):
                if not fmt.packs_on_write:
                    row = self.rows[self.place(span, packed)]
                    self.rows["block", span.blocks[packed // fmt.block_size], packed % fmt.block_size] = row


@settings(deadline=None, max_examples=25)
@given(
    fmt=st.sampled_from(SCHEDULED),
    draft_format=st.sampled_from([None, *SCHEDULED]),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_accepted_caches_hold_what_was_said(fmt, draft_format, seed):
    """A runner that makes up tokens and is often right about them; every query finds all that was before it."""
    rng = random.Random(seed)
    cache = draft_format and DraftCache(draft_format, BlockPool(rng.randint(4, 40)), 400)
    tested = scheduler(
        fmt, rng.randint(8, 20), seqs=rng.randint(1, 5), budget=rng.choice([7, 64, 1000]), draft_cache=cache
    )
    memory, drafts = Memory(fmt), Memory(draft_format or fmt)
    lengths = {str(i): (rng.randint(1, 150), rng.randint(1, 90)) for i in range(8)}

    def truth(name: str, position: int) -> int:
        return (position * position // 7) % (3 + int(name)) + 1

    said: dict[str, list[int]] = {name: [] for name in lengths}
    for name, (prompt, answer) in lengths.items():
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        tested.add(Request(name, [truth(name, p) for p in range(prompt)], params), seed=0)
    while tested.has_work:
        batch = tested.schedule()
        assert 0 < sum(span.length for span in batch.spans) <= tested.max_num_batched_tokens
        drafted = {}
        for draft in batch.drafts:
            name = next(span.id for span in batch.spans if span.slot == draft.slot)
            if draft.question:
                for position in range(draft.question.span.start):
                    assert drafts.read(draft.question.span, position) == truth(name, position)
                drafts.write(draft.question.span, list(draft.question.span.token_ids))
            end = next(span.end for span in batch.spans if span.slot == draft.slot)
            guesses = [truth(name, end + i) if rng.random() < 0.8 else 0 for i in range(draft.num_tokens)]
            drafted[draft.slot] = list(draft.token_ids) or guesses
            for index in range(draft.num_tokens - 1 if draft.question else 0):
                step = ScheduledSpan(
                    id=name, slot=draft.slot, start=end + index, end=end + index + 1, blocks=draft.question.span.blocks
                )
                drafts.write(step, [drafted[draft.slot][index]])
        for span in batch.spans:
            first = next(other for other in batch.spans if other.slot == span.slot)
            for position in range(first.start):
                assert memory.read(first, position) == truth(span.id, position)
            tokens = list(span.token_ids) or [truth(span.id, span.start)]
            memory.write(span, [drafted[span.slot][span.draft - 1]] if span.draft else tokens)
        token_ids, holds = [], {}
        for sample in batch.samples:
            behind = batch.spans[sample.span].draft
            if behind:
                right = drafted[sample.slot][behind - 1] == truth(sample.id, sample.position - 1)
                holds[sample.slot] = holds.get(sample.slot, True) and right
            token_ids.append(truth(sample.id, sample.position) if not behind or holds[sample.slot] else VOID)
        result = StepResult(token_ids, [None] * len(token_ids), [[] for _ in batch.spans])
        for news in tested.update(result, seconds=rng.random()):  # more and fewer are drafted
            said[news.id] += news.token_ids
    assert said == {n: [truth(n, prompt + i) for i in range(answer)] for n, (prompt, answer) in lengths.items()}
    assert tested.blocks.num_used == 0 and (cache is None or cache.blocks.num_used == 0)
    assert tested.totals["drafted_total"] > 0 or cache


# Whether it pays


def paced(pace: Pace, seconds: Callable[[int, int], float], right: float, batch: int, steps: int) -> Counter[int]:
    """What is drafted in so many steps that take `seconds` of batch and tokens, of which a share is right."""
    rng, chosen = random.Random(1), Counter()
    for _ in range(steps):
        drafted = pace.num_tokens
        chosen[drafted] += 1
        for _ in range(batch if drafted else 0):
            accepted = next((i for i in range(drafted) if rng.random() > right), drafted)
            pace.count(drafted, accepted)
        pace.observe(batch, drafted, batch if drafted else 0, seconds(batch, drafted) * rng.uniform(0.97, 1.03))
    return chosen


def bound(batch: int, drafted: int) -> float:
    """A step bound by memory up to 64 tokens, and a draft of a tenth of it."""
    return max(1.0, batch * (1 + drafted) / 64) + 0.1 * drafted


@pytest.mark.parametrize(
    ("right", "batch", "drafted", "off"),
    [(0.9, 1, {4}, ""), (0.6, 1, {2, 3, 4}, ""), (0.05, 1, {0}, "acceptance"), (0.7, 64, {0}, "batch")],
)
def test_as_many_are_drafted_as_pay(right, batch, drafted, off):
    pace = Pace(4)
    chosen = paced(pace, bound, right, batch, 2000)
    assert pace.off == off
    assert sum(chosen[count] for count in drafted) > 0.9 * 2000
    best = max(range(5), key=lambda k: sum(right**i for i in range(k + 1)) / bound(batch, k))
    assert best in drafted


def test_a_draft_that_takes_as_long_as_the_model_is_given_up():
    pace = Pace(4)
    assert paced(pace, lambda batch, drafted: 1.0 + drafted, 0.95, 1, 500)[0] > 450
    assert pace.off == "cost"


def test_it_comes_back_when_it_pays_again():
    pace = Pace(4)
    paced(pace, bound, 0.05, 1, 1000)
    assert pace.off == "acceptance"
    chosen = paced(pace, bound, 0.95, 1, 6000)
    assert pace.off == "" and chosen[4] > 3000


def test_a_large_batch_turns_it_off_and_a_small_one_on():
    pace = Pace(4)
    assert paced(pace, bound, 0.9, 1, 300)[4] > 250
    assert paced(pace, bound, 0.9, 100, 300)[0] > 250 and pace.off == "batch"
    assert paced(pace, bound, 0.9, 300, 30)[0] == 30
    assert paced(pace, bound, 0.9, 2, 600)[4] > 300 and pace.off == ""
    assert pace.for_sequence(0.01) == 1 and pace.for_sequence(0.3) == 2 and pace.for_sequence(0.9) == 4


def test_metrics_say_what_is_drafted_and_why_not(make):
    tested = make(NGRAM)
    answers(tested, prompts(2), SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    tested.scheduler.drafting.pace.num_tokens, tested.scheduler.drafting.pace.off = 0, "batch"
    stats = tested.stats()
    client = SimpleNamespace(info=tested.info, stats=stats, expert_tokens={})
    families = {family.name: family for family in EngineCollector(client, "m").collect()}  # type: ignore[arg-type]
    values = {name: family.samples[0].value for name, family in families.items()}
    assert values["vllm:spec_decode_num_drafts"] == stats.verifications_total > 0
    assert values["vllm:spec_decode_num_draft_tokens"] == stats.drafted_total
    assert values["vllm:spec_decode_num_accepted_tokens"] == stats.accepted_total
    assert values["kvtool:speculative_tokens"] == 0
    reasons = {sample.labels["reason"]: sample.value for sample in families["kvtool:speculation_off"].samples}
    assert reasons["batch"] == 1
