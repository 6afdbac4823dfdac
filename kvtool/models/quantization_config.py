"""The `quantization_config` of a config.json, in the words of the tool that quantised the weights."""

from kvtool.models.fields import Fields
from kvtool.models.stored import StoredQuantization


def read_quantization(fields: Fields) -> StoredQuantization | None:
    """How the weights are quantised; None: they are not.

    Args:
        fields: of a config.json.

    Raises:
        ModelError: they are quantised in another way than `read_matrix` knows.
    """
    stored = fields.nested("quantization_config")
    if not stored.values:
        return None
    method = stored.get("quant_method")
    if method == "gptq":
        return _gptq(stored)
    if method == "awq":
        return _awq(stored)
    if method == "compressed-tensors":
        return _compressed_tensors(stored)
    stored.refuse("quant_method", f"is {method!r:.40}; it must be gptq, awq or compressed-tensors")


def _gptq(stored: Fields) -> StoredQuantization:
    _demand(stored, "bits", 4)
    formats = {"gptq": True, "gptq_v2": False}
    name = stored.get("checkpoint_format", "gptq")
    if name not in formats:
        stored.refuse("checkpoint_format", f"is {name!r:.40}; it must be {' or '.join(formats)}")
    _demand(stored, "pack_dtype", "int32", optional=True)
    return StoredQuantization("gptq", _group_size(stored, "group_size"), less_one=formats[name])


def _awq(stored: Fields) -> StoredQuantization:
    older = stored.get("bits") is None  # AutoAWQ's own names
    _demand(stored, "w_bit" if older else "bits", 4)
    version = stored.get("version", "gemm")
    if str(version).lower() != "gemm":
        stored.refuse("version", f"is {version!r:.40}; only the gemm packing is supported")
    return StoredQuantization("awq", _group_size(stored, "q_group_size" if older else "group_size"))


def _compressed_tensors(stored: Fields) -> StoredQuantization:
    """One scheme for all linear layers; those left out hold plain weights."""
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if stored.get(name):
            stored.refuse(name, "is set, which is not supported; weights and activations alone can be quantised")
    _demand(stored, "quantization_status", "compressed", optional=True)
    groups = stored.nested("config_groups")
    schemes = [_scheme(groups.nested(name), stored) for name in groups.values]
    if not schemes:
        stored.refuse("config_groups", "is missing or empty; it says how weights are quantised")
    if any(scheme != schemes[0] for scheme in schemes):
        stored.refuse("config_groups", "holds different schemes; one for all layers is supported")
    return schemes[0]


def _scheme(group: Fields, stored: Fields) -> StoredQuantization:
    weights, inputs = group.nested("weights"), group.nested("input_activations")
    bits, kind = weights.count("num_bits"), weights.get("type", "int")
    named = {"int4": "pack-quantized", "int8": "int-quantized", "float8": "float-quantized"}.get(f"{kind}{bits}")
    if named is None:
        weights.refuse("num_bits", f"is {bits} of type {kind!r:.40}; int of 4 or 8 and float of 8 bits are supported")
    form = group.get("format", stored.get("format"))
    if form not in (None, named):
        stored.refuse("format", f"is {form!r:.40}; {kind} of {bits} bits is supported as {named}")
    strategy, symmetric = weights.get("strategy"), weights.flag("symmetric", default=True)
    if bits == 4:
        if inputs.values:
            group.refuse("input_activations", "are quantised beside 4-bit weights, which is not supported")
        if strategy not in ("group", "channel"):
            weights.refuse("strategy", f"is {strategy!r:.40}; it must be group or channel")
        size = _group_size(weights, "group_size") if strategy == "group" else None
        return StoredQuantization("int4", size, has_zeros=not symmetric)
    if strategy not in ("channel", "tensor"):
        weights.refuse("strategy", f"is {strategy!r:.40}; it must be channel or tensor")
    if not symmetric:
        weights.refuse("symmetric", "is false; 8-bit weights are supported without zeros")
    if inputs.get("num_bits") != bits or inputs.get("type", "int") != kind or inputs.get("dynamic") is not True:
        inputs.refuse(
            "dynamic", f"must be true, for {bits} bits of type {kind}: activations are rounded token by token"
        )
    return StoredQuantization("int8" if kind == "int" else "fp8")


def _group_size(stored: Fields, name: str) -> int | None:
    """Columns that share a scale; None: all of a row."""
    if stored.get(name) == -1:
        return None
    size = stored.count(name)
    if size % 32:
        stored.refuse(name, f"is {size}; it must be a multiple of 32, or -1 for one group")
    return size


def _demand(stored: Fields, name: str, value: object, optional: bool = False) -> None:
    found = stored.get(name)
    if found != value and not (optional and found is None):
        stored.refuse(name, f"is {found!r:.40}; only {value} is supported")
