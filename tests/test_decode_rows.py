"""What a graph of single tokens is given: vectorised integers against a loop over tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.cuda_graph import decode_rows
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.request import ScheduledSpan

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
