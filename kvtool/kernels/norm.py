"""The residual stream's addition and its normalisation in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `kvtool.layers.norm.RMSNorm` defines; the sum is rounded to the stream's dtype, all else computed in fp32.

    Args:
        x: [T, size].
        residual: [T, size], overwritten with the sum; None: `x` is the stream.
        weight: [size].

    Returns:
        The normalised stream and the stream itself, [T, size] each.
    """
    rows, size = x.shape
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty_like(x)
    width = power_of_2(size)
    _add_rms_norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        eps,
        SIZE=size,
        WIDTH=width,
        ADD=residual is not None,
        num_warps=max(1, min(16, width // 256)),
        **chained(x.device),
    )
    return out, x if residual is None else residual


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr, CHAINED: tl.constexpr
):
    columns = tl.arange(0, WIDTH)
    inside = columns < SIZE
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * SIZE + columns
    await_inputs(CHAINED)
    stream = tl.load(x + at, mask=inside, other=0)
    if ADD:
        before = tl.load(residual + at, mask=inside, other=0)
        stream = (stream.to(tl.float32) + before.to(tl.float32)).to(stream.dtype)
        tl.store(residual + at, stream, mask=inside)
    stream = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(stream * stream, 0) / SIZE + eps)
    tl.store(out + at, (stream * scale * gain).to(out.dtype.element_ty), mask=inside)
