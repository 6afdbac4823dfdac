"""Products with 4-bit weights against their definition in float64.

Where there is a GPU they run on it; elsewhere, on small shapes, an emulator runs them. That they compile for an RTX
4090 and an H200 needs no GPU.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import emulator
from compiled import ON_GPU, STACK, usage

from kvtool.kernels import nvrtc, w4a16, w4a16_gemv, w4a16_kernels, w4a16_stream

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
TILES = [w4a16_stream.Tile(1, 4, 8, 4, 1), w4a16_stream.Tile(4, 8, 4, 3, 1)]
TILES += [
    tile
    for (together, _), entries in w4a16_stream.TILES.items()
    for _, tile in entries
    if together == w4a16_stream.multiplies_together(DEVICE)
]
GEMV_TILES = [w4a16_gemv.Tile(1, 2, 2, 1), w4a16_gemv.Tile(2, 4, 1, 1)]
GEMV_TILES += [tile for entries in w4a16_gemv.TILES.values() if ON_GPU for _, tile in entries]
# Outputs, columns and how many of these share a scale.
SHAPES = [(40, 64, 32), (17, 192, 64), (33, 256, 128), (48, 384, 384), (16, 160, 160), (24, 1024, 64)]
# What the emulator is compiled for: a shape, a dtype, products of 8 rows and a tile.
GEMV_VARIANTS = [
    (SHAPES[0], torch.float16, 1, w4a16_gemv.Tile(1, 2, 2, 1)),
    (SHAPES[1], torch.bfloat16, 2, w4a16_gemv.Tile(2, 4, 1, 1)),
    (SHAPES[2], torch.float16, 2, w4a16_gemv.Tile(2, 2, 3, 1)),
    (SHAPES[3], torch.bfloat16, 1, w4a16_gemv.Tile(1, 4, 2, 1)),
]
# A shape, a dtype, a tile, and whether four warps multiply together.
VARIANTS = [
    (SHAPES[0], torch.float16, w4a16_stream.Tile(1, 1, 4, 2, 1), False),
    ((32, 192, 64), torch.bfloat16, w4a16_stream.Tile(2, 2, 4, 3, 1), False),
    (SHAPES[4], torch.bfloat16, w4a16_stream.Tile(1, 4, 4, 3, 1), True),
    (SHAPES[5], torch.float16, w4a16_stream.Tile(1, 8, 4, 4, 1), True),
    ((136, 384, 384), torch.bfloat16, w4a16_stream.Tile(2, 16, 4, 4, 1), True),
    ((40, 256, 128), torch.float16, w4a16_stream.Tile(1, 32, 4, 3, 1), True),
]
SHAPES += [(4608, 3584, 128), (3584, 18944, 128), (1000, 1056, 32), (50000, 896, 896)] if ON_GPU else []
STREAMED = [shape for shape in SHAPES if shape[0] % w4a16_stream.OUTPUTS == 0]
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
seeds = st.integers(0, 2**31 - 1)
examples = settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 100)) if ON_GPU else 12)


@dataclass
class Case:
    """Drawn arguments of `w4a16_linear`; `whole`: zeros are codes, else anything."""

    rows: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    bias: bool
    whole: bool
    seed: int

    def arguments(self, device: torch.device = DEVICE) -> list[Tensor]:
        torch.manual_seed(self.seed)
        outputs, depth, group = self.shape
        codes = torch.randint(16, (outputs, depth), dtype=torch.uint8)
        scales = (torch.rand(outputs, depth // group) + 0.5) / depth**0.5
        zeros = torch.randint(17, scales.shape) if self.whole else torch.rand_like(scales) * 15
        x, bias = torch.randn(self.rows, depth), torch.randn(outputs)
        grids = [w4a16.by_group(grid.to(self.dtype)) for grid in (scales, zeros)]
        tensors = [x, w4a16.pack_w4(codes), *grids, bias if self.bias else None]
        return [None if x is None else x.to(device, None if x.dtype == torch.uint8 else self.dtype) for x in tensors]


def error(out: Tensor, arguments: list[Tensor]) -> float:
    x, weight, scales, zeros, bias = arguments
    exact = w4a16.w4a16_reference(x.double(), weight, scales.double(), zeros.double(), bias)
    return float((out.double() - exact).norm() / exact.norm())


GemvVariant = tuple[tuple[int, int, int], torch.dtype, int, w4a16_gemv.Tile]
Variant = tuple[tuple[int, int, int], torch.dtype, w4a16_stream.Tile, bool]
cases = st.builds(
    Case,
    rows=st.integers(1, 300 if ON_GPU else 20),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    whole=st.booleans(),
    seed=seeds,
)


@given(st.integers(1, 5), st.sampled_from([2, 6, 32, 48, 64, 160]), seeds)
def test_codes_come_back(outputs: int, depth: int, seed: int) -> None:
    codes = torch.randint(16, (outputs, depth), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = w4a16.pack_w4(codes)
    assert packed.shape == (outputs, depth // 2)
    assert torch.equal(w4a16.unpack_w4(packed), codes)


@settings(deadline=None, max_examples=12)
@given(case=cases, rows=st.booleans(), seed=seeds)
def test_matrix_decoded_to_memory(case: Case, rows: bool, seed: int) -> None:
    case.shape, case.dtype = [(SHAPES[1], torch.bfloat16), (SHAPES[4], torch.float16)][rows]
    grids = case.arguments(torch.device("cpu"))[1:4]
    some = [x[3:] for x in grids]  # of all outputs
    out = torch.full((len(some[0]), case.shape[1]), float("nan"), dtype=case.dtype)
    macros = w4a16_kernels.constants(out, some[1], True) | {"CHAINED": 1}
    library = emulator.build("w4a16_decode.cu", "w4a16_decode", tuple(macros.items()))
    emulator.launch(library, w4a16_kernels.grid(out), w4a16_kernels.arguments(*some, out), seed)
    assert torch.equal(out, w4a16.dequantize_w4(*grids, case.dtype)[3:])


@on_gpu
@examples
@given(cases, st.sampled_from([1 << 12, 1 << 20]))
def test_product_of_a_matrix_decoded_to_memory(case: Case, piece: int) -> None:
    arguments = case.arguments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w4a16_kernels, "DECODED", piece)
        assert error(w4a16_kernels.decoded_product(*arguments), arguments) < 5e-3


@settings(deadline=None, max_examples=12)
@given(case=cases, variant=st.sampled_from(GEMV_VARIANTS), seed=seeds)
def test_warps_share_columns(case: Case, variant: GemvVariant, seed: int) -> None:
    case.shape, case.dtype, columns, tile = variant
    case.rows = 8 * columns - case.rows % 8
    x, weight, scales, *_ = arguments = case.arguments(torch.device("cpu"))
    macros = w4a16_gemv.constants(x, scales, tile, x.device) | {"CHAINED": 1}
    out = torch.full((len(x), len(weight)), float("nan"), dtype=case.dtype)
    library = emulator.build("w4a16_gemv.cu", "w4a16_gemv", tuple(macros.items()))
    grid = (-(-len(weight) // (16 * tile.tiles)), 1)
    emulator.launch(library, grid, w4a16_gemv.arguments(*arguments, out), seed)
    assert error(out, arguments) < 5e-3


@settings(deadline=None, max_examples=20)
@given(case=cases, variant=st.sampled_from(VARIANTS), programs=st.integers(1, 9), seed=seeds)
def test_programs_share_tiles(case: Case, variant: Variant, programs: int, seed: int) -> None:
    case.shape, case.dtype, tile, together = variant
    x, weight, scales, *_ = arguments = case.arguments(torch.device("cpu"))
    programs, share = w4a16_stream.grid(x, weight, tile, programs)
    macros = w4a16_stream.constants(x, scales, tile, together, True)
    out = torch.full((len(x), len(weight)), float("nan"), dtype=case.dtype)
    partial = torch.full((programs, 2, tile.outputs * tile.rows), float("nan"))
    arrivals = torch.zeros(programs, dtype=torch.int32)
    values = w4a16_stream.arguments(*arguments, out, partial, arrivals, share)
    library = emulator.build("w4a16_stream.cu", "w4a16", tuple(macros.items()))
    emulator.launch(library, (programs, 1), values, seed)
    assert error(out, arguments) < 5e-3
    assert not arrivals.any()


@on_gpu
@examples
@given(cases, st.sampled_from(GEMV_TILES))
def test_gemv(case: Case, tile: w4a16_gemv.Tile) -> None:
    case.rows = 1 + case.rows % w4a16_gemv.MAX_ROWS
    arguments = case.arguments()
    assert error(w4a16_gemv.gemv(*arguments, tile), arguments) < 5e-3


@on_gpu
@examples
@given(cases, st.sampled_from(TILES))
def test_product(case: Case, tile: w4a16_stream.Tile) -> None:
    case.shape = STREAMED[case.seed % len(STREAMED)]
    arguments = case.arguments()
    assert error(w4a16_stream.product(*arguments, tile), arguments) < 5e-3


@on_gpu
@examples
@given(cases)
def test_linear(case: Case) -> None:
    arguments = case.arguments()
    assert error(w4a16.w4a16_linear(*arguments), arguments) < 5e-3


@pytest.mark.parametrize(
    ("rows", "has_nvrtc", "together", "large", "chosen"),
    [
        (1, True, False, False, "gemv"),
        (16, True, False, True, "gemv"),
        (17, True, False, False, "product"),
        (128, True, False, True, "product"),
        (129, True, False, True, "decoded_product"),
        (512, True, True, False, "product"),
        (513, True, True, False, "decoded_product"),
        (1024, True, True, True, "product"),
        (1025, True, True, True, "decoded_product"),
        (0, True, True, False, "decoded_product"),
        (1, False, False, False, "w4a16_reference"),
    ],
)
def test_linear_chooses_by_rows(
    rows: int, has_nvrtc: bool, together: bool, large: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(w4a16_stream, "LARGE", 40 * 64 + 1 - large)
    monkeypatch.setattr(w4a16, "takes", lambda x: True)
    monkeypatch.setattr(w4a16_stream, "multiplies_together", lambda device: together)
    monkeypatch.setattr(w4a16_kernels, "compiles", lambda: has_nvrtc)
    kernels = [(w4a16_gemv, "gemv"), (w4a16_stream, "product"), (w4a16_kernels, "decoded_product")]
    for module, name in [*kernels, (w4a16, "w4a16_reference")]:
        monkeypatch.setattr(module, name, lambda *arguments, name=name: called.append(name))
    w4a16.w4a16_linear(*Case(rows, SHAPES[0], torch.float16, True, True, 0).arguments())
    assert called == [chosen]


def programs(major: int) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Source, architecture and macros of all that the tables have, in wide groups, which take the most registers."""
    architecture, chain = {8: "sm_89", 9: "sm_90"}[major], major >= 9
    x, _, scales, *_ = Case(16, (16, 256, 128), torch.bfloat16, True, True, 0).arguments(torch.device("cpu"))
    for (of, columns), entries in w4a16_gemv.TILES.items():
        for _, tile in entries if of == major else ():
            macros = w4a16_gemv.constants(x[: 8 * columns], scales, tile, x.device) | {"CHAINED": int(chain)}
            yield w4a16_gemv.SOURCE, architecture, macros
    for (together, _), entries in w4a16_stream.TILES.items():
        for _, tile in entries if major >= 9 or not together else ():
            for group in (128, 32):
                fitted = tile.fitted(group, {8: 100, 9: 228}[major])
                bound = f"static_assert(shared_bytes == STAGES * {fitted.stage_bytes(group)});"
                macros = w4a16_stream.constants(x, scales, fitted, together, chain) | {"GROUP": group}
                yield w4a16_stream.SOURCE + bound, architecture + "a" * together, macros
    yield w4a16_kernels.SOURCE, architecture, w4a16_kernels.constants(x, scales, chain) | {"PER_SM": 1}


@pytest.mark.parametrize(("major", "shared"), [(8, 100), (9, 228)])
def test_programs_fit_a_multiprocessor_without_spills(major: int, shared: int) -> None:
    """As many as the tables say, for an RTX 4090 and an H200."""
    if reason := nvrtc.refuses_to_compile():
        pytest.skip(reason)
    for source, architecture, macros in programs(major):
        bound = f"static_assert((shared_bytes + 1024) * PER_SM <= {shared << 10});"
        used = usage(nvrtc.compile_cubin(source + bound, architecture, macros))
        assert used["REG"] * 32 * int(str(macros["WARPS"])) * int(str(macros["PER_SM"])) <= 65536
        assert used["STACK"] <= STACK and used["LOCAL"] == 0, macros
        if macros.get("TOGETHER"):  # else warps would wait for ever for registers that others leave
            assert used["REG"] == 65536 // (32 * int(str(macros["WARPS"])) * int(str(macros["PER_SM"]))) // 8 * 8
