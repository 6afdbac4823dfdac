"""Prompts that begin alike share what is computed of them. Integers and digests only."""

from collections import Counter

from kvtool.kv.blocks import BlockPool, block_digest
from kvtool.kv.format import KVFormat
from kvtool.request import Request
from kvtool.sequence import Sequence


class Prefixes:
    """Finds the blocks that hold the beginning of a sequence, and makes those known that it has completed.

    Args:
        fmt, blocks: of the KV store.
        identity: of model and format; prefixes are shared under one identity only. None: never.
        totals: of EngineStats.

    Attributes:
        identity: as given; None where blocks do not hold all that is read of their tokens.
    """

    def __init__(self, fmt: KVFormat, blocks: BlockPool, identity: bytes | None, totals: Counter[str]) -> None:
        self._format, self._blocks, self._totals = fmt, blocks, totals
        # Behind a window the newest tokens are read at full precision, which their blocks do not hold.
        self.identity = identity if fmt.residual == 0 else None

    def root(self, request: Request, origin: str = "") -> bytes:
        """What stands before a prompt's first block; empty where the prompt shares nothing.

        Args:
            origin: the format in which another engine computes it; empty if that is ours. Others' prefixes are not what
                these tokens would be here, and are shared among those of one origin.
        """
        if self.identity is None or request.params.prompt_logprobs is not None:
            return b""
        root = block_digest(self.identity, list(request.cache_salt.encode()))
        return block_digest(root, list(origin.encode())) if origin else root

    def find(self, sequence: Sequence) -> list[int]:
        """Sealed blocks that hold the beginning of a sequence; at least its last token is left to compute."""
        if not sequence.root:
            return []
        # What is swapped may be found as far as it was computed, so that the rest of it fits behind.
        known = sequence.num_computed_tokens if sequence.units else len(sequence.tokens) - 1
        found: list[int] = []
        for index in range(self._format.packed_tokens(known) // self._format.block_size):
            block = self._blocks.find(self._digest(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def seal(self, sequence: Sequence) -> None:
        """Make complete blocks known by what they hold, now that a token has shown that it is fit for others."""
        computed = len(sequence.tokens) - 1  # and known to be finite
        if not sequence.root or computed <= self._format.tokens_within(sequence.num_sealed):
            return
        for index in range(sequence.num_sealed, self._format.packed_tokens(computed) // self._format.block_size):
            self._blocks.seal(sequence.blocks[index], self._digest(sequence, index))
            sequence.num_sealed = index + 1

    def count_hit(self, sequence: Sequence) -> None:
        """At the first admission."""
        sequence.num_cached_tokens = sequence.num_computed_tokens
        if sequence.root:
            possible = (len(sequence.tokens) - 1) // self._format.block_size * self._format.block_size
            self._totals["prefix_queries_total"] += len(sequence.tokens)
            self._totals["prefix_hits_total"] += sequence.num_cached_tokens
            if sequence.num_cached_tokens:
                self._totals["full_hits_total" if sequence.num_cached_tokens == possible else "partial_hits_total"] += 1

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """The digest of a sequence's complete block."""
        size, digests = self._format.block_size, sequence.digests
        while len(digests) <= index:
            start = len(digests) * size
            digests.append(
                block_digest(digests[-1] if digests else sequence.root, sequence.tokens[start : start + size])
            )
        return digests[index]
