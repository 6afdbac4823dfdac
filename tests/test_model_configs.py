"""What a config.json may say, the true shapes of real models, and where a model is."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from checkpoints import LLAMA3, MLA, QWEN_MOE, YARN, make_checkpoint, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ModelError
from kvtool.layers.rotary import Rotary
from kvtool.models import ModelConfig, load_config, load_model, resolve_model

CPU = torch.device("cpu")
KINDS_OF_ROPE = ("default", "linear", "llama3", "yarn", "longrope")
OLD = {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}


def test_old_and_new_spelling_say_the_same(tmp_path: Path) -> None:
    write_config(tmp_path, torch_dtype="bfloat16", **OLD)
    old = load_config(tmp_path)
    write_config(tmp_path, dtype="bfloat16", rope_parameters=YARN)
    assert load_config(tmp_path) == old
    assert old.dtype == "bfloat16"


def test_phi3_names_longrope_in_two_ways(tmp_path: Path) -> None:
    longrope = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    ropes = set()
    for kind in ("su", "longrope"):
        scaling = {"type": kind, **longrope}
        outer = {"original_max_position_embeddings": 64, "sliding_window": None}
        write_config(tmp_path, model_type="phi3", rope_scaling=scaling, **outer)
        ropes.add(load_config(tmp_path).rope)
    assert len(ropes) == 1


def test_end_of_text_ids_come_from_both_files(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=7)
    assert load_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert load_config(tmp_path).eos_token_ids == (7, 9)
    write_config(tmp_path, eos_token_id=None)
    assert load_config(tmp_path).eos_token_ids == (9, 7)


def test_only_layers_named_slide(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=2)
    assert load_config(tmp_path).sliding_window == (None, None, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    write_config(tmp_path, model_type="qwen3", use_sliding_window=True, sliding_window=9, layer_types=types)
    assert load_config(tmp_path).sliding_window == (9, None, None)
    write_config(tmp_path, model_type="qwen2", use_sliding_window=False, sliding_window=9)
    assert load_config(tmp_path).sliding_window == (None,) * 3
    write_config(tmp_path, model_type="llama", sliding_window=9)
    assert load_config(tmp_path).sliding_window == (None,) * 3


REQUIRED = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]


def refusal(folder: Path) -> str:
    """The one line that a folder is refused with."""
    with pytest.raises(ModelError) as caught:
        load_config(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    write_config(tmp_path, **{field: None})
    assert f"config.json: {field} is missing" in refusal(tmp_path)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"hidden_size": "64"}, "hidden_size is '64'; it must be an integer of at least 1"),
    "fraction": ({"vocab_size": 1.5}, "vocab_size is 1.5; it must be an integer of at least 1"),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer of at least 1"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0; it must be an integer of at least 1"),
    "too many layers": ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647; it must be"),
    "too many positions": ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 2147483647; it must be"),
    "an id beyond any": ({"eos_token_id": 10**30}, "eos_token_id is 1"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number above 0"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    "kv heads": ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads"),
    "heads": (
        {"num_attention_heads": 6, "head_dim": None},
        "hidden_size is 64; it must be a multiple of num_attention",
    ),
    "odd head": ({"head_dim": 15}, "head_dim is 15"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; it must be one of"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits is None; only 4"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "architecture": ({"model_type": "gpt2"}, "model_type is 'gpt2', which is not supported; use one of deepseek_v2"),
    "remote code": ({"model_type": "x", "auto_map": {"AutoModel": "x.X"}}, "auto_map asks to run code"),
    "window": ({"model_type": "mistral"}, "sliding_window is missing; set it"),
    "rope": ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be an object"),
    "rope type": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "rope theta": ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is 'x'"),
    "rope band": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling.high_freq_factor is 4.0; it must"),
    "huge": ({"vocab_size": 10**400}, "vocab_size is 1000"),
    "long factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0]}},
        "rope_scaling.long_factor must be a list of 8 positive numbers",
    ),
    "layer types": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
        "layer_types must be a list of 3 entries",
    ),
    "experts": ({"model_type": "qwen3_moe"}, "num_experts is missing; add it"),
    "a size of experts": ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is missing; add it"),
    "too many experts": ({"model_type": "qwen3_moe", "num_experts": 1 << 20}, "num_experts is 1048576; it must be"),
    "more experts than there are": (
        {"model_type": "qwen3_moe", **QWEN_MOE, "num_experts_per_tok": 9},
        "num_experts_per_tok is 9; a token chooses among 8 experts",
    ),
    "layers without experts": ({"model_type": "qwen3_moe", **QWEN_MOE, "mlp_only_layers": "1"}, "mlp_only_layers must"),
    "latent": ({"model_type": "deepseek_v2", **MLA, "kv_lora_rank": None}, "kv_lora_rank is missing; add it"),
    "biases": (
        {"model_type": "deepseek_v2", **MLA, "attention_bias": True},
        "attention_bias is true; latent attention",
    ),
    "odd rope": ({"model_type": "deepseek_v2", **MLA, "qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; it must be even"),
    "routing": ({"model_type": "deepseek_v2", **MLA, "topk_method": "x"}, "topk_method is 'x'; it must be greedy or"),
    "weights": ({"model_type": "deepseek_v2", **MLA, "norm_topk_prob": True}, "norm_topk_prob is true, which this"),
    "frequency": ({"model_type": "deepseek_v3", **MLA, "moe_layer_freq": 2}, "moe_layer_freq is 2; experts are"),
    "groups": ({"model_type": "deepseek_v3", **MLA, "n_group": 3}, "n_group is 3; 8 experts do not divide"),
    "groups that are used": (
        {"model_type": "deepseek_v3", **MLA, "n_group": 2, "topk_group": 3},
        "topk_group is 3; it",
    ),
    "choice within groups": (
        {"model_type": "deepseek_v3", **MLA, "n_group": 4, "topk_group": 1},
        "num_experts_per_tok is 3; a token chooses among 2 experts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named_with_its_remedy(case: str, tmp_path: Path) -> None:
    overrides, expected = WRONG[case]
    write_config(tmp_path, **overrides)
    assert f"{tmp_path / 'config.json'}: {expected}" in refusal(tmp_path)


def test_code_of_a_known_architecture_is_ignored(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_phi3.Phi3Config"}
    write_config(tmp_path, model_type="phi3", sliding_window=None, auto_map=auto_map)
    assert load_config(tmp_path).model_type == "phi3"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "holds no JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-LFS pointer"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path / 'config.json'}: {expected}" in refusal(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
SCALING = st.dictionaries(
    st.sampled_from(
        ["factor", "original_max_position_embeddings", "rope_theta", "short_factor", "mscale", "beta_fast"]
    ),
    JSON,
).flatmap(lambda fields: st.builds(lambda kind: {**fields, "type": kind}, st.sampled_from([*KINDS_OF_ROPE, "su", 1])))
FIELDS = ["rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "max_window_layers"]
FIELDS += ["head_dim", "eos_token_id", "torch_dtype", "use_sliding_window", "attention_bias", "partial_rotary_factor"]
FIELDS += ["n_group", "topk_group", "topk_method", "mlp_only_layers", "moe_layer_freq", "rope_interleave", *MLA]
FIELDS += ["hidden_act", "original_max_position_embeddings", *REQUIRED]


def test_no_config_whatever_gives_a_traceback(tmp_path: Path) -> None:
    @settings(max_examples=200, deadline=None)
    @given(
        st.sampled_from(["llama", "qwen2", "phi3", "qwen3_moe", "deepseek_v3"]),
        st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
        st.none() | SCALING,
    )
    def law(model_type: str, overrides: dict[str, Any], scaling: dict[str, Any] | None) -> None:
        shape = MLA if model_type == "deepseek_v3" else QWEN_MOE
        write_config(tmp_path, **{**shape, "model_type": model_type, "rope_scaling": scaling, **overrides})
        try:
            config = load_config(tmp_path)
        except ModelError as error:
            assert "\n" not in str(error)
        else:
            Rotary(config.rope, 8, dtype=torch.float32, device=CPU)

    law()


# The true shapes of real models

LITERAL: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "Phi-3-mini": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": 2047,
    },
}
LITERAL["Qwen3-30B-A3B"] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
}
LITERAL["DeepSeek-V2-Lite"] = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
}
MILLIONS = {"Qwen2.5-7B": 7616, "Llama-3.2-1B": 1236, "Phi-3-mini": 3821}
MILLIONS |= {"Qwen3-30B-A3B": 30532, "DeepSeek-V2-Lite": 15706}
SHARED = Path(__file__).parents[2] / "shared" / "data" / "configs"
SHARED_MILLIONS = {
    "DeepSeek-V2-Lite": 15706,
    "Llama-3.1-8B": 8030,
    "Llama-3.2-1B": 1236,
    "Mistral-7B-v0.3": 7248,
    "Mixtral-8x7B-v0.1": 46703,
    "Phi-3-mini-4k-instruct": 3821,
    "Qwen2.5-0.5B-Instruct": 494,
    "Qwen2.5-1.5B-Instruct": 1544,
    "Qwen2.5-3B": 3086,
    "Qwen2.5-7B-Instruct": 7616,
    "Qwen3-0.6B": 596,
    "Qwen3-1.7B": 1721,
    "Qwen3-30B-A3B": 30532,
    "Qwen3-8B": 8191,
    "SmolLM2-135M": 135,
    "TinyLlama-1.1B-Chat-v1.0": 1100,
}


def parameters_in_millions(folder: Path) -> int:
    meta = torch.device("meta")
    config = load_config(folder)
    model = load_model(folder, config, dtype=torch.bfloat16, device=meta, load_format="dummy", max_model_len=64)
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)


@pytest.mark.parametrize("name", LITERAL)
def test_true_shape_has_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LITERAL[name]))
    assert parameters_in_millions(tmp_path) == MILLIONS[name]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the collection of configs is not here")
@pytest.mark.parametrize("name", SHARED_MILLIONS)
def test_every_collected_config_builds_at_true_shape(name: str) -> None:
    assert parameters_in_millions(SHARED / name) == SHARED_MILLIONS[name]


# Where a model is


def test_the_embedded_model_is_found_by_name() -> None:
    config = load_config(resolve_model("tiny"))
    assert config.model_type == "qwen2"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/folder", "no such folder"),
        ("./model", "no such folder"),
        ("a/b/c", "no such folder"),
        (__file__, "give the folder"),
        ("nobody/nothing", "the hub cannot be reached"),
    ],
)
def test_a_model_that_is_nowhere_is_one_line(name: str, expected: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model(name)
    assert str(caught.value).startswith(f"--model {name}: ")
    assert "\n" not in str(caught.value)


def test_a_cached_hub_model_loads_without_a_network(tmp_path: Path, monkeypatch: Any) -> None:
    repository = tmp_path / "models--who--what"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    make_checkpoint("qwen2", repository / "blobs")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = resolve_model("who/what")
    assert folder == snapshot
    config: ModelConfig = load_config(folder)
    load_model(folder, config, dtype=torch.float32, device=CPU)
