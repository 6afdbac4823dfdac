"""How kernels are launched on the GPU at hand."""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def capability(device: torch.device) -> int:
    """Major compute capability, as tables of tiles know it: 8 stands for sm_89, and for machines without a GPU."""
    return min(9, torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 8


@cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_kib(device: torch.device) -> int:
    """Memory that the programs of an SM share, as tables of tiles know it: 100 stands for machines without a GPU."""
    if device.type != "cuda":
        return 100
    return 228 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 228 << 10 else 100


def num_splits(rows: int, num_blocks: int, has_tail: bool, programs: int) -> int:
    """Programs that share one sequence and KV head: no more than run at once, or the last would run alone."""
    return max(1, min(num_blocks + has_tail, programs // rows))


def power_of_2(number: int) -> int:
    """The smallest that is not below `number`. On the host triton's own takes as long as a part of a launch."""
    return 1 << (number - 1).bit_length()


@triton.constexpr_function
def next_power_of_2(number):
    return triton.next_power_of_2(number)


def chained(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that starts while the one before it in the stream still runs, where the GPU can (sm_90).

    It must `await_inputs` before it reads or writes what others do, so that only its start overlaps with their end.
    """
    return {"CHAINED": True, "launch_pdl": True} if capability(device) >= 9 else {"CHAINED": False}


@triton.jit
def await_inputs(CHAINED: tl.constexpr, START_NEXT: tl.constexpr = True):
    """Wait until the kernels before have written all; the next one may start meanwhile."""
    if CHAINED:
        if START_NEXT:
            start_next(CHAINED)
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(CHAINED: tl.constexpr):
    """Let the next kernel start as soon as all programs have said so, or ended."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointer, nbytes):
    """Ask for so much memory, whole 16 bytes, to come to the L2 cache. From sm_90 on."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointer.to(tl.int64), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
