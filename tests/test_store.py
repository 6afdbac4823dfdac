"""The KV store byte by byte: where every field lies, what a step may touch, and that tokens alone decide the bytes."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import PagedAttention
from kvtool.attention.layer import AttentionLayer
from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import KVFormat, LayerFormat, StreamFormat, resolve
from kvtool.kv.layout import ALIGNMENT, KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
OPTIONS = {
    "16": KVOptions(),
    "8": KVOptions(nbits="8"),
    "4": KVOptions(nbits="4"),
    "2 in 32": KVOptions(nbits="2", q_group_size=32),
    "4 in 32, window": KVOptions(nbits="4", q_group_size=32, residual_length=40),
    "4 token": KVOptions(nbits="4", axis_key="token"),
    "8 token, symmetric": KVOptions(nbits="8", axis_key="token", symmetric=True),
    "4 token, rotated": KVOptions(nbits="4", axis_key="token", rotate=True),
    "2 token, rotated, window": KVOptions(nbits="2", axis_key="token", rotate=True, residual_length=32),
    "fp8": KVOptions(nbits="fp8"),
    "fp8, window": KVOptions(nbits="fp8", residual_length=64),
    "16 and 2": KVOptions(nbits_key="16", nbits_value="2"),
    "4 and 16": KVOptions(nbits_key="4", nbits_value="16", q_group_size=32),
    "channel both, symmetric": KVOptions(nbits="4", axis_value="channel", symmetric=True, q_group_size=32),
    "token and channel": KVOptions(nbits="4", axis_key="token", axis_value="channel", q_group_size=32),
}
BY_LAYER = KVFormat(
    (
        LayerFormat(StreamFormat("8", "channel", 32, False), StreamFormat("4", "token", 4, False)),
        LayerFormat(StreamFormat("2", "channel", 32, False), StreamFormat("2", "token", 4, True)),
        LayerFormat(StreamFormat(), StreamFormat("fp8", "token", 4)),
    ),
    block_size=32,
    residual=0,
)


def spec(key: tuple[int, int], value: tuple[int, int], element_size: int = 8, layers: int = 2) -> KVSpec:
    return KVSpec(layers, StreamSpec(*key), StreamSpec(*value), element_size)


# Bytes and where they lie.


def block_parts(store: KVStore) -> list[torch.Tensor]:
    """The packed memory as [num_blocks, bytes], a tensor for each layer."""
    sizes = [store.layout.layer_block_bytes(layer) for layer in range(len(store.layers))]
    parts = store.blocks.split([store.num_blocks * size for size in sizes])
    return [part.view(store.num_blocks, -1) for part in parts]


def slot_bytes(store: KVStore, num_slots: int) -> torch.Tensor:
    return store.tails.view(num_slots, -1)


@pytest.mark.parametrize("element_size", DTYPES)
@pytest.mark.parametrize(
    "key, value",
    [((2, 64), (2, 64)), ((1, 80), (1, 80)), ((3, 36), (3, 36)), ((1, 64), (1, 512)), ((2, 192), (2, 128))],
    ids=str,
)
@pytest.mark.parametrize("name", [*OPTIONS, "by layer"])
def test_every_field_has_bytes_of_its_own_and_the_sum_is_what_is_allocated(name, key, value, element_size):
    model = spec(key, value, element_size, layers=3)
    fmt = BY_LAYER if name == "by layer" else resolve(OPTIONS[name], model)
    layout, blocks, slots = KVLayout(model, fmt), 3, 2
    store = KVStore(layout, blocks, slots, DTYPES[element_size])
    assert store.nbytes == blocks * layout.block_bytes + slots * layout.tail_bytes
    assert store.blocks.nbytes == blocks * layout.block_bytes and store.tails.nbytes == slots * layout.tail_bytes
    assert layout.tail_bytes == fmt.tail_tokens * 3 * (key[0] * key[1] + value[0] * value[1]) * element_size

    marks = iter(range(1, 10**6))
    written = []
    for layer in store.layers:
        for stream in (layer.key, layer.value):
            for array in stream.arrays.values():
                assert array.data_ptr() % ALIGNMENT == store.blocks.data_ptr() % ALIGNMENT
                written += [(array[block].view(torch.uint8), next(marks) % 255 + 1) for block in range(blocks)]
            written += [(stream.tail[slot].view(torch.uint8), next(marks) % 255 + 1) for slot in range(slots)]
    for view, mark in written:
        view.fill_(mark)
    assert all((view == mark).all() for view, mark in written), "no view writes into another"

    fields = [field for layer in range(3) for stream in layout.fields(layer) for field in stream]
    padding = sum(-field.nbytes % ALIGNMENT for field in fields)
    assert layout.block_bytes == sum(field.nbytes for field in fields) + padding
    assert (store.blocks == 0).sum() == blocks * padding, "all but the padding is some field's"
    assert (store.tails == 0).sum() == 0
    assert all(len(part.unique(dim=0)) == blocks for part in block_parts(store))


@pytest.mark.parametrize("name", [*OPTIONS, "by layer"])
def test_a_field_lies_in_the_block_and_slot_that_it_is_indexed_by(name):
    model = spec((2, 64), (2, 64), layers=3)
    store = KVStore(KVLayout(model, BY_LAYER if name == "by layer" else resolve(OPTIONS[name], model)), 4, 3, DTYPES[8])
    for index, layer in enumerate(store.layers):
        for stream in (layer.key, layer.value):
            for array in stream.arrays.values():
                store.blocks.zero_()
                array[2].view(torch.uint8).fill_(7)
                touched = [part.any(1).tolist() for part in block_parts(store)]
                assert touched == [[i == 2 and layer == index for i in range(4)] for layer in range(3)]
            store.tails.zero_()
            stream.tail[1].fill_(7)
            expected = [i == 1 and store.format.tail_tokens > 0 for i in range(3)]
            assert slot_bytes(store, 3).any(1).tolist() == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_bytes_for_lengths_are_those_of_blocks_and_tails(name):
    model = spec((2, 64), (2, 64))
    layout = KVLayout(model, resolve(OPTIONS[name], model))
    fmt = layout.format
    lengths = [0, 1, 31, 32, 33, 200]
    blocks = sum(-(-fmt.packed_tokens(n) // fmt.block_size) for n in lengths)
    assert layout.bytes_for(lengths) == blocks * layout.block_bytes + 6 * layout.tail_bytes
    assert layout.num_blocks_within(layout.bytes_for(lengths), 6) == blocks
    assert layout.num_blocks_within(layout.bytes_for(lengths) - 1, 6) == blocks - 1


def test_bytes_of_a_known_format():
    """4 bits of 2 × 64: codes 4,096 B; K scale and zero 256 B each, V 256 B each; tail 64 tokens in bf16."""
    model = spec((2, 64), (2, 64), element_size=2, layers=1)
    layout = KVLayout(model, resolve(KVOptions(nbits="4"), model))
    assert layout.block_bytes == 2 * (4096 + 256 + 256)
    assert layout.tail_bytes == 64 * 2 * 2 * 64 * 2
    assert layout.bits_per_element == 4.5
    key, value = layout.fields(0)
    assert [(f.name, f.offset, f.nbytes) for f in key] == [
        ("codes", 0, 4096),
        ("scale", 4096, 256),
        ("zero", 4352, 256),
    ]
    assert [f.shape for f in value] == [(2, 64, 32), (2, 64, 1), (2, 64, 1)]


# What a step writes.


@dataclass
class Sequence:
    """One sequence's inputs, and the memory that it owns in a store."""

    q: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    blocks: list[int]
    slot: int

    @classmethod
    def random(cls, length: int, seed: int, blocks: list[int], slot: int) -> "Sequence":
        generator = torch.Generator().manual_seed(seed)
        q, key, value = torch.randn(3, 2, length, 2, 32, generator=generator, dtype=torch.float64)
        key[..., 3] += 20  # the outlier channel that keys are known for
        return cls(q, key, value, blocks, slot)


SPEC = spec((2, 32), (2, 32))
LAYER = AttentionLayer(num_heads=2, num_kv_heads=2, head_dim=32, scale=0.2)
NUM_BLOCKS, NUM_SLOTS = 20, 4


def empty_store(fmt: KVFormat, fill: int = 0) -> KVStore:
    store = KVStore(KVLayout(SPEC, fmt), NUM_BLOCKS, NUM_SLOTS, torch.float64)
    store.blocks.fill_(fill)
    return store


def step(store: KVStore, work: list[tuple[Sequence, int, int]]) -> list[torch.Tensor]:
    """Run positions `start` to `end` of each sequence in one batch and seal; outputs [layers, tokens, heads, D].

    Every byte that no span owns to write must come out as it was.
    """
    work, order = zip(
        *sorted(zip(work, range(len(work)), strict=True), key=lambda w: w[0][2] - w[0][1] > 1), strict=True
    )
    fmt = store.format
    spans = [Span(start, end, s.blocks[: fmt.num_blocks(end)], s.slot) for s, start, end in work]
    before_blocks, before_tails = [part.clone() for part in block_parts(store)], store.tails.clone()
    writable = {block for span in spans for block in span.blocks[fmt.packed_tokens(span.start) // fmt.block_size :]}

    batch, attend = KVBatch.build(fmt, spans), PagedAttention(store, [LAYER] * 2)
    outs = [
        attend(
            index,
            *(torch.cat([getattr(s, name)[index, a:b] for s, a, b in work]) for name in ("q", "key", "value")),
            batch,
        )
        for index in range(2)
    ]
    store.seal(batch)

    others = [block for block in range(NUM_BLOCKS) if block not in writable]
    for was, now in zip(before_blocks, block_parts(store), strict=True):
        assert torch.equal(was[others], now[others]), "a step writes into its own unsealed blocks alone"
    if fmt.tail_tokens:
        idle = [slot for slot in range(NUM_SLOTS) if slot not in {span.tail_slot for span in spans}]
        assert torch.equal(before_tails.view(NUM_SLOTS, -1)[idle], slot_bytes(store, NUM_SLOTS)[idle])
    split = torch.stack(outs).split([end - start for _, start, end in work], dim=1)
    return [out for _, out in sorted(zip(order, split, strict=True))]


def sealed(store: KVStore, sequence: Sequence, length: int) -> list[bytes]:
    """The raw bytes of all that a sequence of `length` tokens has packed, by layer, stream and array."""
    fmt, found = store.format, []
    blocks = sequence.blocks[: fmt.num_blocks(length)]
    for layer in store.layers:
        for stream in (layer.key, layer.value):
            for array in stream.arrays.values():
                rows = array[blocks].transpose(1, 2).flatten(0, 1)  # [tokens or blocks, heads, n]
                packed = fmt.packed_tokens(length) if array.shape[2] > 1 else len(blocks)
                found.append(bytes(rows[:packed].contiguous().view(torch.uint8).flatten().tolist()))
    return found


def alone(fmt: KVFormat, sequence: Sequence, length: int) -> tuple[torch.Tensor, list[bytes]]:
    """Outputs and sealed bytes of a sequence that runs as one span in a store of its own."""
    store = empty_store(fmt)
    own = Sequence(sequence.q, sequence.key, sequence.value, list(range(NUM_BLOCKS)), 0)
    return step(store, [(own, 0, length)])[0], sealed(store, own, length)


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(OPTIONS)),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_tokens_alone_decide_sealed_bytes_and_outputs(name, lengths, seed, data):
    """Whatever the chunks, the block ids, the slots and the company: as if alone, run whole and first in its store."""
    fmt = resolve(OPTIONS[name], SPEC)
    ids = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    slots = data.draw(st.permutations(range(NUM_SLOTS)))
    sequences = []
    for index, length in enumerate(lengths):
        blocks = [ids.pop() for _ in range(fmt.num_blocks(length))]
        sequences.append(Sequence.random(length, seed + index, blocks, slots[index]))

    store, done, outs = empty_store(fmt, fill=data.draw(st.integers(0, 60))), [0] * len(lengths), [[] for _ in lengths]
    while any(d < length for d, length in zip(done, lengths, strict=True)):
        running = [i for i in range(len(lengths)) if done[i] < lengths[i]]
        chosen = data.draw(st.sets(st.sampled_from(running), min_size=1).map(sorted))
        sizes = [data.draw(st.sampled_from([1, 1, 2, 17, 32, 64, 65, 200])) for _ in chosen]
        work = [(sequences[i], done[i], min(done[i] + n, lengths[i])) for i, n in zip(chosen, sizes, strict=True)]
        for i, out, (_, _, end) in zip(chosen, step(store, work), work, strict=True):
            outs[i].append(out)
            done[i] = end

    for sequence, length, parts in zip(sequences, lengths, outs, strict=True):
        expected, expected_bytes = alone(fmt, sequence, length)
        agree(torch.cat(parts, dim=1), expected)
        assert sealed(store, sequence, length) == expected_bytes


@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_side_by_side_is_prefill(name):
    """Three sequences of different lengths decode in one batch, past several seals; nothing tells it from prefill."""
    fmt = resolve(OPTIONS[name], SPEC)
    prompts, answer = (1, 60, 31), 70
    store, ids = empty_store(fmt), iter(torch.randperm(NUM_BLOCKS).tolist())
    sequences = [
        Sequence.random(n + answer, n, [next(ids) for _ in range(fmt.num_blocks(n + answer))], slot)
        for slot, n in enumerate(prompts)
    ]
    outs = [[out] for out in step(store, [(s, 0, n) for s, n in zip(sequences, prompts, strict=True)])]
    for t in range(answer):
        work = [(s, n + t, n + t + 1) for s, n in zip(sequences, prompts, strict=True)]
        for parts, out in zip(outs, step(store, work), strict=True):
            parts.append(out)
    for sequence, n, parts in zip(sequences, prompts, outs, strict=True):
        expected, expected_bytes = alone(fmt, sequence, n + answer)
        agree(torch.cat(parts, dim=1), expected)
        assert sealed(store, sequence, n + answer) == expected_bytes
        assert n < 60 or expected_bytes[0]


@pytest.mark.parametrize("name", [name for name in OPTIONS if not resolve(OPTIONS[name], SPEC).packs_on_write])
def test_the_tail_holds_what_is_not_packed_and_no_more(name):
    fmt = resolve(OPTIONS[name], SPEC)
    store = empty_store(fmt)
    plain = resolve(KVOptions(nbits="4"), SPEC).layers[0].key  # rotation happens above the store
    sequence = Sequence.random(200, 5, list(range(fmt.num_blocks(200))), 1)
    done = 0
    for size in (1, 1, 70, 1, 1, 40, 30, 33, 1, 1):
        step(store, [(sequence, done, done + size)])
        done += size
        first = fmt.packed_tokens(done)
        assert 0 <= done - first < fmt.tail_tokens
        if fmt.layers[0].key.rotate == plain.rotate:
            for index, layer in enumerate(store.layers):
                for stream, exact in ((layer.key, sequence.key), (layer.value, sequence.value)):
                    rows = torch.arange(first, done) % fmt.tail_tokens
                    assert torch.equal(stream.tail[1][:, rows], exact[index, first:done].transpose(0, 1))


@pytest.mark.parametrize("name", ["4", "2 in 32", "4 token", "16"])
def test_shared_blocks_serve_a_second_sequence(name):
    """A prefix hit: it starts behind blocks that another has sealed, and answers as if it had computed them."""
    fmt = resolve(OPTIONS[name], SPEC)
    store = empty_store(fmt)
    first = Sequence.random(150, 9, list(range(5)), 0)
    step(store, [(first, 0, 150)])
    second = Sequence.random(150, 10, [0, 1, *range(10, 14)], 2)
    hit = 2 * fmt.block_size
    for name in ("q", "key", "value"):
        getattr(second, name)[:, :hit] = getattr(first, name)[:, :hit]
    expected, expected_bytes = alone(fmt, second, 150)
    agree(step(store, [(second, hit, 150)])[0], expected[:, hit:])
    assert sealed(store, second, 150) == expected_bytes


ALONE = """
import sys
import torch
from kvtool.attention import PagedAttention
from kvtool.attention.layer import AttentionLayer
from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.blocks import BlockPool, SlotPool
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore

torch.manual_seed(0)
spec = KVSpec(1, StreamSpec(1, 32), StreamSpec(1, 32), 4)
fmt = resolve(KVOptions(nbits="4", q_group_size=32), spec)
store, pool, slots = KVStore(KVLayout(spec, fmt), 8, 2, torch.float32), BlockPool(8), SlotPool(2)
attend = PagedAttention(store, [AttentionLayer(2, 1, 32, 32**-0.5)])
q, key, value = torch.randn(100, 2, 32), torch.randn(100, 1, 32), torch.randn(100, 1, 32)
blocks, slot, outs = [pool.allocate() for _ in range(3)], slots.allocate(), []
for start, end in [(0, 70), *((t, t + 1) for t in range(70, 100))]:
    batch = KVBatch.build(fmt, [Span(start, end, blocks, slot)])
    outs.append(attend(0, q[start:end], key[start:end], value[start:end], batch))
    store.seal(batch)
exact = torch.nn.functional.scaled_dot_product_attention(
    q.transpose(0, 1), key.transpose(0, 1).expand(2, -1, -1), value.transpose(0, 1).expand(2, -1, -1), is_causal=True
).transpose(0, 1)
error = (torch.cat(outs) - exact).abs()
assert error[:32].max() < 1e-5, "nothing is packed yet"
assert 1e-5 < error.max() < 0.2, error.max()
ours = {name for name in sys.modules if name.startswith("kvtool")}
print(*sorted(name.split(".")[1] for name in ours if "." in name))
"""


def test_another_engine_can_use_the_store_and_attention_without_ours():
    result = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == {"attention", "config", "errors", "kernels", "kv", "ranges"}
