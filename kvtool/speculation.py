"""What is drafted for a sequence, and whether it pays. Integers and seconds only."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import median

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


def other_seed(seed: int) -> int:
    """Of numbers that are independent of those of `seed`."""
    return -1 - seed


# In steps: what is remembered of each kind; until the first trial of decoding without drafts; between trials, which
# become rarer where drafts don't pay; of a trial.
REMEMBERED, WARM_UP, PAUSE, LONGEST_PAUSE, TRIAL = 16, 8, 128, 4096, 4
MEMORY = 1 / 32  # weight of the newest drafted token in an average
MOST_ROWS = 256  # tokens that a step verifies; with more it is bound by arithmetic, on any GPU
UNLIKELY = 0.05  # a token that is right more rarely than this is not worth drafting
GOOD = 0.8  # acceptance of good drafts
# Why drafts don't pay: too few are right; or not even good ones would, as with so many sequences a step has no time for
# more tokens, or as the draft model takes too long for a single one.
REASONS = ("acceptance", "batch", "cost")

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


class Pace:
    """How many tokens to draft for a sequence in a step: what has paid so far, by the clock.

    A step of so many sequences is timed with drafts and, now and then, without. Of k drafted tokens each counts if it
    and all before it are right, which makes 1 + a + ... + a^k tokens of a step where each is with probability a
    (Leviathan et al., 2023); what a step yields a second decides. It may be a clock that decides, as what is chosen
    changes no token of a request with a seed, and no distribution of another's.

    Args:
        most: tokens drafted for a sequence in a step, at most.

    Attributes:
        num_tokens: to be drafted in the next step, at most; 0: none.
        off: which of `REASONS` there is for not drafting; empty where drafts pay.
    """

    def __init__(self, most: int) -> None:
        self.most = self.num_tokens = most
        self.off = ""
        self.acceptance = GOOD
        self._hits = 1.0  # share of the sequences for which something is proposed
        self._seconds: dict[int, dict[int, deque[float]]] = {}  # of steps, by size of the batch and by tokens drafted
        self._until_trial, self._pause = WARM_UP, PAUSE

    def for_sequence(self, acceptance: float) -> int:
        """Tokens worth drafting for a sequence of this acceptance."""
        return min(self.num_tokens, max(1, int(log(UNLIKELY) / log(min(max(acceptance, UNLIKELY), 0.99)))))

    def count(self, drafted: int, accepted: int) -> None:
        """Take in how many tokens of a draft were right."""
        self.acceptance = averaged(self.acceptance, drafted, accepted)

    def observe(self, batch_size: int, drafted: int, hits: int, seconds: float) -> None:
        """Take in a step of decodes, and decide about the next.

        Args:
            batch_size: sequences.
            drafted: `num_tokens` when it was scheduled.
            hits: for how many sequences something was proposed.
            seconds: that it took.
        """
        if batch_size.bit_length() not in self._seconds:
            self._until_trial = min(self._until_trial, WARM_UP)
        times = self._seconds.setdefault(batch_size.bit_length(), {})
        times.setdefault(drafted, deque(maxlen=REMEMBERED)).append(max(seconds, 1e-9))  # a clock may stand still
        if drafted:
            self._hits += MEMORY * (hits / batch_size - self._hits)
        most = min(self.most, MOST_ROWS // batch_size - 1)
        self._until_trial -= 1
        if -TRIAL < self._until_trial <= 0 < most:
            self.num_tokens = most if self.off else 0  # what is not being done
            return
        self.num_tokens = self._best(most, times, self.acceptance, self._hits)
        if self._until_trial <= 0:
            self._pause = PAUSE if self.num_tokens else min(2 * self._pause, LONGEST_PAUSE)
            self._until_trial = self._pause
        self.off = ""
        if self.num_tokens == 0:
            self.off = "acceptance" if self._best(most, times, GOOD, 1.0) else "batch" if batch_size > 1 else "cost"

    def _best(self, most: int, times: Mapping[int, deque[float]], acceptance: float, hits: float) -> int:
        """Of 0 to `most` tokens, how many yield most a second."""
        known = sorted((drafted, median(seconds)) for drafted, seconds in times.items())
        if known[0][0] > 0:  # what a step takes without drafts is not known yet
            return max(0, most)

        def rate(count: int) -> float:
            return (1 + hits * sum(acceptance**index for index in range(1, count + 1))) / interpolated(known, count)

        return max(range(max(0, most) + 1), key=rate)


def averaged(acceptance: float, drafted: int, accepted: int) -> float:
    """A running average of how often a drafted token is right, the one after the last that is right being wrong."""
    for _ in range(accepted):
        acceptance += MEMORY * (1 - acceptance)
    return acceptance if accepted == drafted else acceptance * (1 - MEMORY)


def interpolated(known: Sequence[tuple[int, float]], count: int) -> float:
    """Seconds of a step with `count` drafted tokens, from those with others, in order."""
    for (low, low_seconds), (high, high_seconds) in pairwise(known):
        if low <= count <= high:
            return low_seconds + (high_seconds - low_seconds) * (count - low) / (high - low)
    return known[-1][1]
