"""Where kernels are interpreted, those tests that compile them run in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled import INTERPRETED, interpreter_off

TESTS = ("kernels", "prefill_kernel", "fused_kernels", "sampling_kernel", "mla_kernels", "moe_kernels")
TESTS += ("w8a8_kernels", "compile_ahead")


@pytest.mark.skipif(not INTERPRETED, reason="they are compiled where they are tested")
def test_kernels_compile() -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "compile", *files]
    repository = Path(__file__).parents[1]
    done = subprocess.run(command, env=interpreter_off(), capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
