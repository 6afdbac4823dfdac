"""What graphs are given: vectorised integers against a loop over tokens. And which steps there are graphs for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.cuda_graph import (
    BlockTable,
    StepGraphs,
    decode_rows,
    decode_sizes,
    known,
    prompt_rooms,
    room_ids,
    worthwhile_tokens,
)
from kvtool.gpus import GPUS
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.request import ScheduledBatch, ScheduledSpan

SPEC = KVSpec(1, StreamSpec(2, 64), StreamSpec(2, 64), 4)
NOBODY = 99


def expected(fmt: KVFormat, spans: list[ScheduledSpan]) -> list[tuple[int, ...]]:
    """`Inputs` of each token, in words: slot, position, visible, row, block, column, newest, id, target."""
    size, rows = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens, []
    for span in spans:
        for index, position in enumerate(range(span.start, span.end)):
            written = span.blocks[position // size] if fmt.packs_on_write else 0
            newest = (len(span.blocks) - 1, span.blocks[-1]) if span.blocks else (0, 0)
            id_ = span.token_ids[index] if span.token_ids else -1 - (span.draft * (NOBODY + 1) + span.slot)
            target = span.slot if position == span.end - 1 else NOBODY
            rows.append((span.slot, position, fmt.visible(position), position % size, written, *newest, id_, target))
    return rows


@pytest.mark.parametrize("options", [{"nbits": "16"}, {"nbits": "4"}, {"nbits": "2"}, {"nbits": "fp8"}])
@given(
    decodes=st.lists(st.integers(1, 700), max_size=9),
    prompts=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 70)), max_size=3),
)
def test_rows_are_those_of_a_loop(options: dict[str, str], decodes: list[int], prompts: list[tuple[int, int]]) -> None:
    fmt = resolve(KVOptions(**options), SPEC)  # type: ignore[arg-type]
    lengths = [(start, start + 1, False) for start in decodes] + [(start, start + n, True) for start, n in prompts]
    spans = [
        ScheduledSpan(
            id="",
            slot=slot,
            start=start,
            end=end,
            blocks=[1000 * slot + index for index in range(fmt.num_blocks(end))],
            token_ids=[7 * position for position in range(start, end)] if is_prompt else (),
            draft=0 if is_prompt else slot % 3,
        )
        for slot, (start, end, is_prompt) in enumerate(lengths)
    ]
    if spans:
        rows = decode_rows(fmt, spans, np.array([span.end for span in spans]), NOBODY)
        assert list(map(tuple, rows.T.tolist())) == expected(fmt, spans)


@given(
    decodes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=6),
    prompts=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    nobody=st.integers(0, 3),
)
def test_a_step_with_prompts_reads_each_token_from_where_it_is(
    decodes: list[tuple[int, int, bool]], prompts: list[int], nobody: int
) -> None:
    """Decodes' in `recent`, unless the scheduler knows them, and prompts' as they are given."""
    recent = 1000 + torch.arange(4 * 11).view(4, 11)
    spans, tokens = [], []
    for slot, (draft, num_blocks, is_given) in enumerate(decodes):
        blocks = [100 * slot + index for index in range(num_blocks)]
        token_ids = [slot] if is_given else ()
        spans.append(ScheduledSpan(id="", slot=slot, start=9, end=10, blocks=blocks, token_ids=token_ids, draft=draft))
        tokens.append(slot if is_given else int(recent[draft, slot]))
    for slot, length in enumerate(prompts, len(decodes)):
        spans.append(ScheduledSpan(id="", slot=slot, start=0, end=length, blocks=[], token_ids=list(range(length))))
    held = len(decodes) + nobody * bool(decodes)
    given_ids = room_ids(spans, held, len(spans) + nobody, 11)
    ids = known(torch.from_numpy(given_ids["ids"]), recent).tolist()
    assert ids == tokens + [token for length in prompts for token in range(length)]
    assert given_ids["targets"].tolist() == [*range(len(spans)), *[10] * nobody]
    owners = [slot for slot, span in enumerate(spans) for _ in range(span.length)]
    last = given_ids["wanted"].tolist()
    assert [owners[token] for token in last] == list(range(len(spans))) and last[-1] == len(owners) - 1
    assert all(owners[token + 1] > owners[token] for token in last[:-1])
    newest = [(span.slot, max(0, len(span.blocks) - 1), (span.blocks or [0])[-1]) for span in spans[: len(decodes)]]
    assert given_ids["newest"].shape == (3, held)
    assert list(map(tuple, given_ids["newest"].T)) == newest + newest[-1:] * (held - len(decodes))


@pytest.mark.parametrize(
    ("lengths", "has_room", "runs_in"),
    [
        ((1, 1, 30), True, "rows"),  # beside decodes
        ((64,), True, "rows"),
        ((65,), True, "room"),
        ((40, 30), True, "room"),
        ((65,), False, "rows"),
        ((600,), False, "nothing"),
    ],
)
def test_short_prompts_that_come_alone_have_a_room(lengths: tuple[int, ...], has_room: bool, runs_in: str) -> None:
    spans = [
        ScheduledSpan(id="", slot=slot, start=0, end=length, blocks=[], token_ids=[5] * length)
        for slot, length in enumerate(lengths)
    ]
    graphs = StepGraphs.__new__(StepGraphs)
    graphs.decodes = SimpleNamespace(holds=lambda batch: sum(lengths) <= 512, launch=lambda batch: "rows")
    graphs.prompts = SimpleNamespace(room=lambda batch: has_room, launch=lambda batch, room: "room")
    assert (graphs.launch(ScheduledBatch(spans=spans, samples=[])) or "nothing") == runs_in


@given(
    most_decodes=st.integers(1, 2000),
    worthwhile=st.integers(0, 20000),
    budget=st.integers(1, 20000),
    decodes=st.integers(0, 300),
    tokens=st.integers(2, 20000),
)
def test_a_step_that_gains_by_it_finds_a_room_that_it_fills(
    most_decodes: int, worthwhile: int, budget: int, decodes: int, tokens: int
) -> None:
    """All that may come up to what is worthwhile, but for what lies between two sizes; and no larger ones."""
    rooms = prompt_rooms(most_decodes, worthwhile, budget)
    assert len(rooms) < 110 and rooms == sorted(rooms, key=lambda room: (room.tokens, room.decodes))
    assert all(room.tokens <= min(worthwhile, budget) and 0 <= room.decodes < room.tokens - 1 for room in rooms)
    if decodes + 2 <= tokens <= budget and decodes <= min(256, most_decodes):
        fitting = [room for room in rooms if decodes <= room.decodes and tokens <= room.tokens]
        if tokens <= min(0.88 * worthwhile - 128, 8192):
            assert fitting and fitting[0].tokens - tokens < max(128, tokens / 8)


@given(st.integers(1, 700))
def test_graphs_of_decodes_go_as_far_as_there_are_sequences(max_num_seqs: int) -> None:
    """The largest holds all of them, up to 512, and but for those of short prompts is not larger than it need be."""
    sizes = decode_sizes(max_num_seqs)
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] >= min(max_num_seqs, 512)
    assert all(size < max_num_seqs for size in sizes[:-1] if size >= 256)


def test_graphs_are_for_steps_that_keep_the_host_busier_than_the_gpu() -> None:
    """A step's products take as long on the GPU as its launches on the host, whatever the model."""
    seven_billion = 3584 * (3584 + 2 * 512 + 3584) + 3 * 3584 * 18944
    assert 1280 < worthwhile_tokens(seven_billion, GPUS["H200"]) < 1600
    assert 400 < worthwhile_tokens(seven_billion, GPUS["RTX 4090"]) < 640
    fewer_bits = worthwhile_tokens(seven_billion / 2, GPUS["H200"])
    assert abs(fewer_bits - 2 * worthwhile_tokens(seven_billion, GPUS["H200"])) <= 1
    assert worthwhile_tokens(seven_billion, None) == worthwhile_tokens(seven_billion, GPUS["A100"])


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 3)), max_size=30))
def test_a_sequence_s_blocks_are_on_the_device_before_they_are_read(steps: list[tuple[int, bool, bool, int]]) -> None:
    """Whoever has the slot, whether it decodes or reads more tokens, and however many blocks it has come to."""
    table, owned, made = BlockTable(3, 99, torch.device("cpu")), dict[int, list[int]](), 0
    for slot, is_other, reads, grown in steps:
        is_new = is_other or slot not in owned
        blocks = owned[slot] = [] if is_new else owned[slot]
        more = grown if is_new or reads else min(grown, 1)
        blocks += range(made, made := made + more)
        span = ScheduledSpan(id="", slot=slot, start=0, end=1, blocks=blocks, token_ids=[0] if is_new or reads else ())
        table.send([span])
        if blocks:
            table.rows[slot, len(blocks) - 1] = blocks[-1]  # as a graph does it
        assert table.rows[slot, : len(blocks)].tolist() == blocks
