"""How kernels are launched on the GPU at hand."""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def capability(device: torch.device) -> int:
    """Major compute capability, as tables of tiles know it: 8 stands for sm_89, and for machines without a GPU."""
    return min(9, torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 8


def chained(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that starts while the one before it in the stream still runs, where the GPU can (sm_90).

    It must `await_inputs` before it reads or writes what others do, so that only its start overlaps with their end.
    """
    return {"CHAINED": True, "launch_pdl": True} if capability(device) >= 9 else {"CHAINED": False}


@triton.jit
def await_inputs(CHAINED: tl.constexpr):
    """Let the next kernel start, and wait until those before have written all."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
