"""Decode attention over integer codes in CUDA C++, which chooses what lies in which register as Triton cannot.

It computes what `decode.paged_decode` computes, under the same definition, where `refuses` does not say otherwise; the
kernel, `decode.cu`, is compiled when it is first called for a format and a shape of heads.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor

from kvtool.kernels.launch import capability, num_sms, num_splits, shared_kib
from kvtool.kernels.nvrtc import load, source
from kvtool.kernels.splits import merge
from kvtool.kernels.streams import PackedStream, refuses_heads

HEAD_DIMS = (64, 128)
MAX_GROUP_HEADS = 16
# What the kernel reads, as (bits, axis); a key and a value of it go together as they please. All are asymmetric.
KEYS = (("8", "channel"), ("4", "channel"), ("2", "channel"))
VALUES = (("8", "token"), ("4", "token"), ("2", "token"))
MIN_PIECE = 16  # channels of a row of bytes that share a token's scale
MERGED_WITHIN = 4  # splits that the last program of a sequence merges; of more, a kernel of many programs is quicker

# Warps, pipeline stages of each, programs per SM and tokens of a tile for up to 8 query heads to a KV head, by (KiB of
# shared memory of an SM, bits of the wider stream); and for more heads. 100 KiB has an RTX 4090, which was never timed:
# its rows are those of which two programs or more fit. Those of 228 KiB are as large as two programs may be: were there
# room for a third, 256 programs would not be dealt out evenly.
TILES: dict[tuple[int, str], tuple[int, int, int, int]] = {
    (100, "8"): (2, 2, 2, 32),
    (100, "4"): (4, 2, 2, 32),
    (100, "2"): (4, 2, 3, 32),
    (228, "8"): (6, 2, 2, 32),
    (228, "4"): (6, 2, 2, 64),
    (228, "2"): (6, 2, 2, 64),
}
# And where sequences times KV heads are more than programs of those run at once: smaller ones begin and end while more
# of the others read.
MANY_TILES: dict[tuple[int, str], tuple[int, int, int, int]] = {
    (228, "8"): (4, 2, 3, 32),
    (228, "4"): (4, 2, 3, 64),
    (228, "2"): (4, 2, 3, 64),
}
WIDE_TILES: dict[int, tuple[int, int, int, int]] = {100: (2, 2, 2, 32), 228: (4, 2, 2, 32)}

SOURCE = source("decode.cuh", "decode.cu")
_kernel = partial(load, SOURCE, "paged_decode")


def refuses(key: PackedStream, value: PackedStream, num_heads: int) -> str | None:
    """Why `paged_decode` cannot read these streams, or None if it can."""
    if reason := refuses_heads(key, value, num_heads, HEAD_DIMS, MAX_GROUP_HEADS):
        return reason
    head_dim = key.tail.shape[-1]
    for name, stream, known in (("key", key, KEYS), ("value", value, VALUES)):
        if (stream.bits, stream.axis) not in known:
            return f"no kernel for {name}s of {stream.bits} bits per {stream.axis}"
        if stream.zero is None:
            return f"no kernel for symmetric {name}s"
    if value.piece(head_dim) < MIN_PIECE:
        return f"groups of {value.group} cut values of head_dim {head_dim} into pieces under {MIN_PIECE} channels"
    return None


def paged_decode(
    q: Tensor,
    key: PackedStream,
    value: PackedStream,
    block_table: Tensor,
    positions: Tensor,
    visible: Tensor,
    tail_slots: Tensor,
    arrivals: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor,
) -> None:
    """`decode.paged_decode`, into `out`. As the tables, so the blocks below `visible` are read ahead.

    Args:
        arrivals: int32, as many zeros as sequences times KV heads of which two programs can run at once; zeros
            afterwards. Kernels of one stream can share them.
    """
    n, num_heads, head_dim = q.shape
    kv_heads = key.codes.shape[1]
    kernel = _kernel(q.device, tuple(constants(q, key, value, block_table).items()))
    programs = kernel.programs_per_sm * num_sms(q.device)
    splits = num_splits(n * kv_heads, block_table.shape[1], key.tail.shape[2] > 0, programs)
    assert splits == 1 or n * kv_heads <= len(arrivals)
    partial = torch.empty(n, num_heads, splits, head_dim, dtype=torch.float32, device=q.device) if splits > 1 else None
    lse = torch.empty(n, num_heads, splits, dtype=torch.float32, device=q.device) if splits > 1 else None
    merged_apart = splits > MERGED_WITHIN
    outputs = [out, partial, lse, None if merged_apart else arrivals]
    tables = [block_table, positions, visible, tail_slots]
    values = arguments(q.contiguous(), outputs, tables, key, value, scale=scale, sliding_window=sliding_window)
    kernel((n * kv_heads, splits), values, chained=capability(q.device) >= 9)
    if merged_apart:
        merge(partial, lse, out)


def constants(q: Tensor, key: PackedStream, value: PackedStream, block_table: Tensor) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    columns = -(-q.shape[1] // key.tail.shape[1] // 8)
    bits = max(key.bits, value.bits, key=int)
    warps, stages, per_sm, tokens = _tile(bits, columns, len(q) * key.tail.shape[1], q.device)
    return {
        "D": key.tail.shape[-1],
        "K_BITS": key.bits,
        "V_BITS": value.bits,
        "V_GROUP": value.group,
        "BLOCK": key.codes.shape[2],
        "TILE": tokens,
        "COLUMNS": columns,
        "BF16": int(key.tail.dtype == torch.bfloat16),
        "WARPS": warps,
        "STAGES": stages,
        "PER_SM": per_sm,
        "CHAINED": int(capability(q.device) >= 9),
        "Index": "int" if block_table.dtype == torch.int32 else "long\tlong",
    }


def arguments(
    q: Tensor,
    outputs: list[Tensor | None],
    tables: list[Tensor],
    key: PackedStream,
    value: PackedStream,
    *,
    scale: float,
    sliding_window: int | None,
) -> list[object]:
    """What the kernel takes, in its order."""
    assert len({table.dtype for table in tables}) == 1
    return [
        q,
        *outputs,
        *tables,
        StreamPointers.of(key),
        StreamPointers.of(value),
        ctypes.c_float(scale * 1.4426950408889634),  # exp2 is what the hardware has
        ctypes.c_int(tables[0].stride(0)),
        ctypes.c_int(key.codes.stride(0) // 16),
        ctypes.c_int(key.tail.stride(0) * key.tail.itemsize // 16),
        ctypes.c_int(key.codes.shape[1]),
        ctypes.c_int(q.shape[1] // key.codes.shape[1]),
        ctypes.c_int(key.tail.shape[2]),
        ctypes.c_int(sliding_window or 1 << 30),
    ]


class StreamPointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "tail")]

    @classmethod
    def of(cls, stream: PackedStream) -> "StreamPointers":
        return cls(*(x if x is None else x.data_ptr() for x in (stream.codes, stream.scale, stream.zero, stream.tail)))


def _tile(bits: str, columns: int, rows: int, device: torch.device) -> tuple[int, int, int, int]:
    kib = shared_kib(device)
    if columns > 1:
        return WIDE_TILES[kib]
    tile = TILES[kib, bits]
    return MANY_TILES.get((kib, bits), tile) if rows > tile[2] * num_sms(device) else tile
