"""The forward pass: one decoder for all architectures. Where keys and values are kept is not its business."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.layers.embedding import Embedding
from kvtool.layers.linear import GatedLinear, Linear, MergedLinear, linear
from kvtool.layers.mla import MLA, LatentProducts
from kvtool.layers.moe import Experts, MoE
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.layers.rotary import Rotary, queries_and_keys
from kvtool.models.architectures import ARCHITECTURES
from kvtool.models.config import ModelConfig

# (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) → [T, Hq, D]. q and k come normalised and rotated, all three as
# strided views; scale, mask, sliding window and the KV store are the callee's. Latent attention (`kvtool.layers.mla`)
# gives the rope key as k and the latent as v, q's elements being those of the latent and then of the rope key.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values of a layer, behind its norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        architecture = ARCHITECTURES[config.model_type]
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = MergedLinear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
            stored_merged=architecture.stored_merged,
            dtype=dtype,
            device=device,
        )
        self.qk_norm = (
            QKNorm(
                config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, dtype=dtype, device=device
            )
            if architecture.qk_norm
            else None
        )
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.o_bias, dtype=dtype, device=device)

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = norm.into(self.qkv_proj, x, residual)
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k = queries_and_keys(heads, self.num_heads, cos, sin, self.qk_norm)
        return self.o_proj(attend(self.layer, q, k, heads[:, -self.num_kv_heads :]).flatten(1)), residual

    def project(self, attended: Tensor) -> Tensor:
        """What heads have gathered [..., Hq, D] as they add it to the stream [..., hidden_size], in its own dtype."""
        return F.linear(attended.flatten(-2), self.o_proj.weight.to(attended.dtype))


class MLP(nn.Module):
    """Down(silu(gate(x)) · up(x)), behind its norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(
            config.hidden_size,
            {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
            bias=config.mlp_bias,
            stored_merged=ARCHITECTURES[config.model_type].stored_merged,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias, dtype=dtype, device=device
        )

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        inner, residual = norm.into(self.gate_up_proj, x, residual)
        return self.down_proj(inner), residual


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream by the norm that comes after it."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn: Attention | MLA = (
            MLA(config.hidden_size, config.num_heads, config.mla, layer, dtype=dtype, device=device)
            if config.mla
            else Attention(config, layer, dtype=dtype, device=device)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        experts = config.experts[layer]
        self.mlp: MLP | MoE = (
            MoE(config.hidden_size, experts, dtype=dtype, device=device)
            if experts
            else MLP(config, dtype=dtype, device=device)
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.self_attn(self.input_layernorm, x, residual, cos, sin, attend)
        x, residual = self.mlp(self.post_attention_layernorm, x, residual)
        return x, residual


class Decoder(nn.Module):
    """A decoder-only transformer of any architecture in the table, its weights not yet filled.

    Args:
        max_len: tokens of the longest sequence it will see.
    """

    def __init__(self, config: ModelConfig, max_len: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.rotary = Rotary(config.rope, max_len, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, dtype=dtype, device=device) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device)
        )

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, of T tokens of any number of sequences laid end to end.

        Args:
            ids: [T] int64.
            positions: [T] int64, each token's index in its own sequence, below `max_len`.
            attend: attention over what it keeps of earlier calls and the keys and values given.

        Returns:
            [T, hidden_size] in the model's dtype.
        """
        cos, sin = self.rotary(positions)
        x: Tensor = self.embed_tokens(ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, attend)
        x, _ = self.norm(x, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [N, hidden_size] → [N, vocab_size], in the model's dtype."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that a checkpoint must hold, and where it goes. Leave out the "model." that files prepend."""
        stored_names = ARCHITECTURES[self.config.model_type].stored_names
        for path, module in self.named_modules():
            if isinstance(module, (Linear, Embedding, RMSNorm, QKNorm, Experts, LatentProducts)):
                for name, slot in module.slots(path):
                    for ours, stored in stored_names if ".mlp." in name else ():
                        name = name.replace(ours, stored)
                    yield name, slot
