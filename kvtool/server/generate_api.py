"""SGLang's `/generate`."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvtool.errors import RequestError
from kvtool.server.generation import Answer, Defaults, Piece, collect
from kvtool.server.protocol import GenerateBody, GenerateSampling
from kvtool.server.responses import EngineArg
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
    field = "text" if body.text else "input_ids"
    sampling = body.sampling_params or GenerateSampling()
    requests = await engine.requests(field, prompts.items, sampling, Defaults(), MAX_NEW_TOKENS)
    pieces = engine.generate(requests, sampling.stop)

    def so_far(index: int, answer: Answer) -> dict[str, Any]:
        return {
            "text": answer.text,
            "output_ids": answer.token_ids,
            "meta_info": {
                "id": requests[index].id,
                "finish_reason": finish_reason(answer),
                "prompt_tokens": len(requests[index].prompt),
                "completion_tokens": len(answer.token_ids),
                "e2e_latency": time.perf_counter() - started,
            },
        }

    if not body.stream:
        whole = await while_connected(http, collect(pieces, len(requests)))
        results = [so_far(index, answer) for index, answer in enumerate(whole)]
        return JSONResponse(results if prompts.many else results[0])

    answers = [Answer() for _ in requests]

    def event(piece: Piece) -> dict[str, Any]:
        answers[piece.index].add(piece)
        index = {"index": piece.index} if prompts.many else {}
        return so_far(piece.index, answers[piece.index]) | index

    return await stream(http, pieces, event)


def finish_reason(answer: Answer) -> dict[str, Any] | None:
    if answer.finish_reason == "length":
        return {"type": "length", "length": len(answer.token_ids)}
    return answer.finish_reason and {"type": answer.finish_reason, "matched": answer.matched}
