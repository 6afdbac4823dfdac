"""Who runs in the next step, and with which memory. Integers only; the runner makes tensors of them."""

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import groupby, takewhile
from math import inf
from typing import NamedTuple

from kvtool.config import SpeculationConfig
from kvtool.errors import RequestError
from kvtool.kv.blocks import BlockPool, SlotPool, block_digest
from kvtool.kv.format import KVFormat
from kvtool.request import (
    VOID,
    Draft,
    EngineStats,
    FinishReason,
    Fork,
    Import,
    Memory,
    Question,
    Request,
    Sample,
    SamplingParams,
    ScheduledBatch,
    ScheduledSpan,
    StepResult,
    Swap,
    TokenLogprobs,
    Tokens,
)
from kvtool.sequence import Sequence
from kvtool.speculation import DraftCache, Pace, averaged, most_drafted, other_seed

NOT_FINITE = "the model computed NaN or infinity for this prompt; a wider --dtype may help"
MAX_LOGPROBS = 20


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
    the pool is short, the youngest running sequence moves to the swap space and waits, first in line; where that is
    full too, it gives its memory up to be computed again. What it will see is the same either way, because visibility
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
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tail_units, self.num_micro_batches = tail_units, num_micro_batches
        self.pace = Pace(speculation.num_tokens) if speculation else None
        self.draft_cache = draft_cache
        # Behind a window the newest tokens are read at full precision, which their blocks do not hold.
        self.cache_identity = cache_identity if fmt.residual == 0 else None
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # like `waiting`, and before it: by arrival
        self.totals: Counter[str] = Counter()  # of EngineStats
        self._under_way: deque[UnderWay] = deque()
        self._swap_outs: list[Swap] = []
        self._swap_ins: list[Swap] = []
        self._imports: list[Import] = []
        self._wipes: list[Memory] = []
        self._forks: list[Fork] = []
        self._drafts: list[Draft] = []
        self._draft_budget = 0  # of tokens that the draft model may yet read in this step

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._under_way)

    @property
    def awaits_tokens(self) -> bool:
        """A step under way will yield a token that decides what follows on it."""
        return any(s.num_pending and (s.params.grammar or self._may_draft(s)) for s in self.running)

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
            origin: the format in which it was computed; empty if that is ours. Others' prefixes are not what these
                tokens would be here, and are shared among those of one origin.
        """
        sequence = self._sequence(request, seed)
        sequence.origin = origin
        if origin and sequence.root:
            sequence.root = block_digest(sequence.root, list(origin.encode()))
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

    def _sequence(self, request: Request, seed: int) -> Sequence:
        length, params = len(request.prompt), request.params
        _check_sampling(params)
        if length == 0:
            raise RequestError("the prompt is empty; send at least one token", "prompt")
        if length >= self.max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens; the context of {self.max_model_len} must hold it and an answer",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens < 1:
            raise RequestError(f"max_tokens is {params.max_tokens}; it must be at least 1", "max_tokens")
        max_length = self.max_model_len if params.max_tokens is None else length + params.max_tokens
        if max_length > self.max_model_len:
            raise RequestError(
                f"{length} tokens of prompt and max_tokens {params.max_tokens} exceed the context of "
                f"{self.max_model_len}; ask for at most {self.max_model_len - length}",
                "max_tokens",
            )
        if self.format.num_blocks(max_length - 1) > self.blocks.num_blocks:  # the last token is never computed
            held = self.blocks.num_blocks * self.format.block_size + self.format.tail_tokens
            raise RequestError(f"{max_length} tokens exceed the KV cache, which holds {held}", "max_tokens")
        if params.min_tokens > max_length - length:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, but the answer has room for {max_length - length}", "min_tokens"
            )
        if request.push_to is not None:
            max_length = length + 1
        return Sequence(request, list(request.prompt), max_length, seed, self._root(request))

    def schedule(self) -> ScheduledBatch:
        """The spans of the next step, with memory for each. Without spans: what is under way must be known before."""
        if self._under_way and not self._can_all_grow():
            return ScheduledBatch(spans=[], samples=[])
        budget = self._draft_budget = self.max_num_batched_tokens
        work: list[tuple[ScheduledSpan, Sequence, list[Sequence]]] = []  # and who takes a token from each
        suspect = self._suspect()
        for sequence in self._decodes() if suspect is None else ():
            if sequence.slot < 0 or budget == 0:  # preempted a moment ago, or no room in this step
                continue
            while not self._grow(sequence):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                for draft in range(1 + self._propose(sequence, budget - 1)):
                    work.append(self._compute(sequence, 1, draft))
                    budget -= 1
        for sequence in [suspect] if suspect else list(self.running):
            if sequence.is_prefilling and budget > 0:
                work.append(self._compute(sequence, budget))
                budget -= work[-1][0].length
        while budget > 0 and suspect is None and self.waiting and self._admit(self.waiting[0]):
            work.append(self._compute(self.waiting.popleft(), budget))
            budget -= work[-1][0].length
        if work and work[-1][0].token_ids:  # otherwise all are decodes
            work.sort(key=lambda item: (bool(item[0].token_ids), item[0].length > 1))
        return self._batch(work) if work else ScheduledBatch(spans=[], samples=[])

    def update(self, result: StepResult, seconds: float = 0.0) -> list[Tokens]:
        """Take in what the oldest step under way yielded, and how long it took: seal, append, finish and free what has
        ended.

        A token of -1 says that the model's logits were not finite.
        """
        computing, takers, num_tokens, num_hits = self._under_way.popleft()
        if self.pace and num_tokens is not None:
            self.pace.observe(len({id(sequence) for sequence in computing}), num_tokens, num_hits, seconds)
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
                self._count_drafts(taker, sum(token > VOID for _, token, _ in samples) - 1)
            self._seal(taker)
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
                self._free_units(sequence)
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
            speculative_tokens=self.pace.num_tokens if self.pace else 0,
            speculation_off=self.pace.off if self.pace else "",
            **self.totals,
        )

    def _decodes(self) -> list[Sequence]:
        """Who decodes in this step."""
        decoding = [s for s in self.running if s.is_decoding and not (s.num_pending and self._may_draft(s))]
        if self.num_micro_batches == 1:
            return decoding
        most = -(-len(decoding) // self.num_micro_batches)
        return [sequence for sequence in decoding if sequence.num_pending == 0][:most]

    def _batch(self, work: Items[tuple[ScheduledSpan, Sequence, list[Sequence]]]) -> ScheduledBatch:
        """The step that does `work`, and what must happen to memory around it."""
        takers = [(taker, index) for index, (_, _, takers) in enumerate(work) for taker in takers]
        batch = ScheduledBatch(
            spans=[span for span, _, _ in work],
            samples=[self._sample(taker, index) for taker, index in takers],
            drafts=self._drafts,
            swap_outs=self._swap_outs,
            wipes=self._wipes,
            swap_ins=self._swap_ins,
            imports=self._imports,
            forks=self._forks,
        )
        self._swap_outs, self._wipes, self._swap_ins, self._imports, self._forks = [], [], [], [], []
        self._drafts = []
        computing = [sequence for _, sequence, _ in work]
        tells = self.pace and not work[-1][0].token_ids and any(map(self._could_draft, computing))
        num_tokens = self.pace.num_tokens if self.pace and tells else None
        num_hits = sum(draft.num_tokens > 0 for draft in batch.drafts)
        self._under_way.append(UnderWay(computing, [taker for taker, _ in takers], num_tokens, num_hits))
        return batch

    def _compute(
        self, sequence: Sequence, budget: int, draft: int = 0
    ) -> tuple[ScheduledSpan, Sequence, list[Sequence]]:
        """The next tokens of `sequence`, at most `budget`, and who takes a token from them: its forks, too."""
        span = self._span(sequence, budget, draft)
        if not span.token_ids:
            return span, sequence, [sequence]
        return span, sequence, [] if sequence.is_prefilling else [sequence, *self._fork(sequence)]

    def _may_draft(self, sequence: Sequence) -> bool:
        """Tokens of `sequence` may be drafted now."""
        return self.pace is not None and self.pace.num_tokens > 0 and self._could_draft(sequence)

    def _could_draft(self, sequence: Sequence) -> bool:
        """They may where it pays: tokens decide nothing of how those behind them are chosen."""
        params = sequence.params
        return sequence.may_draft and params.speculate and not params.looks_back and not params.grammar

    def _propose(self, sequence: Sequence, most: int) -> int:
        """Draft up to `most` tokens behind the newest one of `sequence`; how many these are.

        What may have to be taken back is written to its own memory and completes no block that is packed as a whole. No
        other sequence makes room for it.
        """
        if self.pace is None or not self._may_draft(sequence):
            return 0
        end = sequence.num_computed_tokens + 1
        most = min(most, self.pace.for_sequence(sequence.acceptance), sequence.max_length - end - 1)
        most = min(most, most_drafted(self.format, end - 1))
        if most > sequence.num_held_tokens - end and self.blocks.num_free > len(self.running):
            self._own(sequence, 1)
        most = min(most, sequence.num_held_tokens - end)
        draft = (
            self._ask_draft_model(sequence, most, self.draft_cache) if self.draft_cache else _look_up(sequence, most)
        )
        if draft is None:
            return 0
        self._drafts.append(draft)
        sequence.num_drafted = draft.num_tokens
        return draft.num_tokens

    def _ask_draft_model(self, sequence: Sequence, most: int, cache: DraftCache) -> Draft | None:
        """Have the draft model read what it has not read of `sequence`, and propose `most` tokens once it has."""
        start, blocks = sequence.num_draft_computed_tokens, sequence.draft_blocks
        end = min(len(sequence.tokens), start + self._draft_budget)
        is_whole = end == len(sequence.tokens)
        most = max(0, min(most, most_drafted(cache.format, end - 1), cache.max_model_len - end)) if is_whole else 0
        missing = cache.format.num_blocks(end + max(0, most - 1)) - len(blocks)
        if start == end or end > cache.max_model_len or missing > cache.blocks.num_free or (is_whole and not most):
            return None
        blocks.extend(cache.blocks.allocate() for _ in range(missing))
        self._draft_budget -= end - start
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

    def _count_drafts(self, sequence: Sequence, num_accepted: int) -> None:
        """Note how many drafted tokens were right; what the draft model has read of them it keeps."""
        self.totals["verifications_total"] += 1
        self.totals["drafted_total"] += sequence.num_drafted
        self.totals["accepted_total"] += num_accepted
        sequence.acceptance = averaged(sequence.acceptance, sequence.num_drafted, num_accepted)
        if self.pace:
            self.pace.count(sequence.num_drafted, num_accepted)
        if self.draft_cache:
            sequence.num_draft_computed_tokens += min(num_accepted, sequence.num_drafted - 1)

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

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the blocks of all its tokens, if there are enough.

        Each running sequence may need a block soon, so that many are left to them.
        """
        if self.slots.num_free == 0 or self._awaits_fork(sequence):
            return False
        found = self._find_prefix(sequence)
        needed = self.format.num_blocks(len(sequence.tokens)) - len(found)
        available = self.blocks.num_free - sum(self.blocks.owners(block) == 0 for block in found)
        if available < needed + len(self.running):
            return False
        for block in found:
            self.blocks.share(block)
        sequence.slot, sequence.num_known_tokens = self.slots.allocate(), len(sequence.tokens)
        sequence.blocks, sequence.num_sealed = found.copy(), len(found)
        self._own(sequence, needed)
        if sequence.units:
            self._swap_in(sequence)
        elif sequence.is_imported:
            blocks = sequence.blocks[len(found) : self.format.num_blocks(sequence.num_computed_tokens)]
            self._imports.append(Import(sequence.id, Memory(blocks, sequence.slot)))
            sequence.is_imported = False
        else:
            sequence.num_computed_tokens = len(found) * self.format.block_size
        if sequence.num_cached_tokens < 0:
            self._count_hit(sequence)
        self.running.append(sequence)
        return True

    def _can_all_grow(self) -> bool:
        """Nobody need make room for the next tokens of those that decode."""
        full = sum(s.num_computed_tokens == s.num_held_tokens and s.is_decoding for s in self.running)
        return full <= self.blocks.num_free

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block that its next token needs, if it needs one and there is one."""
        if sequence.num_computed_tokens < sequence.num_held_tokens:
            return True
        if self.blocks.num_free == 0:
            return False
        self._own(sequence, 1)
        return True

    def _own(self, sequence: Sequence, num_blocks: int) -> None:
        """Give a sequence so many blocks more."""
        sequence.blocks.extend(self.blocks.allocate() for _ in range(num_blocks))
        sequence.num_held_tokens = self.format.tokens_within(len(sequence.blocks))

    def _end(self, sequence: Sequence) -> None:
        """Say nothing more of a sequence, and take its memory back once no step under way yields a token of it."""
        sequence.ended = True
        if sequence.num_pending == 0:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Stop running a sequence and take its memory back."""
        self.running.remove(sequence)
        if sequence.unfit or sequence.num_generated == 0:  # before its first token nobody has looked
            own = [block for block in sequence.blocks[sequence.num_sealed :] if self.blocks.owners(block) == 1]
            self._wipes.append(Memory(own, sequence.slot))
        for block in reversed(sequence.blocks):  # the end of a prefix is of no use without its beginning
            self.blocks.free(block)
        if self.draft_cache:
            for block in sequence.draft_blocks:
                self.draft_cache.blocks.free(block)
        sequence.draft_blocks, sequence.num_draft_computed_tokens = [], 0
        self.slots.free(sequence.slot)
        sequence.blocks, sequence.slot, sequence.is_counted, sequence.num_drafted = [], -1, False, 0

    def _release_unfit(self, sequence: Sequence) -> None:
        """Likewise, where what it stored may not be finite; if it had drafts, they may have been to blame."""
        sequence.unfit, sequence.may_draft = True, sequence.may_draft and not sequence.num_drafted
        self._release(sequence)
        sequence.unfit = False

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

    # Preemption

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it waits, first in line."""
        computed = sequence.blocks[: self.format.num_blocks(sequence.num_computed_tokens)]
        memory, num_units = Memory(computed, sequence.slot), len(computed) + self.tail_units
        self.totals["preemptions_total"] += 1
        self._release(sequence)
        if num_units <= self.swap.num_free:
            sequence.units = [self.swap.allocate() for _ in range(num_units)]
            self._swap_outs.append(Swap(memory, sequence.units))
            self.totals["swap_outs_total"] += len(computed)
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

    def _swap_in(self, sequence: Sequence) -> None:
        """Bring back what is not shared again, and free the units."""
        shared = sequence.num_sealed
        blocks = sequence.blocks[shared : self.format.num_blocks(sequence.num_computed_tokens)]
        self._swap_ins.append(Swap(Memory(blocks, sequence.slot), sequence.units[shared:]))
        self.totals["swap_ins_total"] += len(blocks)
        self._free_units(sequence)

    def _free_units(self, sequence: Sequence) -> None:
        for unit in sequence.units:
            self.swap.free(unit)
        sequence.units = []

    # Shared prefixes

    def _root(self, request: Request) -> bytes:
        """What stands before a prompt's first block; empty where the prompt shares nothing."""
        if self.cache_identity is None or request.params.prompt_logprobs is not None:
            return b""
        return block_digest(self.cache_identity, list(request.cache_salt.encode()))

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """The digest of a sequence's complete block."""
        size, digests = self.format.block_size, sequence.digests
        while len(digests) <= index:
            start = len(digests) * size
            digests.append(
                block_digest(digests[-1] if digests else sequence.root, sequence.tokens[start : start + size])
            )
        return digests[index]

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Sealed blocks that hold the beginning of a sequence; at least its last token is left to compute."""
        if not sequence.root:
            return []
        # What is swapped may be found as far as it was computed, so that the rest of it fits behind.
        known = sequence.num_computed_tokens if sequence.units else len(sequence.tokens) - 1
        found: list[int] = []
        for index in range(self.format.packed_tokens(known) // self.format.block_size):
            block = self.blocks.find(self._digest(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def _seal(self, sequence: Sequence) -> None:
        """Make complete blocks known by what they hold, now that a token has shown that it is fit for others."""
        computed = len(sequence.tokens) - 1  # and known to be finite
        if not sequence.root or computed <= self.format.tokens_within(sequence.num_sealed):
            return
        size = self.format.block_size
        for index in range(sequence.num_sealed, self.format.packed_tokens(computed) // size):
            self.blocks.seal(sequence.blocks[index], self._digest(sequence, index))
            sequence.num_sealed = index + 1

    def _count_hit(self, sequence: Sequence) -> None:
        """At the first admission."""
        sequence.num_cached_tokens = sequence.num_computed_tokens
        if sequence.root:
            possible = (len(sequence.tokens) - 1) // self.format.block_size * self.format.block_size
            self.totals["prefix_queries_total"] += len(sequence.tokens)
            self.totals["prefix_hits_total"] += sequence.num_cached_tokens
            if sequence.num_cached_tokens:
                self.totals["full_hits_total" if sequence.num_cached_tokens == possible else "partial_hits_total"] += 1

    # Forks

    def _suspect(self) -> Sequence | None:
        """The sequence that this step must compute alone, if there is one."""
        for sequence in self.running:
            if sequence.alone:
                return sequence
        if self.waiting and self.waiting[0].alone and self._admit(self.waiting[0]):
            return self.waiting.popleft()
        return None

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
        full = self.format.packed_tokens(len(parent.tokens)) // self.format.block_size
        partial = parent.blocks[full:]
        children: list[Sequence] = []
        while (
            self.waiting
            and self._is_fork(self.waiting[0], parent)
            and self.slots.num_free > 0
            and self.blocks.num_free >= len(partial) + len(self.running)
        ):
            child = self.waiting.popleft()
            child.slot, child.num_known_tokens = self.slots.allocate(), len(child.tokens)
            child.num_computed_tokens = parent.num_computed_tokens
            child.num_cached_tokens, child.num_sealed = parent.num_cached_tokens, parent.num_sealed
            child.prompt_logprobs = parent.prompt_logprobs  # shared: this step extends it for all
            for block in parent.blocks[:full]:
                self.blocks.share(block)
            child.blocks = parent.blocks[:full]
            self._own(child, len(partial))
            last = (partial[0], child.blocks[-1]) if partial else (-1, -1)
            self._forks.append(Fork(parent.slot, last[0], child.slot, last[1]))
            self.running.append(child)
            children.append(child)
        return children


def _look_up(sequence: Sequence, most: int) -> Draft | None:
    """Propose what followed the newest tokens of `sequence` before."""
    token_ids = sequence.ngrams.propose(sequence.tokens, most) if most > 0 else []
    return Draft(slot=sequence.slot, num_tokens=most, token_ids=token_ids) if token_ids else None


def _check_sampling(params: SamplingParams) -> None:
    """Raises RequestError for parameters outside their ranges; NaN is in none."""
    if not 0 <= params.temperature < inf:
        raise RequestError(f"temperature is {params.temperature}; it must be 0 or more", "temperature")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"top_p is {params.top_p}; it must be above 0 and at most 1", "top_p")
    if params.top_k < 0:
        raise RequestError(f"top_k is {params.top_k}; it must be 0, which keeps all, or more", "top_k")
    if not 0 <= params.min_p <= 1:
        raise RequestError(f"min_p is {params.min_p}; it must be from 0 to 1", "min_p")
    if not 0 < params.repetition_penalty < inf:
        raise RequestError(
            f"repetition_penalty is {params.repetition_penalty}; it must be above 0", "repetition_penalty"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(params, name)) < inf:
            raise RequestError(f"{name} is {getattr(params, name)}; it must be a number", name)
    if not all(abs(bias) < inf for bias in params.logit_bias.values()):
        raise RequestError("logit_bias must hold numbers", "logit_bias")
    if params.min_tokens < 0:
        raise RequestError(f"min_tokens is {params.min_tokens}; it must be 0 or more", "min_tokens")
    for name in ("logprobs", "prompt_logprobs"):
        if not 0 <= (getattr(params, name) or 0) <= MAX_LOGPROBS:
            raise RequestError(f"{name} is {getattr(params, name)}; it must be from 0 to {MAX_LOGPROBS}", name)
