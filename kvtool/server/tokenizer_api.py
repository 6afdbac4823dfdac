"""Text to tokens and back, as vLLM and SGLang spell it."""

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from kvtool.errors import RequestError
from kvtool.server.openai_api import chat_prompt
from kvtool.server.protocol import MAX_MESSAGES, Body, ChatBody, Message, Text, is_ids
from kvtool.server.responses import EngineArg

router = APIRouter()

MAX_CHARACTERS = 2**20  # far beyond most contexts, and a second's work


def as_ids(value: object) -> list[int]:
    if is_ids(value):
        return value
    raise PydanticCustomError("tokens", "should be a list of token ids (0 or more)")


class TokenizeBody(ChatBody):
    """A text, which vLLM calls `prompt`, or all that a chat's prompt is made of."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: neutral for name, neutral in ChatBody.unsupported.items() if name != "add_special_tokens"
    }

    messages: Annotated[list[Message], Field(default_factory=list, max_length=MAX_MESSAGES)]
    prompt: Text | None = None
    text: Text | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: Annotated[list[int], PlainValidator(as_ids)]
    skip_special_tokens: bool = False


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, engine: EngineArg) -> dict[str, Any]:
    """Ids of a text, or of a conversation as the chat template writes it."""
    given = [name for name in ("prompt", "text", "messages") if getattr(body, name) not in (None, [])]
    if len(given) != 1:
        raise RequestError("prompt: send one of prompt, text and messages", "prompt")
    if body.messages:
        tokens = await chat_prompt(body, engine)
    else:
        text = body.prompt or body.text or ""
        if len(text) > MAX_CHARACTERS:
            message = f"{given[0]}: it has {len(text):,} characters; send at most {MAX_CHARACTERS:,}"
            raise RequestError(message, given[0])
        tokens = await asyncio.to_thread(engine.tokenizer.encode, text, body.add_special_tokens)
    strings = {"token_strs": engine.tokenizer.tokens(tokens)} if body.return_token_strs else {}
    return {"count": len(tokens), "max_model_len": engine.info.max_model_len, "tokens": tokens, **strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, engine: EngineArg) -> dict[str, str]:
    """Text of ids; vLLM's clients look for `prompt`, SGLang's for `text`."""
    last = engine.info.vocab_size - 1
    if max(body.tokens, default=0) > last:
        raise RequestError(f"tokens: they hold id {max(body.tokens)}; this model's end at {last}", "tokens")
    text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, body.skip_special_tokens)
    return {"prompt": text, "text": text}


@router.get("/tokenizer_info")
async def tokenizer_info(engine: EngineArg) -> dict[str, Any]:
    """What a client needs to do the tokenizer's work itself."""
    return engine.tokenizer.info | {"max_model_len": engine.info.max_model_len}
