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

from kvtool.kernels import w8a8
from kvtool.kernels import w8a8_kernels as kernels

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
KINDS = [torch.int8, w8a8.FP8]
TILES = [kernels.Tile(16, 8, 64, 1, 2), kernels.Tile(32, 16, 128, 2, 3)]
TILES += sorted({tile for by in kernels.TILES.values() for tile in by.values()}, key=repr) if ON_GPU else []
SHAPES = [(40, 64), (17, 200), (33, 256), (20, 1032)]
SHAPES += [(4608, 3584), (3584, 18944), (1000, 1032)] if ON_GPU else []
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
seeds = st.integers(0, 2**31 - 1)
examples = settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 100)) if ON_GPU else 12)
rows_of_x = st.integers(1, 300 if ON_GPU else 20)


def rounded(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return w8a8.int8_rows(x) if kind == torch.int8 else w8a8.fp8_rows(x)


def drawn(rows: int, shape: tuple[int, int], kind: torch.dtype, dtype: torch.dtype, bias: bool, seed: int):
    """x, weights, their scales and a bias."""
    torch.manual_seed(seed)
    x, matrix = torch.randn(rows, shape[1]), torch.randn(shape)
    weight, scales = rounded(matrix, kind)
    added = torch.randn(shape[0]).to(dtype).to(DEVICE) if bias else None
    return x.to(dtype).to(DEVICE), weight.to(DEVICE), scales.to(DEVICE), added


def check(out: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Against the definition of the same rounded activations, of which there is one in float32 alone."""
    reference = w8a8.w8a8_reference if weight.dtype == torch.int8 else w8a8.fp8_reference
    exact = reference(x.float(), weight, scales, bias)
    assert out.shape == exact.shape
    # sm_90 keeps about 14 bits of a sum of e4m3 products (DeepSeek-V3, section 3.3.2).
    most = 2e-2 if ON_GPU and weight.dtype == w8a8.FP8 else 5e-3
    assert float((out.float() - exact).norm() / exact.norm()) < most


@runs
@examples
@given(
    rows=rows_of_x,
    depth=st.sampled_from([64, 200, 3584, 18944] if ON_GPU else [64, 200]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    empty=st.booleans(),
    seed=seeds,
)
def test_rows_are_quantised_as_defined(rows, depth, kind, dtype, scale, empty, seed) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, depth) * scale).to(dtype).to(DEVICE)
    if empty:
        x[0] = 0
    codes, scales = kernels.quantized(x, kind)
    exact_codes, exact_scales = rounded(x, kind)
    assert torch.equal(scales, exact_scales)
    assert torch.equal(codes.view(torch.uint8), exact_codes.view(torch.uint8))


@runs
@examples
@given(
    rows=rows_of_x,
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    tile=st.sampled_from(TILES),
    seed=seeds,
)
def test_product(rows, shape, kind, dtype, bias, tile, seed) -> None:
    x, weight, scales, added = drawn(rows, shape, kind, dtype, bias, seed)
    out = kernels.product(*kernels.quantized(x, kind), weight, scales, added, tile, dtype)
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
        out = kernels.vendor_product(*rounded(x, kind), weight, scales, added, x.dtype)
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
    linear = w8a8.w8a8_linear if kind == torch.int8 else w8a8.fp8_linear
    check(linear(x, weight, scales, added), x, weight, scales, added)


@compiles
@pytest.mark.parametrize("major", [8, 9])
def test_every_product_compiles_without_spills(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an RTX 4090 and an H200."""

    def launch() -> None:
        for kind in KINDS:
            kernels.quantized(torch.empty(2, 18944, dtype=torch.bfloat16), kind)
            tiles = kernels.TILES[kind, major]
            for rows, depth in (*((rows, 512) for rows in tiles), (max(tiles), 4112)):  # in parts, with a rest
                tile = tiles[rows]
                codes, weight = torch.empty(rows, depth, dtype=kind), torch.empty(tile.outputs, depth, dtype=kind)
                scales, bias = torch.empty(tile.outputs), torch.empty(tile.outputs, dtype=torch.bfloat16)
                kernels.product(codes, scales, weight, scales, bias, tile, torch.bfloat16)

    assert check_compiled(launch, monkeypatch, {8: 89, 9: 90}[major], kernels) == 15
