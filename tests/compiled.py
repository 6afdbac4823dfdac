"""What Triton makes of kernels for an RTX 4090, where there is none; and where they run as they are."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

SHARED_MEMORY = 99 * 1024  # bytes that a program may use on sm_89
STACK = 32  # bytes of a thread: so little the ptxas of Triton 3.9 puts there, where that of 3.6 puts nothing

INTERPRETED: bool = triton.knobs.runtime.interpret
ON_GPU = torch.cuda.is_available() and not INTERPRETED
runs = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing: test_compiled_kernels.py does")


class SM89:
    """Triton's driver of a GPU that is not here."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 89, 32)

    def get_current_device(self) -> int:
        return 0

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


def check_compiled(launch: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Compile for sm_89 what `launch` would launch, each kernel within its bounds; how many those are."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []

    def getitem(kernel: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(driver, "_active", SM89())
    monkeypatch.setattr(JITFunction, "__getitem__", getitem)
    launch()
    for kernel in compiled:
        used = usage(kernel.asm["cubin"])
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata
        assert used["STACK"] <= STACK and used["LOCAL"] == 0, (used, kernel.metadata, kernel.src.constants)
    return len(compiled)


def interpreter_off() -> dict[str, str]:
    """The environment of a process that compiles."""
    return os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
