"""Matrix products, with the names under which checkpoints store their weights."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels import takes


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialised weights, to be filled from a checkpoint or at random.

    On a CPU, in float32, the longer side of a matrix is the contiguous one: a product with one vector then reads longer
    runs, which takes two thirds of the time for matrices that widen. (16-bit products take ten times as long that way.)
    """
    exact = dtype in (torch.float32, torch.float64)
    if device.type == "cpu" and exact and len(shape) == 2 and shape[0] > shape[1]:
        weights = torch.empty(shape[::-1], dtype=dtype, device=device).t()
    else:
        weights = torch.empty(shape, dtype=dtype, device=device)
    return nn.Parameter(weights, requires_grad=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: x [T, K], weight [N, K] → [T, N]."""
    if takes(x):
        from kvtool.kernels.gemv import gemv, tile_for

        if tile := tile_for(x, weight):
            return gemv(x, weight, bias, tile)
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(x Gᵀ + b) · (x Uᵀ + c), the gates G being the first half of the weight: x [T, K], [N, K] → [T, N / 2]."""
    if takes(x):
        from kvtool.kernels.activation import silu_mul
        from kvtool.kernels.gemv import gemv, tile_for

        if tile := tile_for(x, weight):
            return gemv(x, weight, bias, tile, gated=True)
        return silu_mul(F.linear(x, weight, bias))
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class Linear(nn.Module):
    """y = x Wᵀ + b, x [T, in_features] → [T, out_features]."""

    gated = False
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def slots(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names of this layer's tensors, the layer's own name being `path`, and where each one goes."""
        yield f"{path}.weight", self.weight
        if self.bias is not None:
            yield f"{path}.bias", self.bias


class MergedLinear(Linear):
    """Several products of the same x as one, their outputs side by side: q, k and v, or gate and up.

    Args:
        parts: name in the checkpoint and out_features of each, in order.
        stored_merged: the checkpoint, too, holds one tensor (phi3).
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool,
        stored_merged: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype, device=device)
        self.parts = parts
        self.stored_merged = stored_merged

    def slots(self, path: str) -> Iterator[tuple[str, Tensor]]:
        if self.stored_merged:
            yield from super().slots(path)
            return
        parent = path.rpartition(".")[0]
        for kind, merged in super().slots(""):
            for part, rows in zip(self.parts, merged.split(list(self.parts.values())), strict=True):
                yield f"{parent}.{part}{kind}", rows


class GatedLinear(MergedLinear):
    """silu(gate(x)) · up(x), the gated half of SwiGLU (Shazeer, 2020); its parts are gate and up."""

    gated = True

    def forward(self, x: Tensor) -> Tensor:
        return gated_linear(x, self.weight, self.bias)
