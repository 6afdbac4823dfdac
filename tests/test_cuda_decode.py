"""The decode kernel in CUDA C++ against its definition in float64.

On a GPU drawn shapes run there (KVTOOL_TEST_EXAMPLES of them). Everywhere the same source runs on a CPU in an emulator
of a GPU's threads, and is compiled for an RTX 4090 and an H200.
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
from test_kernels import Decoding, attention_layer

from kvtool.kernels import cuda_decode, decode, nvrtc

OPTIONS = [
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2"),
    KVOptions(nbits="2", q_group_size=128, residual_length=128),
    KVOptions(nbits="4", q_group_size=32, residual_length=40),
    KVOptions(nbits_key="8", nbits_value="4"),
    KVOptions(nbits_key="4", nbits_value="2"),
    KVOptions(nbits_key="2", nbits_value="8"),
]
# Options, head_dim, query heads to a KV head and dtype: all that the kernel is compiled for.
VARIANTS = [
    (OPTIONS[0], 64, 7, torch.bfloat16),
    (OPTIONS[1], 128, 7, torch.bfloat16),
    (OPTIONS[2], 128, 1, torch.float16),
    (OPTIONS[3], 64, 12, torch.float16),
    (OPTIONS[7], 64, 16, torch.bfloat16),
]
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def case_of(variant, kv_heads=2, lengths=(130,), window=None, seed=0, device="cpu") -> Decoding:
    options, head_dim, group_heads, dtype = variant
    layer = attention_layer((kv_heads, group_heads), head_dim, window)
    return Decoding(options, layer, list(lengths), dtype, seed, device)


def macros_of(case: Decoding) -> dict[str, object]:
    return cuda_decode.constants(*case.arguments()[:4])


def error(out: torch.Tensor, case: Decoding) -> float:
    """The largest relative error of a head."""
    options = {"scale": case.layer.scale, "sliding_window": case.layer.sliding_window}
    exact = decode.paged_decode_reference(*case.arguments(), **options)
    return ((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def emulated(case: Decoding, splits: int, merges: bool, seed: int) -> torch.Tensor:
    """What the kernel makes of `case`, written over NaN; `merges`: its last programs merge, or the test does."""
    q, key, value, *tables = case.arguments()
    n, num_heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    partial, lse = torch.full((n, num_heads, splits, head_dim), float("nan")), torch.full((n, num_heads, splits), 7.0)
    arrivals = torch.zeros(n * key.codes.shape[1], dtype=torch.int32) if merges else None
    options = {"scale": case.layer.scale, "sliding_window": case.layer.sliding_window}
    values = cuda_decode.arguments(q, [out, partial, lse, arrivals], tables, key, value, **options)
    library = emulator.build("decode.cu", "paged_decode", tuple((macros_of(case) | {"CHAINED": 1}).items()))
    emulator.launch(library, (n * key.codes.shape[1], splits), values, seed)
    if arrivals is not None:
        assert not arrivals.any()
    return out if merges or splits == 1 else emulator.merged(partial, lse)


@settings(deadline=None, max_examples=25)
@given(
    variant=st.sampled_from(VARIANTS),
    kv_heads=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=2),
    window=st.sampled_from([None, None, 1, 100]),
    splits=st.sampled_from([1, 2, 3, 9]),
    merges=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
# Its scores are large, and rounding that tells one block from another shows.
@example(variant=VARIANTS[1], kv_heads=2, lengths=[168], window=None, splits=1, merges=True, seed=1001)
def test_the_source_computes_its_definition(variant, kv_heads, lengths, window, splits, merges, seed):
    case = case_of(variant, kv_heads, lengths, window, seed)
    assert error(emulated(case, splits, merges, seed), case) < 5e-3


def test_a_row_that_is_nobodys_reads_nothing():
    """A graph of more rows than there are sequences gives the rest position -1."""
    case = case_of(VARIANTS[1], lengths=(130, 40))
    alone = emulated(case, 2, True, 0)
    case.batch.positions[1], case.batch.visible[1], case.batch.tail_slots[1] = -1, 0, 10**6
    out = emulated(case, 2, True, 0)
    assert torch.equal(out[0], alone[0]) and not out[1].any()


@pytest.mark.parametrize("bits", ["8", "4", "2"])
@pytest.mark.parametrize("group_heads", [7, 12])
@pytest.mark.parametrize(
    ("architecture", "shared_kib", "sequences"), [("sm_89", 100, 1), ("sm_90", 228, 1), ("sm_90", 228, 9)]
)
def test_programs_fit_a_multiprocessor_without_spills(
    architecture, shared_kib, sequences, group_heads, bits, monkeypatch
):
    """As many as the tables say, each with 1 KiB that the driver takes."""
    if reason := nvrtc.refuses_to_compile():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_decode, "shared_kib", lambda device: shared_kib)
    macros = macros_of(case_of((KVOptions(nbits=bits), 128, group_heads, torch.bfloat16), lengths=[1] * sequences))
    bounds = (
        f"{macros['PER_SM']} * (shared_bytes + 1024) <= {shared_kib << 10} && shared_bytes <= {shared_kib - 1 << 10}"
    )
    used = usage(nvrtc.compile_cubin(f"{cuda_decode.SOURCE} static_assert({bounds});", architecture, macros))
    assert used["REG"] * macros["WARPS"] * 32 * macros["PER_SM"] <= 65536
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize(
    ("options", "layer", "reason"),
    [
        (KVOptions(), attention_layer((1, 4), 64), "no kernel for keys of 16 bits"),
        (KVOptions(nbits="4", symmetric=True), attention_layer((1, 4), 64), "symmetric"),
        (KVOptions(nbits="4", axis_key="token"), attention_layer((1, 4), 64), "no kernel for keys of 4 bits per token"),
        (KVOptions(nbits="4", axis_value="channel"), attention_layer((1, 4), 64), "no kernel for values"),
        (KVOptions(nbits="4"), attention_layer((1, 17), 64), "up to 16"),
        (KVOptions(nbits="4"), attention_layer((1, 4), 80), "head_dim must be one of 64, 128"),
        (KVOptions(nbits="4"), attention_layer((1, 4), 64), None),
    ],
)
def test_refusals_say_why(options, layer, reason):
    case = Decoding(options, layer, [5], torch.bfloat16, 0, "cpu")
    refused = cuda_decode.refuses(*case.arguments()[1:3], layer.num_heads)
    assert refused is None if reason is None else reason in refused


@on_gpu
@settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 60)))
@given(
    options=st.sampled_from(OPTIONS),
    head_dim=st.sampled_from(cuda_decode.HEAD_DIMS),
    heads=st.tuples(st.integers(1, 4), st.sampled_from([1, 7, 8, 9, 16])),
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=9)
    | st.lists(st.integers(1, 300), min_size=80, max_size=99),
    window=st.sampled_from([None, None, 1, 100]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    within=st.sampled_from([0, 32, 1000]),
    seed=st.integers(0, 2**31),
)
def test_decode_equals_its_definition(options, head_dim, heads, lengths, window, dtype, within, seed):
    case = case_of((options, head_dim, heads[1], dtype), heads[0], lengths, window, seed, "cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_decode, "MERGED_WITHIN", within)
        assert error(decoded(case), case) < 5e-3


def decoded(case: Decoding) -> torch.Tensor:
    out = torch.full_like(case.q, float("nan"))
    options = {"scale": case.layer.scale, "sliding_window": case.layer.sliding_window}
    cuda_decode.paged_decode(*case.arguments(), case.kv.arrivals, **options, out=out)
    assert not case.kv.arrivals.any()
    return out


@on_gpu
def test_a_captured_step_serves_other_sequences():
    """Replayed on longer sequences, a graph gives what a new call gives, again and again, bit for bit."""
    case = case_of(VARIANTS[1], 2, (3000, 40, 129), device="cuda")
    assert select(case.layer, case.kv).name == "cuda"
    static = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
    out, options = torch.empty_like(case.q), {"scale": case.layer.scale}
    static[4], static[5] = torch.zeros_like(static[4]), torch.zeros_like(static[5])
    cuda_decode.paged_decode(*static, case.kv.arrivals, **options, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            cuda_decode.paged_decode(*static, case.kv.arrivals, **options, out=out)
    static[4].copy_(case.batch.positions)
    static[5].copy_(case.batch.visible)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, decoded(case))


@on_gpu
def test_programs_that_run_at_once_are_as_many_as_the_table_says():
    for bits in ("8", "4", "2"):
        case = case_of((KVOptions(nbits=bits), 128, 7, torch.bfloat16), device="cuda")
        macros = macros_of(case)
        assert cuda_decode._kernel(case.q.device, tuple(macros.items())).programs_per_sm >= macros["PER_SM"]
