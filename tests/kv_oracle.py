"""Packed blocks, slowly: the formulas of the KV formats in exact fractions, sharing no line with `kvtool.kv.codecs`."""

import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction

FP16 = sorted(x for (x,) in struct.iter_unpack("<e", struct.pack("<65536H", *range(65536))) if abs(x) <= 65504)


def e4m3(code: int) -> float:
    """The value of one fp8 byte: sign, 4 bits of exponent biased by 7, 3 bits of mantissa; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp16_not_below(x: Fraction) -> Fraction:
    return Fraction(FP16[bisect_left(FP16, x)])


def fp16_not_above(x: Fraction) -> Fraction:
    return Fraction(FP16[bisect_right(FP16, x) - 1])


def quantise(group: list[Fraction], bits: int, symmetric: bool) -> tuple[list[int], Fraction, Fraction]:
    """Codes, scale and zero of the elements that share a scale; IndexError where fp16 cannot hold scale or zero.

    The value of a code is zero + scale * code, with codes from 0 up whether symmetric or not.
    """
    if symmetric:
        levels = 2 ** (bits - 1) - 1
        scale = fp16_not_below(max(abs(x) for x in group) / levels)
        return [levels + (round(x / scale) if scale else 0) for x in group], scale, -levels * scale
    zero = fp16_not_above(min(group))
    scale = fp16_not_below((max(group) - zero) / (2**bits - 1))
    return [round((x - zero) / scale) if scale else 0 for x in group], scale, zero


def pack(codes: list[int], bits: int) -> bytes:
    """Bytes of one token's codes along head_dim: with p codes to a byte, byte i holds code i lowest, then i + D/p, …"""
    per_byte = 8 // bits
    size = len(codes) // per_byte
    return bytes(sum(codes[i + part * size] << (bits * part) for part in range(per_byte)) for i in range(size))


def integer_stream(
    x: list[list[float]], bits: int, axis: str, group: int, symmetric: bool
) -> tuple[list[bytes], list[list[float]], list[list[float]], list[list[float]]]:
    """One head of one block, [tokens][head_dim], as stored.

    Returns:
        packed codes of each token; scales and zeros [tokens][head_dim / group], or [1][head_dim] on the channel axis;
        decoded values [tokens][head_dim].
    """
    tokens, dim = len(x), len(x[0])
    exact = [[Fraction(value) for value in row] for row in x]
    if axis == "channel":
        cells = [[(t, d) for t in range(tokens)] for d in range(dim)]
        width = dim
    else:
        cells = [[(t, d) for d in range(first, first + group)] for t in range(tokens) for first in range(0, dim, group)]
        width = dim // group
    codes, decoded = [[0] * dim for _ in x], [[0.0] * dim for _ in x]
    scales, zeros = [], []
    for cell in cells:
        group_codes, scale, zero = quantise([exact[t][d] for t, d in cell], bits, symmetric)
        scales.append(float(scale))
        zeros.append(float(zero))
        meaning = {code: float(zero + scale * code) for code in set(group_codes)}
        for (t, d), code in zip(cell, group_codes, strict=True):
            codes[t][d], decoded[t][d] = code, meaning[code]
    rows = [slice(i, i + width) for i in range(0, len(scales), width)]
    return [pack(row, bits) for row in codes], [scales[r] for r in rows], [zeros[r] for r in rows], decoded


def fp8_row(row: list[float]) -> tuple[list[float], float]:
    """One token and head of fp8: the decoded values, and the scale that maps the largest of them to at most 448."""
    exact = [Fraction(value) for value in row]
    scale = fp16_not_below(max(abs(x) for x in exact) / 448)
    return [float(scale * Fraction(_nearest_e4m3(x / scale))) if scale else 0.0 for x in exact], float(scale)


def _nearest_e4m3(x: Fraction) -> float:
    """Nearest value of the table, the even code on a tie; larger codes mean larger values."""
    above = bisect_left(_E4M3, abs(x))
    nearest = min({max(above - 1, 0), min(above, 0x7E)}, key=lambda code: (abs(abs(x) - _E4M3[code]), code & 1))
    return float(_E4M3[nearest]) * (-1 if x < 0 else 1)


_E4M3 = [Fraction(e4m3(code)) for code in range(0x7F)]
