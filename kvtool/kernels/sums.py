"""Sums that products leave unfinished: of parts of the columns, so that few outputs keep a GPU busy, or unscaled."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, num_sms

LEAST_STEPS = 6  # of a part, below which a program has hardly started when it ends


def steps_of_part(programs: int, steps: int, device: torch.device) -> int:
    """How many of the `steps` over all columns one program takes, if `programs` alone leave multiprocessors idle."""
    parts = max(1, min(2 * num_sms(device) // programs, steps // LEAST_STEPS))
    return -(-steps // parts)


def finish(sums: Tensor, row_scales: Tensor | None, scales: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """Add up parts and the bias into `out` [M, N], which is returned.

    Args:
        sums: [parts, M, N], float32 or int32.
        row_scales, scales: float32 [M] and [N], factors of the sums; None: they have none.
        bias: [N].
    """
    parts, rows, outputs = sums.shape
    assert sums.is_contiguous() and out.is_contiguous()
    width = 1024
    _finish_kernel[(rows, -(-outputs // width))](
        sums,
        sums if row_scales is None else row_scales,
        sums if scales is None else scales,
        sums if bias is None else bias,
        out,
        parts,
        rows,
        outputs,
        SCALED=scales is not None,
        BIAS=bias is not None,
        WIDTH=width,
        num_warps=4,
        **chained(sums.device),
    )
    return out


@triton.jit(do_not_specialize=["parts", "rows"])
def _finish_kernel(
    sums,
    row_scales,
    scales,
    bias,
    out,
    parts,
    rows,
    outputs,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < outputs
    await_inputs(CHAINED)
    total = tl.zeros([WIDTH], sums.dtype.element_ty)
    for part in range(parts):
        total += tl.load(sums + (part * rows + row) * outputs + column, mask=inside, other=0)
    value = total.to(tl.float32)
    if SCALED:
        value *= tl.load(scales + column, mask=inside, other=0) * tl.load(row_scales + row)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * outputs + column, value.to(out.dtype.element_ty), mask=inside)
