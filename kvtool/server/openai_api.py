"""OpenAI's routes: models, completions and chat completions."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvtool.request import Request as EngineRequest
from kvtool.server.generation import Answer, Piece, TextEngine, collect
from kvtool.server.protocol import ChatBody, CompletionBody, OpenAIBody
from kvtool.server.responses import EngineArg, UnknownModelError
from kvtool.server.streaming import stream, while_connected

router = APIRouter(prefix="/v1")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may fill the context


@dataclass(frozen=True)
class Shape:
    """What tells a chat completion from a plain one.

    Attributes:
        prefix: of ids.
        whole, chunk: `object` of a response and of a streamed part of one.
        of_answer, of_piece: what a choice holds of either.
    """

    prefix: str
    whole: str
    chunk: str
    of_answer: Callable[[Answer], dict[str, Any]]
    of_piece: Callable[[Piece], dict[str, Any]]


COMPLETION = Shape(
    prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    of_answer=lambda answer: {"text": answer.text},
    of_piece=lambda piece: {"text": piece.text},
)
CHAT = Shape(
    prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    of_answer=lambda answer: {"message": {"role": "assistant", "content": answer.text}},
    of_piece=lambda piece: {"delta": ({"role": "assistant"} if piece.first else {}) | {"content": piece.text}},
)


@router.post("/completions")
async def completions(body: CompletionBody, engine: EngineArg, http: Request) -> Response:
    check_model(body.model, engine)
    requests = await engine.requests("prompt", body.prompt.items, body, engine.model_defaults, COMPLETION_MAX_TOKENS)
    return await respond(COMPLETION, body, requests, engine, http)


@router.post("/chat/completions")
async def chat_completions(body: ChatBody, engine: EngineArg, http: Request) -> Response:
    check_model(body.model, engine)
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    engine.check_length("messages", sum(len(message.content) for message in body.messages))
    prompt = await asyncio.to_thread(engine.tokenizer.chat, messages)
    requests = await engine.requests("messages", [prompt], body, engine.model_defaults, None)
    return await respond(CHAT, body, requests, engine, http)


async def respond(
    shape: Shape, body: OpenAIBody, requests: Sequence[EngineRequest], engine: TextEngine, http: Request
) -> Response:
    """The answers to `requests`, whole or streamed."""
    head = {"id": f"{shape.prefix}-{uuid4().hex}", "created": int(time.time()), "model": engine.name}
    pieces = engine.generate(requests, body.stop)
    prompt_tokens, completion_tokens = sum(len(request.prompt) for request in requests), 0

    def chunk(piece: Piece) -> dict[str, Any]:
        nonlocal completion_tokens
        completion_tokens += len(piece.token_ids)
        return head | {"object": shape.chunk, "choices": [choice(piece.index, piece, shape.of_piece(piece))]}

    def closing() -> Iterator[dict[str, Any]]:
        if body.wants_usage:
            yield head | {"object": shape.chunk, "choices": [], "usage": usage(prompt_tokens, completion_tokens)}

    if body.stream:
        return await stream(http, pieces, chunk, closing)
    answers = await while_connected(http, collect(pieces, len(requests)))
    completion_tokens = sum(len(answer.token_ids) for answer in answers)
    choices = [choice(index, answer, shape.of_answer(answer)) for index, answer in enumerate(answers)]
    counts = usage(prompt_tokens, completion_tokens)
    return JSONResponse(head | {"object": shape.whole, "choices": choices, "usage": counts})


def choice(index: int, part: Answer | Piece, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": part.finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


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
