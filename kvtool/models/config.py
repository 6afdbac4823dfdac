"""A model folder's config.json, read strictly: what is wrong with it is said in its own terms."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvtool.errors import ModelError
from kvtool.layers.rotary import LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from kvtool.models.architectures import ARCHITECTURES, Architecture

MAX_LAYERS, MAX_POSITIONS = 1024, 1 << 24  # beyond any model; tables are built before a weight is seen
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Attributes:
        model_type: a key of `ARCHITECTURES`.
        max_position: tokens of context, `max_position_embeddings` of the config.
        sliding_window: for each layer, how many tokens a query reads, itself included; None: all before it.
        tie_word_embeddings: the embedding doubles as output projection.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        dtype: of the checkpoint, one of `DTYPES`.
        eos_token_ids: ids that end an answer, from config.json and generation_config.json.
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
    sliding_window: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, and the end-of-text ids of generation_config.json where there is one.

    Fields mean what they mean in Hugging Face transformers, in its old spelling (`rope_theta`, `rope_scaling`,
    `torch_dtype`) and its new one (`rope_parameters`, `dtype`). Code that comes with a model is never run.

    Raises:
        ModelError: a file is missing or is no JSON, a field is missing or impossible, or the architecture is unknown.
    """
    fields = read_fields(folder / "config.json")
    architecture = _architecture(fields)
    if fields.get("quantization_config") is not None:
        fields.refuse("quantization_config", "says that the weights are quantised; use the original 16-bit checkpoint")
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", f"is {fields.get('hidden_act')!r}; only 'silu' is supported")

    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if fields.get("num_key_value_heads") is None:
        fields.refuse(
            "num_key_value_heads", "is missing; a GQA model needs it (or set it equal to num_attention_heads)"
        )
    num_kv_heads, num_layers = fields.count("num_key_value_heads"), fields.count("num_hidden_layers", most=MAX_LAYERS)
    if num_heads % num_kv_heads:
        fields.refuse(
            "num_attention_heads", f"is {num_heads}; it must be a multiple of num_key_value_heads, {num_kv_heads}"
        )
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse(
            "hidden_size",
            f"is {hidden_size}; it must be a multiple of num_attention_heads, {num_heads}, or set head_dim",
        )
    head_dim = fields.count("head_dim", default=hidden_size // num_heads)
    max_position = fields.count("max_position_embeddings", most=MAX_POSITIONS)
    attention_bias = architecture.config_biases and fields.flag("attention_bias")
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
        rope=_rope(fields, head_dim, max_position),
        sliding_window=_sliding_window(fields, architecture, num_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture.config_biases and fields.flag("mlp_bias"),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, folder / "generation_config.json"),
    )


@dataclass(frozen=True)
class Fields:
    """A JSON object whose every complaint names the file and the field.

    Attributes:
        prefix: how the object is reached in the file, "" at the top.
    """

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ModelError(f"{self.path}: {self.prefix}{name} {why}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, unchecked; null counts as absent."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer from `least` to `most`."""
        value = self._present(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(name, f"is {value!r:.40}; it must be an integer of at least {least} and at most {most}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0) -> float:
        """A finite number greater than `above`."""
        value = self._present(name, default)
        if not _is_number(value, above):
            self.refuse(name, f"is {value!r}; it must be a number above {above}")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of positive numbers, of a given length."""
        value = self._present(name, None)
        if not isinstance(value, list) or len(value) != length or not all(_is_number(item, 0) for item in value):
            self.refuse(
                name, f"must be a list of {length} positive numbers, one for every two rotated elements of a head"
            )
        return tuple(map(float, value))

    def flag(self, name: str) -> bool:
        """True or false; false where it is absent."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, f"is {value!r}; it must be true or false")
        return value

    def nested(self, name: str) -> "Fields":
        """The object under this name, empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, f"is {value!r}; it must be an object or null")
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            self.refuse(name, "is missing; add it, or download the file again")
        return value


def read_fields(path: Path) -> Fields:
    """The object in a JSON file.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        content = path.read_bytes()
        refuse_lfs_pointer(path, content)
        values = json.loads(content)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; --model takes a folder in the Hugging Face layout") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again")
    return Fields(path, values)


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Refuse a file that git left as a pointer, by its first bytes."""
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value <= sys.float_info.max


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


def _rope(fields: Fields, head_dim: int, max_position: int) -> Rope:
    scaling = fields.nested("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")
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
            scaling.flag("truncate") if scaling.get("truncate") is not None else True,
        )
    scaling.refuse("rope_type", f"is {kind!r}; it must be one of default, linear, llama3, yarn, longrope")


def _yarn_scale(scaling: Fields, factor: float) -> float:
    """YaRN's recommended temperature, with DeepSeek's `mscale` and `mscale_all_dim` where both are given."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling.number("mscale")) / scale(scaling.number("mscale_all_dim"))
    return scale(1.0)


def _sliding_window(fields: Fields, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    if architecture.sliding_window == "all" and "sliding_window" not in fields.values:
        fields.refuse("sliding_window", "is missing; set it to the window's tokens, or to null for none")
    if architecture.sliding_window == "none" or fields.get("sliding_window") is None:
        return (None,) * num_layers
    window = fields.count("sliding_window")
    if architecture.sliding_window == "all":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window"):
        return (None,) * num_layers
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


def _eos_token_ids(config: Fields, generation_config: Path) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for fields in (config, read_fields(generation_config)) if generation_config.exists() else (config,):
        value = fields.get("eos_token_id", [])
        several = value if isinstance(value, list) else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31 for id in several):
            fields.refuse("eos_token_id", f"is {value!r}; it must be a token id or a list of them")
        ids |= dict.fromkeys(several)
    return tuple(ids)
