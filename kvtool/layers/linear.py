"""Matrix products, with the names under which checkpoints store their weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.errors import UnsupportedError
from kvtool.kernels import takes
from kvtool.kernels.quantized_rows import Activations, QuantizedRows
from kvtool.layers.quantized import EightBitMatrix, Matrix
from kvtool.parallel import Group, Shard


@dataclass(frozen=True)
class Slot:
    """Where a stored tensor goes, or a rank's piece of it.

    Attributes:
        to: the memory, of the piece's shape.
        shape: of the whole tensor.
        start: its indices at which the piece begins.
    """

    to: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]

    @classmethod
    def whole(cls, to: Tensor) -> "Slot":
        return cls(to, tuple(to.shape), (0,) * to.ndim)


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


def linear(x: Activations, weight: Tensor | Matrix, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: x [T, K], weight [N, K] → [T, N]."""
    if isinstance(x, QuantizedRows):
        assert isinstance(weight, EightBitMatrix), "no other reads them"
        return weight.linear(x, bias)
    if isinstance(weight, Matrix):
        return weight.linear(x, bias)
    if takes(x):
        from kvtool.kernels.gemv import gemv, tile_for

        if tile := tile_for(x, weight):
            return gemv(x, weight, bias, tile)
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor | Matrix, bias: Tensor | None = None) -> Tensor:
    """silu(x Gᵀ + b) · (x Uᵀ + c), the gates G being the first half of the weight: x [T, K], [N, K] → [T, N / 2]."""
    if takes(x):
        from kvtool.kernels.activation import silu_mul
        from kvtool.kernels.gemv import gemv, tile_for

        if isinstance(weight, Tensor) and (tile := tile_for(x, weight)):
            return gemv(x, weight, bias, tile, gated=True)
        return silu_mul(_product(x, weight, bias))
    gate, up = _product(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _product(x: Tensor, weight: Tensor | Matrix, bias: Tensor | None) -> Tensor:
    return weight.linear(x, bias) if isinstance(weight, Matrix) else F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x Wᵀ + b, x [T, in_features] → [T, out_features].

    Attributes:
        weight: [out_features, in_features] in the model's dtype, or a `Matrix` that has taken its place.
    """

    gated = False
    weight: Tensor | Matrix
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def reads(self) -> torch.dtype | None:
        """The 8 bits to which it rounds x, if it does: `linear` takes `QuantizedRows` of them too."""
        return self.weight.reads if isinstance(self.weight, Matrix) else None

    def replace(self, matrix: Matrix) -> None:
        """Put a matrix of fewer bits in place of the weight."""
        del self.weight
        self.weight = matrix

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers of `dtype`."""
        return self.weight.dense(dtype) if isinstance(self.weight, Matrix) else self.weight.to(dtype)

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint names of this layer's tensors, the layer's own name being `path`, and where each one goes; of a
        matrix of fewer bits none."""
        if isinstance(self.weight, Tensor):
            yield f"{path}.weight", Slot.whole(self.weight)
        if self.bias is not None:
            yield f"{path}.bias", Slot.whole(self.bias)


class RowLinear(Linear):
    """y = x Wᵀ + b, of which each rank has some columns of W and those of x: x [T, inputs.size] → [T, out_features].

    Row-parallel in the words of Megatron-LM (Shoeybi et al., 2019), which counts rows of Wᵀ. All ranks get the sum.

    Attributes:
        by_outputs: each rank computes some of the outputs instead, of the inputs of all: of a quantised weight whose
            groups of columns are not a rank's own.
    """

    def __init__(
        self, inputs: Shard, out_features: int, tp: Group, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inputs.size, out_features, bias=bias, dtype=dtype, device=device)
        self.inputs, self.tp, self.by_outputs = inputs, tp, False

    def share_outputs(self) -> None:
        """Have some of the outputs, of a weight yet to be filled.

        Raises:
            UnsupportedError: there are not as many for each rank.
        """
        assert isinstance(self.weight, Tensor)
        if len(self.weight) % self.tp.size:
            raise UnsupportedError(
                f"--tp {self.tp.size}: cuts groups of quantised columns, and does not divide {len(self.weight)} outputs"
            )
        columns, rows = self.inputs.total, self.tp.shard(len(self.weight)).size
        self.by_outputs = True
        self.weight = empty_parameter(rows, columns, dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, x: Activations) -> Tensor:
        if self.by_outputs:
            assert isinstance(x, Tensor), "8 bits have no groups"
            out = self.tp.all_gather(linear(self.tp.all_gather(x), self.weight))
            return out if self.bias is None else out.add_(self.bias)
        return self.tp.all_reduce(linear(x, self.weight, self.bias if self.tp.rank == 0 else None))

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        for name, slot in super().slots(path):
            if slot.to is self.weight and self.by_outputs:
                rows, columns = slot.shape
                slot = Slot(slot.to, (self.tp.size * rows, columns), (self.tp.rank * rows, 0))
            elif slot.to is self.weight:
                slot = Slot(slot.to, (slot.shape[0], self.inputs.total), (0, self.inputs.start))
            yield name, slot


class MergedLinear(Linear):
    """Several products of the same x as one, their outputs side by side: q, k and v, or gate and up.

    Args:
        parts: name in the checkpoint of each, in order, and which of its outputs this rank computes.
        stored_merged: the checkpoint, too, holds one tensor (phi3).
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, Shard],
        *,
        bias: bool,
        stored_merged: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, sum(part.size for part in parts.values()), bias=bias, dtype=dtype, device=device)
        self.parts = parts
        self.stored_merged = stored_merged

    def slots(self, path: str) -> Iterator[tuple[str, Slot]]:
        parent, totals = path.rpartition(".")[0], [part.total for part in self.parts.values()]
        for kind, merged in super().slots(""):
            pieces = merged.to.split([part.size for part in self.parts.values()])
            firsts = accumulate(totals, initial=0)
            for (name, part), first, piece in zip(self.parts.items(), firsts, pieces, strict=False):
                if self.stored_merged:
                    stored, rows, start = path, sum(totals), first + part.start
                else:
                    stored, rows, start = f"{parent}.{name}", part.total, part.start
                yield f"{stored}{kind}", Slot(piece, (rows, *piece.shape[1:]), (start, *merged.start[1:]))


class GatedLinear(MergedLinear):
    """silu(gate(x)) · up(x), the gated half of SwiGLU (Shazeer, 2020); its parts are gate and up."""

    gated = True

    def forward(self, x: Tensor) -> Tensor:
        return gated_linear(x, self.weight, self.bias)
