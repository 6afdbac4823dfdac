"""The residual stream's addition and its normalisation in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2
from kvtool.kernels.quantized_rows import QuantizedRows
from kvtool.kernels.w8a8_kernels import empty_rows, scale_of, store_codes


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `kvtool.layers.norm.RMSNorm` defines; the sum is rounded to the stream's dtype, all else computed in fp32.

    Args:
        x: [T, size].
        residual: [T, size], overwritten with the sum; None: `x` is the stream.
        weight: [size].

    Returns:
        The normalised stream and the stream itself, [T, size] each.
    """
    out = torch.empty_like(x)
    return out, _launch(x, residual, weight, eps, out, None)


def add_rms_norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kind: torch.dtype
) -> tuple[QuantizedRows, Tensor]:
    """`add_rms_norm` with the normalised stream as `quantize_rows` rounds it."""
    out = empty_rows(x, x.shape[1], kind)
    return out, _launch(x, residual, weight, eps, out.codes, out.scales)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None
) -> Tensor:
    """The stream; the normalised one is written to `out`."""
    rows, size = x.shape
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    width = power_of_2(size)
    _add_rms_norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if scales is None else scales,
        eps,
        SIZE=size,
        WIDTH=width,
        ADD=residual is not None,
        QUANTIZED=scales is not None,
        num_warps=max(1, min(16, width // 256)),
        **chained(x.device),
    )
    return x if residual is None else residual


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    out,
    scales,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CHAINED: tl.constexpr,
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
    normed = (stream * scale * gain).to(x.dtype.element_ty)
    if QUANTIZED:
        value = normed.to(tl.float32)
        row_scale = scale_of(tl.max(tl.abs(value), 0), out.dtype.element_ty)
        tl.store(scales + tl.program_id(0), row_scale)
        store_codes(out + at, value, row_scale, inside)
    else:
        tl.store(out + at, normed, mask=inside)
