"""`kvtool serve`: an HTTP server on one engine."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from kvtool.config import EngineConfig, HandoffConfig, ServerConfig
from kvtool.errors import ConfigError

from .options import MOST, option, secret, server_option
from .output import put

if TYPE_CHECKING:
    from kvtool.request import EngineInfo


role_option = partial(option, panel="Prefill and decode apart")


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
    role: Annotated[
        Literal["prefill", "decode", "router"] | None,
        role_option("--role", help="Compute prompts for others, answers for others, or route to such servers."),
    ] = None,
    peer: Annotated[
        str | None,
        role_option("--peer", metavar="LIST", help="Of prefill: HOST:PORT where KV arrives at each decode server."),
    ] = None,
    kv_port: Annotated[
        int | None,
        role_option("--kv-port", min=0, max=65535, help="Of decode: where KV arrives (default: any free port)."),
    ] = None,
    kv_secret: Annotated[
        str | None,
        role_option(
            "--kv-secret",
            callback=secret,
            metavar="KEY",
            help="What peers must know; KVTOOL_KV_SECRET hides it from `ps`.",
        ),
    ] = None,
    kv_transfer: Annotated[
        str | None,
        role_option("--kv-transfer", help="Of prefill: how KV travels (default: auto)."),
    ] = None,
    kv_timeout: Annotated[
        float | None,
        role_option(
            "--kv-timeout",
            min=0.1,
            help="Seconds for peers to answer at the start, and for KV to come (default: 60); then it is computed.",
        ),
    ] = None,
    prefill: Annotated[
        str | None, role_option("--prefill", metavar="LIST", help="Of router: URLs of prefill servers.")
    ] = None,
    decode: Annotated[
        str | None, role_option("--decode", metavar="LIST", help="Of router: URLs of decode servers.")
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and SGLang's /generate.

    Example: kvtool serve --model Qwen/Qwen2.5-1.5B-Instruct --nbits 4 --port 8000
    """
    from kvtool.server import run

    given: dict[str, object] = {"peer": peer, "kv-port": kv_port, "kv-secret": kv_secret, "kv-transfer": kv_transfer}
    given |= {"kv-timeout": kv_timeout, "prefill": prefill, "decode": decode}
    check_role(role, given)
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
    if role == "router":
        from kvtool.disagg.router import run_router

        assert prefill and decode
        run_router(prefill.split(","), decode.split(","), config, on_ready=lambda url: put(router_card(url)))
        return
    if role:
        handoff = HandoffConfig(
            role,
            kv_secret or "",
            peers=tuple(peer.split(",")) if peer else (),
            host=host,
            port=kv_port or 0,
            transfer=kv_transfer or HandoffConfig.transfer,
            timeout=kv_timeout or HandoffConfig.timeout,
        )
        engine = replace(engine, handoff=handoff)
    run(engine, config, on_ready=lambda info, url: put(start_card(info, url, config.api_key is not None)))


# Which options belong to which role, and which of them it needs. The secret is for some, but may stand in the
# environment of all.
ROLES: dict[str | None, tuple[set[str], set[str]]] = {
    None: ({"kv-secret"}, set()),
    "prefill": ({"peer", "kv-secret", "kv-transfer", "kv-timeout"}, {"peer", "kv-secret"}),
    "decode": ({"kv-port", "kv-secret", "kv-timeout"}, {"kv-secret"}),
    "router": ({"prefill", "decode", "kv-secret"}, {"prefill", "decode"}),
}


def check_role(role: str | None, given: Mapping[str, object]) -> None:
    """Raises ConfigError for options that a role lacks, or has no use for."""
    takes, needs = ROLES[role]
    for name in given:
        if given[name] is not None and name not in takes:
            fitting = " or ".join(f"--role {other}" for other, (options, _) in ROLES.items() if name in options)
            raise ConfigError(
                f"--{name}: is for {fitting}; " + (f"--role {role} has no use for it" if role else "add it")
            )
        if given[name] is None and name in needs:
            raise ConfigError(f"--role {role}: needs --{name}")


def router_card(url: str) -> str:
    """Where the router is, and a first request to copy."""
    body = '{"text": "Once upon a time", "sampling_params": {"temperature": 0}}'
    return f"kvtool routes at {url}\n  try       curl {url}/generate -d '{body}'"


def start_card(info: "EngineInfo", url: str, needs_key: bool) -> str:
    """What runs where, how much its cache holds, and a first request to copy."""
    memory, plain = f"{info.kv_bytes / 2**20:,.0f} MiB", f"at 16 bits an element {info.kv_tokens_16bit:,}"
    body = '{"text": "Once upon a time", "sampling_params": {"temperature": 0}}'
    arrives = f"\n  arrives   at {info.kv_address}, from --role prefill" if info.kv_address else ""
    where = info.device if info.num_ranks == 1 else f"{info.num_ranks} ranks, the first on {info.device}"
    weights = (
        "" if info.quantization == "none" else f", weights {info.quantization} ({info.weight_bytes / 2**20:,.0f} MiB)"
    )
    compiling = f", {info.compile_seconds:.1f} of it compiling kernels" if info.compile_seconds else ""
    up = f"up in {info.start_seconds:.1f} s{compiling}"
    header = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return f"""\
kvtool serves {info.model} at {url}
  model     {info.dtype}{weights} on {where}, context {info.max_model_len:,} tokens, {up}
  KV cache  {info.kv_format}{arrives}
  holds     {info.kv_tokens:,} tokens in {memory}; {plain}
  chat      {url}/ in a browser
  try       curl {url}/generate {header}-d '{body}'"""
