"""Weights in fewer bits that are refused: what a checkpoint says of them, what it holds, and what options ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from quantized_checkpoints import (
    MIXTURES,
    RECIPES,
    SHAPE,
    compressed,
    edit_config,
    gptq,
    load,
    pack_quantized,
    quantize,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtool.calibration import choose_quantization
from kvtool.config import EngineConfig
from kvtool.engine import Engine
from kvtool.errors import ConfigError, KVToolError, ModelError, UnsupportedError
from kvtool.models import check_quantization, load_config, resolve_model

CPU = torch.device("cpu")
GPTQ = RECIPES["gptq"].config
INT4, INT8 = RECIPES["int4"].config, RECIPES["int8"].config
O_PROJ = "model.layers.1.self_attn.o_proj."
CONFIGS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "quantization_config is [1]; it must be an object"),
    "no method": ({"bits": 4}, "quantization_config.quant_method is None; it must be gptq, awq or compressed-tensors"),
    "method": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; it must be gptq, awq or"),
    "bits": (GPTQ | {"bits": 3}, "quantization_config.bits is 3; only 4 is supported"),
    "group": (GPTQ | {"group_size": 48}, "group_size is 48; it must be a multiple of 32, or -1"),
    "no group": (GPTQ | {"group_size": None}, "quantization_config.group_size is missing"),
    "huge group": (GPTQ | {"group_size": 1 << 60}, "group_size is 1152921504606846976; it must be"),
    "packing": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; it must be gptq or gptq_v2"),
    "awq version": (RECIPES["awq"].config | {"version": "gemv"}, "version is 'gemv'; only the gemm packing"),
    "no schemes": (INT8 | {"config_groups": {}}, "config_groups is missing or empty"),
    "two schemes": (
        INT4 | {"config_groups": INT4["config_groups"] | {"1": pack_quantized(64).config["config_groups"]["group_0"]}},
        "config_groups holds different schemes",
    ),
    "kv scheme": (INT8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set, which is not supported"),
    "weights alone": (
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, None),
        "input_activations.dynamic must be true",
    ),
    "static activations": (
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "dynamic": False}),
        "input_activations.dynamic must be true",
    ),
    "blocks": (
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block"}, None),
        "weights.strategy is 'block'; it must be channel or tensor",
    ),
    "six bits": (compressed("pack-quantized", {"num_bits": 6}, None), "weights.num_bits is 6 of type 'int'; int of 4"),
    "format": (compressed("marlin-24", {"num_bits": 4}, None), "format is 'marlin-24'; int of 4 bits is supported as"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    fields, why = CONFIGS[name]
    edit_config(tmp_path, quantization_config=fields)
    with pytest.raises(ModelError, match=r"config\.json: quantization_config") as refused:
        load_config(tmp_path)
    assert why in str(refused.value)


def _with(**pieces: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    """Change tensors of an output projection, by the last part of their names."""

    def change(tensors: dict[str, Tensor]) -> None:
        for suffix, make in pieces.items():
            made = make(tensors.pop(O_PROJ + suffix))
            if made is not None:
                tensors[O_PROJ + suffix] = made.contiguous()

    return change


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "scales of another group": (_with(scales=lambda x: x[:2]), "scales is F16 [2, 128], but config.json makes it"),
    "zeros of another width": (_with(qzeros=lambda x: x[:, :3]), "qzeros is I32 [4, 3], but config.json makes it"),
    "codes of another type": (_with(qweight=lambda x: x.float()), "qweight is F32 [16, 128], but config.json makes it"),
    "no zeros": (_with(qzeros=lambda x: None), "has no layers.1.self_attn.o_proj.qzeros beside it"),
    "a group beyond": (_with(g_idx=lambda x: x + 1), "layers.1.self_attn.o_proj: g_idx names groups beyond its 4"),
    "a group below": (_with(g_idx=lambda x: x - 1), "g_idx names groups beyond its 4"),
    "uneven groups": (_with(g_idx=lambda x: x.clamp(max=2)), "g_idx does not give each group 32 columns"),
    "a scale that is no number": (_with(scales=lambda x: x * torch.nan), "scales holds NaN or infinity"),
    "a stray tensor": (lambda tensors: tensors.update({O_PROJ + "x": torch.zeros(2)}), "o_proj.x has no place in the"),
    "nothing quantised": (lambda tensors: [tensors.pop(name) for name in list(tensors) if "qweight" in name] and None,
                          "no layer has a qweight"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    quantize(tmp_path, RECIPES["gptq"])
    change, why = TENSORS[name]
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as refused:
        load(tmp_path, torch.float16)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    quantize(tmp_path, RECIPES["int8"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{O_PROJ}weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"o_proj\.weight is stored as I8 and has no .*o_proj\.weight_scale beside it"):
        load(tmp_path)


def test_groups_that_do_not_divide_a_matrix_are_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    quantize(tmp_path, gptq(128))
    edit_config(tmp_path, quantization_config=gptq(96).config)
    with pytest.raises(ModelError, match="groups of 96 do not fit its 128 columns"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("asked", "keep", "why"),
    [
        ("awq", (), "--quantization awq: the checkpoint's weights are quantised already, as gptq"),
        ("auto", ("*",), "--keep-layers goes with a --quantization of a 16-bit checkpoint"),
    ],
)
def test_what_contradicts_a_checkpoint_is_refused(asked: str, keep: tuple[str, ...], why: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    edit_config(tmp_path, quantization_config=GPTQ)
    with pytest.raises(ConfigError, match=why):
        check_quantization(asked, keep, False, load_config(tmp_path), CPU)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_and_latents_look_at_no_text(model_type: str, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path, **MIXTURES[model_type])
    config = load_config(tmp_path)
    with pytest.raises(ConfigError, match="--quantization awq: models with experts or latent attention cannot look"):
        choose_quantization(EngineConfig(quantization="awq"), config, tmp_path, CPU)
    quantization = choose_quantization(EngineConfig(quantization="fp8"), config, tmp_path, CPU)
    assert quantization is not None and not quantization.windows


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer that is none": ({"quantization": "w8a8", "keep_layers": ("layers.9.*",)}, "--keep-layers layers.9.*: the"),
    "a text for nothing": (
        {"quantization": "w8a8", "calibration": "x"},
        "--calibration is for --quantization gptq, awq and fp8",
    ),
    "no text": ({"quantization": "gptq", "calibration": "nowhere.txt"}, "--calibration nowhere.txt: cannot be read"),
    "ranks": ({"quantization": "awq", "tp": 2, "device": "cpu"}, "several ranks cannot look at a text together"),
    "nothing to see": ({"quantization": "gptq", "load_format": "dummy"}, "a text shows nothing about random weights"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_contradict_each_other_are_refused(name: str) -> None:
    options, why = OPTIONS[name]
    with pytest.raises(KVToolError) as refused:
        Engine(EngineConfig(kv_cache_memory=1 << 22, **options))
    assert why in str(refused.value)


def test_gpus_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    config = load_config(resolve_model("tiny"))
    with pytest.raises(UnsupportedError, match=r"--quantization fp8: NVIDIA A100 cannot.*8\.9 can; use w4a16"):
        check_quantization("fp8", (), False, config, torch.device("cuda"))
    check_quantization("w8a8", (), False, config, torch.device("cuda"))
