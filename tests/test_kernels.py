"""Triton kernels against the torch functions that define them.

On a GPU hundreds of drawn shapes run there; without one a few small ones run in Triton's interpreter. That kernels
compile for an RTX 4090 needs no GPU.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import PagedAttention, select
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.torch_backend import TorchAttention
from kvtool.config import KVOptions
from kvtool.errors import UnsupportedError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore

pytest.importorskip("triton")

from compiled import INTERPRETED, ON_GPU, check_compiled, compiles, runs

from kvtool.kernels import decode
from kvtool.kernels.launch import num_splits

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]  # the interpreter multiplies no bf16
OPTIONS = [
    KVOptions(),
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2"),
    KVOptions(nbits="4", q_group_size=32, residual_length=40),
    KVOptions(nbits="2", q_group_size=128, residual_length=128),
    KVOptions(nbits="8", axis_key="token"),
    KVOptions(nbits="4", axis_key="token"),
    KVOptions(nbits="4", axis_key="token", rotate=True, q_group_size=32),
    KVOptions(nbits="fp8"),
    KVOptions(nbits_key="8", nbits_value="4"),
    KVOptions(nbits_key="4", nbits_value="2"),
    KVOptions(nbits_key="4", nbits_value="16", residual_length=64),
    KVOptions(nbits_key="16", nbits_value="2"),
]


class Decoding:
    """Sequences of drawn lengths in a store of one layer, each with its newest token still to be attended."""

    def __init__(
        self,
        options: KVOptions,
        layer: AttentionLayer,
        lengths: list[int],
        dtype: torch.dtype,
        seed: int,
        device: str = DEVICE,
    ) -> None:
        torch.manual_seed(seed)
        stream = StreamSpec(layer.num_kv_heads, layer.head_dim)
        self.format = resolve(options, KVSpec(1, stream, stream, dtype.itemsize))
        layout = KVLayout(KVSpec(1, stream, stream, dtype.itemsize), self.format)
        needed = [self.format.num_blocks(length) for length in lengths]
        self.store = store = KVStore(layout, sum(needed) + 3, len(lengths) + 1, dtype, device)
        store.blocks.random_(0, 100)  # what a mask leaves out is finite, and wrong
        ids = iter(torch.randperm(sum(needed) + 3).tolist())
        owned = [[next(ids) for _ in range(count)] for count in needed]
        self.kv, self.layer = store.layers[0], layer
        spread = torch.rand(layer.num_kv_heads, layer.head_dim, device=device) * 4  # channels are not alike
        spans = []
        for slot, (length, blocks) in enumerate(zip(lengths, owned, strict=True)):
            if length > 1:
                self.store.seal(self._write([Span(0, length - 1, blocks, slot)], spread, dtype))
            spans.append(Span(length - 1, length, blocks, slot))
        self.batch = self._write(spans, spread, dtype)
        shape = (len(lengths), layer.num_heads, layer.head_dim)
        self.q = (torch.randn(shape, device=device) * torch.rand(shape[:2], device=device)[..., None] * 4).to(dtype)

    def _write(self, spans: list[Span], spread: torch.Tensor, dtype: torch.dtype) -> KVBatch:
        batch = KVBatch.build(self.format, spans, spread.device)
        x = torch.randn(2, len(batch.positions), *spread.shape, device=spread.device) * spread + spread.flip(0)
        self.kv.write(x[0].to(dtype), x[1].to(dtype), batch)
        return batch

    def arguments(self) -> tuple[object, ...]:
        streams = (
            decode.PackedStream(s.format.bits, s.format.axis, s.format.group, *map(s.arrays.get, NAMES), s.tail)
            for s in (self.kv.key, self.kv.value)
        )
        batch = self.batch
        return (self.q, *streams, batch.block_table, batch.positions, batch.visible, batch.tail_slots)

    def error(self) -> float:
        """Relative error of the kernel, which writes over NaN."""
        options = {"scale": self.layer.scale, "sliding_window": self.layer.sliding_window}
        out = torch.full_like(self.q, float("nan"))
        decode.paged_decode(*self.arguments(), **options, out=out)
        exact = decode.paged_decode_reference(*self.arguments(), **options)
        return ((out.double() - exact).norm() / exact.norm()).item()


NAMES = ("codes", "scale", "zero")


def attention_layer(heads: tuple[int, int], head_dim: int, window: int | None = None) -> AttentionLayer:
    return AttentionLayer(heads[0] * heads[1], heads[0], head_dim, head_dim**-0.5, window)


@runs
@settings(deadline=None, max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 20 if ON_GPU else 10)))
@given(
    options=st.sampled_from(OPTIONS),
    head_dim=st.sampled_from(decode.HEAD_DIMS),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 16)),
    lengths=st.lists(st.integers(1, 5000 if ON_GPU else 200), min_size=1, max_size=9 if ON_GPU else 3),
    window=st.sampled_from([None, None, 1, 100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_decode_equals_its_definition(options, head_dim, heads, lengths, window, dtype, seed):
    assert Decoding(options, attention_layer(heads, head_dim, window), lengths, dtype, seed).error() < 5e-3


@runs
@pytest.mark.parametrize("options", OPTIONS if ON_GPU else OPTIONS[1:5], ids=lambda options: repr(options)[10:-1])
def test_scales_of_any_size_keep_their_digits(options):
    """Folded scales meet fp16: neither the tiny values of a dead head nor huge ones may leave its range."""
    for factor in (1e-3, 30.0):
        case = Decoding(options, attention_layer((2, 4), 64), [700 if DEVICE == "cuda" else 150], DTYPES[0], 0)
        scaled = [case.kv.value.tail, *(case.kv.value.arrays.get(name) for name in ("scale", "zero"))]
        for array in [case.kv.value.arrays["codes"]] if case.kv.value.format.bits == "16" else scaled:
            if array is not None:
                array.mul_(factor)
        assert case.error() < 5e-3


@given(st.integers(1, 5000), st.integers(1, 5000), st.booleans(), st.integers(1, 2000))
def test_splits_run_at_once(rows, num_blocks, has_tail, programs):
    splits = num_splits(rows, num_blocks, has_tail, programs)
    assert splits == 1 or (splits <= num_blocks + has_tail and rows * splits <= programs)
    assert splits == num_blocks + has_tail or rows * (splits + 1) > programs


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_step_serves_other_sequences():
    """The launch reads lengths from memory alone: replayed on longer sequences, a graph gives what a new call gives."""
    layer = attention_layer((2, 7), 128)
    case = Decoding(KVOptions(nbits="4"), layer, [3000, 40, 129], torch.bfloat16, 0)
    static = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
    out, options = torch.empty_like(case.q), {"scale": layer.scale}
    static[4], static[5] = torch.zeros_like(static[4]), torch.zeros_like(static[5])
    decode.paged_decode(*static, **options, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.paged_decode(*static, **options, out=out)
    static[4].copy_(case.batch.positions)
    static[5].copy_(case.batch.visible)
    graph.replay()
    assert torch.equal(out, decode.paged_decode(*case.arguments(), **options))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: repr(options)[10:-1])
@pytest.mark.parametrize("window", [None, 50])
def test_the_definition_agrees_with_the_torch_backend(options, window):
    """Two readings of the store's bytes: the kernels' reference, and the codecs behind `TorchAttention`."""
    layer = attention_layer((2, 3), 64, window)
    case = Decoding(options, layer, [1, 70, 300], torch.float64, 0, "cpu")
    exact = decode.paged_decode_reference(*case.arguments(), scale=layer.scale, sliding_window=window)
    out = torch.full_like(case.q, float("nan"))
    TorchAttention().decode(case.q, case.kv, case.batch, layer, out)
    torch.testing.assert_close(out, exact)


COMPILED = [(key, 128, ("8", "4", "2", "16", "fp8")[i % 5], 7) for i, key in enumerate(decode.KEYS)]
COMPILED.append((decode.KEYS[0], 256, "16", 16))


@compiles
@pytest.mark.parametrize(
    ("key", "head_dim", "value", "heads"),
    COMPILED,
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_kernels_compile_for_a_4090(key, head_dim, value, heads, monkeypatch):
    axis = None if key[0] in ("16", "fp8") else key[1]
    options = KVOptions(nbits_key=key[0], nbits_value=value, axis_key=axis)
    case = Decoding(options, attention_layer((1, heads), head_dim), [130], torch.bfloat16, 0, "cpu")
    assert check_compiled(lambda: decode.paged_decode(*case.arguments(), scale=1.0), monkeypatch)


@pytest.mark.parametrize(
    ("options", "layer", "reason"),
    [
        (KVOptions(nbits="4", symmetric=True), attention_layer((1, 4), 64), "symmetric"),
        (KVOptions(nbits="2", axis_key="token"), attention_layer((1, 4), 64), "no kernel for keys of 2 bits per token"),
        (KVOptions(nbits="4", axis_value="channel"), attention_layer((1, 4), 64), "no kernel for values"),
        (KVOptions(nbits="4"), attention_layer((1, 17), 64), "up to 16"),
        (KVOptions(nbits="4"), attention_layer((1, 4), 72), "head_dim must be one of 64"),
        (KVOptions(), attention_layer((1, 4), 64), None),
    ],
)
def test_refusals_say_why(options, layer, reason):
    case = Decoding(options, layer, [5], torch.bfloat16, 0, "cpu")
    refused = decode.refuses(*case.arguments()[1:3], layer.num_heads)
    assert refused is None if reason is None else reason in refused


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="about a machine without a GPU")
def test_on_a_cpu_torch_is_chosen():
    case = Decoding(KVOptions(nbits="4"), attention_layer((1, 4), 64), [5], torch.bfloat16, 0)
    assert select(case.layer, case.kv).name == "torch"
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, not cpu"):
        select(case.layer, case.kv, "triton")


@runs
def test_a_step_of_decodes_and_a_prompt():
    """Each half of a composed backend sees its own queries."""
    layer, dtype = attention_layer((2, 2), 64), DTYPES[0]
    stream = StreamSpec(2, 64)
    fmt: KVFormat = resolve(KVOptions(nbits="4"), spec := KVSpec(1, stream, stream, 2))
    torch.manual_seed(0)
    x = torch.randn(3, 100 + 100 + 1 + 30, 2, 64, device=DEVICE).to(dtype)
    outs = []
    for asked in ("torch", "triton"):
        store = KVStore(KVLayout(spec, fmt), 4, 3, dtype, DEVICE)
        attend = PagedAttention(store, [layer], asked)
        q = x[0].repeat(1, 2, 1)
        first = KVBatch.build(fmt, [Span(0, 100, [0], 0), Span(0, 100, [1], 1)], DEVICE)
        attend(0, q[:200], x[1][:200], x[2][:200], first)
        mixed = KVBatch.build(fmt, [Span(100, 101, [0], 0), Span(0, 30, [], 2)], DEVICE)
        outs.append(attend(0, q[200:], x[1][200:], x[2][200:], mixed))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-2, atol=1e-2)
