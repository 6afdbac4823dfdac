"""The flash-attn backend against torch in float64, where the package and a GPU are there; elsewhere what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import BACKENDS, PagedAttention, block_size, select
from kvtool.attention.flash_backend import PAGE, FlashAttention
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.torch_backend import TorchAttention
from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import UnsupportedError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore, Near

ON_GPU = torch.cuda.is_available()
HEAD_DIMS = (64, 128)  # a build for one GPU may hold no more
LONGEST = 3000


def installed() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return ON_GPU


runs = pytest.mark.skipif(not installed(), reason="needs a GPU and flash-attn")


class Step:
    """Sequences of which each has `start` tokens in a store of one layer, and goes on to `end`."""

    def __init__(self, layer: AttentionLayer, bounds: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        stream = StreamSpec(layer.num_kv_heads, layer.head_dim)
        spec = KVSpec(1, stream, stream, 2)
        fmt = resolve(KVOptions(), spec, block_size("flash-attn"))
        bounds = sorted(bounds, key=lambda bound: bound[1] - bound[0] > 1)
        needed = [fmt.num_blocks(end) for _, end in bounds]
        store = KVStore(KVLayout(spec, fmt), sum(needed) + 2, len(bounds), dtype, "cuda")
        store.blocks.view(dtype).normal_()
        self.kv, self.layer = store.layers[0], layer
        ids = iter(torch.randperm(sum(needed) + 2).tolist())
        spans = [
            Span(start, end, [next(ids) for _ in range(count)], slot)
            for slot, ((start, end), count) in enumerate(zip(bounds, needed, strict=True))
        ]
        self.batch = KVBatch.build(fmt, spans, "cuda")
        q, key, value = (
            torch.randn(len(self.batch.positions), heads, layer.head_dim, device="cuda").to(dtype)
            for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        )
        self.q, self.near = q * 2, self.kv.write(key, value, self.batch)

    def error(self) -> float:
        """Relative error of prefill and decode together."""
        n, outs = self.batch.num_decodes, []
        for backend, wide in ((FlashAttention(), self.q), (TorchAttention(), self.q.double())):
            near = self.near and Near(*(x.to(wide.dtype) for x in (self.near.key, self.near.value)))
            out = torch.full_like(wide, float("nan"))
            if n:
                backend.decode(wide[:n], self.kv, self.batch, self.layer, out[:n])
            if n < len(wide):
                backend.prefill(wide[n:], near, self.kv, self.batch, self.layer, out[n:])
            outs.append(out.double())
        return ((outs[0] - outs[1]).norm() / outs[1].norm()).item()


@runs
@settings(deadline=None, max_examples=100)
@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 16)),
    starts=st.lists(st.sampled_from([0, 1, 255, 256, 700, 2000]), min_size=1, max_size=6),
    whole=st.booleans(),
    window=st.sampled_from([None, None, 1, 100]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_steps_equal_torch_in_float64(head_dim, heads, starts, whole, window, dtype, seed, data):
    layer = AttentionLayer(heads[0] * heads[1], heads[0], head_dim, head_dim**-0.5, window)
    lengths = st.one_of(st.just(1), st.integers(1, LONGEST))
    bounds = [(0, data.draw(lengths)) if whole else (start, start + data.draw(lengths)) for start in starts]
    assert Step(layer, bounds, dtype, seed).error() < 5e-3


@runs
def test_an_engine_answers_as_with_torch():
    from kvtool.engine import Engine
    from kvtool.request import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [[5 + i] * (40 * i + 3) for i in range(7)]
    answers = []
    for name in ("flash-attn", "torch"):
        config = EngineConfig(device="cuda", dtype="bfloat16", kv_cache_memory=64 << 20, attention_backend=name)
        engine = Engine(config)
        assert {backend.name for backend in engine.runner.paged.attention.backends} == {name}
        answers.append([completion.token_ids for completion in engine.generate(prompts, params)])
    same = sum(a == b for first, second in zip(*answers, strict=True) for a, b in zip(first, second, strict=True))
    assert same >= 0.8 * 7 * 24  # bf16 may tip a token over, after which answers part


def store_of(
    options: KVOptions, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, device: str = "cpu"
) -> KVStore:
    stream = StreamSpec(1, head_dim)
    spec = KVSpec(1, stream, stream, dtype.itemsize)
    return KVStore(KVLayout(spec, resolve(options, spec, block_size("flash-attn"))), 1, 1, dtype, device)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (KVOptions(nbits="4"), "it reads 16-bit KV only"),
        (KVOptions(nbits_value="8"), "it reads 16-bit KV only"),
        (KVOptions(), "it needs an NVIDIA GPU of compute capability 8.0 or more, not cpu"),
    ],
)
def test_refusals_say_why(options, reason):
    store, layer = store_of(options), AttentionLayer(4, 1, 64, 0.125)
    assert reason in FlashAttention().refuses(layer, store.layers[0])
    with pytest.raises(UnsupportedError, match=f"flash-attn: {reason}"):
        PagedAttention(store, [layer], "flash-attn")


@pytest.mark.skipif(not ON_GPU, reason="about a machine with a GPU")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, "runs in bfloat16 or float16, not float32"),
        (torch.bfloat16, 72 * 4, "multiple of 8 up to 256, not 288"),
        (torch.bfloat16, 64, None if installed() else "flash-attn"),
    ],
)
def test_refusals_on_a_gpu_say_why(dtype, head_dim, reason):
    store = store_of(KVOptions(), dtype, head_dim, "cuda")
    refused = FlashAttention().refuses(AttentionLayer(4, 1, head_dim, 0.1), store.layers[0])
    assert refused is None if reason is None else reason in refused


def test_its_pages_are_asked_for_by_name():
    assert block_size("flash-attn") == PAGE == store_of(KVOptions()).format.block_size
    assert {block_size(name) for name in ("auto", "triton", "torch")} == {64}
    assert store_of(KVOptions(nbits="4")).format.block_size == 64


def test_the_last_resort_takes_everything():
    store = store_of(KVOptions(nbits="4"))
    assert select(AttentionLayer(4, 1, 64, 0.125), store.layers[0]).name in {backend.name for backend in BACKENDS}
