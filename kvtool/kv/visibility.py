"""Which keys and values a query reads packed, and which at full precision."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Position = TypeVar("Position", int, NDArray[np.int64])


def visible(position: Position, block_size: int, residual: int) -> Position:
    """First position that a query at `position` (or at each of them) reads at full precision.

    Everything below it is read from packed blocks. It depends on the position alone, never on how
    a prompt was cut into chunks, so prefill, decode, prefix hits, preemption and scoring agree.

    Args:
        position: index of the query token, from 0.
        block_size: tokens per packed block, B.
        residual: tokens kept at full precision at least, a multiple of B (KIVI's R).
    """
    return (position > residual) * ((position - residual) // block_size * block_size)
