"""CUDA C++ that is compiled at run time, in processes that do nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled import ON_GPU

from kvtool.kernels import nvrtc

COUNT = """
extern "C" __constant__ const int shared_bytes = 0;
extern "C" __global__ void count(int* out) { out[threadIdx.x] = threadIdx.x; }
"""


def test_what_does_not_compile_is_named() -> None:
    if reason := nvrtc.refuses_to_compile():
        pytest.skip(reason)
    assert nvrtc.compile_cubin(COUNT, "sm_90", {}).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r"NVRTC refused a kernel: .*nowhere"):
        nvrtc.compile_cubin(COUNT.replace("= threadIdx.x", "= nowhere"), "sm_90", {})


def test_what_was_compiled_once_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := nvrtc.refuses_to_compile():
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cubin, compiled = nvrtc.compile_cubin(COUNT, "sm_90", {"N": 1}), list[str]()
    monkeypatch.setattr(nvrtc, "_compile", lambda source, flags: compiled.append(source) or b"other")
    assert nvrtc.compile_cubin(COUNT, "sm_90", {"N": 1}) == cubin and not compiled
    others = (COUNT, "sm_90", {"N": 2}), (COUNT, "sm_89", {"N": 1}), (COUNT + " ", "sm_90", {"N": 1})
    assert [nvrtc.compile_cubin(*other) for other in others] == [b"other"] * 3 and len(compiled) == 3


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_any_thread_loads_and_launches() -> None:
    """Before the process has asked a GPU for anything, and in threads for which nobody has made a context current."""
    program = f"""
import torch
from concurrent.futures import ThreadPoolExecutor
from kvtool.kernels.nvrtc import Kernel, compile_cubin

def elsewhere(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()

cubin = compile_cubin({COUNT!r}, "sm_{{}}{{}}".format(*torch.cuda.get_device_capability()), {{}})
elsewhere(lambda: Kernel(cubin, "count", 32))
out = torch.full((32,), -1, dtype=torch.int32, device="cuda")
kernel = elsewhere(lambda: Kernel(cubin, "count", 32))
elsewhere(lambda: kernel((1, 1), [out], chained=False))
torch.cuda.synchronize()
assert out.tolist() == list(range(32))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
