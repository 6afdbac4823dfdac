"""How often each expert is chosen: counted as transformers would, whatever else fills up a step."""

import random
from pathlib import Path

import torch
from checkpoints import QWEN_MOE, make_checkpoint
from transformers import AutoModelForCausalLM

from kvtool.config import EngineConfig
from kvtool.engine import Engine
from kvtool.layers.moe import ExpertLoad, Router, Routing
from kvtool.request import SamplingParams


def test_an_engine_counts_what_transformers_chooses(tmp_path: Path) -> None:
    """Over prompts in chunks and the tokens that follow, but for the last one, which nobody computes."""
    make_checkpoint("qwen3_moe", tmp_path, mlp_only_layers=[1], **QWEN_MOE)
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 199) for _ in range(n)] for n in (1, 40, 150)]
    config = EngineConfig(
        model=str(tmp_path), dtype="float64", device="cpu", kv_cache_memory=8 << 20, max_num_batched_tokens=64
    )
    engine = Engine(config)
    assert engine.info.num_experts == 8
    assert engine.expert_tokens() == {layer: [0] * 8 for layer in (0, 2)}
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    expected = {layer: torch.zeros(8, dtype=torch.int64) for layer in (0, 2)}
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.token_ids[:-1]])
        with torch.inference_mode():
            logits = oracle(ids, output_router_logits=True).router_logits
        for layer, of_layer in zip(expected, logits, strict=True):
            expected[layer] += of_layer.topk(3).indices.flatten().bincount(minlength=8)
    assert engine.expert_tokens() == {layer: counts.tolist() for layer, counts in expected.items()}


def test_dense_models_count_nothing() -> None:
    assert Engine(EngineConfig(kv_cache_memory=8 << 20, device="cpu")).expert_tokens() == {}


@torch.inference_mode()
def test_rows_that_fill_up_a_step_are_not_counted() -> None:
    routers = {layer: Router(16, Routing(5, 2), 0, dtype=torch.float64, device=torch.device("cpu")) for layer in (1, 4)}
    load, expected = ExpertLoad(routers, rows=12), {layer: torch.zeros(5, dtype=torch.int64) for layer in routers}
    for router in routers.values():
        router.weight.normal_()
    for tokens in (4, 9, 12, 0):
        for layer, router in routers.items():
            ids, _ = router.experts_of(torch.randn(12, 16, dtype=torch.float64))
            expected[layer] += ids[:tokens].flatten().bincount(minlength=5)
        load.count(tokens)
    assert load.totals() == {layer: counts.tolist() for layer, counts in expected.items()}
    load.reset()
    assert load.totals() == {layer: [0] * 5 for layer in routers}
