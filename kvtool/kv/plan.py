"""Plan files: the bits of each layer's keys and values, in KVTuner's YAML (arXiv:2502.04420), the rest in a sidecar."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import yaml

from kvtool.config import Bits, KVOptions
from kvtool.errors import ConfigError

BITS = ("16", "8", "4", "2", "fp8")
BIT_OPTIONS = ("nbits", "nbits_key", "nbits_value", "plan", "layer_bits")  # of KVOptions; a sidecar has no say in them
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """What goes with a plan, in `NAME.kvtool.json` beside `NAME.yaml`.

    Attributes:
        format: options that the plan was found under; no bits.
        provenance: what it was found on, and how.
        figures: what was measured under it.
    """

    format: KVOptions
    provenance: dict[str, Any]
    figures: dict[str, Any]
    schema: Literal["kvtool.plan/1"] = "kvtool.plan/1"


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a plan lies, if there is one."""
    return path.parent / f"{path.stem}.kvtool.json"


def completed(options: KVOptions) -> KVOptions:
    """`options`, those that are not given taken from their plan's sidecar.

    Raises:
        ConfigError: a sidecar that cannot be read.
    """
    if options.plan is None:
        return options
    file = sidecar_of(Path(options.plan))
    if not os.path.isfile(file):  # which says no to whatever is no path; reading the plan will say why
        return options
    try:
        content = file.read_bytes() if file.stat().st_size <= MAX_FILE_BYTES else b""
        found = msgspec.json.decode(content, type=Sidecar).format
    except OSError as error:
        raise ConfigError(f"plan {options.plan}: {file.name}: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"plan {options.plan}: {file.name} is no sidecar of a plan ({error}); remove it") from error
    given = {name: value for name, value in vars(options).items() if value is not None or name in BIT_OPTIONS}
    return KVOptions(**(vars(found) | given))


def write_plan(path: Path, bits: Sequence[tuple[Bits, Bits]], sidecar: Sidecar) -> None:
    """Write a plan and its sidecar, each whole or not at all.

    Raises:
        ConfigError: they cannot be written.
    """
    plan = {
        layer: {"nbits_key": _number(key), "nbits_value": _number(value)} for layer, (key, value) in enumerate(bits)
    }
    contents = {
        path: yaml.safe_dump(plan, sort_keys=False).encode(),
        sidecar_of(path): msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n",
    }
    for file, content in contents.items():
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.write_bytes(content)
            partial.replace(file)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; choose another file for the plan") from error


def load_plan(path: str, num_layers: int) -> list[tuple[Bits, Bits]]:
    """(key bits, value bits) of each layer from `{layer: {nbits_key: …, nbits_value: …}}`.

    Raises:
        ConfigError: an unreadable file, or one that does not give every layer bits that exist.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"plan {path}: is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no plan")
        plan = yaml.safe_load(content.decode())
    except OSError as error:
        raise ConfigError(f"plan {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"plan {path}: is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(plan, dict) or set(plan) != set(range(num_layers)):
        found = f"{len(plan)} entries" if isinstance(plan, dict) else "no mapping"
        raise ConfigError(f"plan {path}: needs one entry for each layer, 0 to {num_layers - 1}; found {found}")
    return [
        (_bits(path, plan[layer], layer, "nbits_key"), _bits(path, plan[layer], layer, "nbits_value"))
        for layer in range(num_layers)
    ]


def _bits(path: str, entry: object, layer: int, name: str) -> Bits:
    value = entry.get(name, "missing") if isinstance(entry, dict) else "missing"
    # A nested value is not spelled out: with YAML's aliases a few lines become gigabytes.
    # Nor is a long integer, which Python refuses to.
    is_short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 64)
    bits = str(value) if is_short else type(value).__name__
    if bits not in BITS:
        raise ConfigError(f"plan {path}: layer {layer}: {name} is {bits!r:.40}; must be one of {', '.join(BITS)}")
    return cast(Bits, bits)


def _number(bits: Bits) -> int | str:
    return bits if bits == "fp8" else int(bits)
