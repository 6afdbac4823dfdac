"""Decode attention over latents of integer codes in CUDA C++.

It computes what `mla_decode.latent_decode` computes, under the same definition, where `refuses` does not say otherwise;
the kernel, `mla_decode.cu`, is compiled when it is first called for a format.
"""

import torch
from torch import Tensor

from kvtool.kernels.cuda_decode import compiled, launch
from kvtool.kernels.decode import PackedStream
from kvtool.kernels.launch import capability, shared_kib
from kvtool.kernels.nvrtc import source

LATENT_DIM, ROPE_DIM, GROUP = 512, 64, 64
HEADS = 16  # of a program: the rows of a product
# What the kernel reads, as (bits, axis); a rope key and a latent of it go together as they please.
ROPE_KEYS = (("16", "token"), ("8", "channel"))
LATENTS = (("8", "token"), ("4", "token"), ("2", "token"))

# Warps that score, warps that gather, tokens of a tile, pipeline stages, programs per SM and operands of queries that
# stay in registers, by (KiB of shared memory of an SM, bits of latents). None was timed yet.
TILES: dict[tuple[int, str], tuple[int, int, int, int, int, int]] = {
    (100, "8"): (2, 4, 32, 3, 1, 16),
    (100, "4"): (4, 4, 64, 3, 1, 24),
    (100, "2"): (4, 4, 64, 4, 1, 24),
    (228, "8"): (4, 4, 64, 4, 1, 8),
    (228, "4"): (4, 4, 128, 4, 1, 6),
    (228, "2"): (4, 4, 128, 4, 1, 4),
}

SOURCE = source("decode.cuh", "mla_decode.cu")


def refuses(key: PackedStream, value: PackedStream) -> str | None:
    """Why `latent_decode` cannot read these streams, or None if it can."""
    if key.tail.dtype not in (torch.bfloat16, torch.float16):
        return f"it runs in bfloat16 or float16, not {str(key.tail.dtype).removeprefix('torch.')}"
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
    tables = [block_table, positions, visible, tail_slots]
    rows, macros = q.shape[0] * -(-q.shape[1] // HEADS), constants(key, value, block_table, q.device)
    kernel = compiled(SOURCE, "latent_decode", q.device, macros)
    launch(kernel, rows, q, key, value, tables, sizes_of(q, key), arrivals, scale=scale, out=out)


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


def sizes_of(q: Tensor, key: PackedStream) -> tuple[int, ...]:
    """What the kernel takes last."""
    return q.shape[1], key.tail.shape[2]
