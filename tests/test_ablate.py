"""Knobs that are turned: every setting is one the engine takes, and the arithmetic beside them."""

import json
from itertools import pairwise

import pytest
from conftest import kvtool
from hypothesis import given
from hypothesis import strategies as st

from commands import app
from kvtool.bench import ablate
from kvtool.bench.ablate import FORMATS, KNOBS, format_scores, kv_allocation, stack, with_ratio
from kvtool.bench.events import WorkItem
from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError
from kvtool.kv.format import resolve
from kvtool.kv.spec import KVSpec, StreamSpec

SPEC = KVSpec(2, StreamSpec(2, 128), StreamSpec(2, 128), 2)
requests = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 50)), min_size=1, max_size=5)


@given(requests, st.sampled_from([16, 64]), st.sampled_from([None, 400, 1000]))
def test_allocation_is_counted_step_by_step(lengths: list[tuple[int, int]], block: int, context: int | None) -> None:
    items = [WorkItem(id=n, prompt=[1] * prompt, output_tokens=output) for n, (prompt, output) in enumerate(lengths)]
    longest = max(prompt + output for prompt, output in lengths)
    stored = contiguous = growing = paged = 0
    for prompt, output in lengths:
        capacity = 1
        for held in range(prompt, prompt + output + 1):
            while capacity < held:
                capacity *= 2
            stored += held
            contiguous += context or longest
            growing += capacity
            paged += block * len(range(0, held, block))
    rows = {row["variant"]: row for row in kv_allocation(items, block, context)}
    assert {row["stored"] for row in rows.values()} == {stored}
    reserved = {name: row["reserved"] for name, row in rows.items()}
    assert reserved == {"contiguous": contiguous, "growing": growing, "paged": paged}


def test_allocation_is_counted_of_lengths_that_vary(capsys: pytest.CaptureFixture[str]) -> None:
    """Where all requests are alike, a contiguous cache wastes nothing."""
    options = ["--ablate", "kv-allocation", "--max-model-len", "600", "--json"]
    app(["bench-throughput", *options], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    contiguous, growing, paged = (row["utilization"] for row in document["rows"])
    assert contiguous < growing < paged < 1
    assert document["rows"][0]["requests"] == 1000
    assert document["config"]["workload"][0]["prompt"].startswith("lognormal")


def test_allocation_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        kv_allocation([], 64)


@pytest.mark.parametrize("knob", FORMATS)
def test_the_settings_of_a_format_knob_differ_and_can_be_stored(knob: str) -> None:
    user = KVOptions(nbits_key="8", nbits_value="2") if knob == "nbits" else KVOptions()
    variants = KNOBS[knob](EngineConfig(kv=user))
    resolved = [resolve(engine.kv, SPEC) for engine in variants.values()]
    assert len(resolved) == len(set(map(repr, resolved))) >= 2


@pytest.mark.parametrize("knob", sorted(KNOBS.keys() - FORMATS))
def test_the_first_setting_of_another_knob_is_the_default(knob: str) -> None:
    first, *others = KNOBS[knob](EngineConfig()).values()
    assert first == EngineConfig()
    assert EngineConfig() not in others


def test_weights_are_scored_against_those_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "SCORED_TOKENS", 2048)
    variants = KNOBS["quantization"](EngineConfig(kv=KVOptions(nbits="8")))
    scores = format_scores({name: variants[name] for name in ("16 bits", "fp8", "w4a16")})
    assert 0 < scores["16 bits"]["kld_mean"] < 1e-4 < scores["fp8"]["kld_mean"] < scores["w4a16"]["kld_mean"]


def test_a_cpu_runs_nothing_twice() -> None:
    """Rows of equal engines would differ all the same, as if something had been gained."""
    load = ("--prompt-tokens", "20", "--output-tokens", "2", "--requests", "2", "--trials", "1", "--concurrency", "1")
    process = kvtool("bench-throughput", "--ablate", "cuda-graph", *load, "--device", "cpu")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "left out: off: on a CPU the same as on" in stdout


def test_each_step_of_the_stack_changes_one_thing() -> None:
    steps = list(stack(EngineConfig(max_num_batched_tokens=512)).values())
    for before, after in pairwise(steps):
        assert sum(value != vars(after)[name] for name, value in vars(before).items()) == 1
    assert steps[-1].kv.nbits == "4"


def test_rows_are_held_against_the_first() -> None:
    first = {"ttft_ms": {"p50": 10.0}, "tpot_ms": None, "total_tok_s": 50.0}
    row = {"ttft_ms": {"p50": 5.0}, "tpot_ms": {"p50": 1.0}, "total_tok_s": 75.0}
    assert with_ratio(row, first)["ratio"] == {"ttft": 0.5, "tpot": None, "total_tok_s": 1.5}


def test_a_prefix_cache_is_seen_to_hit() -> None:
    load = ("--prompt-tokens", "300", "--output-tokens", "2", "--requests", "2", "--trials", "1", "--concurrency", "1")
    process = kvtool("bench-throughput", "--ablate", "prefix-cache", *load, "--kv-cache-memory", "32MiB", "--json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    on, off = json.loads(stdout)["rows"]
    assert (on["variant"], off["variant"]) == ("on", "off")
    assert on["hit_rate"] == pytest.approx(128 / 300)  # two blocks of the 150 tokens that are shared
    assert off["hit_rate"] == 0
    assert on["ratio"]["ttft"] == 1.0
