"""Attention over latents in Triton against its definitions: of a decode step in torch, and the torch backend.

Where there is a GPU the kernels run on it; elsewhere Triton interprets them on small shapes, in a process of its own.
That they compile for an RTX 4090 and an H100 needs no GPU.
"""

import pytest
import torch
from compiled import ON_GPU, check_fits, compile_for, compiles, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import PagedAttention
from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.torch_backend import TorchAttention
from kvtool.attention.triton_backend import TritonPrefill
from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore, Near
from kvtool.layers.mla import rotate_and_norm
from kvtool.layers.rotary import Rope, Rotary

triton = pytest.importorskip("triton")

from kvtool.kernels import mla_decode, mla_expanded, mla_inputs, mla_prefill  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]  # the interpreter multiplies no bf16
OPTIONS = [
    KVOptions(),
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2"),
    KVOptions(nbits="fp8"),
    KVOptions(nbits="4", q_group_size=32, residual_length=40),
    KVOptions(nbits="2", q_group_size=128),
    KVOptions(nbits="4", axis_key="token"),
    KVOptions(nbits="4", nbits_key="16"),
    KVOptions(nbits="2", nbits_key="4"),
    KVOptions(nbits_key="8", nbits_value="16"),
]


def name(options: KVOptions) -> str:
    return " ".join(f"{key}={value}" for key, value in vars(options).items() if value is not None) or "16"


class Decoding:
    """Sequences of these lengths in a store of one layer, each with its newest token still to be attended."""

    def __init__(
        self,
        options: KVOptions,
        num_heads: int,
        dims: tuple[int, int],
        lengths: list[int],
        dtype: torch.dtype,
        seed: int = 0,
        device: str = DEVICE,
    ) -> None:
        torch.manual_seed(seed)
        latent, rope = dims
        spec = KVSpec(1, StreamSpec(1, rope), StreamSpec(1, latent), dtype.itemsize, latent=True)
        self.format = resolve(options, spec)
        needed = [self.format.num_blocks(length) for length in lengths]
        self.store = KVStore(KVLayout(spec, self.format), sum(needed) + 3, len(lengths) + 1, dtype, device)
        self.store.blocks.random_(0, 64)  # what a mask leaves out is finite, and wrong
        ids = iter(torch.randperm(sum(needed) + 3).tolist())
        self.kv, self.dtype = self.store.layers[0], dtype
        self.layer = AttentionLayer(num_heads, 1, latent + rope, 0.3 * (latent + rope) ** -0.5, latent_dim=latent)
        self.spread = [torch.rand(dim, device=device) * 4 for dim in (rope, latent)]  # channels are not alike
        spans = []
        for slot, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            blocks = [next(ids) for _ in range(count)]
            if length > 1:
                self.store.seal(self._write([Span(0, length - 1, blocks, slot)]))
            spans.append(Span(length - 1, length, blocks, slot))
        self.batch = self._write(spans)
        shape = (len(lengths), num_heads, latent + rope)
        self.q = (torch.randn(shape, device=device) * torch.rand(shape[:2], device=device)[..., None] * 4).to(dtype)

    def _write(self, spans: list[Span]) -> KVBatch:
        batch = KVBatch.build(self.format, spans, self.spread[0].device)
        tokens = len(batch.positions)
        key, value = (torch.randn(tokens, 1, len(s), device=s.device) * s + s.flip(0) for s in self.spread)
        self.kv.write(key.to(self.dtype), value.to(self.dtype), batch)
        return batch

    def arguments(self) -> tuple[object, ...]:
        batch = self.batch
        places = (batch.block_table, batch.positions, batch.visible, batch.tail_slots)
        return (self.q, self.kv.key.packed, self.kv.value.packed, *places)

    def error(self) -> float:
        """Relative error of the kernel, which writes over NaN."""
        out = torch.full_like(self.q[..., : self.layer.latent_dim], float("nan")).contiguous()
        mla_decode.latent_decode(*self.arguments(), scale=self.layer.scale, out=out)
        exact = mla_decode.latent_decode_reference(*self.arguments(), scale=self.layer.scale)
        return float((out.double() - exact).norm() / exact.norm())


@runs
@settings(deadline=None, max_examples=300 if ON_GPU else 12)
@given(
    options=st.sampled_from(OPTIONS),
    num_heads=st.sampled_from([1, 16, 20, 128] if ON_GPU else [1, 16, 20]),
    dims=st.sampled_from([(512, 64), (128, 64), (64, 32)] if ON_GPU else [(128, 64), (64, 32)]),
    lengths=st.lists(st.integers(1, 5000 if ON_GPU else 300), min_size=1, max_size=9 if ON_GPU else 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_decode_equals_its_definition(options, num_heads, dims, lengths, dtype, seed):
    assert Decoding(options, num_heads, dims, lengths, dtype, seed).error() < 5e-3


@runs
@settings(deadline=None, max_examples=100 if ON_GPU else 8)
@given(
    tokens=st.integers(1, 300 if ON_GPU else 3),
    num_heads=st.integers(1, 40 if ON_GPU else 10),
    dims=st.sampled_from([(512, 64, 128), (96, 20, 12)]),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_rotation_and_norm(tokens, num_heads, dims, interleaved, dtype, seed):
    torch.manual_seed(seed)
    latent, rope, nope = dims
    q, latents = (
        torch.randn(tokens, num_heads * (nope + rope) + latent + rope, device=DEVICE)
        .to(dtype)
        .tensor_split([num_heads * (nope + rope)], dim=-1)
    )
    gain, q = torch.rand(latent, device=DEVICE).to(dtype), q.view(tokens, num_heads, nope + rope)
    cos, sin = Rotary(Rope(rope, 1e4), 1000, dtype=dtype, device=torch.device(DEVICE))(
        torch.randint(1000, (tokens,), device=DEVICE)
    )
    given = (q, latents, cos, sin, gain)
    outs = mla_inputs.rotate_and_norm(*given, 1e-6, interleaved=interleaved)
    exact = rotate_and_norm(*(x.cpu().double() for x in given), 1e-6, interleaved=interleaved)
    for out, expected in zip((outs[0][..., latent:], *outs[1:]), (exact[0][..., latent:], *exact[1:]), strict=True):
        assert float((out.cpu().double() - expected).norm() / expected.norm()) < 5e-3


@runs
@settings(deadline=None, max_examples=200 if ON_GPU else 6)
@given(
    options=st.sampled_from(OPTIONS),
    num_heads=st.sampled_from([1, 16, 20]),
    dims=st.sampled_from([(512, 64), (128, 64)] if ON_GPU else [(128, 64), (64, 32)]),
    cuts=st.lists(st.integers(1, 1500 if ON_GPU else 70), min_size=1, max_size=3 if ON_GPU else 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_prompts_in_any_chunking_equal_torch_in_float64(options, num_heads, dims, cuts, dtype, seed):
    """Two prompts and a decode in each step, through the store; both stores are given what `dtype` holds."""
    torch.manual_seed(seed)
    latent, rope = dims
    layer = AttentionLayer(num_heads, 1, latent + rope, 0.3 * (latent + rope) ** -0.5, latent_dim=latent)
    ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
    stores = []
    for store_dtype in (dtype, torch.float64):
        spec = KVSpec(1, StreamSpec(1, rope), StreamSpec(1, latent), store_dtype.itemsize, latent=True)
        fmt = resolve(options, spec)
        per_seq = max(1, fmt.num_blocks(ends[-1] + 1))
        store = KVStore(KVLayout(spec, fmt), 3 * per_seq, 3, store_dtype, DEVICE)
        stores.append((store, PagedAttention(store, [layer], "triton" if store_dtype == dtype else "torch")))
    blocks = [list(range(i * per_seq, (i + 1) * per_seq)) for i in range(3)]
    scale = torch.rand(latent + rope, device=DEVICE) * 3
    for step, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        spans = [Span(step, step + 1, blocks[2], 2)]
        spans += [Span(start, end, blocks[i], i) for i in range(2) if end - start > 1]
        tokens = sum(span.length for span in spans)
        q = (torch.randn(tokens, num_heads, latent + rope, device=DEVICE) * 2).to(dtype)
        key, value = (
            x.to(dtype)
            for x in (torch.randn(tokens, 1, latent + rope, device=DEVICE) * scale).split([rope, latent], -1)
        )
        outs = []
        for store, attend in stores:
            given = (x.to(store.dtype) for x in (q, key, value))
            batch = KVBatch.build(store.format, spans, DEVICE)
            outs.append(attend(0, *given, batch).double())
            store.seal(batch)
        assert float((outs[0] - outs[1]).norm() / outs[1].norm()) < 1e-2


@runs
@settings(deadline=None, max_examples=200 if ON_GPU else 6)
@given(
    options=st.sampled_from(OPTIONS),
    num_heads=st.sampled_from([1, 3, 16] if ON_GPU else [1, 2]),
    dims=st.sampled_from([(512, 64, 128, 128), (512, 64, 96, 80)] if ON_GPU else [(64, 32, 16, 32), (64, 32, 24, 20)]),
    lengths=st.lists(
        st.tuples(st.integers(0, 1500 if ON_GPU else 150), st.integers(2, 900 if ON_GPU else 40)),
        min_size=1,
        max_size=4 if ON_GPU else 2,
    ),
    room=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_expanded_prompts_equal_torch_in_float64(options, num_heads, dims, lengths, room, dtype, seed):
    """Prompts with and without context beside a decode, with `room` blocks in a piece of contexts."""
    torch.manual_seed(seed)
    latent, rope, nope, value = dims
    layer = AttentionLayer(num_heads, 1, latent + rope, 0.3 * (nope + rope) ** -0.5, latent_dim=latent)
    products = (torch.randn(num_heads, nope + value, latent, device=DEVICE) * latent**-0.5).to(dtype)
    scale, outs = torch.rand(latent + rope, device=DEVICE) * 3, []
    bounds = [(9, 10), *((start, start + length) for start, length in lengths)]
    x = [
        [torch.randn(end, *shape, device=DEVICE).to(dtype) for shape in ((num_heads, nope), (num_heads, latent + rope))]
        + [(torch.randn(end, 1, latent + rope, device=DEVICE) * scale).to(dtype)]
        for _, end in bounds
    ]
    for store_dtype, backend in ((dtype, "triton"), (torch.float64, "torch")):
        spec = KVSpec(1, StreamSpec(1, rope), StreamSpec(1, latent), store_dtype.itemsize, latent=True)
        fmt = resolve(options, spec)
        counts = [fmt.num_blocks(end) for _, end in bounds]
        ids = torch.randperm(sum(counts)).split(counts)
        store = KVStore(KVLayout(spec, fmt), sum(counts) + 1, len(bounds), store_dtype, DEVICE)
        attend = PagedAttention(store, [layer], backend)
        spans = [Span(*bound, own.tolist(), slot) for slot, (bound, own) in enumerate(zip(bounds, ids, strict=True))]
        for is_now in (False, True):
            parts = [(s, slice(s.start, s.end) if is_now else slice(0, s.start)) for s in spans if is_now or s.start]
            step = sorted(
                (Span(at.start, at.stop, s.blocks, s.tail_slot) for s, at in parts), key=lambda span: span.length > 1
            )
            columns = zip(*(x[s.tail_slot] for s in step), strict=True)
            given = (torch.cat([part[s.start : s.end] for part, s in zip(c, step, strict=True)]) for c in columns)
            q, absorbing, made = (part.to(store_dtype) for part in given)
            queries = LatentQueries(q, absorbing, products.to(store_dtype))
            batch = KVBatch.build(fmt, step, DEVICE)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LatentQueries, "expand", lambda *_: is_now)  # noqa: B023
                row = dtype.itemsize * fmt.block_size * (num_heads * (nope + value) + latent + rope)
                patch.setattr(mla_expanded, "WORKSPACE", room * row)
                out = attend(0, queries, made[..., latent:], made[..., :latent], batch)
            store.seal(batch)
        outs.append(out.double())
    assert float((outs[0] - outs[1]).norm() / outs[1].norm()) < 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_definition_agrees_with_the_torch_backend(options):
    """Two readings of the store's bytes: the kernel's reference, and the codecs behind `TorchAttention`."""
    case = Decoding(options, 6, (128, 64), [1, 70, 300], torch.float64, device="cpu")
    exact = mla_decode.latent_decode_reference(*case.arguments(), scale=case.layer.scale)
    out = torch.full_like(exact, float("nan"))
    TorchAttention().decode(case.q, case.kv, case.batch, case.layer, out)
    torch.testing.assert_close(out, exact)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("nbits", ["16", "4"])
def test_a_captured_step_serves_other_sequences(nbits):
    """The launch reads lengths from memory alone: replayed on longer sequences, a graph gives what a new call gives."""
    case = Decoding(KVOptions(nbits=nbits), 16, (512, 64), [3000, 40, 129], torch.bfloat16)
    static = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
    static[4], static[5] = torch.zeros_like(static[4]), torch.zeros_like(static[5])
    mla_decode.latent_decode(*static, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode.latent_decode(*static, scale=0.1)
    static[4].copy_(case.batch.positions)
    static[5].copy_(case.batch.visible)
    graph.replay()
    assert torch.equal(out, mla_decode.latent_decode(*case.arguments(), scale=0.1))


@compiles
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("options", OPTIONS[:5], ids=name)
def test_it_compiles_without_spills(options, capability, monkeypatch):
    case = Decoding(options, 16, (512, 64), [130], torch.bfloat16, device="cpu")
    compiled = compile_for(capability, monkeypatch, mla_decode, mla_prefill)
    mla_decode.latent_decode(*case.arguments(), scale=1.0)
    tokens = torch.empty(9, 1, 512, dtype=torch.bfloat16)
    batch = KVBatch.build(case.format, [Span(0, 9, [0], 0)], "cpu")
    near = Near(tokens[..., :64], tokens) if case.kv.is_exact or not case.format.packs_on_write else None
    q = torch.empty(9, 16, 576, dtype=torch.bfloat16)
    table = torch.empty(9, 1, 4, 32, dtype=torch.bfloat16)
    latents = torch.empty(9, 576, dtype=torch.bfloat16)
    mla_inputs.rotate_and_norm(
        q[..., :192].contiguous(), latents, table[:, :, :2], table[:, :, 2:], latents[0, :512], 1e-6, interleaved=True
    )
    TritonPrefill().prefill(q, near, case.kv, batch, case.layer, torch.empty_like(q[..., :512]))
    assert compiled
    for kernel in compiled:
        check_fits(kernel, capability)


@compiles
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize(
    ("nbits", "is_large", "workspace"),  # of 1: each block is a piece
    [("16", False, 1 << 27), ("4", True, 1)],
)
def test_expanded_prompts_compile_without_spills(nbits, is_large, workspace, capability, monkeypatch):
    case = Decoding(KVOptions(nbits=nbits), 16, (512, 64), [130], torch.bfloat16, device="cpu")
    compiled = compile_for(capability, monkeypatch, mla_expanded)
    monkeypatch.setattr(mla_expanded, "num_sms", lambda device: 1 if is_large else 1000)
    monkeypatch.setattr(mla_expanded, "WORKSPACE", workspace)
    q = torch.empty(9, 16, 576, dtype=torch.bfloat16)
    queries = LatentQueries(q[..., :128], q, q.new_empty(16, 256, 512))
    near, batch = Near(q[:, :1, :64], q[:, :1, 64:]), KVBatch.build(case.format, [Span(130, 139, [0, 1, 2], 0)], "cpu")
    TritonPrefill().prefill(queries, near, case.kv, batch, case.layer, q.new_empty(9, 16, 128))
    assert compiled
    for kernel in compiled:
        check_fits(kernel, capability)


@pytest.mark.parametrize(
    ("options", "dims", "reason"),
    [
        (KVOptions(nbits="4", symmetric=True), (128, 64), "symmetric"),
        (KVOptions(nbits="4", axis_value="channel"), (128, 64), "scales per channel"),
        (KVOptions(), (96, 64), "a latent must have 64, 128, 256, 512 elements"),
        (KVOptions(nbits="2"), (512, 64), None),
    ],
)
def test_refusals_say_why(options, dims, reason):
    case = Decoding(options, 4, dims, [5], torch.bfloat16, device="cpu")
    refused = mla_decode.refuses(case.kv.key.packed, case.kv.value.packed)
    assert refused is None if reason is None else reason in refused
