"""bench-ttft and bench-throughput, as people and scripts call them."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ServerProcess, kvtool, serving

from commands import main
from kvtool.bench.null_server import null_server

# What the issue that asked for these commands says a row holds.
ROW = {"prompt_tokens", "concurrency", "requests", "failed", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "requests_per_s"}
ROW |= {"output_tok_s", "total_tok_s", "success_rate", "cached_tokens", "gpus", "floor_ms", "valid"}
FIGURES = {"mean", "min", "max", "p50", "p90", "p99"}
SECONDS = 240


Bench = Callable[..., tuple[str, str]]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs a command in this process, which has imported all that it needs, to an `expected` code: stdout, stderr."""

    def run(*arguments: str, expected: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["kvtool", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == expected, captured
        return captured.out, captured.err

    return run


@pytest.fixture
def rows(bench: Bench) -> Rows:
    """The rows of its JSON."""

    def run(*arguments: str, expected: int = 0) -> list[dict[str, Any]]:
        document = json.loads(bench(*arguments, "--json", expected=expected)[0])
        assert document["schema"] == f"kvtool.{arguments[0]}/1"
        assert document["environment"]["python"]
        found: list[dict[str, Any]] = document["rows"]
        return found

    return run


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.url


def test_ttft_of_our_own_engine_with_floor_and_share(rows: Rows) -> None:
    found = rows("bench-ttft", "--prompt-tokens", "10,200", "--requests", "2", "--kv-cache-memory", "16MiB")
    assert [row["prompt_tokens"] for row in found] == [10, 200]
    for row in found:
        assert row.keys() >= ROW and row["ttft_ms"].keys() == FIGURES
        assert (row["requests"], row["failed"], row["concurrency"], row["valid"]) == (2, 0, 1, True)
        assert row["tpot_ms"] is None and row["output_tokens_total"] == 2
        assert row["prompt_tokens_total"] == 2 * row["prompt_tokens"]
        assert row["floor_ms"] > 0 and row["floor_share"] == pytest.approx(row["floor_ms"] / row["ttft_ms"]["p50"])
        assert row["server_queue_ms"]["mean"] < row["ttft_ms"]["mean"]
        assert len(row["samples"]["ttft_ms"]) == 2
    assert found[0]["floor_ms"] < found[1]["floor_ms"]


def test_a_server_is_measured_kept_and_computed_again(url: str, tmp_path: Path, rows: Rows, bench: Bench) -> None:
    events, result = tmp_path / "events.jsonl", tmp_path / "result.json"
    load = ("--url", url, "--prompt-tokens", "20", "--output-tokens", "4,8", "--concurrency", "2", "--requests", "6")
    keep = ("--save-events", str(events), "--output", str(result), "--no-floor", "--flush-cache", "--trials", "2")
    stdout, stderr = bench("bench-throughput", *load, *keep)
    assert all(word in stdout for word in ("at once", "Latency, ms", "TPOT", "p99")) and stderr == ""
    found = json.loads(result.read_text())["rows"]
    assert [row["output_tokens"] for row in found] == [4, 8]
    for row in found:
        assert row.keys() >= ROW and row["tpot_ms"].keys() == row["itl_ms"].keys() == FIGURES
        assert (row["requests"], row["failed"], row["floor_ms"], row["valid"]) == (12, 0, None, True)
        assert row["output_tokens_total"] == 12 * row["output_tokens"]
        assert [trial["requests"] for trial in row["trials"]] == [6, 6]
        assert row["client"]["calibration"]["ttft_error_ms"]["p50"] >= 0
        assert row["server_metrics"]["vllm:generation_tokens_total"] == row["output_tokens_total"]
        assert row["kv_usage_peak"] is not None
        assert row["ttft_ms"]["p50"] + 3 * row["tpot_ms"]["min"] <= row["e2e_ms"]["max"]
    again = rows("bench-throughput", "--events", str(events))
    for row, before in zip(again, found, strict=True):
        same = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "requests", "output_tokens_total", "output_tokens")
        assert {name: row[name] for name in same} == {name: before[name] for name in same}
    theirs = rows("bench-throughput", "--events", str(events), "--metric-defs", "guidellm")
    assert theirs[0]["tpot_ms"]["p50"] > again[0]["tpot_ms"]["p50"]  # the first token counts there


def test_cached_prompts_that_should_be_new_are_no_result(url: str, rows: Rows) -> None:
    asked = ("bench-ttft", "--url", url, "--prompt-tokens", "150", "--requests", "2", "--no-floor", "--seed", "77")
    (first,) = rows(*asked)
    (again,) = rows(*asked, expected=1)
    assert (first["failures"], again["failures"], again["ttft_ms"]) == ({}, {"cached": 2}, None)
    assert "--flush-cache" in again["errors"][0]
    (flushed,) = rows(*asked, "--flush-cache")
    assert flushed["failed"] == 0
    (lenient,) = rows(*asked, "--max-error-rate", "1")
    assert lenient["failed"] == 2


def test_all_apis_stream_without_fault(url: str, rows: Rows, bench: Bench) -> None:
    for api in ("completions", "chat", "generate"):
        assert "No fault found." in bench("bench-ttft", "--url", url, "--api", api, "--lint-stream")[0]
    load = ("--concurrency", "2", "--prompt-tokens", "90", "--output-tokens", "3", "--seed", "5", "--no-floor")
    for api in ("chat", "generate"):
        (row,) = rows("bench-throughput", "--url", url, "--api", api, *load, "--trials", "1")
        assert (row["failed"], row["prompt_tokens_total"]) == (0, 90 * row["requests"])
    _, stderr = bench("bench-ttft", "--url", url, "--api", "chat", "--prompt-tokens", "9", "--no-floor", expected=2)
    assert "--prompt-tokens 9: the server's chat template alone takes 11" in stderr


def test_a_server_faster_than_its_card_is_invalid_and_one_with_odd_streams_is_told(tmp_path: Path, rows: Rows) -> None:
    shape = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    shape |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(shape | {"max_position_embeddings": 32768}))
    with null_server(0.0, 0.0) as url:
        asked = ("bench-ttft", "--url", url, "--floor-config", str(config), "--gpu", "RTX 4090:2")
        (row,) = rows(*asked, "--prompt-tokens", "500", expected=1)
        assert not row["valid"] and "faster than 2 × the datasheet of RTX 4090" in row["invalid"][0]
        assert row["floor_ms"] > row["ttft_ms"]["min"]
        faults = rows("bench-ttft", "--url", url, "--lint-stream", expected=1)
    assert any("unknown model" in fault["fault"] for fault in faults)
    assert any(fault["fault"].startswith("id is") for fault in faults)


class Picky(BaseHTTPRequestHandler):
    """A server that tells nothing of itself and takes ids below 5,000, as vLLM does for a small model."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chunk: dict[str, Any] = {"error": {"message": f"Token id {max(asked['prompt'])} is out of vocabulary"}}
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        if max(asked["prompt"]) < 5000:
            choices = [{"index": 0, "text": "x", "finish_reason": "length"}]
            chunk = {"id": "1", "object": "text_completion", "choices": choices, "usage": usage}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(chunk).encode())


def test_a_server_that_tells_no_vocabulary_is_asked_for_ids_that_it_takes(rows: Rows) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Picky) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (row,) = rows("bench-ttft", "--url", f"http://127.0.0.1:{server.server_port}", "--prompt-tokens", "50")
        server.shutdown()
    assert (row["failed"], row["requests"]) == (0, 5)


def test_a_server_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    with serving("--kv-cache-memory", "16MiB") as running:
        result, events = tmp_path / "result.json", tmp_path / "events.jsonl"
        load = ("--url", running.url, "--concurrency", "2", "--requests", "100000", "--output-tokens", "2")
        process = kvtool("bench-throughput", *load, "--no-floor", "--save-events", str(events), "--output", str(result))
        wait_for(lambda: events.exists() and events.stat().st_size > 4096, process)
        os.kill(running.process.pid, signal.SIGKILL)
        stdout, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "no longer answers" in stdout
    (row,) = json.loads(result.read_text())["rows"]
    assert row["partial"] and row["requests"] > row["failed"] > 0
    assert row["ttft_ms"] is not None and row["failures"]["connect"] >= 8


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    result, events = tmp_path / "result.json", tmp_path / "events.jsonl"
    with null_server(0.01, 0.001) as url:
        load = ("--url", url, "--requests", "100000", "--concurrency", "2")
        keep = ("--save-events", str(events), "--output", str(result))
        process = kvtool("bench-throughput", *load, *keep, start_new_session=True)
        wait_for(lambda: events.exists() and events.stat().st_size > 4096, process)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, stderr
    (row,) = json.loads(result.read_text())["rows"]
    assert row["partial"] and row["failed"] == 0 and row["requests"] > 4
    assert "partial" in stdout and "Traceback" not in stderr


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_batches_beside_transformers(rows: Rows) -> None:
    lengths = ("--prompt-tokens", "8", "--output-tokens", "4", "--batch-sizes", "1,3", "--kv-cache-memory", "16MiB")
    found = rows("bench-throughput", "--offline", *lengths, "--baseline", "transformers", "--no-floor", "--trials", "1")
    assert [(row["engine"], row["batch_size"]) for row in found] == [
        ("kvtool", 1), ("kvtool", 3), ("transformers", 1), ("transformers", 3),
    ]  # fmt: skip
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert ours["ratio"] == pytest.approx(ours["output_tok_s"] / theirs["output_tok_s"])
        assert ours["output_tokens_total"] == theirs["output_tokens_total"] == 4 * ours["batch_size"]
        assert ours["memory_mib"] > 50 and theirs["memory_mib"] > 50
        assert ours["tpot_ms"]["p50"] > 0 and theirs["tpot_ms"]["p50"] > 0


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["bench-ttft", "--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: cannot be reached"),
        (["bench-ttft", "--url", "ftp://here"], "is no address of a server"),
        (["bench-ttft", "--prompt-tokens", "10,many"], "--prompt-tokens: 'many'"),
        (["bench-ttft", "--extra-body", "[1]", "--url", "x"], "--extra-body"),
        (["bench-ttft", "--gpu", "H200"], "add --url"),
        (["bench-ttft", "--output", "/nowhere/x.json"], "/nowhere"),
        (["bench-ttft", "--save-events", "/nowhere/x.jsonl"], "--save-events /nowhere/x.jsonl"),
        (["bench-ttft", "--events", "pyproject.toml"], "pyproject.toml, line 1"),
        (["bench-throughput", "--concurrency", "1,zero"], "--concurrency 1,zero"),
        (["bench-throughput", "--batch-sizes", "4"], "add it"),
        (["bench-throughput", "--offline", "--url", "http://127.0.0.1:9"], "leave out --url"),
        (["bench-throughput", "--request-rate", "fast"], "fast"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], complaint: str, bench: Bench) -> None:
    stdout, stderr = bench(*arguments, expected=2)
    assert stdout == ""
    assert complaint in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_what_a_server_has_not_is_said_before_it_is_asked(url: str, bench: Bench) -> None:
    _, stderr = bench("bench-ttft", "--url", url, "--model", "nope", expected=2)
    assert "--model nope" in stderr and "tiny" in stderr
    _, stderr = bench("bench-ttft", "--url", url, "--prompt-tokens", "4000", "--no-floor", expected=2)
    assert "--prompt-tokens 4000" in stderr and "2,048" in stderr
