"""Profiles of steps: whose time is whose, against painting every microsecond; real traces of real engines."""

import ast
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, error_line
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.profiling import GAPS, OTHER, OURS, kind_of, step_times
from kvtool.request import SamplingParams

KERNELS = Path(__file__).parents[1] / "kvtool" / "kernels"
NAMES = ["aten::linear", "aten::copy_", "kvtool::seal", "aten::mul_", "_decode_kernel", "Memcpy HtoD"]

# As CUPTI names them on GPUs, and where they belong.
ELSEWHERE = {
    "nvjet_tst_128x64_64x8_2x1_v_bz_TNT": "GEMM",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off": "GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>": "GEMM",
    "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, 7, true>": "GEMM",
    "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false, false>>": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 32, 4, false, false>>": "attention",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "void one_shot_all_reduce_kernel<c10::BFloat16, 16, 8>": "communication",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": OTHER,
    "Memcpy HtoD (Pinned -> Device)": OTHER,
}


def event(name: str, category: str, start: int, end: int) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": float(start), "dur": float(end - start)}


def painted(owners: list[str | None]) -> dict[str, float]:
    """Seconds of each class, given whose every microsecond is."""
    kinds = [GAPS if owner is None else owner for owner in owners]
    return {kind: kinds.count(kind) / 1e6 for kind in set(kinds)}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.sampled_from(NAMES)), min_size=1, max_size=12))
def test_a_kernel_has_the_time_that_none_before_it_has(drawn: list[tuple[int, int, str]]) -> None:
    kernels = [event(name, "kernel", start, start + length) for start, length, name in drawn]
    ranges = [event("kvtool::attention", "gpu_user_annotation", 0, 100), event("aten::linear", "cpu_op", 0, 100)]
    times = step_times([*ranges, *kernels])
    in_order = sorted(kernels, key=lambda kernel: (kernel["ts"], -kernel["dur"]))
    first, last = int(in_order[0]["ts"]), int(max(k["ts"] + k["dur"] for k in kernels))
    owners = [
        next((kind_of(k["name"]) for k in in_order if k["ts"] <= at < k["ts"] + k["dur"]), None)
        for at in range(first, last)
    ]
    assert times.parts == pytest.approx(painted(owners))
    assert times.total == pytest.approx((last - first) / 1e6)
    assert times.others.keys() <= {"aten::copy_", "Memcpy HtoD"}


def nested(rng: random.Random, start: int, end: int, kind: str, owners: list[str | None]) -> list[dict[str, Any]]:
    """Operators between two times, and in turn what they call; `owners` gets the class of each microsecond."""
    found = []
    while end - start > 2 and rng.random() < 0.8:
        start = rng.randint(start, end - 2)
        stop = rng.randint(start + 1, end)
        name = rng.choice(NAMES)
        own = kind_of(name) if kind == OTHER or name.startswith(OURS) else kind
        owners[start:stop] = [own] * (stop - start)
        found += [event(name, "cpu_op", start, stop), *nested(rng, start, stop - 1, own, owners)]
        start = stop
    return found


@given(st.integers(0, 10**6))
def test_an_operator_has_the_time_of_those_it_calls(seed: int) -> None:
    owners: list[str | None] = [None] * 80
    operators = nested(random.Random(seed), 0, 80, OTHER, owners)
    random.Random(seed).shuffle(operators)
    if not operators:
        assert step_times(operators).parts == {}
        return
    first, last = int(min(o["ts"] for o in operators)), int(max(o["ts"] + o["dur"] for o in operators))
    parts = {kind: seconds for kind, seconds in step_times(operators).parts.items() if abs(seconds) > 1e-12}
    assert parts == pytest.approx(painted(owners[first:last]))


def test_every_kernel_of_ours_has_a_class() -> None:
    launched = set()
    for path in KERNELS.glob("*.py"):
        called = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        launched |= {ast.unparse(what.value) for what in called if isinstance(what, ast.Subscript)}
    for path in KERNELS.glob("*.cu"):
        launched |= set(re.findall(r"__global__.*?(\w+)\($", path.read_text(), re.MULTILINE))
    assert {"_decode_kernel", "paged_decode", "_seal"} <= launched
    assert {name for name in launched if kind_of(name) == OTHER} == set()


@pytest.mark.parametrize("name, kind", ELSEWHERE.items())
def test_kernels_of_others_have_their_class(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profiled_engine_says_the_same_and_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    kv = KVOptions(nbits="4")
    plain, traced = (
        Engine(EngineConfig(kv=kv, kv_cache_memory=1 << 22, max_num_seqs=1, profile=folder)).generate(
            ["Once upon"], params
        )
        for folder in (None, str(tmp_path / "new" / "folder"))
    )
    assert plain == traced
    said = capsys.readouterr().err
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == [f"rank0-step{first}.json" for first in (1, 16, 4, 64)]
    for file in files:
        times = step_times(json.loads(file.read_bytes())["traceEvents"])
        assert sum(times.parts.values()) == pytest.approx(times.total)
        assert {"attention", "GEMM", "sampling", "norm, rope, write", GAPS} <= times.parts.keys()
        assert times.parts[OTHER] < 0.2 * times.total
        assert str(file) in said
    assert "weights 21.6MiB, KV codes 3.4MiB, scales and zeros" in said


def test_each_rank_traces_its_own_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Followers collect steps in another thread than they launch them in, and leave the table to the first."""
    engine = Engine(EngineConfig(tp=2, kv_cache_memory=1 << 22, max_num_seqs=1, profile=str(tmp_path)))
    engine.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=14, ignore_eos=True))
    engine.close()
    assert {file.name for file in tmp_path.iterdir()} == {f"rank{r}-step{s}.json" for r in (0, 1) for s in (1, 4)}
    for file in tmp_path.iterdir():
        times = step_times(json.loads(file.read_bytes())["traceEvents"])
        assert {"communication", "GEMM", "attention"} <= times.parts.keys()
    assert capsys.readouterr().err.count("profile of steps") == 2


def test_what_scores_text_is_profiled(command: Command, tmp_path: Path) -> None:
    """And two models in one folder have files of their own."""
    options = ("--max-tokens", "520", "--window", "130", "--max-num-batched-tokens", "130", "--nbits", "4", "--json")
    for number in ("", "-2"):
        status, out, err = command("perplexity", *options, "--profile", str(tmp_path))
        assert status == 0 and json.loads(out)["config"]["engine"]["profile"] == str(tmp_path)
        assert (tmp_path / f"scoring-step1{number}.json").exists()
        assert "  attention " in err and "  seal " in err
        assert "scales and zeros 0" not in err, "whichever store ends first, that of 4 bits is open, too"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["perplexity", "--profile", "{file}"], "--profile {file}: "),
        (["bench-ttft", "--url", "http://127.0.0.1:1", "--profile", "{folder}"], "--profile: traces our own engine"),
    ],
)
def test_bad_input_is_one_line(
    command: Command,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "file").touch()
    names = {"file": tmp_path / "file", "folder": tmp_path}
    assert said.format(**names) in error_line(command(*(argument.format(**names) for argument in arguments)))
