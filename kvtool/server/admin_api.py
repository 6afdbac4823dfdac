"""What operators, probes and dashboards ask: is it well, what is it, what does it do; and end this, forget that."""

import asyncio
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from kvtool.request import EngineInfo, EngineStats
from kvtool.server.metrics import Metrics
from kvtool.server.protocol import Body, Text
from kvtool.server.responses import EngineArg, error_body

router = APIRouter()


class AbortBody(Body):
    rid: Text = ""
    abort_all: bool = False


@router.api_route("/health", methods=["GET", "HEAD"])
@router.api_route("/ready", methods=["GET", "HEAD"])
async def health(engine: EngineArg) -> Response:
    """200 as long as requests can be served; while the server drains, its guard answers /ready with 503."""
    if not engine.client.alive:
        return JSONResponse(
            error_body(503, "the engine has ended; try again when another has been started", code="engine_dead"), 503
        )
    return Response()


@router.get("/metrics")
async def metrics(http: Request, engine: EngineArg) -> Response:
    await engine.client.count_experts()
    of: Metrics = http.app.state.metrics
    content, media_type = of.exposition(http.headers.get("accept", ""))
    return Response(content, media_type=media_type)


@router.get("/metrics/experts")
async def expert_metrics(http: Request, engine: EngineArg) -> Response:
    """What /metrics says of whole layers, expert by expert: thousands of series, which take their time."""
    await engine.client.count_experts()
    of: Metrics = http.app.state.metrics
    content, media_type = await asyncio.to_thread(of.expert_exposition, http.headers.get("accept", ""))
    return Response(content, media_type=media_type)


@router.get("/version")
async def server_version() -> dict[str, str]:
    return {"version": version("kvtool")}


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(engine: EngineArg) -> dict[str, Any]:
    return {
        "model_path": engine.info.path,
        "tokenizer_path": engine.info.path,
        "served_model_name": engine.name,
        "is_generation": True,
        "max_model_len": engine.info.max_model_len,
        "vocab_size": engine.info.vocab_size,
        "dtype": engine.info.dtype,
        "kv_format": engine.info.kv_format,
    }


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(engine: EngineArg, http: Request) -> dict[str, Any]:
    """Everything there is to know of a running server, but its key."""
    info, stats = engine.client.info, engine.client.stats
    numbers = msgspec.structs.asdict(stats)
    return {
        "version": version("kvtool"),
        "model": engine.name,
        "max_model_len": info.max_model_len,
        "max_total_num_tokens": info.kv_tokens,
        "engine": msgspec.structs.asdict(info),
        "configuration": http.app.state.configuration,
        "stats": numbers,
        "kv": kv_use(info, stats),
        "internal_states": [numbers],  # where SGLang's clients look
    }


def kv_use(info: EngineInfo, stats: EngineStats) -> dict[str, Any]:
    """Blocks and bytes of the KV cache, as they are now."""
    return {
        "format": info.kv_format,
        "bits_per_element": info.bits_per_element,
        "block_size": info.block_size,
        "block_bytes": info.block_bytes,
        "used_blocks": stats.used_blocks,
        "cached_blocks": stats.cached_blocks,
        "free_blocks": info.num_blocks - stats.used_blocks - stats.cached_blocks,
        "total_blocks": info.num_blocks,
        "used_tails": stats.used_tails,
        "total_tails": info.max_num_seqs,
        "packed_bytes": stats.used_blocks * info.block_bytes,
        "tail_bytes": stats.used_tails * info.tail_bytes,
        "total_bytes": info.kv_bytes,
    }


@router.get("/flush_cache")
@router.post("/flush_cache")
async def flush_cache(engine: EngineArg) -> Response:
    engine.client.flush_cache()
    return PlainTextResponse("Cache flushed.\n")


@router.post("/abort_request")
async def abort_request(body: AbortBody, engine: EngineArg) -> dict[str, int]:
    """End the request `rid`, its parts (`rid` and more) too, or all that run."""
    ids = [i for i in engine.client.request_ids if body.abort_all or (body.rid and i.startswith(body.rid))]
    for request_id in ids:
        engine.client.abort(request_id)
    return {"aborted": len(ids)}
