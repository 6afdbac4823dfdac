"""Steps launched whole, on a GPU: graphs and the kernels that they hold, against float64."""

import random

import pytest
import torch
from checkpoints import MLA, QWEN_MOE, make_checkpoint

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import KVToolError
from kvtool.kv.batch import KVBatch
from kvtool.kv.fixed import Room
from kvtool.request import Request, SamplingParams, ScheduledBatch, Tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

MIB = 1 << 20
FORMATS = {
    "16": KVOptions(),
    "8": KVOptions(nbits="8"),
    "4": KVOptions(nbits="4"),
    "2, window": KVOptions(nbits="2", q_group_size=32, residual_length=32),
    "4, rotated, on write": KVOptions(nbits="4", axis_key="token", rotate=True),
    "2": KVOptions(nbits="2"),
    "fp8": KVOptions(nbits="fp8"),
}

MODELS = {
    "mixtral": {"num_local_experts": 5, "head_dim": 64},
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 40, "head_dim": 64},
    "deepseek_v2": MLA | {"q_lora_rank": None, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "head_dim": 32},
    "deepseek_v3": MLA
    | {"kv_lora_rank": 128, "qk_rope_head_dim": 32, "head_dim": 32}
    | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
}


def engine(kv: KVOptions, **overrides: object) -> Engine:
    settings = {"device": "cuda", "dtype": "bfloat16", "kv_cache_memory": 64 * MIB, "max_num_seqs": 16} | overrides
    return Engine(EngineConfig(kv=kv, swap_space=64 * MIB, **settings))  # type: ignore[arg-type]


def requests(count: int, longest: int = 150) -> list[Request]:
    """Prompts and ways to choose of many kinds; the last is forked."""
    rng, made = random.Random(5), list[Request]()
    for i in range(count):
        prompt = [rng.randrange(3, 4000) for _ in range(rng.randint(1, longest))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            presence_penalty=rng.choice([0.0, 0.5]),
            seed=i,
            max_tokens=140,
            ignore_eos=True,
            logprobs=0,
        )
        made.append(Request(str(i), prompt, params))
    return [*made, *(Request(f"fork{i}", prompt, params, fork_of=str(count - 1)) for i in range(3))]


def answers(tested: Engine, asked: list[Request]) -> dict[str, list[Tokens]]:
    for request in asked:
        tested.submit(request)
    news: dict[str, list[Tokens]] = {}
    while tested.has_work:
        for tokens in tested.step():
            assert tokens.error is None
            news.setdefault(tokens.id, []).append(tokens)
    return news


def error(tested: Engine, kv: KVOptions, asked: list[Request], model: str = "tiny") -> float:
    """Mean difference of the answers' log-probabilities from those that float64 gives the same tokens."""
    news = answers(tested, asked)
    again = SamplingParams(max_tokens=1, prompt_logprobs=0)
    whole = [Request(r.id, r.prompt + [t.token_ids[0] for t in news[r.id]], again) for r in asked]
    exact = answers(engine(kv, model=model, dtype="float64", kv_cache_memory=256 * MIB), whole)
    differences = [
        abs(tokens.logprobs[0].logprob - score.logprob)  # type: ignore[index]
        for request in asked
        for tokens, score in zip(
            news[request.id],
            exact[request.id][0].prompt_logprobs[len(request.prompt) - 1 :],
            strict=True,  # type: ignore[index]
        )
    ]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_graphs_and_kernels_are_as_exact_as_torch_in_the_same_dtype(kv):
    """Also when sequences move: swapped out and in again, in any company."""
    asked = requests(9)
    torch_error = error(engine(kv, attention_backend="torch", cuda_graph=False), kv, asked)
    layout = engine(kv).runner.store.layout
    memory = (layout.format.num_blocks(300) + 4) * layout.block_bytes + 6 * layout.tail_bytes
    tight = engine(kv, kv_cache_memory=memory, max_num_seqs=6)
    assert tight.runner.graphs
    assert error(tight, kv, asked) < 1.3 * torch_error
    assert tight.stats().swap_ins_total > 0
    assert error(engine(kv), kv, asked) < 1.3 * torch_error


@pytest.mark.parametrize("nbits", ["16", "8", "4", "2", "fp8"])
@pytest.mark.parametrize("model_type", MODELS)
def test_experts_and_latents_are_as_exact_as_torch_in_the_same_dtype(model_type, nbits, tmp_path):
    make_checkpoint(model_type, tmp_path, vocab_size=4096, max_position_embeddings=2048, **MODELS[model_type])
    kv, model, asked = KVOptions(nbits=nbits), str(tmp_path), requests(9, longest=600)
    torch_error = error(engine(kv, model=model, attention_backend="torch", cuda_graph=False), kv, asked, model)
    tested = engine(kv, model=model, max_num_batched_tokens=300)
    assert tested.runner.graphs
    assert error(tested, kv, asked, model) < 1.5 * torch_error


def test_experts_are_counted_whatever_fills_up_a_graph(tmp_path):
    make_checkpoint("qwen3_moe", tmp_path, vocab_size=4096, head_dim=64, max_position_embeddings=2048, **QWEN_MOE)
    tested = engine(KVOptions(nbits="8"), model=str(tmp_path), max_num_batched_tokens=300)
    assert tested.runner.graphs and set(map(sum, tested.expert_tokens().values())) == {0}
    launch, computed = tested.runner.launch, 0

    def spied(batch: ScheduledBatch, *rest: object, **named: object) -> object:
        nonlocal computed
        computed += sum(span.length for span in batch.spans)
        return launch(batch, *rest, **named)

    tested.runner.launch = spied
    answers(tested, requests(9, longest=600))
    assert set(map(sum, tested.expert_tokens().values())) == {3 * computed}


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS.keys())
def test_chunks_of_prompts_run_as_graphs_beside_decodes(kv):
    asked = requests(9, longest=900)
    torch_error = error(engine(kv, attention_backend="torch", cuda_graph=False, max_num_batched_tokens=384), kv, asked)
    tested = engine(kv, max_num_batched_tokens=384)
    graphs, rooms = tested.runner.graphs.prompts, set()
    launch = graphs.launch

    def spied(batch: ScheduledBatch, room: Room) -> tuple[KVBatch, torch.Tensor, torch.Tensor | None]:
        rooms.add(room)
        return launch(batch, room)

    graphs.launch = spied
    assert error(tested, kv, asked) < 1.3 * torch_error
    assert len({room.decodes for room in rooms}) > 1 and len({room.tokens for room in rooms}) > 1


@pytest.mark.parametrize("length", [200, 500, 1000, 2030])
def test_a_prompt_of_any_length_has_the_same_score_with_a_graph_and_without(length):
    """Also where a step has more prompts than a graph has room for."""
    rng = random.Random(length)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    lengths = [length, *[20] * 40]
    asked = [Request(str(i), [rng.randrange(3, 4000) for _ in range(n)], params) for i, n in enumerate(lengths)]
    scores = []
    for cuda_graph in (True, False):
        tested = engine(KVOptions(nbits="8"), cuda_graph=cuda_graph, max_num_seqs=64, kv_cache_memory=128 * MIB)
        news = answers(tested, asked[:1]) | answers(tested, asked[1:])
        scores.append(torch.tensor([news[request.id][0].logprobs[0].logprob for request in asked]))
    assert (scores[0] - scores[1]).abs().mean() < 0.1


def test_more_sequences_than_a_graph_holds_run_without_one():
    kv = KVOptions(nbits="4")
    tested = engine(kv, max_num_seqs=600, kv_cache_memory=512 * MIB)
    assert tested.runner.graphs
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    asked = [Request(str(i), [5 + i] * 9, params) for i in range(560)]
    asked += [Request("longer", [9] * 9, SamplingParams(temperature=0, max_tokens=90, ignore_eos=True))]
    got = answers(tested, asked)
    assert [len(got[request.id]) for request in asked] == [9] * 560 + [90]


def test_what_cannot_be_packed_is_found_after_a_graph_too():
    tested = engine(KVOptions(nbits="4"))
    with torch.inference_mode():
        tested.runner.model.layers["0"].self_attn.qkv_proj.bias[-1] = 1e6  # a value channel
    with pytest.raises(KVToolError, match="65,504"):
        tested.generate([[5] * 10], SamplingParams(max_tokens=100, ignore_eos=True))
    assert tested.stats().used_blocks == 0


def test_a_context_so_short_that_a_graph_could_hold_the_largest_step_is_measured_without_one():
    tested = engine(KVOptions(), max_model_len=128)
    assert tested.runner.graphs and tested.runner.memory
    assert answers(tested, [Request("x", [5] * 9, SamplingParams(max_tokens=9))])
