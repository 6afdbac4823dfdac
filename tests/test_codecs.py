"""The arithmetic of KV formats, against an oracle in exact fractions."""

import struct

import kv_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import UnsupportedError
from kvtool.kv.codecs import CODECS, pack, unpack
from kvtool.kv.format import StreamFormat

HEAD_DIMS = (32, 64, 80, 96, 128, 256)

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


def test_fp16_table_of_the_oracle():
    assert len(kv_oracle.FP16) == 2 * 0x7C00 and kv_oracle.FP16[-1] == 65504
    assert struct.pack("<e", kv_oracle.FP16[0]) == b"\xff\xfb"
    codes = torch.arange(256, dtype=torch.uint8)
    ours = torch.tensor([kv_oracle.e4m3(code) for code in range(256)])
    theirs = codes.view(torch.float8_e4m3fn).float()
    finite = codes & 0x7F != 0x7F
    assert torch.equal(ours[finite], theirs[finite]) and theirs[~finite].isnan().all()
