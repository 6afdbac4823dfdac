"""How kernels are launched on the GPU at hand."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# As when a kernel is decorated. The interpreter knows no assembly, and rounds nothing to e4m3.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@cache
def capability(device: torch.device) -> int:
    """Major compute capability, as tables of tiles know it: 8 stands for sm_89, and for machines without a GPU."""
    return min(9, torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 8


@cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_kib(device: torch.device) -> int:
    """Memory that the programs of an SM share, as tables of tiles know it: 100 stands for machines without a GPU."""
    if device.type != "cuda":
        return 100
    return 228 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 228 << 10 else 100


def num_splits(rows: int, num_blocks: int, has_tail: bool, programs: int) -> int:
    """Programs that share one sequence and KV head: no more than run at once, or the last would run alone."""
    return max(1, min(num_blocks + has_tail, programs // rows))


def power_of_2(number: int) -> int:
    """The smallest that is not below `number`, 1 or more. Triton's own takes the host as long as a part of a launch."""
    return 1 << (number - 1).bit_length()


@triton.constexpr_function
def next_power_of_2(number):
    return triton.next_power_of_2(number)


def chained(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that starts while the one before it in the stream still runs, where the GPU can (sm_90).

    It must `await_inputs` before it reads or writes what others do, so that only its start overlaps with their end.
    """
    return {"CHAINED": True, "launch_pdl": True} if capability(device) >= 9 else {"CHAINED": False}


class Compilers(ThreadPoolExecutor):
    """Threads that compile and load Triton's kernels for the current device.

    Most of that is the work of LLVM, of ptxas and, for what launches a kernel, of a C compiler, none of which holds
    Python's lock. So no processes are needed but theirs.
    """

    def __init__(self, threads: int) -> None:
        # A thread begins with the first device.
        use_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else ()
        super().__init__(threads, "compiler", *use_device)

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        """As `triton.AsyncCompileMode` calls it."""
        return super().submit(_loaded, compile_kernel)


def _loaded(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    _ = kernel.run  # which loads it
    return kernel


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Compile what is launched inside, in so many threads, and run none of it: what kernels would write stays as it is.

    Raises:
        RuntimeError: a kernel does not compile. The rest is not waited for, nor is it when the caller is interrupted.
    """
    run, compilers = JITFunction.run, Compilers(threads)
    names: dict[triton.FutureKernel, str] = {}
    mode = triton.AsyncCompileMode(compilers)

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if isinstance(compiled, triton.FutureKernel):
            names[compiled] = kernel.__name__

    JITFunction.run = compile_only
    try:
        with mode:
            try:
                yield
                for compiled, name in names.items():
                    _finish(compiled, name)
            finally:
                compilers.shutdown(wait=False, cancel_futures=True)
                mode.raw_futures.clear()  # which it would wait for, those that are cancelled for ever
    finally:
        JITFunction.run = run


def _finish(kernel: triton.FutureKernel, name: str) -> None:
    """Wait for a kernel, and have it found when it is launched."""
    try:
        kernel.result()
    except Exception as error:
        raise RuntimeError(f"the kernel {name} does not compile: {error}") from error


@triton.jit
def await_inputs(CHAINED: tl.constexpr, START_NEXT: tl.constexpr = True):
    """Wait until the kernels before have written all; the next one may start meanwhile."""
    if CHAINED:
        if START_NEXT:
            start_next(CHAINED)
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(CHAINED: tl.constexpr):
    """Let the next kernel start as soon as all programs have said so, or ended."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointer, nbytes):
    """Ask for so much memory, whole 16 bytes, to come to the L2 cache. From sm_90 on."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointer.to(tl.int64), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
