"""The decoder against transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3, MLA, QWEN_MOE, SHAPE, YARN, DenseAttend, make_checkpoint, run, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from kvtool.attention.queries import prepared
from kvtool.layers import moe
from kvtool.layers.rotary import Rotary
from kvtool.models import Decoder, load_config, load_model

CPU = torch.device("cpu")
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0]}
V2_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}

# Name: architecture, fields of the config, and the longest sequence where that matters.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, 512),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, 512),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}, 512),
    "qwen3": ("qwen3", {"head_dim": 32}, 512),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, 512),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, 512),
    "llama-yarn": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}}, 512),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}}, 512),
    "mistral": ("mistral", {"sliding_window": 9}, 512),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}, 512),
    "phi3": ("phi3", {"sliding_window": 17}, 512),
    "phi3-short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}, 256),
    "phi3-long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, 512),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, 512),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 9, "num_experts_per_tok": 4}, 512),
    "qwen2_moe": ("qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 40}, 512),
    "qwen2_moe-step": (
        "qwen2_moe",
        QWEN_MOE | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 2},
        512,
    ),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE | {"norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 32}, 512),
    "qwen3_moe-window": ("qwen3_moe", QWEN_MOE | {"use_sliding_window": True, "sliding_window": 9}, 512),
    "deepseek_v2": ("deepseek_v2", MLA | {"q_lora_rank": None, "rope_parameters": V2_YARN}, 512),
    "deepseek_v2-groups": ("deepseek_v2", MLA | GROUPS | {"q_lora_rank": 24, "n_shared_experts": 1}, 512),
    "deepseek_v3": (
        "deepseek_v3",
        MLA | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": V2_YARN | {"mscale": 1.0}},
        512,
    ),
    "deepseek_v3-plain": (
        "deepseek_v3",
        MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
        512,
    ),
}
PROMPT = torch.randint(SHAPE["vocab_size"], (80,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """By name of a case: transformers' model, and the folder it was saved to."""

    @cache
    def make(case: str) -> tuple[Any, Path]:
        model_type, overrides, _ = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        return make_checkpoint(model_type, folder, **overrides), folder

    return make


def load(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, load_config(folder), dtype=dtype, device=CPU, max_model_len=CASES[case][2])


def in_chunks(model: Decoder, ids: list[int], sizes: list[int]) -> Tensor:
    """Logits of `ids`, computed in chunks of these sizes and one of what is left."""
    attend, parts, start = DenseAttend(model.config), [], 0
    for size in [*sizes, len(ids)]:
        if chunk := ids[start : start + size]:
            parts.append(run(model, chunk, attend, start))
        start += len(chunk)
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case: str, opened: Any) -> None:
    oracle, folder = opened(case)
    with torch.inference_mode():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(in_chunks(load(case, folder), PROMPT, []), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens_match_transformers(case: str, opened: Any) -> None:
    oracle, folder = opened(case)
    prompt = PROMPT[:40]
    oracle.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    model = load(case, folder)
    attend = DenseAttend(model.config)
    tokens = [int(run(model, prompt, attend)[-1].argmax())]
    while len(tokens) < 64:
        tokens.append(int(run(model, tokens[-1:], attend, len(prompt) + len(tokens) - 1)[0].argmax()))
    assert len(set(tokens)) > 8
    assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("case", CASES)
def test_chunks_of_any_size_give_the_same_logits(case: str, size: int, opened: Any) -> None:
    model = load(case, opened(case)[1], torch.float64)
    whole = in_chunks(model, PROMPT, [])
    torch.testing.assert_close(in_chunks(model, PROMPT, [size] * (80 // size)), whole, rtol=0, atol=1e-10)


def test_any_cut_gives_the_same_logits(opened: Any) -> None:
    model = load("qwen2-window", opened("qwen2-window")[1], torch.float64)
    whole = in_chunks(model, PROMPT, [])

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 40), max_size=8))
    def law(sizes: list[int]) -> None:
        torch.testing.assert_close(in_chunks(model, PROMPT, sizes), whole, rtol=0, atol=1e-10)

    law()


def test_sequences_laid_end_to_end_do_not_see_each_other(opened: Any) -> None:
    model = load("qwen3", opened("qwen3")[1], torch.float64)
    first, second = PROMPT[:30], PROMPT[30:]
    attends = DenseAttend(model.config), DenseAttend(model.config)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = zip(attends, *(x.split((30, 50)) for x in (q, k, v)), strict=True)
        return torch.cat([each(layer, q, k, v) for each, q, k, v in pairs])

    positions = torch.cat((torch.arange(30), torch.arange(50)))
    with torch.inference_mode():
        together = model.logits(model(torch.tensor(PROMPT), positions, prepared(attend)))
    apart = torch.cat((in_chunks(model, first, []), in_chunks(model, second, [])))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["qwen3", "phi3", "qwen2_moe", "qwen2_moe-step", "deepseek_v2"])
def test_the_last_layer_computes_what_is_wanted(case: str, opened: Any) -> None:
    """Behind its attention; experts see all tokens, because they are counted."""
    model, rows = load(case, opened(case)[1], torch.float64), list[int]()
    given, wanted = (torch.tensor(PROMPT), torch.arange(80)), torch.tensor([3, 40, -1])
    for layer in model.layers.values():
        layer.mlp.register_forward_pre_hook(lambda mlp, given: rows.append(len(given[1])))
    with torch.inference_mode():
        some = model(*given, prepared(DenseAttend(model.config)), wanted)
        whole = model(*given, prepared(DenseAttend(model.config)))
    torch.testing.assert_close(some, whole[wanted], rtol=0, atol=1e-10)
    *others, last = rows[: len(model.layers)]
    assert set(others) == {80} and last == (80 if model.config.experts[-1] else 3)


@pytest.mark.parametrize("rows", [3, 70])
def test_logits_go_where_they_are_asked_for(rows: int, opened: Any) -> None:
    model = load("llama3", opened("llama3")[1], torch.float64)
    hidden = torch.randn(rows, model.config.hidden_size, dtype=torch.float64)
    out = torch.full((rows, model.config.vocab_size), torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        assert model.logits(hidden, out) is out
        torch.testing.assert_close(out, model.logits(hidden), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_for_no_value_of_any_tensor(case: str, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has shapes and no values: what runs there can be captured as a CUDA graph."""
    monkeypatch.setattr(moe, "mix_reference", lambda x, *_: torch.empty_like(x))  # a kernel's place on a GPU
    config, meta = load_config(opened(case)[1]), torch.device("meta")
    model = load_model(opened(case)[1], config, dtype=torch.float16, device=meta, load_format="dummy")
    ids = torch.zeros(5, dtype=torch.int64, device=meta)
    logits = model.logits(model(ids, ids, prepared(lambda layer, q, k, v: q[..., : v.shape[-1]])))
    assert (logits.shape, logits.dtype) == ((5, config.vocab_size), torch.float16)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=str
)
@pytest.mark.parametrize("case", ["qwen3", "llama3", "phi3-long"])
def test_every_dtype_computes_the_same_model(case: str, dtype: torch.dtype, tolerance: float, opened: Any) -> None:
    folder = opened(case)[1]
    expected = in_chunks(load(case, folder), PROMPT, [])
    logits = in_chunks(load(case, folder, dtype), PROMPT, [])
    assert logits.dtype == dtype
    error = (logits.double() - expected.double()).square().mean().sqrt() / expected.std()
    assert error < tolerance


def test_layers_that_only_draft_are_left_in_the_checkpoint(opened: Any, tmp_path: Path) -> None:
    folder = opened("deepseek_v3")[1]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    ids = PROMPT[:5]
    torch.testing.assert_close(
        in_chunks(load("deepseek_v3", tmp_path), ids, []), in_chunks(load("deepseek_v3", folder), ids, [])
    )


ROPES = {
    "default": st.fixed_dictionaries({}),
    "linear": st.fixed_dictionaries({"factor": st.floats(1, 50)}),
    "llama3": st.fixed_dictionaries(
        {
            "factor": st.floats(1, 50),
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(2.5, 8),
            "original_max_position_embeddings": st.integers(64, 4096),
        }
    ),
    "yarn": st.fixed_dictionaries(
        {"factor": st.floats(1, 50), "original_max_position_embeddings": st.integers(64, 4096)},
        optional={
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 4),
            "attention_factor": st.floats(0.5, 2),
            "mscale": st.floats(0.5, 2),
            "mscale_all_dim": st.floats(0.5, 2),
            "truncate": st.booleans(),
        },
    ),
    "longrope": st.fixed_dictionaries(
        {
            "short_factor": st.lists(st.floats(1, 20), min_size=8, max_size=8),
            "long_factor": st.lists(st.floats(1, 20), min_size=8, max_size=8),
            "original_max_position_embeddings": st.integers(64, 4096),
        },
        optional={"factor": st.floats(1, 50), "attention_factor": st.floats(0.5, 2)},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_tables_match_transformers(kind: str, tmp_path: Path) -> None:
    @settings(max_examples=40, deadline=None)
    @given(ROPES[kind], st.floats(100, 1e6), st.integers(1, 2048))
    def law(parameters: dict[str, Any], theta: float, max_len: int) -> None:
        parameters = {"rope_type": kind, "rope_theta": theta, **parameters}
        write_config(tmp_path, rope_parameters=parameters)
        hf_config = LlamaConfig.from_dict({**SHAPE, "rope_parameters": dict(parameters)})
        positions = torch.arange(max_len)
        cos, sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(()), positions[None])
        rotary = Rotary(load_config(tmp_path).rope, max_len, dtype=torch.float32, device=CPU)
        own_cos, own_sin = (table.flatten(1) for table in rotary(positions))
        sign = torch.tensor([-1.0] * 8 + [1.0] * 8)
        # A relative error of 1e-7 in a frequency is 1e-7 × position in the angle.
        torch.testing.assert_close(own_cos, cos[0], rtol=0, atol=5e-7 * max_len + 1e-6)
        torch.testing.assert_close(own_sin * sign, sin[0], rtol=0, atol=5e-7 * max_len + 1e-6)

    law()
