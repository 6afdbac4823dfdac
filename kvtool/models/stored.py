"""Quantised weights as checkpoints store them: GPTQ, AWQ and compressed-tensors, read into one form for each width.

Sources: AutoGPTQ's and GPTQModel's `pack`, AutoAWQ's `WQLinear_GEMM`, and the compressors of compressed-tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvtool.layers.quantized import GROUPS, EightBitMatrix, Int4Matrix, Matrix

Kind = Literal["gptq", "awq", "int4", "int8", "fp8"]  # the last three in the manner of compressed-tensors
FLOATS = ("F16", "BF16", "F32")
ADD_ONE = 0x11111111  # to each of a word's eight numbers
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that each nibble of a word holds, the lowest first


@dataclass(frozen=True)
class StoredQuantization:
    """What a checkpoint's `quantization_config` says.

    Attributes:
        group_size: columns that share a scale; None: all of a row.
        less_one: zeros are stored as one less (GPTQ's first format).
        has_zeros: there are stored zeros; without, codes are around the middle.
    """

    kind: Kind
    group_size: int | None = None
    less_one: bool = False
    has_zeros: bool = True

    @property
    def method(self) -> str:
        """As `--quantization` names it."""
        return {"int4": "w4a16", "int8": "w8a8"}.get(self.kind, self.kind)

    @property
    def rounding(self) -> Literal["w4a16", "w8a8", "fp8"]:
        """What gives weights of the same form."""
        return "w8a8" if self.kind == "int8" else "fp8" if self.kind == "fp8" else "w4a16"


@dataclass(frozen=True)
class StoredPiece:
    """One of the tensors that hold a matrix: what it may be stored as, its possible shapes, and whether it may lack."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


def marker(stored: StoredQuantization) -> str:
    """What ends the name of a tensor that only quantised matrices have."""
    return {"gptq": "qweight", "awq": "qweight", "int4": "weight_packed"}.get(stored.kind, "weight_scale")


def pieces_of(stored: StoredQuantization, rows: int, columns: int) -> dict[str, StoredPiece] | str:
    """The tensors of a matrix [rows, columns], by the last part of their names, or why it cannot be stored so."""
    group = stored.group_size or columns
    if stored.kind in ("int8", "fp8"):
        dtype = "I8" if stored.kind == "int8" else "F8_E4M3"
        scales = StoredPiece(FLOATS, ((rows, 1), (rows,), (1,), (), (1, 1)))
        return {"weight": StoredPiece((dtype,), ((rows, columns),)), "weight_scale": scales}
    if columns % group or group % 32:
        return f"groups of {group} do not fit its {columns} columns"
    if rows % 8:
        return f"its {rows} rows are no multiple of 8, as words of 4-bit numbers hold"
    groups, words = columns // group, ("I32",)
    order = StoredPiece(words, ((columns,),), optional=True)
    if stored.kind == "int4":
        zeros = {"weight_zero_point": StoredPiece(words, ((rows // 8, groups),))} if stored.has_zeros else {}
        return {
            "weight_packed": StoredPiece(words, ((rows, columns // 8),)),
            "weight_scale": StoredPiece(FLOATS, ((rows, groups),)),
            "weight_shape": StoredPiece(("I64", "I32"), ((2,),), optional=True),
            "weight_g_idx": order,
            **zeros,
        }
    packed = (columns // 8, rows) if stored.kind == "gptq" else (columns, rows // 8)
    return {
        "qweight": StoredPiece(words, (packed,)),
        "qzeros": StoredPiece(words, ((groups, rows // 8),)),
        "scales": StoredPiece(FLOATS, ((groups, rows),)),
    } | ({"g_idx": order} if stored.kind == "gptq" else {})


def read_matrix(
    stored: StoredQuantization, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Int4Matrix | EightBitMatrix:
    """The matrix in these tensors, whose shapes are those of `pieces_of`, to be multiplied with x of `dtype`.

    Raises:
        ValueError: numbers that mean nothing; says which.
    """
    if stored.kind in ("int8", "fp8"):
        scales, weight = _finite("weight_scale", tensors["weight_scale"]).float(), tensors["weight"]
        if stored.kind == "fp8":
            _finite("weight", weight.float())
        return EightBitMatrix(weight, scales.flatten().expand(len(weight)))
    codes, scales, zeros, groups_of = _four_bits(stored, tensors)
    scales, columns = _finite("scales", scales.to(dtype)), codes.shape[1]
    group = columns // scales.shape[1]
    order = None if groups_of is None else _order(groups_of, group)
    fitting = next((size for size in GROUPS if group % size == 0), group)
    scales, zeros = (x.to(dtype).repeat_interleave(group // fitting, 1) for x in (scales, zeros))
    return Int4Matrix(codes if order is None else codes[:, order], scales, zeros, order)


def write_matrix(stored: StoredQuantization, matrix: Matrix) -> dict[str, Tensor]:
    """What `read_matrix` makes this matrix of, whose columns are in order; of 4 bits as GPTQ or AWQ have it."""
    if isinstance(matrix, EightBitMatrix):
        return {"weight": matrix.weight, "weight_scale": matrix.scales[:, None].contiguous()}
    assert isinstance(matrix, Int4Matrix) and matrix.order is None
    codes, scales, zeros = matrix.codes, matrix.scales.half(), matrix.zeros.to(torch.uint8)
    if stored.kind == "gptq":
        words = as_words(zeros.t(), dim=1)
        tensors = {"qweight": as_words(codes.t(), dim=0), "qzeros": words - ADD_ONE if stored.less_one else words}
        groups = torch.arange(codes.shape[1], dtype=torch.int32) // matrix.group_size
        return tensors | {"scales": scales.t().contiguous(), "g_idx": groups}
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    shuffled = (x.t().unflatten(1, (-1, 8))[..., order].flatten(1) for x in (codes, zeros))
    qweight, qzeros = (as_words(x, dim=1) for x in shuffled)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.t().contiguous()}


def _four_bits(
    stored: StoredQuantization, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes uint8 [N, K], scales and zeros [N, K / G], and the group of each column, where they say."""
    if stored.kind == "int4":
        codes, scales = nibbles(tensors["weight_packed"], dim=1), tensors["weight_scale"]
        shape = tensors.get("weight_shape")
        if shape is not None and shape.tolist() != list(codes.shape):
            raise ValueError(f"weight_shape is {shape.tolist()} where the codes are {list(codes.shape)}")
        zeros = nibbles(tensors["weight_zero_point"], dim=0) if stored.has_zeros else torch.full_like(scales, 8)
        return codes, scales, zeros, tensors.get("weight_g_idx")
    scales = tensors["scales"].t()
    if stored.kind == "gptq":
        words = tensors["qzeros"] + ADD_ONE if stored.less_one else tensors["qzeros"]
        return nibbles(tensors["qweight"], dim=0).t(), scales, nibbles(words, dim=1).t(), tensors.get("g_idx")
    codes, zeros = (nibbles(tensors[name], dim=1).unflatten(1, (-1, 8)) for name in ("qweight", "qzeros"))
    back = torch.tensor(AWQ_ORDER, device=codes.device).argsort()
    return codes[..., back].flatten(1).t(), scales, zeros[..., back].flatten(1).t(), None


def nibbles(words: Tensor, dim: int) -> Tensor:
    """The eight numbers of each int32, the lowest bits first, as uint8 along `dim`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    numbers = (words.unsqueeze(dim + 1) >> shifts.view(8, *[1] * (words.ndim - dim - 1))) & 15
    return numbers.to(torch.uint8).flatten(dim, dim + 1)


def as_words(numbers: Tensor, dim: int) -> Tensor:
    """What `nibbles` takes apart: uint8 of 0..15, eight to an int32 along `dim`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=numbers.device)
    eights = numbers.to(torch.int64).unflatten(dim, (-1, 8))
    words = (eights << shifts.view(8, *[1] * (numbers.ndim - dim - 1))).sum(dim + 1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _order(groups_of: Tensor, group: int) -> Tensor | None:
    """Columns sorted by their groups; None where they are so already."""
    columns = len(groups_of)
    if bool(((groups_of < 0) | (groups_of >= columns // group)).any()):
        raise ValueError(f"g_idx names groups beyond its {columns // group}")
    counts = groups_of.long().bincount(minlength=columns // group)
    if not bool((counts == group).all()):
        raise ValueError(f"g_idx does not give each group {group} columns")
    order = groups_of.long().argsort(stable=True)
    return None if bool((order == torch.arange(columns, device=order.device)).all()) else order


def _finite(name: str, values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity, or what the model's dtype cannot hold")
    return values
