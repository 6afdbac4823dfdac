"""Kernels compiled for a GPU that is not here, and what they need of it."""

import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}  # bytes that a program may use


class Driver:
    """Triton's, of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[Any]:
    """A list that every kernel launched from now on is compiled into; `modules` choose tiles by the capability."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kvtool.kernels import launch

    compiled: list[Any] = []
    monkeypatch.setattr(driver, "_active", Driver(capability))
    for module in (launch, *modules):
        monkeypatch.setattr(module, "capability", lambda device: capability // 10)
    monkeypatch.setattr(
        JITFunction,
        "__getitem__",
        lambda kernel, grid: lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options)),
    )
    return compiled


def check_fits(kernel: Any, capability: int) -> None:
    """Within shared memory, and nothing on the stack that does not fit in registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", listed)}
    assert kernel.metadata.shared <= SHARED_MEMORY[capability], kernel.metadata
    assert used["STACK"] == used["LOCAL"] == 0, (used, kernel.metadata, kernel.src.constants)
