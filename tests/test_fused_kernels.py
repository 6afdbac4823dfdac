"""The kernels of a decoder layer against the layers' own torch code in float64.

Where there is a GPU they run on it; elsewhere Triton interprets them on small shapes. That they compile for an RTX 4090
needs no GPU.
"""

import os
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.kernels.rotary_heads import RotaryHeads
from kvtool.layers.linear import gated_linear
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.layers.rotary import Rope, Rotary

pytest.importorskip("triton")

from compiled import ON_GPU, check_compiled, compiles, runs

from kvtool.kernels import gemv as products
from kvtool.kernels.activation import silu_mul
from kvtool.kernels.gemv import Prologue, Tile, gemv, norm_gemv, tile_for
from kvtool.kernels.norm import add_rms_norm
from kvtool.kernels.rope import norm_rotate

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]  # the interpreter multiplies no bf16
TILES = [
    Tile(1, 512, 2),
    Tile(4, 128, 2),
    Tile(2, 128, 1, 3),
    Tile(16, 64, 1, 2, dot=True),
    Tile(32, 128, 2, 3, dot=True),
]
TABLED = sorted({tile for entries in products.TILES.values() for *_, tile in entries}, key=repr)
TILES += TABLED if ON_GPU else []
SHAPES = [(8, 64), (40, 200), (12, 1024)]  # outputs and columns of a product
SHAPES += [(4608, 3584), (1536, 8960), (1000, 1032), (130, 4864), (50000, 896)] if ON_GPU else []

examples = settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 200 if ON_GPU else 6)))
seeds = st.integers(0, 2**31)
tokens = st.integers(1, 300 if ON_GPU else 4)
sizes = st.sampled_from([64, 200, 896, 3584, 5120] if ON_GPU else [64, 200])


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.cpu().double() - exact).norm() / exact.norm())


@runs
@examples
@given(
    tokens, sizes, st.booleans(), st.sampled_from([1e-3, 1.0, 100.0]), st.sampled_from(DTYPES), st.integers(0, 2**31)
)
def test_add_rms_norm(tokens: int, size: int, first: bool, scale: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layer = RMSNorm(size, 1e-6, dtype=torch.float64, device=CPU)
    weight = drawn(size, dtype=dtype)
    layer.weight.copy_(weight)
    x, residual = (drawn(tokens, size, dtype=dtype, scale=scale) for _ in range(2))
    before = None if first else residual
    exact, exact_stream = layer(x.cpu().double(), None if first else residual.cpu().double())
    out, stream = add_rms_norm(x, before, weight, 1e-6)
    assert error(out, exact) < 5e-3
    assert error(stream, exact_stream) < 5e-3
    assert stream.data_ptr() == (x if first else residual).data_ptr()


@runs
@examples
@given(
    tokens, st.sampled_from([8, 1000, 18944] if ON_GPU else [8, 1030]), st.sampled_from(DTYPES), st.integers(0, 2**31)
)
def test_silu_mul(tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = drawn(tokens, 2 * size, dtype=dtype, scale=5)
    gate, up = x.cpu().double().chunk(2, -1)
    assert error(silu_mul(x), torch.nn.functional.silu(gate) * up) < 5e-3


@runs
@examples
@given(
    tokens=tokens,
    heads=st.tuples(st.integers(1, 8 if ON_GPU else 2), st.integers(1, 16 if ON_GPU else 5)),
    shape=st.sampled_from([(64, 64), (80, 80), (96, 96), (96, 72), (128, 128), (128, 64), (256, 256)]),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_norm_and_rotation(
    tokens: int, heads: tuple[int, int], shape: tuple[int, int], norm: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    num_kv_heads, num_heads, (dim, rotated) = heads[0], heads[0] * heads[1], shape
    exact_norm, own_norm = None, None
    if norm:
        exact_norm, own_norm = (
            QKNorm(num_heads, num_kv_heads, dim, 1e-6, dtype=dtype, device=device)
            for dtype, device in ((torch.float64, CPU), (dtype, DEVICE))
        )
        own_norm.weight.copy_(drawn(2, dim, dtype=dtype))
        exact_norm.weight.copy_(own_norm.weight)
    made = drawn(tokens, num_heads + 2 * num_kv_heads, dim, dtype=dtype)
    rotary = Rotary(Rope(rotated, 1e4), 1000, dtype=dtype, device=DEVICE)
    turns = rotary(torch.randint(1000, (tokens,)).to(DEVICE))
    exact = RotaryHeads(made.cpu().double(), num_heads, *(x.cpu().double() for x in turns), exact_norm)
    for out, expected in zip(norm_rotate(RotaryHeads(made, num_heads, *turns, own_norm)), exact.rotated(), strict=True):
        assert error(out, expected) < 5e-3


@runs
@examples
@given(
    rows=st.integers(1, products.MAX_ROWS if ON_GPU else 20),
    shape=st.sampled_from(SHAPES),
    bias=st.booleans(),
    gated=st.booleans(),
    tile=st.sampled_from(TILES),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_gemv(
    rows: int, shape: tuple[int, int], bias: bool, gated: bool, tile: Tile, dtype: torch.dtype, seed: int
) -> None:
    rows = rows if tile.dot else min(rows, 4)
    torch.manual_seed(seed)
    weight, x = drawn(*shape, dtype=dtype), drawn(rows, shape[1], dtype=dtype, scale=0.1)
    added = drawn(shape[0], dtype=dtype) if bias else None
    out = gemv(x, weight, added, tile, gated=gated)
    assert out.shape == (rows, shape[0] // 2 if gated else shape[0])
    exact_of: Callable[..., Tensor] = gated_linear if gated else torch.nn.functional.linear
    exact = exact_of(x.double(), weight.double(), None if added is None else added.double())
    assert error(out, exact.cpu()) < 5e-3


@runs
@examples
@given(
    rows=st.integers(1, 4),
    shape=st.sampled_from(SHAPES),
    first=st.booleans(),
    gated=st.booleans(),
    tile=st.sampled_from([tile for tile in TILES if not tile.dot]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_a_norm_within_the_product(
    rows: int, shape: tuple[int, int], first: bool, gated: bool, tile: Tile, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, bias, gain = (
        drawn(*shape, dtype=dtype, scale=0.1),
        drawn(shape[0], dtype=dtype),
        drawn(shape[1], dtype=dtype),
    )
    x, before = (drawn(rows, shape[1], dtype=dtype) for _ in range(2))
    layer = RMSNorm(shape[1], 1e-6, dtype=torch.float64, device=CPU)
    layer.weight.copy_(gain)
    residual = None if first else before
    out, stream = norm_gemv(x, Prologue(residual, gain, 1e-6), weight, bias, tile, gated=gated)
    normed, exact_stream = layer(x.cpu().double(), None if first else before.cpu().double())
    exact = (gated_linear if gated else torch.nn.functional.linear)(normed, weight.cpu().double(), bias.cpu().double())
    assert error(out, exact) < 5e-3
    assert error(stream, exact_stream) < 5e-3


@compiles
def test_every_kernel_compiles_for_a_4090_without_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {(rows, tile) for (major, rows), entries in products.TILES.items() for *_, tile in entries if major == 8}

    def launch() -> None:
        for size in (896, 3584, 8192):
            x = torch.empty(3, size, dtype=torch.bfloat16)
            add_rms_norm(x, x.clone(), x[0], 1e-6)
        silu_mul(x)
        for dim, rotated in ((64, 64), (96, 72), (256, 256)):
            cos, sin = Rotary(Rope(rotated, 1e4), 10, dtype=torch.bfloat16, device=CPU)(torch.arange(3))
            norm = QKNorm(5, 2, dim, 1e-6, dtype=torch.bfloat16, device=CPU)
            norm_rotate(RotaryHeads(torch.empty(3, 9, dim, dtype=torch.bfloat16), 5, cos, sin, norm))
        for (rows, tile), gated in product(sorted(tiles, key=repr), (False, True)):
            weight = torch.empty(16 * tile.outputs, tile.depth + 16, dtype=torch.bfloat16)
            x, bias = weight[:rows].contiguous(), weight[:, 0].contiguous()
            gemv(x, weight, bias, tile, gated=gated)
            if not tile.dot:
                norm_gemv(x, Prologue(x, x[0], 1e-6), weight, bias, tile, gated=gated)

    assert check_compiled(launch, monkeypatch) > 6


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_captured_chain_computes_what_its_inputs_say_at_replay() -> None:
    """Kernels that start before the last one ends read nothing too early, in a graph as well."""
    torch.manual_seed(0)
    size, weights = 2048, [drawn(2048, 2048, dtype=torch.bfloat16, scale=0.02) for _ in range(20)]
    gain, x = torch.ones(size, dtype=torch.bfloat16, device=DEVICE), drawn(1, size, dtype=torch.bfloat16)

    def chain(x: Tensor) -> Tensor:
        residual = None
        for weight in weights:
            y, residual = add_rms_norm(x, residual, gain, 1e-6)
            x = gemv(y, weight, None, Tile(4, 1024, 4))
        return x

    chain(x.clone())
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(static)
    for _ in range(20):
        x = drawn(1, size, dtype=torch.bfloat16)
        static.copy_(x)
        graph.replay()
        replayed, stream = out.clone(), None
        torch.cuda.synchronize()
        y = x.clone()
        for weight in weights:  # one kernel at a time
            z, stream = add_rms_norm(y, stream, gain, 1e-6)
            torch.cuda.synchronize()
            y = gemv(z, weight, None, Tile(4, 1024, 4))
            torch.cuda.synchronize()
        assert torch.equal(replayed, y)


def test_only_few_rows_of_16_bits_have_a_tile() -> None:
    weight = drawn(64, 64, dtype=torch.bfloat16)
    assert tile_for(drawn(1, 64, dtype=torch.bfloat16), weight) is not None
    assert tile_for(drawn(products.MAX_ROWS + 1, 64, dtype=torch.bfloat16), weight) is None
    assert tile_for(drawn(1, 64, dtype=torch.float32), weight) is None
    assert tile_for(drawn(1, 64, dtype=torch.bfloat16), weight[:1]) is None
    assert tile_for(drawn(0, 64, dtype=torch.bfloat16), weight) is None  # of a step that samples nothing
