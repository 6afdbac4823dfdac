"""Packed blocks decoded to memory, for kernels that read what many queries share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import next_power_of_2
from kvtool.kernels.streams import PackedStream


def unpack(
    key: PackedStream, value: PackedStream, blocks: Tensor, first_head: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Blocks [F] decoded, of `heads` heads from `first_head` on; of block -1 anything.

    Returns:
        [F * B, heads, D] of keys and of values, a head's behind each other in memory, in `dtype` where they are of 16
        bits, else in fp16: it holds all that can be packed, with three bits more than bf16.
    """
    _, _, block_size, _ = key.codes.shape
    head_dim = key.tail.shape[-1]
    outs = [
        torch.empty(
            (heads, len(blocks) * block_size, head_dim),
            dtype=dtype if stream.bits == "16" else torch.float16,
            device=blocks.device,
        )
        for stream in (key, value)
    ]
    if len(blocks):
        _unpack_kernel[(len(blocks), heads, 2)](
            *(*key.arrays[:3], outs[0]),
            *(*value.arrays[:3], outs[1]),
            blocks,
            key.codes.stride(0) * key.codes.itemsize // 16,
            first_head,
            D=head_dim,
            BLOCK=block_size,
            K_BITS=key.bits,
            K_CHANNEL=key.axis == "channel",
            K_GROUP=key.group or head_dim,
            K_ZERO=key.zero is not None,
            V_BITS=value.bits,
            V_CHANNEL=value.axis == "channel",
            V_GROUP=value.group or head_dim,
            V_ZERO=value.zero is not None,
        )
    return outs[0].transpose(0, 1), outs[1].transpose(0, 1)


def unpack_stream(stream: PackedStream, blocks: Tensor, out: Tensor) -> None:
    """Decode blocks [F] of a stream to `out` [F or more, 1, B, D], of the model's dtype where they are of 16 bits."""
    block_size, dim = out.shape[2:]
    arrays = (*stream.arrays[:3], out)
    kind = {"BITS": stream.bits, "CHANNEL": stream.axis == "channel", "GROUP": stream.group or dim}
    kind["ZERO"] = stream.zero is not None
    if len(blocks):
        _unpack_kernel[(len(blocks), 1, 1)](  # one stream: what would be the second is not looked at
            *arrays,
            *arrays,
            blocks,
            stream.codes.stride(0) * stream.codes.itemsize // 16,
            0,
            D=dim,
            BLOCK=block_size,
            **{f"{letter}_{name}": value for letter in "KV" for name, value in kind.items()},
            num_warps=8,
        )


@triton.jit(do_not_specialize=["first_head"])
def _unpack_kernel(
    k_codes,
    k_scale,
    k_zero,
    k_out,
    v_codes,
    v_scale,
    v_zero,
    v_out,
    blocks_ptr,
    block_stride,  # of 16 bytes: so the compiler knows how pointers are aligned
    first_head,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CHANNEL: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_ZERO: tl.constexpr,
):
    """Program (block, head, stream)."""
    index = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks_ptr + index).to(tl.int64) * block_stride
    if block < 0:  # nobody's
        return
    head = first_head + tl.program_id(1)
    to = (tl.program_id(1) * tl.num_programs(0) + index) * (BLOCK * D)
    if tl.program_id(2) == 0:
        _unpack(k_codes, k_scale, k_zero, k_out + to, block, head, D, BLOCK, K_BITS, K_CHANNEL, K_GROUP, K_ZERO)
    else:
        _unpack(v_codes, v_scale, v_zero, v_out + to, block, head, D, BLOCK, V_BITS, V_CHANNEL, V_GROUP, V_ZERO)


@triton.jit
def _unpack(
    codes,
    scale,
    zero,
    out,
    block,
    head,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
):
    """One head of one block, `kvtool.kv.codecs` in float32."""
    WIDTH: tl.constexpr = 8 if BITS == "8" or BITS == "fp8" or BITS == "16" else (4 if BITS == "4" else 2)
    RUN: tl.constexpr = D * WIDTH // 8
    row = tl.arange(0, BLOCK)[:, None]
    byte = tl.arange(0, next_power_of_2(RUN))[None, :]
    inside = (byte < RUN) & (row < BLOCK)
    if BITS == "16":
        x = tl.load(codes + block * 8 + (head * BLOCK + row) * D + byte, mask=inside)
        tl.store(out + row * D + byte, x, mask=inside)
    else:
        packed = tl.load(codes + block * 16 + (head * BLOCK + row) * RUN + byte, mask=inside, other=0)
        for part in tl.static_range(8 // WIDTH):
            channel = part * RUN + byte
            if BITS == "fp8":  # an e4m3 byte moved into fp16's exponent is its value / 256
                half = ((packed.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
                x = half.to(tl.float32) * 256
            else:
                x = ((packed >> (part * WIDTH)) & (2**WIDTH - 1)).to(tl.float32)
                if not ZERO:  # symmetric
                    x -= 2 ** (WIDTH - 1) - 1
            if CHANNEL:
                at = head * D + channel
                mask = byte < RUN
            else:
                at = (head * BLOCK + row) * (D // GROUP) + channel // GROUP
                mask = inside
            x *= tl.load(scale + block * 8 + at, mask=mask, other=0).to(tl.float32)
            if ZERO:
                x += tl.load(zero + block * 8 + at, mask=mask, other=0).to(tl.float32)
            x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)  # a scale rounded up can lead beyond
            tl.store(out + row * D + channel, x.to(out.dtype.element_ty), mask=inside)
