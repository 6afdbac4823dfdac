"""Kernels compiled before they are needed: what all layers of all steps launch, and nothing of it is run.

The steps are those of CUDA graphs. They run here on a CPU for a GPU that is not there, as none of their kernels does.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiled import Driver, compiles
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kvtool.attention.triton_backend
import kvtool.cuda_graph
import kvtool.kernels.gemv
import kvtool.kernels.norm
import kvtool.kernels.prefill
import kvtool.kernels.rope
import kvtool.kernels.sampling
import kvtool.kv.store
import kvtool.runner
from kvtool.config import EngineConfig, KVOptions
from kvtool.kernels import launch
from kvtool.kv.fixed import Room
from kvtool.runner import Runner, largest_step

KERNELS = kvtool.kernels
LAYERS = kvtool.layers


class Event:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is an H200."""
    monkeypatch.setattr(driver, "_active", Driver(90))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    answers: dict[str, Any] = {
        "takes": lambda x: x.dtype != torch.float64,
        "runs_kernels": lambda device, dtype: True,
        "capability": lambda device: 9,
        "_num_sms": lambda device: 132,
        "_not_here": lambda kv: None,
    }
    for module in (
        *(launch, KERNELS.gemv, KERNELS.decode, KERNELS.prefill, kvtool.attention.triton_backend, kvtool.kv.store),
        *(LAYERS.linear, LAYERS.norm, LAYERS.rotary, kvtool.sampler),
    ):
        for name, answer in answers.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, answer)


@compiles
def test_all_that_steps_launch_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(kvtool.cuda_graph, "decode_sizes", lambda most: [1])
    monkeypatch.setattr(kvtool.cuda_graph, "prompt_rooms", lambda most, tokens: [Room(4, 128)])
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16",
        load_format="dummy",
        attention_backend="triton",
        kv=KVOptions(nbits="4"),
        kv_cache_memory=64 << 20,
        max_num_seqs=16,
        swap_space=0,
        cuda_graph=False,
    )
    runner, compiled, launched = Runner(config), list[str](), list[str]()
    compile_, run = JITFunction._do_compile, JITFunction.run

    def noting(kernel: Any, key: str, *rest: Any) -> Any:
        compiled.append(kernel._fn_name)
        return compile_(kernel, key, *rest)

    def counting(kernel: Any, *args: Any, **options: Any) -> Any:
        launched.append(kernel._fn_name)
        assert options["warmup"], "it would run"
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    monkeypatch.setattr(JITFunction, "run", counting)
    with torch.inference_mode():
        graphs = runner._graphs(replace(config, cuda_graph=True))
        assert graphs
        largest = largest_step(config, runner.format, 2048)
        runner._compile(graphs, largest, threads=2)
        few, count = len(launched), len(compiled)
        assert {name.split(".")[-1] for name in compiled} >= {"_decode_kernel", "_prefill_kernel", "_seal", "_largest"}
        assert runner.compile_seconds > 0 and not runner.store.blocks.any()
        assert len(runner.model.layers) == 4
        with launch.compiling(1):  # all layers
            graphs.rehearse()
            runner._hidden_states(largest, None)
    assert len(compiled) == count < few < len(launched)
