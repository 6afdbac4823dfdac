"""Steps padded to shapes that do not depend on them, against the same steps as they are.

The integers are compared everywhere, what kernels make of them on a GPU, elsewhere in Triton's interpreter.
"""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import assume, given, settings
from test_batch import OPTIONS, SPEC, steps

from kvtool import cuda_graph, runner
from kvtool.attention import BACKENDS
from kvtool.attention.layer import AttentionLayer
from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.kv import batch as batch_module
from kvtool.kv import fixed
from kvtool.kv import store as store_module
from kvtool.kv.batch import Cut, KVBatch, Span, cut
from kvtool.kv.fixed import MOST_PROMPTS, Room, fixed_batch
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.request import SamplingParams

ROOM = Room(decodes=8, tokens=512)


def filled(room: Room, fmt: KVFormat, spans: list[Span], how: Cut, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What a graph reads: all that `lay_out` gives, and -1 behind it."""
    laid, tensors = room.lay_out(fmt, spans, how), {}
    for name, shape in room.shapes(fmt).items():
        flat = torch.full(shape, -1, dtype=torch.int64).flatten()
        flat[: laid[name].size] = torch.from_numpy(laid[name].ravel())
        tensors[name] = flat.view(shape).to(device)
    return tensors


@settings(deadline=None)
@given(steps())
def test_a_padded_step_does_what_the_step_does_and_no_more(drawn):
    fmt, spans = drawn
    batch, n = KVBatch.build(fmt, spans), sum(span.length == 1 for span in spans)
    assume(n < len(spans) and ROOM.holds(fmt, spans))
    tensors, tile = filled(ROOM, fmt, spans, Cut(24)), 24
    table = torch.arange(100 * 9).view(9, 100)
    slots = batch.tail_slots[:n].tolist() + [8] * (ROOM.decodes - n)
    padded, prompts = fixed_batch(fmt, ROOM, tensors, torch.tensor(slots), table)
    length = len(batch.positions)

    for name in ("positions", "rows", "visible", "token_blocks"):
        true, others = getattr(padded, name).tensor_split([length])
        assert torch.equal(true[: len(getattr(batch, name))], getattr(batch, name)) and (others == -1).all()
    true_table, *true_decodes = batch.decodes
    decode_table, *decodes = padded.decodes
    assert torch.equal(decode_table, table[slots]) and len(true_table) == n
    for one, other, nobodys in zip(decodes[:2], true_decodes, (-1, 0), strict=False):
        assert torch.equal(one[:n], other) and (one[n:] == nobodys).all() and len(one) == ROOM.decodes
    assert decodes[2].tolist() == slots

    def kept(of):
        rows = zip(of.kept_tokens.tolist(), of.kept_slots.tolist(), of.kept_rows.tolist(), strict=True)
        return [row for row in rows if row[1] >= 0]

    assert kept(prompts) == kept(batch.prompts)
    sealed, rows = batch.prompts.sealed_blocks, batch.prompts.sealed_rows
    assert (
        torch.equal(prompts.sealed_blocks[: len(sealed)], sealed) and (prompts.sealed_blocks[len(sealed) :] < 0).all()
    )
    assert torch.equal(prompts.sealed_rows[: len(sealed)], rows)
    sources = batch.prompts.near_sources.tolist() or ([] if fmt.packs_on_write else list(range(n, length)))
    assert prompts.near_sources[: len(sources)].tolist() == sources

    for index, span in enumerate(spans[n:]):
        columns = -(-min(span.end, fmt.visible(span.end - 1)) // fmt.block_size)
        own = list(span.blocks[:columns])
        assert prompts.far_blocks[prompts.far_table[index, :columns]].tolist() == own
        assert padded.block_table[ROOM.decodes + index, :columns].tolist() == own
    expected = torch.from_numpy(cut(batch.prompts.spans, Cut(tile)))
    expected[:, 6] += n * fmt.packs_on_write  # near tokens are counted from the step's first, which may be a decode's
    tiles = prompts.tiles(tile)
    assert torch.equal(tiles[: len(expected)], expected) and (tiles[len(expected) :] == -1).all()
    assert prompts.how == Cut(tile)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: repr(options)[10:-1])
def test_what_a_room_holds_fits_into_its_arrays(options):
    """Steps at the very limits, and just beyond them."""
    fmt = resolve(options, SPEC)
    old = fmt.tail_tokens - 1 if fmt.tail_tokens else 70

    def span(start: int, length: int, slot: int) -> Span:
        return Span(start, start + length, range(fmt.num_blocks(start + length)), slot)

    decodes = [span(700, 1, slot) for slot in range(ROOM.decodes)]
    limits = {
        "tokens": [span(0, 504, 8)],
        "prompts": [span(0, 15, 8 + i) for i in range(MOST_PROMPTS)],
        "old": [span(old, 100, 8), span(old, 100, 9)],
        "far": [span(fmt.block_size * 400, 100, 8), span(fmt.block_size * 100, 100, 9)],
    }
    beyond = {
        "tokens": [span(0, 505, 8)],
        "prompts": [*limits["prompts"], span(0, 2, 99)],
        "far": [span(fmt.block_size * 400, 100, 8), span(fmt.block_size * 111, 100, 9)],
    }
    if fmt.tail_tokens:
        beyond["old"] = [*limits["old"], span(old, 100, 10)]
    for name, prompts in limits.items():
        assert ROOM.holds(fmt, [*decodes, *prompts]), name
        laid, shapes = ROOM.lay_out(fmt, [*decodes, *prompts], Cut(4)), ROOM.shapes(fmt)
        assert laid.keys() == shapes.keys()
        assert all(len(laid[array]) <= shape[0] for array, shape in shapes.items()), name
    for name, prompts in beyond.items():
        assert not ROOM.holds(fmt, [*decodes, *prompts]), name
    assert not ROOM.holds(fmt, [*decodes, span(3, 1, 100), span(0, 2, 101)])


KERNEL_OPTIONS = [
    KVOptions(),
    KVOptions(nbits="4", q_group_size=32),
    KVOptions(nbits="2", q_group_size=32, residual_length=32),
    KVOptions(nbits="4", axis_key="token"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# A layer and what it caches: heads, and latents with their rope key.
STREAMS = {
    "heads": (AttentionLayer(4, 2, 64, 0.125), KVSpec(1, StreamSpec(2, 64), StreamSpec(2, 64), 2)),
    "latents": (
        AttentionLayer(4, 1, 128, 0.125, latent_dim=64),
        KVSpec(1, StreamSpec(1, 64), StreamSpec(1, 64), 2, latent=True),
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("options", KERNEL_OPTIONS, ids=lambda options: repr(options)[10:-1])
def test_kernels_leave_alone_what_is_nobodys(options, kind, monkeypatch):
    """The same bytes are stored and the same attention comes out, though all that is padding is NaN; how kernels cut
    prompts is known once they have run on nothing at all.
    """
    pytest.importorskip("triton")
    from kvtool.kernels import prefill

    monkeypatch.setattr(prefill, "num_sms", lambda device: 16)
    monkeypatch.setattr(batch_module, "SHORTEST_PIECE", 128)
    monkeypatch.setattr(fixed, "MOST_FAR", 12)
    monkeypatch.setattr(store_module, "runs_kernels", lambda device, dtype: True)
    torch.manual_seed(0)
    layer, spec = STREAMS[kind]
    heads, dim = spec.key.heads, layer.head_dim
    fmt, room = resolve(options, spec, block_size=32), Room(decodes=4, tokens=60)
    bounds = [(40, 41), (5, 6), (30, 45), (0, 33), (130, 136) if kind == "heads" else (20, 26)]
    ids = iter(torch.randperm(40).tolist())
    spans = [Span(a, b, [next(ids) for _ in range(fmt.num_blocks(b))], i) for i, (a, b) in enumerate(bounds)]
    backend = next(backend for backend in BACKENDS if backend.name == "triton")
    x = {span.tail_slot: torch.randn(3, span.end, 4, dim, device=DEVICE, dtype=torch.float16) for span in spans}

    def tokens(some: list[Span]) -> torch.Tensor:
        return torch.cat([x[span.tail_slot][:, span.start : span.end] for span in some], dim=1)

    outputs, bytes_ = [], []
    for is_padded in (False, True):
        store = KVStore(KVLayout(spec, fmt), 40, 6, torch.float16, DEVICE)
        kv = store.layers[0]
        for span in spans:
            if span.start > 1:
                before = Span(0, span.start, span.blocks, span.tail_slot)
                history = KVBatch.build(fmt, [before], DEVICE)
                _, key, value = tokens([before])
                kv.write(key[:, :heads, :64], value[:, :heads, :64], history)
        q, key, value = tokens(spans)
        batch, length = KVBatch.build(fmt, spans, DEVICE), len(q)
        if is_padded:
            wide = torch.full((3, room.tokens, 4, dim), float("nan"), device=DEVICE, dtype=torch.float16)
            wide[:, : len(q)] = tokens(spans)
            q, key, value = wide
            slots = torch.tensor([0, 1, 1, 1], device=DEVICE)
            nothing = {name: torch.full(shape, -1, device=DEVICE) for name, shape in room.shapes(fmt).items()}
            table = batch.block_table[:2]
            batch, prompts = fixed_batch(fmt, room, nothing, slots, table)
            near = kv.write(key[:, :heads, :64], value[:, :heads, :64], batch)
            backend.forward(q, near, kv, batch, layer)
            tensors = filled(room, fmt, spans, prompts.how, DEVICE)
            assert tensors["tiles"][:3, 8].tolist() == ([2, 2, 1] if kind == "heads" else [1, 1, 1])
            batch, _ = fixed_batch(fmt, room, tensors, slots, table)
        near = kv.write(key[:, :heads, :64], value[:, :heads, :64], batch)
        outputs.append(backend.forward(q, near, kv, batch, layer)[:length])
        bytes_.append(torch.cat([store.blocks, store.tails, store.take_fault()]))
    assert outputs[0].isfinite().all()
    assert (outputs[0] - outputs[1]).abs().max() < 2e-3  # splits and tiles may differ
    assert torch.equal(*bytes_)


class Again:
    """In place of graphs: what was captured is launched anew, and writes what it wrote before."""

    def capture(self, run):
        outputs = run()

        def replay():
            for kept, new in zip(outputs, run(), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return SimpleNamespace(replay=replay), outputs


@pytest.mark.skipif(DEVICE == "cuda", reason="test_cuda_graph.py has graphs")
@pytest.mark.parametrize("options", [KVOptions(), KVOptions(nbits="8", q_group_size=32)], ids=["16", "8"])
def test_prompts_beside_decodes_are_answered_alike_in_rooms(options: KVOptions, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(store_module, "runs_kernels", lambda device, dtype: True)
    monkeypatch.setattr(cuda_graph, "Capturer", Again)
    monkeypatch.setattr(cuda_graph, "TOKENS", (16, 48))
    monkeypatch.setattr(cuda_graph, "decode_sizes", lambda max_num_seqs: [1])
    monkeypatch.setattr(runner, "worthwhile_tokens", lambda products, gpu: 1000)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    rooms, launch = [], cuda_graph.PromptGraphs.launch

    def spied(graphs, batch, room):
        rooms.append((len(batch.spans), room))
        return launch(graphs, batch, room)

    monkeypatch.setattr(cuda_graph.PromptGraphs, "launch", spied)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    make_checkpoint("qwen3", tmp_path, **shape)
    settings = {"model": str(tmp_path), "device": "cpu", "dtype": "float16", "kv_cache_memory": 1 << 20, "kv": options}
    settings |= {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "swap_space": 0}
    rng, params = random.Random(0), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [[rng.randrange(8, 199) for _ in range(length)] for length in (5, 40, 21)]
    engine = Engine(EngineConfig(**settings, attention_backend="triton"))
    engine.runner.graphs.decodes.holds = lambda batch: False
    answers = [engine.generate(prompts, params)]
    assert [room.tokens for _, room in rooms] == [32, 32, 16] and rooms[1] == (3, Room(4, 32))
    answers.append(Engine(EngineConfig(**settings, attention_backend="torch")).generate(prompts, params))
    assert answers[0] == answers[1]
