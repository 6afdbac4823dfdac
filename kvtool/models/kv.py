"""A model as its KV cache sees it: what it stores for each token, and how its layers attend to that."""

import torch

from kvtool.attention.layer import AttentionLayer
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.models.config import ModelConfig
from kvtool.parallel import ONE_RANK, Parallel


def kv_spec(model: ModelConfig, dtype: torch.dtype, parallel: Parallel = ONE_RANK) -> KVSpec:
    """What a model, or a rank's part of it, caches for each token. Latents are whole on every rank of a group."""
    num_layers = len(parallel.stage.layers(model.num_layers))
    if mla := model.mla:
        rope_key, latent = StreamSpec(1, mla.rope_dim), StreamSpec(1, mla.kv_lora_rank)
        return KVSpec(num_layers, rope_key, latent, dtype.itemsize, latent=True)
    stream = StreamSpec(parallel.tp.shard(model.num_kv_heads).size, model.head_dim)
    return KVSpec(num_layers, stream, stream, dtype.itemsize)


def attention_layers(model: ModelConfig, parallel: Parallel = ONE_RANK) -> list[AttentionLayer]:
    """The attention layers of a model, or a rank's part of it."""
    num_heads, num_kv_heads = (parallel.tp.shard(n).size for n in (model.num_heads, model.num_kv_heads))
    layers = parallel.stage.layers(model.num_layers)
    if mla := model.mla:
        latent, width = mla.kv_lora_rank, mla.kv_lora_rank + mla.rope_dim
        return [AttentionLayer(num_heads, 1, width, model.softmax_scale, latent_dim=latent)] * len(layers)
    return [
        AttentionLayer(num_heads, num_kv_heads, model.head_dim, model.softmax_scale, model.sliding_window[layer])
        for layer in layers
    ]
