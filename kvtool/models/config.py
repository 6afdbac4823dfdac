"""A model folder's config.json: what it says of the model's shape, or what is wrong with it."""

import math
from dataclasses import dataclass
from pathlib import Path

from kvtool.layers.mla import MLAShape
from kvtool.layers.moe import MoEShape, Routing
from kvtool.layers.rotary import LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from kvtool.models.architectures import ARCHITECTURES, Architecture, ExpertFields
from kvtool.models.fields import Fields, read_fields
from kvtool.models.quantization_config import read_quantization
from kvtool.models.stored import StoredQuantization

# Beyond any model; tables and lists of weights are built before a weight is seen.
MAX_LAYERS, MAX_POSITIONS, MAX_EXPERTS = 1024, 1 << 24, 4096
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Attributes:
        model_type: a key of `ARCHITECTURES`.
        max_position: tokens of context, `max_position_embeddings` of the config.
        num_kv_heads, head_dim: of keys and values; of MLA, which keeps neither, as its products would make them.
        softmax_scale: multiplies q·k.
        sliding_window: for each layer, how many tokens a query reads, itself included; None: all before it.
        mla: how queries, keys and values are made of latents; None: they are projected.
        experts: for each layer, the experts in place of its MLP; None: it has an MLP.
        num_draft_layers: layers that a checkpoint holds behind the model's own, to draft tokens; they are not loaded.
        tie_word_embeddings: the embedding doubles as output projection.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        dtype: of the checkpoint, one of `DTYPES`.
        eos_token_ids: ids that end an answer, from config.json and generation_config.json.
        quantization: how the checkpoint's weights are quantised; None: they are not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: Rope
    softmax_scale: float
    sliding_window: tuple[int | None, ...]
    mla: MLAShape | None
    experts: tuple[MoEShape | None, ...]
    num_draft_layers: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    quantization: StoredQuantization | None


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, and the end-of-text ids of generation_config.json where there is one.

    Raises:
        ModelError: a file is missing, or says what `parse_config` refuses.
    """
    generation_config = folder / "generation_config.json"
    more = (read_fields(generation_config),) if generation_config.exists() else ()
    return parse_config(read_fields(folder / "config.json"), *more)


def parse_config(fields: Fields, *generation_config: Fields) -> ModelConfig:
    """What a config.json, and perhaps a generation_config.json, say of a model.

    Fields mean what they mean in Hugging Face transformers, in its old spelling (`rope_theta`, `rope_scaling`,
    `torch_dtype`) and its new one (`rope_parameters`, `dtype`). Code that comes with a model is never run.

    Raises:
        ModelError: a file is no JSON, a field is missing or impossible, or the architecture is unknown.
    """
    architecture = _architecture(fields)
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", f"is {fields.get('hidden_act')!r}; only 'silu' is supported")

    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    mla = _mla(fields) if architecture.latent else None
    num_kv_heads, head_dim = (num_heads, mla.head_dim) if mla else _heads(fields, hidden_size, num_heads)
    max_position = fields.count("max_position_embeddings", most=MAX_POSITIONS)
    attention_bias = architecture.config_biases and fields.flag("attention_bias")
    rope = _rope(fields, mla.rope_dim if mla else head_dim, max_position)
    return ModelConfig(
        model_type=fields.get("model_type"),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position=max_position,
        rope=rope,
        softmax_scale=_mla_temperature(fields, rope) / math.sqrt(head_dim) if mla else 1 / math.sqrt(head_dim),
        sliding_window=_sliding_window(fields, architecture, num_layers),
        mla=mla,
        experts=_experts(fields, architecture.experts, num_layers) if architecture.experts else (None,) * num_layers,
        num_draft_layers=fields.count("num_nextn_predict_layers", default=0, least=0, most=MAX_LAYERS),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture.config_biases and fields.flag("mlp_bias"),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, *generation_config),
        quantization=read_quantization(fields),
    )


def _architecture(fields: Fields) -> Architecture:
    model_type, known = fields.get("model_type"), ", ".join(ARCHITECTURES)
    if model_type is None:
        fields.refuse("model_type", f"is missing; it must be one of {known}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        if fields.get("auto_map") is not None:
            fields.refuse(
                "auto_map", f"asks to run code that comes with the model, which is refused; use one of {known}"
            )
        fields.refuse("model_type", f"is {model_type!r}, which is not supported; use one of {known}")
    return ARCHITECTURES[model_type]


def _heads(fields: Fields, hidden_size: int, num_heads: int) -> tuple[int, int]:
    """KV heads, and elements of each head."""
    if fields.get("num_key_value_heads") is None:
        fields.refuse(
            "num_key_value_heads", "is missing; a GQA model needs it (or set it equal to num_attention_heads)"
        )
    num_kv_heads = fields.count("num_key_value_heads")
    if num_heads % num_kv_heads:
        fields.refuse(
            "num_attention_heads", f"is {num_heads}; it must be a multiple of num_key_value_heads, {num_kv_heads}"
        )
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse(
            "hidden_size",
            f"is {hidden_size}; it must be a multiple of num_attention_heads, {num_heads}, or set head_dim",
        )
    return num_kv_heads, fields.count("head_dim", default=hidden_size // num_heads)


def _mla(fields: Fields) -> MLAShape:
    if fields.flag("attention_bias"):
        fields.refuse("attention_bias", "is true; latent attention is supported without biases only")
    rope_dim = fields.count("qk_rope_head_dim")
    if rope_dim % 2:
        fields.refuse("qk_rope_head_dim", f"is {rope_dim}; it must be even")
    return MLAShape(
        q_lora_rank=fields.count("q_lora_rank") if fields.get("q_lora_rank") is not None else None,
        kv_lora_rank=fields.count("kv_lora_rank"),
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=fields.count("v_head_dim"),
        interleaved=fields.flag("rope_interleave", default=True),
    )


def _mla_temperature(fields: Fields, rope: Rope) -> float:
    """What DeepSeek's models multiply q·k by, beside the usual: YaRN's temperature, squared."""
    scaling = _scaling(fields)
    if not isinstance(rope, YarnRope) or not scaling.get("mscale_all_dim"):
        return 1.0
    return _yarn_temperature(rope.factor, scaling.number("mscale_all_dim")) ** 2


def _experts(fields: Fields, named: ExpertFields, num_layers: int) -> tuple[MoEShape | None, ...]:
    """The experts of each layer; None where it is a plain MLP."""
    for name, only in (("mlp_bias", False), ("moe_layer_freq", 1)):
        if fields.get(name, only) != only:
            fields.refuse(name, f"is {fields.get(name)!r}; experts are supported with {only!r} only")
    count = next((name for name in named.count if fields.get(name) is not None), named.count[0])
    num_experts = fields.count(count, most=MAX_EXPERTS)
    num_groups, top_groups = _expert_groups(fields, named, num_experts)
    top_k = fields.count("num_experts_per_tok")
    if top_k > num_experts // num_groups * top_groups:
        fields.refuse(
            "num_experts_per_tok", f"is {top_k}; a token chooses among {num_experts // num_groups * top_groups} experts"
        )
    if named.normalize is False and fields.flag("norm_topk_prob"):
        fields.refuse("norm_topk_prob", "is true, which this architecture does not know; set it to false")
    routing = Routing(
        num_experts,
        top_k,
        scores=named.scores,
        normalize=fields.flag("norm_topk_prob") if named.normalize is None else named.normalize,
        scale=fields.number("routed_scaling_factor", default=1.0),
        num_groups=num_groups,
        top_groups=top_groups,
        wide=named.wide,
    )
    size, shared = fields.count(named.size), 0
    if named.shared == "gated":
        shared = fields.count("shared_expert_intermediate_size")
    elif named.shared == "counted":
        shared = size * fields.count("n_shared_experts", default=0, least=0, most=MAX_EXPERTS)
    shape = MoEShape(routing, size, shared, shared_gate=named.shared == "gated")
    return tuple(shape if sparse else None for sparse in _sparse_layers(fields, named, num_layers))


def _expert_groups(fields: Fields, named: ExpertFields, num_experts: int) -> tuple[int, int]:
    """How many groups the experts stand in, and how many of them a token uses."""
    methods = {"never": (None,), "asked": ("greedy", "group_limited_greedy"), "always": ("noaux_tc",)}[named.groups]
    method = fields.get("topk_method", methods[0])
    if named.groups != "never" and method not in methods:
        fields.refuse("topk_method", f"is {method!r:.40}; it must be {' or '.join(map(str, methods))}")
    if named.groups == "never" or method == "greedy":
        return 1, 1
    num_groups = fields.count("n_group", default=1)
    top_groups = fields.count("topk_group", default=1, most=num_groups)
    if num_experts % num_groups or (named.scores == "sigmoid" and num_groups > 1 and num_experts < 2 * num_groups):
        fields.refuse("n_group", f"is {num_groups}; {num_experts} experts do not divide into so many groups")
    return num_groups, top_groups


def _sparse_layers(fields: Fields, named: ExpertFields, num_layers: int) -> list[bool]:
    if named.dense == "first":
        first = fields.count("first_k_dense_replace", default=0, least=0)
        return [layer >= first for layer in range(num_layers)]
    if named.dense == "none":
        return [True] * num_layers
    step, plain = fields.count("decoder_sparse_step", default=1), fields.get("mlp_only_layers", [])
    if not isinstance(plain, list) or any(not isinstance(layer, int) or isinstance(layer, bool) for layer in plain):
        fields.refuse("mlp_only_layers", "must be a list of layers, counted from 0")
    return [layer not in plain and (layer + 1) % step == 0 for layer in range(num_layers)]


def _scaling(fields: Fields) -> Fields:
    """How the rotary embedding is stretched, in its old spelling or its new one."""
    return fields.nested("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")


def _rope(fields: Fields, head_dim: int, max_position: int) -> Rope:
    scaling = _scaling(fields)
    theta = (scaling if scaling.get("rope_theta") is not None else fields).number(
        "rope_theta", default=10000.0, above=1
    )
    partial = scaling if scaling.get("partial_rotary_factor") is not None else fields
    dim = int(head_dim * partial.number("partial_rotary_factor", default=1.0))
    if dim % 2 or not 0 < dim <= head_dim:
        fields.refuse("head_dim", f"is {head_dim}, of which {dim} elements are rotated; that must be an even number")
    # transformers lets the outer field, which phi3 has, win over the one beside the factors.
    outer = fields if fields.get("original_max_position_embeddings") is not None else scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(dim, theta)
    if kind == "linear":
        return LinearRope(dim, theta, scaling.number("factor"))

    original = outer.count("original_max_position_embeddings", default=max_position, least=2)
    if kind == "llama3":
        low = scaling.number("low_freq_factor")
        high = scaling.number("high_freq_factor", above=low)
        return Llama3Rope(dim, theta, scaling.number("factor"), low, high, original)
    if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in scaling.values):  # names phi3 has had
        factor = scaling.number("factor", default=max_position / original)
        stretch = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongRope(
            dim,
            theta,
            scaling.numbers("short_factor", dim // 2),
            scaling.numbers("long_factor", dim // 2),
            original,
            scaling.number("attention_factor", default=stretch),
        )
    if kind == "yarn":
        factor = scaling.number("factor")
        return YarnRope(
            dim,
            theta,
            factor,
            original,
            scaling.number("attention_factor", default=_yarn_scale(scaling, factor)),
            scaling.number("beta_fast", default=32.0),
            scaling.number("beta_slow", default=1.0),
            scaling.flag("truncate", default=True),
        )
    scaling.refuse("rope_type", f"is {kind!r}; it must be one of default, linear, llama3, yarn, longrope")


def _yarn_scale(scaling: Fields, factor: float) -> float:
    """YaRN's recommended temperature, with DeepSeek's `mscale` and `mscale_all_dim` where both are given."""
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        mscale, all_dim = scaling.number("mscale"), scaling.number("mscale_all_dim")
        return _yarn_temperature(factor, mscale) / _yarn_temperature(factor, all_dim)
    return _yarn_temperature(factor, 1.0)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _sliding_window(fields: Fields, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    if architecture.sliding_window == "all" and "sliding_window" not in fields.values:
        fields.refuse("sliding_window", "is missing; set it to the window's tokens, or to null for none")
    if architecture.sliding_window == "none" or fields.get("sliding_window") is None:
        return (None,) * num_layers
    if architecture.sliding_window != "all" and not fields.flag("use_sliding_window"):
        return (None,) * num_layers
    window = fields.count("sliding_window")
    if architecture.sliding_window in ("all", "used"):
        return (window,) * num_layers
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.count("max_window_layers", least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or any(t not in kinds for t in layer_types):
        fields.refuse("layer_types", f"must be a list of {num_layers} entries, each {' or '.join(kinds)}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.get(name, "float32")
    if dtype not in DTYPES:
        fields.refuse(name, f"is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return str(dtype)


def _eos_token_ids(*configs: Fields) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for fields in configs:
        value = fields.get("eos_token_id", [])
        several = value if isinstance(value, list) else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31 for id in several):
            fields.refuse("eos_token_id", f"is {value!r}; it must be a token id or a list of them")
        ids |= dict.fromkeys(several)
    return tuple(ids)
