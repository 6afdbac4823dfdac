"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): all heads' keys and values are products of one latent.

A token caches that latent and one rotated key for all heads. Whether queries meet latents as they are stored or the
keys and values that are made of them is for attention to choose (`kvtool.attention.latents`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.attention.latents import LatentQueries
from kvtool.kernels import takes
from kvtool.kernels.rotary_heads import rotate
from kvtool.layers.linear import MergedLinear, RowLinear, Slot, empty_parameter
from kvtool.layers.norm import RMSNorm
from kvtool.parallel import Group, Shard

LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


@dataclass(frozen=True)
class MLAShape:
    """What queries, keys and values are made of.

    Attributes:
        q_lora_rank: elements of the latent of queries; None: they are projected from the token at once.
        kv_lora_rank: elements of the latent of keys and values.
        nope_dim, rope_dim: elements of a query or key head that are not rotated, and that are.
        value_dim: of a value head.
        interleaved: rotated elements come in pairs of neighbours, not one from each half.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool

    @property
    def head_dim(self) -> int:
        """Elements of a query or key head."""
        return self.nope_dim + self.rope_dim


class MLA(nn.Module):
    """Latent attention of a layer, behind its norm: x and residual stream [T, hidden_size] → the same."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        shape: MLAShape,
        layer: int,
        tp: Group,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        heads, q_rank = tp.shard(num_heads), shape.q_lora_rank
        self.shape, self.num_heads, self.layer = shape, heads.size, layer
        q_part = heads.times(shape.head_dim)
        self.q_width = q_rank or q_part.size
        self.a_proj = MergedLinear(
            hidden_size,
            {
                "q_a_proj" if q_rank else "q_proj": Shard.whole(q_rank) if q_rank else q_part,
                "kv_a_proj_with_mqa": Shard.whole(shape.kv_lora_rank + shape.rope_dim),
            },
            bias=False,
            stored_merged=False,
            dtype=dtype,
            device=device,
        )
        self.q_a_layernorm = RMSNorm(q_rank, LATENT_EPS, dtype=dtype, device=device) if q_rank else None
        self.q_b_proj = (
            MergedLinear(q_rank, {"q_b_proj": q_part}, bias=False, stored_merged=False, dtype=dtype, device=device)
            if q_rank
            else None
        )
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, LATENT_EPS, dtype=dtype, device=device)
        self.kv_b_proj = LatentProducts(heads, shape, dtype=dtype, device=device)
        values = heads.times(shape.value_dim)
        self.o_proj = RowLinear(values, hidden_size, tp, bias=False, dtype=dtype, device=device)

    def forward(
        self,
        norm: RMSNorm,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Callable[[int, LatentQueries, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        shape = self.shape
        made, residual = norm.into(self.a_proj, x, residual)
        q, latents = made.tensor_split([self.q_width], dim=-1)
        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_a_layernorm(q.contiguous())[0])
        q = q.view(-1, self.num_heads, shape.head_dim)
        absorbing, latent, key = rotate_and_norm(
            q, latents, cos, sin, self.kv_a_layernorm.weight, LATENT_EPS, interleaved=shape.interleaved
        )
        queries = LatentQueries(q[..., : shape.nope_dim], absorbing, self.kv_b_proj.weight)
        return self.o_proj(attend(self.layer, queries, key[:, None], latent[:, None]).flatten(1)), residual

    def project(self, attended: Tensor) -> Tensor:
        """What heads have gathered [..., H, kv_lora_rank] as they add it to the stream [..., hidden_size], in its own
        dtype."""
        products = self.kv_b_proj.weight[:, self.shape.nope_dim :].to(attended.dtype)
        values = torch.einsum("...hl,hvl->...hv", attended, products)
        return F.linear(values.flatten(-2), self.o_proj.dense(attended.dtype))


def rotate_and_norm(
    q: Tensor, latents: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, eps: float, *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and latents behind their norm.

    Args:
        q: [T, H, D], of which the last R elements are rotated; latents: [T, L + R], with rope keys behind.
        cos, sin: as `kvtool.layers.rotary.Rotary` gives them, for R elements.
        gain: [L], of the norm.
        interleaved: rotated elements come in pairs of neighbours. They leave in halves, queries and keys alike, so that
            their products are the same.

    Returns:
        [T, H, L + R], of which the last R elements are queries and the rest is yet to be filled, [T, L] and [T, R].
    """
    if takes(q):
        from kvtool.kernels import mla_inputs

        return mla_inputs.rotate_and_norm(q, latents, cos, sin, gain, eps, interleaved=interleaved)
    latent, dim = latents[:, : len(gain)], latents.shape[1] - len(gain)
    x = torch.cat([q[..., -dim:], latents[:, None, len(gain) :]], dim=1)
    x = rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if interleaved else x, cos, sin)
    queries = q.new_empty(*q.shape[:2], latents.shape[1])
    queries[..., len(gain) :] = x[:, :-1]
    return queries, F.rms_norm(latent, gain.shape, gain, eps), x[:, -1]


class LatentProducts(nn.Module):
    """What makes keys and values of a latent.

    Attributes:
        weight: [heads, nope_dim + value_dim, kv_lora_rank], for each head of this rank its keys' rows and then its
            values'.
    """

    weight: Tensor

    def __init__(self, heads: Shard, shape: MLAShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.heads = heads
        rows = shape.nope_dim + shape.value_dim
        self.weight = empty_parameter(heads.size, rows, shape.kv_lora_rank, dtype=dtype, device=device)

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint name of the weight, and where it goes."""
        _, rows, width = self.weight.shape
        stored = self.heads.times(rows)
        yield f"{path}.weight", Slot(self.weight.flatten(0, 1), (stored.total, width), (stored.start, 0))
