"""Kernels of a layer of experts against the torch functions that define them.

Where there is a GPU they run on it; elsewhere Triton interprets them on small shapes, in a process of their own. That
they compile for an RTX 4090 and an H100 needs no GPU.
"""

from unittest.mock import patch

import pytest
import torch
from compiled import INTERPRETED, ON_GPU, check_fits, compile_for, compiles, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.layers.moe import Routing, mix_reference, route

triton = pytest.importorskip("triton")

from kvtool.kernels import grouped, moe  # noqa: E402
from kvtool.kernels.w4a16 import Int4Weights, dequantize_w4  # noqa: E402
from kvtool.layers.moe import MoE, MoEShape  # noqa: E402
from kvtool.layers.norm import RMSNorm  # noqa: E402
from kvtool.layers.quantized import rounded  # noqa: E402
from kvtool.parallel import ALONE  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]  # the interpreter multiplies no bf16

seeds = st.integers(0, 2**31)

ROUTINGS = [
    Routing(5, 2, normalize=True),
    Routing(60, 4),
    Routing(128, 8, normalize=True),
    Routing(160, 6, num_groups=8, top_groups=3, scale=16.0),
    Routing(256, 8, scores="sigmoid", normalize=True, scale=2.5, num_groups=8, top_groups=4),
    Routing(12, 3, scores="sigmoid", num_groups=3, top_groups=1),
]


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def chosen(tokens: int, top_k: int, num_experts: int, skew: float) -> Tensor:
    """Ids [T, top_k] of experts of which some are liked better."""
    liking = torch.arange(num_experts).float().mul(-skew).exp().expand(tokens, -1)
    return torch.multinomial(liking, top_k).to(DEVICE)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.cpu().double() - exact.cpu()).norm() / exact.cpu().norm())


@runs
@settings(deadline=None, max_examples=100 if ON_GPU else 15)
@given(
    routing=st.sampled_from(ROUTINGS),
    tokens=st.integers(1, 300 if ON_GPU else 3),
    first=st.integers(0, 300),
    seed=seeds,
)
def test_routing(routing: Routing, tokens: int, first: int, seed: int) -> None:
    """Also with ids counted from a rank's first expert on, and into memory that stays."""
    torch.manual_seed(seed)
    logits = drawn(tokens, routing.num_experts, dtype=torch.float32)  # of 16 bits many would be equal
    bias = drawn(routing.num_experts, dtype=torch.float32, scale=0.1) if routing.scores == "sigmoid" else None
    exact_ids, exact = route(logits.double().cpu(), None if bias is None else bias.double().cpu(), routing)
    first %= routing.num_experts
    kept = torch.full((tokens + 1, routing.top_k), -1, dtype=torch.int32, device=DEVICE)
    ids, weights = moe.route(logits, bias, routing, first, kept[:tokens])
    assert ids.data_ptr() == kept.data_ptr() and (kept[tokens:] == -1).all()
    assert ids.min() >= 0 and ids.max() < routing.num_experts
    ids = (ids + first) % routing.num_experts
    dense, expected = (torch.zeros(tokens, routing.num_experts, dtype=torch.float64) for _ in range(2))
    dense.scatter_(1, ids.long().cpu(), weights.double().cpu())
    expected.scatter_(1, exact_ids, exact)
    # Scores that fp32 cannot tell apart may change places.
    wrong = (dense - expected).abs().amax(1) > 1e-5 * routing.scale
    assert wrong.sum() <= tokens // 100


@runs
@pytest.mark.skipif(INTERPRETED, reason="numpy, unlike a GPU, finds no largest of NaN alone")
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_nan_is_routed_somewhere(routing: Routing) -> None:
    bias = torch.zeros(routing.num_experts, device=DEVICE) if routing.scores == "sigmoid" else None
    ids, _ = moe.route(torch.full((2, routing.num_experts), float("nan"), device=DEVICE), bias, routing)
    assert ids.min() >= 0 and ids.max() < triton.next_power_of_2(routing.num_experts)  # `ExpertLoad` counts so many


@runs
@settings(deadline=None, max_examples=100 if ON_GPU else 15)
@given(
    tokens=st.integers(1, 1200 if ON_GPU else 70),
    experts=st.sampled_from([(1, 1), (5, 2), (64, 6), (128, 8)]),
    rows=st.sampled_from([8, 16, 32, 64, 128]),
    here=st.sampled_from([1.0, 0.5]),
    skew=st.sampled_from([0.0, 0.1, 1.0]),
    same=st.booleans(),
    counted=st.booleans(),
    seed=seeds,
)
def test_pairs_stand_by_expert(
    tokens: int, experts: tuple[int, int], rows: int, here: float, skew: float, same: bool, counted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    ids, num_experts = chosen(tokens, experts[1], experts[0], skew), max(1, int(experts[0] * here))
    if same:  # as NaN may be routed
        ids[:] = ids[0, 0].clone()
    expected = moe.group_reference(ids, num_experts, rows)
    with patch.object(moe, "COMPARED", 0 if counted else 1 << 20):  # pairs that are placed without counting
        groups, count = moe.group(ids, num_experts, rows), int(expected.num_tiles)
    assert int(groups.num_tiles) == count <= len(groups.tiles)
    assert torch.equal(groups.pairs, expected.pairs)
    assert torch.equal(groups.tiles[:count], expected.tiles[:count])
    covered = [
        (expert, pair)
        for expert, first, size in groups.tiles[:count].tolist()
        for pair in groups.pairs[first : first + size].tolist()
    ]
    assert sorted(covered) == sorted((e, p) for p, e in enumerate(ids.flatten().tolist()) if e < num_experts)


@runs
@settings(deadline=None, max_examples=60 if ON_GPU else 6)
@given(
    tokens=st.integers(1, 700 if ON_GPU else 40),
    shape=st.sampled_from([(5, 2, 64, 40), (64, 6, 2048, 1408), (128, 8, 2048, 768)] if ON_GPU else [(5, 2, 64, 40)]),
    here=st.sampled_from([1.0, 0.5]),
    shared=st.booleans(),
    skew=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_experts(
    tokens: int, shape: tuple[int, int, int, int], here: float, shared: bool, skew: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    num_experts, top_k, hidden, size = shape
    ids, local = chosen(tokens, top_k, num_experts, skew), max(1, int(num_experts * here))
    weights = torch.rand(tokens, top_k).to(DEVICE)
    x = drawn(tokens, hidden, dtype=dtype)
    gate_up = drawn(local, 2 * size, hidden, dtype=dtype, scale=hidden**-0.5)
    down = drawn(local, hidden, size, dtype=dtype, scale=size**-0.5)
    beside = drawn(tokens, hidden, dtype=dtype) if shared else None
    exact = mix_reference(*(a.double() for a in (x, gate_up, down)), ids, weights.double())
    exact = exact if beside is None else exact + beside.double()
    out = moe.mix(x, gate_up, down, ids, weights, beside, num_experts - local)
    assert out.dtype == dtype and error(out, exact) < 1e-2 if exact.any() else not out.any()

    groups = moe.group(ids, local, moe.rows_for(ids.numel(), num_experts))
    inner = grouped.grouped_product(x, gate_up, groups, repeat=top_k, gated=True)
    exact = grouped.grouped_product_reference(x, gate_up, ids, repeat=top_k, gated=True)
    is_here = (ids < local).flatten()
    if is_here.any():
        assert error(inner[is_here], exact[is_here]) < 5e-3


def coded(weight: Tensor, group: int) -> Int4Weights:
    matrix, count = rounded(weight.flatten(0, 1), "w4a16", group), len(weight)
    return Int4Weights(*(getattr(matrix, name).unflatten(0, (count, -1)) for name in ("weight", "scales", "zeros")))


@runs
@settings(deadline=None, max_examples=60 if ON_GPU else 6)
@given(
    tokens=st.integers(1, 500 if ON_GPU else 30),
    shape=st.sampled_from([(5, 2, 96, 64), (8, 6, 2048, 1408), (16, 8, 2048, 768)] if ON_GPU else [(5, 2, 96, 64)]),
    group=st.sampled_from([32, 64, 128]),
    here=st.sampled_from([1.0, 0.5]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_experts_of_four_bits(
    tokens: int, shape: tuple[int, int, int, int], group: int, here: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    num_experts, top_k, hidden, size = shape
    ids, local = chosen(tokens, top_k, num_experts, 0.1), max(1, int(num_experts * here))
    weights, x = torch.rand(tokens, top_k).to(DEVICE), drawn(tokens, hidden, dtype=dtype)
    packed = [
        coded(drawn(local, *lines, dtype=dtype, scale=lines[1] ** -0.5), min(group, lines[1] & -lines[1]))
        for lines in ((2 * size, hidden), (hidden, size))
    ]
    dense = (
        torch.stack([dequantize_w4(*of, torch.float64) for of in zip(p.weight, p.scales, p.zeros, strict=True)])
        for p in packed
    )
    exact = mix_reference(x.double(), *dense, ids, weights.double())
    out = moe.mix(x, *packed, ids, weights, None, num_experts - local)
    assert out.dtype == dtype and error(out, exact) < 1e-2 if exact.any() else not out.any()

    groups = moe.group(ids, local, moe.rows_for(ids.numel(), num_experts))
    inner = grouped.grouped_product(x, packed[0], groups, repeat=top_k, gated=True)
    exact = grouped.grouped_product_reference(x, packed[0], ids, repeat=top_k, gated=True)
    is_here = (ids < local).flatten()
    if is_here.any():
        assert error(inner[is_here], exact[is_here]) < 5e-3


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_a_captured_layer_serves_other_tokens(tokens: int) -> None:
    """Nothing is read back: a graph replayed on tokens that choose other experts gives what a new call gives."""
    torch.manual_seed(0)
    routing = Routing(64, 6, wide=True)
    layer = MoE(2048, MoEShape(routing, 1408, 2816), ALONE, dtype=torch.bfloat16, device=DEVICE)
    for parameter in layer.parameters():
        parameter.normal_(std=0.02)
    norm = RMSNorm(2048, 1e-6, dtype=torch.bfloat16, device=DEVICE)
    norm.weight.fill_(1)
    static = drawn(tokens, 2048, dtype=torch.bfloat16)
    zeros = torch.zeros_like(static)

    def run(x: Tensor) -> Tensor:
        return layer(norm, x, zeros.clone())[0]

    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for _ in range(5):
        x = drawn(tokens, 2048, dtype=torch.bfloat16)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, run(x))


def codes(weight: Tensor, group: int) -> Int4Weights:
    """Any, of the weight's shape."""
    experts, lines, depth = weight.shape
    scales = weight.new_empty(experts, lines, depth // group)
    return Int4Weights(weight.new_empty(experts, lines, depth // 2, dtype=torch.uint8), scales, scales)


@compiles
@pytest.mark.parametrize("capability", [89, 90])
def test_every_kernel_compiles_without_spills(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_for(capability, monkeypatch, grouped)
    for routing in (ROUTINGS[2], ROUTINGS[3], ROUTINGS[4]):
        logits = torch.empty(3, routing.num_experts)
        moe.route(logits, logits[0] if routing.scores == "sigmoid" else None, routing)
    hidden, size = 2048, 1408
    gate_up, down = (torch.empty(1, *shape, dtype=torch.bfloat16) for shape in ((2 * size, hidden), (hidden, size)))
    ids, weights = torch.empty(8, 6, dtype=torch.int32), torch.empty(8, 6)
    for rows in (8, 16, 32, 64, 128):
        groups = moe.group(ids, 64, rows)
        moe.group(torch.empty(4 * moe.COMPARED, 6, dtype=torch.int32), 64, rows)
        inner = grouped.grouped_product(torch.empty(8, hidden, dtype=torch.bfloat16), gate_up, groups, 6, gated=True)
        moe.combine(grouped.grouped_product(inner, down, groups), ids, weights, 64, None)
        for size_of_group in (32, 128):
            inner = grouped.grouped_product(
                inner.new_empty(8, hidden), codes(gate_up, size_of_group), groups, 6, gated=True
            )
            grouped.grouped_product(inner, codes(down, size_of_group), groups)
    assert len(compiled) == 3 + 5 * 11
    for kernel in compiled:
        check_fits(kernel, capability)
