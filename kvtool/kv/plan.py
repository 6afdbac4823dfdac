"""Plan files: the bits of each layer's keys and values, in KVTuner's YAML (arXiv:2502.04420)."""

from pathlib import Path
from typing import cast

import yaml

from kvtool.config import Bits
from kvtool.errors import ConfigError

BITS = ("16", "8", "4", "2", "fp8")


def load_plan(path: str, num_layers: int) -> list[tuple[Bits, Bits]]:
    """(key bits, value bits) of each layer from `{layer: {nbits_key: …, nbits_value: …}}`.

    Raises:
        ConfigError: an unreadable file, or one that does not give every layer bits that exist.
    """
    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--kv-plan {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--kv-plan {path}: is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(plan, dict) or set(plan) != set(range(num_layers)):
        found = f"{len(plan)} entries" if isinstance(plan, dict) else "no mapping"
        raise ConfigError(f"--kv-plan {path}: needs one entry for each layer, 0 to {num_layers - 1}; found {found}")
    return [
        (_bits(path, plan[layer], layer, "nbits_key"), _bits(path, plan[layer], layer, "nbits_value"))
        for layer in range(num_layers)
    ]


def _bits(path: str, entry: object, layer: int, name: str) -> Bits:
    value = entry.get(name, "missing") if isinstance(entry, dict) else "missing"
    # A nested value is not spelled out: with YAML's aliases a few lines become gigabytes.
    bits = str(value) if isinstance(value, str | int | float) else type(value).__name__
    if bits not in BITS:
        raise ConfigError(f"--kv-plan {path}: layer {layer}: {name} is {bits!r:.40}; must be one of {', '.join(BITS)}")
    return cast(Bits, bits)
