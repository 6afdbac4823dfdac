"""The arithmetic of KV formats: full precision to codes, scales and zeros, and back.

Codes of head_dim D are packed by parts: at 4 bits byte i holds channel i (low nibble) and channel i + D/2, at 2 bits
channels i, i + D/4, i + D/2 and i + 3D/4. A kernel then reads each part of head_dim as one plain operand.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvtool.config import Bits
from kvtool.errors import UnsupportedError
from kvtool.kv.format import StreamFormat

Arrays = dict[str, Tensor]


class Codec(Protocol):
    """How one kind of bits is written and read. `x` is [..., heads, tokens, D]; arrays are named as in `KVLayout`."""

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        """Arrays [..., heads, tokens or 1, n] of `x`; on the channel axis its tokens are one whole block."""

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        """What a query sees: [..., heads, tokens, D] in `dtype`."""


class Raw:
    """The model's dtype as it is."""

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        return {"codes": x}

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        return arrays["codes"].to(dtype)


class Integer:
    """Uniform codes of 8, 4 or 2 bits.

    Asymmetric: zero = min rounded down to fp16, scale = (max - zero) / (2^bits - 1) rounded up to fp16. Symmetric:
    scale = max|x| / (2^(bits-1) - 1) rounded up to fp16. Codes come from the *stored* scale and zero, so that
    |x - decoded| <= scale / 2 holds exactly, at any offset.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        groups, dim = _grouped(x.to(_wide(x.dtype)), fmt)
        if fmt.symmetric:
            levels = 2 ** (self.bits - 1) - 1
            scale = _round_fp16(groups.abs().amax(dim, keepdim=True) / levels, up=True)
            codes = _codes(groups, scale, -levels, levels) + levels
            stored = {"scale": scale}
        else:
            zero = _round_fp16(groups.amin(dim, keepdim=True), up=False)
            levels = 2**self.bits - 1
            above = groups - zero.to(groups.dtype)
            scale = _round_fp16(above.amax(dim, keepdim=True) / levels, up=True)
            codes = _codes(above, scale, 0, levels)
            stored = {"scale": scale, "zero": zero}
        squeezed = {name: _ungrouped_scale(value, fmt) for name, value in stored.items()}
        return {"codes": pack(codes.to(torch.uint8).reshape(x.shape), self.bits), **squeezed}

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        # In float32 at least: bf16 would round the scale, and 255 of its steps add up to more than the bound.
        codes = unpack(arrays["codes"], self.bits).to(_wide(dtype))
        groups, _ = _grouped(codes, fmt)
        scale = _grouped_scale(arrays["scale"], fmt).to(codes.dtype)
        if fmt.symmetric:
            groups.sub_(2 ** (self.bits - 1) - 1).mul_(scale)
        else:
            groups.mul_(scale).add_(_grouped_scale(arrays["zero"], fmt).to(codes.dtype))
        return codes.to(dtype)


class Float8:
    """e4m3 with one scale per token and head, which maps the largest element to 448."""

    LARGEST = 448.0

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        wide = x.to(_wide(x.dtype))
        scale = _round_fp16(wide.abs().amax(-1, keepdim=True) / self.LARGEST, up=True)
        return {"codes": (wide / _divisor(scale, wide.dtype)).to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        # An e4m3 byte moved into fp16's exponent is its value / 256; ten times as fast on CPU as torch's conversion.
        bits = (arrays["codes"].view(torch.int8).to(torch.int16) << 7) & -0x4001
        scale = arrays["scale"].to(_wide(dtype)) * 256
        return bits.view(torch.float16).to(scale.dtype).mul_(scale).to(dtype)


CODECS: dict[Bits, Codec] = {"16": Raw(), "8": Integer(8), "4": Integer(4), "2": Integer(2), "fp8": Float8()}


def check_fits(fits: bool) -> None:
    """Refuse what fp16 cannot hold as a scale or zero.

    Raises:
        UnsupportedError: unless `fits`.
    """
    if not fits:
        raise UnsupportedError(
            "a key or value is NaN or beyond fp16's 65,504: this model's cache cannot be quantised; use --nbits 16"
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D], each below 2^bits, to bytes [..., D * bits / 8]."""
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0]
    for index, part in enumerate(parts[1:], 1):
        packed = packed | (part << (index * bits))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    low = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8 - bits, bits)]
    return torch.cat([*low, packed >> (8 - bits)], dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, fmt: StreamFormat) -> tuple[Tensor, int]:
    """`x` with the elements of a scale along one dimension, and that dimension."""
    return (x, -2) if fmt.axis == "channel" else (x.unflatten(-1, (-1, fmt.group)), -1)


def _grouped_scale(scale: Tensor, fmt: StreamFormat) -> Tensor:
    return scale if fmt.axis == "channel" else scale.unsqueeze(-1)


def _ungrouped_scale(scale: Tensor, fmt: StreamFormat) -> Tensor:
    return scale if fmt.axis == "channel" else scale.squeeze(-1)


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x / _divisor(scale, x.dtype)).round_().clamp_(low, high)


def _divisor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` to divide by: a group of equal elements has scale 0 and codes 0."""
    wide = scale.to(dtype)
    return torch.where(wide == 0, torch.ones_like(wide), wide)


def _round_fp16(x: Tensor, *, up: bool) -> Tensor:
    """The nearest fp16 that is not below (`up`) or not above `x`; refuses what fp16 cannot hold."""
    near = x.to(torch.float16)
    back = near.to(x.dtype)
    missed = back < x if up else back > x
    limit = torch.full_like(near, float("inf") if up else float("-inf"))
    rounded = torch.where(missed, torch.nextafter(near, limit), near)
    check_fits(bool(rounded.isfinite().all()))
    return rounded + 0.0  # -0.0 becomes 0.0: which of the two a minimum finds depends on how it runs
