"""Text in, text out: between the bodies that clients send and the ids that the engine knows."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar
from uuid import uuid4

import msgspec
from pydantic import ValidationError

from kvtool import grammar
from kvtool.client import EngineClient
from kvtool.errors import KVToolError, ModelError, RequestError
from kvtool.request import FinishReason, Grammar, Request, SamplingParams, TokenLogprobs, Tokens
from kvtool.server.protocol import MAX_NAME_LENGTH, Prompt, Sampling
from kvtool.server.tools import ToolCall, ToolParser
from kvtool.tokenizer import Detokenizer, StopChecker, Tokenizer

T = TypeVar("T")
Ending = FinishReason | Literal["error"]

logger = logging.getLogger(__name__)

MAX_ANSWERS = 1024  # to one body
MAX_WARNINGS = 256  # of fields that clients can invent


class ContextLengthError(RequestError):
    """More tokens than the model's context; some clients cut the conversation and try again."""


class QueueFullError(KVToolError):
    """More requests than may wait; later there will be room."""

    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class NotSharedError(KVToolError):
    """A request of which two engines cannot do a part each."""


@dataclass(frozen=True)
class Shared:
    """A request of which this engine does a part.

    Attributes:
        id: under which its KV travels.
        push_to: HOST:PORT of the engine that goes on behind the first token; None: that is this one.
    """

    id: str
    push_to: str | None


@dataclass(frozen=True)
class Defaults:
    """Sampling where a body says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a body asks for, whichever API it speaks.

    Attributes:
        field: that holds the prompts in the body.
        prompts: texts or ids.
        sampling: as the body has it, `defaults` for what it leaves open.
        max_tokens: where the body leaves that open; cut to what the context has room for. None: all of that.
        logprobs, prompt_logprobs: as in SamplingParams.
        ids: of each answer, as the client wants them called; None: as it comes.
        cache_salt: as in Request.
        tools: calls of tools are told from the answer's text.
        shared: another engine does the other part.
    """

    field: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    defaults: Defaults
    max_tokens: int | None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ids: Sequence[str] | None = None
    cache_salt: str = ""
    tools: bool = False
    shared: Shared | None = None


@dataclass(kw_only=True)
class Answer:
    """An answer, or a part of one.

    Attributes:
        token_ids: with the token that ended it, if there was one; `text` is without, unless asked for.
        logprobs: of each of these, if asked for.
        prompt_logprobs: of every prompt token but the first, if asked for; in the first part.
        num_cached_tokens: of the prompt; in the first part.
        finish_reason: None until the last part.
        matched: the stop string or the id that ended the answer.
    """

    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    matched: str | int | None = None

    def add(self, part: "Answer") -> None:
        self.text += part.text
        self.tool_calls += part.tool_calls
        self.add_tokens(part)
        self.finish_reason, self.matched = part.finish_reason, part.matched

    def add_tokens(self, tokens: "Answer | Tokens") -> None:
        """All but what is made of tokens."""
        self.token_ids += tokens.token_ids
        self.logprobs += tokens.logprobs or []
        self.prompt_logprobs += tokens.prompt_logprobs or []
        self.num_cached_tokens += tokens.num_cached_tokens


@dataclass(kw_only=True)
class Piece(Answer):
    """What has newly come of the answer of this index: to prompt index // n, its choice index % n."""

    index: int


class Observer:
    """Told how each request fares, one call at a time; this one does nothing with it. Times are in seconds."""

    def first_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens came, so long after the request was ready for the engine; none came before."""

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` more came together, so long after those before."""

    def finished(self, times: "Times", prompt_tokens: int, generation_tokens: int, reason: Ending) -> None:
        """The answer ended; nothing more is said of it."""


@dataclass
class Times:
    """Of one request: seconds in the queue, until its first token and until its last, each since it was ready."""

    queue: float = 0.0
    first: float = 0.0
    whole: float = 0.0


class TextEngine:
    """An engine that takes and gives text.

    Attributes:
        name: the model's name in requests.
        observer: is told how requests fare.
        max_queue: requests that may wait beyond those that run; more are refused.
        trust_request_chat_template: chat templates may come from clients.
        created: when serving began, in seconds of Unix time.
        model_defaults: sampling as the model's generation_config.json wants it.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        name: str,
        *,
        observer: Observer | None = None,
        max_queue: int = 8192,
        trust_request_chat_template: bool = False,
    ) -> None:
        self.client, self.tokenizer, self.name = client, tokenizer, name
        self.observer = observer or Observer()
        self.max_queue, self.trust_request_chat_template = max_queue, trust_request_chat_template
        self.info = client.info
        self.created = int(time.time())
        self._warned: set[str] = set()
        self.model_defaults = read_model_defaults(Path(client.info.path))

    def warn_of_unknown(self, fields: Iterable[str]) -> None:
        """Say once of each field, and of so many at most, that it is ignored."""
        for name in (unknown[:MAX_NAME_LENGTH] for unknown in fields):
            if name not in self._warned and len(self._warned) < MAX_WARNINGS:
                self._warned.add(name)
                logger.warning("a client sends the field %r, which is unknown and ignored", name)

    async def prepare(self, asked: TextRequest) -> list[Request]:
        """Requests for the engine, n for each prompt, once all of them are known to fit the model.

        Raises:
            RequestError: one of the prompts is empty, foreign to the model, or too long for its context; or what is
                asked of the answers is.
        """
        sampling, n = asked.sampling, asked.sampling.num_choices
        if len(asked.prompts) * n > MAX_ANSWERS:
            raise RequestError(
                f"n: {len(asked.prompts)} prompts with {n} answers each; ask for {MAX_ANSWERS} in all at most", "n"
            )
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        constraint = await self._grammar(sampling)
        requests: list[Request] = []
        for prompt in asked.prompts:
            if isinstance(prompt, str):
                self.check_length(asked.field, len(prompt))
            # A long text takes a while, and other requests' tokens must not wait for it.
            ids = await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            params = sampling_params(asked, constraint, self._max_tokens(asked, ids))
            names = asked.ids[len(requests) :] if asked.ids else [uuid4().hex for _ in range(n)]
            # What the prompt's tokens were worth is told to each of the answers, so each must read it.
            first = names[0] if params.prompt_logprobs is None else None
            requests += (
                Request(
                    id=names[choice],
                    prompt=ids,
                    params=of_choice(choice, params),
                    cache_salt=asked.cache_salt,
                    fork_of=first if choice else None,
                )
                for choice in range(n)
            )
        return [shared_part(asked.shared, requests)] if asked.shared and shareable(asked, requests) else requests

    def check_length(self, field: str, length: int) -> None:
        """Refuse a text that can never fit, before time is spent on its tokens.

        Raises:
            ContextLengthError: it has more characters than the context has room for.
        """
        most = self.info.max_model_len * self.tokenizer.longest
        if length > most:
            raise ContextLengthError(f"{field}: the prompt has {length} characters; send at most {most}", field)

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        largest, vocab_size = max(ids, default=0), self.info.vocab_size
        if largest >= vocab_size:
            raise RequestError(f"{field} holds id {largest}; this model's end at {vocab_size - 1}", field)

    async def _grammar(self, sampling: Sampling) -> Grammar | None:
        """What the answer must look like, once it is known that something can."""
        found = {name: constraint for name, constraint in sampling.grammars.items() if constraint}
        if len(found) > 1:
            first, second = list(found)[:2]
            raise RequestError(f"{second}: {first} says already what the answer must look like; send one", second)
        for name, constraint in found.items():
            try:
                await asyncio.to_thread(grammar.check, constraint)
            except RequestError as error:
                raise RequestError(f"{name}: {error}", name) from error
            return constraint
        return None

    def _max_tokens(self, asked: TextRequest, prompt: list[int]) -> int:
        """Tokens of the answer to `prompt` at most.

        The engine would refuse too, but by then the answers to other prompts of the body may be on their way.
        """
        field, context, vocab_size = asked.field, self.info.max_model_len, self.info.vocab_size
        room = context - len(prompt)
        limit_name, limit = asked.sampling.limit
        floor_name, floor = asked.sampling.floor
        if not prompt:
            raise RequestError(f"{field}: the prompt is empty; send at least one token", field)
        if max(prompt) >= vocab_size:
            raise RequestError(
                f"{field}: the prompt holds id {max(prompt)}; this model's end at {vocab_size - 1}", field
            )
        if room < 1:
            raise ContextLengthError(f"{field}: the prompt has {len(prompt)} tokens; send at most {context - 1}", field)
        if limit is not None and limit > room:
            raise ContextLengthError(
                f"{limit_name} is {limit}, but {len(prompt)} tokens of prompt leave room for "
                f"{room} in the context of {context}; ask for no more",
                limit_name,
            )
        most = limit or min(asked.max_tokens or room, room)
        if floor > most:
            raise RequestError(f"{floor_name} is {floor}, but {limit_name} is {most}; ask for no more", floor_name)
        return most

    async def generate(self, asked: TextRequest, requests: Sequence[Request]) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers as they come; leaving early, or being cancelled, aborts what still runs.

        Raises:
            QueueFullError: too many requests wait already.
            RequestError: a request can never run, there is never room for all, or one has the id of one that runs.
            EngineDeadError: the engine ended meanwhile.
        """
        most = self.info.max_num_seqs + self.max_queue
        if len(requests) > most:
            raise RequestError(
                f"n: {len(requests)} answers at once, but at most {most} requests run or wait here; ask for fewer", "n"
            )
        if self.client.num_requests + len(requests) > most:
            raise QueueFullError(f"{self.client.num_requests} of at most {most} requests run or wait; try again later")
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def drain(index: int, request: Request) -> None:
            try:
                async for piece in self._answer(index, request, asked):
                    queue.put_nowait(piece)
            except Exception as error:
                queue.put_nowait(error)

        running = len(requests)
        tasks = [asyncio.create_task(drain(index, request)) for index, request in enumerate(requests)]
        try:
            while running:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                running -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, index: int, request: Request, asked: TextRequest) -> AsyncGenerator[Piece, None]:
        """Pieces of one answer; tokens whose text must wait for later ones come with those."""
        if request.id in self.client.request_ids:
            raise RequestError(f"rid: {request.id!r} runs already; choose another", "rid")
        reader, piece = Reader(self.tokenizer, self.info.eos_token_ids, asked.sampling, asked.tools), Piece(index=index)
        started = latest = time.perf_counter()
        times, generated = Times(), 0
        reason: Ending = "abort"  # unless another is seen: who leaves early says nothing
        stream = self.client.submit(request)
        try:
            async with aclosing(stream):
                async for tokens in stream:
                    if tokens.token_ids:
                        previous, latest = latest, time.perf_counter()
                        if generated:
                            self.observer.next_tokens(latest - previous, len(tokens.token_ids))
                        else:
                            times.queue, times.first = tokens.queue_seconds, latest - started
                            self.observer.first_tokens(times.first, len(tokens.token_ids))
                        generated += len(tokens.token_ids)
                    reader.read(tokens, piece)
                    reason = piece.finish_reason or reason
                    if piece.text or piece.tool_calls or piece.finish_reason:
                        yield piece
                        piece = Piece(index=index)
                    if reader.finished:
                        return
        except KVToolError:
            reason = "error"
            raise
        finally:
            times.whole = time.perf_counter() - started
            self.observer.finished(times, len(request.prompt), generated, reason)


def shareable(asked: TextRequest, requests: Sequence[Request]) -> bool:
    """Two engines can do a part each of what is asked; one that should go on does all of it otherwise.

    Raises:
        NotSharedError: they cannot, and this engine should only begin.
    """
    assert asked.shared
    params = requests[0].params
    plain = params.grammar is None and params.logprobs is None and params.prompt_logprobs is None
    if len(requests) == 1 and plain:
        return True
    if asked.shared.push_to is not None:
        raise NotSharedError("several answers, grammars and log-probabilities are for one engine alone")
    return False


def shared_part(shared: Shared, requests: Sequence[Request]) -> Request:
    """The part of this engine in a request."""
    (whole,) = requests
    return msgspec.structs.replace(whole, id=shared.id, push_to=shared.push_to, is_pushed=shared.push_to is None)


class Reader:
    """Makes text, and calls of tools, of one answer's tokens.

    Attributes:
        finished: there will be no more.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int], sampling: Sampling, tools: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer, sampling.skip_special_tokens is not False)
        self._checker = StopChecker(sampling.stop)
        self._parser = ToolParser() if tools else None
        self._ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
        self._shows_ends = sampling.include_stop_str_in_output
        self._floor = sampling.floor[1]  # tokens still to come that no stop string may end
        self.finished = False

    def read(self, tokens: Tokens, answer: Answer) -> None:
        """Add `tokens`, and what they complete, to `answer`."""
        answer.add_tokens(tokens)
        visible, reason = tokens.token_ids, tokens.finish_reason
        matched: str | int | None = None
        if reason == "stop" and visible[-1:] and visible[-1] in self._ends:
            matched = visible[-1]
            visible = visible if self._shows_ends else visible[:-1]
        early, checked = visible[: self._floor], visible[self._floor :]
        self._floor -= len(early)
        text = self._detokenizer.push(early) + self._checker.push(self._detokenizer.push(checked))
        if reason and self._checker.stopped is None:
            text += self._checker.push(self._detokenizer.finish())
        if self._checker.stopped is not None:
            reason, matched = "stop", self._checker.stopped
            text += self._checker.stopped if self._shows_ends else ""
        elif reason:
            text += self._checker.finish()
        self.finished = reason is not None
        answer.finish_reason, answer.matched = reason, matched
        self._show(text, answer)

    def _show(self, text: str, answer: Answer) -> None:
        if self._parser is None:
            answer.text += text
            return
        parts = [self._parser.push(text), *([self._parser.finish()] if self.finished else [])]
        for shown, calls in parts:
            answer.text += shown
            answer.tool_calls += calls


def sampling_params(asked: TextRequest, grammar: Grammar | None, max_tokens: int) -> SamplingParams:
    """How the tokens of an answer are chosen; the seed is that of the prompt's first one."""
    sampling, defaults = asked.sampling, asked.defaults

    def chosen(value: T | None, default: T) -> T:
        return default if value is None else value

    return SamplingParams(
        temperature=chosen(sampling.temperature, defaults.temperature),
        top_p=chosen(sampling.top_p, defaults.top_p),
        top_k=max(0, chosen(sampling.top_k, defaults.top_k)),  # -1 keeps all, too
        min_p=chosen(sampling.min_p, defaults.min_p),
        repetition_penalty=chosen(sampling.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        logit_bias=sampling.logit_bias,
        seed=sampling.seed,
        max_tokens=max_tokens,
        min_tokens=sampling.floor[1],
        ignore_eos=sampling.ignore_eos or False,
        stop_token_ids=sampling.stop_token_ids,
        grammar=grammar,
        speculate=sampling.speculate is not False,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
    )


def of_choice(choice: int, params: SamplingParams) -> SamplingParams:
    """`params` for this one of a prompt's answers, each of which has a seed of its own."""
    if params.seed is None:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + choice) % 2**63)


async def collect(pieces: AsyncIterator[Piece], count: int) -> list[Answer]:
    """All `count` answers, whole."""
    answers = [Answer() for _ in range(count)]
    async for piece in pieces:
        answers[piece.index].add(piece)
    return answers


def read_model_defaults(path: Path) -> Defaults:
    """How the model's makers want it sampled: what generation_config.json says of Defaults' fields, as in vLLM.

    Raises:
        ModelError: a value is out of range.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return Defaults()
    try:
        values = json.loads(file.read_bytes())
        asked = Sampling.model_validate({name: values.get(name) for name in Defaults.__annotations__})
    except ValidationError as error:
        fault = error.errors()[0]
        raise ModelError(f"{file}: {fault['loc'][0]}: {fault['msg']}; correct or remove it") from error
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ModelError(f"{file}: {error}; correct or remove it") from error
    return Defaults(**asked.model_dump(include=set(Defaults.__annotations__), exclude_none=True))
