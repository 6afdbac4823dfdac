"""What kernels store of keys and values: codes and scales of a tile of tokens, or of heads.

They are what the codecs of `kvtool.kv.codecs` make of the same numbers in float32, bit for bit.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kvtool.kernels.launch import power_of_2

ELEMENTS_PER_WARP = 4096  # as few warps as registers allow: reductions across warps cost most


@dataclass(frozen=True)
class Packing:
    """How one stream lies in one layer's part of a block (or tail slot); kernels are compiled for it.

    Attributes:
        bits, axis, group, symmetric: as in `kvtool.kv.format.StreamFormat`.
        heads, tokens, dim: the elements of a block.
        codes, scale, zero: bytes from the start of the layer's part to each array; 0 for those that the bits have not.
    """

    bits: str
    axis: str
    group: int
    symmetric: bool
    heads: int
    tokens: int
    dim: int
    codes: int
    scale: int = 0
    zero: int = 0

    @property
    def parts(self) -> int:
        """Channels that share a byte: byte i holds channels i, i + dim / parts, ..."""
        return 8 // int(self.bits) if self.bits in ("4", "2") else 1

    @property
    def part_dim(self) -> int:
        return self.dim // self.parts

    @property
    def width(self) -> int:
        """Columns of a part's tile."""
        return power_of_2(self.part_dim)

    @property
    def token_width(self) -> int:
        """Columns of a tile of whole tokens."""
        return power_of_2(self.dim)

    @property
    def head_rows(self) -> int:
        """Rows of a tile of all heads."""
        return power_of_2(self.heads)

    @property
    def groups(self) -> int:
        """Scales of a token, on the token axis."""
        return self.dim // self.group

    @property
    def aligned(self) -> bool:
        """Whether a tile of parts is one of groups too. Triton 3.6 errs where both would have to be cut anew."""
        whole = self.width == self.part_dim and power_of_2(self.group) == self.group
        return self.group == self.part_dim or (self.parts == 1 and whole)

    @property
    def levels(self) -> int:
        """What the largest element becomes."""
        return 448 if self.bits == "fp8" else int(2 ** (int(self.bits) - self.symmetric)) - 1

    def warps(self, rows: int) -> int:
        """Of a program whose tile has `rows` rows."""
        elements = ELEMENTS_PER_WARP // 2 if self.bits == "2" else ELEMENTS_PER_WARP  # four parts need more registers
        return min(16, max(1, rows * self.parts * self.width // elements))


@triton.jit
def write_token(x, head_stride, block, row, faults, packing: tl.constexpr):
    """All heads of one token."""
    head = tl.arange(0, packing.head_rows)[:, None, None]
    _encode(x + head * head_stride, head < packing.heads, block, head * packing.tokens + row, 0, faults, packing)


@triton.jit
def write_head(x, token_stride, block, head, faults, packing: tl.constexpr):
    """All tokens of one head of one block."""
    token = tl.arange(0, packing.tokens)[:, None, None]
    row = head * packing.tokens + token
    _encode(x + token * token_stride, token < packing.tokens, block, row, head, faults, packing)


@triton.jit
def _encode(x, live, block, row, head, faults, packing: tl.constexpr):
    """Store a tile of tokens or heads, of each of which `x` [rows, 1, 1] points at element 0; see `encode_tile`."""
    elements = tl.load(x + channels(packing), mask=live & in_head(packing), other=0.0)
    encode_tile(elements, live, block, row, head, faults, packing)


@triton.jit
def channels(packing: tl.constexpr):
    """[1, parts, width], those that the bytes of a token hold."""
    return tl.arange(0, packing.parts)[None, :, None] * packing.part_dim + tl.arange(0, packing.width)[None, None, :]


@triton.jit
def in_head(packing: tl.constexpr):
    """[1, 1, width], whether there is such a byte."""
    return tl.arange(0, packing.width)[None, None, :] < packing.part_dim


@triton.jit
def encode_tile(elements, live, block, row, head, faults, packing: tl.constexpr):
    """Store a tile of tokens or heads.

    Args:
        elements: [rows, parts, width], zeros where there are none.
        live, row: [rows, 1, 1]; `row` counts the tokens of a block head by head.
        head: whose scales these are, on the channel axis.
    """
    part = tl.arange(0, packing.parts)[None, :, None]
    byte = tl.arange(0, packing.width)[None, None, :]
    channel = channels(packing)
    inside = live & in_head(packing)
    if packing.bits == "16":
        to = (block + packing.codes).to(tl.pointer_type(elements.dtype))
        tl.store(to + row * packing.dim + byte, elements, mask=inside)
    else:
        groups: tl.constexpr = packing.groups
        wide = elements.to(tl.float32)
        wide = tl.where(wide == wide, wide, float("inf"))  # a minimum overlooks NaN; infinity is refused alike
        if packing.axis == "channel":
            scale, zero = _range(tl.min(wide, 0, keep_dims=True), tl.max(wide, 0, keep_dims=True), packing)
            _store_range(block, head * packing.dim + channel, scale, zero, byte < packing.part_dim, faults, packing)
            codes = _codes(wide, scale, zero, packing)
        elif packing.aligned:
            shape: tl.constexpr = (wide.shape[0], groups, packing.parts * packing.width // groups)
            group = tl.arange(0, groups)[None, :, None]
            grouped = tl.reshape(wide, shape)
            low, high = grouped, grouped
            if packing.width > packing.part_dim:
                low = tl.where(byte < packing.part_dim, grouped, float("inf"))
                high = tl.where(byte < packing.part_dim, grouped, float("-inf"))
            scale, zero = _range(tl.min(low, 2, keep_dims=True), tl.max(high, 2, keep_dims=True), packing)
            _store_range(block, row * groups + group, scale, zero, live, faults, packing)
            codes = tl.reshape(_codes(grouped, scale, zero, packing), wide.shape)
        else:
            scale = tl.zeros(wide.shape, tl.float16)
            zero = tl.zeros(wide.shape, tl.float16)
            for group in tl.static_range(groups):
                members = inside & (channel // packing.group == group)
                low = tl.min(tl.min(tl.where(members, wide, float("inf")), 2, keep_dims=True), 1, keep_dims=True)
                high = tl.max(tl.max(tl.where(members, wide, float("-inf")), 2, keep_dims=True), 1, keep_dims=True)
                group_scale, group_zero = _range(low, high, packing)
                _store_range(block, row * groups + group, group_scale, group_zero, live, faults, packing)
                scale = tl.where(members, group_scale, scale)
                zero = tl.where(members, group_zero, zero)
            codes = _codes(wide, scale, zero, packing)
        packed = tl.sum(codes << (part * 8 // packing.parts), 1, keep_dims=True)
        tl.store(block + packing.codes + row * packing.part_dim + byte, packed.to(tl.uint8), mask=inside)


@triton.jit
def _range(low, high, packing: tl.constexpr):
    """fp16 scale and zero of groups between `low` and `high`."""
    if packing.symmetric:
        zero = tl.zeros(low.shape, tl.float16)
        above = tl.maximum(-low, high)
    else:
        zero = _round_fp16(low, -1)
        above = high - zero.to(tl.float32)
    return _round_fp16(tl.div_rn(above, tl.full(above.shape, packing.levels, tl.float32)), 1), zero


@triton.jit
def _round_fp16(x, UP: tl.constexpr):
    """The nearest fp16 not below (UP 1: of x >= 0) or not above (UP -1) `x`, without -0.0."""
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    missed = near.to(tl.float32) < x if UP == 1 else near.to(tl.float32) > x
    away = tl.where(bits >= 0, UP, -UP)  # bits count the magnitude, of whichever sign
    bits = tl.where(missed, bits + away, bits)
    return tl.where(bits == -32768, 0, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _store_range(block, at, scale, zero, mask, faults, packing: tl.constexpr):
    half: tl.constexpr = tl.pointer_type(tl.float16)
    tl.store((block + packing.scale).to(half) + at, scale, mask=mask)
    if not packing.symmetric:
        tl.store((block + packing.zero).to(half) + at, zero, mask=mask)
    finite = (tl.abs(scale) <= 65504.0) & (tl.abs(zero) <= 65504.0)
    tl.store(faults + at * 0, 1, mask=mask & (finite == 0))


@triton.jit
def _codes(x, scale, zero, packing: tl.constexpr):
    above = x - zero.to(tl.float32)
    divisor = tl.where(scale == 0.0, 1.0, scale.to(tl.float32))
    if packing.bits == "fp8":
        return e4m3(tl.div_rn(above, divisor))
    return _integer(_quotient(above, divisor), packing)


@triton.jit
def _quotient(x, divisor):
    """x / divisor as IEEE rounds it wherever that decides an integer code, in two operations an element.

    The reciprocal in two floats is exact to 2^-47. A quotient that is no tie between two codes is further from one,
    since an fp16 `divisor` has 11 bits; one that is a tie is a float of few bits, to which the error rounds away.
    """
    one = tl.full(divisor.shape, 1.0, tl.float32)
    high = tl.div_rn(one, divisor)
    low = tl.fma(-divisor, high, one) * high
    return tl.fma(x, tl.broadcast_to(high, x.shape), x * low)


@triton.jit
def _integer(x, packing: tl.constexpr):
    """Codes of quotients: the nearest integer, ties to even, as 1.5 * 2^23 makes a float round."""
    code = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return (code + packing.levels if packing.symmetric else code) & 0xFF


@triton.jit
def e4m3(x):
    """The nearest e4m3, ties to even, of |x| <= 448. By hand: GPUs before sm_89 and the interpreter cannot."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # steps of 2^-9
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)) & 0xFF
