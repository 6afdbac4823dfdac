"""Speculative decoding: what comes out is what would have come out without it, in fewer steps."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions, SpeculationConfig
from kvtool.engine import Engine
from kvtool.kv.visibility import visible
from kvtool.request import VOID, Sample, SamplingParams
from kvtool.sampler import Drafts, Sampler, verify
from kvtool.speculation import LONGEST, SHORTEST, NGrams

MIB = 1 << 20
FORMATS = {
    "16": KVOptions(),
    "4": KVOptions(nbits="4", q_group_size=32),
    "2, window": KVOptions(nbits="2", q_group_size=32, residual_length=32),
    "4, on write": KVOptions(nbits="4", axis_key="token", rotate=True),
}
NGRAM = SpeculationConfig("ngram")
OWN = SpeculationConfig("draft", draft_model="the model itself")


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
        settings = {"dtype": "float64", "kv_cache_memory": 16 * MIB, "max_num_seqs": 8} | overrides
        return Engine(EngineConfig(model=model, kv=kv, speculation=speculation, **settings))  # type: ignore[arg-type]

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


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("speculation", [NGRAM, OWN], ids=["ngram", "draft"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (0.4, 0.9)])
def test_tokens_and_packed_bytes_are_those_without_it_and_steps_are_fewer(make, kv, speculation, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=2, max_tokens=150, ignore_eos=True)
    asked, plain, drafting = prompts(3), make(None, kv), make(speculation, kv, run_ahead=True)
    expected, steps = answers(plain, asked, params)
    assert len(set(map(tuple, expected))) == 3
    got, fewer = answers(drafting, asked, params)
    assert got == expected
    stats = drafting.stats()
    assert stats.drafted_total > 0 and (stats.accepted_total > 0 or speculation is NGRAM)
    if speculation is OWN and temperature == 0 and kv in (FORMATS["16"], FORMATS["4, on write"]):
        assert stats.accepted_total == stats.drafted_total, "it agrees with itself, so nothing is taken back"
        assert fewer <= steps // 4
    if kv == FORMATS["16"]:  # the last bit depends on what runs beside; in packed formats it flips no code
        pairs = zip(*(sorted(sealed(tested).items()) for tested in (drafting, plain)), strict=True)
        assert all(a == b and np.allclose(*map(np.frombuffer, (x, y))) for (a, x), (b, y) in pairs)
    else:
        assert sealed(drafting) == sealed(plain)
    assert drafting.scheduler.blocks.num_used == 0


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
        probs = (logits[column] / params["temperature"]).softmax(-1)
        order = probs.argsort(descending=True)
        below = probs[order].cumsum(0) - probs[order] < params.get("top_p", 1)
        probs = torch.zeros_like(probs).index_put((order[below],), probs[order[below]])
        probs /= probs.sum()
        seen = np.bincount(tokens, minlength=vocab)
        assert seen[probs == 0].sum() == 0
        assert len(tokens) > 200
        assert p_value(torch.from_numpy(seen)[probs > 0], len(tokens) * probs[probs > 0]) > 0.001
    assert (kept[kept[:, 0] != 2][:, 1:] == VOID).all()


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
    answers(tested, prompts(3), SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    assert set(lengths) == {0, 1, 2, 3, 4}
