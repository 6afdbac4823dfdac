"""Kernels in CUDA C++ built for a CPU, on which `warp_emulator.cpp` runs a GPU's threads."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from kvtool.kernels import nvrtc

KERNELS = Path(nvrtc.__file__).parent
_FOLDER = TemporaryDirectory(prefix="kvtool-emulator-")


@cache
def build(source: str, kernel: str, macros: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    """`kernel` of the file `source`, compiled with `macros`."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = Path(_FOLDER.name) / f"{len(list(Path(_FOLDER.name).iterdir()))}.so"
    defined = [f"-D{name}={value}" for name, value in (*macros, ("KERNEL", kernel), ("SOURCE", f'"{source}"'))]
    flags = ["-O1", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{KERNELS}", *defined]
    subprocess.run(["g++", *flags, "-o", library, Path(__file__).with_name("warp_emulator.cpp")], check=True)
    return ctypes.CDLL(str(library))


def launch(library: ctypes.CDLL, grid: tuple[int, int], arguments: Sequence[object], seed: int) -> None:
    """As `nvrtc.Kernel` does; `seed` draws the order of programs, and whether copies come at once or late."""
    values = [nvrtc.pointer(x) if x is None or isinstance(x, torch.Tensor) else x for x in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))  # type: ignore[arg-type]
    library.run(*grid, addresses, seed)


def merged(partial: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """What `kernels.decode.merge` makes of programs' results [n, heads, splits, D] and [n, heads, splits]."""
    return (partial.double() * (lse.double() * 0.6931471805599453).softmax(-1)[..., None]).sum(2)
