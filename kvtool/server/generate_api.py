"""SGLang's `/generate`."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvtool.errors import RequestError
from kvtool.request import Request as EngineRequest
from kvtool.server.generation import Answer, Defaults, Piece, TextEngine, TextRequest, collect
from kvtool.server.logprobs import GenerateLogprobs, of_each
from kvtool.server.protocol import GenerateBody, GenerateSampling
from kvtool.server.responses import EngineArg, cache_salt, shared_with
from kvtool.server.streaming import stream, while_connected

router = APIRouter()

MAX_NEW_TOKENS = 128  # SGLang's default


@router.post("/generate")
async def generate(body: GenerateBody, engine: EngineArg, http: Request) -> Response:
    """Continue `text` or `input_ids`, one or a list; streams carry the text so far, not what is new of it."""
    started = time.perf_counter()
    prompts = body.text or body.input_ids
    if prompts is None or None not in (body.text, body.input_ids):
        raise RequestError("text: send either text or input_ids", "text")
    sampling = body.sampling_params or GenerateSampling()
    many = prompts.many or sampling.num_choices > 1
    asked = TextRequest(
        field="text" if body.text else "input_ids",
        prompts=prompts.items,
        sampling=sampling,
        defaults=Defaults(),
        max_tokens=MAX_NEW_TOKENS,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        ids=request_ids(body.rid, len(prompts.items), sampling.num_choices),
        cache_salt=cache_salt(body.cache_salt, http),
        shared=shared_with(http),
    )
    engine.warn_of_unknown([*body.unknown, *sampling.unknown])
    requests = await while_connected(http, engine.prepare(asked))
    pieces = engine.generate(asked, requests)

    def so_far(index: int, answer: Answer) -> dict[str, Any]:
        meta_info = {
            "id": requests[index].id,
            "finish_reason": finish_reason(answer),
            "prompt_tokens": len(requests[index].prompt),
            "completion_tokens": len(answer.token_ids),
            "cached_tokens": answer.num_cached_tokens,
            "e2e_latency": time.perf_counter() - started,
            **logprobs(body, requests[index], answer, engine),
        }
        return {"text": answer.text, "output_ids": answer.token_ids, "meta_info": meta_info}

    if not body.stream:
        whole = await while_connected(http, collect(pieces, len(requests)))
        results = [so_far(index, answer) for index, answer in enumerate(whole)]
        return JSONResponse(results if many else results[0])

    answers = [Answer() for _ in requests]

    def event(piece: Piece) -> dict[str, Any]:
        answers[piece.index].add(piece)
        index = {"index": piece.index} if many else {}
        return so_far(piece.index, answers[piece.index]) | index

    return await stream(http, pieces, event)


def request_ids(rid: str | Sequence[str] | None, num_prompts: int, n: int) -> list[str] | None:
    """The engine's id of each answer: a client's, numbered where it stands for several answers, as in SGLang.

    Raises:
        RequestError: there is not one for each prompt.
    """
    if rid is None:
        return None
    if isinstance(rid, str):
        count = num_prompts * n
        return [rid] if count == 1 else [f"{rid}_{index}" for index in range(count)]
    if len(rid) != num_prompts:
        raise RequestError(f"rid: it has {len(rid)} ids for {num_prompts} prompts; send one for each", "rid")
    return [f"{one}_{choice}" if n > 1 else one for one in rid for choice in range(n)]


def finish_reason(answer: Answer) -> dict[str, Any] | None:
    if answer.finish_reason == "length":
        return {"type": "length", "length": len(answer.token_ids)}
    if answer.finish_reason == "stop":
        return {"type": "stop", "matched": answer.matched}
    return answer.finish_reason and {"type": answer.finish_reason}


def logprobs(body: GenerateBody, request: EngineRequest, answer: Answer, engine: TextEngine) -> dict[str, Any]:
    """What `meta_info` says of log-probabilities; the first of the prompt's that are asked for is always null."""
    if not body.return_logprob:
        return {}
    writer = GenerateLogprobs(engine.tokenizer, body.return_text_in_logprobs is True, bool(body.top_logprobs_num))
    start = len(request.prompt) if body.num_prompt_logprobs is None else body.logprob_start_len or 0
    of_prompt = of_each(request.prompt, answer.prompt_logprobs)[start:]
    of_prompt[:1] = [None] * len(of_prompt[:1])
    return {
        **writer.write("input", request.prompt[start:], of_prompt),
        **writer.write("output", answer.token_ids, answer.logprobs),
    }
