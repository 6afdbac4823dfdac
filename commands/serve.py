"""`kvtool serve`: an HTTP server on one engine."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

from kvtool.config import EngineConfig

from .options import server_option

if TYPE_CHECKING:
    from kvtool.request import EngineInfo


def serve(
    engine: EngineConfig,
    host: Annotated[
        str, server_option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, server_option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None, server_option("--served-model-name", help="The model's name in requests (default: --model).")
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and SGLang's /generate.

    Example: kvtool serve --model Qwen/Qwen2.5-1.5B-Instruct --nbits 4 --port 8000
    """
    from kvtool.server import run

    run(engine, host, port, served_model_name, on_ready=lambda info, url: show(start_card(info, url)))


def show(card: str) -> None:
    try:
        print(card, flush=True)
    except BrokenPipeError:  # who reads has left, but clients may come; what is buffered must still go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start_card(info: "EngineInfo", url: str) -> str:
    """What runs where, how much its cache holds, and a first request to copy."""
    memory, plain = f"{info.kv_bytes / 2**20:,.0f} MiB", f"at 16 bits an element {info.kv_tokens_16bit:,}"
    body = '{"text": "Once upon a time", "sampling_params": {"temperature": 0}}'
    return f"""\
kvtool serves {info.model} at {url}
  model     {info.dtype} on {info.device}, context {info.max_model_len:,} tokens
  KV cache  {info.kv_format}
  holds     {info.kv_tokens:,} tokens in {memory}; {plain}
  try       curl {url}/generate -d '{body}'"""
