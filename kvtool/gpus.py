"""NVIDIA's GPUs by name: what their datasheets promise, and the memory that the driver finds on them."""

import re
from dataclasses import dataclass

from kvtool.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """One card.

    Attributes:
        bytes_per_s: of its memory.
        flops16, flops8: dense tensor FLOP/s on 16-bit and on 8-bit operands.
        cache_bytes: its last-level cache.
        memory_bytes: all of it, as `nvidia-smi` tells it (datasheets round).
    """

    bytes_per_s: float
    flops16: float
    flops8: float
    cache_bytes: int
    memory_bytes: int


MIB = 1 << 20
GPUS: dict[str, GPU] = {
    "B200": GPU(8.0e12, 2.25e15, 4.5e15, 126 * MIB, 183_359 * MIB),
    "H200": GPU(4.8e12, 989e12, 1979e12, 50 * MIB, 143_771 * MIB),
    "H100 NVL": GPU(3.94e12, 989e12, 1979e12, 50 * MIB, 95_830 * MIB),  # before the one whose name is part of its own
    "H100": GPU(3.35e12, 989e12, 1979e12, 50 * MIB, 81_559 * MIB),
    "A100": GPU(2.04e12, 312e12, 624e12, 40 * MIB, 81_920 * MIB),
    "L40S": GPU(864e9, 366e12, 733e12, 96 * MIB, 46_068 * MIB),
    "L4": GPU(300e9, 121e12, 242e12, 48 * MIB, 23_034 * MIB),
    "RTX 5090": GPU(1.792e12, 419e12, 838e12, 96 * MIB, 32_607 * MIB),
    "RTX 4090": GPU(1.01e12, 330e12, 661e12, 72 * MIB, 24_564 * MIB),
    "RTX 3090 Ti": GPU(1.008e12, 160e12, 320e12, 6 * MIB, 24_564 * MIB),
    "RTX 3090": GPU(936e9, 142e12, 284e12, 6 * MIB, 24_576 * MIB),
    "RTX A6000": GPU(768e9, 155e12, 310e12, 6 * MIB, 49_140 * MIB),
}


def find_gpu(name: str) -> tuple[str, GPU] | None:
    """The entry that the driver's name of a card, or part of that, stands for; None where the card is not known."""
    words = name.lower().replace("-", " ").replace("_", " ")
    for known, gpu in GPUS.items():
        if re.search(rf"\b{known.lower()}\b", words) or known.lower() == f"rtx {words}":
            return known, gpu
    return None


def asked_gpu(option: str, name: str) -> tuple[str, GPU]:
    """What `find_gpu` finds of an option that names one card; how many of it there are say other options.

    Raises:
        ConfigError: it is not known, or a number follows its name.
    """
    if ":" in name:
        raise ConfigError(f"{option} {name}: name one GPU; --tp says how many share the model")
    if (found := find_gpu(name)) is None:
        raise ConfigError(f"{option} {name}: must be one of {', '.join(GPUS)}")
    return found
