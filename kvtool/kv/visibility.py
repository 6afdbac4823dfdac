"""Which keys and values a query reads packed, and which at full precision."""


def visible(position: int, block_size: int, residual: int) -> int:
    """First position that a query at `position` reads at full precision.

    Everything below it is read from packed blocks. It depends on the position alone, never on how
    a prompt was cut into chunks, so prefill, decode, prefix hits, preemption and scoring agree.

    Args:
        position: index of the query token, from 0.
        block_size: tokens per packed block, B.
        residual: tokens kept at full precision at least, a multiple of B (KIVI's R).
    """
    return max(0, position - residual) // block_size * block_size
