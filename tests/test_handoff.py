"""Requests that two engines share: the answer is that of one engine, whatever happens to the other."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_engine import FORMATS, MIB, engine, prompts

from kvtool.attention.queries import prepared
from kvtool.config import EngineConfig, HandoffConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import KVToolError, RequestError
from kvtool.kv.format import KVFormat
from kvtool.models.kv import attention_layers
from kvtool.quantize.layer_errors import attend_packed
from kvtool.request import Request, SamplingParams, Tokens
from kvtool.scoring import ScoringModel

SECRET = "only these tests know"


def pair(kv: KVOptions, fault: str | None = None, timeout: float = 30.0, **overrides: object) -> tuple[Engine, Engine]:
    """A prefill and a decode engine."""
    decode = engine(kv, handoff=HandoffConfig("decode", SECRET, timeout=timeout), **overrides)
    to = HandoffConfig("prefill", SECRET, peers=(decode.info.kv_address,), fault=fault)  # type: ignore[arg-type]
    return engine(kv, handoff=to, **overrides), decode


def share(
    prefill: Engine, decode: Engine, asked: list[list[int]], params: SamplingParams, seconds: float = 60
) -> dict[str, list[Tokens]]:
    """What the decode engine says of all requests, each begun by the other."""
    said: dict[str, list[Tokens]] = {}
    unfinished = set()
    for index, prompt in enumerate(asked):
        unfinished.add(name := str(index))
        decode.submit(Request(name, prompt, params, is_pushed=True))
        prefill.submit(Request(name, prompt, params, push_to=decode.info.kv_address))
    deadline = time.monotonic() + seconds
    while unfinished:
        assert time.monotonic() < deadline, decode.stats()
        if prefill.has_work:
            prefill.step()
        news = decode.take_arrivals()
        if decode.has_work:
            news += decode.step()
        for tokens in news:
            assert tokens.error is None
            said.setdefault(tokens.id, []).append(tokens)
            if tokens.finish_reason:
                unfinished.discard(tokens.id)
    return said


def ids(said: dict[str, list[Tokens]]) -> list[list[int]]:
    return [[token for tokens in said[str(i)] for token in tokens.token_ids] for i in range(len(said))]


def assert_nothing_is_held(tested: Engine) -> None:
    stats = tested.stats()
    assert (stats.running, stats.waiting, stats.used_blocks, stats.used_tails, stats.awaited) == (0, 0, 0, 0, 0)


def alone(kv: KVOptions, asked: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [completion.token_ids for completion in engine(kv).generate(asked, params)]


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_two_engines_answer_as_one_would(kv):
    asked, params = [*prompts(5, 200), [7] * 64, [9] * 129, [3]], SamplingParams(max_tokens=30, ignore_eos=True, seed=3)
    prefill, decode = pair(kv, max_num_batched_tokens=50, run_ahead=kv.nbits == "4")
    said = share(prefill, decode, asked, params)
    assert ids(said) == alone(kv, asked, params)
    layout = decode.runner.store.layout
    for index, prompt in enumerate(asked):
        first, *later = said[str(index)]
        assert len(first.token_ids) == 2 and first.handoff and not any(tokens.handoff for tokens in later)
        assert layout.bytes_for([len(prompt)]) < first.handoff.num_bytes < layout.bytes_for([len(prompt)]) + 8192
        h = first.handoff
        assert h.scheduled < h.prefilled < h.received < h.answered
    assert decode.stats().arrivals_total == len(asked) and decode.stats().losses_total == 0
    for tested in (prefill, decode):
        assert_nothing_is_held(tested)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


IN_A_MINUTE = pytest.mark.timeout(60, method="thread")  # whatever a GPU waits for


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[TWO_GPUS, IN_A_MINUTE])])
@pytest.mark.parametrize(("name", "prefill_tp", "decode_tp"), [("16", 2, 1), ("2, window", 2, 1), ("2, window", 1, 2)])
def test_the_two_sides_may_share_heads_among_other_numbers_of_ranks(name, prefill_tp, decode_tp, device):
    kv, params = FORMATS[name], SamplingParams(max_tokens=30, ignore_eos=True, seed=3)
    asked, settings = [*prompts(4, 200), [9] * 129, [3]], {"device": device, "max_num_batched_tokens": 50}
    with closing_all() as made:
        decode = engine(kv, handoff=HandoffConfig("decode", SECRET), tp=decode_tp, **settings)
        made.append(decode)
        to = HandoffConfig("prefill", SECRET, peers=(decode.info.kv_address,), transfer="tcp")
        prefill = engine(kv, handoff=to, tp=prefill_tp, run_ahead=True, **settings)
        made.append(prefill)
        said = share(prefill, decode, asked, params)
        again = share(prefill, decode, asked, params)
        assert (decode.stats().arrivals_total, decode.stats().losses_total) == (2 * len(asked), 0)
        for tested in made:
            assert_nothing_is_held(tested)
    assert ids(said) == ids(again) == alone(kv, asked, params)


def answer_of_packed_prompt(model: ScoringModel, kv: KVOptions, prompt: list[int], count: int) -> list[int]:
    """The definition, in plain torch: a prompt computed in 16 bits, whose cache is packed before the answer goes on."""
    fmt, shapes, memory = model.layout(kv).format, attention_layers(model.model_config), {}

    @torch.inference_mode()
    def next_token(ids: list[int], start: int, by: KVFormat) -> int:
        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            old = memory.get(layer, (k[:0], v[:0]))
            key, value = memory[layer] = tuple(torch.cat(pair) for pair in zip(old, (k, v), strict=True))
            query = torch.cat([q.new_zeros(start, *q.shape[1:]), q])  # whose rows nobody looks at
            kinds = by.layers[layer]
            return attend_packed(query[None], key[None], value[None], kinds.key, kinds.value, by, shapes[layer])[
                0, start:
            ]

        positions = torch.arange(start, start + len(ids))
        return int(model.model.logits(model.model(torch.tensor(ids), positions, prepared(attend)))[-1].argmax())

    answer = [next_token(prompt, 0, model.layout(KVOptions()).format)]
    while len(answer) < count:
        answer.append(next_token(answer[-1:], len(prompt) + len(answer) - 1, fmt))
    return answer


@pytest.mark.parametrize(("name", "tp"), [("4", 1), ("4, rotated, on write", 1), ("2, window", 2)])
def test_a_prefill_side_of_16_bits_packs_for_the_decode_side(name, tp):
    kv, params = FORMATS[name], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    asked = [random.Random(n).choices(range(3, 4000), k=n) for n in (200, 129, 64, 3)]
    model = ScoringModel(EngineConfig(dtype="float64"))
    expected = [answer_of_packed_prompt(model, kv, prompt, 12) for prompt in asked]
    decode = engine(kv, handoff=HandoffConfig("decode", SECRET))
    to = HandoffConfig("prefill", SECRET, peers=(decode.info.kv_address,))
    prefill = engine(KVOptions(), handoff=to, tp=tp, max_num_batched_tokens=50)
    try:
        assert ids(share(prefill, decode, asked, params)) == expected
        assert ids(share(prefill, decode, asked, params)) == expected, "from the prefix caches of both"
        layout = decode.runner.store.layout
        assert decode.take_arrivals() == [] and decode.stats().losses_total == 0
        again = share(prefill, decode, asked[:1], params)["0"][0].handoff
        assert again and layout.bytes_for([200]) < again.num_bytes < layout.bytes_for([200]) + 8192
        # What has come is not what these prompts would have become here.
        assert [c.token_ids for c in decode.generate(asked[:1], params)] == alone(kv, asked[:1], params)
    finally:
        prefill.close()


@contextmanager
def closing_all() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    try:
        yield made
    finally:
        for tested in made:
            tested.close()


def test_what_has_come_is_a_prefix_hit_for_others():
    kv, params = KVOptions(nbits="4"), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prefill, decode = pair(kv)
    prompt = random.Random(1).choices(range(3, 4000), k=300)
    said = share(prefill, decode, [prompt], params)
    again = share(prefill, decode, [prompt], params)
    assert ids(again) == ids(said)
    assert said["0"][0].num_cached_tokens == 0 and again["0"][0].num_cached_tokens == 256, "as the prefill side says"
    assert decode.generate([[*prompt, 5, 6]], params)[0].token_ids == alone(kv, [[*prompt, 5, 6]], params)[0]
    assert decode.stats().prefix_hits_total == 256


def test_a_decode_side_that_is_short_of_memory_waits_swaps_and_answers_alike():
    kv, params = KVOptions(nbits="4"), SamplingParams(temperature=0, max_tokens=140, ignore_eos=True)
    asked = prompts(6, 100)
    layout = engine(kv).runner.store.layout
    memory = (layout.format.num_blocks(240) + 4) * layout.block_bytes + 6 * layout.tail_bytes
    prefill, decode = pair(kv, kv_cache_memory=memory, max_num_seqs=6, prefix_caching=False)
    assert ids(share(prefill, decode, asked, params)) == alone(kv, asked, params)
    assert decode.stats().preemptions_total > 0
    assert_nothing_is_held(decode)


def test_an_answer_of_one_token_needs_no_decode_step():
    params = SamplingParams(temperature=0, max_tokens=1)
    prefill, decode = pair(KVOptions())
    said = share(prefill, decode, [[5] * 70], params)
    assert [tokens.finish_reason for tokens in said["0"]] == ["length"] and len(ids(said)[0]) == 1
    assert_nothing_is_held(decode)


@pytest.mark.parametrize("fault", ["corrupt", "drop", "delay"])
def test_a_transfer_that_fails_is_computed_again_and_answers_alike(fault, caplog):
    kv, params, asked = KVOptions(nbits="4"), SamplingParams(temperature=0, max_tokens=8), prompts(2, 200)
    prefill, decode = pair(kv, fault)
    said = share(prefill, decode, asked, params)
    assert ids(said) == alone(kv, asked, params)
    stats = decode.stats()
    assert (stats.arrivals_total, stats.losses_total) == ((2, 0) if fault == "delay" else (0, 2))
    assert ("checksum is wrong" in caplog.text) == (fault == "corrupt")
    for tested in (prefill, decode):
        assert_nothing_is_held(tested)


def test_what_is_not_pushed_in_time_is_computed_here():
    kv, params = KVOptions(nbits="4"), SamplingParams(temperature=0, max_tokens=8)
    _, decode = pair(kv, timeout=0.3)
    decode.submit(Request("0", [5] * 100, params, is_pushed=True))
    assert decode.stats().awaited == 1 and not decode.has_work
    tokens: list[int] = []
    while len(tokens) < 8:
        decode.take_arrivals()
        for news in decode.step() if decode.has_work else ():
            tokens += news.token_ids
    assert [tokens] == alone(kv, [[5] * 100], params)


def test_aborts_leave_nothing_behind_whenever_they_come():
    kv, params = KVOptions(nbits="4"), SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    prefill, decode = pair(kv, max_num_batched_tokens=40)
    rng, receiver = random.Random(3), decode._inlet._receiver  # type: ignore[union-attr]
    room = receiver.staging.free_bytes
    for attempt in range(12):
        name = f"r{attempt}"
        decode.submit(Request(name, prompts(1, 1)[0] * 150, params, is_pushed=True))
        prefill.submit(Request(name, prompts(1, 1)[0] * 150, params, push_to=decode.info.kv_address))
        for _ in range(rng.randrange(8)):
            for tested in (prefill, decode):
                tested.take_arrivals()
                if tested.has_work:
                    tested.step()
        for tested in rng.sample([prefill, decode], 2):
            tested.abort(name)
    deadline = time.monotonic() + 30
    while prefill.has_work or decode.has_work or receiver.staging.free_bytes < room:
        assert time.monotonic() < deadline
        for tested in (prefill, decode):
            tested.take_arrivals()
            if tested.has_work:
                tested.step()
    for tested in (prefill, decode):
        assert_nothing_is_held(tested)
    assert ids(share(prefill, decode, [[5] * 99], params)) == alone(kv, [[5] * 99], params)


def test_requests_that_two_engines_cannot_share_are_refused():
    prefill, decode = pair(KVOptions())
    for tested, request, says in (
        (prefill, Request("a", [5], SamplingParams(), push_to="elsewhere:1"), "no --peer of this engine"),
        (prefill, Request("b", [5], SamplingParams(), is_pushed=True), "--role decode"),
        (decode, Request("c", [5], SamplingParams(), push_to="x"), "--role prefill"),
        (decode, Request("d", [5], SamplingParams(logprobs=1), is_pushed=True), "need one engine"),
        (decode, Request("e", [], SamplingParams(), is_pushed=True), "prompt is empty"),
    ):
        with pytest.raises(RequestError, match=says):
            tested.submit(request)
        assert_nothing_is_held(tested)


def test_engines_that_do_not_fit_are_told_so_at_the_start():
    _, decode = pair(KVOptions(nbits="4"))
    to = HandoffConfig("prefill", SECRET, peers=(decode.info.kv_address,), timeout=1)
    for other in (
        {"kv": KVOptions(nbits="8")},
        {"dtype": "float32"},
        {"handoff": HandoffConfig("prefill", "another", peers=to.peers)},
        {"handoff": HandoffConfig("prefill", SECRET, peers=to.peers, transfer="nccl")},
        {"handoff": HandoffConfig("prefill", SECRET, peers=("nowhere",))},
    ):
        settings = {"dtype": "float64", "kv": KVOptions(nbits="4"), "kv_cache_memory": 64 * MIB, "handoff": to} | other
        with pytest.raises(KVToolError) as caught:
            Engine(EngineConfig(**settings))  # type: ignore[arg-type]
        assert "--peer" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(KVToolError, match="KV of several stages does not travel"):
        engine(KVOptions(), handoff=to, pp=2)
    port = int(decode.info.kv_address.rpartition(":")[2])
    with pytest.raises(KVToolError, match="change --kv-port"):
        engine(KVOptions(), handoff=HandoffConfig("decode", SECRET, port=port))
