"""What a decoder layer gives attention: queries that are ready to meet keys, or yet to be made so."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from kvtool.attention.latents import LatentQueries
from kvtool.kernels import takes
from kvtool.kernels.rotary_heads import RotaryHeads

Queries: TypeAlias = Tensor | RotaryHeads | LatentQueries


def rotated(heads: RotaryHeads) -> tuple[Tensor, Tensor]:
    """`heads.rotated()`, by a kernel where one takes them."""
    if takes(heads.made):
        from kvtool.kernels.rope import norm_rotate

        return norm_rotate(heads)
    return heads.rotated()


def prepared(
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Callable[[int, Queries, Tensor, Tensor], Tensor]:
    """`attend`, which knows queries that are ready, those over latents as absorbed ones, for any."""

    def with_any(index: int, q: Queries, key: Tensor, value: Tensor) -> Tensor:
        if isinstance(q, LatentQueries):
            return q.values(attend(index, q.absorbed(), key, value))
        if isinstance(q, RotaryHeads):
            q, key = rotated(q)
        return attend(index, q, key, value)

    return with_any
