"""Floors against counted FLOPs and bytes, and the verdict on figures that no card can reach."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MLA, QWEN_MOE, make_checkpoint
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kvtool.bench.events import RequestRecord
from kvtool.bench.floors import Floors, ModelCost, Rates, cost, datasheet, foreign_floors, last_level_cache
from kvtool.bench.metrics import Figures
from kvtool.errors import ConfigError
from kvtool.models import load_config, resolve_model

TINY = resolve_model("tiny")
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> ModelCost:
    return cost(load_config(TINY), 2, kv_token_bytes=512)


def counted_flops(model: Any, tokens: int) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    return int(counter.get_total_flops())


def test_flops_are_those_that_transformers_does(tiny: ModelCost) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    masked = tiny.flops_per_pair * 100 * 99 / 2  # it multiplies these too
    assert tiny.prefill_flops(100) == counted_flops(model, 100) - masked


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
        ("deepseek_v2", MLA | {"q_lora_rank": None}),
        ("deepseek_v3", MLA | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
    ],
)
def test_experts_and_latents_cost_what_transformers_does(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    oracle = make_checkpoint(model_type, tmp_path, **fields)
    oracle.set_experts_implementation("eager")  # the counter does not know the grouped product
    model = cost(load_config(tmp_path), 2, kv_token_bytes=512)
    assert model.prefill_flops(20) == counted_flops(oracle, 20) - model.flops_per_pair * 20 * 19 / 2


def test_a_prompt_costs_what_its_tokens_cost_one_by_one(tiny: ModelCost) -> None:
    apart = sum(tiny.decode_flops(context) - tiny.flops_per_sample for context in range(1, 51)) + tiny.flops_per_sample
    assert tiny.prefill_flops(50) == pytest.approx(apart)
    cached = (
        sum(tiny.decode_flops(context) - tiny.flops_per_sample for context in range(21, 51)) + tiny.flops_per_sample
    )
    assert tiny.prefill_flops(50, cached=20) == pytest.approx(cached)


def test_bytes_are_those_of_the_matrices(tiny: ModelCost) -> None:
    with safe_open(TINY / "model.safetensors", "pt") as tensors:  # type: ignore[no-untyped-call]
        names = tensors.keys()
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    assert tiny.weight_bytes == sum(2 * rows * columns for rows, columns in (s for s in shapes if len(s) == 2))
    assert tiny.decode_bytes(100, 3) == tiny.weight_bytes + 3 * 100 * 512


def test_a_window_bounds_what_is_read(tiny: ModelCost) -> None:
    windowed = ModelCost(
        **{name: getattr(tiny, name) for name in tiny.__struct_fields__ if name != "window"}, window=64
    )
    assert windowed.decode_bytes(1000, 1) == tiny.decode_bytes(64, 1)
    assert windowed.decode_flops(1000) == tiny.decode_flops(64)


def test_rates_give_the_cache_away() -> None:
    rates = Rates("x", bytes_per_s=100, flops_per_s=10, cache_bytes=1000)
    assert rates.seconds(1200, 5) == 2
    assert rates.seconds(900, 5) == 0.5


@pytest.mark.parametrize(
    "name, bytes_per_s",
    [("NVIDIA GeForce RTX 4090", 1.01e12), ("NVIDIA H200", 4.8e12), ("NVIDIA L40S", 864e9), ("NVIDIA L4", 300e9),
     ("NVIDIA A100-SXM4-80GB", 2.04e12), ("h200", 4.8e12), ("NVIDIA H100 NVL", 3.94e12),
     ("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA GeForce RTX 3090 Ti", 1.008e12)],
)  # fmt: skip
def test_datasheets_are_found_by_the_drivers_names(name: str, bytes_per_s: float) -> None:
    found = datasheet(name, eight_bit=False)
    assert found is not None and found.bytes_per_s == bytes_per_s


def test_cards_that_are_not_known_have_none() -> None:
    assert datasheet("NVIDIA RTX 4900", eight_bit=False) is None
    assert datasheet("Quadro", eight_bit=False) is None
    assert last_level_cache() >= 0


def measured(ttft: float, tpot: float, seconds: float, requests: int) -> Figures:
    """Figures of requests of 100 tokens in and 32 out, spread over `seconds`."""
    figures = Figures()
    for number in range(requests):
        sent = number * (seconds - ttft - 31 * tpot) / max(1, requests - 1)
        times = [sent + ttft + n * tpot for n in range(32)]
        figures.add(
            RequestRecord(
                run=0, id=number, asked_tokens=32, scheduled=sent, sent=sent, ended=times[-1], chunk_times=times,
                chunk_kinds="t" * 32, chunk_tokens=[1] * 32, prompt_tokens=100, cached_tokens=0, output_tokens=32,
            )
        )  # fmt: skip
    return figures


@pytest.fixture
def on_two_4090s(tmp_path: Path) -> Floors:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B))
    return foreign_floors(tmp_path / "config.json", "RTX 4090:2")


def test_a_7b_model_on_two_4090s_answers_no_2_ms_and_no_360_requests_a_second(on_two_4090s: Floors) -> None:
    assert on_two_4090s.model.weight_bytes == pytest.approx(2 * 7.07e9, rel=0.01)
    (fault,) = on_two_4090s.impossible(measured(0.002, 0.02, 10, 20), sequences=4)
    assert "TTFT of 2 ms" in fault and "RTX 4090" in fault
    faults = on_two_4090s.impossible(measured(0.02, 0.0001, 1, 1200), sequences=64)
    assert any("run of 1 s" in fault for fault in faults)


def test_what_they_can_do_is_valid(on_two_4090s: Floors) -> None:
    floor = on_two_4090s.ttft_ms(100)
    assert 6.9 < floor < 7.1  # 14.1 GB at 2 × 1.01 TB/s, but for the cache
    assert on_two_4090s.impossible(measured(1.01 * floor / 1e3, 0.008, 10, 20), sequences=4) == []


def test_a_server_of_8_bit_weights_is_believed(on_two_4090s: Floors) -> None:
    ttft = 0.55 * on_two_4090s.ttft_ms(100) / 1e3  # half the bytes of the 16-bit floor
    assert on_two_4090s.impossible(measured(ttft, 0.008, 10, 20), sequences=4) == []


def test_our_engine_reads_all_weights_for_each_token(on_two_4090s: Floors) -> None:
    ours = Floors(
        model=on_two_4090s.model, rates=on_two_4090s.rates, peak=on_two_4090s.peak, steps=True, max_num_seqs=4,
        least_weight_bytes=on_two_4090s.model.weight_bytes,
    )  # fmt: skip
    assert any("TPOT" in fault for fault in ours.impossible(measured(0.02, 0.003, 10, 20), sequences=4))
    assert on_two_4090s.impossible(measured(0.02, 0.003, 10, 20), sequences=4) == []  # it may speculate


@pytest.mark.parametrize("gpu", ["RTX 4900", "H200:0", "H200:two", ""])
def test_an_unknown_card_is_refused(gpu: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpu"):
        foreign_floors(tmp_path, gpu)
