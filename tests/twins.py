"""Outlier twins: the same function as a model, with keys like Qwen2.5's: few huge channels that no scale per token can
follow."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtool.models import load_config


def outlier_twin(
    source: Path,
    target: Path,
    *,
    scale: float = 64.0,
    num_pairs: int = 3,
    value_scale: float = 1.0,
    value_bias: float = 0.0,
) -> Path:
    """Write a model that computes what `source` does, through keys with outliers; returns `target`.

    In each KV head the `num_pairs` RoPE pairs (channels i and i + D/2) with the largest key bias (without one: the
    first) are multiplied by `scale`, weights and bias, and divided by it in the query heads that read them. Both
    channels of a pair change alike, so this commutes with the rotation and leaves every q·k as it was. `scale` being a
    power of two, not even rounding differs.

    With `value_scale`, as many channels of each value head are multiplied by that, and divided by it where the output
    projection reads them.

    With `value_bias`, values get random biases of that standard deviation. Probabilities sum to 1, so an output bias
    takes them away again; Qwen2 has none, so the twin is a Llama with `attention_bias`, in float64.

    Args:
        source: folder of a model that stores q, k and v apart, in one file, without QK norm.
    """
    config, weights = load_config(source), load_file(source / "model.safetensors")
    if value_bias:
        weights = {name: weight.double() for name, weight in weights.items()}
    group = config.num_heads // config.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        heads = {
            name: tensor.unflatten(0, (-1, config.head_dim))  # views: [heads, D, ...]
            for name, tensor in weights.items()
            if name.startswith(prefix) and "o_proj" not in name
        }
        for head in range(config.num_kv_heads):
            channels = _channels(heads.get(f"{prefix}k_proj.bias"), head, num_pairs, config.head_dim)
            for kind in ("weight", "bias"):
                if (key := heads.get(f"{prefix}k_proj.{kind}")) is not None:
                    key[head, channels] *= scale
                    heads[f"{prefix}q_proj.{kind}"][head * group : (head + 1) * group, channels] /= scale
        output = weights[f"{prefix}o_proj.weight"].unflatten(1, (config.num_kv_heads, group, config.head_dim))
        for kind in ("weight", "bias"):
            if (value := heads.get(f"{prefix}v_proj.{kind}")) is not None:
                value[:, :num_pairs] *= value_scale
        output[..., :num_pairs] /= value_scale
        if value_bias:
            bias = torch.randn(config.num_kv_heads, config.head_dim, generator=generator, dtype=torch.float64)
            for name, size in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
                weights.setdefault(f"{prefix}{name}_proj.bias", torch.zeros(size * config.head_dim).double())
            weights[f"{prefix}v_proj.bias"] += value_bias * bias.flatten()
            seen = value_bias * bias.repeat_interleave(group, 0).flatten()
            weights[f"{prefix}o_proj.bias"] = -weights[f"{prefix}o_proj.weight"] @ seen
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, target / "model.safetensors")
    if value_bias:
        fields = json.loads((source / "config.json").read_text())
        fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
        fields |= {"torch_dtype": "float64", "head_dim": config.head_dim}
        (target / "config.json").write_text(json.dumps(fields))
    return target


def _channels(bias: Tensor | None, head: int, num_pairs: int, dim: int) -> Tensor:
    size = torch.zeros(dim) if bias is None else bias[head].float().abs()
    pairs = (size[: dim // 2] + size[dim // 2 :]).argsort(descending=True, stable=True)[:num_pairs]
    return torch.cat([pairs, pairs + dim // 2])
