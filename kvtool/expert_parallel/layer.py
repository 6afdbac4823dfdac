"""The layer that is spread: its shape, its weights, and what experts make of their tokens one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.layers.linear import gated_linear
from kvtool.layers.moe import Experts
from kvtool.models.fields import Fields
from kvtool.parallel import Shard


@dataclass(frozen=True)
class LayerShape:
    """Experts, gated MLPs of one size, of which each token uses `top_k`."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size


def read_layer(fields: Fields) -> LayerShape:
    """The experts of a model, from the fields of its config.json that tell them.

    Raises:
        ModelError: the model has none, or a field is impossible.
    """
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        fields.refuse(names[0], "is missing: this model has no experts; name one that has, or give the layer's sizes")
    size = "intermediate_size" if fields.get("moe_intermediate_size") is None else "moe_intermediate_size"
    return LayerShape(
        fields.count("hidden_size"), fields.count(size), fields.count(name), fields.count("num_experts_per_tok")
    )


def random_experts(
    shape: LayerShape, experts: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device
) -> Experts:
    """Weights of `experts`; the same wherever an expert stands, and however often."""
    here, inner = Shard.whole(len(experts)), Shard.whole(shape.intermediate_size)
    made = Experts(here, shape.hidden_size, inner, dtype=dtype, device=device)
    generator = torch.Generator(device)
    for index, expert in enumerate(experts):
        generator.manual_seed(seed + 1 + expert)
        made.gate_up[index].normal_(std=shape.hidden_size**-0.5, generator=generator)
        made.down[index].normal_(std=shape.intermediate_size**-0.5, generator=generator)
    return made


def mix_loop(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """What `experts(x, ids, weights)` computes, one expert after the other. The host waits for each.

    Args:
        x: [T, H].
        ids, weights: [T, top_k]; ids beyond the experts here count for nothing.

    Returns:
        [T, H]: Σ weight · down(silu(gate(x)) · up(x)) over each token's experts.
    """
    out = torch.zeros_like(x)
    for expert in range(len(experts.down)):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if len(tokens):
            mixed = F.linear(gated_linear(x[tokens], experts.gate_up[expert]), experts.down[expert])
            out.index_add_(0, tokens, mixed * weights[tokens, places, None].to(x.dtype))
    return out


def mix_padded(x: Tensor, experts: Experts) -> Tensor:
    """Each expert's own rows, [n, rows, H] → the same, padding and all."""
    gate, up = torch.bmm(x, experts.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, experts.down.transpose(1, 2))
