"""Checkpoints of quantised weights, written from the formats' definitions, number by number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import MLA, QWEN_MOE
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtool.models import Decoder, load_config, load_model

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map


@dataclass(frozen=True)
class Recipe:
    """How to quantise a checkpoint at random.

    Attributes:
        config: its `quantization_config`.
        write: makes a matrix of a shape: its tensors, by the last part of their names, and what they stand for [N, K].
        activations: "int8" or "fp8", to which inputs are rounded token by token.
    """

    config: dict[str, Any]
    write: Callable[[int, int, torch.Generator], tuple[dict[str, Tensor], Tensor]]
    activations: str = ""


def words(numbers: list[list[int]], nibbles: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Rows of numbers of 0..15, eight to an int32: nibble i holds number `nibbles[i]` of the eight."""
    packed = []
    for row in numbers:
        line = []
        for first in range(0, len(row), 8):
            word = 0
            for i, which in enumerate(nibbles):
                word |= row[first + which] << (4 * i)
            line.append(word - (1 << 32) if word >> 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def draw(
    rows: int, columns: int, group: int, generator: torch.Generator, least: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales fp16 and zeros of at least `least` [N, K / G]."""
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = (torch.rand(rows, columns // group, generator=generator) * 0.3 / columns**0.5 + 1e-3).half()
    return codes, scales, torch.randint(least, 16, (rows, columns // group), generator=generator)


def stands_for(codes: Tensor, scales: Tensor, zeros: Tensor, groups: list[int]) -> Tensor:
    """[N, K] in float64, column k being of group groups[k]."""
    columns = [(codes[:, k] - zeros[:, g]).double() * scales[:, g].double() for k, g in enumerate(groups)]
    return torch.stack(columns, 1)


def gptq(
    group: int, *, version: int = 1, act_order: bool = False, symmetric: bool = False, g_idx: bool = True
) -> Recipe:
    def write(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        size = columns if group == -1 else group
        codes, scales, zeros = draw(rows, columns, size, generator, least=1 if version == 1 else 0)
        if symmetric:
            zeros.fill_(8)
        groups = [k // size for k in range(columns)]
        if act_order:
            # The same order for all matrices with as many columns, as for q, k and v, which have one Hessian.
            shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)).tolist()
            groups = [groups[k] for k in shuffled]
        tensors = {
            "qweight": words(codes.tolist()).t().contiguous(),
            "qzeros": words((zeros - int(version == 1)).t().tolist()),
            "scales": scales.t().contiguous(),
        }
        if g_idx or act_order:
            tensors["g_idx"] = torch.tensor(groups, dtype=torch.int32)
        return tensors, stands_for(codes, scales, zeros, groups)

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": symmetric}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return Recipe(config, write)


def awq(group: int) -> Recipe:
    def write(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, zeros = draw(rows, columns, group, generator)
        tensors = {
            "qweight": words(codes.t().tolist(), AWQ_NIBBLES),
            "qzeros": words(zeros.t().tolist(), AWQ_NIBBLES),
            "scales": scales.t().contiguous(),
        }
        return tensors, stands_for(codes, scales, zeros, [k // group for k in range(columns)])

    return Recipe({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, write)


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def pack_quantized(group: int | None, *, symmetric: bool = True, act_order: bool = False) -> Recipe:
    def write(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        size = group or columns
        codes, scales, zeros = draw(rows, columns, size, generator)
        groups = [k // size for k in range(columns)]
        tensors = {
            "weight_packed": words(codes.tolist()),
            "weight_scale": scales,
            "weight_shape": torch.tensor(codes.shape),
        }
        if symmetric:
            zeros.fill_(8)
        else:
            tensors["weight_zero_point"] = words(zeros.t().tolist()).t().contiguous()
        if act_order:
            groups = [groups[k] for k in torch.randperm(columns, generator=generator).tolist()]
            tensors["weight_g_idx"] = torch.tensor(groups, dtype=torch.int32)
        return tensors, stands_for(codes, scales, zeros, groups)

    strategy = "group" if group else "channel"
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return Recipe(compressed("pack-quantized", weights | {"actorder": "group" if act_order else None}, None), write)


def eight_bits(kind: str, strategy: str) -> Recipe:
    def write(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        count = rows if strategy == "channel" else 1
        scales = torch.rand(count, 1, generator=generator) * 0.02 + 1e-3
        if kind == "int":
            codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
        else:
            codes = (torch.randn(rows, columns, generator=generator) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
            scales /= 4
        stored = scales.bfloat16() if strategy == "channel" else scales[0]
        return {"weight": codes, "weight_scale": stored}, codes.double() * stored.double().view(-1, 1)

    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    form, activations = ("int-quantized", "int8") if kind == "int" else ("float-quantized", "fp8")
    return Recipe(compressed(form, weights, inputs), write, activations)


def quantize(folder: Path, recipe: Recipe, *, seed: int = 0, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Replace the layers' matrices in this folder but those whose name holds a word of `keep`; returns what all tensors
    of the checkpoint stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight") or any(word in name for word in keep):
            stored[name], dense[name] = tensor, tensor.double()
            continue
        pieces, dense[name] = recipe.write(*tensor.shape, generator)
        stored |= {f"{name.removesuffix('weight')}{suffix}": piece for suffix, piece in pieces.items()}
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config=recipe.config)
    return dense


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# What the tests quantise.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
OF_EXPERTS = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": QWEN_MOE | OF_EXPERTS | {"shared_expert_intermediate_size": 64},
    "deepseek_v2": MLA | OF_EXPERTS | {"q_lora_rank": None, "v_head_dim": 16},
}
RECIPES = {
    "gptq": gptq(32, symmetric=True),
    "gptq, no g_idx": gptq(64, g_idx=False),
    "gptq, a row": gptq(-1),
    "gptq, act-order": gptq(32, act_order=True),
    "gptq v2": gptq(128, version=2),
    "gptq v2, act-order": gptq(64, version=2, act_order=True),
    "awq": awq(64),
    "awq 128": awq(128),
    "int4": pack_quantized(32),
    "int4, zeros": pack_quantized(128, symmetric=False),
    "int4, a row": pack_quantized(None),
    "int4, orders of their own": pack_quantized(32, act_order=True),
    "int8": eight_bits("int", "channel"),
    "int8, one scale": eight_bits("int", "tensor"),
    "fp8": eight_bits("float", "channel"),
    "fp8, one scale": eight_bits("float", "tensor"),
}


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Decoder:
    return load_model(folder, load_config(folder), dtype=dtype, device=torch.device("cpu"), **options)
