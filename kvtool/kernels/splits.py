"""What programs that share a sequence have found, put together."""

import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2

MERGED = 32  # channels of a head that one program merges


def merge(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """The mean of `partial` [n, Hq, splits, D] weighed by 2 ** `lse` [n, Hq, splits], both fp32, into `out`."""
    n, num_heads, splits, head_dim = partial.shape
    step = min(128, power_of_2(splits))
    _merge_kernel[n * num_heads, -(-head_dim // MERGED)](
        partial,
        lse,
        out,
        splits,
        D=head_dim,
        CHANNELS=MERGED,
        STEP=step,
        num_warps=max(1, step // 32),
        **chained(out.device),
    )


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    splits,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    await_inputs(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m = -1e30
    total = 0.0
    acc = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, splits, STEP):
        split = start + tl.arange(0, STEP)
        lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(lse, 0))
        alpha = tl.exp2(m - m_new)
        weights = tl.exp2(lse - m_new)
        mask = (split < splits)[:, None] & (channels < D)[None, :]
        partial = tl.load(partial_ptr + (row * splits + split[:, None]) * D + channels[None, :], mask=mask, other=0)
        acc = acc * alpha + tl.sum(partial * weights[:, None], 0)
        total = total * alpha + tl.sum(weights, 0)
        m = m_new
    tl.store(out_ptr + row * D + channels, (acc / total).to(out_ptr.dtype.element_ty), mask=channels < D)
