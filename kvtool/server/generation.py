"""Text in, text out: between the bodies that clients send and the ids that the engine knows."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import uuid4

from pydantic import ValidationError

from kvtool.client import EngineClient
from kvtool.errors import ModelError, RequestError
from kvtool.request import FinishReason, Request, SamplingParams
from kvtool.server.protocol import Prompt, Sampling
from kvtool.tokenizer import Detokenizer, StopChecker, Tokenizer

Ending = FinishReason | Literal["error"]


@dataclass(frozen=True)
class Defaults:
    """Sampling where a body says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Piece:
    """What has newly come of one prompt's answer.

    Attributes:
        index: of the prompt in its body.
        first: nothing came of this answer before.
        token_ids: with the end-of-text token, if there was one; `text` is without.
        finish_reason: None until the last piece.
        matched: the stop string or the end-of-text id that ended the answer.
    """

    index: int
    first: bool
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    matched: str | int | None = None


@dataclass
class Answer:
    """One prompt's answer, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason, self.matched = piece.finish_reason, piece.matched


class Observer:
    """Told how each request fares, one call at a time; this one does nothing with it. Times are in seconds."""

    def first_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens came, so long after the request was ready for the engine; none came before."""

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` more came together, so long after those before."""

    def finished(self, seconds: float, prompt_tokens: int, generation_tokens: int, reason: Ending) -> None:
        """The answer ended, so long after the request was ready; nothing more is said of it."""


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
        max_queue: int = 1024,
        trust_request_chat_template: bool = False,
    ) -> None:
        self.client, self.tokenizer, self.name = client, tokenizer, name
        self.observer = observer or Observer()
        self.max_queue, self.trust_request_chat_template = max_queue, trust_request_chat_template
        self.info = client.info
        self.created = int(time.time())
        self.model_defaults = read_model_defaults(Path(client.info.path))

    async def requests(
        self, field: str, prompts: Sequence[Prompt], sampling: Sampling, defaults: Defaults, max_tokens: int | None
    ) -> list[Request]:
        """A request for each prompt, once all of them are known to fit the model.

        Args:
            field: that holds the prompts in the body.
            prompts: texts or ids.
            sampling: as the body has it.
            defaults: for what the body leaves open.
            max_tokens: where the body leaves that open; cut to what the context has room for. None: all of that.

        Raises:
            RequestError: one of the prompts is empty, foreign to the model, or too long for its context.
        """
        requests = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self.check_length(field, len(prompt))
            # A long text takes a while, and other requests' tokens must not wait for it.
            ids = await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            room = self._room(field, ids, sampling)
            params = SamplingParams(
                temperature=defaults.temperature if sampling.temperature is None else sampling.temperature,
                top_p=defaults.top_p if sampling.top_p is None else sampling.top_p,
                top_k=max(0, defaults.top_k if sampling.top_k is None else sampling.top_k),  # -1 keeps all, too
                seed=sampling.seed,
                max_tokens=sampling.limit[1] or min(max_tokens or room, room),
                ignore_eos=sampling.ignore_eos,
            )
            requests.append(Request(id=uuid4().hex, prompt=ids, params=params))
        return requests

    def check_length(self, field: str, length: int) -> None:
        """Refuse a text that can never fit, before time is spent on its tokens.

        Raises:
            RequestError: it has more characters than the context has room for.
        """
        most = self.info.max_model_len * self.tokenizer.longest
        if length > most:
            raise RequestError(f"{field}: the prompt has {length} characters; send at most {most}", field)

    def _room(self, field: str, prompt: list[int], sampling: Sampling) -> int:
        """Tokens that the context leaves for the answer to `prompt`, at least those that are asked for.

        The engine would refuse too, but by then the answers to other prompts of the body may be on their way.
        """
        context, vocab_size = self.info.max_model_len, self.info.vocab_size
        room = context - len(prompt)
        limit_name, limit = sampling.limit
        if not prompt:
            raise RequestError(f"{field}: the prompt is empty; send at least one token", field)
        if max(prompt) >= vocab_size:
            raise RequestError(
                f"{field}: the prompt holds id {max(prompt)}; this model's end at {vocab_size - 1}", field
            )
        if room < 1:
            raise RequestError(f"{field}: the prompt has {len(prompt)} tokens; send at most {context - 1}", field)
        if limit is not None and limit > room:
            raise RequestError(
                f"{limit_name} is {limit}, but {len(prompt)} tokens of prompt leave room for "
                f"{room} in the context of {context}; ask for no more",
                limit_name,
            )
        return room

    async def generate(self, requests: Sequence[Request], stop: Sequence[str]) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers as they come; leaving early, or being cancelled, aborts what still runs.

        Raises:
            RequestError: a request can never run.
            EngineDeadError: the engine ended meanwhile.
        """
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def drain(index: int, request: Request) -> None:
            try:
                async for piece in self._answer(index, request, stop):
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

    async def _answer(self, index: int, request: Request, stop: Sequence[str]) -> AsyncGenerator[Piece, None]:
        """Pieces of one answer; tokens whose text must wait for later ones come with those."""
        detokenizer, checker = Detokenizer(self.tokenizer), StopChecker(stop)
        first, waiting = True, list[int]()
        stream = self.client.submit(request)
        async with aclosing(stream):
            async for tokens in stream:
                waiting += tokens.token_ids
                visible, reason = tokens.token_ids, tokens.finish_reason
                matched: str | int | None = None
                if reason == "stop":  # the engine's only reason for it is an end-of-text token
                    *visible, matched = visible
                text = checker.push(detokenizer.push(visible))
                if reason and not checker.stopped:
                    text += checker.push(detokenizer.finish())
                if checker.stopped:
                    reason, matched = "stop", checker.stopped
                elif reason:
                    text += checker.finish()
                if text or reason:
                    yield Piece(index, first, text, waiting, reason, matched)
                    first, waiting = False, []
                if reason:
                    return


async def collect(pieces: AsyncIterator[Piece], count: int) -> list[Answer]:
    """All `count` answers, whole."""
    answers = [Answer() for _ in range(count)]
    async for piece in pieces:
        answers[piece.index].add(piece)
    return answers


def read_model_defaults(path: Path) -> Defaults:
    """How the model's makers want it sampled: temperature, top_p and top_k of generation_config.json, as in vLLM.

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
