"""What is drafted for a sequence, and whether it pays. Integers and seconds only."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtool.config import MOST_DRAFTED
from kvtool.kv.blocks import BlockPool
from kvtool.kv.format import KVFormat


@dataclass(frozen=True)
class DraftCache:
    """The KV cache of a draft model. It holds what is there for drafts alone, so nobody makes room in it for others.

    Attributes:
        format, blocks: of it.
        max_model_len: tokens of a sequence that the draft model can read.
    """

    format: KVFormat
    blocks: BlockPool
    max_model_len: int


def most_drafted(fmt: KVFormat, position: int) -> int:
    """How many tokens behind one at `position` may be written to a cache and taken back: they complete no block that is
    packed as a whole."""
    return MOST_DRAFTED if fmt.packs_on_write else fmt.visible(position) + fmt.tail_tokens - 2 - position


LONGEST, SHORTEST = 4, 2  # n-grams that are looked for, the longest first


class NGrams:
    """Where the n-grams of a growing sequence stood last, so that what followed them can be proposed again (Saxena,
    2023, prompt lookup decoding)."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # position behind each n-gram
        self._num_known = 0  # tokens of which something is known to follow

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may follow on `tokens`, or none; those of the last call must be the first of these."""
        for end in range(self._num_known + 1, len(tokens)):
            for n in range(SHORTEST, LONGEST + 1):
                if n <= end:
                    self._last[tuple(tokens[end - n : end])] = end
        self._num_known = max(self._num_known, len(tokens) - 1)
        for n in range(LONGEST, SHORTEST - 1, -1):
            found = self._last.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if found is not None:
                period = len(tokens) - found  # what is proposed repeats itself where the tokens do
                return [tokens[found + index % period] for index in range(count)]
        return []
