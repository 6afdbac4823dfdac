"""`kvtool serve`: an HTTP server on one engine."""

from typing import TYPE_CHECKING, Annotated

from kvtool.config import EngineConfig, ServerConfig

from .options import MOST, secret, server_option
from .output import put

if TYPE_CHECKING:
    from kvtool.request import EngineInfo


def serve(
    engine: EngineConfig,
    host: Annotated[
        str, server_option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = ServerConfig.host,
    port: Annotated[
        int, server_option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = ServerConfig.port,
    served_model_name: Annotated[
        str | None, server_option("--served-model-name", help="The model's name in requests (default: --model).")
    ] = ServerConfig.served_model_name,
    api_key: Annotated[
        str | None,
        server_option(
            "--api-key",
            callback=secret,
            metavar="KEY",
            help="Let in only who sends this key; KVTOOL_API_KEY hides it from `ps`.",
        ),
    ] = ServerConfig.api_key,
    max_queue: Annotated[
        int, server_option("--max-queue", min=1, max=MOST, help="Requests that may wait; more get status 429.")
    ] = ServerConfig.max_queue,
    shutdown_timeout: Annotated[
        int,
        server_option(
            "--shutdown-timeout", min=0, max=86400, help="Seconds that answers under way get to finish after SIGTERM."
        ),
    ] = ServerConfig.shutdown_timeout,
    trust_request_chat_template: Annotated[
        bool,
        server_option(
            "--trust-request-chat-template/--no-trust-request-chat-template",
            help="Let requests bring their own chat template.",
        ),
    ] = ServerConfig.trust_request_chat_template,
    preflight: Annotated[
        bool,
        server_option(
            "--preflight/--no-preflight",
            help="Try the KV format on text first; where --nbits alone would ruin a layer, take what does not.",
        ),
    ] = ServerConfig.preflight,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and SGLang's /generate.

    Example: kvtool serve --model Qwen/Qwen2.5-1.5B-Instruct --nbits 4 --port 8000
    """
    from kvtool.server import run

    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_key=api_key,
        shutdown_timeout=shutdown_timeout,
        max_queue=max_queue,
        trust_request_chat_template=trust_request_chat_template,
        preflight=preflight,
    )
    run(engine, config, on_ready=lambda info, url: put(start_card(info, url, config.api_key is not None)))


def start_card(info: "EngineInfo", url: str, needs_key: bool) -> str:
    """What runs where, how much its cache holds, and a first request to copy."""
    memory, plain = f"{info.kv_bytes / 2**20:,.0f} MiB", f"at 16 bits an element {info.kv_tokens_16bit:,}"
    body = '{"text": "Once upon a time", "sampling_params": {"temperature": 0}}'
    where = info.device if info.num_ranks == 1 else f"{info.num_ranks} ranks, the first on {info.device}"
    header = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return f"""\
kvtool serves {info.model} at {url}
  model     {info.dtype} on {where}, context {info.max_model_len:,} tokens, up in {info.start_seconds:.1f} s
  KV cache  {info.kv_format}
  holds     {info.kv_tokens:,} tokens in {memory}; {plain}
  chat      {url}/ in a browser
  try       curl {url}/generate {header}-d '{body}'"""
