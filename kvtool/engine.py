"""The engine: requests in, tokens out, one step at a time."""

import random
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from threading import Lock
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvtool.config import MOST_DRAFTED, EngineConfig, HandoffConfig
from kvtool.errors import CapacityError, ConfigError, KVToolError, RequestError, UnsupportedError
from kvtool.grammar import GrammarCompiler, Matcher
from kvtool.handoff import Inlet, Pusher, WholeStore
from kvtool.kv.blocks import BlockPool
from kvtool.kv.receiver import Arrival, Loss
from kvtool.kv.wire import Identity
from kvtool.models.resolve import fingerprint
from kvtool.ranks.leader import RunnerRanks
from kvtool.request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Handoff,
    Request,
    SamplingParams,
    ScheduledBatch,
    Tokens,
)
from kvtool.runner import Handle, Runner
from kvtool.scheduler import Scheduler
from kvtool.speculation import DraftCache
from kvtool.tokenizer import Detokenizer, Tokenizer

LEAST_HANDOFF_BYTES = 1 << 28  # of sequences between two engines


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt: text to a text, ids to ids.

    `token_ids` holds the end-of-text token, if there was one; `text` does not, and is None if the prompt was ids.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason


class Launched(NamedTuple):
    """A step under way: what came of its launch, and requests whose grammar has failed."""

    outcome: Handle | UnsupportedError | CapacityError
    faults: dict[str, str]


class Engine:
    """A model, its KV cache and a scheduler, in this process.

    Example:
        >>> engine = Engine(EngineConfig(model="tiny", kv=KVOptions(nbits="4")))
        >>> engine.generate(["It was a dark night"], SamplingParams(max_tokens=32))[0].text
        >>> for text in engine.stream("It was a dark night"):
        ...     print(text, end="", flush=True)

    Raises:
        KVToolError: the model cannot be loaded, or the options do not fit it.
    """

    def __init__(self, config: EngineConfig) -> None:
        start = time.perf_counter()
        check_speculation(config)
        if config.handoff and config.pp > 1:
            raise ConfigError(f"--role {config.handoff.role}: KV of several stages does not travel; leave out --pp")
        self._pusher: Pusher | None = None
        self._inlet: Inlet | None = None
        has_ranks = config.num_ranks * config.ep * config.nnodes > 1  # or they would have, and are told what is missing
        self.ranks = RunnerRanks(config) if has_ranks else None
        self.runner = self.ranks.runner if self.ranks else Runner(config)
        store = self.runner.store
        self.scheduler = Scheduler(
            store.format,
            num_blocks=store.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            eos_token_ids=self.runner.model_config.eos_token_ids,
            num_swap_units=len(self.runner.swap_space.units),
            tail_units=store.layout.tail_units,
            cache_identity=_cache_identity(self.runner) if config.prefix_caching else None,
            num_micro_batches=config.pp,
            speculation=config.speculation,
            draft_cache=self._draft_cache(),
        )
        self._num_micro_batches = config.pp
        if config.handoff:
            self._hand_off(config, config.handoff)
        self._runs_ahead = self.runner.device.type == "cuda" if config.run_ahead is None else config.run_ahead
        self._under_way: deque[Launched] = deque()
        self._collected: float | None = None  # when the last step was; None where there was nothing to do since
        self._seeds = random.Random(config.seed)
        self._grammars: GrammarCompiler | None = None
        self._preparing = Lock()
        self._submitted: dict[str, float] = {}  # when, of requests that no step has computed anything of
        self._queued: dict[str, float] = {}  # for how long, of those that have no token yet
        self._matchers: dict[str, Matcher] = {}  # of requests with a grammar
        self._ids = count()
        self.arrivals = self.losses = 0  # of requests that other engines have begun, or should have
        self._imported: dict[str, Arrival] = {}  # of requests that have no token of ours yet
        self._arrivals: dict[str, deque[Tokens]] = {}  # of `generate` and `stream`, by request
        self.info = self._describe(config, time.perf_counter() - start)

    def _describe(self, config: EngineConfig, start_seconds: float) -> EngineInfo:
        """What others are told of this engine."""
        store, model = self.runner.store, self.runner.model_config
        totals = self.runner.totals
        return EngineInfo(
            model=config.model,
            path=str(self.runner.path),
            max_model_len=self.runner.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=list(model.eos_token_ids),
            dtype=str(self.runner.dtype).removeprefix("torch."),
            device=str(self.runner.device),
            num_ranks=config.num_ranks,
            quantization=self.runner.quantization,
            weight_bytes=totals.weight_bytes,
            step_bytes=totals.step_bytes,
            num_experts=max((experts.routing.num_experts for experts in model.experts if experts), default=0),
            ep=config.ep,
            kv_format=self.runner.format.describe(),
            bits_per_element=8 * totals.block_bytes / (store.format.block_size * totals.elements),
            block_size=store.format.block_size,
            num_blocks=store.num_blocks,
            block_bytes=totals.block_bytes,
            max_num_seqs=config.max_num_seqs,
            tail_bytes=totals.tail_bytes,
            num_swap_units=len(self.runner.swap_space.units),
            prefix_caching=self.scheduler.prefixes.identity is not None,
            kv_bytes=totals.kv_bytes,
            kv_tokens=store.num_blocks * store.format.block_size + config.max_num_seqs * store.format.tail_tokens,
            kv_tokens_16bit=totals.kv_bytes // (2 * totals.elements),
            start_seconds=start_seconds,
            compile_seconds=self.runner.compile_seconds,
            draft_kv_bytes=self.runner.draft.store.nbytes if self.runner.draft else 0,
            kv_address=self._inlet.address if self._inlet else "",
        )

    def _draft_cache(self) -> DraftCache | None:
        """Room for what a draft model reads."""
        if (draft := self.runner.draft) is None:
            return None
        return DraftCache(draft.store.format, BlockPool(draft.store.num_blocks), draft.max_model_len)

    def _hand_off(self, config: EngineConfig, handoff: HandoffConfig) -> None:
        """Find the engines to share requests with, or let them come."""
        weights = f"{self.runner.quantization} {config.quantize_head} {config.keep_layers} {config.calibration}"
        weights += f" seed {config.seed}" if config.load_format == "dummy" else ""
        store = WholeStore(self.runner.store, self.runner.whole_layout, self.runner.parallel.tp)
        identity = Identity.of(f"{fingerprint(self.runner.path)} {weights}", store.layout, self.runner.dtype)
        most_bytes = max(config.swap_space, LEAST_HANDOFF_BYTES)
        if handoff.role == "prefill":
            self._pusher = Pusher(handoff, store, identity, most_bytes)
        else:
            self._inlet = Inlet(handoff, store, identity, most_bytes)

    @property
    def bell(self) -> socket.socket | None:
        """Readable when `take_arrivals` has something to take; None where nothing can arrive."""
        return self._inlet.bell if self._inlet else None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queue a request; `step` brings its tokens.

        Raises:
            RequestError: it could never run.
        """
        params, last = request.params, self.info.vocab_size - 1
        for name, ids in (
            ("prompt", request.prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            if ids and (min(ids) < 0 or max(ids) > last):
                raise RequestError(f"{name}: token ids must be from 0 to {last}", name)
        if request.push_to is not None or request.is_pushed:
            self._submit_shared(request)
            return
        matcher = self.prepare_grammars().start(params.grammar) if params.grammar else None
        self.scheduler.add(request, self._seed(params))
        self._submitted[request.id] = time.perf_counter()
        if matcher:
            self._matchers[request.id] = matcher

    def _submit_shared(self, request: Request) -> None:
        """Queue a request whose prompt is pushed from here, or wait for one that is pushed here.

        Raises:
            RequestError: it could never run, or is none that two engines can share.
        """
        asked = request.params
        if asked.grammar or asked.prompt_logprobs is not None or asked.logprobs is not None:
            raise RequestError("a grammar and log-probabilities need one engine; send the request to one", "push_to")
        if request.is_pushed:
            if self._inlet is None:
                raise RequestError("no KV can arrive here; start the engine with --role decode", "is_pushed")
            self.scheduler.check(request)
            self._inlet.expect(request)
        else:
            if self._pusher is None:
                raise RequestError("KV cannot be pushed from here; start the engine with --role prefill", "push_to")
            self._pusher.check(request)
            self.scheduler.add(request, self._seed(asked))
            self._pusher.begin(request)
        self._submitted[request.id] = time.perf_counter()

    def take_arrivals(self) -> list[Tokens]:
        """Queue the requests that other engines have done their part of, or that they will not; answers that are whole
        already."""
        news = []
        for request, event in self._inlet.take() if self._inlet else ():
            if isinstance(event, Loss):
                self.losses += 1
                self.scheduler.add(request, self._seed(request.params))
                continue
            self.arrivals += 1
            self._imported[request.id] = event
            first = event.close
            whole = self.scheduler.add_imported(
                request, self._seed(request.params), first.first_token, first.num_cached_tokens, event.origin
            )
            news += [self._follow(self._with_times(tokens), {}) for tokens in whole]
        return news

    def _seed(self, params: SamplingParams) -> int:
        return self._seeds.getrandbits(63) if params.seed is None else params.seed

    def abort(self, request_id: str) -> None:
        """Drop a request and free its memory."""
        self.scheduler.abort(request_id)
        self._imported.pop(request_id, None)
        if self._inlet:
            self._inlet.abort(request_id)
        if self._pusher:
            self._pusher.abort(request_id)
        self._matchers.pop(request_id, None)
        self._submitted.pop(request_id, None)
        self._queued.pop(request_id, None)

    def close(self) -> None:
        """End the processes of other ranks, if there are any; nothing more can be computed."""
        if self.ranks:
            self.ranks.close()

    def flush_cache(self) -> None:
        """Forget every prefix."""
        self.scheduler.flush_cache()

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        stats = self.scheduler.stats()
        if self._inlet is None:
            return stats
        awaited = self._inlet.num_awaited
        return msgspec.structs.replace(
            stats,
            waiting=stats.waiting + awaited,
            awaited=awaited,
            arrivals_total=self.arrivals,
            losses_total=self.losses,
        )

    def expert_tokens(self) -> dict[int, list[int]]:
        """Tokens that have chosen each expert so far, by layer; nothing of models without experts. Waits for the steps
        under way."""
        return (self.ranks or self.runner).expert_tokens()

    def step(self) -> list[Tokens]:
        """Take in a step of the model over what the scheduler chooses, its successor being under way; the new tokens.

        Where the cache's format cannot hold what the model makes of them, the request whose fault it is ends with that
        error; likewise one that even alone finds too little memory on the GPU. For requests of `submit`; `generate` and
        `stream` step by themselves.
        """
        assert self.has_work, "a step needs requests: submit one first"
        has_launched = len(self._under_way) < self._most_under_way() and self._launch()
        awaited = self.scheduler.awaits_tokens
        news = [] if has_launched and len(self._under_way) < self._most_under_way() else self._collect()
        if self._runs_ahead and awaited and not self._under_way:  # what awaited those tokens runs while they are told
            self._launch()
        if self.runner.profiler and not self.has_work:
            self.runner.profiler.rest(self.runner.held)
        return news

    def _most_under_way(self) -> int:
        """Steps at once. Each stage of a pipeline has one; elsewhere the next step can be launched before this one's
        tokens are known, but a grammar must see its own first, and a draft follows on them."""
        if self._num_micro_batches > 1:
            return self._num_micro_batches
        return 2 if self._runs_ahead and not self.scheduler.awaits_tokens else 1

    def _launch(self) -> bool:
        """Start a step, if the scheduler has one."""
        now = time.perf_counter()
        batch = self.scheduler.schedule()
        if not batch.spans:
            return False
        for request_id in [span.id for span in batch.spans if span.id in self._submitted]:
            self._queued[request_id] = now - self._submitted.pop(request_id)
        faults: dict[str, str] = {}
        allowed = self._allowed(batch, faults)
        outgoing = self._pusher.outgoing(batch) if self._pusher else None
        exports, on_layer = (outgoing.exports, outgoing.on_layer) if outgoing else ((), None)
        land = self._inlet.land if self._inlet else None
        outcome: Handle | UnsupportedError | CapacityError
        try:
            if self.ranks:
                outcome = self.ranks.launch(batch, allowed, exports, land, on_layer)
            else:
                outcome = self.runner.launch(batch, allowed, land, on_layer)
        except (UnsupportedError, CapacityError) as error:
            outcome = error
        if outgoing:
            outgoing.finish()
        if self._inlet:
            for imported in batch.imports:
                self._inlet.release(imported.id)
        self._under_way.append(Launched(outcome, faults))
        self._collected = now if self._collected is None else self._collected
        return True

    def _collect(self) -> list[Tokens]:
        """Wait for the oldest step under way and take in what it yielded."""
        outcome, faults = self._under_way.popleft()
        try:
            if not isinstance(outcome, Handle):
                raise outcome
            result, now = (self.ranks or self.runner).collect(outcome), time.perf_counter()
            news = self.scheduler.update(result, seconds=now - (self._collected or now))
            self._collected = now if self.has_work else None
        except (UnsupportedError, CapacityError) as error:
            self._under_way.clear()
            news = self.scheduler.fail(str(error))
        if self._pusher:
            for tokens in news:
                self._pusher.follow(tokens)
        return [self._follow(self._with_times(tokens), faults) for tokens in news]

    def _with_times(self, tokens: Tokens) -> Tokens:
        """`tokens`, if they are a request's first, with how long it had waited, and how it came from another engine; a
        fork has waited for the prompt."""
        self._submitted.pop(tokens.id, None)
        queued, arrival = self._queued.pop(tokens.id, None), self._imported.pop(tokens.id, None)
        if queued is None and arrival is None:
            return tokens
        handoff = None
        if arrival:
            first, now = arrival.close, time.perf_counter()
            handoff = Handoff(first.scheduled, first.prefilled, arrival.received, now, arrival.nbytes)
        return msgspec.structs.replace(tokens, queue_seconds=queued or 0.0, handoff=handoff)

    def _allowed(self, batch: ScheduledBatch, faults: dict[str, str]) -> NDArray[np.int32] | None:
        """Bitmask of the ids that each sample may take; None where no grammar has a say."""
        rows = [(row, s.id) for row, s in enumerate(batch.samples) if s.id in self._matchers]
        if not rows:
            return None
        allowed = np.full((len(batch.samples), -(-self.info.vocab_size // 32)), -1, np.int32)

        def fill(row: int, request_id: str) -> None:
            try:
                self._matchers[request_id].fill(allowed[row])
            except KVToolError as error:
                allowed[row], faults[request_id] = -1, str(error)

        for row, request_id in rows:
            fill(row, request_id)
        return allowed

    def _follow(self, tokens: Tokens, faults: dict[str, str]) -> Tokens:
        """Let a request's grammar take in its new tokens; one that cannot go on ends the request."""
        matcher = self._matchers.get(tokens.id)
        if matcher is None:
            return tokens
        try:
            for token in tokens.token_ids if tokens.finish_reason is None else ():
                matcher.accept(token)
        except KVToolError as error:
            faults.setdefault(tokens.id, str(error))
        if tokens.id in faults:
            self.abort(tokens.id)
            return Tokens(tokens.id, [], error=faults[tokens.id], param="grammar")
        if tokens.finish_reason or tokens.error:
            del self._matchers[tokens.id]
        return tokens

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answer all `prompts`, texts or token ids, together; in their order.

        Raises:
            RequestError: one of them could never run; nothing has been computed then.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one text; give a list of prompts", "prompts")
        requests = [self._request(prompt, params) for prompt in prompts]
        generated: dict[str, list[int]] = {request.id: [] for request in requests}
        reasons: dict[str, FinishReason] = {}
        for tokens in self._run(requests):
            generated[tokens.id].extend(tokens.token_ids)
            if tokens.finish_reason:
                reasons[tokens.id] = tokens.finish_reason
        return [
            Completion(
                prompt_token_ids=request.prompt,
                token_ids=generated[request.id],
                text=self._tokenizer.decode(generated[request.id]) if isinstance(prompt, str) else None,
                finish_reason=reasons[request.id],
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to `prompt` piece by piece, each piece whole characters.

        Raises:
            RequestError: the prompt could never run.
        """
        detokenizer = Detokenizer(self._tokenizer)
        for tokens in self._run([self._request(prompt, params)]):
            if text := detokenizer.push(tokens.token_ids):
                yield text
        if rest := detokenizer.finish():
            yield rest

    def prepare_grammars(self) -> GrammarCompiler:
        """Read the vocabulary, once. With 150,000 tokens that takes seconds: better before the first grammar comes.

        Raises:
            RequestError: the model's tokenizer takes no grammars.
        """
        with self._preparing:
            if self._grammars is None:
                self._grammars = GrammarCompiler(self._tokenizer, self.info.vocab_size, self.info.eos_token_ids)
            return self._grammars

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.runner.path, self.info.vocab_size)

    def _request(self, prompt: str | Sequence[int], params: SamplingParams | None) -> Request:
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Request(f"local-{next(self._ids)}", token_ids, params or SamplingParams())

    def _run(self, requests: Sequence[Request]) -> Iterator[Tokens]:
        """Tokens of `requests` as they come; what is unfinished when the caller leaves is aborted.

        Several of these may be under way: whoever steps hands the others their tokens.
        """
        arrived: deque[Tokens] = deque()
        unfinished: set[str] = set()
        try:
            for request in requests:
                self.submit(request)
                unfinished.add(request.id)
                self._arrivals[request.id] = arrived
            while unfinished:
                while not arrived:
                    for tokens in self.step():
                        self._arrivals[tokens.id].append(tokens)
                tokens = arrived.popleft()
                if tokens.error or tokens.finish_reason:
                    unfinished.discard(tokens.id)
                if tokens.error:
                    raise KVToolError(tokens.error)
                yield tokens
        finally:
            for request_id in unfinished:
                self.abort(request_id)
            for request in requests:
                self._arrivals.pop(request.id, None)


def check_speculation(config: EngineConfig) -> None:
    """Raises ConfigError for options that contradict each other, or are outside their ranges."""
    if (asked := config.speculation) is None:
        return
    if not 1 <= asked.num_tokens <= MOST_DRAFTED:
        raise ConfigError(f"--num-speculative-tokens {asked.num_tokens}: must be from 1 to {MOST_DRAFTED}")
    if config.pp > 1:
        raise ConfigError("--speculate and --pp do not go together: stages would wait for each other; leave one out")


def _cache_identity(runner: Runner) -> bytes:
    """Names all that the bytes of a block depend on, beside its tokens."""
    store, model = runner.store, runner.model_config
    return repr((str(runner.path), runner.quantization, model, store.format, store.dtype, runner.device.type)).encode()
