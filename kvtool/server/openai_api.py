"""OpenAI's routes: models, completions and chat completions."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvtool.errors import RequestError
from kvtool.request import Request as EngineRequest
from kvtool.request import TokenLogprobs
from kvtool.server.generation import Answer, Piece, TextEngine, TextRequest, collect
from kvtool.server.logprobs import CompletionLogprobs, chat_logprobs, of_each, prompt_logprobs
from kvtool.server.protocol import ChatBody, CompletionBody, OpenAIBody, Prompt
from kvtool.server.responses import EngineArg, UnknownModelError, cache_salt, shared_with
from kvtool.server.streaming import stream, while_connected
from kvtool.tokenizer import Tokenizer

router = APIRouter(prefix="/v1")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may fill the context


@router.post("/completions")
async def completions(body: CompletionBody, engine: EngineArg, http: Request) -> Response:
    check_model(body.model, engine)
    asked = text_request("prompt", body.prompt.items, COMPLETION_MAX_TOKENS, body, engine, http)
    requests = await while_connected(http, engine.prepare(asked))
    prompts = [prompt for prompt in asked.prompts for _ in range(body.num_choices)]
    writers = [CompletionWriter(body, *of, engine.tokenizer) for of in zip(prompts, requests, strict=True)]
    return await respond(body, asked, requests, writers, engine, http)


@router.post("/chat/completions")
async def chat_completions(body: ChatBody, engine: EngineArg, http: Request) -> Response:
    check_model(body.model, engine)
    prompt = await while_connected(http, chat_prompt(body, engine))
    asked = text_request("messages", [prompt], None, body, engine, http, tools=bool(body.offered_tools))
    requests = await while_connected(http, engine.prepare(asked))
    writers = [ChatWriter(body, request, engine.tokenizer) for request in requests]
    return await respond(body, asked, requests, writers, engine, http)


async def chat_prompt(body: ChatBody, engine: TextEngine) -> list[int]:
    """Ids of the conversation.

    Raises:
        RequestError: it is too long, or no template can write it.
    """
    engine.check_length("messages", sum(len(message.content) for message in body.messages))
    if body.chat_template is not None and not engine.trust_request_chat_template:
        raise RequestError(
            "chat_template: this server takes none from clients; leave it out, or start the server with "
            "--trust-request-chat-template",
            "chat_template",
        )
    if body.offered_tools and body.chat_template is None and not engine.tokenizer.template_takes_tools:
        raise RequestError("tools: the model's chat template has no tools; leave them out", "tools")
    return await asyncio.to_thread(
        engine.tokenizer.chat,
        [message.model_dump(exclude_none=True) for message in body.messages],
        tools=body.offered_tools,
        template=body.chat_template,
        kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message is True,
    )


def text_request(
    field: str,
    prompts: Sequence[Prompt],
    max_tokens: int | None,
    body: OpenAIBody,
    engine: TextEngine,
    http: Request,
    tools: bool = False,
) -> TextRequest:
    return TextRequest(
        field=field,
        prompts=prompts,
        sampling=body,
        defaults=engine.model_defaults,
        max_tokens=max_tokens,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        cache_salt=cache_salt(body.cache_salt, http),
        tools=tools,
        shared=shared_with(http),
    )


class Writer(Protocol):
    """Writes one choice of a response, whole or piece by piece.

    Attributes:
        prefix: of the response's id.
        whole_object, chunk_object: `object` of a response and of a streamed part of one.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def beside(self, first: Answer) -> dict[str, Any]:
        """What a response holds of the prompt beside its choices; `first` is the answer or the first piece of it."""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The choice."""

    def piece(self, piece: Answer) -> dict[str, Any]:
        """What is new of it."""


class CompletionWriter:
    prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, body: CompletionBody, prompt: Prompt, request: EngineRequest, tokenizer: Tokenizer) -> None:
        self._body, self._prompt, self._request, self._tokenizer = body, prompt, request, tokenizer
        self._logprobs = CompletionLogprobs(tokenizer)
        self._begun = False

    def beside(self, first: Answer) -> dict[str, Any]:
        return {}

    def whole(self, answer: Answer) -> dict[str, Any]:
        return self.piece(answer)

    def piece(self, piece: Answer) -> dict[str, Any]:
        first, self._begun = not self._begun, True
        text, token_ids = piece.text, piece.token_ids
        logprobs: list[TokenLogprobs | None] = [*piece.logprobs]
        if first and self._body.echo:
            prompt = self._request.prompt
            text, token_ids = self._prompt_text() + text, prompt + token_ids
            logprobs = of_each(prompt, piece.prompt_logprobs) + logprobs
        return {
            "text": text,
            "logprobs": None if self._body.logprobs is None else self._logprobs.write(token_ids, logprobs),
            "finish_reason": piece.finish_reason,
            **ids_of_answer(self._body, piece),
            **(about_prompt(self._body, self._request, piece, self._tokenizer) if first else {}),
        }

    def _prompt_text(self) -> str:
        return self._prompt if isinstance(self._prompt, str) else self._tokenizer.decode(self._prompt)


class ChatWriter:
    prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, body: ChatBody, request: EngineRequest, tokenizer: Tokenizer) -> None:
        self._body, self._request, self._tokenizer = body, request, tokenizer
        self._begun, self._num_calls = False, 0

    def beside(self, first: Answer) -> dict[str, Any]:
        return about_prompt(self._body, self._request, first, self._tokenizer)

    def whole(self, answer: Answer) -> dict[str, Any]:
        return {"message": {"role": "assistant", **self._said(answer, streamed=False)}, **self._around(answer)}

    def piece(self, piece: Answer) -> dict[str, Any]:
        role = {} if self._begun else {"role": "assistant"}
        self._begun = True
        return {"delta": role | self._said(piece, streamed=True), **self._around(piece)}

    def _said(self, part: Answer, streamed: bool) -> dict[str, Any]:
        """Text and calls; a streamed call tells its place among all of them."""
        if not part.tool_calls:
            return {"content": part.text}
        calls = []
        for call in part.tool_calls:
            place = {"index": self._num_calls} if streamed else {}
            function = {"name": call.name, "arguments": call.arguments}
            calls.append(place | {"id": f"call_{uuid4().hex}", "type": "function", "function": function})
            self._num_calls += 1
        return {"content": part.text or None, "tool_calls": calls}

    def _around(self, part: Answer) -> dict[str, Any]:
        """What a choice holds beside its message."""
        called = self._num_calls > 0 and part.finish_reason == "stop"
        written = chat_logprobs(self._tokenizer, part.token_ids, part.logprobs) if self._body.logprobs else None
        return {
            "logprobs": written,
            "finish_reason": "tool_calls" if called else part.finish_reason,
            **ids_of_answer(self._body, part),
        }


def ids_of_answer(body: OpenAIBody, part: Answer) -> dict[str, Any]:
    return {"token_ids": part.token_ids} if body.return_token_ids else {}


def about_prompt(body: OpenAIBody, request: EngineRequest, first: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """What vLLM's clients can ask about a prompt."""
    about: dict[str, Any] = {}
    if body.return_token_ids:
        about["prompt_token_ids"] = request.prompt
    if body.prompt_logprobs is not None:
        about["prompt_logprobs"] = prompt_logprobs(tokenizer, request.prompt, first.prompt_logprobs)
    return about


@dataclass
class Usage:
    """Tokens of a response: those of each prompt once, however many answers it has."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, part: Answer, choice: int) -> None:
        self.completion_tokens += len(part.token_ids)
        self.cached_tokens += part.num_cached_tokens if choice == 0 else 0

    def write(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def respond(
    body: OpenAIBody,
    asked: TextRequest,
    requests: Sequence[EngineRequest],
    writers: Sequence[Writer],
    engine: TextEngine,
    http: Request,
) -> Response:
    """The answers to `requests`, whole or streamed."""
    engine.warn_of_unknown(body.unknown)
    form, n = writers[0], body.num_choices
    head = {"id": f"{form.prefix}-{uuid4().hex}", "created": int(time.time()), "model": engine.name}
    usage = Usage(sum(len(request.prompt) for request in requests[::n]))
    pieces = engine.generate(asked, requests)
    begun = False

    def chunk(piece: Piece) -> dict[str, Any]:
        nonlocal begun
        usage.add(piece, piece.index % n)
        choice = {"index": piece.index, **writers[piece.index].piece(piece)}
        data = head | {"object": form.chunk_object, "choices": [choice]} | ({} if begun else form.beside(piece))
        begun = True
        if body.wants_usage or body.wants_usage_so_far:
            data["usage"] = usage.write() if body.wants_usage_so_far else None
        return data

    def closing() -> Iterator[dict[str, Any]]:
        if body.wants_usage:
            yield head | {"object": form.chunk_object, "choices": [], "usage": usage.write()}

    if body.stream:
        return await stream(http, pieces, chunk, closing)
    answers = await while_connected(http, collect(pieces, len(requests)))
    for index, answer in enumerate(answers):
        usage.add(answer, index % n)
    choices = [{"index": index, **writers[index].whole(answer)} for index, answer in enumerate(answers)]
    whole = head | {"object": form.whole_object, "choices": choices, "usage": usage.write()}
    return JSONResponse(whole | form.beside(answers[0]))


@router.get("/models")
async def models(engine: EngineArg) -> dict[str, Any]:
    return {"object": "list", "data": [card(engine)]}


@router.get("/models/{name:path}")
async def model(name: str, engine: EngineArg) -> dict[str, Any]:
    check_model(name, engine)
    return card(engine)


def card(engine: TextEngine) -> dict[str, Any]:
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "kvtool",
        "root": engine.info.path,
        "max_model_len": engine.info.max_model_len,
    }


def check_model(name: str | None, engine: TextEngine) -> None:
    if name not in (None, engine.name):
        raise UnknownModelError(f"model: there is no {name!r} here; use {engine.name!r}", "model")
