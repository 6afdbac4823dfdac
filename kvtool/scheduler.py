"""Who runs in the next step, and with which memory. Integers only; the runner makes tensors of them."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from math import inf

from kvtool.errors import RequestError
from kvtool.kv.blocks import BlockPool, SlotPool
from kvtool.kv.format import KVFormat
from kvtool.request import FinishReason, Request, SamplingParams, ScheduledBatch, ScheduledSpan, Tokens

NOT_FINITE = "the model computed NaN or infinity for this prompt; a wider --dtype may help"


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        tokens: the prompt and what has been generated so far.
        max_length: tokens at which it ends.
        seed: the request's, or the engine's choice.
        num_known_tokens: how many there were when it was admitted; later ones the runner has sampled itself.
        num_computed_tokens: how many have, or in the step under way get, their keys and values in the store.
        blocks: packed blocks it owns or shares, in order of position.
        slot: its tail slot and its row in the runner's memory of newest tokens; -1 while it waits.
    """

    request: Request
    tokens: list[int]
    max_length: int
    seed: int
    num_known_tokens: int = 0
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int = -1

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.num_known_tokens


class Scheduler:
    """Continuous batching: decodes first, then chunks of prompts, up to a budget of tokens a step.

    A sequence is admitted with the blocks of its whole prompt and grows block by block after that. When the pool is
    short, the youngest running sequence gives its memory back and waits, first in line, to be computed again; what it
    will see is the same, because visibility depends on the position alone. The oldest can always go on: `add` refuses
    what the empty pool could not hold.
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
    ) -> None:
        self.format = fmt
        self.blocks, self.slots = BlockPool(num_blocks), SlotPool(max_num_seqs)
        self.max_num_batched_tokens, self.max_model_len = max_num_batched_tokens, max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request, seed: int) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run: no prompt, or more tokens than the context or the cache can hold.
        """
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
        self.waiting.append(Sequence(request, list(request.prompt), max_length, seed))

    def schedule(self) -> ScheduledBatch:
        """The spans of the next step, with memory for each; never empty while there is work."""
        budget = self.max_num_batched_tokens
        decodes: list[ScheduledSpan] = []
        for sequence in [s for s in self.running if not s.is_prefilling]:
            if sequence.slot < 0 or budget == 0:  # preempted a moment ago, or no room in this step
                continue
            while not self._grow(sequence):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                decodes.append(self._span(sequence, 1))
                budget -= 1
        chunks = []
        for sequence in self.running:
            if sequence.is_prefilling and budget > 0:
                chunks.append(self._span(sequence, budget))
                budget -= chunks[-1].length
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            chunks.append(self._span(self.waiting.popleft(), budget))
            budget -= chunks[-1].length
        return ScheduledBatch([*decodes, *sorted(chunks, key=lambda span: span.length > 1)])

    def update(self, batch: ScheduledBatch, token_ids: Items[int]) -> list[Tokens]:
        """Append what a step sampled, one token for each of `batch.sampled`; finish and free what has ended.

        A token of -1 says that the model's logits were not finite.
        """
        news, running = [], {sequence.id: sequence for sequence in self.running}
        for span, token in zip(batch.sampled, token_ids, strict=True):
            sequence = running.get(span.id)
            if sequence is None:  # aborted since it was scheduled
                continue
            if token < 0:
                self._end(sequence)
                news.append(Tokens(span.id, [], error=NOT_FINITE))
                continue
            sequence.tokens.append(token)
            reason = self._finish_reason(sequence)
            news.append(Tokens(sequence.id, [token], reason))
            if reason:
                self._end(sequence)
        return news

    def fail(self, batch: ScheduledBatch, error: str) -> list[Tokens]:
        """End every sequence of a step that could not be computed."""
        for span in batch.spans:
            self.abort(span.id)
        return [Tokens(span.id, [], error=error) for span in batch.spans]

    def abort(self, request_id: str) -> None:
        """Drop a request in whatever state it is; one that has ended meanwhile is no error."""
        for sequence in self.waiting:
            if sequence.id == request_id:
                self.waiting.remove(sequence)
                return
        for sequence in self.running:
            if sequence.id == request_id:
                self._end(sequence)
                return

    def _span(self, sequence: Sequence, budget: int) -> ScheduledSpan:
        """Schedule the next tokens of `sequence`, at most `budget`."""
        start = sequence.num_computed_tokens
        end = min(len(sequence.tokens), start + budget)
        span = ScheduledSpan(
            id=sequence.id,
            slot=sequence.slot,
            start=start,
            end=end,
            token_ids=sequence.tokens[start:end] if sequence.is_prefilling else [],
            blocks=sequence.blocks.copy(),
            samples=end == len(sequence.tokens),
            params=sequence.params,
            seed=sequence.seed,
        )
        sequence.num_computed_tokens = end
        return span

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the blocks of all its tokens, if there are enough."""
        needed = self.format.num_blocks(len(sequence.tokens))
        if self.slots.num_free == 0 or self.blocks.num_free < needed:
            return False
        sequence.slot, sequence.num_known_tokens = self.slots.allocate(), len(sequence.tokens)
        sequence.blocks = [self.blocks.allocate() for _ in range(needed)]
        self.running.append(sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block that its next token needs, if it needs one and there is one."""
        missing = self.format.num_blocks(sequence.num_computed_tokens + 1) - len(sequence.blocks)
        if missing > self.blocks.num_free:
            return False
        sequence.blocks.extend(self.blocks.allocate() for _ in range(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._end(sequence)
        sequence.num_computed_tokens = 0
        self.waiting.appendleft(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Stop running a sequence and take its memory back."""
        self.running.remove(sequence)
        for block in sequence.blocks:
            self.blocks.free(block)
        self.slots.free(sequence.slot)
        sequence.blocks, sequence.slot = [], -1

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in self.eos_token_ids and not sequence.params.ignore_eos:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_length else None


def _check_sampling(params: SamplingParams) -> None:
    """Raises RequestError for parameters outside their ranges; NaN is in none."""
    if not 0 <= params.temperature < inf:
        raise RequestError(f"temperature is {params.temperature}; it must be 0 or more", "temperature")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"top_p is {params.top_p}; it must be above 0 and at most 1", "top_p")
    if params.top_k < 0:
        raise RequestError(f"top_k is {params.top_k}; it must be 0, which keeps all, or more", "top_k")
