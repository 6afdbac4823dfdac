"""The forward pass: one decoder for all architectures. Where keys and values are kept is not its business."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.attention.queries import Queries
from kvtool.kernels.rotary_heads import RotaryHeads
from kvtool.layers.embedding import Embedding
from kvtool.layers.linear import GatedLinear, Linear, MergedLinear, RowLinear, Slot
from kvtool.layers.mla import MLA, LatentProducts
from kvtool.layers.moe import Experts, Gate, MoE, Router
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.layers.quantized import Matrix, SideBySide
from kvtool.layers.rotary import Rotary
from kvtool.models.architectures import ARCHITECTURES
from kvtool.models.config import ModelConfig
from kvtool.parallel import ONE_RANK, Group, Parallel

# (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) → [T, Hq, D]. q and k are yet to be normalised and rotated, k and
# v are strided views; scale, mask, sliding window and the KV store are the callee's. Latent attention
# (`kvtool.layers.mla`) gives the rope key as k, rotated, and the latent as v, and gets values of all heads.
# `kvtool.attention.queries.prepared` makes one of a function of plain tensors.
Attend = Callable[[int, Queries, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values of a layer, behind its norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(self, config: ModelConfig, layer: int, tp: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        architecture = ARCHITECTURES[config.model_type]
        self.layer = layer
        self.head_dim = config.head_dim
        heads, kv_heads = tp.shard(config.num_heads), tp.shard(config.num_kv_heads)
        self.num_heads, self.num_kv_heads = heads.size, kv_heads.size
        q_part, kv_part = heads.times(config.head_dim), kv_heads.times(config.head_dim)
        self.qkv_proj = MergedLinear(
            config.hidden_size,
            {"q_proj": q_part, "k_proj": kv_part, "v_proj": kv_part},
            bias=config.qkv_bias,
            stored_merged=architecture.stored_merged,
            dtype=dtype,
            device=device,
        )
        self.qk_norm = (
            QKNorm(heads.size, kv_heads.size, config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            if architecture.qk_norm
            else None
        )
        self.o_proj = RowLinear(q_part, config.hidden_size, tp, bias=config.o_bias, dtype=dtype, device=device)

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = norm.into(self.qkv_proj, x, residual)
        made = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        heads = RotaryHeads(made, self.num_heads, cos, sin, self.qk_norm)
        return self.o_proj(attend(self.layer, heads, heads.key, heads.value).flatten(1)), residual

    def project(self, attended: Tensor) -> Tensor:
        """What heads have gathered [..., Hq, D] as they add it to the stream [..., hidden_size], in its own dtype."""
        return F.linear(attended.flatten(-2), self.o_proj.dense(attended.dtype))


class MLP(nn.Module):
    """Down(silu(gate(x)) · up(x)), behind its norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(self, config: ModelConfig, tp: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        inner = tp.shard(config.intermediate_size)
        self.gate_up_proj = GatedLinear(
            config.hidden_size,
            {"gate_proj": inner, "up_proj": inner},
            bias=config.mlp_bias,
            stored_merged=ARCHITECTURES[config.model_type].stored_merged,
            dtype=dtype,
            device=device,
        )
        self.down_proj = RowLinear(inner, config.hidden_size, tp, bias=config.mlp_bias, dtype=dtype, device=device)

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        inner, residual = norm.into(self.gate_up_proj, x, residual, then=self.down_proj)
        return self.down_proj(inner), residual


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream by the norm that comes after it."""

    def __init__(self, config: ModelConfig, layer: int, tp: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn: Attention | MLA = (
            MLA(config.hidden_size, config.num_heads, config.mla, layer, tp, dtype=dtype, device=device)
            if config.mla
            else Attention(config, layer, tp, dtype=dtype, device=device)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        experts = config.experts[layer]
        self.mlp: MLP | MoE = (
            MoE(config.hidden_size, experts, tp, dtype=dtype, device=device)
            if experts
            else MLP(config, tp, dtype=dtype, device=device)
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What it makes of the stream [T, hidden_size]; of the tokens `wanted` [n] alone, where these are given."""
        x, residual = self.self_attn(self.input_layernorm, x, residual, cos, sin, attend)
        if wanted is not None:
            x, residual = x[wanted], residual[wanted]
        x, residual = self.mlp(self.post_attention_layernorm, x, residual)
        return x, residual


class Decoder(nn.Module):
    """A decoder-only transformer of any architecture in the table, its weights not yet filled.

    Args:
        max_len: tokens of the longest sequence it will see.
        parallel: what this rank has of it: the shards of its group, of the layers of its stage.
        has_layers: without, they are yet to be added, one by one.

    Attributes:
        is_whole: of every stored tensor at least a piece is here.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        parallel: Parallel = ONE_RANK,
        has_layers: bool = True,
    ) -> None:
        super().__init__()
        tp, stage = parallel.tp, parallel.stage
        self.config, self.stage, self.dtype = config, stage, dtype
        self._tp, self._device = tp, device
        self.is_whole = stage.count == tp.ep == 1

        def embedding() -> Embedding:
            return Embedding(config.vocab_size, config.hidden_size, tp, dtype=dtype, device=device)

        tied = config.tie_word_embeddings
        self.embed_tokens = embedding() if stage.is_first or (stage.is_last and tied) else None
        self.rotary = Rotary(config.rope, max_len, dtype=dtype, device=device)
        self.layers = nn.ModuleDict()
        for layer in stage.layers(config.num_layers) if has_layers else ():
            self.add_layer(layer)
        self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device) if stage.is_last else None
        )
        self.lm_head = embedding() if stage.is_last and not tied else None

    def add_layer(self, layer: int) -> None:
        """The next layer of this stage."""
        self.layers[str(layer)] = DecoderLayer(self.config, layer, self._tp, dtype=self.dtype, device=self._device)

    def routers(self) -> dict[int, Router]:
        """Those of this stage's layers that have experts, by layer."""
        mixtures = {int(name): layer.mlp for name, layer in self.layers.items()}
        return {layer: mlp.gate for layer, mlp in mixtures.items() if isinstance(mlp, MoE)}

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, of T tokens of any number of sequences laid end to end.

        A stage that is not the first takes them up where the stage before left them, whatever `ids` are; one that is
        not the last hands them on, before any final norm.

        Args:
            ids: [T] int64.
            positions: [T] int64, each token's index in its own sequence, below `max_len`.
            attend: attention over what it keeps of earlier calls and the keys and values given.
            wanted: [n] integers, the tokens whose states somebody will look at, so that the last layer computes no
                others behind its attention; None: all. A stage that is not the last hands all of them on.

        Returns:
            [T, hidden_size], or [n, hidden_size] of those wanted, in the model's dtype.
        """
        cos, sin = self.rotary(positions)
        x: Tensor
        residual: Tensor | None = None
        if self.stage.is_first:
            assert self.embed_tokens is not None
            x = self.embed_tokens(ids)
        else:
            x = self.stage.receive(torch.empty(len(ids), self.config.hidden_size, dtype=self.dtype, device=ids.device))
        *layers, last = self.layers.values()
        for layer in layers:
            x, residual = layer(x, residual, cos, sin, attend)
        # Experts see all tokens, because they are counted.
        alone = wanted if self.norm is not None and isinstance(last.mlp, MLP) else None
        x, residual = last(x, residual, cos, sin, attend, alone)
        if self.norm is None:
            return self.stage.send(x if residual is None else x + residual)
        x, _ = self.norm(x, residual)
        return x if alone is wanted else x[wanted]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores of the next token: hidden [N, hidden_size] → [N, vocab_size], in the model's dtype, or in `out`."""
        assert self.head is not None, "the last stage has one"
        return self.head.logits(hidden, out)

    @property
    def head(self) -> Embedding | None:
        """What scores ids, on the last stage."""
        return (self.lm_head or self.embed_tokens) if self.stage.is_last else None

    def linears(self, layer: int) -> dict[str, Linear]:
        """The products of a layer but gates and those of many experts, by their paths in the model."""
        modules = self.layers[str(layer)].named_modules(prefix=f"layers.{layer}")
        return {name: module for name, module in modules if isinstance(module, Linear) and not isinstance(module, Gate)}

    def mixtures(self, layer: int) -> dict[str, MoE]:
        """What a layer has of experts, by their path in the model."""
        modules = self.layers[str(layer)].named_modules(prefix=f"layers.{layer}")
        return {f"{name}.experts": module for name, module in modules if isinstance(module, MoE)}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that was loaded or made of it, by names of this model's own."""
        yield from self.named_parameters()
        for path, module in self.named_modules():
            if isinstance(module, Matrix):
                yield from ((f"{path}.{name}", tensor) for name, tensor in module.named_buffers(recurse=False))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.weights())

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that computing a token reads: of all but an embedding that only looks ids up, and of experts
        those that it chooses."""
        embedding = self.embed_tokens
        scores = embedding is None or (embedding is self.head and embedding.scorer is None)
        unread = 0 if embedding is None or scores else embedding.weight.nbytes
        return self.weight_bytes - unread - round(self._idle(_nbytes))

    @property
    def products(self) -> float:
        """Multiplications that a token takes in the layers here, of operands of 16 bits; of 8 bits, two count as one.

        Of experts those count that it chooses.
        """
        return _products(self.layers) - self._idle(_products)

    def _idle(self, measure: Callable[[nn.Module], float]) -> float:
        """Of experts that a token does not choose; where ranks share them out, each has its part on the average."""
        mixtures = [module for module in self.layers.modules() if isinstance(module, MoE)]
        routings = [mixture.gate.routing for mixture in mixtures]
        return sum(
            (1 - routing.top_k / routing.num_experts) * measure(mixture.experts)
            for mixture, routing in zip(mixtures, routings, strict=True)
        )

    def slots(self, within: str = "") -> Iterator[tuple[str, Slot]]:
        """Every tensor that a checkpoint must hold, and where it goes, one name for each piece, of modules whose paths
        begin with `within`. Leave out the "model." that files prepend."""
        stored_names = ARCHITECTURES[self.config.model_type].stored_names
        for path, module in self.named_modules():
            named = isinstance(module, (Linear, Embedding, RMSNorm, QKNorm, Experts, LatentProducts))
            if named and path.startswith(within):
                for name, slot in module.slots(path):
                    for ours, stored in stored_names if ".mlp." in name else ():
                        name = name.replace(ours, stored)
                    yield name, slot


def _products(module: nn.Module) -> float:
    """Elements of its weights, of which two of 8 bits count as one."""
    matrices = (m for m in module.modules() if isinstance(m, Matrix) and not isinstance(m, SideBySide))
    quantized = sum(math.prod(matrix.shape) / (2 if matrix.bits == 8 else 1) for matrix in matrices)
    return quantized + sum(weight.numel() for weight in module.parameters())


def _nbytes(module: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
