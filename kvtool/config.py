"""What the user asked for, in the user's words. Frozen: what is discovered at run time is passed beside it."""

from dataclasses import dataclass, field
from typing import Literal

MOST_DRAFTED = 16  # tokens for a sequence in a step: fewer than any block holds

Axis = Literal["token", "channel"]
Bits = Literal["16", "8", "4", "2", "fp8"]


@dataclass(frozen=True)
class KVOptions:
    """The KV-cache options as given; None means not given. `kvtool.kv.format.resolve` makes a KVFormat of them.

    Attributes:
        nbits: bits of keys and values alike, unless `nbits_key` or `nbits_value` says otherwise; 16 is the model's
            dtype.
        axis_key, axis_value: which elements share a scale: a token's along head_dim, or a channel's along the tokens
            of a block.
        symmetric: no zero point; 2 bits are then ternary.
        q_group_size: elements to a scale (32, 64 or 128); on the channel axis also the tokens of a block.
        residual_length: tokens kept at full precision behind every query, rounded up to whole blocks.
        rotate: Hadamard rotation before quantising (token axis only).
        plan: path of a YAML file `{layer: {nbits_key, nbits_value}}`, KVTuner's format.
        layer_bits: (key bits, value bits) of each layer, found by a preflight or a search; before all other bits.
    """

    nbits: Bits | None = None
    nbits_key: Bits | None = None
    nbits_value: Bits | None = None
    axis_key: Axis | None = None
    axis_value: Axis | None = None
    symmetric: bool | None = None
    q_group_size: int | None = None
    residual_length: int | None = None
    rotate: bool | None = None
    plan: str | None = None
    layer_bits: tuple[tuple[Bits, Bits], ...] | None = None


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are drafted, so that one step of the model can confirm several.

    Attributes:
        method: "draft" asks a smaller model of the same vocabulary, "ngram" looks for what followed the newest tokens
            when they stood in the prompt or answer before (prompt lookup).
        num_tokens: drafted for a sequence in a step, at most.
        draft_model: of "draft": as `EngineConfig.model`; None: the one that is embedded with an embedded model.
        draft_nbits: bits of the draft model's KV cache; None: in the format of the model's.
    """

    method: Literal["draft", "ngram"]
    num_tokens: int = 4
    draft_model: str | None = None
    draft_nbits: Bits | None = None


@dataclass(frozen=True)
class HandoffConfig:
    """An engine's part where one engine computes prompts and another their answers.

    Attributes:
        role: "prefill" pushes the KV of a prompt to the engine that a request names, "decode" takes it in.
        secret: that all of them know.
        peers: of "prefill": the decode engines that it may push to, each HOST:PORT.
        host, port: of "decode": where KV arrives; port 0 picks a free one.
        transfer: "auto" or a name from `kvtool.kv.transfer.TRANSFERS`.
        timeout: seconds that peers have to answer when "prefill" starts, and in which KV must have come to "decode",
            which then computes the prompt itself.
        fault: make all transfers fail in this way, to see what happens.
    """

    role: Literal["prefill", "decode"]
    secret: str = field(repr=False)
    peers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    transfer: str = "auto"
    timeout: float = 60.0
    fault: Literal["corrupt", "drop", "delay"] | None = None


@dataclass(frozen=True)
class EngineConfig:
    """One engine: the model, where it runs, and how much it may hold.

    Attributes:
        model: a Hugging Face folder, a hub id, or the name of an embedded model.
        dtype: "auto" is the checkpoint's own dtype on a GPU, float32 on CPU.
        device: "auto" is cuda where there is one.
        seed: of dummy weights and of requests that name no seed.
        load_format: "dummy" gives random weights of the config's true shape.
        quantization: how weights are kept: "auto": as the checkpoint has them; else what becomes of 16-bit ones when
            they are loaded: 8 bits, and of activations as well ("w8a8" int8, "fp8" e4m3), or 4 bits in groups of 128,
            rounded to the nearest ("w4a16") or after a text has shown what matters ("gptq", "awq").
        quantize_head: round the output projection as well.
        keep_layers: globs of names of layers that stay in 16 bits.
        calibration: file of that text; None: a built-in one.
        max_model_len: tokens of prompt and answer together; None: the model's context.
        max_num_seqs: sequences that run at once; each owns a tail slot.
        max_num_batched_tokens: tokens computed in one step; longer prompts are cut into chunks.
        kv_cache_memory: bytes of KV cache of each rank, blocks and tails together; None: what is left on a GPU, 1 GiB
            on CPU.
        gpu_memory_utilization: share of the whole GPU that weights, workspace and cache may take.
        swap_space: bytes of this machine's memory for sequences that must make room; with `handoff` as much again for
            those on their way.
        prefix_caching: prompts share the packed blocks of their common beginnings.
        attention_backend: "auto" or a name from `kvtool.attention.BACKENDS`.
        cuda_graph: on a GPU, launch decode steps whole.
        run_ahead: launch a step while the last one computes, its tokens unknown to the host; None: on a GPU.
        tp: ranks that share each layer (tensor parallelism), a process each and on GPUs a device each.
        ep: parts into which those ranks divide a layer's experts, whole ones to each rank, or to `tp / ep` ranks that
            share them (expert parallelism); 1: each rank has a piece of every expert.
        pp: stages of layers, each of `tp` ranks, that steps run through (pipeline parallelism).
        all_reduce: how GPUs sum up what each has of a layer's output: "symmetric-memory" has small sums read directly
            from each other's memory; "auto": that where it works.
        nnodes, node_rank: machines that have as many ranks each, and which of them this is. All but the first take
            their other options from it.
        dist_init_addr: HOST:PORT of the first machine, where ranks find each other; "env://": torchrun says.
        dist_timeout: seconds that ranks wait for each other when they start.
        local_rank: of this machine's devices, the first to use.
        restart: when a rank has died, start all anew.
        speculation: how tokens are drafted; None: they are not.
        handoff: how it shares requests with other engines; None: it does not.
        profile: a folder for traces of some of the steps; None: none are made.
    """

    model: str = "tiny"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: Literal["auto", "w8a8", "fp8", "gptq", "awq", "w4a16"] = "auto"
    quantize_head: bool = False
    keep_layers: tuple[str, ...] = ()
    calibration: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    swap_space: int = 4 << 30
    prefix_caching: bool = True
    attention_backend: str = "auto"
    cuda_graph: bool = True
    run_ahead: bool | None = None
    tp: int = 1
    ep: int = 1
    pp: int = 1
    all_reduce: Literal["auto", "nccl", "symmetric-memory"] = "auto"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dist_timeout: int = 300
    local_rank: int = 0
    restart: bool = False
    kv: KVOptions = field(default_factory=KVOptions)
    speculation: SpeculationConfig | None = None
    handoff: HandoffConfig | None = None
    profile: str | None = None

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def rank_options(self) -> str:
        """What makes so many ranks, as typed."""
        return f"--tp {self.tp}{f' --ep {self.ep}' if self.ep > 1 else ''} --pp {self.pp}"

    @property
    def ranks_here(self) -> range:
        """Those of this machine."""
        count = self.num_ranks // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


@dataclass(frozen=True)
class ServerConfig:
    """One HTTP server on an engine.

    Attributes:
        host, port: where to listen; port 0 picks a free one.
        served_model_name: of the model in requests; None: as the engine's config has it.
        api_key: what clients must send; None lets everybody in.
        shutdown_timeout: seconds that answers under way get to finish after SIGTERM.
        max_queue: requests that may wait; those beyond are told to come back later.
        trust_request_chat_template: a request may bring a chat template of its own.
        preflight: before the cache is laid out, try on text whether the model survives its format.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    shutdown_timeout: int = 30
    max_queue: int = 8192
    trust_request_chat_template: bool = False
    preflight: bool = True
