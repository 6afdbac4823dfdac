"""Gaps between tokens over the time of a run, in bounded memory: where they jump, something held all streams up."""

from itertools import pairwise
from typing import Any

from kvtool.bench.events import RequestRecord

MOST_BUCKETS = 512


class Timeline:
    """The mean and the longest gap between chunks with tokens, in buckets of time that double as the run goes on."""

    def __init__(self, width: float = 0.05) -> None:
        self._width = width  # seconds
        self._buckets: dict[int, tuple[int, float, float]] = {}  # number, sum and longest of the gaps that end in it

    def add(self, record: RequestRecord) -> None:
        for before, time in pairwise(record.token_times):
            self._put(int(time / self._width), 1, time - before, time - before)

    def _put(self, index: int, number: int, total: float, longest: float) -> None:
        while index >= MOST_BUCKETS:
            self._width, index = 2 * self._width, index // 2
            halves, self._buckets = self._buckets, {}
            for half, content in halves.items():
                self._put(half // 2, *content)
        before = self._buckets.get(index, (0, 0.0, 0.0))
        self._buckets[index] = (before[0] + number, before[1] + total, max(before[2], longest))

    def row(self) -> dict[str, Any]:
        """As in a result: the middle of each bucket that has gaps, in seconds, and its gaps in ms."""
        buckets = sorted(self._buckets.items())
        return {
            "seconds": [(index + 0.5) * self._width for index, _ in buckets],
            "mean_ms": [1e3 * total / number for _, (number, total, _) in buckets],
            "max_ms": [1e3 * longest for _, (_, _, longest) in buckets],
        }
