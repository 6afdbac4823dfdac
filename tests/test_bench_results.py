"""Results of the bench commands in use: compared with another day's, kept in a bundle, drawn, held to an SLO."""

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import ServerProcess, kvtool
from hypothesis import given
from hypothesis import strategies as st

from commands import app
from commands.bench_charts import ablation_charts, throughput_charts
from kvtool.bench.bundle import repeat_script, repeatable, repeatable_variables
from kvtool.bench.events import RequestRecord
from kvtool.bench.timeline import Timeline
from kvtool.errors import ConfigError

LOAD = ("--prompt-tokens", "20", "--output-tokens", "4", "--requests", "4", "--concurrency", "2")
GATES = ("--fail-on", "ttft_ms.p50:10%", "--fail-on", "output_tok_s:-5%")


def throughput(
    server: ServerProcess, *options: str, load: tuple[str, ...] = LOAD
) -> "subprocess.CompletedProcess[str]":
    process = kvtool("bench-throughput", "--url", server.url, "--no-floor", *load, *options)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def bundle(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    done = throughput(server, "--bundle", str(folder), "--api-key", "hidden", "--slo", "e2e:60s")
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout  # of requests kept the SLO
    return folder


def scaled(bundle: Path, path: Path, ttft: float) -> str:
    """The bundle's result as if its TTFT had been so many times as long."""
    result = json.loads((bundle / "result.json").read_text())
    for row in result["rows"]:
        for trial in (row, *row["trials"]):
            trial["ttft_ms"] = {name: value * ttft for name, value in trial["ttft_ms"].items()}
            trial["output_tok_s"] /= 100  # whatever comes is faster
    path.write_text(json.dumps(result))
    return str(path)


def test_a_bundle_holds_what_was_measured_and_repeats_it(bundle: Path) -> None:
    assert {file.name for file in bundle.iterdir()} == {"result.json", "events.jsonl", "manifest.json", "repeat.sh"}
    result, manifest = (json.loads((bundle / name).read_text()) for name in ("result.json", "manifest.json"))
    assert len(result["rows"][0]["prompts_sha256"]) == 64
    assert result["environment"]["python"]
    assert "hidden" not in "".join(file.read_text() for file in bundle.iterdir())
    assert "--bundle" not in manifest["command"]
    script = (bundle / "repeat.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert all(word in script for word in (*LOAD, "result.json"))


def test_a_regression_exits_1_and_an_improvement_0(server: ServerProcess, bundle: Path, tmp_path: Path) -> None:
    for ttft, code, word in ((0.01, 1, "REGRESSION"), (100.0, 0, "No regression")):
        base = scaled(bundle, tmp_path / "base.json", ttft)
        done = throughput(server, "--compare", base, *GATES)
        assert done.returncode == code, done.stderr
        assert word in done.stdout


def test_what_is_forced_says_what_differs(server: ServerProcess, bundle: Path) -> None:
    done = throughput(server, "--compare", str(bundle / "result.json"), "--prompt-tokens", "21", "--force")
    assert done.returncode == 0, done.stderr
    assert "though not measured alike: workload.0.prompt: 20, now 21" in done.stdout
    assert "prompt 21" in done.stdout[done.stdout.index("Compared with") :]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--compare", "BASE", "--prompt-tokens", "21"), r"workload\.0\.prompt: 20, now 21"),
        (("--compare", "BASE", "--requests", "5"), "requests: 4, now 5"),
        (("--compare", "BASE", "--trials", "1", "--fail-on", "output_tok_s:-5%"), "--trials 3"),
        (("--compare", "BASE", "--fail-on", "ttfft:10%"), "ttfft"),
        (("--fail-on", "ttft_ms.p50:10%"), "add that"),
        (("--bundle", "."), "is not empty"),
        (("BASE",), "--plot"),
        (("--plot",), "name the result files"),
        (("--find-max-rate",), "--slo"),
        (("--find-max-rate", "--slo", "default", "--request-rate", "inf"), "begins at one rate"),
        (("--dataset", "gsm8k"), "--dataset-path"),
        (("--slo", "ttft:20"), "--slo"),
        (("--ablate", "nbits"), "leave out --url"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(bundle: Path, options: Any, word: str) -> None:
    words = [word.replace("BASE", str(bundle / "result.json")) for word in options]
    with pytest.raises(ConfigError, match=word):
        app(["bench-throughput", "--url", "http://127.0.0.1:9", *LOAD, *words], standalone_mode=False)


def test_a_base_of_another_command_is_refused_even_by_force(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rows of bench-ttft; its schema is kvtool\.bench-throughput/1"):
        app(["bench-ttft", "--compare", str(bundle / "result.json"), "--force"], standalone_mode=False)


def test_a_command_is_repeated_without_what_belongs_to_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["bench-ttft", "--api-key=k", "--output", "x.json", "--json", "--requests", "3", "--kv-plan", "p.yaml"]
    assert repeatable(words) == ["bench-ttft", "--requests", "3", "--kv-plan", str(Path("p.yaml").resolve())]
    words = ["bench-ttft", "--model", "tests", "--draft-model=tiny", "--kv-plan=p.yaml", "--profile", "traces"]
    whole = ["--model", str(Path("tests").resolve()), "--draft-model=tiny", f"--kv-plan={Path('p.yaml').resolve()}"]
    assert repeatable(words) == ["bench-ttft", *whole]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert repeatable(["--model", "tiny"]) == ["--model", "tiny"]  # the embedded one
    secrets = {"KVTOOL_KV_SECRET": "k", "KVTOOL_API_KEY": "k"}
    once = {"KVTOOL_OUTPUT": "x.json", "KVTOOL_BUNDLE": "b", "PATH": "/bin"}
    kept = {"KVTOOL_NBITS": "4", "KVTOOL_KV_PLAN": "p.yaml"}
    assert repeatable_variables(secrets | once | kept) == kept | {"KVTOOL_KV_PLAN": str(Path("p.yaml").resolve())}
    script = repeat_script(["bench-ttft", "--slo", "a b"], {"KVTOOL_NBITS": "4; echo"})
    assert "export KVTOOL_NBITS='4; echo'\n" in script
    assert "kvtool bench-ttft --slo 'a b' --compare" in script


@given(st.lists(st.tuples(st.floats(0, 2000), st.floats(0.001, 5)), min_size=1, max_size=60))
def test_gaps_over_time_are_kept_in_few_buckets(gaps: list[tuple[float, float]]) -> None:
    timeline = Timeline(width=0.05)
    for start, gap in gaps:
        timeline.add(
            RequestRecord(
                run=0,
                id=0,
                asked_tokens=2,
                scheduled=0.0,
                sent=0.0,
                chunk_times=[start, start + gap],
                chunk_kinds="tt",
                chunk_tokens=[1, 1],
                ended=start + gap,
            )
        )
    row = timeline.row()
    assert len(row["seconds"]) <= 512
    assert row["seconds"] == sorted(set(row["seconds"]))
    assert max(row["max_ms"]) == pytest.approx(1e3 * max(gap for _, gap in gaps))
    longest = max(gaps, key=lambda pair: pair[1])
    width = min((b - a for a, b in pairwise(row["seconds"])), default=math.inf)
    assert min(abs(second - sum(longest)) for second in row["seconds"]) <= width


def test_results_are_drawn_over_each_other(bundle: Path, tmp_path: Path) -> None:
    base, page = str(bundle / "result.json"), tmp_path / "page.html"
    namesake = scaled(bundle, tmp_path / "result.json", 2.0)
    process = kvtool("bench-throughput", "--plot", base, namesake, "--output", str(page))
    assert process.wait(timeout=60) == 0
    text = page.read_text()
    assert f"{base} TTFT p50" in text and f"{namesake} TTFT p50" in text
    assert text.count("<svg") >= 3
    assert "src=" not in text
    assert "Longest gap between tokens" in text


def test_a_line_goes_through_points_of_one_load() -> None:
    """Not from the last concurrency of one length of prompts to the first of the next."""

    def row(prompt: int, concurrency: int) -> dict[str, Any]:
        point = f"prompt {prompt}, output 16, concurrency {concurrency}"
        speed = float(prompt * concurrency)
        return {"point": point, "output_tok_s": speed, "ttft_ms": {"p50": speed}, "tpot_ms": {"p50": speed}}

    rows = [row(prompt, concurrency) for prompt in (64, 128) for concurrency in (1, 4)]
    curves, pareto, *_ = throughput_charts([("", rows)])
    assert {line.label: list(line.x) for line in curves.series} == {
        "prompt 64 TTFT p50": [64, 256],
        "prompt 64 TPOT p50": [64, 256],
        "prompt 128 TTFT p50": [128, 512],
        "prompt 128 TPOT p50": [128, 512],
    }
    assert [line.label for line in pareto.series] == ["prompt 64", "prompt 128"]
    curves, *_ = throughput_charts([("a", rows[:2]), ("b", rows[:2])])
    assert [line.label for line in curves.series] == ["a TTFT p50", "a TPOT p50", "b TTFT p50", "b TPOT p50"]
    curves, *_ = throughput_charts([("", rows[:2])])
    assert [line.label for line in curves.series] == ["TTFT p50", "TPOT p50"]


def test_settings_of_a_knob_can_be_told_apart_in_pictures() -> None:
    timeline = {"seconds": [0.0, 1.0], "kv_usage": [0.1, 0.2]}
    rows = [
        {"variant": name, "prompt_tokens": 8, "total_tok_s": speed, "timeline": timeline}
        for name, speed in (("16 bits", 2.0), ("w8a8", 3.0))
    ]
    (bars,) = ablation_charts("quantization", [("", rows)])
    assert (bars.kind, bars.x) == ("bar", "quantization")
    assert [(list(line.x), list(line.y)) for line in bars.series] == [(["16 bits", "w8a8"], [2.0, 3.0])]
    (usage,) = throughput_charts([("", rows)])
    assert [line.label for line in usage.series] == ["16 bits, 8 tokens", "w8a8, 8 tokens"]


def test_the_highest_rate_is_one_that_was_kept(server: ServerProcess) -> None:
    load = ("--prompt-tokens", "20", "--output-tokens", "2", "--requests", "6", "--trials", "1")
    search = ("--find-max-rate", "--slo", "ttft:150ms", "--request-rate", "60", "--json")
    done = throughput(server, *search, load=load)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    kept = [float(row["rate"]) for row in rows if row["kept"]]
    missed = [float(row["rate"]) for row in rows if not row["kept"]]
    assert (done.returncode == 0) == bool(kept)
    assert max(kept, default=0.0) < min(missed, default=1e9)
    for row in rows:
        keeps_up = row["requests_per_s"] >= 0.75 * float(row["rate"])
        assert row["kept"] == (row["attainment"]["ttft"] >= 0.9 and keeps_up)


def test_no_rate_is_found_that_was_not_served(server: ServerProcess) -> None:
    """A few requests at once keep a loose SLO at any rate, which would then go up without end."""
    load = ("--prompt-tokens", "20", "--output-tokens", "2", "--requests", "4", "--trials", "1")
    search = ("--find-max-rate", "--slo", "e2e:60s", "--request-rate", "1", "--json")
    done = throughput(server, *search, load=load)
    rows = json.loads(done.stdout)["rows"]
    assert any(not row["kept"] for row in rows)
    assert all(row["requests_per_s"] >= 0.75 * float(row["rate"]) for row in rows if row["kept"])
