"""Triton kernels that write the KV store: single tokens, and whole blocks of one layer or of all.

What fp16 cannot hold is no error here, since nothing waits for the device: it sets `faults`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.encode import Packing, channels, encode_tile, in_head, write_head, write_token
from kvtool.kernels.launch import await_inputs, chained
from kvtool.kernels.rope import HEADS, constants, rotated, rotation
from kvtool.kernels.rotary_heads import RotaryHeads


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

    def rotate_and_write(
        self, heads: RotaryHeads, owners: Tensor, rows: Tensor, ready_key: Tensor | None, *, to_tails: bool
    ) -> Tensor:
        """The queries of `heads`, ready [T, Hq, D]; keys, as ready, and values go into the store in the same kernel.

        Args:
            owners, rows: [T], the tail slot of each token or, unless `to_tails`, its block, -1 being nobody's; and its
                row there.
            ready_key: [T, Hkv, D], contiguous, where the keys go besides; None: nowhere.
        """
        memory = self.tails.view(torch.uint8) if to_tails else self.blocks
        key, value = (self.tail_key, self.tail_value) if to_tails else (self.key, self.value)
        q = heads.empty()
        _rotate_and_write[(len(q), 2 + -(-heads.num_heads // HEADS))](
            heads.made,
            *rotation(heads),
            heads.num_heads,
            q,
            ready_key,
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
        write_token(key + token * key_token_stride, key_head_stride, block, row, faults, KEY)
    else:
        write_token(value + token * value_token_stride, value_head_stride, block, row, faults, VALUE)


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
    ready_key,
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
            channel = channels(KEY)
            inside = (head < KEY.heads) & in_head(KEY)
            x = made + (num_heads + head) * D
            ready = rotated(x, channel, inside, cos, sin, gain + D, eps, D, ROTATED, NORM)
            if ready_key is not None:
                tl.store(ready_key + (token * KEY.heads + head) * D + channel, ready, mask=inside)
            encode_tile(ready, head < KEY.heads, block, head * KEY.tokens + row, 0, faults, KEY)
        else:
            write_token(made + (num_heads + KEY.heads) * D, D, block, row, faults, VALUE)


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
        write_head(x, key_token_stride, block, head, faults, KEY)
    else:
        head -= KEY.heads
        x = value + head * value_head_stride + row * value_token_stride
        write_head(x, value_token_stride, block, head, faults, VALUE)


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
            write_head(x, KEY.dim, block, head, faults, KEY)
        else:
            head -= KEY.heads
            x = tail + TAIL_KEY.heads * TAIL_KEY.tokens * KEY.dim + (head * TAIL_VALUE.tokens + row) * VALUE.dim
            write_head(x, VALUE.dim, block, head, faults, VALUE)
