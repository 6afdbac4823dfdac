"""KV formats: the arithmetic against an oracle in exact fractions, and what the options resolve to."""

import re
import struct
from itertools import pairwise
from pathlib import Path

import kv_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.errors import ConfigError, KVToolError, UnsupportedError
from kvtool.kv.codecs import CODECS, pack, unpack
from kvtool.kv.format import StreamFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.visibility import visible

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
PRESETS = Path(__file__).parents[2] / "shared" / "data" / "kvtuner-presets"


def spec(layers: int = 1, dim: int = 64, heads: int = 2) -> KVSpec:
    return KVSpec(layers, StreamSpec(heads, dim), StreamSpec(heads, dim), 2)


# What goes into a block, by name. Element 0 of every token exists; D and the number of tokens are 2 or more together.
KINDS = {
    "normal": lambda shape: torch.randn(shape),
    "constant groups": lambda shape: torch.randn(shape[:-2]).mul(100)[..., None, None].expand(shape).clone(),
    "huge outliers": lambda shape: torch.randn(shape).where(torch.rand(shape) > 0.05, 6e4 * torch.randn(shape).sign()),
    "denormals": lambda shape: torch.randn(shape) * 1e-8,
    "offset 200": lambda shape: 200 + torch.randn(shape) * 0.1,
    "zeros": lambda shape: torch.zeros(shape),
    "negative": lambda shape: -torch.rand(shape) - 1e-3,
    "signed zeros": lambda shape: torch.zeros(shape).where(torch.rand(shape) > 0.5, -0.0),
    "few values": lambda shape: torch.randint(-2, 3, shape) * 0.7,
}


@st.composite
def stream_formats(draw, head_dim: int) -> StreamFormat:
    axis, size = draw(st.sampled_from(["token", "channel"])), draw(st.sampled_from([32, 64, 128]))
    divisor = max(d for d in range(1, size + 1) if head_dim % d == 0)
    bits = draw(st.sampled_from(["8", "4", "2"]))
    return StreamFormat(bits, axis, size if axis == "channel" else divisor, draw(st.booleans()))


def block(kind: str, fmt: StreamFormat, head_dim: int, seed: int, heads: int = 1) -> torch.Tensor:
    """[heads, tokens, D] float64, every element a multiple of 2^-32: float64 arithmetic on it errs far below a tie."""
    torch.manual_seed(seed)
    tokens = fmt.group if fmt.axis == "channel" else 2
    x = KINDS[kind]((heads, tokens, head_dim)).double()
    snapped = (x * 2.0**32).round() / 2.0**32
    return snapped.copysign(x)


def scales_per_element(scale: torch.Tensor, x: torch.Tensor, fmt: StreamFormat) -> torch.Tensor:
    if fmt.axis == "channel":
        return scale.double().expand_as(x)
    return scale.double().repeat_interleave(fmt.group, dim=-1)


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(HEAD_DIMS), st.sampled_from(sorted(KINDS)), st.integers(0, 2**31))
def test_float64_is_the_oracle_bit_for_bit(data, head_dim, kind, seed):
    fmt = data.draw(stream_formats(head_dim))
    x = block(kind, fmt, head_dim, seed)
    check_against_oracle(x, fmt)


values = st.floats(-6e4, 6e4, width=32) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 65504.0, -65504.0])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(["8", "4", "2"]), st.booleans())
def test_any_group_is_the_oracle_bit_for_bit(data, bits, symmetric):
    row = data.draw(st.lists(values, min_size=8, max_size=8))
    x = torch.tensor([[row]], dtype=torch.float64)
    check_against_oracle((x * 2.0**32).round() / 2.0**32, StreamFormat(bits, "token", 8, symmetric))


def check_against_oracle(x: torch.Tensor, fmt: StreamFormat) -> None:
    codec, bits = CODECS[fmt.bits], int(fmt.bits)
    arrays = codec.encode(x, fmt)
    decoded = codec.decode(arrays, fmt, torch.float64)
    assert {name: value.dtype for name, value in arrays.items() if name != "codes"} == {
        name: torch.float16 for name in (("scale",) if fmt.symmetric else ("scale", "zero"))
    }
    for head in range(x.shape[0]):
        codes, scales, zeros, seen = kv_oracle.integer_stream(
            x[head].tolist(), bits, fmt.axis, fmt.group, fmt.symmetric
        )
        assert arrays["codes"].dtype == torch.uint8
        assert [bytes(row) for row in arrays["codes"][head].tolist()] == codes
        assert arrays["scale"][head].tolist() == scales
        if not fmt.symmetric:
            assert arrays["zero"][head].tolist() == zeros
        assert decoded[head].tolist() == seen
    error = (decoded - x).abs()
    assert (error <= scales_per_element(arrays["scale"], x, fmt) / 2).all()
    for name in set(arrays) - {"codes"}:
        assert not (arrays[name] == 0).logical_and(arrays[name].signbit()).any(), "one zero, so one sequence of bytes"


@settings(deadline=None, max_examples=100)
@given(
    st.data(),
    st.sampled_from(HEAD_DIMS),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_round_trip_in_the_models_dtype(data, head_dim, kind, dtype, seed):
    """Within scale / 2, half a unit of the dtype, and 2^-21 of the group's largest for arithmetic in float32."""
    fmt = data.draw(stream_formats(head_dim))
    x = block(kind, fmt, head_dim, seed, heads=2).to(dtype)
    codec = CODECS[fmt.bits]
    arrays = codec.encode(x, fmt)
    decoded = codec.decode(arrays, fmt, dtype)
    assert decoded.dtype == dtype and decoded.shape == x.shape
    half_unit = torch.finfo(dtype).eps / 2 * decoded.double().abs() + torch.finfo(dtype).smallest_normal
    slack = half_unit + 2.0**-21 * x.double().abs().amax() if dtype == torch.float32 else half_unit * (1 + 2.0**-10)
    error = (decoded.double() - x.double()).abs()
    assert (error <= scales_per_element(arrays["scale"], x, fmt) * (1 + 2.0**-20) / 2 + slack).all()


@pytest.mark.parametrize("bits", ["8", "4", "2"])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("offset", [200.0, -3.3, 0.0])
def test_equal_elements_come_back_exactly_or_within_half_a_step(bits, axis, symmetric, offset):
    x = torch.full((1, 32, 32), offset, dtype=torch.float64)
    fmt = StreamFormat(bits, axis, 32, symmetric)
    arrays = CODECS[bits].encode(x, fmt)
    decoded = CODECS[bits].decode(arrays, fmt, torch.float64)
    if not symmetric and offset == 200.0:
        assert arrays["scale"].unique().tolist() == [0.0]
        assert torch.equal(decoded, x)
    assert decoded.unique().numel() == 1
    assert (decoded - x).abs().max() <= arrays["scale"].double().max() / 2


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.sampled_from((32, 80, 128)), st.integers(0, 2**31))
def test_fp8_is_the_oracle(kind, head_dim, seed):
    fmt = StreamFormat("fp8", "token", head_dim)
    x = block(kind, fmt, head_dim, seed, heads=2)
    arrays = CODECS["fp8"].encode(x, fmt)
    decoded = CODECS["fp8"].decode(arrays, fmt, torch.float64)
    table = torch.tensor([kv_oracle.e4m3(code) for code in range(256)], dtype=torch.float64)
    read = table[arrays["codes"].long()] * arrays["scale"].double()
    assert torch.equal(decoded, read), "the byte means what the table says"
    assert not (arrays["codes"] & 0x7F == 0x7F).any(), "no NaN is stored"
    for head, token in ((head, token) for head in range(2) for token in range(2)):
        seen, scale = kv_oracle.fp8_row(x[head, token].tolist())
        assert arrays["scale"][head, token].tolist() == [scale]
        ours, theirs, exact = decoded[head, token], torch.tensor(seen, dtype=torch.float64), x[head, token]
        # torch rounds to fp8 by way of float32: what lies within 2^-24 of a tie may fall to either side.
        tie = ((ours - exact).abs() - (theirs - exact).abs()).abs() <= 2.0**-23 * exact.abs()
        assert ((ours == theirs) | tie).all()
        assert ((ours - exact).abs() <= (exact.abs() / 16).clamp(min=scale * 2.0**-10) * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_reads_every_byte_in_the_models_dtype(dtype):
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    arrays = {"codes": codes[None, None], "scale": torch.tensor([[[0.0123]]], dtype=torch.float16)}
    exact = torch.tensor([kv_oracle.e4m3(code) for code in codes.tolist()]).double() * arrays["scale"].double()
    decoded = CODECS["fp8"].decode(arrays, StreamFormat("fp8", "token", 254), dtype)
    assert torch.equal(decoded, exact.to(dtype))


FORMATS = [StreamFormat(b, a, 32, s) for b in ("8", "4", "2") for a in ("token", "channel") for s in (True, False)]  # type: ignore[arg-type]
REFUSING = [*FORMATS, StreamFormat("fp8", "token", 32)]


@pytest.mark.parametrize("fmt", REFUSING, ids=lambda fmt: fmt.kind + fmt.grouping)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused(fmt, bad, dtype):
    x = torch.randn(2, 32, 64 if fmt.bits != "fp8" else 32).to(dtype)
    x[1, 17, 5] = bad
    with pytest.raises(UnsupportedError, match="65,504"):
        CODECS[fmt.bits].encode(x, fmt)


@pytest.mark.parametrize("fmt", REFUSING, ids=lambda fmt: fmt.kind + fmt.grouping)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [65504.0, 65505.0, 65515.0, 65519.99, 65520.0, 1e5, 3e5, 1e6, 1e7, 3e7, 1e30])
def test_scales_and_zeros_beyond_fp16_are_refused_and_nothing_else(fmt, dtype, sign, size):
    """A scale may reach further than fp16: 8 bits of 1e5 have one of 392. What is stored is finite in any case."""
    x = torch.zeros(1, 32, 32, dtype=dtype)
    x[0, 3, 4] = sign * size
    step = 448 if fmt.bits == "fp8" else 2 ** (int(fmt.bits) - fmt.symmetric) - 1
    fits = size <= 65504 * step and not (not fmt.symmetric and sign < 0 and size > 65504)
    if not fits:
        with pytest.raises(UnsupportedError, match="65,504"):
            CODECS[fmt.bits].encode(x, fmt)
        return
    arrays = CODECS[fmt.bits].encode(x, fmt)
    assert all(arrays[name].isfinite().all() for name in arrays)
    decoded = CODECS[fmt.bits].decode(arrays, fmt, dtype)
    assert abs(decoded[0, 3, 4].item() - sign * size) <= arrays["scale"].double().max().item() / 2 * (1 + 1e-4)


@settings(deadline=None)
@given(st.sampled_from([8, 4, 2]), st.sampled_from(HEAD_DIMS), st.integers(0, 2**31))
def test_packing_is_undone_and_lies_as_documented(bits, head_dim, seed):
    codes = torch.randint(0, 2**bits, (2, 3, head_dim), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, head_dim * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    assert bytes(packed[1, 2].tolist()) == kv_oracle.pack(codes[1, 2].tolist(), bits)


def test_packing_by_example():
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0x40, 0x51, 0x62, 0x73]
    assert pack(codes % 4, 2).tolist() == [0b10001000 | 0b00, 0b11011101]
    assert pack(codes, 8).tolist() == codes.tolist()


# What others call the same: KVTuner's vanilla quantiser and quanto, from their definitions.


def kvtuner_vanilla(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0, decoded values and scale over the last axis: scale at least 1e-5 / levels, zero a whole step."""
    lowest = -(2 ** (bits - 1))
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (-lowest - 1)
        codes = (x / scale).round().clamp(lowest, -lowest - 1)
        return codes - lowest - 1, codes * scale, scale
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low).clamp(min=1e-5) / (2**bits - 1)
    shift = (low / scale).round() - lowest
    codes = (x / scale - shift).round().clamp(lowest, -lowest - 1)
    return codes - lowest, (codes + shift) * scale, scale


def on_grid(bits: int, shape: tuple[int, ...], symmetric: bool, step: float = 2.0**-5) -> torch.Tensor:
    """Groups [..., 64] that reach both ends of a scale of `step`, whose zero is a multiple of it; nothing on a tie."""
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low = -levels if symmetric else 7
    x = (torch.rand(*shape, 64, dtype=torch.float64) * (levels - low if symmetric else levels) * 1024).round()
    x = (x + (x % 1024 == 512)) / 1024 + low
    x[..., 0], x[..., -1] = low, levels if symmetric else levels + low
    return x * step


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_kvtuners_quantiser_where_its_scale_and_zero_are_ours(bits, symmetric, axis):
    torch.manual_seed(bits)
    groups = on_grid(bits, (3, 64), symmetric)
    codes, decoded, _ = kvtuner_vanilla(groups, bits, symmetric)
    fmt = StreamFormat(str(bits), axis, 64, symmetric)  # type: ignore[arg-type]
    x, codes, decoded = (v if axis == "token" else v.transpose(-1, -2) for v in (groups, codes, decoded))
    arrays = CODECS[fmt.bits].encode(x, fmt)
    assert torch.equal(unpack(arrays["codes"], bits).double(), codes)
    assert torch.equal(CODECS[fmt.bits].decode(arrays, fmt, torch.float64), decoded)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([8, 4, 2]), st.booleans(), st.floats(-50, 50), st.floats(0.01, 10), st.integers(0, 2**31))
def test_kvtuners_quantiser_elsewhere_is_a_step_away_at_most(bits, symmetric, offset, size, seed):
    """Both are within half a step of the truth, each by its own scale; ours is the wider by a rounding of fp16."""
    torch.manual_seed(seed)
    x = offset + size * torch.randn(4, 64, dtype=torch.float64)
    _, theirs, scale = kvtuner_vanilla(x, bits, symmetric)
    fmt = StreamFormat(str(bits), "token", 64, symmetric)  # type: ignore[arg-type]
    arrays = CODECS[fmt.bits].encode(x, fmt)
    ours, stored = CODECS[fmt.bits].decode(arrays, fmt, torch.float64), arrays["scale"].double()
    assert ((theirs - x).abs() <= scale / 2 * (1 + 1e-9)).all()
    assert ((ours - theirs).abs() <= (stored + scale) / 2 * (1 + 1e-9)).all()
    assert (stored >= scale * (1 - 1e-12)).all()
    zero_step = 2.0**-10 * (abs(offset) + 5 * size)  # what rounding the zero down to fp16 may add to the range
    assert (stored <= (scale + zero_step / (2**bits - 1)) * (1 + 2.0**-10)).all()


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_quanto_where_its_scale_and_zero_are_ours(bits, axis):
    """Hugging Face's QuantoQuantizedCache: quanto's MaxOptimizer and affine codes, axis 0 or -1 with groups."""
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(bits)
    groups = on_grid(bits, (2, 64), symmetric=False).float()
    x = groups if axis == "token" else groups.transpose(-1, -2).contiguous()
    quanto_axis = 0 if axis == "token" else -1
    scale, shift = quanto.MaxOptimizer()(x, quanto.qtypes[f"qint{bits}"], quanto_axis, 64)
    codes = torch.ops.quanto.quantize_affine(x, bits, quanto_axis, 64, scale, shift)
    fmt = StreamFormat(str(bits), axis, 64, symmetric=False)  # type: ignore[arg-type]
    arrays = CODECS[fmt.bits].encode(x, fmt)
    assert torch.equal(unpack(arrays["codes"], bits), quanto.ungroup(codes, quanto_axis, x.shape))
    theirs = quanto.ungroup(codes * scale - shift, quanto_axis, x.shape)
    torch.testing.assert_close(CODECS[fmt.bits].decode(arrays, fmt, torch.float32), theirs, rtol=1e-6, atol=1e-6)


# What the options resolve to.


@pytest.mark.parametrize(
    "bits, honest, block_size, residual", [("8", 8.5, 64, 0), ("4", 4.5, 64, 0), ("2", 2.75, 32, 32)]
)
def test_recipes_by_default(bits, honest, block_size, residual):
    model = spec(dim=128)
    fmt = resolve(KVOptions(nbits=bits), model)
    assert fmt.layers[0].key == StreamFormat(bits, "channel", block_size, symmetric=False)
    assert fmt.layers[0].value == StreamFormat(bits, "token", 64, symmetric=False)
    assert (fmt.block_size, fmt.residual, fmt.tail_tokens, fmt.packs_on_write) == (block_size, residual, 64, False)
    assert KVLayout(model, fmt).bits_per_element == honest


@pytest.mark.parametrize(
    "options, block_size, residual",
    [
        (KVOptions(nbits="2", residual_length=0), 64, 0),
        (KVOptions(nbits="2", q_group_size=64), 64, 0),
        (KVOptions(nbits="2", residual_length=64), 64, 64),
        (KVOptions(nbits="2", axis_key="token"), 64, 0),
        (KVOptions(nbits_key="4", nbits_value="2"), 64, 0),
        (KVOptions(nbits_key="2", nbits_value="2"), 32, 32),
        (KVOptions(nbits="4", residual_length=32), 32, 32),
        (KVOptions(nbits="4", residual_length=33), 64, 64),
    ],
)
def test_small_blocks_go_with_a_small_window(options, block_size, residual):
    fmt = resolve(options, spec())
    assert (fmt.block_size, fmt.residual) == (block_size, residual)


def test_bits_found_for_each_layer_go_before_all_others():
    options = KVOptions(nbits="4", layer_bits=(("4", "4"), ("8", "16")))
    assert [(layer.key.bits, layer.value.bits) for layer in resolve(options, spec(2)).layers] == [
        ("4", "4"),
        ("8", "16"),
    ]
    with pytest.raises(ConfigError, match="2 layers do not fit a model of 3"):
        resolve(options, spec(3))


def test_sixteen_bits_by_default():
    fmt = resolve(KVOptions(), spec(3))
    assert fmt == resolve(KVOptions(nbits="16"), spec(3))
    assert {layer.key for layer in fmt.layers} | {layer.value for layer in fmt.layers} == {StreamFormat()}
    assert fmt.packs_on_write and fmt.tail_tokens == 0
    assert KVLayout(spec(3), fmt).bits_per_element == 16


def test_keys_and_values_apart():
    fmt = resolve(KVOptions(nbits="4", nbits_key="8", axis_key="token", symmetric=True, q_group_size=32), spec(2))
    assert fmt.layers[1].key == StreamFormat("8", "token", 32, symmetric=True)
    assert fmt.layers[1].value == StreamFormat("4", "token", 32, symmetric=True)
    assert fmt.packs_on_write
    only_values = resolve(KVOptions(nbits_value="2"), spec())
    assert only_values.layers[0].key == StreamFormat() and only_values.layers[0].value.bits == "2"
    assert only_values.packs_on_write


def test_rotation_is_of_the_packed_streams_alone():
    both = resolve(KVOptions(nbits="4", axis_key="token", rotate=True), spec()).layers[0]
    assert both.key.rotate and both.value.rotate
    values = resolve(KVOptions(nbits_key="16", nbits_value="4", rotate=True), spec()).layers[0]
    assert values.value.rotate and not values.key.rotate


@pytest.mark.parametrize("dim, size, group", [(80, 64, 40), (80, 128, 80), (96, 64, 48), (96, 128, 96), (256, 64, 64)])
def test_groups_are_cut_to_the_largest_divisor_of_head_dim(dim, size, group):
    fmt = resolve(KVOptions(nbits="4", q_group_size=size), spec(dim=dim))
    assert fmt.layers[0].value.group == group
    assert f"groups of {group}" in fmt.describe()
    assert fmt.layers[0].key.group == fmt.block_size == size, "on the channel axis the group is the block"


@pytest.mark.parametrize(
    "asked, size, residual", [(None, 64, 0), (0, 32, 0), (1, 64, 64), (40, 32, 64), (512, 128, 512)]
)
def test_residual_is_rounded_up_to_blocks(asked, size, residual):
    fmt = resolve(KVOptions(nbits="4", residual_length=asked, q_group_size=size), spec())
    assert (fmt.residual, fmt.block_size, fmt.tail_tokens) == (residual, size, residual + size)


@pytest.mark.parametrize(
    "named, options",
    [
        ("--q-group-size", KVOptions(nbits="4", q_group_size=48)),
        ("--q-group-size", KVOptions(nbits="4", q_group_size=0)),
        ("--q-group-size", KVOptions(q_group_size=32)),
        ("--q-group-size", KVOptions(nbits="fp8", q_group_size=32)),
        ("--residual-length", KVOptions(nbits="4", residual_length=-1)),
        ("--residual-length", KVOptions(residual_length=64)),
        ("--axis-key", KVOptions(axis_key="token")),
        ("--axis-value", KVOptions(axis_value="channel")),
        ("--axis-key", KVOptions(nbits="fp8", axis_key="channel")),
        ("--axis-value", KVOptions(nbits="4", nbits_value="fp8", axis_value="channel")),
        ("--sym", KVOptions(symmetric=True)),
        ("--asym", KVOptions(symmetric=False)),
        ("--sym", KVOptions(nbits="fp8", symmetric=True)),
        ("--asym", KVOptions(nbits="fp8", symmetric=False)),
        ("--rotate", KVOptions(rotate=True)),
        ("--rotate", KVOptions(nbits="fp8", rotate=True)),
        ("--rotate", KVOptions(nbits="4", rotate=True)),
        ("--axis-key token", KVOptions(nbits="4", rotate=True, axis_key="channel")),
        ("--axis-value token", KVOptions(nbits="4", rotate=True, axis_key="token", axis_value="channel")),
        ("--kv-plan", KVOptions(plan="missing.yaml", nbits="4")),
        ("--nbits-key", KVOptions(plan="missing.yaml", nbits_key="4")),
        ("--nbits-value", KVOptions(plan="missing.yaml", nbits_value="4")),
    ],
)
def test_contradictions_are_refused_by_name(named, options):
    with pytest.raises(ConfigError) as refusal:
        resolve(options, spec())
    assert re.search(rf"{named}\b", str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_a_head_dim_that_does_not_fill_bytes_is_refused():
    with pytest.raises(UnsupportedError, match="head_dim 34"):
        resolve(KVOptions(nbits="2"), spec(dim=34))
    resolve(KVOptions(nbits="4"), spec(dim=34))


LATENT = KVSpec(2, StreamSpec(1, 64), StreamSpec(1, 512), 2, latent=True)


@pytest.mark.parametrize(("nbits", "rope_key"), [("16", "16"), ("8", "8"), ("4", "8"), ("2", "8"), ("fp8", "fp8")])
def test_a_rope_key_keeps_eight_bits_unless_asked_otherwise(nbits, rope_key):
    layer = resolve(KVOptions(nbits=nbits), LATENT).layers[0]
    assert (layer.key.bits, layer.value.bits) == (rope_key, nbits)
    layer = resolve(KVOptions(nbits=nbits, nbits_key="4"), LATENT).layers[0]
    assert (layer.key.bits, layer.value.bits) == ("4", nbits)
    assert resolve(KVOptions(nbits="2"), LATENT).residual == resolve(KVOptions(nbits="2"), spec()).residual > 0


@pytest.mark.parametrize(("nbits", "nbytes"), [("16", 1152), ("8", 544 + 68), ("4", 288 + 68)])
def test_a_latent_costs_a_ninth_of_what_sixteen_heads_would(nbits, nbytes):
    """512 + 64 elements; of 8 bits codes, 8 scales and zeros of a latent's groups, 2 of a rope key's block."""
    layout = KVLayout(LATENT, resolve(KVOptions(nbits=nbits), LATENT))
    assert layout.block_bytes / layout.format.block_size / LATENT.num_layers == nbytes


# Plans.


def plan_file(folder: Path, text: str | bytes) -> str:
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


KVTUNER_STYLE = "".join(
    f"{layer}:\n  nbits_key: {key}\n  nbits_value: {value}\n"
    for layer, (key, value) in enumerate([(8, 8), (4, 2), (8, 4), (2, 2), ("fp8", 16)])
)


def test_a_plan_sets_the_bits_of_each_layer(tmp_path):
    path = plan_file(tmp_path, KVTUNER_STYLE)
    fmt = resolve(KVOptions(plan=path), spec(5))
    pairs = [("8", "8"), ("4", "2"), ("8", "4"), ("2", "2"), ("fp8", "16")]
    assert [(layer.key.bits, layer.value.bits) for layer in fmt.layers] == pairs
    assert {layer.key.axis for layer in fmt.layers[:4]} == {"channel"}
    assert "1×K8V8 1×K4V2 1×K8V4 1×K2V2 1×Kfp8V16" in fmt.describe()
    token = resolve(KVOptions(plan=path, axis_key="token", residual_length=32, symmetric=True), spec(5))
    assert {layer.key.axis for layer in token.layers} == {"token"} and token.residual == 64
    assert KVLayout(spec(5), fmt).block_bytes == sum(
        KVLayout(spec(5), fmt).layer_block_bytes(layer) for layer in range(5)
    )


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")) or [None], ids=lambda p: p.stem if p else "none")
def test_kvtuners_own_presets_load(path):
    if path is None:
        pytest.skip("KVTuner's presets are not on this machine")
    depth = path.read_text().count("nbits_key")
    for axis in ("token", "channel"):
        fmt = resolve(KVOptions(plan=str(path), axis_key=axis), spec(depth, dim=128))
        assert len(fmt.layers) == depth in (28, 32)
        assert 2 < KVLayout(spec(depth, dim=128), fmt).bits_per_element < 8.6
    with pytest.raises(ConfigError, match=f"0 to {depth}; found {depth} entries"):
        resolve(KVOptions(plan=str(path)), spec(depth + 1))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("0: {nbits_key: 4, nbits_value: 4}", "0 to 1; found 1 entries"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}\n2: {}", "0 to 1; found 3 entries"),
        ("{}", "found 0 entries"),
        ("", "found no mapping"),
        ("- 4\n- 4", "found no mapping"),
        ("0: {nbits_key: 4, nbits_value: 4}\n2: {nbits_key: 4, nbits_value: 4}", "0 to 1"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 3}", "layer 1: nbits_value is '3'"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4}", "layer 1: nbits_value is 'missing'"),
        ('0: {nbits_key: "4\\n", nbits_value: 4}\n1: {nbits_key: 4}', "layer 0: nbits_key is '4\\n'"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: 4", "layer 1: nbits_key"),
        ("0: {nbits_key: 4.0, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key is '4.0'"),
        ("0: {nbits_key: null, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key"),
        ("0: {nbits_key: [4], nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key"),
        ("0: {nbits_key: 4", "is not YAML"),
        ("0: !!python/object/apply:os.system ['true']\n1: 2", "is not YAML"),
        ("!!python/object:collections.OrderedDict {}", "is not YAML"),
        (f"0: {{nbits_key: 0x{'f' * 5000}}}\n1: 2", "layer 0: nbits_key"),
        ("#" * ((1 << 20) + 1), "is larger than"),
        ("0: 2020-99-99\n1: 2", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("? [0]\n: 4", "is not YAML"),
        (b"\xff\xfe\x00\x01binary", "is not YAML"),
        ("0: \x00", "is not YAML"),
    ],
)
def test_unusable_plans_are_refused_in_one_line(tmp_path, text, complaint):
    path = plan_file(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        resolve(KVOptions(plan=path), spec(2))
    message = str(refusal.value)
    assert message.startswith(f"plan {path}: ") and complaint in message
    assert "\n" not in message


def test_a_plan_that_expands_without_end_is_refused_in_one_short_line(tmp_path):
    """Seven levels of tenfold aliases: no message may spell them out."""
    names = "abcdefg"
    bomb = [f"&a [{', '.join('x' * 10)}]"]
    bomb += [f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise(names)]
    for value in (f"{{nbits_key: [{', '.join(bomb)}], nbits_value: 4}}", f"[{', '.join(bomb)}]"):
        path = plan_file(tmp_path, f"0: {value}\n1: {{nbits_key: 4, nbits_value: 4}}\n")
        with pytest.raises(ConfigError, match="layer 0: nbits_key") as refusal:
            resolve(KVOptions(plan=path), spec(2))
        assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name, complaint", [("missing.yaml", "No such file"), (".", "Is a directory")])
def test_plans_that_cannot_be_read(tmp_path, name, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(KVOptions(plan=str(tmp_path / name)), spec())


def test_a_plan_below_a_file_cannot_be_read(tmp_path):
    path = plan_file(tmp_path, KVTUNER_STYLE)
    with pytest.raises(ConfigError, match=r"plan .*plan\.yaml/x: Not a directory"):
        resolve(KVOptions(plan=f"{path}/x"), spec())


# Laws.


@st.composite
def options(draw) -> KVOptions:
    bits = st.sampled_from([None, "16", "8", "4", "2", "fp8"])
    axis = st.sampled_from([None, "token", "channel"])
    return KVOptions(
        nbits=draw(bits),
        nbits_key=draw(bits),
        nbits_value=draw(bits),
        axis_key=draw(axis),
        axis_value=draw(axis),
        symmetric=draw(st.sampled_from([None, True, False])),
        q_group_size=draw(st.sampled_from([None, 32, 64, 128])),
        residual_length=draw(st.sampled_from([None, 0, 1, 32, 128, 512])),
        rotate=draw(st.sampled_from([None, True, False])),
    )


@settings(deadline=None, max_examples=400)
@given(options(), st.sampled_from(HEAD_DIMS), st.lists(st.integers(0, 3000), min_size=1, max_size=30))
def test_every_format_keeps_the_laws(asked, dim, positions):
    """Each set of options is refused by name or gives a format that says itself in one line and keeps the laws."""
    try:
        fmt = resolve(asked, spec(2, dim))
    except KVToolError as refusal:
        assert str(refusal).startswith("--")
        return
    line = fmt.describe()
    assert line and "\n" not in line
    assert fmt.residual % fmt.block_size == 0 and fmt.residual >= (asked.residual_length or 0)
    for stream in (fmt.layers[0].key, fmt.layers[0].value):
        assert stream.bits == "16" or dim % stream.group == 0 or stream.axis == "channel"
        assert stream.axis == "token" or stream.group == fmt.block_size
        assert not (stream.rotate and stream.axis == "channel")
    for t in positions:
        first, after = fmt.visible(t), fmt.visible(t + 1)
        assert first <= after, "what is packed stays packed"
        assert fmt.packed_tokens(t) <= t, "no token is packed before it is computed"
        assert first <= (t + 1 if fmt.packs_on_write else fmt.packed_tokens(t)), "what a query reads has been packed"
        assert t + 1 - fmt.packed_tokens(t) <= max(fmt.tail_tokens, fmt.packs_on_write), "the tail holds the rest"
        assert (fmt.num_blocks(t) - 1) * fmt.block_size < fmt.packed_tokens(t) <= fmt.num_blocks(t) * fmt.block_size
        if not fmt.packs_on_write:
            assert after - first in (0, fmt.block_size), "a step seals one block or none"
            assert first == visible(t, fmt.block_size, fmt.residual) == fmt.packed_tokens(t)
            assert fmt.num_blocks(t) * fmt.block_size == first


@given(st.integers(0, 10**6), st.sampled_from([32, 64, 128, 256]), st.integers(0, 16))
def test_tail_never_exceeds_its_slot(position, block_size, residual_blocks):
    residual = residual_blocks * block_size
    first = visible(position, block_size, residual)
    assert first % block_size == 0
    assert residual <= position - first <= residual + block_size - 1 or first == 0
    assert position - first + 1 <= residual + block_size


def test_fp16_table_of_the_oracle():
    assert len(kv_oracle.FP16) == 2 * 0x7C00 and kv_oracle.FP16[-1] == 65504
    assert struct.pack("<e", kv_oracle.FP16[0]) == b"\xff\xfb"
    codes = torch.arange(256, dtype=torch.uint8)
    ours = torch.tensor([kv_oracle.e4m3(code) for code in range(256)])
    theirs = codes.view(torch.float8_e4m3fn).float()
    finite = codes & 0x7F != 0x7F
    assert torch.equal(ours[finite], theirs[finite]) and theirs[~finite].isnan().all()
