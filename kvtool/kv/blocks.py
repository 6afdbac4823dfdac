"""Who owns which block and which tail slot. Integers only; the bytes are `store.py`'s."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Packed blocks, shared by reference count and found again by the digest of what they hold.

    A block is either *free* (unowned and unknown), *owned* by one or more sequences, or *cached*: unowned, but sealed
    under a digest, so that it can be shared again until the pool needs it. Cached blocks are evicted in the order in
    which they were given up. A block is written only by its single owner before it is complete, and never after.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks
        self._digests: dict[int, bytes] = {}
        self._by_digest: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently given up first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_sealed(self) -> int:
        """Blocks that can be found by their digest, owned or cached."""
        return len(self._digests)

    @property
    def num_used(self) -> int:
        """Blocks owned by at least one sequence, each counted once."""
        return self.num_blocks - self.num_free

    def owners(self, block: int) -> int:
        """Sequences that own `block`."""
        return self._owners[block]

    def allocate(self) -> int:
        """A block with one owner and no content; evicts the oldest cached block where no other is free."""
        block = self._free.pop() if self._free else self._evict()
        self._owners[block] = 1
        return block

    def seal(self, block: int, digest: bytes) -> None:
        """`block` is complete and will not be written again; it can be found by `digest` unless another already is."""
        assert self._owners[block] > 0 and self._digests.get(block, digest) == digest
        if digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def flush(self) -> None:
        """Forget every digest: cached blocks become free, owned ones stay with their owners."""
        self._digests, self._by_digest = {}, {}
        self._free += self._cached
        self._cached.clear()

    def find(self, digest: bytes) -> int | None:
        """The sealed block of `digest`, which the caller must `share` before the next `allocate`."""
        return self._by_digest.get(digest)

    def share(self, block: int) -> None:
        """One more owner of a cached or owned block, which is complete."""
        assert self._owners[block] > 0 or block in self._cached
        self._cached.pop(block, None)
        self._owners[block] += 1

    def free(self, block: int) -> None:
        """One owner less; the last one leaves a sealed block cached and any other free."""
        assert self._owners[block] > 0
        self._owners[block] -= 1
        if self._owners[block] == 0:
            if block in self._digests:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _evict(self) -> int:
        assert self._cached, "allocate without a free block: ask num_free first"
        block, _ = self._cached.popitem(last=False)
        del self._by_digest[self._digests.pop(block)]
        return block


class SlotPool:
    """Tail slots: each running sequence owns exactly one."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = set(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """The lowest free slot."""
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def free(self, slot: int) -> None:
        assert 0 <= slot < self.num_slots and slot not in self._free
        self._free.add(slot)


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """SHA-256 that names a sealed block: its own tokens and, through `parent`, all before them.

    The first block's parent is a digest of model, format and `cache_salt`.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
