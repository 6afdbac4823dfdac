"""What Triton makes of kernels for GPUs that are not here, an RTX 4090 first; and where they run as they are."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}  # bytes that a program may use, by compute capability
STACK = 32  # bytes of a thread: so little the ptxas of Triton 3.9 puts there, where that of 3.6 puts nothing

INTERPRETED: bool = triton.knobs.runtime.interpret
ON_GPU = torch.cuda.is_available() and not INTERPRETED
runs = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing: test_compiled_kernels.py does")


class Driver:
    """Triton's, of a GPU of this compute capability that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and so on of a compiled kernel; what does not fit in registers is on the stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", listed)}


def compile_for(capability: int, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[Any]:
    """A list that every kernel launched from now on is compiled into; `modules` choose tiles by the capability."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kvtool.kernels import launch

    compiled: list[Any] = []

    def getitem(kernel: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(driver, "_active", Driver(capability))
    for module in (launch, *modules):
        monkeypatch.setattr(module, "capability", lambda device: capability // 10)
    monkeypatch.setattr(JITFunction, "__getitem__", getitem)
    return compiled


def check_fits(kernel: Any, capability: int = 89) -> None:
    """Within shared memory, and next to nothing on the stack."""
    used = usage(kernel.asm["cubin"])
    assert kernel.metadata.shared <= SHARED_MEMORY[capability], kernel.metadata
    assert used["STACK"] <= STACK and used["LOCAL"] == 0, (used, kernel.metadata, kernel.src.constants)


def check_compiled(
    launch: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capability: int = 89, *modules: ModuleType
) -> int:
    """Compile what `launch` would launch (`compile_for`), each kernel within its bounds; how many those are."""
    compiled = compile_for(capability, monkeypatch, *modules)
    launch()
    for kernel in compiled:
        check_fits(kernel, capability)
    return len(compiled)


def interpreter_off() -> dict[str, str]:
    """The environment of a process that compiles."""
    return os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
