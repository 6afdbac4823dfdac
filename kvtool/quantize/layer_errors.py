"""What a format does to each layer of a model: to its keys, its values, and what attention makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention.layer import AttentionLayer, operands
from kvtool.attention.queries import prepared
from kvtool.errors import UnsupportedError
from kvtool.kv.codecs import CODECS
from kvtool.kv.format import KVFormat, StreamFormat
from kvtool.kv.hadamard import hadamard
from kvtool.models import Decoder
from kvtool.models.kv import attention_layers
from kvtool.scoring import WholeModel


@dataclass(frozen=True)
class LayerActivations:
    """What one layer's attention was given and made of it, W windows of T tokens without any packing.

    Attributes:
        layer: the attention's shape.
        query: [W, T, Hq, D]; key, value: [W, T, Hkv, D], as a cache would be given them: normalised, with RoPE.
        output: [W, T, Hq, D], float32 at least.
    """

    layer: AttentionLayer
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer, each the norm of the difference over the norm of the exact (Frobenius).

    Attributes:
        key, value: of what stands in blocks at the end of the windows; 0 where nothing does.
        output: of the attention's output at all positions, each reading blocks below `visible(t)` as decoding does.
    """

    key: float
    value: float
    output: float


@dataclass(frozen=True)
class Outlier:
    """The channel that stands out most: its largest |x| over the median channel's, in its own head."""

    ratio: float
    head: int
    channel: int


@torch.inference_mode()
def calibrate(model: Decoder | WholeModel, windows: Tensor) -> tuple[LayerActivations, ...]:
    """Queries, keys, values and outputs of every layer on `windows` [W, T] of token ids, all kept on the device.

    Raises:
        UnsupportedError: a layer's are not finite, so that no error can be told.
    """
    layers: list[LayerActivations] = []
    shapes = attention_layers(model.config)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, windows.shape).contiguous() for x in (q, k, v))
        for name, x in (("queries", query), ("keys", key), ("values", value)):
            if not x.isfinite().all():
                raise UnsupportedError(
                    f"calibration: {name} of layer {index} are not finite; try --dtype float32, or other text"
                )
        exact = StreamFormat()
        output = attend_packed(query, key, value, exact, exact, KVFormat((), 1, 0), shapes[index])
        layers.append(LayerActivations(shapes[index], query, key, value, output))
        return output.to(q.dtype).flatten(0, 1)

    _run(model, windows, attend)
    return tuple(layers)


@torch.inference_mode()
def layer_errors(activations: Sequence[LayerActivations], fmt: KVFormat) -> tuple[LayerErrors, ...]:
    """Each layer's own errors under `fmt`, as if the layers before it were exact.

    Raises:
        UnsupportedError: the format cannot hold these keys or values.
    """
    errors = []
    for exact, layer in zip(activations, fmt.layers, strict=True):
        output = attend_packed(exact.query, exact.key, exact.value, layer.key, layer.value, fmt, exact.layer)
        errors.append(
            LayerErrors(
                key=_reconstruction_error(exact.key, layer.key, fmt),
                value=_reconstruction_error(exact.value, layer.value, fmt),
                output=relative_error(output, exact.output),
            )
        )
    return tuple(errors)


@torch.inference_mode()
def propagated_errors(
    model: Decoder | WholeModel, windows: Tensor, activations: Sequence[LayerActivations], fmt: KVFormat
) -> tuple[float, ...]:
    """Each layer's attention-output error when all layers before it are packed too.

    Args:
        windows, activations: what `calibrate` took and gave.

    Raises:
        UnsupportedError: the format cannot hold these keys or values.
    """
    errors: list[float] = []

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, windows.shape) for x in (q, k, v))
        layer, exact = fmt.layers[index], activations[index]
        output = attend_packed(query, key, value, layer.key, layer.value, fmt, exact.layer)
        errors.append(relative_error(output, exact.output))
        return output.to(q.dtype).flatten(0, 1)

    _run(model, windows, attend)
    return tuple(errors)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_format: StreamFormat,
    value_format: StreamFormat,
    fmt: KVFormat,
    layer: AttentionLayer,
) -> Tensor:
    """Attention where the query at t reads packed positions below `fmt.visible(t)` and exact ones from there to t.

    In float32 at least, so that what differs from the exact output is the format's doing.

    Args:
        query: [W, T, Hq, D]; key, value: [W, T, Hkv, D].
        key_format, value_format: of this layer; `fmt` says which positions are packed, and in what blocks.

    Returns:
        [W, T, Hq, D].
    """
    length, device = query.shape[1], query.device
    packed = packed_length(fmt, length)
    at = torch.arange(length, device=device)
    position = at[:, None]
    visible = torch.tensor([fmt.visible(t) for t in range(length)], device=device)[:, None]
    seen = (at <= position) & (True if layer.sliding_window is None else at > position - layer.sliding_window)
    mask = torch.cat([seen[:, :packed] & (at[:packed] < visible), seen & (at >= visible)], dim=1)
    keys = torch.cat([repack(key[:, :packed], key_format, fmt.block_size), _wide(key)], dim=1)
    values = torch.cat([repack(value[:, :packed], value_format, fmt.block_size), _wide(value)], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (_wide(query), *operands(keys, values, layer)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True).transpose(1, 2)


def repack(x: Tensor, fmt: StreamFormat, block_size: int) -> Tensor:
    """What packing whole blocks of `x` [W, n, heads, D] and reading them again makes of it, in float32 at least."""
    if fmt.bits == "16" or x.shape[1] == 0:
        return _wide(x)
    rotated = hadamard(_wide(x)) if fmt.rotate else x
    width = block_size if fmt.axis == "channel" else x.shape[1]  # a token's codes know of no block
    blocks = rotated.unflatten(1, (-1, width)).transpose(2, 3)
    codec = CODECS[fmt.bits]
    seen = codec.decode(codec.encode(blocks, fmt), fmt, _wide(x).dtype).transpose(2, 3).flatten(1, 2)
    return hadamard(seen) if fmt.rotate else seen


def packed_length(fmt: KVFormat, length: int) -> int:
    """Tokens of a window of `length` that any of its queries reads packed."""
    return min(fmt.visible(length - 1), length)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖; 0 where both are zeros."""
    norm = exact.double().norm()
    difference = (x.double() - exact.double()).norm()
    return float(difference / norm) if norm else float(difference)


def outlier(x: Tensor) -> Outlier:
    """The channel of `x` [W, T, heads, D] that stands out most, as KVQuant and KIVI picture key outliers.

    Which is why a scale per token fails: it must span the largest channel, and its step drowns the median one.
    """
    largest = x.float().abs().amax(dim=(0, 1))
    median = largest.median(dim=-1, keepdim=True).values
    ratios = largest / median.clamp(min=torch.finfo(torch.float32).tiny)
    head, channel = divmod(int(ratios.argmax()), x.shape[-1])
    return Outlier(float(ratios[head, channel]), head, channel)


def _reconstruction_error(x: Tensor, fmt: StreamFormat, kv: KVFormat) -> float:
    packed = x[:, : packed_length(kv, x.shape[1])]
    return relative_error(repack(packed, fmt, kv.block_size), packed)


def _run(model: Decoder | WholeModel, windows: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
    """One pass over `windows` [W, T], laid end to end; queries over latents come absorbed."""
    positions = torch.arange(windows.shape[1], device=windows.device).repeat(windows.shape[0])
    model(windows.flatten(), positions, prepared(attend))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
