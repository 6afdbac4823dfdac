"""Matrices of 4-bit and 8-bit weights, in place of a linear layer's 16-bit one.

Every checkpoint format and every way to round ends in one of three forms; a matrix is cut into a rank's part, and the
parts of a fused layer are put side by side, in that form.
"""

from collections.abc import Sequence
from math import gcd
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels import takes
from kvtool.kernels.quantized_rows import FP8, Activations, quantize_rows
from kvtool.kernels.w4a16 import RUN, by_group, dequantize_w4, pack_w4, unpack_w4, w4a16_linear
from kvtool.kernels.w8a8 import w8a8_linear
from kvtool.parallel import Shard

ROUNDED_AT_ONCE = 1 << 24  # elements, of which some copies in float32 are made
EIGHT_BITS = {"w8a8": torch.int8, "fp8": FP8}  # kinds of numbers, of methods to round to
GROUPS = (128, 64, 32)  # columns that share a scale, the preferred number first


class Matrix(nn.Module):
    """A weight [N, K] in fewer bits.

    Attributes:
        bits: of one weight, scales not counted.
    """

    bits: ClassVar[int]

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def reads(self) -> torch.dtype | None:
        """Of 8 bits, to which it rounds x; it takes `QuantizedRows` as well then."""
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b: x [M, K] → [M, N], in x's dtype."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the weights stand for, [N, K]."""
        raise NotImplementedError

    def cut(self, rows: Shard, columns: Shard) -> "Matrix":
        """A part of it. Columns are cut only where `cuts` says that they can be."""
        raise NotImplementedError

    def cuts(self, columns: Shard) -> bool:
        """Whether these columns can do without the others."""
        return True


class Int4Matrix(Matrix):
    """(codes − zeros) · scales, for each row in groups of columns.

    Args:
        codes: uint8 [N, K] of 0..15, the columns of each group side by side.
        scales, zeros: [N, K / G] in the dtype of x; zeros are in units of codes.
        order: int64 [K], which column of x meets each column of codes; None: its own.
    """

    bits = 4
    weight: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", pack_w4(codes))
        self.register_buffer("scales", by_group(scales))
        self.register_buffer("zeros", by_group(zeros))
        self.register_buffer("order", order)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), 2 * self.weight.numel() // len(self.scales)

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return unpack_w4(self.weight)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if self.order is None else x[:, self.order]
        return w4a16_linear(x, self.weight, self.scales, self.zeros, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        matrix = self._decoded(dtype)
        return matrix if self.order is None else torch.empty_like(matrix).index_copy_(1, self.order, matrix)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        """`dense`, of columns in the order of codes."""
        if takes(self.scales) and dtype == self.scales.dtype and dtype.itemsize == 2 and self.group_size % RUN == 0:
            from kvtool.kernels import w4a16_kernels

            if w4a16_kernels.compiles():
                return w4a16_kernels.decode(self.weight, self.scales, self.zeros)
        return dequantize_w4(self.weight, self.scales, self.zeros, dtype)

    def cuts(self, columns: Shard) -> bool:
        whole = columns.size == columns.total
        return whole or (self.order is None and columns.size % self.group_size == 0 == columns.start % self.group_size)

    def cut(self, rows: Shard, columns: Shard) -> "Int4Matrix":
        assert self.cuts(columns)
        groups = slice(columns.start // self.group_size, (columns.start + columns.size) // self.group_size)
        lines = slice(rows.start, rows.start + rows.size)
        codes = self.codes[lines, columns.start : columns.start + columns.size]
        return Int4Matrix(codes, self.scales[lines, groups], self.zeros[lines, groups], self.order)


class EightBitMatrix(Matrix):
    """codes · scales, with a scale for each row; x is rounded to 8 bits as well, token by token.

    Args:
        codes: [N, K], int8 or e4m3.
        scales: float32 [N].
    """

    bits = 8
    weight: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", codes.contiguous())
        self.register_buffer("scales", scales.float().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def reads(self) -> torch.dtype:
        return self.weight.dtype

    def linear(self, x: Activations, bias: Tensor | None = None) -> Tensor:
        return w8a8_linear(x, self.weight, self.scales, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scales.to(dtype)[:, None]

    def cut(self, rows: Shard, columns: Shard) -> "EightBitMatrix":
        lines = slice(rows.start, rows.start + rows.size)
        codes = self.weight[lines, columns.start : columns.start + columns.size]
        return EightBitMatrix(codes, self.scales[lines])


class Dense(Matrix):
    """16-bit weights [N, K] that stand beside quantised ones."""

    bits = 16
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class SideBySide(Matrix):
    """Rows of matrices that have no form in common, one matrix after the other."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self._matrices), self._matrices[0].shape[1]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = [part.shape[0] for part in self._matrices]
        biases = [None] * len(rows) if bias is None else bias.split(rows)
        return torch.cat([part.linear(x, of) for part, of in zip(self._matrices, biases, strict=True)], dim=-1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.dense(dtype) for part in self._matrices])

    @property
    def _matrices(self) -> Sequence[Matrix]:
        return cast(Sequence[Matrix], self.parts)


def side_by_side(parts: Sequence[Matrix]) -> Matrix:
    """Rows of all of them as one matrix, in one form where they share it."""
    first, *others = parts
    if not others:
        return first
    if isinstance(first, Int4Matrix) and all(isinstance(part, Int4Matrix) and _alike(first, part) for part in others):
        four = cast(Sequence[Int4Matrix], parts)
        codes = torch.cat([part.codes for part in four])
        scales, zeros = torch.cat([part.scales for part in four]), torch.cat([part.zeros for part in four])
        return Int4Matrix(codes, scales, zeros, first.order)
    if isinstance(first, EightBitMatrix) and all(part.reads == first.reads for part in others):
        eight = cast(Sequence[EightBitMatrix], parts)
        return EightBitMatrix(torch.cat([part.weight for part in eight]), torch.cat([part.scales for part in eight]))
    return SideBySide(parts)


def _alike(one: Int4Matrix, other: Int4Matrix) -> bool:
    """Whether groups are of the same columns."""
    if one.scales.shape[1] != other.scales.shape[1] or (one.order is None) != (other.order is None):
        return False
    return one.order is None or other.order is None or torch.equal(one.order, other.order)


# --- rounding to nearest ---------------------------------------------------------------------------------------------


def group_size(*columns: int) -> int:
    """Columns to a scale, for matrices of so many: the first of `GROUPS` that fits all of them, or what does."""
    common = gcd(*columns)
    return next((size for size in GROUPS if common % size == 0), common)


def int4_grid(groups: Tensor, dtype: torch.dtype, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """The numbers that 4 bits can stand for between the least and the greatest of each group, and 0 among them.

    Args:
        groups: [..., G], in float32 at least.
        dtype: of the model.
        shrink: of the range.

    Returns:
        Scales and zeros [..., 1] in the dtype of `groups`.
    """
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = stored_scales((high - low) * (shrink / 15), dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, (-low * shrink / scales).round().clamp(0, 15)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` as numbers that bfloat16 has for a model of that dtype, else those of float16, in which checkpoints hold
    them."""
    return scales.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).to(scales.dtype)


def int4_codes(weights: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest code of each weight, in the weights' dtype."""
    return ((weights / scales).round() + zeros).clamp(0, 15)


def rounded(weight: Tensor, method: str, group: int) -> Matrix:
    """`weight` [N, K], each element rounded to the nearest: "w8a8", "fp8", or "w4a16" in groups of so many columns."""
    pieces = weight.split(max(1, ROUNDED_AT_ONCE // weight.shape[1]))
    return side_by_side([_rounded(piece, method, group) for piece in pieces])


def _rounded(weight: Tensor, method: str, group: int) -> Matrix:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if kind := EIGHT_BITS.get(method):
        lines = quantize_rows(wide, kind)
        return EightBitMatrix(lines.codes, lines.scales)
    groups = wide.unflatten(1, (-1, group))
    scales, zeros = int4_grid(groups, weight.dtype)
    codes = int4_codes(groups, scales, zeros).to(torch.uint8).flatten(1)
    return Int4Matrix(codes, scales[..., 0].to(weight.dtype), zeros[..., 0].to(weight.dtype))
