"""`kvtool pd-disagg`, as typed: two engines in processes of their own, and what is said of them."""

import json
from typing import Any

import pytest
from conftest import kvtool

from kvtool.disagg.measure import Found, Outcome, break_even, line, percentiles
from kvtool.request import Handoff

SMALL = ("--dtype", "float64", "--prompt-tokens", "60,300", "--requests", "2", "--output-tokens", "6", "--decodes", "1")
STAGES = ["queue", "prefill", "transfer", "first_decode"]


def run(*options: str) -> tuple[int, str, str]:
    process = kvtool("pd-disagg", *options)
    stdout, stderr = process.communicate(timeout=240)
    return process.returncode, stdout, stderr


def test_stages_add_up_bytes_are_as_predicted_and_tokens_the_same(tmp_path):
    picture = tmp_path / "timeline.png"
    status, stdout, stderr = run(*SMALL, "--nbits", "4", "--json", "--output", str(picture))
    assert status == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    assert found["schema"] == "kvtool.pd-disagg/1"
    assert [row["request"] for row in found["rows"]] == ["0", "1", "2", "3"]
    for row in found["rows"]:
        assert list(row) == ["request", "ttft_ms", "stages_ms", "bytes_sent", "bytes_predicted", "outputs_match"]
        assert list(row["stages_ms"]) == STAGES and min(row["stages_ms"].values()) > 0
        assert row["ttft_ms"] - sum(row["stages_ms"].values()) >= 0
        assert 0 < row["bytes_sent"] - row["bytes_predicted"] < 8192
        assert row["outputs_match"] is True
    summary = found["summary"]
    assert (summary["losses"], summary["leaks"]) == (0, [])
    assert [row["bits"] for row in summary["formats"]] == ["16", "8", "4", "2"] * 2
    assert all(0 < row["num_bytes"] - row["predicted_bytes"] < 8192 for row in summary["formats"])
    assert summary["itl_ms"]["colocated"]["max"] > 0 < summary["itl_ms"]["disaggregated"]["max"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fault", ["kill-prefill", "kill-decode"])
def test_a_fault_costs_at_most_what_was_half_said(fault):
    status, stdout, stderr = run(*SMALL, "--fault", fault)
    assert status == 0, stderr
    assert "LEAK" not in stdout and "NO " not in stdout
    assert ("by the decode side alone" in stdout) == (fault == "kill-prefill")
    assert ("error: the engine ended before the answer did" in stdout) == (fault == "kill-decode")
    assert ("by the prefill side alone" in stdout) == (fault == "kill-decode")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt-tokens", "10,x"], "--prompt-tokens 10,x: write lengths"),
        (["--kv-transfer", "pigeon"], "--kv-transfer pigeon: must be one of auto, in-process"),
        (["--bake-off", "--fault", "drop"], "--bake-off and --fault do not go together"),
        (["--kv-transfer", "nccl"], "nccl: it moves memory of GPUs"),
        (["--prompt-tokens", "5000"], "--prompt-tokens 5000: with an answer of 16 it exceeds the context of 2048"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options, says):
    status, stdout, stderr = run(*options)
    assert (status, stdout) == (2, "") and says in stderr and stderr.count("\n") == 1


def test_stages_end_where_the_client_has_its_token():
    outcome = Outcome("a", 10, sent=1.0, first=2.0, handoff=Handoff(1.1, 1.5, 1.7, 1.98, 99))
    assert outcome.stages == pytest.approx(dict(zip(STAGES, (0.1, 0.4, 0.2, 0.28), strict=True)))
    found = Found()
    found.shared.outcomes.append(outcome)
    assert found.residual == pytest.approx(0.02)


def test_break_even_is_where_the_lines_cross():
    assert line([(10, 3.0), (20, 5.0)]) == pytest.approx((1.0, 0.2))
    assert line([(10, 3.0), (10, 5.0)]) == pytest.approx((0.0, 0.4))
    assert break_even([(10, 1.0), (20, 2.0)], [(10, 2.1), (20, 2.2)]) == pytest.approx(2 / 0.09)
    assert break_even([(10, 1.0)], [(10, 2.0)]) is None
    assert break_even([(10, 1.0)], [(10, 0.5)]) == 1.0


def test_percentiles_of_nothing_are_none():
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}
