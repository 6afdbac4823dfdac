"""For which sequences tokens are drafted, and how many. Integers only; the draft model itself is the runner's."""

from collections import Counter

from kvtool.request import Draft, Question, Sample, SamplingParams, ScheduledSpan
from kvtool.sequence import Sequence
from kvtool.sequence_memory import SequenceMemory
from kvtool.speculation import DraftCache, Pace, averaged, most_drafted, other_seed


class Drafting:
    """Proposes tokens behind the newest ones of sequences that decode, as long as that pays.

    Args:
        memory: of the sequences.
        most: tokens for a sequence in a step; 0: none are drafted.
        cache: of the draft model; None: what is proposed has stood in the sequence before.
        max_num_batched_tokens: that the draft model reads in a step, at most.
        totals: of EngineStats.

    Attributes:
        pace: how many tokens pay.
    """

    def __init__(
        self,
        memory: SequenceMemory,
        most: int,
        cache: DraftCache | None,
        max_num_batched_tokens: int,
        totals: Counter[str],
    ) -> None:
        self.pace = Pace(most)
        self._memory, self._cache, self._totals = memory, cache, totals
        self._max_num_batched_tokens = self._budget = max_num_batched_tokens
        self._drafts: list[Draft] = []  # of the step that is being made

    def may_draft(self, sequence: Sequence) -> bool:
        """Tokens of `sequence` may be drafted now."""
        return self.pace.num_tokens > 0 and self.could_draft(sequence)

    def could_draft(self, sequence: Sequence) -> bool:
        """They may where it pays: tokens decide nothing of how those behind them are chosen."""
        params = sequence.params
        is_allowed = self.pace.most > 0 and sequence.may_draft and params.speculate
        return is_allowed and not params.looks_back and not params.grammar

    def propose(self, sequence: Sequence, most: int, spare: int) -> int:
        """Draft up to `most` tokens behind the newest one of `sequence`; how many these are.

        What may have to be taken back is written to its own memory and completes no block that is packed as a whole. No
        other sequence makes room for it.

        Args:
            spare: blocks that others may need.
        """
        if not self.may_draft(sequence):
            return 0
        end = sequence.num_computed_tokens + 1
        most = min(most, self.pace.for_sequence(sequence.acceptance), sequence.max_length - end - 1)
        most = min(most, most_drafted(self._memory.format, end - 1))
        if most > sequence.num_held_tokens - end and self._memory.blocks.num_free > spare:
            self._memory.own(sequence, 1)
        most = min(most, sequence.num_held_tokens - end)
        draft = self._ask(sequence, most, self._cache) if self._cache else _look_up(sequence, most)
        if draft is None:
            return 0
        self._drafts.append(draft)
        sequence.num_drafted = draft.num_tokens
        return draft.num_tokens

    def take(self) -> list[Draft]:
        """What is proposed for the step that is being made; then comes the next."""
        drafts, self._drafts = self._drafts, []
        self._budget = self._max_num_batched_tokens
        return drafts

    def count(self, sequence: Sequence, num_accepted: int) -> None:
        """Note how many drafted tokens were right; what the draft model has read of them it keeps."""
        self._totals["verifications_total"] += 1
        self._totals["drafted_total"] += sequence.num_drafted
        self._totals["accepted_total"] += num_accepted
        sequence.acceptance = averaged(sequence.acceptance, sequence.num_drafted, num_accepted)
        self.pace.count(sequence.num_drafted, num_accepted)
        if self._cache:
            sequence.num_draft_computed_tokens += min(num_accepted, sequence.num_drafted - 1)

    def release(self, sequence: Sequence) -> None:
        """Take the draft model's memory of a sequence back."""
        if self._cache:
            for block in sequence.draft_blocks:
                self._cache.blocks.free(block)
        sequence.draft_blocks, sequence.num_draft_computed_tokens, sequence.num_drafted = [], 0, 0

    def _ask(self, sequence: Sequence, most: int, cache: DraftCache) -> Draft | None:
        """Have the draft model read what it has not read of `sequence`, and propose `most` tokens once it has."""
        start, blocks = sequence.num_draft_computed_tokens, sequence.draft_blocks
        end = min(len(sequence.tokens), start + self._budget)
        is_whole = end == len(sequence.tokens)
        most = max(0, min(most, most_drafted(cache.format, end - 1), cache.max_model_len - end)) if is_whole else 0
        missing = cache.format.num_blocks(end + max(0, most - 1)) - len(blocks)
        if start == end or end > cache.max_model_len or missing > cache.blocks.num_free or (is_whole and not most):
            return None
        blocks.extend(cache.blocks.allocate() for _ in range(missing))
        self._budget -= end - start
        sequence.num_draft_computed_tokens = end
        span = ScheduledSpan(
            id=sequence.id,
            slot=sequence.slot,
            start=start,
            end=end,
            blocks=blocks,
            token_ids=sequence.tokens[start:end],
        )
        params, seed = sequence.params, sequence.seed
        narrowing = SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p
        )
        # A seed gives the same tokens whatever is drafted. Nobody sees by which number a request without one is drawn.
        adjusted = params.logit_bias or sequence.num_generated < params.min_tokens
        may_reject = params.seed is None and params.temperature > 0 and not adjusted
        sample = Sample(
            id=sequence.id,
            span=0,
            slot=sequence.slot,
            position=end,
            params=narrowing,
            seed=other_seed(seed) if may_reject else seed,
            num_generated=sequence.num_generated,
        )
        return Draft(slot=sequence.slot, num_tokens=most, question=Question(span, sample, may_reject))


def _look_up(sequence: Sequence, most: int) -> Draft | None:
    """Propose what followed the newest tokens of `sequence` before."""
    token_ids = sequence.ngrams.propose(sequence.tokens, most) if most > 0 else []
    return Draft(slot=sequence.slot, num_tokens=most, token_ids=token_ids) if token_ids else None
