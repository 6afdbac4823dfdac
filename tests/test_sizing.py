"""`kvtool mla-size`: what models keep as transformers keeps it, bytes as the store allocates them, and what fits."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import Command, error_line
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from kvtool.attention import BACKENDS
from kvtool.config import KVOptions
from kvtool.errors import ConfigError, ModelError
from kvtool.kv.format import resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.models import load_config
from kvtool.models.fields import Fields
from kvtool.models.resolve import EMBEDDED, resolve_config
from kvtool.sizing.latency import Step, StoredLatents, latencies, native_layout
from kvtool.sizing.measured import measured_size
from kvtool.sizing.shapes import ModelShape, count_parameters, read_shape
from kvtool.sizing.theory import Budget, CacheSize, Scheme, SchemeSize, cache_size, model_sizes, schemes_of

SMALL = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Of each kind of reader at least one, and all whose configs are read in ways of their own.
PUBLISHED_WAYS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "num_key_value_heads": None},
    {"model_type": "llama", "head_dim": 24},
    {"model_type": "gemma", "head_dim": None},
    {"model_type": "phi", "num_key_value_heads": 4},
    {"model_type": "gpt_neox", "num_key_value_heads": None},
    {"model_type": "cohere"},
    {"model_type": "glm4", "head_dim": 16},
    {"model_type": "mistral", "sliding_window": 10},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "phi3", "sliding_window": 7},
    {"model_type": "starcoder2", "sliding_window": 9},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 3},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 10, "max_window_layers": 3},
    {"model_type": "qwen3", "head_dim": None},
    {"model_type": "gemma2", "sliding_window": 10},
    {"model_type": "gemma3_text", "sliding_window": 10, "head_dim": 16},
    {"model_type": "gemma3_text", "sliding_window": 10, "num_attention_heads": None, "num_key_value_heads": None},
    {"model_type": "gpt_oss", "sliding_window": 10, "head_dim": 16, **EXPERTS},
    {"model_type": "cohere2", "sliding_window": 10},
    {"model_type": "olmo3", "sliding_window": 10},
    {"model_type": "qwen3_moe", "head_dim": 16, **EXPERTS},
    {"model_type": "mixtral", "sliding_window": 6, **EXPERTS},
    {"model_type": "llama4_text", "attention_chunk_size": 10, "head_dim": 16, "intermediate_size_mlp": 32, **EXPERTS},
]


LATENT = SMALL | {
    "model_type": "deepseek_v3", "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24,
}  # fmt: skip


ROTATED = KVOptions(nbits="4", axis_key="token", rotate=True)


def shape_of(values: dict[str, Any]) -> ModelShape:
    return read_shape("m", Fields(Path("config.json"), values))


@pytest.mark.parametrize("values", PUBLISHED_WAYS, ids=lambda v: " ".join(map(str, v.items())))
def test_layers_keep_what_transformers_keeps(values: dict[str, Any]) -> None:
    given = SMALL | values
    named = {name: value for name, value in given.items() if value is not None or name == "sliding_window"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**named)).eval()
    tokens = 25
    with torch.inference_mode():
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    shape = shape_of(named)
    assert len(cache.layers) == shape.num_layers == len(shape.windows)
    for layer, window in zip(cache.layers, shape.windows, strict=True):
        assert layer.keys.shape[1::2] == (shape.key.heads, shape.key.dim)
        assert layer.values.shape[1::2] == (shape.value.heads, shape.value.dim)
        kept = tokens if window is None else min(tokens, window - 1)  # the next token is the window's last
        assert layer.keys.shape[2] == kept
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(Fields(Path("config.json"), named)) == num_parameters


def test_hybrid_layers_keep_a_state() -> None:
    values = SMALL | EXPERTS | {
        "model_type": "qwen3_next", "head_dim": 16, "full_attention_interval": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_num_value_heads": 4, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True).past_key_values
    shape = shape_of(values)
    attending = [
        layer for layer, kind in zip(cache.layers, config.layer_types, strict=True) if kind == "full_attention"
    ]
    assert len(attending) == len(shape.windows) == 2
    assert all(layer.keys.shape[1::2] == (shape.key.heads, shape.key.dim) for layer in attending)
    recurrent, channels = 4 * 8 * 16, 2 * 2 * 8 + 4 * 16
    assert shape.state_bytes == 6 * (4 * recurrent + 2 * channels * 4)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_a_latent_is_what_its_projection_makes(model_type: str) -> None:
    """transformers keeps keys and values expanded, so its down-projection is asked."""
    values = SMALL | EXPERTS | {
        "model_type": model_type, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 8, "n_routed_experts": 4,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    shape, attention = shape_of(values), model.model.layers[0].self_attn
    assert shape.scheme == "MLA"
    assert shape.value.elements == attention.kv_a_layernorm.weight.numel()
    assert shape.key.elements + shape.value.elements == attention.kv_a_proj_with_mqa.weight.shape[0]
    assert shape.num_heads * (shape.head_dim + shape.value_dim) == attention.kv_b_proj.weight.shape[0]


def test_the_engine_reads_windows_alike(tmp_path: Path) -> None:
    values: dict[str, Any] = json.loads((EMBEDDED["tiny"] / "config.json").read_text())
    for change in ({}, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        config, shape = load_config(tmp_path), read_shape("m", resolve_config(str(tmp_path)))
        assert shape.windows == config.sliding_window
        heads = config.num_kv_heads, config.head_dim, config.num_heads
        assert (shape.key.heads, shape.key.dim, shape.num_heads) == heads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "rwkv"}, "model_type is 'rwkv'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"layer_types": ["mamba"] * 8}, r"layer_types\[0\] is 'mamba'"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types must be a list of 8"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "num_key_value_heads is 2"),
        ({"hidden_size": 63, "num_key_value_heads": 4}, "hidden_size"),
        ({"model_type": "mixtral", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"model_type": "gemma2"}, "sliding_window is missing"),
        ({"model_type": "deepseek_v3"}, "qk_rope_head_dim is missing"),
        ({"model_type": "qwen2_moe", "use_sliding_window": True}, "layer_types"),
        ({"text_config": []}, "text_config"),
    ],
)
def test_what_is_not_known_is_not_guessed(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shape_of(SMALL | {"model_type": "llama"} | change)


def test_layers_that_are_named_are_what_they_are_called() -> None:
    values = SMALL | {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"] * 4}
    assert shape_of(values | {"use_sliding_window": True, "sliding_window": 6}).windows == (6, None) * 4
    assert shape_of(values | {"sliding_window": 6}).windows == (None,) * 8


def test_a_config_is_found_wherever_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {"model_type": "llama"}))
    assert resolve_config(str(file)).values == resolve_config(str(tmp_path)).values
    assert resolve_config("tiny").get("model_type") == "qwen2"
    assert resolve_config("DeepSeek-V3").get("kv_lora_rank") == 512
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, said in (
        ("./none", "embedded models: tiny, tiny-draft, DeepSeek-V2-Lite"),
        ("who/what", "hub cannot be reached"),
    ):
        with pytest.raises(ModelError, match=said):
            resolve_config(name)


# Bytes


def named(sizes: list[SchemeSize] | tuple[SchemeSize, ...]) -> dict[str, SchemeSize]:
    return {size.scheme: size for size in sizes}


def test_published_figures() -> None:
    lite = named(model_sizes("DeepSeek-V2-Lite", KVOptions(), [4096]).schemes)
    assert [lite[name].bytes_per_token_per_layer for name in ("MHA", "GQA-4", "MQA", "MLA")] == [8192, 2048, 512, 1152]
    assert lite["MLA"].native and lite["MLA"].bytes_per_token == 27 * 1152
    assert lite["MLA"].bytes_per_token / lite["GQA-4"].bytes_per_token - 1 == -0.4375  # not -0.5625
    assert lite["MLA"].vs_mha == 1152 / 8192 - 1
    # DeepSeek-V3's report (arXiv 2412.19437) and ISCA paper: 70.272 kB of a token; Llama-3.1's is 128 KiB.
    v3 = named(model_sizes("DeepSeek-V3", KVOptions(), [4096]).schemes)
    assert v3["MLA"].bytes_per_token == 70_272
    llama = named(model_sizes("Llama-3.1-8B", KVOptions(), [4096]).schemes)
    assert llama["GQA-8"].native and llama["GQA-8"].bytes_per_token == 128 << 10
    # DeepSeek-V2's report, table 1: as much as GQA with 2.25 groups.
    assert llama["MLA"].bytes_per_token == 2.25 * llama["MQA"].bytes_per_token


bits = st.sampled_from(["16", "8", "4", "2", "fp8"])
options = st.builds(KVOptions, nbits_key=bits, nbits_value=bits)
windows = st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(options, windows, st.integers(1, 700))
def test_blocks_that_a_later_token_reads_are_kept_and_no_others(
    options: KVOptions, windows: tuple[int | None, ...], length: int
) -> None:
    scheme = Scheme("GQA-2", StreamSpec(2, 32), StreamSpec(2, 32), native=True)
    fmt = resolve(options, KVSpec(len(windows), scheme.key, scheme.value, 2))
    size = CacheSize.of(scheme, fmt, windows, state_bytes=5)
    expected = Fraction(5 + len(windows) * fmt.tail_tokens * 2 * 64 * 2)
    for layout, window in size.groups:
        read = range(0 if window is None else max(0, length + 1 - window), length)
        packed = range(fmt.packed_tokens(length))
        blocks = {t // fmt.block_size for t in packed if t >= (read.start // fmt.block_size) * fmt.block_size}
        expected += len(blocks) * layout.block_bytes
    assert size.bytes_for(length) == expected


@settings(max_examples=60, deadline=None)
@given(options, windows, st.integers(0, 1 << 24))
def test_no_longer_sequence_fits(options: KVOptions, windows: tuple[int | None, ...], nbytes: int) -> None:
    scheme = Scheme("MQA", StreamSpec(1, 64), StreamSpec(1, 64), native=True)
    fmt = resolve(options, KVSpec(len(windows), scheme.key, scheme.value, 2))
    size = CacheSize.of(scheme, fmt, windows, state_bytes=0)
    fits = size.tokens_within(nbytes)
    assert fits == 0 or size.bytes_for(fits) <= nbytes
    if None in windows:
        assert size.bytes_for(fits + 1) > nbytes


@pytest.mark.parametrize("nbits", ["16", "8", "4", "2", "fp8"])
def test_the_store_allocates_what_is_said(nbits: Any) -> None:
    shape = read_shape("m", resolve_config("DeepSeek-V2-Lite"))
    for scheme in schemes_of(shape, ["GQA-4"]):
        size = cache_size(shape, scheme, KVOptions(nbits=nbits))
        ((layout, _),) = size.groups
        for length in (1, 64, 65, 300):
            store = KVStore(layout, layout.format.num_blocks(length), 1, torch.bfloat16)
            assert store.nbytes == size.bytes_for(length)


def test_parts_are_the_whole() -> None:
    for nbits in ("16", "8", "4", "2", "fp8"):
        for size in model_sizes("DeepSeek-V2-Lite", KVOptions(nbits=nbits), [100]).schemes:
            assert size.codes + size.scales + size.zeros + size.padding == pytest.approx(size.bytes_per_token)
            assert size.codes < 64 * size.num_layers * 2048


def test_a_rope_key_keeps_8_bits() -> None:
    (own,) = (s for s in model_sizes("DeepSeek-V2-Lite", KVOptions(nbits="4"), [1]).schemes if s.native)
    # 512 x 4 bits and 8 scales and zeros of 2 bytes; 64 x 8 bits and scale and zero of each channel over 64 tokens.
    assert own.bytes_per_token_per_layer == 256 + 8 * 4 + 64 + 64 * 4 / 64


def test_gpus_share_heads_but_no_latent() -> None:
    sizes = named(model_sizes("DeepSeek-V2-Lite", KVOptions(), [1000], tp=8, schemes=["MHA", "GQA-4", "MQA"]).schemes)
    assert {name: size.copies for name, size in sizes.items()} == {"MHA": 1, "GQA-4": 2, "MQA": 8, "MLA": 8}
    assert sizes["MLA"].bytes_per_token_per_gpu == sizes["MLA"].bytes_per_token
    assert sizes["MHA"].contexts[0].bytes_per_gpu * 8 == sizes["MHA"].contexts[0].nbytes
    with pytest.raises(ConfigError, match="--tp 3"):
        model_sizes("DeepSeek-V2-Lite", KVOptions(), [1], tp=3)


def test_what_fits_beside_the_weights() -> None:
    budget = Budget("NVIDIA GeForce RTX 4090", utilization=0.9)
    sizes = model_sizes("Qwen2.5-7B", KVOptions(), [4096], tp=2, budget=budget)
    assert sizes.room is not None
    assert sizes.room.weights == 7_615_616_512  # two bytes each, on two GPUs
    assert sizes.room.memory == int(24_564 * 2**20 * 0.9)
    own = named(sizes.schemes)["GQA-4"]
    assert own.tokens_that_fit == sizes.room.for_cache // (64 * 28_672) * 64
    assert own.contexts[0].largest_batch == sizes.room.for_cache // (4096 * 28_672)
    none = model_sizes("Qwen2.5-7B", KVOptions(), [4096], budget=Budget(gpu_memory=10 << 30)).schemes
    assert {size.tokens_that_fit for size in none} == {0}


def test_schemes() -> None:
    shape = read_shape("m", resolve_config("Qwen2.5-7B"))  # 28 query heads
    assert [scheme.name for scheme in schemes_of(shape)] == ["MHA", "GQA-4", "MQA", "MLA"]
    assert [scheme.name for scheme in schemes_of(shape, ["GQA-14", "GQA-28"])] == ["MHA", "GQA-14", "GQA-4"]
    for asked, said in (("GQA-8", "28 query heads"), ("GQA-0", "--schemes"), ("XQA", "--schemes")):
        with pytest.raises(ConfigError, match=said):
            schemes_of(shape, [asked])


# What is measured


@pytest.mark.parametrize("nbits", ["16", "4", "2", "fp8"])
def test_the_allocator_holds_what_is_predicted(nbits: Any) -> None:
    shape = read_shape("m", resolve_config("tiny"))
    for scheme in schemes_of(shape):
        found = measured_size(shape, scheme, KVOptions(nbits=nbits), batch=3, context=500, device=torch.device("cpu"))
        assert found.predicted == 3 * cache_size(shape, scheme, KVOptions(nbits=nbits)).bytes_for(500)
        assert found.packed + found.unused_rows + found.tails == found.predicted
        assert abs(found.rounding) < 500_000  # objects of Python and torch come and go


def test_all_forms_of_latent_attention_are_one_function() -> None:
    shape = shape_of(LATENT)
    with torch.inference_mode():
        step = Step.random(shape, 2, 70, torch.float64, torch.device("cpu"))
        expected = step.reference()
        # By hand, one head and sequence: scores over keys made of latents, values gathered.
        keys = torch.cat([step.latents[1] @ step.to_keys[3].T, step.keys[1]], dim=1)
        probs = (keys @ torch.cat([step.nope[1, 3], step.rope[1, 3]]) * step.scale).softmax(0)
        torch.testing.assert_close(expected[1, 3], probs @ step.latents[1] @ step.to_values[3].T)
        torch.testing.assert_close(step.attend(*step.expanded()), expected)
        # Absorbed, softmax is in float32.
        torch.testing.assert_close(step.absorbed(step.latents, step.keys), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [KVOptions(), KVOptions(nbits="8"), KVOptions(nbits="4"), ROTATED], ids=str)
def test_a_backend_reads_stored_latents_as_one_function(options: KVOptions) -> None:
    shape = shape_of(LATENT)
    with torch.inference_mode():
        step = Step.random(shape, 2, 150, torch.float64, torch.device("cpu"))
        stored = StoredLatents.of(step, native_layout(shape, options, torch.float64))
        (torch_backend,) = (backend for backend in BACKENDS if backend.name == "torch")
        error = (stored.attend(step, torch_backend) - step.reference()).norm() / step.reference().norm()
    assert error < (1e-10 if options.nbits is None else 0.01 if options.nbits == "8" else 0.15)


def test_latency_of_what_has_no_latents_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no latents"):
        latencies(read_shape("tiny", resolve_config("tiny")), KVOptions(), 1, 10, torch.device("cpu"))


# The command


def test_rows_of_many_models(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "sizes.html"
    models = ("--model", "DeepSeek-V2-Lite", "--model", "tiny")
    status, stdout, stderr = command("mla-size", *models, "--json", "--output", str(page))
    assert (status, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["schema"] == "kvtool.mla-size/1"
    asked = {"model", "scheme", "native", "bytes_per_token_per_layer", "bytes_per_token", "vs_mha"}
    assert all(asked <= row.keys() for row in document["rows"])
    natives = {row["model"]: row["scheme"] for row in document["rows"] if row["native"]}
    assert natives == {"DeepSeek-V2-Lite": "MLA", "tiny": "GQA-2"}
    assert page.read_text().count("<svg") == 2


def test_the_table_says_how_mla_compares(command: Command) -> None:
    options = ("--nbits", "4", "--gpu", "H200", "--weight-memory", "32GiB")
    status, stdout, _ = command("mla-size", "--model", "DeepSeek-V2-Lite", *options)
    assert status == 0
    for said in ("What fits on each GPU", "What a token's bytes are", "against GQA-4", "each H200 has"):
        assert said in stdout


def test_what_is_measured_is_shown(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "held.html"
    options = ("--context", "100", "--model", "DeepSeek-V2-Lite", "--json", "--output", str(page))
    status, stdout, _ = command("mla-size", "--section", "2", "--batch", "2", "--schemes", "MLA", *options)
    (row,) = json.loads(stdout)["rows"]
    assert status == 0 and page.read_text().count("<svg") == 1
    assert row["measured"]["tokens"] == 200
    assert row["bytes_per_token"] * 200 == row["measured"]["packed"] == row["measured"]["predicted"] - 2 * 28 * 31_104
    status, stdout, _ = command("mla-size", "--section", "3", *options)
    rows = json.loads(stdout)["rows"]
    assert status == 0 and [row["form"] for row in rows[:3]] == ["expanded", "expanded anew", "absorbed, torch"]
    # Keys and values of 16 heads, 192 + 128 elements of four bytes; latents and what makes 16 heads of them.
    assert rows[0]["nbytes"] == 100 * 16 * (192 + 128) * 4
    assert rows[2]["nbytes"] == (100 * (512 + 64) + 16 * 512 * (128 + 128)) * 4
    assert all(row["error"] < (0.2 if "4 bits" in row["cache"] else 0.02) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "RTX 9090"], "--gpu RTX 9090: must be one of"),
        (["--gpu", "RTX 4090:2"], "--tp says how many"),
        (["--context", "4k"], "--context 4k"),
        (["--schemes", "GQA"], "--schemes GQA"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--tp", "3"], "--tp 3"),
        (["--nbits", "16", "--rotate"], "--rotate"),
        (["--batch", "2"], "--batch"),
        (["--section", "latency", "--model", "tiny"], "has no latents"),
        (["--section", "measured", "--gpu", "H200"], "--gpu"),
        (["--section", "measured", "--context", "1,2"], "--context 1,2"),
        (["--section", "4"], "--section"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], said: str) -> None:
    assert said in error_line(command("mla-size", *arguments))
