"""Products of 8-bit weights and activations against their definitions.

Where there is a GPU they run on it; elsewhere Triton interprets them on small shapes. That they compile for an RTX 4090
and an H200 needs no GPU.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from compiled import ON_GPU, check_compiled, compiles, runs

from kvtool import layers
from kvtool.kernels import activation, norm, w8a8
from kvtool.kernels import w8a8_kernels as kernels
from kvtool.kernels.quantized_rows import FP8, QuantizedRows, quantize_rows
from kvtool.layers.linear import GatedLinear, RowLinear
from kvtool.layers.norm import RMSNorm
from kvtool.layers.quantized import EightBitMatrix
from kvtool.parallel import ONE_RANK, Shard

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
ROUNDED = DTYPES if ON_GPU else DTYPES[1:]  # Triton's interpreter cuts off what a GPU rounds to bf16
KINDS = [torch.int8, FP8]
TILES = [kernels.Tile(16, 8, 64, 1, 2), kernels.Tile(32, 16, 128, 2, 3)]
TABLED = {tile for by in kernels.TILES.values() for tiles in by.values() for tile in tiles if tile}
TILES += sorted(TABLED, key=repr) if ON_GPU else []
SHAPES = [(40, 64), (17, 200), (33, 256), (20, 1032)]
SHAPES += [(4608, 3584), (3584, 18944), (1000, 1032)] if ON_GPU else []
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
seeds = st.integers(0, 2**31 - 1)
examples = settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 100)) if ON_GPU else 12)
rows_of_x = st.integers(1, 300 if ON_GPU else 20)


def same(rows: QuantizedRows, expected: QuantizedRows) -> bool:
    """To the bit."""
    codes = torch.equal(rows.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    return codes and torch.equal(rows.scales, expected.scales) and rows.dtype == expected.dtype


def within_a_code(rows: QuantizedRows, expected: QuantizedRows) -> bool:
    """Of numbers that differ by roundings in 16 bits: a norm sums in another order where codes are stored behind it."""
    value, other = (each.codes.float() * each.scales[:, None] for each in (rows, expected))
    step = (
        expected.scales[:, None] if rows.codes.dtype == torch.int8 else other.abs() / 8 + expected.scales[:, None] / 512
    )
    return bool(((value - other).abs() <= 1.01 * step + other.abs() / 64).all())


def drawn(rows: int, shape: tuple[int, int], kind: torch.dtype, dtype: torch.dtype, bias: bool, seed: int):
    """x, weights, their scales and a bias."""
    torch.manual_seed(seed)
    x, matrix = torch.randn(rows, shape[1]), torch.randn(shape)
    weight = quantize_rows(matrix, kind)
    added = torch.randn(shape[0]).to(dtype).to(DEVICE) if bias else None
    return x.to(dtype).to(DEVICE), weight.codes.to(DEVICE), weight.scales.to(DEVICE), added


def check(out: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Against the definition of the same rounded activations, of which there is one in float32 alone."""
    exact = w8a8.w8a8_reference(x.float(), weight, scales, bias)
    assert out.shape == exact.shape
    # sm_90 keeps about 14 bits of a sum of e4m3 products (DeepSeek-V3, section 3.3.2).
    most = 2e-2 if ON_GPU and weight.dtype == FP8 else 5e-3
    assert float((out.float() - exact).norm() / exact.norm()) < most


@runs
@examples
@given(
    rows=rows_of_x,
    depth=st.sampled_from([64, 200, 3584, 18944] if ON_GPU else [64, 200]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    first=st.sampled_from([1, 0, 1e-38]),
    seed=seeds,
)
def test_rows_are_quantised_as_defined(rows, depth, kind, dtype, scale, first, seed) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, depth) * scale).to(dtype).to(DEVICE)
    x[0] *= first
    if dtype == torch.bfloat16 and not ON_GPU:  # whose subnormal numbers Triton's interpreter takes for others
        x[x.abs() < torch.finfo(dtype).smallest_normal] = 0
    assert same(kernels.quantized(x, kind), quantize_rows(x, kind))


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), exponent=st.integers(-100, 100), seed=seeds)
def test_codes_are_the_nearest(kind, exponent, seed) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, 65, dtype=torch.float64) * 2.0**exponent
    rows, largest = quantize_rows(x, kind), x.abs().amax(1, keepdim=True)
    off = (rows.codes.double() * rows.scales[:, None] - x).abs()
    # fp8: 3 bits behind the first one, or steps of 2^-9.
    most = largest / 254 if kind == torch.int8 else torch.maximum(x.abs() / 16, largest / 448 * 2**-10)
    assert (off <= most * (1 + 1e-9)).all()


@runs
@examples
@given(
    rows=rows_of_x,
    size=st.sampled_from([64, 896, 3584, 5120] if ON_GPU else [64, 200]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    first=st.booleans(),
    seed=seeds,
)
def test_a_norm_gives_what_is_quantised_after_it(rows, size, kind, dtype, first, seed) -> None:
    torch.manual_seed(seed)
    x, before = (torch.randn(rows, size).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.randn(size).to(dtype).to(DEVICE)
    x[0] = before[0] = 0
    streams = [(x.clone(), None if first else before.clone()) for _ in range(2)]
    out, stream = norm.add_rms_norm_rows(*streams[0], weight, 1e-6, kind)
    normed, expected = norm.add_rms_norm(*streams[1], weight, 1e-6)
    assert (within_a_code if ON_GPU else same)(out, quantize_rows(normed, kind))
    assert torch.equal(stream, expected)


@runs
@examples
@given(
    rows=st.integers(1, 2 * activation.FEW if ON_GPU else 6),
    size=st.sampled_from([8, 1000, 3072, 18944] if ON_GPU else [8, 1030]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_an_activation_gives_what_is_quantised_after_it(rows, size, kind, dtype, seed) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, 2 * size) * 5).to(dtype).to(DEVICE)
    x[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "FEW", activation.FEW if ON_GPU else 3)
        assert same(activation.silu_mul_rows(x, kind), quantize_rows(activation.silu_mul(x), kind))


@runs
@examples
@given(
    rows=rows_of_x,
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(ROUNDED),
    bias=st.booleans(),
    tile=st.sampled_from(TILES),
    seed=seeds,
)
def test_product(rows, shape, kind, dtype, bias, tile, seed) -> None:
    x, weight, scales, added = drawn(rows, shape, kind, dtype, bias, seed)
    out = kernels.product(kernels.quantized(x, kind), weight, scales, added, tile)
    check(out, x, weight, scales, added)


@runs
@examples
@given(
    rows=st.integers(129, 300 if ON_GPU else 132),
    shape=st.sampled_from([(48, 64), (16, 256)] + ([(4608, 3584)] if ON_GPU else [])),
    kind=st.sampled_from(KINDS if ON_GPU else KINDS[:1]),
    bias=st.booleans(),
    seed=seeds,
)
def test_product_of_many_rows(rows, shape, kind, bias, seed) -> None:
    x, weight, scales, added = drawn(rows, shape, kind, torch.bfloat16, bias, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SUMS", 1)
        out = kernels.vendor_product(quantize_rows(x, kind), weight, scales, added)
    check(out, x, weight, scales, added)


@on_gpu
@examples
@given(
    rows=rows_of_x,
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=seeds,
)
def test_linear_chooses_by_rows(rows, shape, kind, dtype, bias, seed) -> None:
    x, weight, scales, added = drawn(rows, shape, kind, dtype, bias, seed)
    out = w8a8.w8a8_linear(x, weight, scales, added)
    check(out, x, weight, scales, added)
    assert torch.equal(out, w8a8.w8a8_linear(kernels.quantized(x, kind), weight, scales, added))


@runs
@pytest.mark.parametrize("kinds", [(torch.int8, torch.int8), (FP8, FP8), (torch.int8, None), (None, FP8)])
def test_a_layer_reads_what_the_one_before_has_rounded(kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP behind its norm, some of its weights in 8 bits, against its parts one by one."""
    torch.manual_seed(0)
    options = {"dtype": torch.float16, "device": DEVICE}
    parts = {"gate_proj": Shard.whole(40), "up_proj": Shard.whole(40)}
    gate_up = GatedLinear(64, parts, bias=True, stored_merged=False, **options)
    down = RowLinear(Shard.whole(40), 64, ONE_RANK.tp, bias=False, **options)
    behind = RMSNorm(64, 1e-6, **options)
    for tensor in (gate_up.weight, gate_up.bias, down.weight, behind.weight):
        tensor.copy_(torch.randn(tensor.shape) / 8)
    for layer, kind in zip((gate_up, down), kinds, strict=True):
        if kind:
            rows = quantize_rows(layer.weight.float(), kind)
            layer.replace(EightBitMatrix(rows.codes, rows.scales))
    x, stream = (torch.randn(3, 64).to(**options) for _ in range(2))
    exact, exact_stream = behind(x.clone(), stream.clone())
    exact = down(gate_up(exact))
    for module in (w8a8, layers.linear, layers.norm):
        monkeypatch.setattr(module, "takes", lambda x: True)
    inner, stream = behind.into(gate_up, x, stream, then=down)
    assert isinstance(inner, QuantizedRows) == all(kinds)
    assert torch.equal(stream, exact_stream)
    assert float((down(inner) - exact).norm() / exact.norm()) < 1e-2


@compiles
@pytest.mark.parametrize("major", [8, 9])
def test_every_product_compiles_without_spills(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an RTX 4090 and an H200."""

    def launch() -> None:
        for kind in KINDS:
            x = torch.empty(2, 18944, dtype=torch.bfloat16)
            kernels.quantized(x, kind)
            activation.silu_mul_rows(x, kind)
            norm.add_rms_norm_rows(x[:, :8192].contiguous(), None, x[0], 1e-6, kind)
            tiles = [tile for choices in kernels.TILES[kind, major].values() for tile in choices if tile]
            for tile, depth in (
                *((tile, 512) for tile in dict.fromkeys(tiles)),
                (tiles[-1], 4112),
            ):  # in parts, with a rest
                rows = kernels.empty_rows(torch.empty(tile.rows, 0, dtype=torch.bfloat16), depth, kind)
                weight, bias = torch.empty(tile.outputs, depth, dtype=kind), torch.empty(tile.outputs, dtype=x.dtype)
                kernels.product(rows, weight, torch.empty(tile.outputs), bias, tile)

    assert check_compiled(launch, monkeypatch, {8: 89, 9: 90}[major], kernels) > 18
