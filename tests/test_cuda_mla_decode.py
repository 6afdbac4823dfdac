"""The decode kernel over latents in CUDA C++ against its definition in float64.

As in `test_cuda_decode.py`: on a GPU drawn shapes run there; everywhere the same source runs on a CPU in an emulator of
a GPU's threads, and is compiled for an RTX 4090 and an H200.
"""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtool.attention import select
from kvtool.config import KVOptions

pytest.importorskip("triton")

import emulator
from compiled import ON_GPU, usage
from test_mla_kernels import Decoding

from kvtool.kernels import cuda_mla_decode, mla_decode, nvrtc

OPTIONS = [
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2"),
    KVOptions(nbits="4", residual_length=100),
    KVOptions(nbits="8", nbits_key="16"),
    KVOptions(nbits="2", nbits_key="16"),
]
DIMS = (cuda_mla_decode.LATENT_DIM, cuda_mla_decode.ROPE_DIM)
# Options, dtype and how tiles are cut: all that the kernel is compiled for.
VARIANTS = [
    (OPTIONS[0], torch.bfloat16, (2, 4, 32, 3, 1, 0)),
    (OPTIONS[1], torch.bfloat16, (4, 4, 128, 4, 1, 6)),
    (OPTIONS[3], torch.float16, (8, 4, 128, 4, 1, 0)),
    (OPTIONS[2], torch.bfloat16, (4, 2, 64, 4, 1, 6)),
    (OPTIONS[4], torch.float16, (4, 4, 64, 3, 1, 36)),
    (OPTIONS[5], torch.bfloat16, (2, 4, 64, 3, 1, 0)),
]
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def case_of(options, num_heads=16, lengths=(130,), dtype=torch.bfloat16, seed=0, device="cpu") -> Decoding:
    return Decoding(options, num_heads, DIMS, list(lengths), dtype, seed, device)


def macros_of(case: Decoding) -> dict[str, object]:
    _, key, value, table, *_ = case.arguments()
    return cuda_mla_decode.constants(key, value, table, case.q.device)


def error(out: torch.Tensor, case: Decoding) -> float:
    """The largest relative error of a head."""
    exact = mla_decode.latent_decode_reference(*case.arguments(), scale=case.layer.scale)
    return float(((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def emulated(case: Decoding, splits: int, merges: bool, seed: int) -> torch.Tensor:
    """What the kernel makes of `case`, written over NaN; `merges`: its last programs merge, or the test does."""
    q, key, value, *tables = case.arguments()
    n, num_heads, _ = q.shape
    rows, shape = n * -(-num_heads // cuda_mla_decode.HEADS), (n, num_heads, splits)
    out = torch.full((n, num_heads, DIMS[0]), float("nan"), dtype=q.dtype)
    partial, lse = torch.full((*shape, DIMS[0]), float("nan")), torch.full(shape, 7.0)
    arrivals = torch.zeros(rows, dtype=torch.int32) if merges else None
    values = cuda_mla_decode.arguments(q, [out, partial, lse, arrivals], tables, key, value, scale=case.layer.scale)
    library = emulator.build("mla_decode.cu", "latent_decode", tuple(macros_of(case).items()))
    emulator.launch(library, (rows, splits), values, seed)
    if arrivals is not None:
        assert not arrivals.any()
    return out if merges or splits == 1 else emulator.merged(partial, lse)


@settings(deadline=None, max_examples=12)
@given(
    variant=st.sampled_from(VARIANTS),
    num_heads=st.sampled_from([8, 16, 20]),
    lengths=st.lists(st.integers(1, 250), min_size=1, max_size=2),
    splits=st.sampled_from([1, 2, 3, 9]),
    merges=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_source_computes_its_definition(variant, num_heads, lengths, splits, merges, seed):
    options, dtype, tile = variant
    case = case_of(options, num_heads, lengths, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cuda_mla_decode.TILES, (100, case.kv.value.format.bits), tile)
        assert error(emulated(case, splits, merges, seed), case) < 5e-3


@pytest.mark.parametrize("options", OPTIONS[:3] + OPTIONS[4:5])
@pytest.mark.parametrize(("architecture", "shared_kib"), [("sm_89", 100), ("sm_90", 228)])
def test_programs_fit_a_multiprocessor_without_spills(architecture, shared_kib, options, monkeypatch):
    """As many as the table says, each with 1 KiB that the driver takes."""
    if reason := nvrtc.refuses_to_compile():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_mla_decode, "shared_kib", lambda device: shared_kib)
    macros = macros_of(case_of(options))
    bounds = (
        f"{macros['PER_SM']} * (shared_bytes + 1024) <= {shared_kib << 10} && shared_bytes <= {shared_kib - 1 << 10}"
    )
    used = usage(nvrtc.compile_cubin(f"{cuda_mla_decode.SOURCE} static_assert({bounds});", architecture, macros))
    assert used["REG"] * macros["WARPS"] * 32 * macros["PER_SM"] <= 65536
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize(
    ("options", "dims", "reason"),
    [
        (KVOptions(), DIMS, "no kernel for latents of 16 bits"),
        (KVOptions(nbits="2", nbits_key="4"), DIMS, "no kernel for rope keys of 4 bits"),
        (KVOptions(nbits="4", symmetric=True), DIMS, "symmetric"),
        (KVOptions(nbits="4", axis_value="channel"), DIMS, "no kernel for latents of 4 bits per channel"),
        (KVOptions(nbits="4", axis_key="token"), DIMS, "no kernel for rope keys of 8 bits per token"),
        (KVOptions(nbits="4", q_group_size=32), DIMS, "groups of 32"),
        (KVOptions(nbits="4"), (128, 64), "a latent must have 512 elements"),
        (KVOptions(nbits="4"), DIMS, None),
    ],
)
def test_refusals_say_why(options, dims, reason):
    case = Decoding(options, 4, dims, [5], torch.bfloat16, device="cpu")
    refused = cuda_mla_decode.refuses(case.kv.key.packed, case.kv.value.packed)
    assert refused is None if reason is None else reason in refused


@on_gpu
@settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 60)))
@given(
    options=st.sampled_from(OPTIONS),
    num_heads=st.sampled_from([8, 16, 20, 128]),
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    within=st.sampled_from([1, 32]),
    seed=st.integers(0, 2**31),
)
@example(OPTIONS[1], 128, [300] * 17, torch.bfloat16, 1, 0)  # more rows than run at once: nothing is merged
def test_decode_equals_its_definition(options, num_heads, lengths, dtype, within, seed):
    case = case_of(options, num_heads, lengths, dtype, seed, "cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_mla_decode, "MERGED_WITHIN", within)
        assert error(decoded(case), case) < 5e-3


def decoded(case: Decoding) -> torch.Tensor:
    out = torch.full_like(case.q[..., : DIMS[0]], float("nan")).contiguous()
    cuda_mla_decode.latent_decode(*case.arguments(), case.kv.arrivals, scale=case.layer.scale, out=out)
    assert not case.kv.arrivals.any()
    return out


@on_gpu
def test_a_captured_step_serves_other_sequences():
    """Replayed on longer sequences, a graph gives what a new call gives, again and again, bit for bit."""
    case = case_of(OPTIONS[1], 16, (3000, 40, 129), device="cuda")
    assert select(case.layer, case.kv).name == "cuda"
    static = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
    out = torch.empty_like(case.q[..., : DIMS[0]]).contiguous()
    static[4], static[5] = torch.zeros_like(static[4]), torch.zeros_like(static[5])
    cuda_mla_decode.latent_decode(*static, case.kv.arrivals, scale=case.layer.scale, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            cuda_mla_decode.latent_decode(*static, case.kv.arrivals, scale=case.layer.scale, out=out)
    static[4].copy_(case.batch.positions)
    static[5].copy_(case.batch.visible)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, decoded(case))


@on_gpu
def test_programs_that_run_at_once_are_as_many_as_the_table_says():
    for options in OPTIONS:
        case = case_of(options, device="cuda")
        macros = macros_of(case)
        assert cuda_mla_decode._kernel(case.q.device, tuple(macros.items())).programs_per_sm >= macros["PER_SM"]
