"""The layer that is spread: its shape, its weights, and what experts make of their tokens on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.models.config import Fields


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


@dataclass(frozen=True)
class Experts:
    """Weights of some experts: gate_up [n, 2 · I, H], the gates first, and down [n, H, I]."""

    gate_up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    @classmethod
    def random(
        cls, shape: LayerShape, experts: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device
    ) -> "Experts":
        """Those of `experts`; the same wherever an expert stands, and however often."""
        hidden, size = shape.hidden_size, shape.intermediate_size
        gate_up = torch.empty(len(experts), 2 * size, hidden, dtype=dtype, device=device)
        down = torch.empty(len(experts), hidden, size, dtype=dtype, device=device)
        generator = torch.Generator(device)
        for index, expert in enumerate(experts):
            generator.manual_seed(seed + 1 + expert)
            gate_up[index].normal_(std=hidden**-0.5, generator=generator)
            down[index].normal_(std=size**-0.5, generator=generator)
        return cls(gate_up, down)


def mix_loop(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """What the experts make of their tokens, one expert after the other. The host waits for each.

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
            gate, up = F.linear(x[tokens], experts.gate_up[expert]).chunk(2, dim=-1)
            mixed = F.linear(F.silu(gate) * up, experts.down[expert])
            out.index_add_(0, tokens, mixed * weights[tokens, places, None].to(x.dtype))
    return out


def mix_grouped(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """As `mix_loop`, in two grouped products over pairs sorted by expert. Shapes depend on no value, so that on a GPU
    the host waits for nothing."""
    num_experts, (num_tokens, top_k) = len(experts.down), ids.shape
    flat = ids.flatten().long()
    pairs = flat.argsort(stable=True)  # those of no expert here come last, behind all groups
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat.clamp(max=num_experts), torch.ones_like(flat, dtype=torch.int32))
    ends = counts[:-1].cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[pairs // top_k], experts.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    mixed = F.grouped_mm(F.silu(gate) * up, experts.down.transpose(1, 2), offs=ends)
    in_order = torch.empty_like(mixed).index_copy_(0, pairs, mixed).view(num_tokens, top_k, -1)
    # Rows behind the last group are whatever was in memory before.
    weighted = in_order.float() * weights[..., None]
    return weighted.masked_fill_((ids >= num_experts)[..., None], 0).sum(1).to(x.dtype)


def mix_padded(x: Tensor, experts: Experts) -> Tensor:
    """Each expert's own rows, [n, rows, H] → the same, padding and all."""
    gate, up = torch.bmm(x, experts.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, experts.down.transpose(1, 2))
