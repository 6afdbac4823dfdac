"""Ranks that share a model: what each one holds of it, and that together they answer as one does."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MLA, QWEN_MOE, make_checkpoint
from safetensors.torch import load_file, save_file

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import CapacityError, ConfigError, UnsupportedError
from kvtool.kv.format import resolve
from kvtool.models import Decoder, load_config, load_model, resolve_model
from kvtool.models.kv import kv_spec
from kvtool.p2p import wrong_copies
from kvtool.parallel import Group, Parallel, Stage
from kvtool.perplexity import score_formats
from kvtool.protocols import SAMPLE, make_task, read_documents
from kvtool.quantize.layer_errors import calibrate, layer_errors, propagated_errors
from kvtool.request import Request, SamplingParams, Tokens
from kvtool.scoring import ScoringModel, Window
from kvtool.tokenizer import Tokenizer

# Ranks that wait for each other are ended from outside, with the stacks of what they wait in.
pytestmark = pytest.mark.timeout(200, method="thread")
CPU = torch.device("cpu")
MIB = 1 << 20
PLAN = KVOptions(layer_bits=(("16", "16"), ("16", "8"), ("4", "2"), ("8", "4")))  # blocks are sealed from layer 2 on
CONFIG = EngineConfig(
    dtype="float64", device="cpu", kv_cache_memory=32 * MIB, max_num_seqs=6, max_num_batched_tokens=64
)


@pytest.fixture(autouse=True)
def not_captured(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """A rank that is lost ends this process, which is rank 0, and what they said of it would end with it."""
    with capfd.disabled():
        yield


def part(
    folder: Path, tp: tuple[int, int], pp: tuple[int, int] = (0, 1), load_format: str = "auto", ep: int = 1
) -> Decoder:
    """What one rank loads; it does not compute."""
    return load_model(
        folder,
        load_config(folder),
        dtype=torch.float32,
        device=CPU,
        load_format=load_format,  # type: ignore[arg-type]
        parallel=Parallel(tp=Group(*tp, ep=ep), stage=Stage(*pp)),
    )


MIXTURES = {
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 40},
    "deepseek_v3": MLA | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
}
WHOLE = MIXTURES | {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": QWEN_MOE | {"moe_intermediate_size": 25},  # no two ranks could share an expert
    "deepseek_v2": MLA | {"q_lora_rank": None, "n_shared_experts": 1},
}
MODELS = {name: {"attention_bias": True} for name in ("llama", "qwen2", "qwen3", "phi3")} | MIXTURES


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_pieces_of_the_model(model_type: str, size: int, load_format: str, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path, **MODELS[model_type])
    whole = part(tmp_path, (0, 1), load_format=load_format)
    shards = [part(tmp_path, (rank, size), load_format=load_format) for rank in range(size)]
    names = {name for name, _ in whole.slots()}
    for name, stored in gathered([whole]).items():
        assert torch.equal(gathered(shards)[name], stored), name
    assert all({name for name, _ in shard.slots()} == names for shard in shards)
    held = [sum(parameter.numel() for parameter in shard.parameters()) for shard in shards]
    everyones = sum(to.numel() for name, to in gathered([whole]).items() if "_a_proj" in name or "gate.weight" in name)
    assert max(held) < 1.15 * (everyones + (sum(p.numel() for p in whole.parameters()) - everyones) / size)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(("model_type", "size", "ep"), [("qwen2_moe", 2, 2), ("mixtral", 4, 2), ("deepseek_v3", 4, 4)])
def test_whole_experts_are_shared_out(model_type: str, size: int, ep: int, load_format: str, tmp_path: Path) -> None:
    """As many ranks have a piece of each as share a part; each holds as much as of experts that all ranks share."""
    make_checkpoint(model_type, tmp_path, **WHOLE[model_type])
    whole = part(tmp_path, (0, 1), load_format=load_format)
    shards = [part(tmp_path, (rank, size), load_format=load_format, ep=ep) for rank in range(size)]
    for name, stored in gathered([whole]).items():
        assert torch.equal(gathered(shards)[name], stored), name
    holders = Counter(name for shard in shards for name, _ in shard.slots())
    assert holders == {name: size // ep if ".experts." in name else size for name, _ in whole.slots()}
    shared = part(tmp_path, (0, size), load_format=load_format)
    assert {sum(p.numel() for p in model.parameters()) for model in (shared, *shards)} == {
        sum(p.numel() for p in shared.parameters())
    }


def gathered(models: list[Decoder]) -> dict[str, torch.Tensor]:
    """Stored tensors put together again from the ranks' pieces; NaN where nobody holds anything."""
    tensors: dict[str, torch.Tensor] = {}
    for model in models:
        for name, slot in model.slots():
            into = tensors.setdefault(name, torch.full(slot.shape, torch.nan))
            into[tuple(slice(first, first + n) for first, n in zip(slot.start, slot.to.shape, strict=True))] = slot.to
    return tensors


def test_stages_hold_their_layers_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    whole, stages = part(tmp_path, (0, 1)), [part(tmp_path, (0, 1), (index, 2)) for index in range(2)]
    names = [name for stage in stages for name, _ in stage.slots()]
    assert sorted(names) == sorted(name for name, _ in whole.slots())
    for name, stored in gathered([whole]).items():
        assert torch.equal(gathered(stages)[name], stored), name


def requests(vocab_size: int) -> list[Request]:
    """More than run at once, of many kinds; most are greedy. Two of them wait for others to be forked from."""
    rng = random.Random(7)
    made = []
    for i in range(8):
        prompt = [rng.randrange(10, vocab_size) for _ in range(rng.choice([1, 20, 70, 150]))]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
        if i == 1:
            params = SamplingParams(seed=3, top_p=0.9, presence_penalty=0.5, max_tokens=20, ignore_eos=True)
        if i == 2:
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
        made.append(Request(str(i), prompt, params))
    forks = [Request(f"fork{i}", made[-1].prompt, SamplingParams(seed=i, max_tokens=9), fork_of="7") for i in range(2)]
    return made + forks


def answers(
    config: EngineConfig, asked: list[Request], expert_tokens: dict[int, list[int]] | None = None
) -> dict[str, list[Tokens]]:
    """What an engine says to each request, and that it then holds nothing more.

    Args:
        expert_tokens: gets what it has counted.
    """
    engine = Engine(config)
    try:
        for request in asked:
            engine.submit(request)
        news: dict[str, list[Tokens]] = {}
        while engine.has_work:
            for tokens in engine.step():
                assert tokens.error is None
                news.setdefault(tokens.id, []).append(tokens)
        stats = engine.stats()
        assert stats.used_blocks == stats.used_tails == stats.running == 0
        if expert_tokens is not None:
            expert_tokens |= engine.expert_tokens()
        return news
    finally:
        engine.close()


def assert_same_answers(got: dict[str, list[Tokens]], expected: dict[str, list[Tokens]]) -> None:
    assert got.keys() == expected.keys()
    for name, tokens in expected.items():
        assert [t.token_ids for t in got[name]] == [t.token_ids for t in tokens], name
        for ours, theirs in zip(got[name], tokens, strict=True):
            for mine, other in ((ours.logprobs, theirs.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)):
                for a, b in zip(mine or (), other or (), strict=True):
                    assert a.top_ids == b.top_ids
                    assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=1e-9)


@pytest.mark.parametrize(
    ("tp", "pp", "kv"),
    [
        (2, 1, KVOptions()),
        (2, 1, KVOptions(nbits="4")),
        (2, 1, PLAN),
        (4, 1, KVOptions(nbits="4")),  # two ranks to each KV head
        (1, 2, KVOptions(nbits="4")),
        (1, 2, PLAN),  # the first stage alone would need no tail
    ],
)
def test_ranks_together_answer_as_one_does(tp: int, pp: int, kv: KVOptions) -> None:
    config, asked = replace(CONFIG, kv=kv), requests(4000)
    expected = answers(config, asked)
    assert len({tuple(tokens[-1].token_ids) for tokens in expected.values()}) > 3, "prompts must tell answers apart"
    assert_same_answers(answers(replace(config, tp=tp, pp=pp, run_ahead=True), asked), expected)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@TWO_GPUS
@pytest.mark.parametrize("ranks", [{"tp": 2}, {"tp": 2, "all_reduce": "nccl"}, {"pp": 2}])
def test_two_gpus_answer_and_score_as_one_does(ranks: dict[str, Any]) -> None:
    config, asked = replace(CONFIG, device="cuda", kv=KVOptions(nbits="4")), requests(4000)
    assert_same_answers(answers(replace(config, **ranks), asked), answers(config, asked))
    windows = [Window([(7 * n) % 4000 for n in range(300)])]
    (expected,) = ScoringModel(config).hidden_states(windows, config.kv)
    with closing(ScoringModel(replace(config, **ranks))) as model:
        (found,) = model.hidden_states(windows, config.kv)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_ranks_share_what_does_not_divide_and_has_biases(tmp_path: Path) -> None:
    """199 ids on two ranks, biases on all projections, three layers on two stages; sequences make room."""
    make_checkpoint("llama", tmp_path, attention_bias=True, mlp_bias=True)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    asked = [Request(str(i), [(7 * i + n) % 199 for n in range(60)], params) for i in range(5)]
    config = replace(CONFIG, model=str(tmp_path), kv_cache_memory=MIB // 2, swap_space=MIB, prefix_caching=False)
    expected = answers(config, asked)
    assert_same_answers(answers(replace(config, tp=2, pp=2, kv_cache_memory=MIB // 4), asked), expected)


@pytest.mark.parametrize(("model_type", "pp"), [("qwen2_moe", 1), ("deepseek_v3", 2)])
def test_ranks_share_experts_and_heads_over_one_latent(model_type: str, pp: int, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path, **MIXTURES[model_type])
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asked = [Request(str(i), [(7 * i + n) % 199 for n in range(90)], params) for i in range(4)]
    config = replace(CONFIG, model=str(tmp_path), kv=KVOptions(nbits="4"))
    assert_same_answers(answers(replace(config, tp=2, pp=pp), asked), answers(config, asked))


@pytest.mark.parametrize(
    ("model_type", "tp", "ep", "pp", "kv"),
    [
        ("mixtral", 2, 2, 1, KVOptions(nbits="4")),
        ("qwen2_moe", 4, 2, 1, KVOptions()),
        ("qwen3_moe", 4, 4, 1, KVOptions(nbits="4")),
        ("deepseek_v2", 2, 2, 1, KVOptions()),
        ("deepseek_v3", 2, 2, 2, KVOptions(nbits="4")),
    ],
)
def test_whole_experts_on_ranks_answer_as_one_process_does(
    model_type: str, tp: int, ep: int, pp: int, kv: KVOptions, tmp_path: Path
) -> None:
    """And what they count of their experts is what one process counts of them all."""
    make_checkpoint(model_type, tmp_path, **WHOLE[model_type])
    config, counted = replace(CONFIG, model=str(tmp_path), kv=kv), [dict[int, list[int]](), dict[int, list[int]]()]
    expected = answers(config, requests(199), counted[0])
    assert_same_answers(answers(replace(config, tp=tp, ep=ep, pp=pp), requests(199), counted[1]), expected)
    assert counted[0] == counted[1] and all(map(all, counted[0].values()))


def make_unfit_checkpoint(folder: Path) -> None:
    """Keys of token 5 are beyond fp16 in the second KV head, which only the second rank has."""
    make_checkpoint("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    embedding, keys = tensors["model.embed_tokens.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    embedding[:, 0], embedding[5] = 0, 0
    embedding[5, 0] = 1e6  # all that is left of it behind a norm
    for layer in range(2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"][0] = 0  # nothing else gets into that channel
    keys[16:, 0] = 1e5
    save_file(tensors, folder / "model.safetensors")


def test_what_one_rank_cannot_hold_is_not_scored_and_the_next_text_is(tmp_path: Path) -> None:
    make_unfit_checkpoint(tmp_path)
    config = replace(CONFIG, model=str(tmp_path))
    fits, kv = [Window([10] * 90)], KVOptions(nbits="4")
    (expected,) = ScoringModel(config).hidden_states(fits, kv)
    with closing(ScoringModel(replace(config, tp=2))) as model:
        with pytest.raises(UnsupportedError, match="cannot be quantised"):
            list(model.hidden_states([Window([5] * 90)], kv))
        (found,) = model.hidden_states(fits, kv)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_one_rank_cannot_hold_fails_its_request_alone(tmp_path: Path) -> None:
    make_unfit_checkpoint(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asked = [Request(str(i), [10 + i] * 70, params) for i in range(3)]
    config = replace(CONFIG, model=str(tmp_path), kv=KVOptions(nbits="4"), prefix_caching=False)
    expected = answers(config, asked)
    engine = Engine(replace(config, tp=2, run_ahead=True))
    try:
        for request in (*asked[:2], Request("bad", [5] * 70, params), asked[2]):
            engine.submit(request)
        got: dict[str, list[Tokens]] = {}
        while engine.has_work:
            for tokens in engine.step():
                got.setdefault(tokens.id, []).append(tokens)
    finally:
        engine.close()
    (bad,) = got.pop("bad")
    assert bad.error and "cannot be quantised" in bad.error
    assert {name: [t.token_ids for t in tokens] for name, tokens in got.items()} == {
        name: [t.token_ids for t in tokens] for name, tokens in expected.items()
    }


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_together_score_as_one_does(tp: int, pp: int, tmp_path: Path) -> None:
    """Perplexity and divergence under several formats at once, and a baseline that either can read."""
    formats = {"16": KVOptions(), "4": KVOptions(nbits="4"), "2": KVOptions(nbits="2"), "plan": PLAN}
    config, file = replace(CONFIG, max_num_batched_tokens=300), tmp_path / "baseline.safetensors"
    with closing(ScoringModel(config)) as model:
        tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
        task = make_task("hf-stride", read_documents(SAMPLE), tokenizer, 2048, window=400, stride=300, max_tokens=900)
        expected = score_formats(model, task, formats, save_baseline=file)
    with closing(ScoringModel(replace(config, tp=tp, pp=pp))) as model:
        found = score_formats(model, task, formats)
        again = score_formats(model, task, {"4": formats["4"]}, baseline=file)
        with pytest.raises(CapacityError, match=r"has no .* for the KV cache"):
            next(model.hidden_states([Window([5, 6])], KVOptions(nbits="4", residual_length=2**40)))
        assert score_formats(model, task, {"4": formats["4"]})[0].perplexity == found[1].perplexity
    for ours, theirs in zip([*found, again[0]], [*expected, expected[1]], strict=True):
        assert ours.format == theirs.format and ours.bytes_per_token == theirs.bytes_per_token
        figures = [(score.perplexity, score.kld_mean, score.kld_max, score.top1_agreement) for score in (ours, theirs)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-9, rel=1e-9)


@pytest.mark.parametrize(("model_type", "tp", "pp"), [("tiny", 4, 1), ("deepseek_v3", 1, 2)])
def test_layers_of_ranks_are_looked_into_as_those_of_one(model_type: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Keys, values and what attention makes of them, of all heads and stages."""
    config, kv = CONFIG, KVOptions(nbits="4")
    if model_type != "tiny":
        make_checkpoint(model_type, tmp_path, **MIXTURES[model_type])
        config = replace(config, model=str(tmp_path))
    windows = torch.tensor([[(7 * n) % 199 for n in range(start, start + 150)] for start in (0, 40)])

    def looked_into(asked: EngineConfig) -> list[float]:
        with closing(ScoringModel(asked)) as model:
            fmt, activations = model.layout(kv).format, calibrate(model.whole, windows)
            errors = [x for e in layer_errors(activations, fmt) for x in (e.key, e.value, e.output)]
            return errors + list(propagated_errors(model.whole, windows, activations, fmt))

    found, expected = looked_into(replace(config, tp=tp, pp=pp)), looked_into(config)
    assert min(expected) > 0 and len(set(expected)) == len(expected) - 1, "the first layer has none before it"
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_stage_keeps_the_tail_that_another_needs() -> None:
    spec = kv_spec(load_config(resolve_model("tiny")), torch.float64)
    whole = resolve(PLAN, spec)
    first, last = whole.of_layers(range(0, 2)), whole.of_layers(range(2, 4))
    assert not whole.packs_on_write
    assert (first.tail_tokens, last.tail_tokens) == (whole.tail_tokens,) * 2
    assert first.layers + last.layers == whole.layers


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ({"tp": 3}, "--tp 3: does not divide the model's 4 query heads"),
        ({"pp": 5}, "--pp 5: the model has only 4 layers"),
        ({"tp": 2, "ep": 2}, "--ep 2: a qwen2 model has no experts to share out; use --tp"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(ranks: dict[str, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Engine(replace(CONFIG, **ranks))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ({"ep": 2}, "--ep 2: does not divide --tp 1, whose ranks share the experts out"),
        ({"tp": 4, "ep": 3}, "--ep 3: does not divide --tp 4"),
        ({"tp": 16, "ep": 16}, "--ep 16: does not divide the model's 8 experts"),
        ({"tp": 2}, "--tp 2 --pp 1: 2 ranks cannot share the 25 columns of an expert; with --ep 2 they need not"),
        ({"tp": 4, "ep": 2}, "--tp 4 --ep 2 --pp 1: 2 ranks cannot share the 25 columns of an expert; with --ep 4"),
    ],
)
def test_experts_that_ranks_cannot_share_are_refused(ranks: dict[str, int], why: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, **WHOLE["qwen3_moe"])
    with pytest.raises(ConfigError, match=why):
        Engine(replace(CONFIG, model=str(tmp_path), **ranks))  # type: ignore[arg-type]


def test_copies_that_arrive_wrong_are_named() -> None:
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]

    def broken(x: torch.Tensor, target: torch.device) -> torch.Tensor:
        return x.clone() if target == devices[0] else torch.zeros_like(x)

    assert list(wrong_copies(devices)) == []
    assert list(wrong_copies(devices, broken)) == ["copies from cpu:0 to cpu:1 arrive wrong"]
