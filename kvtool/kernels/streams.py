"""Keys or values of one layer as kernels read them, and what is read of them where."""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import INTERPRETED, next_power_of_2


@dataclass(frozen=True)
class PackedStream:
    """Keys or values of one layer, as `kvtool.kv.store.Stream` holds them.

    Attributes:
        bits: "16", "8", "4", "2" or "fp8"; axis: "token" or "channel".
        group: neighbours along head_dim that share a scale, on the token axis.
        codes: [num_blocks, Hkv, B, bytes or D]; scale, zero: [num_blocks, Hkv, B or 1, groups or D] fp16, or None.
        tail: [slots, Hkv, tail tokens, D], position p in row p mod tail tokens; no rows where every token is packed.
    """

    bits: str
    axis: str
    group: int
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    tail: Tensor

    @property
    def parts(self) -> int:
        """Codes in a byte."""
        return 8 // int(self.bits) if self.bits in ("8", "4", "2") else 1

    def piece(self, head_dim: int) -> int:
        """Channels that one product takes: they lie side by side in a row of codes and share a token's scale."""
        run = head_dim // self.parts
        return gcd(run, self.group) if self.axis == "token" and self.bits in ("8", "4", "2") else run

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and tail as kernels take them: codes again in place of what there is none of."""
        codes, scale, zero = self.codes, self.scale, self.zero
        return codes, codes if scale is None else scale, codes if zero is None else zero, self.tail

    def far(self, table: Tensor, far: range) -> Tensor:
        """Positions `far` out of the blocks of one sequence, decoded: [Hkv, n, D] float64."""
        size = self.codes.shape[2]
        blocks = table[far.start // size : -(-far.stop // size)] if far else table[:0]
        codes, parts = self.codes[blocks], self.parts
        if self.bits == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
        elif parts > 1:
            bits = int(self.bits)
            codes = torch.cat([codes >> (part * bits) & (2**bits - 1) for part in range(parts)], dim=-1)
        x = codes.double()
        for array, apply in ((self.scale, torch.mul), (self.zero, torch.add)):
            if array is not None:
                wide = array[blocks].double()
                x = apply(x, wide.repeat_interleave(x.shape[-1] // wide.shape[-1], -1))
        first = far.start % size
        return x.transpose(0, 1).flatten(1, 2)[:, first : first + len(far)]

    def near(self, slot: Tensor, near: range) -> Tensor:
        """Positions `near` out of one sequence's tail, [Hkv, n, D] float64."""
        return self.tail[slot][:, [position % self.tail.shape[2] for position in near]].double()


def refuses_dtype(stream: PackedStream) -> str | None:
    """Why kernels that compute with 16 bits cannot read a stream, or None if they can."""
    dtype = stream.tail.dtype
    if dtype in (torch.bfloat16, torch.float16):
        return None
    return f"it runs in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"


def refuses_heads(
    key: PackedStream, value: PackedStream, num_heads: int, head_dims: tuple[int, ...], most: int
) -> str | None:
    """Why a kernel for heads of `head_dims`, of which `most` may share keys and values, cannot read these streams, or
    None if it can."""
    head_dim, group_heads = key.tail.shape[-1], num_heads // key.tail.shape[1]
    if reason := refuses_dtype(key):
        return reason
    if head_dim not in head_dims or value.tail.shape[-1] != head_dim:
        return f"head_dim must be one of {', '.join(map(str, head_dims))}, the same for K and V"
    if group_heads > most:
        return f"{group_heads} query heads share a KV head; it takes up to {most}"
    return None


@triton.jit
def rows_of(ptr, rows, STRIDE: tl.constexpr, START: tl.constexpr, PIECE: tl.constexpr):
    """[rows, PIECE padded], with zeros in the padding."""
    PAD: tl.constexpr = next_power_of_2(PIECE)
    columns = tl.arange(0, PAD)[None, :]
    if PAD == PIECE:
        return tl.load(ptr + rows[:, None] * STRIDE + START + columns)
    return tl.load(ptr + rows[:, None] * STRIDE + START + columns, mask=columns < PIECE, other=0)


@triton.jit
def part_of(packed, PART: tl.constexpr, BITS: tl.constexpr):
    """One part of each byte as the fp16 number it stands for (fp8: divided by 256); 16 bits pass through."""
    if BITS == "16":
        return packed
    elif not INTERPRETED:
        return tl.inline_asm_elementwise(_part_asm(BITS, PART), "=r,=r,r", [packed], tl.float16, True, 4)
    elif BITS == "fp8":
        return ((packed.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
    else:
        bits: tl.constexpr = 8 if BITS == "8" else (4 if BITS == "4" else 2)
        return ((packed >> (PART * bits)) & (2**bits - 1)).to(tl.float16)


@triton.constexpr_function
def _part_asm(bits, part):
    """Four bytes to two registers of two fp16 numbers each.

    A byte (or its bits of this part, wherever they lie) under 0x64 is an fp16 of 1,024 + byte: one permutation and one
    mask instead of conversions, which take many times as long. An e4m3 byte moved into fp16's exponent is its value
    / 256.
    """
    if bits == "fp8":
        pair = "prmt.b32 ${0}, $2, 0, {1}; and.b32 s, ${0}, 0x80008000; shr.b32 ${0}, ${0}, 1; "
        pair += "lop3.b32 ${0}, ${0}, 0x3f803f80, s, 0xea; "
        return "{ .reg .b32 s; " + pair.format(0, "0x1404") + pair.format(1, "0x3424") + "}"
    shift = part * int(bits)
    mask = 0xFF00FF00 | ((1 << int(bits)) - 1 << shift) * 0x00010001
    factor, offset = (15 - shift << 10) * 0x00010001, (0x8000 | 25 - shift << 10) * 0x00010001  # 2^-n, -2^(10 - n)
    pair = f"prmt.b32 ${{0}}, $2, 0x64646464, {{1}}; and.b32 ${{0}}, ${{0}}, {mask:#x}; "
    pair += "fma.rn.f16x2 ${0}, ${0}, f, o; "
    constants = f".reg .b32 f, o; mov.b32 f, {factor:#x}; mov.b32 o, {offset:#x}; "
    return "{ " + constants + pair.format(0, "0x4140") + pair.format(1, "0x4342") + "}"
