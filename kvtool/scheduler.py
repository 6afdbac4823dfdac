"""Who runs in the next step, and with which memory. Integers only; the runner makes tensors of them."""

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import groupby, takewhile
from typing import NamedTuple

from kvtool.config import SpeculationConfig
from kvtool.drafting import Drafting
from kvtool.kv.blocks import BlockPool, SlotPool
from kvtool.kv.format import KVFormat
from kvtool.prefixes import Prefixes
from kvtool.request import (
    VOID,
    EngineStats,
    FinishReason,
    Request,
    Sample,
    ScheduledBatch,
    ScheduledSpan,
    StepResult,
    TokenLogprobs,
    Tokens,
)
from kvtool.request_checks import check_request
from kvtool.sequence import Sequence
from kvtool.sequence_memory import SequenceMemory
from kvtool.speculation import DraftCache

# While room is made, nothing is under way and the GPU waits: it is not made for one block at a time.
STEPS_OF_ROOM = 16

NOT_FINITE = "the model computed NaN or infinity for this prompt; a wider --dtype may help"


class UnderWay(NamedTuple):
    """A step that has been scheduled and whose outcome is not known.

    Attributes:
        computing, takers: who computes in it, and who takes its samples.
        num_tokens: that were to be drafted for a sequence, at most; None where it tells nothing of what drafts are
            worth: others than decodes compute in it, or nobody may draft.
        num_hits: sequences for which some were.
    """

    computing: list[Sequence]
    takers: list[Sequence]
    num_tokens: int | None
    num_hits: int


class Scheduler:
    """Continuous batching: decodes first, then chunks of prompts, up to a budget of tokens a step.

    Requests are served in the order of their arrival. A sequence is admitted with the blocks of its whole prompt, of
    which it shares those that another of the same beginning has computed, and grows block by block after that. When
    the pool is short, the youngest running sequences move to the swap space and wait, first in line; where that is full
    too, they give their memory up to be computed again. What they will see is the same either way, because visibility
    depends on the position alone. The oldest can always go on: `add` refuses what the empty pool could not hold.

    Steps may be scheduled before the outcome of those before them is known: `update` is called once for each, in their
    order. Whoever makes room does so only when all is known.

    Args:
        fmt: of the KV store.
        num_blocks, num_swap_units: of the store and of the swap space.
        tail_units: units of swap space that one tail takes.
        cache_identity: of model and format; prefixes are shared under one identity only. None: never.
        num_micro_batches: stages of a pipeline that compute at the same time, each another step, so that a sequence
            waits for its token before it is in the next one and each step leaves others' share of the decodes to them.
        speculation: how tokens are drafted. A sequence that may have some waits for its tokens, too: what is drafted
            follows on them, and how far it holds decides where the next ones stand.
        draft_cache: of the draft model; None: there is none.
    """

    def __init__(
        self,
        fmt: KVFormat,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Items[int],
        num_swap_units: int = 0,
        tail_units: int = 0,
        cache_identity: bytes | None = None,
        num_micro_batches: int = 1,
        speculation: SpeculationConfig | None = None,
        draft_cache: DraftCache | None = None,
    ) -> None:
        self.format = fmt
        self.blocks, self.slots, self.swap = BlockPool(num_blocks), SlotPool(max_num_seqs), BlockPool(num_swap_units)
        self.max_num_batched_tokens, self.max_model_len = max_num_batched_tokens, max_model_len
        self.eos_token_ids, self.num_micro_batches = frozenset(eos_token_ids), num_micro_batches
        self.totals: Counter[str] = Counter()  # of EngineStats
        self.memory = SequenceMemory(fmt, self.blocks, self.slots, self.swap, tail_units, self.totals)
        self.prefixes = Prefixes(fmt, self.blocks, cache_identity, self.totals)
        most = speculation.num_tokens if speculation else 0
        self.drafting = Drafting(self.memory, most, draft_cache, max_num_batched_tokens, self.totals)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # like `waiting`, and before it: by arrival
        self._under_way: deque[UnderWay] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._under_way)

    @property
    def awaits_tokens(self) -> bool:
        """A step under way will yield a token that decides what follows on it."""
        return any(s.num_pending and (s.params.grammar or self.drafting.may_draft(s)) for s in self.running)

    def add(self, request: Request, seed: int) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run: no prompt, or more tokens than the context or the cache can hold.
        """
        self.waiting.append(self._sequence(request, seed))

    def add_imported(
        self, request: Request, seed: int, first_token: int, num_cached_tokens: int, origin: str
    ) -> list[Tokens]:
        """Queue a request whose prompt and first token another engine has computed, as if it had been swapped out here;
        its answer, if that was all of it.

        Args:
            origin: the format in which it was computed; empty if that is ours.
        """
        sequence = self._sequence(request, seed, origin)
        sequence.tokens.append(first_token)
        sequence.num_cached_tokens = num_cached_tokens
        if reason := self._finish_reason(sequence):
            return [self._news(sequence, [], reason)]
        sequence.num_computed_tokens, sequence.is_imported = len(request.prompt), True
        self.waiting.append(sequence)
        return []

    def check(self, request: Request) -> None:
        """Raises RequestError if it could never run."""
        self._sequence(request, seed=0)

    def _sequence(self, request: Request, seed: int, origin: str = "") -> Sequence:
        max_length = check_request(request, self.format, self.blocks.num_blocks, self.max_model_len)
        root = self.prefixes.root(request, origin)
        return Sequence(request, list(request.prompt), max_length, seed, root, origin=origin)

    def schedule(self) -> ScheduledBatch:
        """The spans of the next step, with memory for each. Without spans: what is under way must be known before."""
        if self._under_way and not self._can_all_grow():
            return ScheduledBatch(spans=[], samples=[])
        budget = self.max_num_batched_tokens
        work: list[tuple[ScheduledSpan, Sequence, list[Sequence]]] = []  # and who takes a token from each
        suspect = self._suspect()
        for sequence in self._decodes() if suspect is None else ():
            if sequence.slot < 0 or budget == 0:  # preempted a moment ago, or no room in this step
                continue
            if self.memory.grow(sequence) or self._make_room(sequence):
                for draft in range(1 + self.drafting.propose(sequence, budget - 1, spare=len(self.running))):
                    work.append(self._compute(sequence, 1, draft))
                    budget -= 1
        for sequence in [suspect] if suspect else list(self.running):
            if sequence.is_prefilling and budget > 0:
                work.append(self._compute(sequence, budget))
                budget -= work[-1][0].length
        while budget > 0 and suspect is None and self.waiting and self._admit(self.waiting[0]):
            work.append(self._compute(self.waiting.popleft(), budget))
            budget -= work[-1][0].length
        work.sort(key=lambda item: _place(item[0]))
        return self._batch(work) if work else ScheduledBatch(spans=[], samples=[])

    def update(self, result: StepResult, seconds: float = 0.0) -> list[Tokens]:
        """Take in what the oldest step under way yielded, and how long it took: seal, append, finish and free what has
        ended.

        A token of -1 says that the model's logits were not finite.
        """
        computing, takers, num_tokens, num_hits = self._under_way.popleft()
        if num_tokens is not None:
            self.drafting.pace.observe(len({id(sequence) for sequence in computing}), num_tokens, num_hits, seconds)
        news = []
        for taker, token in zip(takers, result.token_ids, strict=True):
            taker.num_pending -= 1
            taker.num_computed_tokens -= token <= VOID
            taker.unfit |= token == -1
        for sequence, scores in zip(computing, result.prompt_logprobs, strict=True):
            if not sequence.unfit:
                sequence.prompt_logprobs.extend(scores)
        yielded = zip(takers, result.token_ids, result.logprobs, strict=True)
        for _, group in groupby(yielded, key=lambda item: id(item[0])):
            samples = list(group)
            taker = samples[0][0]
            if taker.ended:
                self._end(taker)
                continue
            if taker.unfit:
                self._end(taker)
                news.append(Tokens(taker.id, [], error=NOT_FINITE))
                continue
            logprobs: list[TokenLogprobs] = []
            reason: FinishReason | None = None
            for _, token, logprob in samples:
                if token <= VOID:
                    break
                taker.tokens.append(token)
                logprobs += [logprob] if logprob else []
                if reason := self._finish_reason(taker):
                    break
            taker.alone = False
            if taker.num_drafted:
                self.drafting.count(taker, sum(token > VOID for _, token, _ in samples) - 1)
            self.prefixes.seal(taker)
            news.append(self._news(taker, logprobs, reason))
            if reason:
                self._end(taker)
            elif samples[-1][1] < VOID:  # what is behind its tokens would reach them
                self._release_unfit(taker)
                self._compute_again(taker)
            taker.num_drafted = 0
        return news

    def fail(self, error: str) -> list[Tokens]:
        """The oldest step under way could not be computed: end its sequence with the error. If it had several, all are
        computed again, each in steps of its own, so that the one whose fault it was takes no other along. What later
        steps under way yield is not wanted any more; their sequences, too, are computed again."""
        failed = {id(sequence) for sequence in (*self._under_way[0].computing, *self._under_way[0].takers)}
        later = {id(sequence) for step in self._under_way for sequence in (*step.computing, *step.takers)}
        self._under_way.clear()
        sequences = [sequence for sequence in self.running if id(sequence) in failed | later]
        errors = []
        for sequence in reversed(sequences):
            sequence.num_pending, is_alone = 0, failed == {id(sequence)} and not sequence.num_drafted
            self._release_unfit(sequence)
            if sequence.ended:
                continue
            if is_alone:
                errors.append(Tokens(sequence.id, [], error=error))
                continue
            sequence.alone = True
            self._compute_again(sequence)
        return errors

    def abort(self, request_id: str) -> None:
        """Drop a request in whatever state it is; one that has ended meanwhile is no error."""
        for sequence in self.waiting:
            if sequence.id == request_id:
                self.waiting.remove(sequence)
                self.memory.free_units(sequence)
                return
        for sequence in self.running:
            if sequence.id == request_id and not sequence.ended:
                self._end(sequence)
                return

    def flush_cache(self) -> None:
        """Forget every prefix; what has been computed for a request, running or swapped, is its alone from now on."""
        self.blocks.flush()
        for sequence in (*self.running, *self._preempted()):
            sequence.root = b""

    def stats(self) -> EngineStats:
        """What is running and what it holds."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            swapped=sum(bool(sequence.units) for sequence in self._preempted()),
            used_blocks=self.blocks.num_used,
            cached_blocks=self.blocks.num_cached,
            sealed_blocks=self.blocks.num_sealed,
            used_tails=self.slots.num_slots - self.slots.num_free,
            used_swap_units=self.swap.num_used,
            speculative_tokens=self.drafting.pace.num_tokens,
            speculation_off=self.drafting.pace.off,
            **self.totals,
        )

    # The next step

    def _suspect(self) -> Sequence | None:
        """The sequence that this step must compute alone, if there is one."""
        for sequence in self.running:
            if sequence.alone:
                return sequence
        if self.waiting and self.waiting[0].alone and self._admit(self.waiting[0]):
            return self.waiting.popleft()
        return None

    def _decodes(self) -> list[Sequence]:
        """Who decodes in this step."""
        decoding = [s for s in self.running if s.is_decoding and not (s.num_pending and self.drafting.may_draft(s))]
        if self.num_micro_batches == 1:
            return decoding
        most = -(-len(decoding) // self.num_micro_batches)
        return [sequence for sequence in decoding if sequence.num_pending == 0][:most]

    def _can_all_grow(self) -> bool:
        """Nobody need make room for the next tokens of those that decode."""
        full = sum(s.num_computed_tokens == s.num_held_tokens and s.is_decoding for s in self.running)
        return full <= self.blocks.num_free

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the blocks of all its tokens, if there are enough.

        Each running sequence may need a block soon, so that many are left to them.
        """
        if self.slots.num_free == 0 or self._awaits_fork(sequence):
            return False
        if not self.memory.admit(sequence, self.prefixes.find(sequence), spare=len(self.running)):
            return False
        sequence.num_known_tokens = len(sequence.tokens)
        if sequence.num_cached_tokens < 0:
            self.prefixes.count_hit(sequence)
        self.running.append(sequence)
        return True

    def _compute(
        self, sequence: Sequence, budget: int, draft: int = 0
    ) -> tuple[ScheduledSpan, Sequence, list[Sequence]]:
        """The next tokens of `sequence`, at most `budget`, and who takes a token from them: its forks, too."""
        span = self._span(sequence, budget, draft)
        if not span.token_ids:
            return span, sequence, [sequence]
        return span, sequence, [] if sequence.is_prefilling else [sequence, *self._fork(sequence)]

    def _span(self, sequence: Sequence, budget: int, draft: int) -> ScheduledSpan:
        """Schedule the next tokens of `sequence`, at most `budget`."""
        id_, slot, blocks, start = sequence.request.id, sequence.slot, sequence.blocks, sequence.num_computed_tokens
        if not sequence.is_prefilling:
            sequence.num_computed_tokens = start + 1
            return ScheduledSpan(id=id_, slot=slot, start=start, end=start + 1, blocks=blocks, draft=draft)
        end = sequence.num_computed_tokens = min(sequence.length, start + budget)
        scored = sequence.params.prompt_logprobs is not None and sequence.num_generated == 0
        return ScheduledSpan(
            id=id_,
            slot=slot,
            start=start,
            end=end,
            blocks=blocks,
            token_ids=sequence.tokens[start:end],
            targets=sequence.request.prompt[start + 1 : end + 1] if scored else (),
            num_top=sequence.params.prompt_logprobs or 0,
        )

    def _sample(self, sequence: Sequence, span: int) -> Sample:
        """The token that `sequence` takes from the span of this index."""
        request, position = sequence.request, sequence.length
        is_new = not sequence.is_counted and request.params.looks_back
        history, sequence.is_counted = sequence.tokens.copy() if is_new else (), True
        sequence.num_pending += 1
        return Sample(
            id=request.id,
            span=span,
            slot=sequence.slot,
            position=position,
            params=request.params,
            seed=sequence.seed,
            num_generated=position - len(request.prompt),
            history=history,
        )

    def _batch(self, work: Items[tuple[ScheduledSpan, Sequence, list[Sequence]]]) -> ScheduledBatch:
        """The step that does `work`, and what must happen to memory around it."""
        takers = [(taker, index) for index, (_, _, takers) in enumerate(work) for taker in takers]
        batch = ScheduledBatch(
            spans=[span for span, _, _ in work],
            samples=[self._sample(taker, index) for taker, index in takers],
            drafts=self.drafting.take(),
            **self.memory.take_moves()._asdict(),
        )
        computing = [sequence for _, sequence, _ in work]
        tells = not work[-1][0].token_ids and any(map(self.drafting.could_draft, computing))
        num_tokens = self.drafting.pace.num_tokens if tells else None
        num_hits = sum(draft.num_tokens > 0 for draft in batch.drafts)
        self._under_way.append(UnderWay(computing, [taker for taker, _ in takers], num_tokens, num_hits))
        return batch

    # Forks

    def _awaits_fork(self, sequence: Sequence) -> bool:
        """A running sequence is about to compute the prompt that this one shares."""
        parents = (s for s in self.running if s.id == sequence.request.fork_of)
        return sequence.num_computed_tokens == 0 and any(s.is_prefilling for s in parents)

    def _is_fork(self, sequence: Sequence, parent: Sequence) -> bool:
        """A waiting sequence can go on from where `parent` has computed its prompt."""
        is_child = sequence.request.fork_of == parent.id and sequence.tokens == parent.tokens == parent.request.prompt
        alike = sequence.root == parent.root and sequence.params.prompt_logprobs == parent.params.prompt_logprobs
        return is_child and alike and not sequence.alone and not sequence.units

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """Admit the forks that wait for `parent`, whose prompt this step completes, as far as there is room."""
        children: list[Sequence] = []
        while (
            self.waiting
            and self._is_fork(self.waiting[0], parent)
            and self.slots.num_free > 0
            and self.memory.fork(parent, self.waiting[0], spare=len(self.running))
        ):
            child = self.waiting.popleft()
            child.num_known_tokens, child.num_computed_tokens = len(child.tokens), parent.num_computed_tokens
            child.num_cached_tokens = parent.num_cached_tokens
            child.prompt_logprobs = parent.prompt_logprobs  # shared: this step extends it for all
            self.running.append(child)
            children.append(child)
        return children

    # What is said

    def _news(self, sequence: Sequence, logprobs: list[TokenLogprobs], reason: FinishReason | None) -> Tokens:
        """What is said of a sequence's newest tokens, behind which it ends if there is a reason."""
        first = sequence.num_told == 0
        new = sequence.tokens[len(sequence.request.prompt) + sequence.num_told :]
        sequence.num_told += len(new)
        scored = first and sequence.params.prompt_logprobs is not None
        return Tokens(
            sequence.id,
            new,
            reason,
            logprobs=logprobs or None,
            prompt_logprobs=sequence.prompt_logprobs if scored else None,
            num_cached_tokens=sequence.num_cached_tokens if first else 0,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        token, params = sequence.tokens[-1], sequence.params
        # A grammar says by an end of text that nothing more may follow.
        if token in self.eos_token_ids and (params.grammar or not params.ignore_eos):
            return "stop"
        if token in params.stop_token_ids:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_length else None

    # Who ends, or makes room

    def _end(self, sequence: Sequence) -> None:
        """Say nothing more of a sequence, and take its memory back once no step under way yields a token of it."""
        sequence.ended = True
        if sequence.num_pending == 0:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Stop running a sequence and take its memory back."""
        self.running.remove(sequence)
        self.memory.release(sequence)
        self.drafting.release(sequence)
        sequence.is_counted = False

    def _release_unfit(self, sequence: Sequence) -> None:
        """Likewise, where what it stored may not be finite; if it had drafts, they may have been to blame."""
        sequence.unfit, sequence.may_draft = True, sequence.may_draft and not sequence.num_drafted
        self._release(sequence)
        sequence.unfit = False

    def _make_room(self, sequence: Sequence) -> bool:
        """Give `sequence` the block that it needs, for which the youngest are preempted, and more of them while those
        that stay would be short in the next `STEPS_OF_ROOM`; False where it is the one that had to go."""
        spare = len(self.running) * STEPS_OF_ROOM // self.format.block_size
        while self.blocks.num_free <= spare and self.running[-1] is not sequence:
            self._preempt(self.running[-1])
        if self.memory.grow(sequence):
            return True
        self._preempt(sequence)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it waits, first in line."""
        self.totals["preemptions_total"] += 1
        is_saved = self.memory.swap_out(sequence)
        self._release(sequence)
        if is_saved:
            self.waiting.appendleft(sequence)
        else:
            self.totals["recomputations_total"] += 1
            self._compute_again(sequence)

    def _compute_again(self, sequence: Sequence) -> None:
        """Let a sequence that has lost its memory wait, first in line."""
        sequence.num_computed_tokens = 0
        if sequence.origin:  # it becomes neither what it was nor what it would have been
            sequence.root = b""
        if sequence.num_generated == 0:
            sequence.prompt_logprobs = []
        self.waiting.appendleft(sequence)

    def _preempted(self) -> Iterator[Sequence]:
        """Who waits for room to go on: first in line, before those that have never run."""
        return takewhile(lambda sequence: sequence.num_known_tokens > 0, self.waiting)


def _place(span: ScheduledSpan) -> tuple[bool, bool, int]:
    """Where a span stands in its step: decodes first, then others of one token, then longer ones.

    Of decodes, those that read most come first, as a GPU starts on them in this order: with the short ones it fills up
    what the long ones leave, and graphs repeat the last. A sequence's drafts stay behind its newest token.
    """
    if span.token_ids:
        return True, span.length > 1, 0
    return False, False, span.draft - span.start
