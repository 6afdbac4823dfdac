"""Triton kernels that write the KV store: single tokens, and whole blocks of one layer or of all.

They store what the codecs of `kvtool.kv.codecs` make of the same numbers in float32, bit for bit. What fp16 cannot hold
is no error here, since nothing waits for the device: it sets `faults`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2
from kvtool.kernels.rope import HEADS, constants, rotated, rotation
from kvtool.kernels.rotary_heads import RotaryHeads

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


@dataclass(frozen=True)
class LayerWriter:
    """Writes the keys and values of one layer on the device, without a word from the host.

    Where tokens go is read while earlier kernels of the stream still run, on sm_90: none of them may be writing that.

    Attributes:
        blocks: [num_blocks, bytes] uint8, the layer's part of all blocks.
        tails: [slots, n], the layer's part of all tails, at the model's precision.
        key, value: how they lie in a block; tail_key, tail_value: in a tail slot.
        faults: [1] int32, set to 1 by whatever fp16 cannot hold.
    """

    blocks: Tensor
    tails: Tensor
    key: Packing
    value: Packing
    tail_key: Packing
    tail_value: Packing
    faults: Tensor

    def write_tokens(self, key: Tensor, value: Tensor, blocks: Tensor, rows: Tensor) -> None:
        """Pack tokens for good: key and value [T, heads, D], each in its block and row; not those in block -1."""
        self._write(key, value, self.blocks, None, blocks, rows, self.key, self.value)

    def write_tails(self, key: Tensor, value: Tensor, tokens: Tensor | None, slots: Tensor, rows: Tensor) -> None:
        """Keep `tokens` [n] (None: all) of key and value [T, heads, D] as they are, each in its tail slot and row.

        What goes to slot -1 is not kept.
        """
        self._write(key, value, self.tails.view(torch.uint8), tokens, slots, rows, self.tail_key, self.tail_value)

    def rotate_and_write(self, heads: RotaryHeads, owners: Tensor, rows: Tensor, *, to_tails: bool) -> Tensor:
        """The queries of `heads`, ready [T, Hq, D]; keys, as ready, and values go into the store in the same kernel.

        Args:
            owners, rows: [T], the tail slot of each token or, unless `to_tails`, its block, -1 being nobody's; and its
                row there.
        """
        memory = self.tails.view(torch.uint8) if to_tails else self.blocks
        key, value = (self.tail_key, self.tail_value) if to_tails else (self.key, self.value)
        q = heads.empty()
        _rotate_and_write[(len(q), 2 + -(-heads.num_heads // HEADS))](
            heads.made,
            *rotation(heads),
            heads.num_heads,
            q,
            owners,
            rows,
            memory,
            memory.stride(0),
            self.faults,
            KEY=key,
            VALUE=value,
            HEADS=HEADS,
            num_warps=max(2, *(p.warps(p.head_rows) for p in (key, value))),
            **constants(heads),
            **chained(q.device),
        )
        return q

    def read_near(self, key: Tensor, value: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens out of key and value [T, heads, D] and out of tails, as `sources` [n] of `Prompts` say.

        Returns:
            [n, heads, D] of keys, and of values.
        """
        assert key.stride(-1) == value.stride(-1) == 1
        near_key, near_value = (x.new_empty(len(sources), *x.shape[1:]) for x in (key, value))
        _read_near[(len(sources), 2)](
            key,
            value,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            sources,
            self.tails,
            self.tails.stride(0),
            near_key,
            near_value,
            KEY=self.tail_key,
            VALUE=self.tail_value,
            num_warps=max(p.warps(p.head_rows) for p in (self.tail_key, self.tail_value)),
        )
        return near_key, near_value

    def write_blocks(self, key: Tensor, value: Tensor, rows: Tensor, blocks: Tensor) -> None:
        """Pack whole blocks: the B tokens of key and value [T, heads, D] from each of `rows` [n] on; no block -1."""
        assert key.stride(-1) == value.stride(-1) == 1
        grid = (len(blocks), self.key.heads + self.value.heads)
        _write_blocks[grid](
            key,
            value,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            rows,
            blocks,
            self.blocks,
            self.blocks.stride(0),
            self.faults,
            KEY=self.key,
            VALUE=self.value,
            num_warps=max(p.warps(p.tokens) for p in (self.key, self.value)),
        )

    def _write(
        self,
        key: Tensor,
        value: Tensor,
        memory: Tensor,
        tokens: Tensor | None,
        owners: Tensor,
        rows: Tensor,
        key_packing: Packing,
        value_packing: Packing,
    ) -> None:
        assert key.stride(-1) == value.stride(-1) == 1
        _write_tokens[(len(rows), 2)](
            key,
            value,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            tokens,
            owners,
            rows,
            memory,
            memory.stride(0),
            self.faults,
            KEY=key_packing,
            VALUE=value_packing,
            num_warps=max(p.warps(p.head_rows) for p in (key_packing, value_packing)),
            **chained(memory.device),
        )


class Sealer:
    """Packs the blocks that decodes have completed, of all layers: one launch for each distinct pair of formats.

    A format decides tiles and instructions, so it is compiled in; plans have a handful of pairs, and where a layer's
    memory starts is read from a table.

    Args:
        layers: one writer per layer.
        blocks, tails: all memory of the store, uint8 and at the model's precision.
        residual: R in tokens.
    """

    def __init__(self, layers: Sequence[LayerWriter], blocks: Tensor, tails: Tensor, residual: int) -> None:
        self.blocks, self.tails, self.residual, self.faults = blocks, tails, residual, layers[0].faults
        pairs: dict[tuple[Packing, ...], list[LayerWriter]] = {}
        for layer in layers:
            pairs.setdefault((layer.key, layer.value, layer.tail_key, layer.tail_value), []).append(layer)
        self._groups = [(same[0], _starts(same).to(blocks.device)) for same in pairs.values()]

    def compile(self) -> None:
        """Have the kernels ready before the first block is complete, when everybody would wait for them."""
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.blocks.device)
        self.seal(nothing[0], nothing[0], nothing)

    def seal(self, positions: Tensor, tail_slots: Tensor, block_table: Tensor) -> None:
        """Pack what the tokens at `positions` [n] completed; a token that completes no block (position 0) costs little.

        Tensors may be longer than n; `block_table` is [S, N].
        """
        for layer, starts in self._groups:
            grid = (len(positions), len(starts), layer.key.heads + layer.value.heads)
            _seal[grid](
                positions,
                tail_slots,
                block_table,
                block_table.stride(0),
                starts,
                self.tails,
                layer.tails.stride(0),
                self.blocks,
                layer.blocks.stride(0),
                self.faults,
                RESIDUAL=self.residual,
                KEY=layer.key,
                VALUE=layer.value,
                TAIL_KEY=layer.tail_key,
                TAIL_VALUE=layer.tail_value,
                num_warps=max(p.warps(p.tokens) for p in (layer.key, layer.value)),
            )


def _starts(layers: Sequence[LayerWriter]) -> Tensor:
    """[layers, 2] int64: where the layer's blocks start in bytes, and its tails in elements."""
    return torch.tensor([(layer.blocks.storage_offset(), layer.tails.storage_offset()) for layer in layers])


@triton.jit
def _write_tokens(
    key,
    value,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    tokens,
    owners,
    rows,
    memory,
    owner_bytes,
    faults,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, stream)."""
    index = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + index).to(tl.int64)
    token = index if tokens is None else tl.load(tokens + index).to(tl.int64)
    row = tl.load(rows + index)
    await_inputs(CHAINED)
    if owner < 0:  # nobody's
        return
    block = memory + owner * owner_bytes
    if tl.program_id(1) == 0:
        _write_token(key + token * key_token_stride, key_head_stride, block, row, faults, KEY)
    else:
        _write_token(value + token * value_token_stride, value_head_stride, block, row, faults, VALUE)


@triton.jit
def _write_token(x, head_stride, block, row, faults, packing: tl.constexpr):
    """All heads of one token."""
    head = tl.arange(0, packing.head_rows)[:, None, None]
    _encode(x + head * head_stride, head < packing.heads, block, head * packing.tokens + row, 0, faults, packing)


@triton.jit(do_not_specialize=["num_heads"])
def _rotate_and_write(
    made,
    cos,
    sin,
    cos_stride,
    sin_stride,
    gain,
    eps,
    num_heads,
    q,
    owners,
    rows,
    memory,
    owner_bytes,
    faults,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Program (token, part): its keys, its values, or some of its queries."""
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + token).to(tl.int64)
    row = tl.load(rows + token)
    await_inputs(CHAINED)
    D: tl.constexpr = KEY.dim
    made += token * (num_heads + KEY.heads + VALUE.heads) * D
    cos += token * cos_stride
    sin += token * sin_stride
    block = memory + owner * owner_bytes
    if tl.program_id(1) >= 2:
        head = (tl.program_id(1) - 2) * HEADS + tl.arange(0, HEADS)[:, None, None]
        channel = tl.arange(0, KEY.token_width)[None, None, :]
        inside = (head < num_heads) & (channel < D)
        ready = rotated(made + head * D, channel, inside, cos, sin, gain, eps, D, ROTATED, NORM)
        tl.store(q + (token * num_heads + head) * D + channel, ready, mask=inside)
    elif owner >= 0:  # not nobody's
        if tl.program_id(1) == 0:
            head = tl.arange(0, KEY.head_rows)[:, None, None]
            channel = _channels(KEY)
            inside = (head < KEY.heads) & _in_head(KEY)
            x = made + (num_heads + head) * D
            ready = rotated(x, channel, inside, cos, sin, gain + D, eps, D, ROTATED, NORM)
            _encode_tile(ready, head < KEY.heads, block, head * KEY.tokens + row, 0, faults, KEY)
        else:
            _write_token(made + (num_heads + KEY.heads) * D, D, block, row, faults, VALUE)


@triton.jit
def _read_near(
    key,
    value,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    sources,
    tails,
    slot_elements,
    near_key,
    near_value,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Program (near token, stream)."""
    index = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + index).to(tl.int64)
    tail = tails + (-1 - source) // KEY.tokens * slot_elements
    row = (-1 - source) % KEY.tokens
    if tl.program_id(1) == 0:
        new = key + source * key_token_stride
        _copy_token(source >= 0, new, key_head_stride, tail, row, near_key + index * (KEY.heads * KEY.dim), KEY)
    else:
        new, to = value + source * value_token_stride, near_value + index * (VALUE.heads * VALUE.dim)
        tail += KEY.heads * KEY.tokens * KEY.dim
        _copy_token(source >= 0, new, value_head_stride, tail, row, to, VALUE)


@triton.jit
def _copy_token(is_new, new, head_stride, tail, row, to, packing: tl.constexpr):
    """All heads of one token, out of new ones or a tail."""
    head = tl.arange(0, packing.head_rows)[:, None]
    channel = tl.arange(0, packing.width)[None, :]
    mask = (head < packing.heads) & (channel < packing.dim)
    if is_new:
        x = tl.load(new + head * head_stride + channel, mask=mask)
    else:
        x = tl.load(tail + (head * packing.tokens + row) * packing.dim + channel, mask=mask)
    tl.store(to + head * packing.dim + channel, x, mask=mask)


@triton.jit
def _write_blocks(
    key,
    value,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    rows,
    blocks,
    memory,
    block_bytes,
    faults,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Program (block, head of either stream)."""
    index = tl.program_id(0)
    block_id = tl.load(blocks + index).to(tl.int64)
    if block_id < 0:  # nobody's
        return
    row = tl.load(rows + index).to(tl.int64)
    block = memory + block_id * block_bytes
    head = tl.program_id(1)
    if head < KEY.heads:
        x = key + head * key_head_stride + row * key_token_stride
        _write_head(x, key_token_stride, block, head, faults, KEY)
    else:
        head -= KEY.heads
        x = value + head * value_head_stride + row * value_token_stride
        _write_head(x, value_token_stride, block, head, faults, VALUE)


@triton.jit(do_not_specialize=["table_stride"])
def _seal(
    positions,
    tail_slots,
    block_table,
    table_stride,
    starts,
    tails,
    slot_elements,
    memory,
    block_bytes,
    faults,
    RESIDUAL: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TAIL_KEY: tl.constexpr,
    TAIL_VALUE: tl.constexpr,
):
    """Program (sequence, layer, head of either stream)."""
    sequence = tl.program_id(0)
    position = tl.load(positions + sequence)
    size: tl.constexpr = KEY.tokens
    column = tl.maximum(position - RESIDUAL, 0) // size  # visible(position) / B
    if tl.maximum(position + 1 - RESIDUAL, 0) // size > column:
        slot = tl.load(tail_slots + sequence).to(tl.int64)
        block_id = tl.load(block_table + sequence * table_stride + column).to(tl.int64)
        row = column * size % TAIL_KEY.tokens
        layer = tl.program_id(1)
        block = memory + tl.multiple_of(tl.load(starts + layer * 2), 16) + block_id * block_bytes
        tail = tails + tl.multiple_of(tl.load(starts + layer * 2 + 1), 16) + slot * slot_elements
        head = tl.program_id(2)
        if head < KEY.heads:
            x = tail + (head * TAIL_KEY.tokens + row) * KEY.dim
            _write_head(x, KEY.dim, block, head, faults, KEY)
        else:
            head -= KEY.heads
            x = tail + TAIL_KEY.heads * TAIL_KEY.tokens * KEY.dim + (head * TAIL_VALUE.tokens + row) * VALUE.dim
            _write_head(x, VALUE.dim, block, head, faults, VALUE)


@triton.jit
def _write_head(x, token_stride, block, head, faults, packing: tl.constexpr):
    """All tokens of one head of one block."""
    token = tl.arange(0, packing.tokens)[:, None, None]
    row = head * packing.tokens + token
    _encode(x + token * token_stride, token < packing.tokens, block, row, head, faults, packing)


@triton.jit
def _encode(x, live, block, row, head, faults, packing: tl.constexpr):
    """Store a tile of tokens or heads, of each of which `x` [rows, 1, 1] points at element 0; see `_encode_tile`."""
    elements = tl.load(x + _channels(packing), mask=live & _in_head(packing), other=0.0)
    _encode_tile(elements, live, block, row, head, faults, packing)


@triton.jit
def _channels(packing: tl.constexpr):
    """[1, parts, width], those that the bytes of a token hold."""
    return tl.arange(0, packing.parts)[None, :, None] * packing.part_dim + tl.arange(0, packing.width)[None, None, :]


@triton.jit
def _in_head(packing: tl.constexpr):
    """[1, 1, width], whether there is such a byte."""
    return tl.arange(0, packing.width)[None, None, :] < packing.part_dim


@triton.jit
def _encode_tile(elements, live, block, row, head, faults, packing: tl.constexpr):
    """Store a tile of tokens or heads.

    Args:
        elements: [rows, parts, width], zeros where there are none.
        live, row: [rows, 1, 1]; `row` counts the tokens of a block head by head.
        head: whose scales these are, on the channel axis.
    """
    part = tl.arange(0, packing.parts)[None, :, None]
    byte = tl.arange(0, packing.width)[None, None, :]
    channel = _channels(packing)
    inside = live & _in_head(packing)
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
