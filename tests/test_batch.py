"""How a step lies in memory, against plain loops over its tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.kv.batch import PIECE_STEP, SHORTEST_PIECE, KVBatch, Prompts, Span
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec

SPEC = KVSpec(1, StreamSpec(1, 32), StreamSpec(1, 32), 2)
OPTIONS = [
    KVOptions(),
    KVOptions(nbits="fp8"),
    KVOptions(nbits="4", q_group_size=32),
    KVOptions(nbits="2", q_group_size=32, residual_length=40),
]


@st.composite
def steps(draw) -> tuple[KVFormat, list[Span]]:
    """Decodes and prompts of sequences that share their first block."""
    fmt = resolve(draw(st.sampled_from(OPTIONS)), SPEC)
    starts = draw(st.lists(st.integers(0, 200), min_size=1, max_size=5))
    lengths = sorted((draw(st.sampled_from([1, 1, 2, 33, 64, 100])) for _ in starts), key=lambda length: length > 1)
    spans = []
    for slot, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        held = fmt.num_blocks(start + length) + draw(st.integers(0, 2))
        spans.append(Span(start, start + length, [99, *range(100 * slot + 100, 100 * slot + 99 + held)][:held], slot))
    return fmt, spans


def tokens_of(spans: list[Span]) -> list[tuple[Span, int]]:
    """The span and position of every token of a step."""
    return [(span, position) for span in spans for position in range(span.start, span.end)]


def near_tokens(fmt: KVFormat, spans: list[Span]) -> list[tuple[int, int]]:
    """Slot and position of all near tokens of the prompts."""
    first = (lambda span: span.start) if fmt.packs_on_write else (lambda span: fmt.visible(span.start))
    return [(span.tail_slot, p) for span in spans if span.length > 1 for p in range(first(span), span.end)]


@settings(deadline=None)
@given(steps())
def test_every_token_and_block_is_where_loops_find_it(drawn):
    fmt, spans = drawn
    batch, tokens = KVBatch.build(fmt, spans), tokens_of(spans)
    assert batch.positions.tolist() == [position for _, position in tokens]
    assert batch.visible.tolist() == [fmt.visible(position) for _, position in tokens]
    assert batch.tail_slots.tolist() == [span.tail_slot for span in spans]
    size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
    assert batch.rows.tolist() == [position % size for _, position in tokens]
    if fmt.packs_on_write:
        assert batch.token_blocks.tolist() == [span.blocks[position // size] for span, position in tokens]
    for span, row in zip(spans, batch.block_table.tolist(), strict=True):
        assert row[: len(span.blocks)] == list(span.blocks)
        assert set(row[len(span.blocks) :]) <= {span.blocks[-1] if span.blocks else 0}
    assert (batch.prompts is None) == all(span.length == 1 for span in spans)


@settings(deadline=None)
@given(steps())
def test_what_prompts_read_and_write_is_what_loops_find(drawn):
    fmt, spans = drawn
    batch, tokens = KVBatch.build(fmt, spans), [(span.tail_slot, position) for span, position in tokens_of(spans)]
    prompts = [span for span in spans if span.length > 1]
    if not prompts:
        return
    found, near = batch.prompts, near_tokens(fmt, spans)
    assert isinstance(found, Prompts)
    own = [tokens.index(token) if token in tokens else None for token in near]
    if len(found.near_sources):
        tails = {(slot, row): place for slot, row, place in tail_places(fmt, near)}
        for source, token, index in zip(found.near_sources.tolist(), near, own, strict=True):
            assert source == index if index is not None else tails[divmod(-1 - source, fmt.tail_tokens)] == token
    else:
        assert own == list(range(batch.num_decodes, len(tokens)))

    sealed, kept, far = [], [], []
    for span in prompts:
        far.append(span.blocks[: -(-min(span.end, fmt.visible(span.end - 1)) // fmt.block_size)])
        if not fmt.packs_on_write:
            firsts = range(fmt.visible(span.start), fmt.visible(span.end), fmt.block_size)
            sealed += [(span.blocks[p // fmt.block_size], near.index((span.tail_slot, p))) for p in firsts]
    for span in () if fmt.packs_on_write else spans:
        first = span.start if span.length == 1 else max(span.start, fmt.visible(span.end))
        kept += [
            (tokens.index((span.tail_slot, p)), span.tail_slot, p % fmt.tail_tokens) for p in range(first, span.end)
        ]
    assert list(zip(found.sealed_blocks.tolist(), found.sealed_rows.tolist(), strict=True)) == sealed
    columns = (found.kept_tokens.tolist(), found.kept_slots.tolist(), found.kept_rows.tolist())
    assert list(zip(*columns, strict=True)) == kept
    assert found.far_blocks.tolist() == [block for blocks in far for block in blocks]
    for blocks, row in zip(far, found.far_table, strict=True):
        assert found.far_blocks[row[: len(blocks)]].tolist() == list(blocks)
        assert (row[: len(blocks)].diff() == 1).all()


def tail_places(fmt: KVFormat, near: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Slot and row of each near token: the oldest of those that share a row, as it is read before it is overwritten."""
    return [(slot, position % fmt.tail_tokens, (slot, position)) for slot, position in reversed(near)]


@settings(deadline=None)
@given(steps(), st.integers(1, 70))
def test_tiles_hold_each_query_once_and_those_that_read_most_come_first(drawn, num_tokens):
    fmt, spans = drawn
    batch = KVBatch.build(fmt, spans)
    if batch.prompts is None:
        return
    tiles = batch.prompts.tiles(num_tokens).tolist()
    assert [first for _, first, *_ in tiles] == sorted((first for _, first, *_ in tiles), reverse=True)
    queries = [(i, p) for i, first, _, _, end, *_ in tiles for p in range(first, min(first + num_tokens, end))]
    prompts = [span for span in spans if span.length > 1]
    assert sorted(queries) == [(i, p) for i, span in enumerate(prompts) for p in range(span.start, span.end)]
    near = near_tokens(fmt, spans)
    for i, first, token, start, end, near_first, near_row, *piece in tiles:
        assert piece[:2] == [0, 1] and piece[2] >= min(first + num_tokens, end)
        assert (start, end) == (prompts[i].start, prompts[i].end)
        assert tokens_of(spans)[token] == (prompts[i], start)
        assert near[near_row] == (prompts[i].tail_slot, near_first)
    assert batch.prompts.tiles(num_tokens) is batch.prompts.tiles(num_tokens)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(2, 300)), min_size=1, max_size=4),
    st.integers(1, 70),
    st.integers(0, 300),
)
def test_pieces_are_as_short_as_may_be_while_all_of_them_run_at_once(bounds, num_tokens, most):
    fmt = resolve(KVOptions(nbits="4"), SPEC)
    spans = [
        Span(start, start + new, range(fmt.num_blocks(start + new)), slot) for slot, (start, new) in enumerate(bounds)
    ]
    prompts = KVBatch.build(fmt, spans).prompts
    whole, rows = prompts.tiles(num_tokens).tolist(), prompts.tiles(num_tokens, most).tolist()
    length, longest = rows[0][9], max(_keys(tile, num_tokens) for tile in whole)
    cut = [(tile, -(-_keys(tile, num_tokens) // length)) for tile in whole]
    assert rows == [[*tile[:7], i, count, length] for tile, count in cut for i in range(count)]
    assert len(rows) <= max(most, len(whole))
    if len(whole) >= most or longest <= SHORTEST_PIECE:
        assert length == longest
    else:
        assert length % PIECE_STEP == 0 and length >= SHORTEST_PIECE
        shorter = sum(-(-_keys(tile, num_tokens) // (length - PIECE_STEP)) for tile in whole)
        assert length == SHORTEST_PIECE or shorter > most


def _keys(tile: list[int], num_tokens: int) -> int:
    """That a tile's queries read."""
    return min(tile[1] + num_tokens, tile[4])


def test_arrays_start_where_kernels_can_read_them_whole():
    fmt = resolve(KVOptions(nbits="4", q_group_size=32), SPEC)
    for length in (2, 3, 65):
        batch = KVBatch.build(fmt, [Span(5, 6, [], 0), Span(3, 3 + length, [4, 5, 6], 1)])
        tensors = [x for part in (batch, batch.prompts) for x in vars(part).values() if isinstance(x, torch.Tensor)]
        assert {x.data_ptr() % 16 for x in tensors if x.numel()} == {0}
