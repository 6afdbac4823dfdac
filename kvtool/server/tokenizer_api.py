"""Text to tokens and back, as vLLM and SGLang spell it."""

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from kvtool.errors import RequestError
from kvtool.server.generation import TextEngine
from kvtool.server.protocol import MAX_MESSAGES, Body, Message, Text, is_ids
from kvtool.server.responses import EngineArg

router = APIRouter()

MAX_CHARACTERS = 2**20  # far beyond most contexts, and a second's work


def as_ids(value: object) -> list[int]:
    if is_ids(value):
        return value
    raise PydanticCustomError("tokens", "should be a list of token ids (0 or more)")


class TokenizeBody(Body):
    """vLLM says `prompt` where others say `text`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (None, True),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "continue_final_message": (None, False),
        "tools": (None, []),
    }

    prompt: Text | None = None
    text: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: Annotated[list[int], PlainValidator(as_ids)]
    skip_special_tokens: bool = False


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, engine: EngineArg) -> dict[str, Any]:
    """Ids of a text, or of a conversation as the chat template writes it."""
    tokens = await asyncio.to_thread(encode, body, engine)
    names = {"token_strs": engine.tokenizer.tokens(tokens)} if body.return_token_strs else {}
    return {"count": len(tokens), "max_model_len": engine.info.max_model_len, "tokens": tokens, **names}


def encode(body: TokenizeBody, engine: TextEngine) -> list[int]:
    given = [name for name in ("prompt", "text", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError("prompt: send one of prompt, text and messages", "prompt")
    (field,) = given
    contents = [message.content for message in body.messages or ()] or [body.prompt or body.text or ""]
    length = sum(map(len, contents))
    if length > MAX_CHARACTERS:
        raise RequestError(f"{field}: it has {length:,} characters; send at most {MAX_CHARACTERS:,}", field)
    if body.messages:
        return engine.tokenizer.chat([{"role": m.role, "content": m.content} for m in body.messages])
    return engine.tokenizer.encode(contents[0], body.add_special_tokens)


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
    return engine.tokenizer.info | {"max_model_len": engine.info.max_model_len}
