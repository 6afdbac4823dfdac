"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from collections.abc import Iterator
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels import takes
from kvtool.kernels.quantized_rows import Activations
from kvtool.layers.linear import GatedLinear, Linear, Slot, empty_parameter, linear


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension; 16-bit inputs are normalised in fp32."""

    weight: Tensor

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise the residual stream after adding `x` to it.

        Args:
            x: [..., size], what the last block computed, or the embedding.
            residual: [..., size], the stream before it, overwritten; None: `x` begins the stream.

        Returns:
            The normalised stream and the stream itself.
        """
        if takes(x):
            from kvtool.kernels.norm import add_rms_norm

            return add_rms_norm(x, residual, self.weight, self.eps)
        residual = x if residual is None else residual.add_(x)
        return F.rms_norm(residual, self.weight.shape, self.weight, self.eps), residual

    @overload
    def into(self, product: Linear, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def into(
        self, product: GatedLinear, x: Tensor, residual: Tensor | None = None, *, then: Linear
    ) -> tuple[Activations, Tensor]: ...

    def into(
        self, product: Linear, x: Tensor, residual: Tensor | None = None, *, then: Linear | None = None
    ) -> tuple[Activations, Tensor]:
        """`product` of the normalised stream, and the stream itself.

        On a GPU in fewer kernels: few rows of 16 bits in one; what products read in 8 bits comes so from the norm, and
        from a gated product for the one that follows it `then`.
        """
        if takes(x) and isinstance(product.weight, Tensor):
            from kvtool.kernels.gemv import Prologue, norm_gemv, tile_for

            tile = tile_for(x, product.weight)
            if tile and not tile.dot:
                prologue = Prologue(residual, self.weight, self.eps)
                return norm_gemv(x, prologue, product.weight, product.bias, tile, gated=product.gated)
        if takes(x) and product.reads:
            from kvtool.kernels.activation import silu_mul, silu_mul_rows
            from kvtool.kernels.norm import add_rms_norm_rows

            rows, residual = add_rms_norm_rows(x, residual, self.weight, self.eps, product.reads)
            made = linear(rows, product.weight, product.bias)
            if product.gated and then and then.reads:
                return silu_mul_rows(made, then.reads), residual
            return silu_mul(made) if product.gated else made, residual
        x, residual = self(x, residual)
        return product(x), residual

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint name of the weight, and where it goes."""
        yield f"{path}.weight", Slot.whole(self.weight)


class QKNorm(nn.Module):
    """RMSNorm of every query and key head (qwen3), with one weight for queries and one for keys.

    x [T, num_heads + num_kv_heads, head_dim], queries first; the same shape returns.
    """

    weight: Tensor
    kind: Tensor

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(2, head_dim, dtype=dtype, device=device)
        kind = torch.tensor([0] * num_heads + [1] * num_kv_heads, device=device)
        self.register_buffer("kind", kind, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight[self.kind]

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint names of the two weights, and where each one goes."""
        parent = path.rpartition(".")[0]
        yield f"{parent}.q_norm.weight", Slot.whole(self.weight[0])
        yield f"{parent}.k_norm.weight", Slot.whole(self.weight[1])
