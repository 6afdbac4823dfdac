"""Tiny random checkpoints written by transformers, and the plainest attention a decoder can be run with."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvtool.attention.queries import prepared
from kvtool.models import Decoder, ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 7,
}

# What experts and latents add to it.
QWEN_MOE: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "head_dim": 8,
}
MLA |= {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MLA |= {"first_k_dense_replace": 1}

# What a context beyond the trained one adds.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}


def write_config(folder: Path, **overrides: Any) -> None:
    """The config.json of a Llama, `overrides` replacing or adding fields."""
    config = {"model_type": "llama", "rms_norm_eps": 1e-6, **SHAPE, **overrides}
    (folder / "config.json").write_text(json.dumps(config))


def make_checkpoint(
    model_type: str, path: Path, *, max_shard_size: str = "1GB", seed: int = 0, **overrides: Any
) -> Any:
    """Write a checkpoint of this architecture, `overrides` replacing fields of its config; returns transformers' model.

    Weights are large enough, and norms uneven enough, that every one of them shows in the logits.
    """
    config = CONFIG_MAPPING[model_type].from_dict({**SHAPE, **deepcopy(overrides)})  # it writes into what it is given
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if "bias" in name:  # of a choice among experts
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


class DenseAttend:
    """Causal attention over one sequence, all of whose keys and values it keeps. For tests."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * config.num_layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (kept := self.kept[layer]) is not None:
            k, v = torch.cat((kept[0], k)), torch.cat((kept[1], v))
        self.kept[layer] = k, v
        if self.config.mla:  # the latent is key and value
            k = torch.cat((v, k), dim=-1)
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        age = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        window = self.config.sliding_window[layer]
        hidden = (age < 0) | (age >= (window or len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.config.softmax_scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


@torch.inference_mode()
def run(model: Decoder, ids: list[int], attend: DenseAttend, start: int = 0) -> Tensor:
    """Logits [T, vocab_size] of these ids, of which `start` came before."""
    return model.logits(model(torch.tensor(ids), torch.arange(start, start + len(ids)), prepared(attend)))
