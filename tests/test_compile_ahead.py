"""Kernels compiled side by side before they are needed: all that steps launch, and nothing of it is run.

The steps are those of CUDA graphs. They run here on a CPU for a GPU that is not there, as none of their kernels does.
"""

from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiled import Driver, compiles
from triton.runtime import _async_compile, driver
from triton.runtime.jit import JITFunction

import kvtool.attention.triton_backend
import kvtool.cuda_graph
import kvtool.kernels.decode
import kvtool.kernels.gemv
import kvtool.kernels.prefill
import kvtool.kv.store
import kvtool.layers.linear
import kvtool.layers.norm
import kvtool.layers.rotary
import kvtool.runner
from kvtool.config import EngineConfig, KVOptions
from kvtool.kernels import launch
from kvtool.kernels.launch import Compilers, compiling
from kvtool.kernels.norm import add_rms_norm
from kvtool.kv.fixed import Room
from kvtool.memory import largest_step
from kvtool.runner import Runner

pytestmark = compiles
RUN = JITFunction.run


class Loading(Driver):
    """Triton's driver of an H200, which takes what is loaded for it."""

    def __init__(self) -> None:
        super().__init__(90)
        self.loaded: list[str] = []
        properties = {"max_shared_mem": 227 << 10}
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: properties)

    def _load(self, name: str, *rest: object) -> tuple[int, int, int, int, int]:
        self.loaded.append(name)
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, src: object, metadata: object) -> object:
        return self._run

    def _run(self, *args: object) -> None:
        raise AssertionError("it runs")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    """An H200 that is not here, for which nothing has been compiled."""
    there = Loading()
    monkeypatch.setattr(driver, "_active", there)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    nothing = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: nothing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    answers: dict[str, Any] = {
        "takes": lambda x: x.dtype != torch.float64,
        "runs_kernels": lambda device, dtype: True,
        "capability": lambda device: 9,
        "num_sms": lambda device: 132,
        "_not_here": lambda kv: None,
    }
    for module in (
        *(launch, kvtool.kernels.gemv, kvtool.kernels.decode, kvtool.kernels.prefill, kvtool.kv.store, kvtool.sampler),
        *(kvtool.attention.triton_backend, kvtool.layers.linear, kvtool.layers.norm, kvtool.layers.rotary),
    ):
        for name in answers.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, answers[name])
    yield there
    assert JITFunction.run is RUN and _async_compile.active_mode.get() is None


def norms(*sizes: int) -> None:
    """One kernel for each."""
    x = torch.ones(3, 4096, dtype=torch.bfloat16)
    for size in sizes:
        _, stream = add_rms_norm(x[:, :size].contiguous(), torch.zeros(3, size, dtype=x.dtype), x[0], 1e-6)
        assert not stream.any(), "it has run"


def test_all_that_steps_launch_is_compiled_and_loaded_once(gpu: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvtool.cuda_graph, "decode_sizes", lambda most: [1])
    monkeypatch.setattr(kvtool.runner, "prompt_rooms", lambda *limits: [Room(4, 128)])
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16",
        load_format="dummy",
        attention_backend="triton",
        kv=KVOptions(nbits="fp8"),
        kv_cache_memory=64 << 20,
        max_num_seqs=16,
        swap_space=0,
        cuda_graph=False,
    )
    runner, launched = Runner(config), list[str]()
    config = replace(config, cuda_graph=True)
    largest = largest_step(config, runner.format, 2048)

    def counting(kernel: Any, *args: Any, **options: Any) -> Any:
        launched.append(kernel.__name__)
        return RUN(kernel, *args, **options)

    with torch.inference_mode():
        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", counting)
            graphs = runner._graphs(config)
            assert graphs is not None
            runner._compile(config, graphs, largest)
        count = len(gpu.loaded)
        assert set(gpu.loaded) == set(launched)
        assert set(launched) >= {"_decode_kernel", "_prefill_kernel", "_largest", "_choose"}
        assert runner.compile_seconds > 0 and not runner.store.blocks.any()
        assert len(runner.model.layers) == 4
        with compiling(1):  # of all layers
            graphs.rehearse()
            runner._hidden_states(largest, None)
    assert len(gpu.loaded) == count < len(launched)


def test_what_is_compiled_ahead_is_found_when_it_is_launched(gpu: Loading) -> None:
    with compiling(2):
        norms(896, 512, 896, 512)
    assert gpu.loaded == ["_add_rms_norm"] * 2
    with pytest.raises(AssertionError, match="it runs"):
        norms(896)
    assert len(gpu.loaded) == 2


def test_a_kernel_that_does_not_compile_is_named(gpu: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(Loading, "launcher_cls", refuse)
    message = "the kernel _add_rms_norm does not compile: no C compiler"
    with pytest.raises(RuntimeError, match=message), compiling(1):
        norms(1024)


def test_who_is_interrupted_waits_for_no_compiler(gpu: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers, begun, let_go = Compilers(1), Event(), Event()

    def wait(*args: object) -> None:
        begun.set()
        assert let_go.wait(60)

    monkeypatch.setattr(launch, "Compilers", lambda *args: compilers)
    monkeypatch.setattr(Loading, "launcher_cls", wait)
    with pytest.raises(KeyboardInterrupt), compiling(1):
        norms(128, 256, 384)
        assert begun.wait(60)
        raise KeyboardInterrupt
    let_go.set()
    compilers.shutdown()
    assert gpu.loaded == ["_add_rms_norm"]  # which was being compiled
