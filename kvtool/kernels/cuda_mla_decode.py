"""Decode attention over latents of integer codes in CUDA C++.

It computes what `mla_decode.latent_decode` computes, under the same definition, where `refuses` does not say otherwise;
the kernel, `mla_decode.cu`, is compiled when it is first called for a format.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor

from kvtool.kernels.cuda_decode import MERGED_WITHIN, StreamPointers
from kvtool.kernels.launch import capability, num_sms, num_splits, shared_kib
from kvtool.kernels.nvrtc import load, source
from kvtool.kernels.splits import merge
from kvtool.kernels.streams import PackedStream, refuses_dtype

LATENT_DIM, ROPE_DIM, GROUP = 512, 64, 64
HEADS = 16  # of a program: the rows of a product
# What the kernel reads, as (bits, axis); a rope key and a latent of it go together as they please.
ROPE_KEYS = (("16", "token"), ("8", "channel"))
LATENTS = (("8", "token"), ("4", "token"), ("2", "token"))

# Warps that score, warps that gather, tokens of a tile, pipeline stages, programs per SM and operands of queries that
# stay in registers, by (KiB of shared memory of an SM, bits of latents). On an H200 those of 8 and 4 bits were the
# quickest of a few; none was timed for 100 KiB.
TILES: dict[tuple[int, str], tuple[int, int, int, int, int, int]] = {
    (100, "8"): (2, 4, 32, 3, 1, 16),
    (100, "4"): (4, 4, 64, 3, 1, 24),
    (100, "2"): (4, 4, 64, 4, 1, 16),
    (228, "8"): (4, 4, 64, 3, 1, 8),
    (228, "4"): (4, 4, 128, 3, 1, 0),
    (228, "2"): (4, 4, 128, 3, 1, 0),
}

SOURCE = source("decode.cuh", "mla_decode.cu")
_kernel = partial(load, SOURCE, "latent_decode")


def refuses(key: PackedStream, value: PackedStream) -> str | None:
    """Why `latent_decode` cannot read these streams, or None if it can."""
    if reason := refuses_dtype(key):
        return reason
    if (value.tail.shape[-1], key.tail.shape[-1]) != (LATENT_DIM, ROPE_DIM):
        return f"a latent must have {LATENT_DIM} elements, its rope key {ROPE_DIM}"
    for name, stream, known in (("rope keys", key, ROPE_KEYS), ("latents", value, LATENTS)):
        if (stream.bits, stream.axis) not in known:
            return f"no kernel for {name} of {stream.bits} bits per {stream.axis}"
        if stream.zero is None and stream.bits != "16":
            return f"no kernel for symmetric {name}"
    if value.group != GROUP:
        return f"no kernel for latents in groups of {value.group}, only of {GROUP}"
    return None


def latent_decode(
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
    out: Tensor,
) -> None:
    """`mla_decode.latent_decode`, into `out`.

    Args:
        arrivals: as `cuda_decode.paged_decode` takes them, for each sequence and 16 heads.
    """
    n, num_heads, _ = q.shape
    rows = n * -(-num_heads // HEADS)
    kernel = _kernel(q.device, tuple(constants(key, value, block_table, q.device).items()))
    programs = kernel.programs_per_sm * num_sms(q.device)
    splits = num_splits(rows, block_table.shape[1], key.tail.shape[2] > 0, programs)
    assert splits == 1 or rows <= len(arrivals)
    shape = (n, num_heads, splits)
    partial = torch.empty(*shape, LATENT_DIM, dtype=torch.float32, device=q.device) if splits > 1 else None
    lse = torch.empty(shape, dtype=torch.float32, device=q.device) if splits > 1 else None
    merged_apart = splits > MERGED_WITHIN
    outputs = [out, partial, lse, None if merged_apart else arrivals]
    values = arguments(q.contiguous(), outputs, [block_table, positions, visible, tail_slots], key, value, scale=scale)
    kernel((rows, splits), values, chained=capability(q.device) >= 9)
    if merged_apart:
        merge(partial, lse, out)


def constants(key: PackedStream, value: PackedStream, block_table: Tensor, device: torch.device) -> dict[str, object]:
    """Macros that the kernel is compiled with."""
    scorers, gatherers, tokens, stages, per_sm, resident = TILES[shared_kib(device), value.bits]
    return {
        "BITS": value.bits,
        "ROPE_BITS": key.bits,
        "BLOCK": key.codes.shape[2],
        "TOKENS": tokens,
        "SCORERS": scorers,
        "GATHERERS": gatherers,
        "WARPS": scorers + gatherers,
        "STAGES": stages,
        "PER_SM": per_sm,
        "RESIDENT": resident,
        "BF16": int(key.tail.dtype == torch.bfloat16),
        "CHAINED": int(capability(device) >= 9),
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
        ctypes.c_int(value.codes.stride(0) // 16),
        ctypes.c_int(key.tail.stride(0) * key.tail.itemsize // 16),
        ctypes.c_int(q.shape[1]),
        ctypes.c_int(key.tail.shape[2]),
    ]
