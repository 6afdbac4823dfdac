"""4-bit weights that know what they will be multiplied with: GPTQ (Frantar et al., arXiv:2210.17323) and AWQ (Lin et
al., arXiv:2306.00978), layer by layer, on what the layers quantised before make of a text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.errors import UnsupportedError
from kvtool.layers.linear import Linear
from kvtool.layers.quantized import Int4Matrix, int4_codes, int4_grid, stored_scales
from kvtool.models.decoder import MLP, Attention, Decoder, DecoderLayer

STEP_TOKENS = 8192  # that go through a layer at once, in whole windows
SHRINKS = tuple(1 - i / 40 for i in range(13))  # of a group's range: what lies beyond is cut off, the rest gets finer
FITS = 3  # of the scales to the codes, where these stay the nearest
USUAL_SHRINK = 0.85  # that the best scales are looked for with
EXPONENTS = tuple(i / 20 for i in range(20))  # of a channel's size in AWQ's scales
DAMPING = 0.01  # of a Hessian's mean diagonal
BLOCK = 128  # columns among which errors are spread one by one


@dataclass
class Inputs:
    """What a product's inputs were, summed over the tokens of a text.

    Attributes:
        hessian: [K, K], Σ x xᵀ; an error E of the weights costs tr(E H Eᵀ) of its outputs' squared error.
        sizes: [K], Σ |x|.
    """

    hessian: Tensor
    sizes: Tensor

    @classmethod
    def none(cls, columns: int, device: torch.device) -> "Inputs":
        return cls(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device))

    def add(self, x: Tensor) -> None:
        """Take in x [T, K]."""
        wide = x.float()
        self.hessian.addmm_(wide.t(), wide)
        self.sizes += wide.abs().sum(0)

    def divide(self, scales: Tensor) -> None:
        """As if each input had been divided by its scale."""
        self.hessian /= scales * scales[:, None]
        self.sizes /= scales


class Calibration:
    """A text on its way through a model whose layers are quantised one after the other.

    Args:
        model: everything but its layers is filled.
        method: "gptq" or "awq".
        group: columns to a scale.
        windows: ids of pieces of the text, all of one length.
    """

    def __init__(self, model: Decoder, method: str, group: int, windows: Sequence[Sequence[int]]) -> None:
        assert model.embed_tokens is not None
        ids = torch.tensor(windows, device=model.embed_tokens.weight.device)
        self.config, self.dtype, self.method, self.group = model.config, model.dtype, method, group
        self.length = ids.shape[1]
        self.rotary, self.places = model.rotary, torch.arange(self.length, device=ids.device)
        self.x = model.embed_tokens(ids.flatten())
        self.residual: Tensor | None = None

    def quantize(self, layer: DecoderLayer, linears: Iterable[Linear]) -> None:
        """Replace the weights of these products of the next layer, which is filled, and let the text through it.

        Raises:
            UnsupportedError: their inputs are no numbers.
        """
        seen = {linear: Inputs.none(linear.weight.shape[1], self.x.device) for linear in linears}
        hooks = [linear.register_forward_pre_hook(lambda module, x: seen[module].add(x[0])) for linear in seen]
        self._through(layer)
        for hook in hooks:
            hook.remove()
        if not all(bool(inputs.hessian.isfinite().all()) for inputs in seen.values()):
            raise UnsupportedError(f"--quantization {self.method}: the model makes of the text what is no number")
        weights = {linear: linear.dense(torch.float32).clone() for linear in seen}
        if self.method == "awq":
            _fold(layer, weights, seen, self.group, getattr(torch, self.config.dtype))
        form = gptq if self.method == "gptq" else nearest
        for linear, inputs in seen.items():
            linear.replace(form(weights.pop(linear), inputs.hessian, self.group, self.dtype))
        self.x, self.residual = self._through(layer)

    def _through(self, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """What the layer makes of the text: x and residual stream."""
        windows = max(1, STEP_TOKENS // self.length)
        step = windows * self.length
        pieces = []
        for start in range(0, len(self.x), step):
            x = self.x[start : start + step].clone()
            residual = None if self.residual is None else self.residual[start : start + step].clone()
            cos, sin = self.rotary(self.places.repeat(len(x) // self.length))
            pieces.append(layer(x, residual, cos, sin, self._attend))
        x, residual = map(torch.cat, zip(*pieces, strict=True))
        return x, residual

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


def gptq(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> Int4Matrix:
    """Codes of which each makes up for the errors of those before it, the columns that matter most being the first.

    Groups and their grids are those of the weights as they are (GPTQ's `static_groups`), so that columns stay in place.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], of `Inputs`.
        group: columns to a scale.
        dtype: of the model.
    """
    scales, zeros = _grid(weight, hessian, group, dtype)
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    left, codes = weight[:, order], torch.empty_like(weight)
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        errors = torch.empty_like(left[:, block])
        for i, column in enumerate(order[block].tolist()):
            scale, zero, now = scales[:, column // group], zeros[:, column // group], start + i
            code = int4_codes(left[:, now], scale, zero)
            codes[:, column] = code
            errors[:, i] = (left[:, now] - (code - zero) * scale) / factor[now, now]
            left[:, now + 1 : block.stop] -= errors[:, i, None] * factor[now, now + 1 : block.stop]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return Int4Matrix(codes.to(torch.uint8), scales.to(dtype), zeros.to(dtype))


def nearest(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> Int4Matrix:
    """The nearest codes, on grids that suit the inputs; arguments as of `gptq`."""
    scales, zeros = _grid(weight, hessian, group, dtype, FITS)
    groups = weight.unflatten(1, (-1, group))
    codes = int4_codes(groups, scales[..., None], zeros[..., None]).flatten(1)
    return Int4Matrix(codes.to(torch.uint8), scales.to(dtype), zeros.to(dtype))


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹ [K, K], damped; inputs that are always 0 have no say."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _grid(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype, fits: int = 0) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, K / G] with which nearest codes cost its outputs least: the best of some shrunk ranges, and
    then, so many times, the scales that suit the codes best."""
    groups = weight.unflatten(1, (-1, group))
    blocks = torch.stack([hessian[i : i + group, i : i + group] for i in range(0, len(hessian), group)])

    def cost(errors: Tensor) -> Tensor:
        return (torch.einsum("ngi,gij->ngj", errors, blocks) * errors).sum(-1, keepdim=True)

    def fit(scales: Tensor, zeros: Tensor) -> Tensor:
        numbers = int4_codes(groups, scales, zeros) - zeros
        along = torch.einsum("ngi,gij->ngj", numbers, blocks)
        best = (along * groups).sum(-1, keepdim=True) / (along * numbers).sum(-1, keepdim=True)
        return torch.where(best > 0, stored_scales(best, dtype), scales)  # NaN where all numbers, or inputs, are 0

    scales, zeros = int4_grid(groups, dtype)
    least = torch.full_like(scales, torch.inf)
    for trial in range(len(SHRINKS) + fits):
        if trial < len(SHRINKS):
            new_scales, new_zeros = int4_grid(groups, dtype, SHRINKS[trial])
        else:
            new_scales, new_zeros = fit(scales, zeros), zeros
        new = cost((int4_codes(groups, new_scales, new_zeros) - new_zeros) * new_scales - groups)
        better = new < least
        least, scales, zeros = (
            torch.where(better, found, old) for found, old in ((new, least), (new_scales, scales), (new_zeros, zeros))
        )
    return scales[..., 0], zeros[..., 0]


# --- AWQ's scales -----------------------------------------------------------------------------------------------------


def _fold(
    layer: DecoderLayer,
    weights: Mapping[Linear, Tensor],
    seen: Mapping[Linear, Inputs],
    group: int,
    stored: torch.dtype,
) -> None:
    """Make columns with large inputs larger, so that their weights are rounded less, and what those inputs come from
    smaller: gains of a norm, to numbers that `stored` has, or rows of the product before. `weights` and `seen` change
    with them."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    heads = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.head_dim
    chains: tuple[tuple[Linear, Linear, tuple[int, int, int]], ...] = (
        (mlp.down_proj, mlp.gate_up_proj, (1, 1, mlp.down_proj.inputs.size)),
        (attention.o_proj, attention.qkv_proj, heads),
    )
    for product, before, shape in chains:
        if product in seen and before in seen:
            scales = _best_scales(weights[product], seen[product], group, shape)
            of_rows = scales.view(shape)[:, 0].flatten()
            rows = slice(-len(of_rows), None)  # ups come after gates, values after queries and keys
            weights[before][rows] /= of_rows[:, None]
            if before.bias is not None:
                before.bias[rows] /= of_rows
            weights[product].mul_(scales)
            seen[product].divide(scales)
    for norm, product in (
        (layer.input_layernorm, attention.qkv_proj),
        (layer.post_attention_layernorm, mlp.gate_up_proj),
    ):
        if product in seen:
            gain = norm.weight.float()
            divided = (gain / _best_scales(weights[product], seen[product], group, (1, 1, len(gain)))).to(stored)
            scales = torch.where(divided == 0, 1, gain / divided.float())
            norm.weight.copy_(divided)
            weights[product].mul_(scales)
            seen[product].divide(scales)


def _best_scales(weight: Tensor, inputs: Inputs, group: int, shape: tuple[int, int, int]) -> Tensor:
    """For each column [K] the mean size of its inputs to a power, of which rounding costs the outputs least.

    Args:
        shape: of the columns; those that differ in the second index alone, as heads that read the same values do, have
            one scale.
    """
    sizes = inputs.sizes.view(shape).mean(1, keepdim=True).expand(shape).flatten()
    best, least = torch.ones_like(sizes), None
    for exponent in EXPONENTS:
        scales = (sizes / sizes.mean()).clamp(min=1e-4) ** exponent
        scales /= (scales.max() * scales.min()).sqrt()
        groups = (weight * scales).unflatten(1, (-1, group))
        step, zeros = int4_grid(groups, torch.float32, USUAL_SHRINK)
        errors = ((int4_codes(groups, step, zeros) - zeros) * step).flatten(1) / scales - weight
        cost = (errors @ inputs.hessian * errors).sum()
        if least is None or cost < least:
            best, least = scales, cost
    return best
