"""Prefill attention in Triton against the definition of attention, in float64.

On a GPU hundreds of drawn shapes run there; without one a few small ones run in Triton's interpreter. That kernels
compile for an RTX 4090 needs no GPU.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvtool.attention.layer import AttentionLayer
from kvtool.attention.torch_backend import TorchAttention
from kvtool.attention.triton_backend import TritonPrefill
from kvtool.config import KVOptions
from kvtool.kv import batch
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore, Near

pytest.importorskip("triton")

from compiled import INTERPRETED, ON_GPU, check_compiled, compiles, runs

from kvtool.kernels import decode, prefill

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]  # the interpreter multiplies no bf16
LONGEST = 3000 if DEVICE == "cuda" else 90
STEPS = 6 if DEVICE == "cuda" else 1  # a shape of tensors is compiled once
EXAMPLES = settings(
    deadline=None,
    max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 60 if DEVICE == "cuda" else 8)),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking takes an age
)
OPTIONS = [
    KVOptions(),
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2"),
    KVOptions(nbits="4", q_group_size=32, residual_length=40),
    KVOptions(nbits="2", q_group_size=128, residual_length=128),
    KVOptions(nbits="8", axis_key="token"),
    KVOptions(nbits="4", axis_key="token", rotate=True, q_group_size=32),
    KVOptions(nbits="2", axis_key="token", residual_length=64, symmetric=True),
    KVOptions(nbits="fp8"),
    KVOptions(nbits_key="8", nbits_value="4"),
    KVOptions(nbits_key="4", nbits_value="16", residual_length=64),
    KVOptions(nbits_key="16", nbits_value="2"),
    KVOptions(nbits="4", axis_value="channel", symmetric=True, q_group_size=32),
]


class Prefilling:
    """Sequences of which each has computed `start` tokens, and goes on to `end`; one of a single token is a decode."""

    def __init__(
        self,
        options: KVOptions,
        layer: AttentionLayer,
        bounds: list[tuple[int, int]],
        dtype: torch.dtype,
        seed: int,
        device: str = DEVICE,
    ) -> None:
        torch.manual_seed(seed)
        stream = StreamSpec(layer.num_kv_heads, layer.head_dim)
        spec = KVSpec(1, stream, stream, dtype.itemsize)
        self.format, self.layer, self.bounds = (
            resolve(options, spec),
            layer,
            sorted(bounds, key=lambda b: b[1] - b[0] > 1),
        )
        needed = [self.format.num_blocks(end) for _, end in self.bounds]
        self.store = store = KVStore(KVLayout(spec, self.format), sum(needed) + 3, len(bounds) + 1, dtype, device)
        store.blocks.random_(0, 100)  # what a mask leaves out is finite, and wrong
        store.tails.random_(0, 100)
        ids = iter(torch.randperm(sum(needed) + 3).tolist())
        self.kv = store.layers[0]
        spread = torch.rand(layer.num_kv_heads, layer.head_dim, device=device) * 4  # channels are not alike
        lengths = [end for _, end in self.bounds]
        self.x = [
            (torch.randn(2, n, *spread.shape, device=device) * spread + spread.flip(0)).to(dtype) for n in lengths
        ]
        spans = [
            Span(a, b, [next(ids) for _ in range(n)], i)
            for i, ((a, b), n) in enumerate(zip(self.bounds, needed, strict=True))
        ]
        for span in spans:
            for first, last in ((0, span.start - 1), (span.start - 1, span.start)):  # a prompt, and a decode
                if 0 <= first < last:
                    store.seal(self._write([Span(first, last, span.blocks, span.tail_slot)])[0])
        self.batch, self.near = self._write(spans)
        shape = (len(self.batch.positions), layer.num_heads, layer.head_dim)
        self.q = (torch.randn(shape, device=device) * torch.rand(shape[:2], device=device)[..., None] * 4).to(dtype)

    def _write(self, spans: list[Span]):
        batch = KVBatch.build(self.format, spans, self.store.blocks.device)
        new = torch.cat([self.x[span.tail_slot][:, span.start : span.end] for span in spans], dim=1)
        qkv = torch.cat([new[0], new[1]], dim=1)  # as a model hands them over: parts of a wider tensor
        heads = self.layer.num_kv_heads
        return batch, self.kv.write(qkv[:, :heads], qkv[:, heads:], batch)

    def prefill(self) -> torch.Tensor:
        n = self.batch.num_decodes
        out = torch.full_like(self.q[n:], float("nan"))
        TritonPrefill().prefill(self.q[n:], self.near, self.kv, self.batch, self.layer, out)
        return out

    def exact(self) -> torch.Tensor:
        """What torch makes of the same bytes in float64: tests/test_attention.py holds it to the definition."""
        near = self.near and Near(self.near.key.double(), self.near.value.double())
        q, n = self.q.double(), self.batch.num_decodes
        out = torch.empty_like(q[n:])
        TorchAttention().prefill(q[n:], near, self.kv, self.batch, self.layer, out)
        return out

    def error(self) -> float:
        """Relative error of the kernels, which write over NaN."""
        exact = self.exact()
        return ((self.prefill().double() - exact).norm() / exact.norm()).item()


def attention_layer(heads: tuple[int, int], head_dim: int, window: int | None = None) -> AttentionLayer:
    return AttentionLayer(heads[0] * heads[1], heads[0], head_dim, head_dim**-0.5, window)


@st.composite
def steps(draw) -> list[tuple[int, int]]:
    """Start and end of each sequence; at least one has several tokens to go."""
    starts = st.one_of(st.just(0), st.integers(0, LONGEST), st.integers(0, LONGEST // 64).map(lambda n: n * 64))
    bounds = [
        (start, start + draw(st.integers(2, LONGEST))) for start in draw(st.lists(starts, min_size=1, max_size=4))
    ]
    return bounds + [(start, start + 1) for start in draw(st.lists(starts, max_size=2))]


@runs
@EXAMPLES
@given(
    options=st.sampled_from(OPTIONS),
    head_dim=st.sampled_from(decode.HEAD_DIMS),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 16)),
    bounds=st.lists(steps(), min_size=STEPS, max_size=STEPS),
    window=st.sampled_from([None, None, 1, 100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_prefill_equals_its_definition(options, head_dim, heads, bounds, window, dtype, seed):
    layer = attention_layer(heads, head_dim, window)
    for step in bounds:
        assert Prefilling(options, layer, step, dtype, seed).error() < 5e-3


@runs
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: repr(options)[10:-1])
def test_every_format_with_a_small_workspace(options, monkeypatch):
    """Decoded blocks that do not fit at once are decoded head by head."""
    case = Prefilling(options, attention_layer((2, 2), 64), [(70, 132), (0, 9), (64, 65)], DTYPES[0], 0)
    whole = case.prefill()
    assert case.error() < 5e-3
    monkeypatch.setattr(prefill, "WORKSPACE", 1)
    assert torch.equal(case.prefill(), whole)


@runs
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 2, 5, 9)], ids=["16", "4", "2, residual", "fp8"])
def test_programs_share_the_keys_of_few_queries(options, monkeypatch):
    """Pieces end within a block and where a span begins; some hold nothing that a window lets a query see."""
    monkeypatch.setattr(batch, "SHORTEST_PIECE", 128)
    monkeypatch.setattr(prefill, "num_sms", lambda device: 16)
    for window in (None, 100):
        bounds = [(300, 307), (0, 9), (250, 251), (120, 150)]
        case = Prefilling(options, attention_layer((2, 2), 64, window), bounds, DTYPES[0], 0)
        assert case.error() < 5e-3
        (tiles,) = case.batch.prompts._tiles.values()
        assert tiles[:, 8].tolist() == [3, 3, 3, 2, 2, 1]
        assert not case.kv.arrivals.any()


@runs
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 2, 5, 9)], ids=["16", "4", "2, residual", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_tiles_of_rows_are_copied_as_on_sm_90(options, head_dim, monkeypatch):
    """A prompt behind a context, one without, and spans whose rows lie behind another's."""
    monkeypatch.setattr(prefill, "capability", lambda device: 9)
    for window in (None, 100):
        bounds = [(130, 300), (0, 200), (0, 9), (64, 65)]
        assert Prefilling(options, attention_layer((2, 2), head_dim, window), bounds, DTYPES[0], 0).error() < 5e-3


@runs
def test_what_others_have_left_in_a_block_or_behind_a_span_is_not_read():
    """Keys of other requests may be NaN."""
    for options in (KVOptions(), KVOptions(nbits="4")):
        case = Prefilling(options, attention_layer((1, 2), 64), [(64, 100)], DTYPES[0], 0)
        expected = case.prefill()
        if options.nbits is None:
            last = case.batch.spans[0].blocks[1]
            for stream in (case.kv.key, case.kv.value):
                stream.arrays["codes"][last, :, 36:] = float("nan")
        assert case.near
        broken = torch.full((40, *case.near.key.shape[1:]), float("nan"), dtype=case.near.key.dtype, device=DEVICE)
        case.near = Near(torch.cat([case.near.key, broken]), torch.cat([case.near.value, broken]))
        assert torch.equal(case.prefill(), expected)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (attention_layer((1, 4), 72), "head_dim must be one of 64"),
        (attention_layer((1, 65), 64), "65 query heads share a KV head; it takes up to 64"),
        (attention_layer((1, 16), 64), None),
    ],
)
def test_refusals_say_why(layer, reason):
    case = Prefilling(KVOptions(), layer, [(0, 5)], torch.float16, 0, "cpu")
    refused = prefill.refuses(case.kv.key.packed, case.kv.value.packed, layer.num_heads)
    assert refused is None if reason is None else reason in refused


@compiles
@pytest.mark.parametrize(("bits", "head_dim"), [("16", 128), ("fp8", 256), ("4", 80)])
def test_kernels_compile_for_a_4090(bits, head_dim, monkeypatch):
    """Exact blocks, those with a tail, and those that pack on write, in large tiles and small ones."""

    def launch():
        for end, window in ((200, None), (2, None), (200, 50))[: 3 if bits == "16" else 1]:
            layer = attention_layer((1, 7), head_dim, window)
            Prefilling(KVOptions(nbits=bits), layer, [(0, end)], torch.bfloat16, 0, "cpu").prefill()

    assert check_compiled(launch, monkeypatch)
