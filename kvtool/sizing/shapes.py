"""What the layers of any model keep of a sequence, read from its config.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtool.kv.spec import StreamSpec
from kvtool.models.config import MAX_LAYERS
from kvtool.models.fields import Fields

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
KINDS = (FULL, SLIDING, CHUNKED, LINEAR)  # as `layer_types` of transformers' configs names them
WINDOWS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}  # where the tokens that a layer reads are told


@dataclass(frozen=True)
class ModelShape:
    """What a model keeps of a sequence, before any format.

    Attributes:
        name: what the user called it.
        num_layers: all of its layers.
        num_heads: query heads.
        head_dim: of a key head, less what MLA adds to it for positions; of counterfactual keys.
        value_dim: of a value head.
        scheme: "MHA", "GQA-n", "MQA" or "MLA".
        key, value: a token's streams in each layer; of MLA the rope key and the latent.
        windows: of each layer that keeps tokens, how many newest it reads at most; None: all.
        state_bytes: of a sequence in all layers that keep a state of fixed size instead of tokens.
    """

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    value_dim: int
    scheme: str
    key: StreamSpec
    value: StreamSpec
    windows: tuple[int | None, ...]
    state_bytes: int

    @property
    def has_latent(self) -> bool:
        return self.scheme == "MLA"


LayerKinds = Callable[[Fields, int], Sequence[str]]  # from a config and its number of layers to each layer's kind


def full(fields: Fields, num_layers: int) -> Sequence[str]:
    return [FULL] * num_layers


def windowed(fields: Fields, num_layers: int) -> Sequence[str]:
    """Mistral: `sliding_window`, where there is one, applies to all layers."""
    return [FULL if fields.get("sliding_window") is None else SLIDING] * num_layers


def switched(fields: Fields, num_layers: int) -> Sequence[str]:
    """Qwen3-MoE: it applies to all, where `use_sliding_window` says so."""
    return windowed(fields, num_layers) if fields.flag("use_sliding_window") else full(fields, num_layers)


def without_windows(fields: Fields, num_layers: int) -> Sequence[str]:
    """Qwen2-MoE: which layers have windows is not told by numbers that anybody ever wrote."""
    if fields.flag("use_sliding_window"):
        fields.refuse("layer_types", "is missing; with use_sliding_window it must say which layers have windows")
    return full(fields, num_layers)


def from_layer(fields: Fields, num_layers: int) -> Sequence[str]:
    """Qwen2: it applies from layer `max_window_layers` on, where `use_sliding_window` says so."""
    if not fields.flag("use_sliding_window"):
        return full(fields, num_layers)
    first = fields.count("max_window_layers", least=0)
    return [FULL if layer < first else SLIDING for layer in range(num_layers)]


def every(interval: int, others: str, field: str | None = None) -> LayerKinds:
    """Every so many layers, or as many as `field` says, one reads everything and the others are of another kind."""

    def kinds(fields: Fields, num_layers: int) -> Sequence[str]:
        n = fields.count(field, default=interval) if field else interval
        return [others if (layer + 1) % n else FULL for layer in range(num_layers)]

    return kinds


# The types of model that are known, and how those whose config has no `layer_types` tell what each layer is.
MODEL_TYPES: dict[str, LayerKinds] = {
    **dict.fromkeys(("llama", "gemma", "granite", "granitemoe", "olmo", "olmo2", "olmoe", "cohere", "stablelm"), full),
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "ernie4_5", "ernie4_5_moe", "seed_oss", "arcee", "apertus"), full),
    **dict.fromkeys(("phi", "opt", "gpt_neox", "helium", "minimax_m2", "qwen3_vl_text", "nemotron"), full),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"), full),  # MLA
    **dict.fromkeys(("mistral", "mixtral", "phi3", "phimoe", "starcoder2"), windowed),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text"), from_layer),
    "qwen2_moe": without_windows,
    "qwen3_moe": switched,
    "gemma2": every(2, SLIDING),
    "gpt_oss": every(2, SLIDING),
    "gemma3_text": every(6, SLIDING, "sliding_window_pattern"),
    "cohere2": every(4, SLIDING, "sliding_window_pattern"),
    "olmo3": every(4, SLIDING),
    "llama4_text": every(4, CHUNKED, "no_rope_layer_interval"),
    "qwen3_next": every(4, LINEAR, "full_attention_interval"),
}
HAVE_LATENTS = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
# What a type's configs leave out because transformers knows it; elsewhere a field that is needed must be there.
DEFAULTS: dict[str, dict[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64},
}
# Types without the field, or whose missing `num_key_value_heads` means one for each query head.
ONE_FOR_EACH = ("llama", "gpt_neox", "opt", "phi", "olmo", "olmo2", "cohere", "stablelm", "granite")


def read_shape(name: str, fields: Fields) -> ModelShape:
    """The shape of a model, from the fields of its config.json that tell it and no others.

    Raises:
        ModelError: such a field is missing or impossible, or says something that is not known here: nothing is guessed.
    """
    if fields.get("text_config") is not None:  # of a model that also sees or hears
        fields = fields.nested("text_config")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        fields.refuse("model_type", f"is {model_type!r:.60}; what its layers keep is not known, only that of {known}")
    defaults = DEFAULTS.get(model_type, {})
    num_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    num_heads = fields.count("num_attention_heads", default=defaults.get("num_attention_heads"))
    kinds = layer_kinds(fields, model_type, num_layers)
    windows = tuple(
        fields.count(WINDOWS[kind], default=defaults.get(WINDOWS[kind])) if kind in WINDOWS else None
        for kind in kinds
        if kind != LINEAR
    )
    state_bytes = kinds.count(LINEAR) * linear_state_bytes(fields) if LINEAR in kinds else 0
    if model_type in HAVE_LATENTS:
        key, value = StreamSpec(1, fields.count("qk_rope_head_dim")), StreamSpec(1, fields.count("kv_lora_rank"))
        head_dim, value_dim = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
        scheme = "MLA"
    else:
        num_kv_heads = fields.count(
            "num_key_value_heads",
            default=num_heads if model_type in ONE_FOR_EACH else defaults.get("num_key_value_heads"),
        )
        if num_heads % num_kv_heads:
            fields.refuse("num_key_value_heads", f"is {num_kv_heads}; it must divide num_attention_heads, {num_heads}")
        head_dim = value_dim = head_dim_of(fields, num_heads, defaults)
        key = value = StreamSpec(num_kv_heads, head_dim)
        scheme = scheme_of(num_heads, num_kv_heads)
    return ModelShape(name, num_layers, num_heads, head_dim, value_dim, scheme, key, value, windows, state_bytes)


def scheme_of(num_heads: int, num_kv_heads: int) -> str:
    """What attention is called whose query heads share so many key heads."""
    if num_kv_heads == num_heads:
        return "MHA"
    return "MQA" if num_kv_heads == 1 else f"GQA-{num_kv_heads}"


def layer_kinds(fields: Fields, model_type: str, num_layers: int) -> Sequence[str]:
    """The kind of each layer, one of `KINDS`."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return MODEL_TYPES[model_type](fields, num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        fields.refuse("layer_types", f"must be a list of {num_layers} entries, one for each layer")
    for layer, kind in enumerate(kinds):
        if kind not in KINDS:
            fields.refuse(
                f"layer_types[{layer}]", f"is {kind!r:.60}, an attention that is not known; known: {', '.join(KINDS)}"
            )
    # Qwen's switch turns windows off, whatever its layers are called.
    off = MODEL_TYPES[model_type] in (from_layer, switched, without_windows) and not fields.flag("use_sliding_window")
    return [FULL if off and kind == SLIDING else kind for kind in kinds]


def head_dim_of(fields: Fields, num_heads: int, defaults: dict[str, int]) -> int:
    if fields.get("head_dim") is not None or "head_dim" in defaults:
        return fields.count("head_dim", default=defaults.get("head_dim"))
    hidden_size = fields.count("hidden_size")
    if hidden_size % num_heads:
        fields.refuse(
            "hidden_size",
            f"is {hidden_size}; it must be a multiple of num_attention_heads, {num_heads}, or set head_dim",
        )
    return hidden_size // num_heads


def linear_state_bytes(fields: Fields) -> int:
    """Of a sequence in one layer of gated delta-net attention (Qwen3-Next): a float32 matrix for each value head, and
    the newest inputs of its convolution at 16 bits."""
    key_heads, key_dim = fields.count("linear_num_key_heads"), fields.count("linear_key_head_dim")
    value_heads, value_dim = fields.count("linear_num_value_heads"), fields.count("linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return 4 * value_heads * key_dim * value_dim + 2 * channels * fields.count("linear_conv_kernel_dim")


def count_parameters(fields: Fields) -> int:
    """Of a language model, counted in transformers' own, which is built without memory for them.

    Raises:
        ModelError: transformers cannot build it.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    if fields.get("text_config") is not None:
        fields = fields.nested("text_config")
    # Neither code that comes with the model, nor libraries that its makers had.
    unwanted = ("model_type", "auto_map", "quantization_config")
    values = {name: value for name, value in fields.values.items() if name not in unwanted and name[0] != "_"}
    model_type = fields.get("model_type")
    try:
        with torch.device("meta"):
            config = AutoConfig.for_model("deepseek_v3" if model_type == "kimi_k2" else model_type, **values)
            return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except (
        *(
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ),
        StrictDataclassError,
    ) as error:
        why = " ".join(str(error).split())
        fields.refuse("model_type", f"is {model_type!r}, whose weights transformers cannot count ({why:.200})")
