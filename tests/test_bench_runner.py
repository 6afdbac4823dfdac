"""A workload on its way: sent when it should be, as many at once as allowed, in order, and with nothing lost."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kvtool.bench.client import HttpTarget
from kvtool.bench.events import EventLog, RequestRecord, Run, WorkItem, read_events
from kvtool.bench.measure import How, Seen, recompute
from kvtool.bench.metrics import Figures
from kvtool.bench.null_server import null_server
from kvtool.bench.runner import LOST_AFTER, Progress, run
from kvtool.bench.selfcheck import calibrate
from kvtool.errors import ConfigError

DELAY, GAP, TOKENS = 0.03, 0.004, 6


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with null_server(DELAY, GAP) as url:
        yield url


def items(count: int, **fields: object) -> list[WorkItem]:
    return [WorkItem(**({"id": n, "prompt": [1, 2, 3], "output_tokens": TOKENS} | fields)) for n in range(count)]  # type: ignore[arg-type]


def send(url: str, asked: list[WorkItem], **options: object) -> tuple[list[RequestRecord], Progress]:
    async def main() -> tuple[list[RequestRecord], Progress]:
        target, records = HttpTarget(url), list[RequestRecord]()
        progress = await run(target, asked, records.append, **options)  # type: ignore[arg-type]
        await target.close()
        return records, progress

    return asyncio.run(main())


def test_cache_hits_that_only_counters_tell_of_are_a_fault(url: str) -> None:
    """vLLM says nothing of cached tokens in its answers, unless it was started to."""
    counted = {"vllm:prefix_cache_hits_total": 48.0}

    def found(asked: list[WorkItem], counted: dict[str, float]) -> list[str]:
        seen = Seen(How())
        for record in send(url, list(seen.ask(asked)))[0]:
            seen.add(record)
        return seen.hidden_hits(counted)

    (fault,) = found(items(2), counted)
    assert "48 tokens of new prompts" in fault
    assert found(items(2), {"vllm:prefix_cache_hits_total": 0.0}) == found(items(2), {}) == []
    assert found([*items(1), *items(1, unique=False)], counted) == []


def test_no_time_is_shorter_than_it_was(url: str) -> None:
    records, progress = send(url, items(40), concurrency=8)
    assert [record.failure for record in records] == [None] * 40
    assert {record.id for record in records} == set(range(40))
    for record in records:
        assert record.first_token is not None and record.first_token - record.sent >= DELAY
        assert record.ended - record.sent >= DELAY + (TOKENS - 1) * GAP
        assert (record.chunk_kinds, record.prompt_tokens, record.output_tokens) == ("t" * TOKENS, 3, TOKENS)
    figures = Figures()
    for record in records:
        figures.add(record)
    assert figures.ttft.quantiles([0.5])[0] < DELAY * 1e3 + 20  # a busy machine's
    assert progress.most_running == 8 and progress.running == 0
    slots = [(record.sent, 1) for record in records] + [(record.ended, -1) for record in records]
    running = 0
    for _, change in sorted(slots):
        running += change
        assert running <= 8


def test_requests_go_out_when_they_are_due_whatever_the_answers_do(url: str) -> None:
    asked = [WorkItem(id=n, prompt=[1], output_tokens=50, scheduled=n * 0.02) for n in range(15)]
    records, progress = send(url, asked)
    for record in records:
        assert record.scheduled == pytest.approx(record.id * 0.02, abs=1e-6)
        assert record.sent >= record.scheduled
    assert progress.most_running >= 8  # an answer takes longer than ten gaps between them
    assert progress.send_lags.count == 15


def test_at_most_so_many_of_those_that_are_due(url: str) -> None:
    records, progress = send(url, items(6, scheduled=0.0), concurrency=1)
    waited = sorted(record.sent - record.scheduled for record in records)
    assert waited[-1] > 5 * DELAY  # in the latency from the schedule, and no lag of the client's
    assert progress.most_running == 1
    assert progress.send_lags.quantiles([0.5])[0] < DELAY * 1e3


def test_turns_follow_their_answers_and_carry_what_was_said(url: str) -> None:
    asked = [
        WorkItem(id=3 * s + turn, prompt=[9] * 5, output_tokens=TOKENS, session=str(s), turn=turn, think_seconds=0.02)
        for s in range(3)
        for turn in range(3)
    ]
    records, _ = send(url, asked, concurrency=2)
    for session in "012":
        turns = sorted((r for r in records if r.session == session), key=lambda record: record.turn)
        assert [record.prompt_tokens for record in turns] == [5, 10 + TOKENS, 15 + 2 * TOKENS]
        assert all(b.sent >= a.ended + 0.02 for a, b in pairwise(turns))


def test_nothing_is_sent_after_the_time_is_up(url: str) -> None:
    records, _ = send(url, items(1000), concurrency=2, duration=0.3)
    assert 2 <= len(records) < 50
    assert max(record.sent for record in records) < 0.4


def test_a_target_that_goes_ends_the_run() -> None:
    async def main() -> tuple[list[RequestRecord], Progress]:
        records: list[RequestRecord] = []
        with null_server(DELAY, GAP) as url:
            target = HttpTarget(url)
            work = asyncio.create_task(run(target, items(100_000), records.append, concurrency=4))
            while len(records) < 12:
                await asyncio.sleep(0.01)
        return records, await work

    records, progress = asyncio.run(main())
    assert progress.lost and not progress.interrupted
    assert sum(record.failure is None for record in records) >= 12
    assert LOST_AFTER <= sum(record.failure == "connect" for record in records) <= LOST_AFTER + 4


def test_a_run_that_is_cancelled_keeps_what_it_has(url: str) -> None:
    async def main() -> tuple[list[RequestRecord], Progress]:
        target, records = HttpTarget(url), list[RequestRecord]()
        work = asyncio.create_task(run(target, items(100_000), records.append, concurrency=4))
        while len(records) < 8:
            await asyncio.sleep(0.01)
        work.cancel()
        progress = await work
        await target.close()
        return records, progress

    records, progress = asyncio.run(main())
    assert progress.interrupted
    assert all(record.failure is None for record in records)
    assert progress.sent - len(records) <= 4


def test_a_log_gives_the_same_figures_again(url: str, tmp_path: Path) -> None:
    path, figures = tmp_path / "events.jsonl", {name: Figures(name) for name in ("kvtool", "vllm", "guidellm")}
    with EventLog.create(path) as log:
        log.write(Run(id=0, point={"concurrency": 4}))
        for record in send(url, items(20), concurrency=4)[0]:
            log.write(record)
            for each in figures.values():
                each.add(record)
    for name, each in figures.items():
        assert recompute(path, name) == [{"concurrency": 4} | each.row()]
    path.write_bytes(path.read_bytes() + b'{"type": "request", "run": 0}\n')
    with pytest.raises(ConfigError, match="line 22"):
        list(read_events(path))


def test_a_calibration_says_what_the_client_adds() -> None:
    calibration = asyncio.run(calibrate(16))
    assert 0 <= calibration.ttft_error_ms["p50"] <= calibration.ttft_error_ms["p99"] < 1000
    assert calibration.chunks_per_s > 500
