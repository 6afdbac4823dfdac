"""Layer errors against attention written in loops, and against the packed store that serves."""

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import PagedAttention
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.queries import prepared
from kvtool.attention.reference import attention_reference
from kvtool.config import KVOptions
from kvtool.errors import UnsupportedError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import StreamFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.models import load_config, load_model
from kvtool.quantize.layer_errors import (
    LayerActivations,
    attend_packed,
    calibrate,
    layer_errors,
    outlier,
    propagated_errors,
    relative_error,
    repack,
)

FORMATS = [
    KVOptions(nbits="4"),
    KVOptions(nbits="2", residual_length=32, q_group_size=32),
    KVOptions(nbits="8", axis_key="token", rotate=True),
    KVOptions(nbits="fp8"),
    KVOptions(nbits_key="16", nbits_value="2"),
    KVOptions(nbits="4", axis_value="channel", symmetric=True),
]


def spec(layers: int, heads: int = 2, dim: int = 16) -> KVSpec:
    return KVSpec(layers, StreamSpec(heads, dim), StreamSpec(heads, dim), 8)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(FORMATS), st.integers(1, 150), st.sampled_from([None, 50]), st.integers(0, 2**31))
def test_attention_is_the_definition(kv, length, sliding_window, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = AttentionLayer(4, 2, 16, 0.3, sliding_window)
    fmt = resolve(kv, spec(1))
    key_format, value_format = fmt.layers[0].key, fmt.layers[0].value
    q, k, v = (torch.randn(2, length, heads, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    out = attend_packed(q, k, v, key_format, value_format, fmt, layer)
    whole = length // fmt.block_size * fmt.block_size if not fmt.packs_on_write else length
    for window in range(2):
        seen = [
            torch.cat([repack(x[window : window + 1, :whole], stream, fmt.block_size)[0], x[window, whole:]])
            for x, stream in ((k, key_format), (v, value_format))
        ]
        expected = attention_reference(q[window], k[window], v[window], *seen, fmt, layer)
        torch.testing.assert_close(out[window], expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen2", folder)
    return load_model(folder, load_config(folder), dtype=torch.float64, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 199, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_errors_are_those_of_the_store_that_serves(model, windows, kv):
    """Each layer's propagated error, from attention outputs over a real packed store."""
    activations = calibrate(model, windows)
    layout = KVLayout(spec(3), resolve(kv, spec(3)))
    fmt, length = layout.format, windows.shape[1]
    blocks = fmt.num_blocks(length)
    store = KVStore(layout, 2 * blocks, 2, torch.float64)
    attention = PagedAttention(store, [activation.layer for activation in activations], "torch")
    batch = KVBatch.build(fmt, [Span(0, length, range(i * blocks, (i + 1) * blocks), i) for i in range(2)])
    outputs = []

    def attend(layer, q, k, v):
        outputs.append(attention(layer, q, k, v, batch))
        return outputs[-1]

    with torch.inference_mode():
        model(windows.flatten(), batch.positions, prepared(attend))
    served = [relative_error(out, exact.output.flatten(0, 1)) for out, exact in zip(outputs, activations, strict=True)]
    ours = propagated_errors(model, windows, activations, fmt)
    assert ours == pytest.approx(served, rel=1e-6)
    local = layer_errors(activations, fmt)
    assert local[0].output == pytest.approx(ours[0], rel=1e-6), "nothing stands before the first layer"
    packed = fmt.packed_tokens(length)
    key = store.layers[0].key
    seen = key.read_blocks(torch.arange(2 * blocks).view(2, -1), torch.float64)[:, :, :packed].transpose(1, 2)
    if not key.format.rotate:
        assert local[0].key == pytest.approx(relative_error(seen, activations[0].key[:, :packed]), rel=1e-6)


def test_sixteen_bits_have_no_error(model, windows):
    activations = calibrate(model, windows)
    fmt = resolve(KVOptions(), spec(3))
    assert all(error.key == error.value == error.output == 0 for error in layer_errors(activations, fmt))
    assert propagated_errors(model, windows, activations, fmt) == (0, 0, 0)


def test_calibration_gives_what_a_cache_would_be_given(model, windows):
    """The output of attention over the captured queries, keys and values is the model's own."""
    activations = calibrate(model, windows)
    seen = []

    def attend(layer, q, k, v):
        seen.append((q, k, v))
        return activations[layer].output.flatten(0, 1)

    with torch.inference_mode():
        model(windows.flatten(), torch.arange(200).repeat(2), prepared(attend))
    for given_q, given_k, given_v, exact in ((*qkv, a) for qkv, a in zip(seen, activations, strict=True)):
        for got, kept in ((given_q, exact.query), (given_k, exact.key), (given_v, exact.value)):
            torch.testing.assert_close(got, kept.flatten(0, 1))


def test_non_finite_calibration_is_refused(model, windows):
    broken = model.layers["1"].self_attn.qkv_proj.weight
    before = broken[0, 0].item()
    with torch.inference_mode():
        broken[0, 0] = float("nan")
    try:
        with pytest.raises(UnsupportedError, match="layer 1 are not finite"):
            calibrate(model, windows)
    finally:
        with torch.inference_mode():
            broken[0, 0] = before


@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_the_outlier_is_found_in_its_head(scale):
    x = torch.rand(2, 50, 3, 16) + 1
    x[:, :, 1, 5] *= scale
    found = outlier(x)
    assert (found.head, found.channel) == (1, 5)
    assert scale / 2 < found.ratio < scale * 2


def test_channel_scales_stand_outliers_and_token_scales_do_not():
    """What the axis of the default recipe rests on: a channel 100 times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 192, heads, 32, generator=generator) for heads in (4, 2, 2))
    key[..., 7] *= 100
    query[..., 7] /= 100
    layer = AttentionLayer(4, 2, 32, 32**-0.5)
    exact_format = resolve(KVOptions(), spec(1, dim=32))
    exact = attend_packed(query, key, value, StreamFormat(), StreamFormat(), exact_format, layer)
    activations = [LayerActivations(layer, query, key, value, exact)]
    errors = {
        axis: layer_errors(activations, resolve(KVOptions(nbits_key="4", axis_key=axis), spec(1, dim=32)))[0]
        for axis in ("channel", "token")
    }
    assert errors["token"].output > 5 * errors["channel"].output
