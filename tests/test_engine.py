"""The engine in this process: what a request gets depends on nothing but the request."""

import json
import random
import re
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import MLA, QWEN_MOE, make_checkpoint

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import CapacityError, ConfigError, KVToolError, RequestError
from kvtool.grammar import Matcher
from kvtool.memory import largest_step
from kvtool.request import Grammar, Request, SamplingParams
from kvtool.tokenizer import Tokenizer

MIB = 1 << 20
SCHEMA = """{"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["n"], "additionalProperties": false}"""
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
FORMATS = {
    "16": KVOptions(),
    "4": KVOptions(nbits="4"),
    "2, window": KVOptions(nbits="2", q_group_size=32, residual_length=32),
    "4, rotated, on write": KVOptions(nbits="4", axis_key="token", rotate=True),
    "fp8": KVOptions(nbits="fp8"),
}


def engine(kv: KVOptions, **overrides: object) -> Engine:
    settings = {"dtype": "float64", "kv_cache_memory": 64 * MIB, "max_num_seqs": 16} | overrides
    return Engine(EngineConfig(kv=kv, **settings))  # type: ignore[arg-type]


def prompts(count: int, longest: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 4000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(prompts, params)]


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_tokens_are_the_same_alone_among_others_and_in_any_chunking(kv):
    asked, tested = prompts(16, 150), engine(kv)
    alone = [answers(tested, [prompt])[0] for prompt in asked[:3]]
    assert len({tuple(answer) for answer in alone}) == 3, "the prompts must tell the answers apart"
    assert answers(tested, asked)[:3] == alone
    for chunk in (1, 7, 64):
        assert answers(engine(kv, max_num_batched_tokens=chunk, run_ahead=chunk > 1), asked[:3]) == alone


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 9},
    "phi3": {"sliding_window": 17},
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": QWEN_MOE | {"norm_topk_prob": True},
    "deepseek_v2": MLA | {"q_lora_rank": None},
    "deepseek_v3": MLA | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(model_type, tmp_path):
    oracle = make_checkpoint(model_type, tmp_path, **ARCHITECTURES[model_type])
    oracle.generation_config.eos_token_id = None
    asked = [[(7 * i + n) % 199 for i in range(n)] for n in (1, 30, 100)]
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        out = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        expected.append(out[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for chunk in (7, 2048):
        tested = engine(KVOptions(), model=str(tmp_path), dtype="float32", max_num_batched_tokens=chunk)
        assert answers(tested, asked, params) == expected


@pytest.mark.parametrize("nbits", ["16", "8", "4", "2", "fp8"])
def test_a_latent_cache_gives_the_same_tokens_in_any_chunking(nbits, tmp_path):
    make_checkpoint("deepseek_v3", tmp_path, **ARCHITECTURES["deepseek_v3"])
    asked = [[(7 * i + n) % 199 for i in range(n)] for n in (1, 30, 100)]

    def tested(**overrides):
        return engine(KVOptions(nbits=nbits), model=str(tmp_path), **overrides)

    roomy = tested()
    assert len(set(map(tuple, alone := [answers(roomy, [prompt])[0] for prompt in asked]))) == 3
    assert answers(roomy, asked) == alone
    for chunk in (1, 7, 64):
        assert answers(tested(max_num_batched_tokens=chunk, run_ahead=chunk > 1), asked) == alone


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(("swap_space", "run_ahead"), [(64 * MIB, False), (64 * MIB, True), (0, True)])
def test_tokens_are_the_same_when_sequences_make_room(kv, swap_space, run_ahead):
    asked, params = prompts(6, 100), SamplingParams(temperature=0, max_tokens=140, ignore_eos=True)
    roomy = engine(kv, prefix_caching=False)
    layout = roomy.runner.store.layout
    memory = (layout.format.num_blocks(240) + 4) * layout.block_bytes + 6 * layout.tail_bytes
    settings = {"kv_cache_memory": memory, "swap_space": swap_space, "run_ahead": run_ahead}
    tight = engine(kv, max_num_seqs=6, prefix_caching=False, **settings)
    assert answers(tight, asked, params) == answers(roomy, asked, params)
    stats = tight.stats()
    assert stats.preemptions_total > 0
    assert stats.recomputations_total == (0 if swap_space else stats.preemptions_total)
    assert stats.swap_ins_total == stats.swap_outs_total and stats.used_swap_units == 0


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_tokens_are_the_same_with_and_without_a_prefix_hit(kv):
    whole = prompts(1, 1)[0] * 90 + prompts(3, 150)[2]
    asked = [whole, whole[:100], [*whole[:150], 7, 8, 9], [*whole, 10, 11]]
    plain, caching = engine(kv, prefix_caching=False), engine(kv)
    expected = [answers(plain, [prompt])[0] for prompt in asked]
    assert [answers(caching, [prompt])[0] for prompt in asked] == expected
    assert answers(caching, asked) == expected, "found again by all at once"
    assert plain.stats().prefix_queries_total == 0
    hits = caching.stats().prefix_hits_total
    assert hits == 0 if caching.runner.store.format.residual else hits > 6 * 64


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_forks_answer_as_requests_of_their_own_would(kv):
    prompt = prompts(3, 150)[2]
    requests = [
        Request(str(i), prompt, SamplingParams(seed=i, max_tokens=40, ignore_eos=True), fork_of="0" if i else None)
        for i in range(6)
    ]
    alone = [answers(engine(kv, prefix_caching=False), [prompt], request.params)[0] for request in requests]
    assert len(set(map(tuple, alone))) == 6
    # two of them find no room beside the others
    tested = engine(kv, max_num_seqs=4, prefix_caching=False, run_ahead=True)
    for request in requests:
        tested.submit(request)
    together = run(tested)
    assert [together[str(i)] for i in range(6)] == alone


def run(tested: Engine) -> dict[str, list[int]]:
    """Tokens of all submitted requests."""
    ids: dict[str, list[int]] = {}
    while tested.has_work:
        for tokens in tested.step():
            assert tokens.error is None
            ids.setdefault(tokens.id, []).extend(tokens.token_ids)
    return ids


@pytest.mark.parametrize("bits", ["16", "4"])
def test_logprobs_are_those_of_transformers(bits, tmp_path):
    oracle = make_checkpoint("qwen2", tmp_path).double()
    prompt = [(7 * i) % 199 for i in range(45)]  # shorter than a block: nothing is packed
    tested = engine(KVOptions(nbits=bits), model=str(tmp_path), max_num_batched_tokens=20)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    for name in ("first", "again"):  # a prefix hit would leave the prompt's out
        tested.submit(Request(name, prompt, params))
        news = []
        while tested.has_work:
            news += tested.step()
        ids = prompt + [tokens.token_ids[0] for tokens in news]
        with torch.no_grad():
            expected = oracle(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert news[0].prompt_logprobs is not None and len(news[0].prompt_logprobs) == 44
        scores = news[0].prompt_logprobs + [logprobs for tokens in news for logprobs in tokens.logprobs or ()]
        assert len(scores) == 49
        for position, score in enumerate(scores):
            assert score.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-5)
            top = expected[position].topk(3 if position >= 44 else 2)
            assert score.top_ids == top.indices.tolist()
            assert score.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
            if position >= 44:
                assert score.top_logprobs[0] == score.logprob, "greedy: the very same number"


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    kv, asked = KVOptions(nbits="4"), prompts(8, 60)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=17, max_tokens=20, ignore_eos=True)
    alone = answers(engine(kv), asked[:1], params)[0]
    assert answers(engine(kv), asked, params)[0] == alone
    other = SamplingParams(temperature=1.0, top_p=0.9, seed=18, max_tokens=20, ignore_eos=True)
    assert answers(engine(kv), asked[:1], other)[0] != alone


def test_a_packed_cache_holds_more_in_the_same_bytes_and_says_how_much():
    sixteen, four, two = (engine(KVOptions(nbits=bits), dtype="float32").info for bits in ("16", "4", "2"))
    assert sixteen.kv_tokens_16bit == 2 * sixteen.kv_tokens, "float32 has 4 bytes an element"
    assert two.kv_tokens > 1.3 * four.kv_tokens > 1.3 * 1.5 * sixteen.kv_tokens
    for info in (sixteen, four, two):
        assert 63 * MIB < info.kv_bytes <= 64 * MIB


def test_abort_frees_everything_in_any_phase():
    tested = engine(KVOptions(nbits="4"), max_num_batched_tokens=32)
    free = tested.scheduler.blocks.num_free
    for steps in range(8):
        tested.submit(Request("a", prompts(1, 1)[0] * 150, GREEDY))
        for _ in range(steps):
            tested.step()
        tested.abort("a")
        assert not tested.has_work and tested.scheduler.blocks.num_free == free


def test_text_goes_in_and_comes_out_whole_or_streamed():
    tested = engine(KVOptions(nbits="4"), dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=24)
    completion = tested.generate(["It was a dark night, and"], params)[0]
    assert completion.text and "".join(tested.stream("It was a dark night, and", params)) == completion.text
    tokenizer = Tokenizer.load(tested.runner.path, tested.info.vocab_size)
    assert completion.prompt_token_ids == tokenizer.encode("It was a dark night, and")


def test_streams_may_be_read_side_by_side_and_generate_in_between():
    tested = engine(KVOptions(nbits="4"), dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = [list(tested.stream(prompt, params)) for prompt in ("Once upon a time", "Who are you?")]
    left, right = (tested.stream(prompt, params) for prompt in ("Once upon a time", "Who are you?"))
    together = [[next(left)], [next(right)]]
    assert tested.generate(["She said"], params)
    together[1] += right
    together[0] += left
    assert together == alone


@pytest.mark.parametrize("bits", ["16", "4"])
def test_what_a_failed_request_stored_reaches_nobody(bits):
    tested = engine(KVOptions(nbits=bits), dtype="float32", max_num_seqs=2)
    prompt = [5] * 100
    good = answers(tested, [prompt])
    weight = tested.runner.model.embed_tokens.weight
    with torch.inference_mode():
        kept = weight[4000].clone()
        weight[4000] = float("inf")
    with pytest.raises(KVToolError, match="NaN or"):
        tested.generate([[5] * 70 + [4000] + [5] * 29], GREEDY)
    with torch.inference_mode():
        weight[4000] = kept
    assert answers(tested, [prompt, prompt]) == good * 2


def test_one_text_instead_of_a_list_is_refused():
    with pytest.raises(RequestError, match="list of prompts"):
        engine(KVOptions()).generate("Hi")


def test_an_abandoned_stream_is_aborted():
    tested = engine(KVOptions())
    stream = tested.stream("Once", GREEDY)
    next(stream)
    stream.close()
    assert not tested.has_work


@pytest.mark.parametrize("prompt", [[], [-1], [10**9], [5] * 5000])
def test_a_bad_prompt_is_refused_and_costs_the_others_nothing(prompt):
    tested = engine(KVOptions())
    with pytest.raises(RequestError) as caught:
        tested.generate([[5, 6], prompt], GREEDY)
    assert caught.value.param == "prompt" and not tested.has_work
    assert len(answers(tested, [[5, 6]])[0]) == 40


def test_keys_that_no_format_can_hold_end_the_request_and_not_the_engine(tmp_path):
    oracle = make_checkpoint("qwen2", tmp_path)
    with torch.no_grad():
        oracle.model.layers[1].self_attn.k_proj.bias.fill_(1e5)
    oracle.save_pretrained(tmp_path)
    packed = engine(KVOptions(nbits="4"), model=str(tmp_path), dtype="float32")
    with pytest.raises(KVToolError, match=r"65,504.*cannot be quantised"):
        packed.generate([[5] * 100, [6] * 100])
    assert not packed.has_work and packed.scheduler.blocks.num_used == 0
    assert len(packed.generate([[5] * 10], GREEDY)[0].token_ids) == 40, "nothing is packed yet at 50 tokens"
    unpacked = engine(KVOptions(), model=str(tmp_path), dtype="float32")
    assert unpacked.generate([[5] * 100], GREEDY)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ({"kv_cache_memory": 1000}, CapacityError, "--kv-cache-memory 1000 is too small"),
        ({"kv_cache_memory": MIB, "max_model_len": 2000, "max_num_seqs": 1}, CapacityError, "raise it to"),
        ({"kv_cache_memory": 1 << 50}, CapacityError, "cpu has no .*GiB for the KV cache"),
        ({"swap_space": 1 << 50}, CapacityError, "--swap-space: the host has no .* GiB"),
        ({"max_model_len": 10**6}, ConfigError, "--max-model-len 1000000"),
        ({"dtype": "bf16"}, ConfigError, "--dtype bf16: must be one of auto"),
        ({"kv": KVOptions(nbits=4)}, ConfigError, "--nbits 4: must be one of 16"),  # type: ignore[arg-type]
        ({"device": "cuda:99"}, ConfigError, "--device cuda:99: .*; choose auto, cpu, cuda"),
        ({"device": "warp"}, ConfigError, "--device warp: .*; choose auto, cpu, cuda"),
        ({"device": "meta"}, ConfigError, "--device meta: .*; choose auto, cpu, cuda"),
        ({"model": "a" * 300}, KVToolError, "no such folder"),
        ({"model": "~nobody-at-all/x"}, KVToolError, "no such folder"),
        ({"attention_backend": "magic"}, KVToolError, "must be one of auto, flash-attn, cuda, triton, torch"),
        ({"model": "no/such/folder"}, KVToolError, "no/such/folder"),
    ],
)
def test_an_engine_that_cannot_run_says_so_in_one_line(overrides, error, says):
    with pytest.raises(error, match=says) as caught:
        engine(**{"kv": KVOptions()} | overrides)
    assert "\n" not in str(caught.value)


def test_without_max_model_len_a_small_cache_shortens_the_context_and_what_fits_is_answered():
    tested = engine(KVOptions(nbits="4"), kv_cache_memory=MIB, max_num_seqs=1)
    limit = tested.info.max_model_len
    assert 64 < limit < tested.runner.model_config.max_position
    params = SamplingParams(temperature=0, ignore_eos=True)
    assert len(answers(tested, [[5] * 10], params)[0]) == limit - 10


@pytest.mark.parametrize("run_ahead", [False, True])
def test_answers_follow_their_grammars_alone_and_beside_free_ones(run_ahead):
    tested = engine(KVOptions(nbits="4"), run_ahead=run_ahead)
    tokenizer = Tokenizer.load(tested.runner.path, tested.info.vocab_size)
    grammars = {
        "schema": Grammar("json_schema", SCHEMA),
        "regex": Grammar("regex", "(ab|cd){2,5}x"),
        "choice": Grammar("choice", '["yes", "no"]'),
    }
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=300, ignore_eos=True)
    free = answers(tested, [[5] * 20], params)[0]
    tested.submit(Request("free", [5] * 20, params))
    for name, grammar in grammars.items():
        tested.submit(Request(name, [5] * 20, msgspec.structs.replace(params, grammar=grammar)))
    ids = run(tested)
    assert ids.pop("free") == free
    text = {name: tokenizer.decode(answer) for name, answer in ids.items()}
    assert isinstance(json.loads(text["schema"])["n"], int)
    assert re.fullmatch("(ab|cd){2,5}x", text["regex"]) and text["choice"] in ("yes", "no")
    assert not tested._matchers


def test_a_grammar_that_cannot_go_on_fails_its_own_request_only(monkeypatch):
    def fail(self: Matcher, row: object) -> None:
        raise KVToolError("too complex")

    tested = engine(KVOptions(nbits="4"), dtype="float32")
    expected = answers(tested, [[5] * 20])[0]
    monkeypatch.setattr(Matcher, "fill", fail)
    tested.submit(Request("bad", [6] * 20, SamplingParams(grammar=Grammar("regex", "a+"))))
    tested.submit(Request("good", [5] * 20, GREEDY))
    news = []
    while tested.has_work:
        news += tested.step()
    assert [tokens.error for tokens in news if tokens.id == "bad"] == ["too complex"]
    assert [token for tokens in news if tokens.id == "good" for token in tokens.token_ids] == expected
    assert tested.stats().used_blocks == 0 and not tested._matchers


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"grammar": Grammar("regex", "(")}, "grammar"),
        ({"logit_bias": {4096: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": 41}, "min_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params, param):
    tested = engine(KVOptions())
    with pytest.raises(RequestError) as caught:
        tested.generate([[5, 6]], SamplingParams(max_tokens=40, **params))
    assert caught.value.param == param and not tested.has_work and not tested._matchers


def test_stop_ids_end_an_answer_and_min_tokens_puts_that_off():
    tested = engine(KVOptions())
    free = answers(tested, [[5] * 20])[0]
    stop = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[free[6]])
    first = free.index(free[6])
    assert answers(tested, [[5] * 20], stop)[0] == free[: first + 1]
    later = answers(tested, [[5] * 20], msgspec.structs.replace(stop, min_tokens=first + 3))[0]
    assert len(later) >= first + 4 or later[-1] != free[6]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_a_request_whose_keys_cannot_be_kept_takes_no_other_along(kv, run_ahead, tmp_path):
    """It computes its prompt in chunks beside a short and a long answer whose tables are padded with its memory."""
    make_checkpoint("qwen2", tmp_path, vocab_size=4096)

    def tested(**overrides: object) -> Engine:
        made = engine(kv, model=str(tmp_path), **overrides)
        with torch.inference_mode():
            made.runner.model.embed_tokens.weight[4000] = float("inf")
        return made

    others = {"short": [5] * 20, "long": [6, 7, 8] * 50, "after": [9] * 100}
    alone = {name: answers(tested(), [prompt])[0] for name, prompt in others.items()}
    together = tested(max_num_batched_tokens=64, run_ahead=run_ahead)
    together.submit(Request("first", [7] * 20, SamplingParams(max_tokens=8, ignore_eos=True)))
    for name in ("short", "long"):
        together.submit(Request(name, others[name], GREEDY))
    got, errors = {name: list[int]() for name in ("first", *others)}, dict[str, str]()
    while together.has_work:
        for tokens in together.step():
            if tokens.error:
                errors[tokens.id] = tokens.error
            got.get(tokens.id, []).extend(tokens.token_ids)
            if tokens.id == "first" and tokens.finish_reason:  # the next one gets its memory
                together.submit(Request("bad", [4000] * 300, GREEDY))
    together.submit(Request("after", others["after"], GREEDY))
    got |= run(together)
    assert list(errors) == ["bad"]
    assert {name: got[name] for name in others} == alone
    assert together.stats().used_blocks == 0


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_step_too_large_for_the_memory_left_is_made_of_smaller_ones_and_one_request_too_large_fails(
    run_ahead, monkeypatch
):
    """A device of which too little is free is played by a model that finds no memory for several tokens' logits."""
    tested = engine(KVOptions(nbits="4"), run_ahead=run_ahead)
    asked = prompts(3, 80)
    expected = answers(tested, asked)
    logits, room = tested.runner.model.logits, 1

    def short_of_memory(hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(hidden)

    monkeypatch.setattr(tested.runner.model, "logits", short_of_memory)
    assert answers(tested, asked) == expected
    room = 0
    with pytest.raises(KVToolError, match=r"no memory left for a step of .* tokens; lower"):
        answers(tested, asked)
    assert not tested.has_work and tested.stats().used_blocks == 0
    room = 9
    assert answers(tested, asked) == expected


@pytest.mark.parametrize(("budget", "tokens"), [(50, 50), (129, 129), (200, 200), (10_000, 256)])
def test_the_step_that_memory_is_measured_by_has_all_tokens_that_a_step_may_have(budget, tokens):
    tested = engine(KVOptions(nbits="4"), max_model_len=64, max_num_batched_tokens=budget, max_num_seqs=4)
    config = EngineConfig(max_num_batched_tokens=budget, max_num_seqs=4)
    largest = largest_step(config, tested.runner.store.format, 64)
    assert sum(span.length for span in largest.spans) == tokens
    assert max(span.end for span in largest.spans) <= 64
    assert len(tested.runner.collect(tested.runner.launch(largest)).token_ids) == 4
