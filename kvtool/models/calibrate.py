"""Weights in fewer bits that know what they will be multiplied with, layer by layer, on a text.

Each product is replaced at the moment at which its inputs arrive, and computes what comes next in its new form, so that
all that follows is fitted to what the products before really make of the text.

Sources: GPTQ (Frantar et al., arXiv:2210.17323), whose errors make up for one another: codes of 4 bits, and e4m3. AWQ
(Lin et al., arXiv:2306.00978), which moves size from inputs to weights where that changes nothing in full precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention.queries import prepared
from kvtool.errors import UnsupportedError
from kvtool.kernels.quantized_rows import FP8, LARGEST, quantize_rows
from kvtool.layers.linear import Linear
from kvtool.layers.quantized import EightBitMatrix, Int4Matrix, Matrix, int4_codes, int4_grid
from kvtool.models.decoder import MLP, Attention, Decoder, DecoderLayer

Method = Literal["gptq", "awq", "fp8"]
SHRINKS = tuple(1 - i / 40 for i in range(13))  # of a group's range: what lies beyond is cut off, the rest gets finer
USUAL_SHRINK = 0.85  # that AWQ's scales are looked for with
OCTAVE = tuple(2 ** (-i / 16) for i in range(16))  # of e4m3's scales: another power of 2 makes no difference
EXPONENTS = tuple((i / 10, j / 2) for i in range(11) for j in range(2))  # of inputs' and weights' sizes in AWQ's scales
SAMPLE = 2048  # tokens that those are tried on
DAMPING = 0.01  # of a Hessian's mean diagonal
BLOCK = 128  # columns among which errors are spread one by one


class Calibration:
    """A text on its way through a model whose layers are quantised one after the other.

    Args:
        model: everything but its layers is filled.
        group: columns to a scale, of 4 bits.
        windows: ids of pieces of the text, all of one length.
    """

    def __init__(self, model: Decoder, method: Method, group: int, windows: Sequence[Sequence[int]]) -> None:
        assert model.embed_tokens is not None
        ids = torch.tensor(windows, device=model.embed_tokens.weight.device)
        self.config, self.dtype, self.method, self.group = model.config, model.dtype, method, group
        self.length = ids.shape[1]
        self.rotations = model.rotary(torch.arange(self.length, device=ids.device).repeat(len(ids)))
        self.x: Tensor = model.embed_tokens(ids.flatten())
        self.residual: Tensor | None = None

    def quantize(self, layer: DecoderLayer, linears: Sequence[Linear]) -> None:
        """Replace the weights of these products of the next layer, which is filled, and let the text through it.

        Raises:
            UnsupportedError: their inputs are no numbers.
        """
        weights = {linear: linear.dense(torch.float32).clone() for linear in linears}
        if self.method == "awq":
            samples: dict[Linear, Tensor] = {}
            every = -(-len(self.x) // SAMPLE)
            with _met(linears, lambda linear, x: samples.update({linear: x[::every].float()})):
                residual = None if self.residual is None else self.residual.clone()
                layer(self.x.clone(), residual, *self.rotations, prepared(self._attend))
            _fold(layer, weights, samples, self.group, getattr(torch, self.config.dtype))
        with _met(linears, lambda linear, x: linear.replace(self._form(weights.pop(linear), x))):
            self.x, self.residual = layer(self.x, self.residual, *self.rotations, prepared(self._attend))

    def _attend(self, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention within each window."""
        q, key, value = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, key, value))
        window, mask = self.config.sliding_window[layer], None
        if window is not None and window < self.length:
            mask = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, is_causal=mask is None, scale=self.config.softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _form(self, weight: Tensor, x: Tensor) -> Matrix:
        """A weight [N, K] in fewer bits, its inputs being x [T, K]."""
        if self.method == "fp8":
            rows = quantize_rows(x, FP8)
            x = rows.codes.float().mul_(rows.scales[:, None])  # as the product takes them
        x = x.float()
        hessian = x.t() @ x
        if not bool(hessian.isfinite().all()):
            raise UnsupportedError(f"--quantization {self.method}: the model makes of the text what is no number")
        return fp8(weight, hessian) if self.method == "fp8" else int4(weight, hessian, self.group, self.dtype)


@contextmanager
def _met(linears: Sequence[Linear], do: Callable[[Linear, Tensor], None]) -> Iterator[None]:
    """Inside, what these products are given is shown before they compute."""
    hooks = [linear.register_forward_pre_hook(lambda module, x: do(module, x[0])) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- codes ------------------------------------------------------------------------------------------------------------


def int4(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> Int4Matrix:
    """4-bit codes of which each makes up for the errors of those before it.

    Groups and their grids are those of the weights as they are (GPTQ's `static_groups`), so that columns stay in place.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], Σ x xᵀ over a text's inputs; an error E of the weights costs tr(E H Eᵀ) of its
            outputs' squared error.
        group: columns to a scale.
        dtype: of the model.
    """
    scales, zeros = _grid(weight, hessian, group, dtype)

    def code(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        scale, zero = scales[:, column // group], zeros[:, column // group]
        found = int4_codes(values, scale, zero)
        return found, (found - zero) * scale

    codes = _spread(weight, hessian, code)
    return Int4Matrix(codes.to(torch.uint8), scales.to(dtype), zeros.to(dtype))


def fp8(weight: Tensor, hessian: Tensor) -> EightBitMatrix:
    """e4m3 numbers of which each makes up for the errors of those before it; arguments as of `int4`."""
    whole = weight.abs().amax(1) / LARGEST[FP8]
    whole = torch.where(whole > 0, whole, 1)
    scales, least = whole, torch.full_like(whole, torch.inf)
    for part in OCTAVE:
        trial = (whole * part)[:, None]
        errors = _e4m3(weight / trial) * trial - weight
        cost = ((errors @ hessian) * errors).sum(1)
        scales, least = torch.where(cost < least, trial[:, 0], scales), torch.minimum(cost, least)

    def code(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        found = _e4m3(values / scales)
        return found, found * scales

    return EightBitMatrix(_spread(weight, hessian, code).to(FP8), scales)


def _e4m3(values: Tensor) -> Tensor:
    """The nearest numbers of e4m3, in the dtype that they came in."""
    return values.clamp(-LARGEST[FP8], LARGEST[FP8]).to(FP8).to(values.dtype)


def _spread(weight: Tensor, hessian: Tensor, code: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
    """GPTQ: codes [N, K], found column by column, those that matter most first, of what the errors before have left.

    Args:
        code: codes of values [N] of a column, and what they stand for.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    left, codes = weight[:, order], torch.empty_like(weight)
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        errors = torch.empty_like(left[:, block])
        for i, column in enumerate(order[block].tolist()):
            now = start + i
            codes[:, column], numbers = code(left[:, now], column)
            errors[:, i] = (left[:, now] - numbers) / factor[now, now]
            left[:, now + 1 : block.stop] -= errors[:, i, None] * factor[now, now + 1 : block.stop]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes


def _damped(hessian: Tensor) -> Tensor:
    """With more on its diagonal; inputs that are always 0 have no say."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return damped


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹ [K, K], damped."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(hessian)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _grid(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, K / G] with which nearest codes cost its outputs least: the best of some shrunk ranges."""
    groups = weight.unflatten(1, (-1, group))
    blocks = torch.stack([hessian[i : i + group, i : i + group] for i in range(0, len(hessian), group)])
    scales, zeros = int4_grid(groups, dtype)
    least = torch.full_like(scales, torch.inf)
    for shrink in SHRINKS:
        new_scales, new_zeros = int4_grid(groups, dtype, shrink)
        errors = (int4_codes(groups, new_scales, new_zeros) - new_zeros) * new_scales - groups
        cost = (torch.einsum("ngi,gij->ngj", errors, blocks) * errors).sum(-1, keepdim=True)
        better = cost < least
        least, scales, zeros = (
            torch.where(better, found, old) for found, old in ((cost, least), (new_scales, scales), (new_zeros, zeros))
        )
    return scales[..., 0], zeros[..., 0]


# --- AWQ's scales -----------------------------------------------------------------------------------------------------


def _fold(
    layer: DecoderLayer,
    weights: Mapping[Linear, Tensor],
    inputs: Mapping[Linear, Tensor],
    group: int,
    stored: torch.dtype,
) -> None:
    """Make columns with large inputs larger, and what those inputs come from smaller: gains of a norm, to numbers that
    `stored` has, or rows of the product before. `weights` change with them."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    heads = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.head_dim
    chains: tuple[tuple[Linear, Linear, tuple[int, int, int]], ...] = (
        (mlp.down_proj, mlp.gate_up_proj, (1, 1, mlp.down_proj.inputs.size)),
        (attention.o_proj, attention.qkv_proj, heads),
    )
    for product, before, shape in chains:
        if product in weights and before in weights:
            scales = _best_scales(weights[product], inputs[product], group, shape)
            of_rows = scales.view(shape)[:, 0].flatten()
            rows = slice(-len(of_rows), None)  # ups come after gates, values after queries and keys
            weights[before][rows] /= of_rows[:, None]
            if before.bias is not None:
                before.bias[rows] /= of_rows
            weights[product].mul_(scales)
    for norm, product in (
        (layer.input_layernorm, attention.qkv_proj),
        (layer.post_attention_layernorm, mlp.gate_up_proj),
    ):
        if product in weights:
            gain = norm.weight.float()
            found = _best_scales(weights[product], inputs[product], group, (1, 1, len(gain)))
            divided = (gain / found).to(stored)
            scales = torch.where(divided == 0, 1, gain / divided.float())
            norm.weight.copy_(divided)
            weights[product].mul_(scales)


def _best_scales(weight: Tensor, x: Tensor, group: int, shape: tuple[int, int, int]) -> Tensor:
    """For each column [K] the mean size of its inputs to a power over that of its weights to another: of such scales
    those with which rounding costs the outputs least.

    Args:
        weight: float32 [N, K].
        x: float32 [T, K], its inputs.
        group: columns to a scale.
        shape: of the columns; those that differ in the second index alone, as heads that read the same values do, have
            one scale.
    """
    sizes, against = (
        (size / size.mean()).clamp(min=1e-4)
        for size in (
            matrix.abs().mean(0).view(shape).mean(1, keepdim=True).expand(shape).flatten() for matrix in (x, weight)
        )
    )
    best, least = torch.ones_like(sizes), None
    for of_inputs, of_weights in EXPONENTS:
        scales = sizes**of_inputs / against**of_weights
        scales /= (scales.max() * scales.min()).sqrt()
        groups = (weight * scales).unflatten(1, (-1, group))
        step, zeros = int4_grid(groups, torch.float32, USUAL_SHRINK)
        errors = ((int4_codes(groups, step, zeros) - zeros) * step).flatten(1) / scales - weight
        cost = (x @ errors.t()).square().sum()
        if least is None or cost < least:
            best, least = scales, cost
    return best
