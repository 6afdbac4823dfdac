"""What the commands share: the engine's options, each written once, and where an option's value may come from."""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer
from typer.core import TyperCommand

from kvtool.config import MOST_DRAFTED, Axis, Bits, EngineConfig, KVOptions, SpeculationConfig
from kvtool.errors import ConfigError

from .output import OutputOptions, check_output

# What people bring from SGLang's and KVTuner's scripts; `--kvtuner-X` is `--X`.
ALIASES = {
    "--model-path": "--model",
    "--context-length": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--max-queued-requests": "--max-queue",
    "--tp-size": "--tp",
    "--tensor-parallel-size": "--tp",
    "--ep-size": "--ep",
    "--expert-parallel-size": "--ep",
    "--pp-size": "--pp",
    "--pipeline-parallel-size": "--pp",
    "--nccl-init-addr": "--dist-init-addr",
    "--speculative-draft-model-path": "--draft-model",
    "--speculative-num-draft-tokens": "--num-speculative-tokens",
}
# KVTuner's switch says only that there is a quantised cache; its options name the bits, or this does.
KVTUNER_SWITCH, KVTUNER_NBITS = "--enable-kvtuner-quant", "4"

AXES: dict[str, Axis] = {"token": "token", "channel": "channel", "0": "token", "1": "channel"}
UNITS = {
    "": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}

MOST_RANKS = 1024
MOST = 2**31 - 1  # tokens; positions and counts of them are 32 bits wide on a device


def memory_size(text: str | int) -> int:
    """Bytes of `6GiB`, `6G` (the same), `500MB` or `1000000`; a default is a number already."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]|[KMG]I?B|)", str(text).strip().upper())
    if match is None:
        raise typer.BadParameter(f"{text!r:.40} is no size; write 6GiB, 500MB or a number of bytes")
    size = float(match[1]) * UNITS[match[2]]
    if size >= 2**63:
        raise typer.BadParameter(f"{text!r:.40} is more than any machine has; write 6GiB, 500MB or a number of bytes")
    return int(size)


def model_name(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("the name is empty; give a folder, a hub id or the name of an embedded model")
    return text


def secret(text: str | None) -> str | None:
    """A key that fits a header."""
    if text is not None and not re.fullmatch("[!-~]+", text):
        raise typer.BadParameter("the key must be one word of visible ASCII characters")
    return text


def axis(text: str) -> Axis:
    """`token` or `channel`, or KVTuner's 0 and 1."""
    if text not in AXES:
        raise typer.BadParameter(f"{text!r} is no axis; choose token (0) or channel (1)")
    return AXES[text]


def option(*names: str, panel: str, **settings: Any) -> Any:
    """An option, with the heading that it stands under in the help."""
    return typer.Option(*names, rich_help_panel=panel, show_envvar=False, **settings)


model_option = partial(option, panel="Model")
kv_option = partial(option, panel="KV cache")
engine_option = partial(option, panel="Engine")
ranks_option = partial(option, panel="Several GPUs")
server_option = partial(option, panel="Server")
output_option = partial(option, panel="Output")


def kv_options(
    nbits: Annotated[
        Bits | None, kv_option("--nbits", help="Bits of keys and values; 16 is the model's dtype (default: 16).")
    ] = None,
    nbits_key: Annotated[Bits | None, kv_option("--nbits-key", help="Bits of keys, before --nbits.")] = None,
    nbits_value: Annotated[Bits | None, kv_option("--nbits-value", help="Bits of values, before --nbits.")] = None,
    axis_key: Annotated[
        Axis | None,
        kv_option("--axis-key", parser=axis, metavar="token|channel", help="What shares a scale among keys (0|1 too)."),
    ] = None,
    axis_value: Annotated[
        Axis | None,
        kv_option("--axis-value", parser=axis, metavar="token|channel", help="What shares a scale among values."),
    ] = None,
    symmetric: Annotated[
        bool | None, kv_option("--sym/--asym", help="Without or with a zero point (default: asym).", show_default=False)
    ] = None,
    q_group_size: Annotated[
        int | None, kv_option("--q-group-size", help="Elements to a scale: 32, 64 or 128 (default: 64).")
    ] = None,
    residual_length: Annotated[
        int | None,
        kv_option(
            "--residual-length", min=0, max=2**20, help="Newest tokens kept at full precision, in blocks (default: 0)."
        ),
    ] = None,
    rotate: Annotated[
        bool | None,
        kv_option("--rotate/--no-rotate", help="Hadamard rotation before quantising (token axis).", show_default=False),
    ] = None,
    kv_plan: Annotated[
        str | None, kv_option("--kv-plan", metavar="FILE", help="Bits for each layer: KVTuner's YAML.")
    ] = None,
) -> KVOptions:
    """The signature is the list of the options that make a KV format."""
    return KVOptions(
        nbits=nbits,
        nbits_key=nbits_key,
        nbits_value=nbits_value,
        axis_key=axis_key,
        axis_value=axis_value,
        symmetric=symmetric,
        q_group_size=q_group_size,
        residual_length=residual_length,
        rotate=rotate,
        plan=kv_plan,
    )


def engine_config(
    *,
    model: Annotated[
        str,
        model_option(
            "--model", callback=model_name, help="A Hugging Face folder, a hub id, or the name of an embedded model."
        ),
    ] = EngineConfig.model,
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        model_option("--dtype", help="auto: the checkpoint's own on a GPU, float32 on CPU."),
    ] = EngineConfig.dtype,
    device: Annotated[
        str, model_option("--device", help="auto, cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = EngineConfig.device,
    load_format: Annotated[
        Literal["auto", "dummy"],
        model_option("--load-format", help="dummy: random weights of the config's true shape."),
    ] = EngineConfig.load_format,
    quantization: Annotated[
        Literal["auto", "w8a8", "fp8", "gptq", "awq", "w4a16"],
        model_option(
            "--quantization",
            help="Bits of weights; auto: the checkpoint's own, others round 16-bit ones (experts: w4a16).",
        ),
    ] = EngineConfig.quantization,
    quantize_head: Annotated[
        bool, model_option("--quantize-head/--no-quantize-head", help="Round the output projection as well.")
    ] = EngineConfig.quantize_head,
    keep_layers: Annotated[
        str | None,
        model_option("--keep-layers", metavar="GLOBS", help="Layers to keep in 16 bits: 'layers.0.*,*.down_proj'."),
    ] = None,
    calibration: Annotated[
        str | None,
        model_option(
            "--calibration", metavar="FILE", help="Text that gptq, awq and fp8 look at (default: a built-in one)."
        ),
    ] = EngineConfig.calibration,
    max_model_len: Annotated[
        int | None,
        model_option(
            "--max-model-len", min=1, max=MOST, help="Tokens of prompt and answer together (default: model's context)."
        ),
    ] = EngineConfig.max_model_len,
    kv: KVOptions,
    kv_cache_memory: Annotated[
        int | None,
        kv_option(
            "--kv-cache-memory",
            parser=memory_size,
            metavar="SIZE",
            help="Memory of the cache on each GPU, say 6GiB (default: what is left; 1GiB on CPU).",
        ),
    ] = EngineConfig.kv_cache_memory,
    gpu_memory_utilization: Annotated[
        float,
        kv_option(
            "--gpu-memory-utilization",
            min=0.01,
            max=1.0,
            help="Share of the GPU that weights, workspace and cache may take.",
        ),
    ] = EngineConfig.gpu_memory_utilization,
    max_num_seqs: Annotated[
        int, engine_option("--max-num-seqs", min=1, max=2**16, help="Sequences that run at once.")
    ] = EngineConfig.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int,
        engine_option(
            "--max-num-batched-tokens", min=1, max=MOST, help="Tokens computed in one step; longer prompts are cut."
        ),
    ] = EngineConfig.max_num_batched_tokens,
    swap_space: Annotated[
        int | None,
        engine_option(
            "--swap-space",
            parser=memory_size,
            metavar="SIZE",
            help="Host memory for sequences that must make room (default: 4GiB).",
        ),
    ] = None,
    prefix_caching: Annotated[
        bool,
        engine_option(
            "--prefix-caching/--no-prefix-caching", help="Prompts share the packed blocks of their common beginnings."
        ),
    ] = EngineConfig.prefix_caching,
    attention_backend: Annotated[
        str, engine_option("--attention-backend", help="auto, flash-attn, cuda, triton or torch.")
    ] = EngineConfig.attention_backend,
    cuda_graph: Annotated[
        bool, engine_option("--cuda-graph/--no-cuda-graph", help="On a GPU, launch decode steps whole.")
    ] = EngineConfig.cuda_graph,
    run_ahead: Annotated[
        bool | None,
        engine_option(
            "--run-ahead/--no-run-ahead",
            help="Launch a step while the last one computes (default: on a GPU).",
            show_default=False,
        ),
    ] = EngineConfig.run_ahead,
    speculate: Annotated[
        Literal["draft", "ngram"] | None,
        engine_option(
            "--speculate",
            help="Confirm several tokens in a step, drafted by a smaller model or found earlier in the text.",
        ),
    ] = None,
    draft_model: Annotated[
        str | None,
        engine_option(
            "--draft-model",
            metavar="MODEL",
            help="Of --speculate draft: a model of the same vocabulary (default: tiny-draft, for tiny).",
        ),
    ] = None,
    draft_nbits: Annotated[
        Bits | None,
        engine_option("--draft-nbits", help="Bits of the draft model's KV cache (default: as the model's)."),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        engine_option(
            "--num-speculative-tokens", min=1, max=MOST_DRAFTED, help="Drafted for a sequence in a step, at most (4)."
        ),
    ] = None,
    seed: Annotated[
        int, engine_option("--seed", min=0, max=2**63 - 1, help="Of dummy weights, and of requests that name no seed.")
    ] = EngineConfig.seed,
    profile: Annotated[
        str | None,
        engine_option(
            "--profile", metavar="DIR", help="Trace some of the steps to this folder, and tell where time and bytes go."
        ),
    ] = EngineConfig.profile,
    tp: Annotated[
        int | None,
        ranks_option(
            "--tp", min=1, max=MOST_RANKS, help="GPUs that share each layer (tensor parallelism; default: as --ep)."
        ),
    ] = None,
    ep: Annotated[
        int,
        ranks_option(
            "--ep",
            min=1,
            max=MOST_RANKS,
            help="Parts into which these GPUs divide a layer's experts, whole ones to each (expert parallelism); 1: "
            "each GPU has a piece of every expert. They share attention either way.",
        ),
    ] = EngineConfig.ep,
    pp: Annotated[
        int, ranks_option("--pp", min=1, max=MOST_RANKS, help="Stages of layers, of --tp GPUs each (pipeline).")
    ] = EngineConfig.pp,
    all_reduce: Annotated[
        Literal["auto", "nccl", "symmetric-memory"],
        ranks_option("--all-reduce", help="How GPUs sum up; auto: small sums in each other's memory where it works."),
    ] = EngineConfig.all_reduce,
    nnodes: Annotated[
        int, ranks_option("--nnodes", min=1, max=MOST_RANKS, help="Machines that share these GPUs evenly.")
    ] = EngineConfig.nnodes,
    node_rank: Annotated[
        int,
        ranks_option(
            "--node-rank",
            min=0,
            max=MOST_RANKS,
            help="Which of them this is; those behind 0 take all other options from it.",
        ),
    ] = EngineConfig.node_rank,
    dist_init_addr: Annotated[
        str | None,
        ranks_option(
            "--dist-init-addr", metavar="HOST:PORT", help="Of node 0, where ranks find each other; a private network."
        ),
    ] = EngineConfig.dist_init_addr,
    dist_timeout: Annotated[
        int,
        ranks_option("--dist-timeout", min=1, max=86400, help="Seconds that ranks wait for each other at the start."),
    ] = EngineConfig.dist_timeout,
    restart: Annotated[
        bool,
        ranks_option("--restart/--no-restart", help="Start all ranks anew when one has died (serve)."),
    ] = EngineConfig.restart,
) -> EngineConfig:
    """The signature is the list of the engine's options; the body says which field each one fills."""
    engine = EngineConfig(
        model=model,
        dtype=dtype,
        device=device,
        seed=seed,
        load_format=load_format,
        quantization=quantization,
        quantize_head=quantize_head,
        keep_layers=tuple(glob.strip() for glob in keep_layers.split(",")) if keep_layers else (),
        calibration=calibration,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        swap_space=EngineConfig.swap_space if swap_space is None else swap_space,
        prefix_caching=prefix_caching,
        attention_backend=attention_backend,
        cuda_graph=cuda_graph,
        run_ahead=run_ahead,
        speculation=speculation(speculate, draft_model, draft_nbits, num_speculative_tokens),
        tp=ep if tp is None else tp,
        ep=ep,
        pp=pp,
        all_reduce=all_reduce,
        nnodes=nnodes,
        node_rank=node_rank,
        dist_init_addr=dist_init_addr,
        dist_timeout=dist_timeout,
        restart=restart,
        kv=kv,
        profile=profile,
    )
    return under_torchrun(engine) if "TORCHELASTIC_RUN_ID" in os.environ else engine


def speculation(
    method: Literal["draft", "ngram"] | None, model: str | None, nbits: Bits | None, num_tokens: int | None
) -> SpeculationConfig | None:
    """Raises ConfigError for options that mean nothing without another."""
    for name, value in (("draft-model", model), ("draft-nbits", nbits), ("num-speculative-tokens", num_tokens)):
        if value is not None and method is None:
            raise ConfigError(f"--{name} means nothing without --speculate; add --speculate draft or ngram")
        if value is not None and method == "ngram" and name.startswith("draft"):
            raise ConfigError(f"--{name} means nothing to --speculate ngram; leave it out")
    if method is None:
        return None
    return SpeculationConfig(method, num_tokens or SpeculationConfig.num_tokens, model, nbits)


def under_torchrun(engine: EngineConfig) -> EngineConfig:
    """`engine` as one of torchrun's processes: each is a rank, and stands for a node that has no other."""
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if size != engine.num_ranks:
        raise ConfigError(
            f"torchrun started {size} processes, but {engine.rank_options} make {engine.num_ranks}; add --tp {size}, "
            "or --tp and --pp whose product it is"
        )
    return replace(engine, nnodes=size, node_rank=rank, local_rank=local_rank, dist_init_addr="env://")


def output_options(
    json: Annotated[bool, output_option("--json", help="Print one JSON document in place of the table.")] = False,
    markdown: Annotated[bool, output_option("--markdown", help="Print the table as Markdown.")] = False,
    csv: Annotated[bool, output_option("--csv", help="Print all fields as CSV.")] = False,
    output: Annotated[
        str | None,
        output_option(
            "--output",
            metavar="FILE",
            help="Write a file as well: .json, .jsonl, .csv, .md, .html or .png by its name.",
        ),
    ] = None,
) -> OutputOptions:
    """The signature is the list of the options that say where a result goes."""
    return check_output(OutputOptions(json, markdown, csv, output))


def read_config(context: typer.Context, path: str | None) -> None:
    """Make a YAML file's values this command's defaults, so that the environment and the command line go before it."""
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: write one `option: value` a line")
    parameters = [p for p in context.command.params if p.name != "config"]
    names = {name: (p.name, True) for p in parameters for name in p.opts}
    names |= {name: (p.name, False) for p in parameters for name in p.secondary_opts}
    repeated = {p.name for p in parameters if getattr(p, "multiple", False)}
    context.default_map = {}
    for key, value in values.items():
        name = canonical(f"--{key}".replace("_", "-"))
        if name not in names:
            raise ConfigError(f"--config {path}: {key} is no option of `{context.info_name}`; see --help")
        parameter, positive = names[name]
        if isinstance(value, bool):
            value = value is positive
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        elif value is not None:
            value = str(value)  # as if typed: YAML's 4 is the option's "4"
        context.default_map[parameter] = [value] if parameter in repeated else value


def canonical(name: str) -> str:
    """An option's own name, given any that people know it by."""
    name = re.sub("^--kvtuner-", "--", name)
    return ALIASES.get(name, name)


def own_words(args: list[str]) -> list[str]:
    """A command line with aliases replaced by the options they stand for."""
    words = []
    for arg in args:
        name, equals, value = arg.partition("=")
        words.append(canonical(name) + equals + value if arg.startswith("--") else arg)
    return words


class Command(TyperCommand):
    """A command whose options can also come from `KVTOOL_<OPTION>`, and under the names that people know."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for parameter in self.params:
            parameter.envvar = "KVTOOL_" + parameter.opts[0].lstrip("-").replace("-", "_").upper()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = own_words(args)
        rest = super().parse_args(ctx, [word for word in words if word != KVTUNER_SWITCH])
        given = (ctx.params.get(name) for name in ("nbits", "nbits_key", "nbits_value", "kv_plan"))
        if KVTUNER_SWITCH in words and not any(given):  # wherever these came from
            ctx.params["nbits"] = KVTUNER_NBITS
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Under their headings, and with whole names, which Typer's own tables cut to fit a terminal of 80 columns."""
        panels: dict[str, list[Any]] = {}
        for option in self.get_params(ctx):
            panels.setdefault(getattr(option, "rich_help_panel", None) or COMMON_PANEL, []).append(option)
        for panel, options in panels.items():
            with formatter.section(panel):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])


COMMON_PANEL = "Options"


def common_option(name: str, kind: Any, default: object, **settings: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option(f"--{name}", panel=COMMON_PANEL, is_eager=True, **settings)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


COMMON = (
    common_option("config", str | None, None, callback=read_config, metavar="FILE", help="Options from a YAML file."),
    common_option("debug", bool, False, help="Show a traceback with an error."),
)


# What most commands take as a whole: what makes it, by the name of the command's parameter.
BUNDLES: dict[str, Callable[..., Any]] = {"engine": engine_config, "kv": kv_options, "output": output_options}


def shared(command: Callable[..., None], bundles: Mapping[str, Callable[..., Any]] = BUNDLES) -> Callable[..., None]:
    """Give a command --config and --debug, and the options of what it takes as a whole.

    Args:
        bundles: makers of such wholes; a maker's signature is the list of its options, and may have wholes in it too.
    """

    def makers(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Callable[..., Any] | None]]:
        """Each parameter of `function`, with its maker where it is a whole and no option itself."""
        taken = inspect.signature(function).parameters.values()
        return [(p, None if get_origin(p.annotation) is Annotated else bundles[p.name]) for p in taken]

    def options_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
        return [option for p, maker in makers(function) for option in (options_of(maker) if maker else [p])]

    def arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return {p.name: maker(**arguments(maker, values)) if maker else values[p.name] for p, maker in makers(function)}

    @wraps(command)
    def run(*, config: str | None, debug: bool, **values: Any) -> None:  # these two have done their work
        made = arguments(command, values)
        engine = made.get("engine")
        if engine is not None and engine.node_rank > 0:
            from kvtool.ranks.node import run_node

            raise typer.Exit(run_node(engine))
        command(**made)

    in_order = sorted(makers(command), key=lambda taken: (taken[0].name == "output", taken[1] is None))  # output last
    options = [option for p, maker in in_order for option in (options_of(maker) if maker else [p])]
    parameters = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in (*options, *COMMON)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
