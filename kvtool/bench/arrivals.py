"""When requests are sent: all at once, evenly, at random, in bursts, at a rate that rises. Seeded, and without end.

A closed loop, where the next request goes out when an answer is complete, has no such times: `concurrency` makes it.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from kvtool.bench.events import WorkItem
from kvtool.errors import ConfigError

LARGEST_RATE = 1e6  # requests/s


@dataclass(frozen=True)
class Arrivals:
    """An open loop: requests come at `rate`, whatever the answers do.

    Attributes:
        rate: requests/s on average; infinite: all at once.
        final_rate: that `rate` rises or falls to, evenly over `ramp_seconds`, and stays at.
        burstiness: shape of the gamma distribution of gaps, as in vLLM's benchmark: 1 is a Poisson process, less comes
            in bursts, infinite is a constant gap.
        seed: of the gaps.
    """

    rate: float
    final_rate: float | None = None
    ramp_seconds: float = 0.0
    burstiness: float = 1.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str, burstiness: float = 1.0, seed: int = 0) -> "Arrivals":
        """`8`, `inf`, or `1-10:60s`: from 1 to 10 requests/s over 60 s, and 10 from then on.

        Raises:
            ConfigError: it is none of these, or out of bounds.
        """
        number = r"\d+(?:\.\d+)?"
        match = re.fullmatch(rf"(?P<first>inf|{number})(?:-(?P<last>{number}):(?P<ramp>{number})s)?", text.strip())
        if match is None or (match["first"] == "inf" and match["last"]):
            raise ConfigError(f"{text!r:.40} is no rate; write requests a second as 8, inf or, to rise, 1-10:60s")
        rate, last, ramp = (float(match[name]) if match[name] else None for name in ("first", "last", "ramp"))
        assert rate is not None
        for value in (rate, last):
            if value is not None and value != math.inf and not 0 < value <= LARGEST_RATE:
                raise ConfigError(f"{text!r:.40}: a rate is above 0 and at most {LARGEST_RATE:,.0f} requests/s, or inf")
        if ramp == 0:
            raise ConfigError(f"{text!r:.40}: a ramp takes more than 0 s")
        if not burstiness > 0:
            raise ConfigError(f"--burstiness {burstiness}: must be above 0; 1 is a Poisson process, inf a constant gap")
        return cls(rate, last, ramp or 0.0, burstiness, seed)

    def times(self) -> Iterator[float]:
        """Seconds from the start of the run, rising.

        Arrivals of rate 1 are laid on the clock of the expected number of requests, whose inverse gives the time
        (Çınlar, 1975): so every distribution of gaps can follow every rate.
        """
        if self.rate == math.inf:
            while True:
                yield 0.0
        random, expected = np.random.default_rng([self.seed, 10]), 0.0
        while True:
            yield self._when(expected)
            expected += 1.0 if self.burstiness == math.inf else random.gamma(self.burstiness, 1 / self.burstiness)

    def _when(self, expected: float) -> float:
        """The time by which so many requests have been expected."""
        if self.final_rate is None:
            return expected / self.rate
        in_ramp = (self.rate + self.final_rate) / 2 * self.ramp_seconds
        if expected >= in_ramp:
            return self.ramp_seconds + (expected - in_ramp) / self.final_rate
        # rate·t + slope/2·t² = expected, solved without a difference of near numbers
        slope = (self.final_rate - self.rate) / self.ramp_seconds
        return 2 * expected / (self.rate + math.sqrt(self.rate**2 + 2 * slope * expected))

    def __str__(self) -> str:
        if self.final_rate is None:
            return f"{self.rate:.15g}"
        return f"{self.rate:.15g}-{self.final_rate:.15g}:{self.ramp_seconds:.15g}s"


def scheduled(items: Iterable[WorkItem], arrivals: Arrivals) -> Iterator[WorkItem]:
    """The same requests at these times; of a session, its first turn, which the others follow by themselves."""
    times = arrivals.times()
    for item in items:
        yield item if item.turn else msgspec.structs.replace(item, scheduled=next(times))
