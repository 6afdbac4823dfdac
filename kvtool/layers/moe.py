"""Mixtures of experts: a router sends each token to a few of many gated MLPs (Shazeer et al., arXiv:1701.06538)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.errors import UnsupportedError
from kvtool.kernels import takes
from kvtool.kernels.quantized_rows import Activations
from kvtool.kernels.w4a16 import RUN, Int4Weights
from kvtool.layers.linear import GatedLinear, Linear, RowLinear, Slot, empty_parameter, gated_linear, linear
from kvtool.layers.norm import RMSNorm
from kvtool.layers.quantized import Int4Matrix, Matrix
from kvtool.parallel import Group, Shard


@dataclass(frozen=True)
class Routing:
    """How a token chooses its experts, and how much each of them weighs.

    Attributes:
        top_k: experts of a token.
        scores: what becomes of the router's logits. "sigmoid" comes with a bias that counts in the choice and not in
            the weights (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
        normalize: the weights of a token sum to 1.
        scale: multiplies the weights in the end.
        num_groups, top_groups: experts stand in groups, of which a token uses so many (DeepSeek-V2, arXiv:2405.04434,
            2.2.2); a group counts as its best expert, with "sigmoid" as the sum of its best two.
        wide: logits are computed in fp32, whatever the model's dtype.
    """

    num_experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    wide: bool = False


@dataclass(frozen=True)
class MoEShape:
    """One layer of experts.

    Attributes:
        intermediate_size: of each expert.
        shared_size: intermediate size of what every token passes beside its experts; 0: nothing.
        shared_gate: that is multiplied by the sigmoid of a product with the token.
    """

    routing: Routing
    intermediate_size: int
    shared_size: int = 0
    shared_gate: bool = False


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each token's experts: ids [T, top_k] int64, and weights [T, top_k] in fp32 (fp64 for fp64).

    Shapes: logits [T, num_experts] in any dtype; bias [num_experts] or None. Equal to Hugging Face's routers.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    scores = exact.softmax(-1) if routing.scores == "softmax" else exact.sigmoid()
    choice = scores if bias is None else scores + bias
    if routing.top_groups < routing.num_groups:
        groups = choice.unflatten(-1, (routing.num_groups, -1))
        best = groups.amax(-1) if routing.scores == "softmax" else groups.topk(2).values.sum(-1)
        is_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.top_groups).indices, False)
        choice = groups.masked_fill(is_out[..., None], -torch.inf).flatten(-2)
    ids = choice.topk(routing.top_k).indices
    weights = scores.gather(-1, ids)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.scale


def mix_reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What the experts make of their tokens, one expert after the other.

    Args:
        x: [T, K].
        gate_up: [E, 2 · I, K], the gates first; down: [E, K, I].
        ids, weights: [T, top_k], as `route` gives them; ids beyond the experts here count for nothing.

    Returns:
        [T, K]: Σ weight · down(silu(gate(x)) · up(x)) over each token's experts.
    """
    out, top_k = torch.zeros_like(x), ids.shape[1]
    counts = ids.flatten().bincount(minlength=len(down))[: len(down)].tolist()
    pairs = ids.flatten().argsort(stable=True)[: sum(counts)]
    for expert, chosen in enumerate(pairs.split(counts)):
        if len(chosen):
            tokens = chosen // top_k
            mixed = linear(gated_linear(x[tokens], gate_up[expert]), down[expert])
            out.index_add_(0, tokens, mixed * weights.flatten()[chosen, None].to(x.dtype))
    return out


def mix(
    x: Tensor,
    gate_up: Tensor | Int4Weights,
    down: Tensor | Int4Weights,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    elsewhere: int,
) -> Tensor:
    """`mix_reference` plus `shared`, in kernels where there are any, which alone take codes; of all experts so many are
    elsewhere."""
    if takes(x) and x.dtype.itemsize == 2:
        from kvtool.kernels import moe

        return moe.mix(x, gate_up, down, ids, weights, shared, elsewhere)
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    out = mix_reference(x, gate_up, down, ids, weights)
    return out if shared is None else out.add_(shared)


class Gate(Linear):
    """What says how much of something a token takes: few numbers, of which each counts. They stay in 16 bits."""

    weight: Tensor


class Router(Gate):
    """x [T, hidden_size] → each token's experts and their weights.

    Args:
        first: the expert that ids are counted from, around all of them, so that those of this rank are the lowest.

    Attributes:
        chosen: [rows, top_k] int32, where the ids of the newest step stay; None: nowhere.
    """

    def __init__(
        self, hidden_size: int, routing: Routing, first: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        super().__init__(hidden_size, routing.num_experts, bias=False, dtype=dtype, device=device)
        self.routing, self.first = routing, first
        self.chosen: Tensor | None = None
        biased = routing.scores == "sigmoid"
        self.choice_bias = empty_parameter(routing.num_experts, dtype=wide, device=device) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits [T, num_experts] in x's dtype, or in fp32 at least where they are `wide`."""
        if not self.routing.wide:
            return super().forward(x)
        if x.is_cuda and x.dtype.itemsize == 2:  # exact products, summed in fp32
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))

    def experts_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T, top_k] from `first` on, around, and weights, otherwise as `route` gives them."""
        kept = None if self.chosen is None else self.chosen[: len(x)]
        if takes(x):
            from kvtool.kernels import moe

            return moe.route(self(x), self.choice_bias, self.routing, self.first, kept)
        ids, weights = route(self(x), self.choice_bias, self.routing)
        ids = (ids - self.first) % self.routing.num_experts
        if kept is not None:
            kept.copy_(ids)
        return ids, weights

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        yield from super().slots(path)
        if self.choice_bias is not None:
            yield f"{path}.e_score_correction_bias", Slot.whole(self.choice_bias)


class Experts(nn.Module):
    """Gated MLPs of one size: x [T, hidden_size] with each token's experts and weights → [T, hidden_size].

    Args:
        experts, inner: which of them this rank has, and which of the columns between the two products of each; its
            outputs are to be summed over the ranks.

    Attributes:
        gate_up: [experts.size, 2 · inner.size, hidden_size]; down: [experts.size, hidden_size, inner.size].
    """

    gate_up: Tensor
    down: Tensor

    def __init__(
        self, experts: Shard, hidden_size: int, inner: Shard, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.experts, self.inner = experts, inner
        self.gate_up = empty_parameter(experts.size, 2 * inner.size, hidden_size, dtype=dtype, device=device)
        self.down = empty_parameter(experts.size, hidden_size, inner.size, dtype=dtype, device=device)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, shared: Tensor | None = None) -> Tensor:
        """The sum of this rank's experts for each token, plus `shared` [T, hidden_size].

        `ids` count them from 0 on; those beyond are of experts elsewhere.
        """
        elsewhere = self.experts.total - self.experts.size
        return mix(x, self.gate_up, self.down, ids, weights, shared, elsewhere)

    def expecting(self, ids: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """`forward` in two halves, for tokens that are still on their way: what ids alone decide is begun at once."""
        if not (takes(self.down) and self.down.dtype.itemsize == 2):
            return lambda x: self(x, ids, weights)
        from kvtool.kernels import moe

        groups = moe.group(ids, len(self.down), moe.rows_for(ids.numel(), self.experts.total))
        return lambda x: moe.mix_groups(x, self.gate_up, self.down, groups, ids, weights)

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint names of the three matrices of each expert here, and where each one goes."""
        total, start, hidden = self.inner.total, self.inner.start, self.down.shape[1]
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True), self.experts.start):
            gate, up = gate_up.chunk(2)
            yield f"{path}.{expert}.gate_proj.weight", Slot(gate, (total, hidden), (start, 0))
            yield f"{path}.{expert}.up_proj.weight", Slot(up, (total, hidden), (start, 0))
            yield f"{path}.{expert}.down_proj.weight", Slot(down, (hidden, total), (0, start))


class PackedExperts(nn.Module):
    """`Experts` of fewer bits. Kernels multiply with 4-bit codes in groups of columns that stand in their order; of
    whatever else each step makes 16-bit weights: that saves memory, not time.

    Args:
        experts: which of them this rank has.
        gate_up, down: rows of one expert after the other, otherwise as those of `Experts`.
    """

    def __init__(self, experts: Shard, gate_up: Matrix, down: Matrix) -> None:
        super().__init__()
        self.experts, self.gate_up, self.down = experts, gate_up, down

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, shared: Tensor | None = None) -> Tensor:
        """As of `Experts`."""
        gate_up, down = (self._weights(matrix, x) for matrix in (self.gate_up, self.down))
        return mix(x, gate_up, down, ids, weights, shared, self.experts.total - self.experts.size)

    def _weights(self, matrix: Matrix, x: Tensor) -> Tensor | Int4Weights:
        """One matrix for each expert, for a product with x."""
        if takes(x) and x.dtype.itemsize == 2 and isinstance(matrix, Int4Matrix):
            tensors = (matrix.weight, matrix.scales, matrix.zeros)
            if matrix.order is None and matrix.group_size % RUN == 0:
                return Int4Weights(*(tensor.unflatten(0, (self.experts.size, -1)) for tensor in tensors))
        dense: Tensor = matrix.dense(x.dtype).unflatten(0, (self.experts.size, -1))
        return dense


class Addend(RowLinear):
    """A `RowLinear` whose outputs are summed over the ranks later, with others."""

    def forward(self, x: Activations) -> Tensor:
        return linear(x, self.weight)

    def share_outputs(self) -> None:
        raise UnsupportedError(f"--tp {self.tp.size}: cuts groups of quantised columns of shared experts; use --ep")


class SharedExperts(nn.Module):
    """The gated MLP that every token passes: x [T, hidden_size] → the same, to be summed over the ranks."""

    def __init__(self, hidden_size: int, inner: Shard, tp: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = GatedLinear(hidden_size, parts, bias=False, stored_merged=False, dtype=dtype, device=device)
        self.down_proj = Addend(inner, hidden_size, tp, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj(x))
        return out


class MoE(nn.Module):
    """Experts, routed and shared, behind their norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(
        self, hidden_size: int, shape: MoEShape, tp: Group, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        routing, self.tp = shape.routing, tp
        experts, inner = tp.shard_experts(routing.num_experts, shape.intermediate_size)
        self.gate = Router(hidden_size, routing, experts.start, dtype=dtype, device=device)
        self.experts: Experts | PackedExperts = Experts(experts, hidden_size, inner, dtype=dtype, device=device)
        self.shared_experts = (
            SharedExperts(hidden_size, tp.shard(shape.shared_size), tp, dtype=dtype, device=device)
            if shape.shared_size
            else None
        )
        self.shared_expert_gate = (
            Gate(hidden_size, 1, bias=False, dtype=dtype, device=device) if shape.shared_gate else None
        )

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = norm(x, residual)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        if shared is not None and self.shared_expert_gate is not None:
            shared = shared * F.sigmoid(self.shared_expert_gate(x))
        return self.tp.all_reduce(self.experts(x, *self.gate.experts_of(x), shared)), residual


class ExpertLoad:
    """How many tokens have chosen each expert, over all steps.

    Routers leave the ids of a step's tokens where they stay, and these are counted once for all layers when the step
    has been launched. So a CUDA graph counts nothing, rows that only fill one up are left out, and the host waits for
    nothing until it asks for the totals.

    Args:
        routers: by layer, of a rank that has the first expert; all choose as many of as many.
        rows: of the largest step, with what fills up a graph.
    """

    def __init__(self, routers: Mapping[int, Router], rows: int) -> None:
        example = next(iter(routers.values()))
        routing, device = example.routing, example.weight.device
        self._layers = list(routers)
        self._num_experts = routing.num_experts
        chosen = torch.zeros(len(routers), rows, routing.top_k, dtype=torch.int32, device=device)
        # NaN may be routed to ids behind the last expert, below the next power of two.
        width = 1 << (routing.num_experts - 1).bit_length()
        self._counts = torch.zeros(len(routers), width, dtype=torch.int64, device=device)
        self._one = torch.ones(1, 1, dtype=torch.int64, device=device)
        self._chosen = chosen
        for router, ids in zip(routers.values(), chosen, strict=True):
            assert router.first == 0
            router.chosen = ids

    def count(self, tokens: int) -> None:
        """The first tokens of the newest step have been computed; what stands behind them is nobody's."""
        ids = self._chosen[:, :tokens].long().flatten(1)
        self._counts.scatter_add_(1, ids, self._one.expand_as(ids))

    def reset(self) -> None:
        """Nothing has been computed yet."""
        self._counts.zero_()

    def totals(self) -> dict[int, list[int]]:
        """Tokens of each expert, by layer. Waits for all that was launched."""
        return dict(zip(self._layers, self._counts[:, : self._num_experts].tolist(), strict=True))
