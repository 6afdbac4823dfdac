"""Ownership of blocks and slots against a model that remembers everything."""

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.kv.blocks import BlockPool, SlotPool, block_digest

ROOT = block_digest(b"", [])
SIZE = 4  # tokens of a block


class World:
    """Sequences over a pool, and what must be true of it: who owns what, what each block holds, what was given up."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self.pool, self.random = BlockPool(num_blocks), random.Random(seed)
        self.operations: Counter[str] = Counter()
        self.names = count()
        self.tokens: dict[int, list[int]] = {}  # by sequence
        self.blocks: dict[int, list[int]] = {}
        self.memory: list[list[int]] = [[] for _ in range(num_blocks)]  # what was last written, by block
        self.complete: set[int] = set()  # owned blocks that were sealed, known by their digest or not
        self.known: dict[bytes, int] = {}
        self.cached: list[int] = []  # oldest first

    # What an engine does.

    def admit(self) -> None:
        """A prompt of few distinct beginnings: shares what is known, allocates and seals the rest."""
        tokens = [self.random.randrange(2) for _ in range(self.random.randrange(1, 5 * SIZE))]
        if not self.room(tokens):
            return
        name = next(self.names)
        self.tokens[name], self.blocks[name] = [], []
        digest = ROOT
        for first in range(0, len(tokens) - len(tokens) % SIZE, SIZE):
            digest = block_digest(digest, tokens[first : first + SIZE])
            block = self.find(digest)
            if block is None:
                break
            assert self.memory[block] == tokens[first : first + SIZE], "a digest names what the block holds"
            self.share(block)
            self.blocks[name].append(block)
            self.tokens[name] += tokens[first : first + SIZE]
        for token in tokens[len(self.tokens[name]) :]:
            self.write(name, token)

    def append(self) -> None:
        if self.tokens and self.room([0]):
            self.write(self.any_sequence(), self.random.randrange(2))

    def fork(self) -> None:
        """The child shares all sealed blocks and copies the unfinished one."""
        if not self.tokens or not self.room([0]):
            return
        parent, child = self.any_sequence(), next(self.names)
        whole = len(self.tokens[parent]) // SIZE
        self.tokens[child], self.blocks[child] = self.tokens[parent][: whole * SIZE], self.blocks[parent][:whole]
        for block in self.blocks[child]:
            self.share(block)
        for token in self.tokens[parent][whole * SIZE :]:
            self.write(child, token)

    def finish(self) -> None:
        if self.tokens:
            name = self.any_sequence()
            for block in reversed(self.blocks.pop(name)):
                self.free(block)
            del self.tokens[name]

    def flush(self) -> None:
        self.operations["flush"] += 1
        self.pool.flush()
        self.known, self.cached = {}, []

    # The pool's operations, each beside what it must do.

    def allocate(self) -> int:
        free = [b for b in range(self.pool.num_blocks) if self.owners(b) == 0 and b not in self.cached]
        block = self.pool.allocate()
        self.operations["allocate"] += 1
        if free:
            assert block in free, "nothing is forgotten while there is unused memory"
        else:
            assert block == self.cached.pop(0), "the one given up longest ago goes first"
            self.known = {digest: known for digest, known in self.known.items() if known != block}
            self.operations["evict"] += 1
        self.memory[block] = []
        return block

    def find(self, digest: bytes) -> int | None:
        self.operations["find"] += 1
        block = self.pool.find(digest)
        assert block == self.known.get(digest)
        return block

    def share(self, block: int) -> None:
        self.operations["share"] += 1
        self.pool.share(block)
        if block in self.cached:
            self.cached.remove(block)
            self.complete.add(block)

    def free(self, block: int) -> None:
        self.operations["free"] += 1
        self.pool.free(block)
        if self.owners(block) == 0:
            self.complete.discard(block)
            if block in self.known.values():
                self.cached.append(block)

    def write(self, name: int, token: int) -> None:
        """One more token of `name`, into a block that no one else owns; a full block is sealed."""
        self.operations["append"] += 1
        tokens, blocks = self.tokens[name], self.blocks[name]
        if len(tokens) % SIZE == 0:
            blocks.append(self.allocate())
        tokens.append(token)
        assert self.owners(blocks[-1]) == 1 and blocks[-1] not in self.complete, "only its owner writes a block"
        self.memory[blocks[-1]].append(token)
        if len(tokens) % SIZE == 0:
            digest = ROOT
            for first in range(0, len(tokens), SIZE):
                digest = block_digest(digest, tokens[first : first + SIZE])
            self.pool.seal(blocks[-1], digest)
            self.operations["seal"] += 1
            self.known.setdefault(digest, blocks[-1])
            self.complete.add(blocks[-1])

    # What holds after anything.

    def check(self) -> None:
        pool = self.pool
        used = {block for blocks in self.blocks.values() for block in blocks}
        assert pool.num_used == len(used)
        assert pool.num_free + pool.num_used == pool.num_blocks
        assert pool.num_cached == len(self.cached)
        assert [pool.owners(b) for b in range(pool.num_blocks)] == [self.owners(b) for b in range(pool.num_blocks)]
        for name, blocks in self.blocks.items():
            assert [token for block in blocks for token in self.memory[block]] == self.tokens[name]
        for digest, block in self.known.items():
            assert pool.find(digest) == block

    def owners(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.blocks.values())

    def any_sequence(self) -> int:
        return self.random.choice(sorted(self.tokens))

    def room(self, tokens: list[int]) -> bool:
        return self.pool.num_free > len(tokens) // SIZE


@pytest.mark.parametrize("num_blocks, seed", [(1, 0), (6, 1), (17, 2), (40, 3)])
def test_ten_thousand_operations_lose_and_alias_nothing(num_blocks, seed):
    world = World(num_blocks, seed)
    while world.operations.total() < 10_000:
        # Sequences come more often than they go, so that the pool runs full and must evict.
        world.random.choice([world.admit, world.append, world.append, world.append, world.fork, world.finish])()
        if world.random.random() < 0.002:
            world.flush()
        world.check()
    done = {"allocate", "append", "seal", "find", "share", "free", "evict", "flush"}
    assert set(world.operations) == done or num_blocks == 1
    while world.tokens:
        world.finish()
    world.check()
    assert world.pool.num_free == num_blocks and world.pool.num_used == 0


def test_what_was_given_up_longest_ago_is_evicted_first_and_use_renews_it():
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.seal(block, bytes([block]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.free(block)
    pool.share(blocks[1])
    pool.free(blocks[1])
    assert [pool.allocate() for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]
    assert all(pool.find(bytes([block])) is None for block in blocks)


def test_a_block_is_cached_only_once_its_last_owner_has_gone():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.seal(block, b"digest")
    pool.share(block)
    pool.free(block)
    assert (pool.num_used, pool.num_cached, pool.owners(block)) == (1, 0, 1)
    pool.free(block)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 1, 2)
    assert pool.find(b"digest") == block


def test_of_two_blocks_with_one_content_the_first_is_found():
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.seal(first, b"same")
    pool.seal(second, b"same")
    assert pool.find(b"same") == first
    pool.free(second)
    assert pool.num_cached == 0, "the copy is nobody's memory"
    pool.free(first)
    assert pool.find(b"same") == first and pool.num_cached == 1


def test_misuse_is_caught():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.seal(block, b"digest")
    with pytest.raises(AssertionError):
        pool.seal(block, b"another")
    pool.free(block)
    with pytest.raises(AssertionError):
        pool.free(block)
    with pytest.raises(AssertionError):
        pool.seal(block, b"later")
    unowned = 1 - block
    with pytest.raises(AssertionError):
        pool.share(unowned)
    with pytest.raises(AssertionError):
        pool.free(unowned)
    pool.allocate(), pool.allocate()
    with pytest.raises(AssertionError):
        pool.allocate()


def test_slots_have_one_owner_each():
    pool, taken, steps = SlotPool(7), set(), random.Random(4)
    for _ in range(10_000):
        if taken and (len(taken) == 7 or steps.random() < 0.5):
            slot = steps.choice(sorted(taken))
            pool.free(slot)
            taken.remove(slot)
            with pytest.raises(AssertionError):
                pool.free(slot)
        else:
            slot = pool.allocate()
            assert slot == min(set(range(7)) - taken), "the lowest, so that batches stay dense"
            taken.add(slot)
        assert pool.num_free + len(taken) == pool.num_slots == 7
    for slot in (-1, 7):
        with pytest.raises(AssertionError):
            pool.free(slot)


tokens = st.lists(st.integers(0, 2**31), max_size=6)


@given(st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, min_size=1, max_size=4))
def test_equal_chains_and_they_alone_have_equal_digests(one, other):
    def chain(blocks: list[list[int]]) -> bytes:
        digest = ROOT
        for block in blocks:
            digest = block_digest(digest, block)
        return digest

    assert len(chain(one)) == 32
    assert (chain(one) == chain(other)) == (one == other)
    assert chain(one) == chain([list(block) for block in one])


def test_a_digest_names_model_format_and_salt_through_its_first_parent():
    assert block_digest(b"model, 4 bits", [1, 2]) != block_digest(b"model, 2 bits", [1, 2])
    assert block_digest(ROOT, [1, 2]) != block_digest(ROOT, [2, 1])
    assert block_digest(ROOT, [12, 3]) != block_digest(ROOT, [1, 23]), "ids have a width"
    assert block_digest(block_digest(ROOT, [1]), [2]) != block_digest(ROOT, [1, 2])
