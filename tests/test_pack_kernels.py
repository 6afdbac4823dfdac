"""The kernels that write the store against the torch code that defines them: byte for byte, in every format.

Where there is a GPU they run on it; elsewhere Triton interprets them on small shapes, and compiles them all the same.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvtool.errors import UnsupportedError
from kvtool.kernels.rotary_heads import RotaryHeads
from kvtool.kv import store as store_module
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import KVFormat, LayerFormat, StreamFormat
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.layers.norm import QKNorm
from kvtool.layers.rotary import Rope, Rotary

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")

REPOSITORY = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ON_GPU = DEVICE == "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256) if ON_GPU else (64, 80)
LATENT = (64, 512) if ON_GPU else (32, 128)  # elements of a rope key and of a latent, of which a token has one each
HEADS = st.integers(1, 8 if ON_GPU else 3)
EXAMPLES = settings(
    deadline=None,
    max_examples=int(os.environ.get("KVTOOL_TEST_EXAMPLES", 40 if ON_GPU else 5)),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # each shape is compiled or interpreted: shrinking takes an age
)
NUM_BLOCKS, NUM_SLOTS = 12, 3

# Numbers as models make them, and those on which an encoder errs: all are finite in each of DTYPES.
KINDS = {
    "normal": lambda shape: torch.randn(shape),
    "constant groups": lambda shape: torch.randn(shape[:-1]).mul(100)[..., None].expand(shape).clone(),
    "outliers": lambda shape: torch.randn(shape).where(torch.rand(shape) > 0.05, 6e4 * torch.randn(shape).sign()),
    "denormals": lambda shape: torch.randn(shape) * 10.0 ** torch.randint(-44, -5, shape),
    "offset": lambda shape: 200 + torch.randn(shape) * 0.1,
    "huge offset": lambda shape: 6e4 + torch.randn(shape) * 20,
    "signed zeros": lambda shape: torch.zeros(shape).where(torch.rand(shape) > 0.5, -0.0),
    "ties": lambda shape: torch.randint(-64, 64, shape) * 0.5,  # many quotients lie midway between codes
    "ties, odd steps": lambda shape: torch.randint(-200, 200, shape) * 0.75,
    "wide": lambda shape: torch.randn(shape) * 10.0 ** torch.randint(-6, 4, shape),
}


@pytest.fixture(autouse=True, scope="module")
def fused_multiply_add() -> Iterator[None]:
    """The interpreter rounds twice where a GPU rounds once."""

    def create_fma(self: object, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle((x.data.astype("f8") * y.data + z.data).astype("f4"), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        yield


@st.composite
def stream_formats(draw, dim: int, block_size: int, axis: str | None = None) -> StreamFormat:
    bits = draw(st.sampled_from(["8", "4", "2", "8", "4", "2", "fp8", "16"]))
    if bits == "16":
        return StreamFormat()
    if bits == "fp8":
        return StreamFormat("fp8", "token", dim, True)
    axis = axis or draw(st.sampled_from(["channel", "token"]))
    group = max(d for d in range(1, min(dim, draw(st.sampled_from([32, 64, 128]))) + 1) if dim % d == 0)
    return StreamFormat(bits, axis, block_size if axis == "channel" else group, draw(st.booleans()))


@st.composite
def layouts(draw, axis: str | None = None) -> tuple[KVLayout, torch.dtype]:
    """A cache of 1 to 3 layers, each with formats of its own or all alike."""
    dims = draw(st.sampled_from([*((dim, dim) for dim in HEAD_DIMS), LATENT]))
    dtype, heads = draw(st.sampled_from(DTYPES)), st.just(1) if dims == LATENT else HEADS
    block_size = 64 if axis else draw(st.sampled_from([32, 64, 128] if ON_GPU else [32, 64]))
    formats = [
        LayerFormat(*(draw(stream_formats(dim, block_size, axis)) for dim in dims))
        for _ in range(draw(st.integers(1, 2)))
    ]
    layers = tuple(formats[i % len(formats)] for i in range(draw(st.integers(1, 3))))
    residual = 0 if axis else draw(st.sampled_from([0, 0, block_size]))
    streams = (StreamSpec(draw(heads), dim) for dim in dims)
    return KVLayout(KVSpec(len(layers), *streams, dtype.itemsize), KVFormat(layers, block_size, residual)), dtype


class Pair:
    """One cache twice: written by torch on the CPU, and by the kernels. Both start with tails full of numbers."""

    def __init__(self, layout: KVLayout, dtype: torch.dtype, kind: str = "normal") -> None:
        self.layout, self.format, self.dtype, self.kind = layout, layout.format, dtype, kind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_module, "runs_kernels", lambda device, dtype: False)
            self.torch = KVStore(layout, NUM_BLOCKS, NUM_SLOTS, dtype)
            patch.setattr(store_module, "runs_kernels", lambda device, dtype: True)
            self.kernels = KVStore(layout, NUM_BLOCKS, NUM_SLOTS, dtype, DEVICE)
        for store in (self.torch, self.kernels):
            store.blocks.fill_(0xA5)  # which must stay where nothing is written, in padding too
        tails = self.draw((self.torch.tails.view(dtype).numel(), 1)).flatten()
        self.torch.tails.view(dtype).copy_(tails)
        self.kernels.tails.view(dtype).copy_(tails)

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        largest = min(65504, torch.finfo(self.dtype).max)
        return KINDS[self.kind](shape).float().clamp(-largest, largest).to(self.dtype)

    def step(self, spans: list[Span]) -> None:
        """One step of all layers in both; the kernels' keys and values are parts of a wider tensor."""
        spec, count = self.layout.spec, sum(span.length for span in spans)
        batch, device_batch = KVBatch.build(self.format, spans), KVBatch.build(self.format, spans, DEVICE)
        for expected, layer in zip(self.torch.layers, self.kernels.layers, strict=True):
            new = [self.draw((count, stream.heads, stream.dim)) for stream in (spec.key, spec.value)]
            near = expected.write(*new, batch)
            device_near = layer.write(*(torch.cat([x, x], 1).to(DEVICE)[:, : x.shape[1]] for x in new), device_batch)
            assert (near is None) == (device_near is None)
            if near and device_near:
                assert same(near.key, device_near.key) and same(near.value, device_near.value)
        self.torch.seal(batch)
        self.kernels.seal(device_batch)

    def check(self) -> None:
        assert self.kernels.take_fault().item() == 0
        assert torch.equal(self.torch.tails, self.kernels.tails.cpu())
        for index, (expected, written) in enumerate(zip(self.torch.layers, self.kernels.layers, strict=True)):
            for name in ("key", "value"):
                for array, x in getattr(expected, name).arrays.items():
                    assert same(x, getattr(written, name).arrays[array]), (index, name, array)
        assert torch.equal(self.torch.blocks, self.kernels.blocks.cpu())


def same(expected: torch.Tensor, x: torch.Tensor) -> bool:
    return torch.equal(expected.contiguous().view(torch.uint8), x.cpu().contiguous().view(torch.uint8))


@EXAMPLES
@given(layouts(), st.sampled_from(sorted(KINDS)), st.integers(0, 2**31), st.data())
def test_decodes_and_prompts_leave_the_bytes_that_torch_leaves(drawn, kind, seed, data):
    torch.manual_seed(seed)
    pair = Pair(*drawn, kind)
    size, blocks = pair.format.block_size, torch.randperm(NUM_BLOCKS).tolist()
    ends_block, anywhere = size * data.draw(st.integers(1, 2)) - 1, data.draw(st.integers(0, 2 * size))
    decodes = [Span(ends_block, ends_block + 1, blocks[:3], 2), Span(anywhere, anywhere + 1, blocks[3:6], 0)]
    prompt, chunk = data.draw(st.integers(2, 2 * size + 1)), data.draw(st.integers(2, size + 1))
    pair.step([*decodes, Span(0, prompt, blocks[6:], 1)])
    pair.step([Span(prompt, prompt + chunk, blocks[6:], 1)])
    pair.check()


@EXAMPLES
@given(layouts("token"), st.sampled_from(sorted(KINDS)), st.integers(0, 2**31))
def test_formats_that_pack_on_write_leave_the_bytes_that_torch_leaves(drawn, kind, seed):
    torch.manual_seed(seed)
    pair = Pair(*drawn, kind)
    assert pair.format.packs_on_write
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    pair.step([Span(65, 66, blocks[:2], 0), Span(0, 1, blocks[2:4], 1), Span(60, 70, blocks[4:6], 2)])
    pair.check()


@EXAMPLES
@given(
    st.one_of(layouts(), layouts("token")).filter(lambda drawn: drawn[0].spec.key == drawn[0].spec.value),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_keys_are_turned_on_their_way_into_the_store(drawn, whole, seed):
    """By quarters, which are exact, so that bytes can be compared; a prompt's, too, where blocks take all tokens."""
    torch.manual_seed(seed)
    pair = Pair(*drawn)
    size, blocks, (heads, dim) = pair.format.block_size, torch.randperm(NUM_BLOCKS).tolist(), shape_of(pair)
    rotated = dim - 16 if whole == 0 else dim
    spans = [Span(size - 1, size, blocks[:1], 2), Span(0, 1, blocks[3:4], 0), Span(size, size + 1, blocks[6:8], 1)]
    spans += [Span(3, 8, blocks[9:10], 1)] if pair.format.packs_on_write else []
    count = sum(span.length for span in spans)
    batch, device_batch = KVBatch.build(pair.format, spans), KVBatch.build(pair.format, spans, DEVICE)
    for expected, layer in zip(pair.torch.layers, pair.kernels.layers, strict=True):
        turns = torch.randint(4, (count, rotated // 2))
        cos, sin = (torch.tensor(x)[turns].to(pair.dtype) for x in ([1, 0, -1, 0], [0, 1, 0, -1]))
        cos, sin = torch.stack([cos, cos], 1)[:, None], torch.stack([-sin, sin], 1)[:, None]
        made = RotaryHeads(pair.draw((count, 5 * heads, dim)), 3 * heads, cos, sin, None)
        q, key = made.rotated()
        expected_near = expected.write(key, made.value, batch)
        on_device = RotaryHeads(made.made.to(DEVICE), 3 * heads, cos.to(DEVICE), sin.to(DEVICE), None)
        ready, near = layer.rotate_and_write(on_device, device_batch)
        assert same(q, ready) and (near is None) == (expected_near is None)
        if near and expected_near:
            assert same(expected_near.key, near.key) and same(expected_near.value, near.value)
    pair.check()


@EXAMPLES
@given(st.sampled_from(HEAD_DIMS), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_keys_are_normalised_on_their_way_into_the_store(dim, num_heads, kv_heads, seed):
    torch.manual_seed(seed)
    stream = StreamSpec(kv_heads, dim)
    layout = KVLayout(KVSpec(1, stream, stream, 2), KVFormat((LayerFormat(StreamFormat(), StreamFormat()),), 64, 0))
    pair, norm = Pair(layout, torch.float16), QKNorm(num_heads, kv_heads, dim, 1e-6, dtype=torch.float64, device=CPU)
    gains = pair.draw((2, dim))
    norm.weight.copy_(gains)
    rounded = QKNorm(num_heads, kv_heads, dim, 1e-6, dtype=pair.dtype, device=torch.device(DEVICE))
    rounded.weight.copy_(gains)
    cos, sin = Rotary(Rope(dim, 1e4), 100, dtype=pair.dtype, device=CPU)(torch.tensor([7, 70]))
    made = pair.draw((2, num_heads + 2 * kv_heads, dim))
    exact_q, exact_key = RotaryHeads(made.double(), num_heads, cos.double(), sin.double(), norm).rotated()
    batch = KVBatch.build(layout.format, [Span(7, 8, [3], 0), Span(70, 71, [1, 5], 1)], DEVICE)
    heads = RotaryHeads(made.to(DEVICE), num_heads, cos.to(DEVICE), sin.to(DEVICE), rounded)
    q, near = pair.kernels.layers[0].rotate_and_write(heads, batch)
    assert near is None
    q = q.cpu().double()
    codes = pair.kernels.layers[0].key.arrays["codes"].cpu().double()
    key = torch.stack([codes[3, :, 7], codes[5, :, 6]])
    assert (q - exact_q).norm() / exact_q.norm() < 5e-3
    assert (key - exact_key).norm() / exact_key.norm() < 5e-3


def shape_of(pair: Pair) -> tuple[int, int]:
    return pair.layout.spec.key.heads, pair.layout.spec.key.dim


PACKED = [
    StreamFormat(bits, axis, 32, symmetric)  # type: ignore[arg-type]
    for bits in ("8", "4", "2")
    for axis in ("token", "channel")
    for symmetric in (True, False)
]
PACKED.append(StreamFormat("fp8", "token", 64))


def fault_of(store: KVStore, batch: KVBatch, key: torch.Tensor, value: torch.Tensor) -> bool:
    store.layers[0].write(key.to(DEVICE), value.to(DEVICE), batch)
    store.seal(batch)
    return bool(store.take_fault().item())


BAD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30]
FAULTS = list(product(PACKED, BAD)) if ON_GPU else [(PACKED[5], BAD[0]), (PACKED[7], BAD[4])]


@pytest.mark.parametrize(
    ("fmt", "bad"), FAULTS, ids=lambda x: x.kind + x.grouping if isinstance(x, StreamFormat) else x
)
def test_what_the_torch_code_refuses_is_a_fault_once(fmt, bad):
    stream = StreamSpec(2, 64)
    layout = KVLayout(KVSpec(1, stream, stream, 4), KVFormat((LayerFormat(fmt, fmt),), 32, 0))
    pair = Pair(layout, torch.float32)
    new = [torch.randn(33, 2, 64) for _ in range(2)]
    spans = [Span(0, 33, [3, 2], 1)]
    batch, host_batch = KVBatch.build(layout.format, spans, DEVICE), KVBatch.build(layout.format, spans)
    assert not fault_of(pair.kernels, batch, *new)
    for x in new:
        broken = x.clone()
        broken[17, 1, 5] = bad
        with pytest.raises(UnsupportedError, match="65,504"):
            pair.torch.layers[0].write(*(broken if x is y else y for y in new), host_batch)
        assert fault_of(pair.kernels, batch, *(broken if x is y else y for y in new))
        assert not fault_of(pair.kernels, batch, *new)


def test_a_fault_is_the_error_that_torch_raises():
    check_fits(True)
    with pytest.raises(UnsupportedError, match="65,504"):
        check_fits(False)


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA")
def test_a_captured_decode_step_writes_and_seals_what_its_tensors_say_at_replay():
    stream, fmt = StreamSpec(4, 128), LayerFormat(PACKED[7], StreamFormat("4", "token", 64, False))
    layout = KVLayout(KVSpec(3, stream, stream, 2), KVFormat((fmt,) * 3, 32, 0))
    pair = Pair(layout, torch.bfloat16)
    spans = [Span(start, start + 1, [3 * i, 3 * i + 1, 3 * i + 2], i) for i, start in enumerate((30, 31, 62))]
    batch = KVBatch.build(layout.format, spans, DEVICE)
    new = [pair.draw((3, 4, 128)).to(DEVICE) for _ in range(2)]

    def step() -> None:
        for layer in pair.kernels.layers:
            layer.write(*new, batch)
        assert pair.kernels.sealer is not None
        pair.kernels.sealer.seal(batch.positions, batch.tail_slots, batch.block_table)

    blocks, tails = pair.kernels.blocks.clone(), pair.kernels.tails.clone()
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    pair.kernels.blocks.copy_(blocks)
    pair.kernels.tails.copy_(tails)
    for _ in range(3):
        now = KVBatch.build(layout.format, spans)
        for x in new:
            x.copy_(pair.draw((3, 4, 128)))
        batch.positions.copy_(now.positions)
        batch.rows.copy_(now.rows)
        graph.replay()
        for layer in pair.torch.layers:
            layer.write(*(x.cpu() for x in new), now)
        pair.torch.seal(now)
        pair.check()
        spans = [Span(span.end, span.end + 1, span.blocks, span.tail_slot) for span in spans]


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kvtool.kernels import encode, pack

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ELEMENTS = {"key", "value", "tails", "near_key", "near_value", "made", "q", "ready_key", "cos", "sin", "gain"}
POINTERS = {"memory": "*u8", "faults": "*i32"} | dict.fromkeys(
    ("tokens", "sources", "owners", "rows", "blocks", "positions", "tail_slots", "block_table", "starts"), "*i64")
POINTERS["eps"] = "fp32"

def resources(kernel, element, constants, num_warps):
    constants |= {"CHAINED": False} if "CHAINED" in kernel.arg_names else {}
    signature = {
        name: "constexpr" if name in constants else f"*{element}" if name in ELEMENTS else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source, options = ASTSource(kernel, signature, constants, aligned), {"num_warps": num_warps}
    built = compile(source, GPUTarget("cuda", 89, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    stack, local = map(int, re.search(r"STACK:(\\d+) .*LOCAL:(\\d+)", usage).groups())
    return built.metadata.shared, stack + local

def packing(bits, axis, symmetric, dim):
    group = {"16": 0, "fp8": dim}.get(bits, max(d for d in range(1, 65) if dim % d == 0))
    return encode.Packing(bits, axis, group, symmetric, 4, 64, dim, 0, 64 * dim * 4, 64 * dim * 5)

def check(kernel, element, key, value, rows, **constants):
    constants |= {"KEY": key, "VALUE": value}
    shared, spilled = resources(kernel, element, constants, max(key.warps(rows), value.warps(rows)))
    assert shared <= 99 << 10 and not spilled, (kernel, element, key, value, shared, spilled)

dim = int(sys.argv[1])
tail = encode.Packing("16", "token", 0, True, 4, 64, dim, 0)
seal = {"TAIL_KEY": tail, "TAIL_VALUE": tail, "RESIDUAL": 0}
check(pack._read_near, "bf16", tail, tail, 4)
token = {bits: [packing(bits, "token", symmetric, dim) for symmetric in (True, False)] for bits in sys.argv[2:]}
token["exact, fp8"] = [packing("16", "token", True, dim), packing("fp8", "token", True, dim)]
for bits, pair in token.items():
    check(pack._write_tokens, "bf16", *pair, 4)
    check(pack._rotate_and_write, "bf16", *pair, 4, ROTATED=dim, NORM=True, HEADS=8)
    check(pack._seal, "bf16", *pair, 64, **seal)
    if bits.isdigit():
        channel = [packing(bits, "channel", symmetric, dim) for symmetric in (True, False)]
        check(pack._write_blocks, "fp32" if bits == "4" else "bf16", *channel, 64)
"""


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256] if ON_GPU else [96])
def test_every_kernel_compiles_for_the_4090_without_spills(dim):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(dim), *(("8", "4", "2") if ON_GPU else ("4",))]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
