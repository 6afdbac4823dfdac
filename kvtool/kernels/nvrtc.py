"""CUDA C++ compiled when it is first needed, by the NVRTC that comes with torch, and launched through the driver."""

import ctypes
import hashlib
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def source(*names: str) -> str:
    """Of a kernel in these files of this folder, and in those that they include, behind what all kernels use."""
    return "".join(map(_text, ("words.cuh", "warp.cuh", *names)))


def _text(name: str) -> str:
    text = (Path(__file__).parent / name).read_text()
    return re.sub(r'^#include "(.+)"$', lambda included: _text(included[1]), text, flags=re.MULTILINE)


def compile_cubin(source: str, architecture: str, constants: dict[str, object]) -> bytes:
    """Machine code of `source` for "sm_90" and the like, with `constants` as macros. Needs no GPU.

    It is kept where Triton keeps what it has compiled.
    """
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={x}" for name, x in constants.items())]
    kept = get_cache_manager(hashlib.sha256(repr((_version(), flags, source)).encode()).hexdigest())
    if found := kept.get_file("kvtool.cubin"):
        return Path(found).read_bytes()
    cubin = _compile(source, flags)
    kept.put(cubin, "kvtool.cubin")
    return cubin


def _compile(source: str, flags: Sequence[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kvtool.cu", 0, None, None), "NVRTC")
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), options)
        if failed:
            raise RuntimeError(f"NVRTC refused a kernel: {_read(nvrtc, program, 'ProgramLog').decode()}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _version() -> tuple[int, int]:
    """Of NVRTC, and of the CUDA that it comes with."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "NVRTC")
    return major.value, minor.value


def refuses_to_compile() -> str | None:
    """Why there is no NVRTC, or None if there is."""
    try:
        _nvrtc()
    except OSError as error:
        return f"NVRTC does not load: {error}"
    return None


class Kernel:
    """The kernel `name` of a compiled module, on the current device; `shared_bytes` is a constant of that module.

    Args:
        carveout: percent of a multiprocessor's memory that is no cache but shared; -1 leaves it to the driver.

    Attributes:
        programs_per_sm: how many run at once on a multiprocessor.
    """

    def __init__(self, cubin: bytes, name: str, threads: int, carveout: int = 100) -> None:
        driver, module, self._function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        self._context = _context(torch.cuda.current_device())
        _check(driver.cuCtxSetCurrent(self._context), "CUDA")
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "CUDA")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), "CUDA")
        address, size, shared = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_int()
        found = driver.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, b"shared_bytes")
        _check(found, "CUDA")
        _check(driver.cuMemcpyDtoH_v2(ctypes.byref(shared), address, size), "CUDA")
        _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared.value), "CUDA")
        _check(driver.cuFuncSetAttribute(self._function, _SHARED_CARVEOUT, carveout), "CUDA")
        self._threads, self._shared = threads, shared.value
        resident, size = ctypes.c_int(), ctypes.c_size_t(shared.value)
        count = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        _check(count(ctypes.byref(resident), self._function, threads, size), "CUDA")
        self.programs_per_sm = resident.value

    def __call__(self, grid: tuple[int, int], arguments: Sequence[Any], *, chained: bool) -> None:
        """Launch on the current stream; `arguments` are ctypes values, tensors for their addresses, None for null."""
        _check(_driver().cuCtxSetCurrent(self._context), "CUDA")
        values = [pointer(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(_STREAM_SERIALIZATION, 0, 1)
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(*grid, 1, self._threads, 1, 1, self._shared, stream, ctypes.pointer(attribute), int(chained))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "CUDA")


@cache
def load(
    source: str,
    name: str,
    device: torch.device,
    macros: tuple[tuple[str, object], ...],
    features: str = "",
    **options: int,
) -> Kernel:
    """The kernel `name` of `source` on this device, compiled when it is first asked for.

    Args:
        macros: what it is compiled with, WARPS among them.
        features: of its architecture alone, that it uses: "a" for those of sm_90a.
        options: of `Kernel`.
    """
    architecture = "sm_{}{}{}".format(*torch.cuda.get_device_capability(device), features)
    cubin = compile_cubin(source, architecture, dict(macros))
    with torch.cuda.device(device):
        return Kernel(cubin, name, 32 * int(dict(macros)["WARPS"]), **options)


@cache
def _context(device: int) -> ctypes.c_void_p:
    """The device's primary context, torch's too, which stays as long as the process.

    A thread has none until it makes one current, and torch, where it need not ask the driver, does not do so.
    """
    driver, handle, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuInit(0), "CUDA")
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), "CUDA")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "CUDA")
    return context


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Where `x` lies; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _check(error: int, whose: str) -> None:
    if error:
        raise RuntimeError(f"{whose} error {error}")


@cache
def _nvrtc() -> ctypes.CDLL:
    """That of torch's CUDA, which lies among the packages that torch came with, or where the linker finds it."""
    name = "libnvrtc.so." + (torch.version.cuda or "*").split(".")[0]
    found = [path for folder in sys.path for path in sorted(Path(folder).glob(f"nvidia/*/lib/{name}"))]
    return ctypes.CDLL(str(found[0]) if found else name.removesuffix(".*"))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
