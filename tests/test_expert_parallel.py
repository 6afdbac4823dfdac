"""`kvtool moe-ep`: placements and loads against brute force, and all ways to spread a layer in real processes."""

import json
import os
import signal
import time
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import Command, beginning_with, children, error_line, kvtool
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError, ModelError
from kvtool.expert_parallel.exchange import Clock, Grouped, Ranks, Variant, Work, dense_loop
from kvtool.expert_parallel.layer import LayerShape, mix_loop, random_experts, read_layer
from kvtool.expert_parallel.placement import Placement, balanced, in_order, load_of
from kvtool.expert_parallel.routing import make_routing
from kvtool.expert_parallel.worker import Job, timed
from kvtool.models.resolve import resolve_config

CPU = torch.device("cpu")
SMALL = LayerShape(hidden_size=32, intermediate_size=16, num_experts=6, top_k=2)


@pytest.mark.parametrize("here", [range(6), range(2, 5), range(0, 1)])
def test_experts_mix_what_a_loop_over_tokens_mixes(here: range) -> None:
    routing = make_routing("zipf", 40, SMALL, seed=3)
    experts = random_experts(SMALL, here, 0, torch.float32, CPU)
    x = torch.randn(40, 32)
    ids = torch.where((routing.ids >= here.start) & (routing.ids < here.stop), routing.ids - here.start, len(here))
    expected = torch.zeros(40, 32, dtype=torch.float64)
    for token, (row, weights) in enumerate(zip(ids.tolist(), routing.weights.double(), strict=True)):
        for expert, weight in zip(row, weights, strict=True):
            if expert < len(here):
                gate, up = (experts.gate_up[expert].double() @ x[token].double()).chunk(2)
                mixed = gate / (1 + (-gate).exp()) * up
                expected[token] += weight * (experts.down[expert].double() @ mixed)
    for mixed in (mix_loop(x, experts, ids, routing.weights), experts(x, ids, routing.weights)):
        torch.testing.assert_close(mixed.double(), expected, rtol=1e-4, atol=1e-5)


def test_an_expert_is_the_same_wherever_it_stands() -> None:
    whole, part = (random_experts(SMALL, which, 7, torch.float32, CPU) for which in (range(6), (4, 1, 4)))
    assert part.gate_up.equal(whole.gate_up[[4, 1, 4]]) and part.down.equal(whole.down[[4, 1, 4]])


loads = st.lists(st.floats(0, 100), min_size=2, max_size=12)


@given(loads, st.integers(1, 4), st.integers(0, 3))
def test_every_expert_has_a_slot_and_every_rank_as_many(loads: list[float], num_ranks: int, more: int) -> None:
    num_slots = (-(-len(loads) // num_ranks) + more) * num_ranks
    placement = balanced(loads, num_slots, num_ranks)
    assert set(placement.experts) == set(range(len(loads)))
    assert len(placement.experts) == num_slots == placement.slots_per_rank * num_ranks
    copies = [placement.experts.count(expert) for expert in range(len(loads))]
    # No expert is left with more work for each of its slots than another had before it got its last one.
    assert all(
        loads[i] / copies[i] <= loads[j] / (copies[j] - 1) + 1e-9
        for i in range(len(loads)) for j in range(len(loads)) if copies[j] > 1
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=6, max_size=6))
def test_ranks_are_about_as_even_as_they_can_be(loads: list[int]) -> None:
    placement = balanced(loads, 6, 2)
    busiest = max(sum(loads[expert] for expert in placement.of_rank(rank)) for rank in range(2))
    best = min(max(sum(order[:3]), sum(order[3:])) for order in permutations(loads))
    assert busiest <= 4 / 3 * best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 3]), st.booleans())
def test_loads_are_those_that_are_counted(seed: int, num_ranks: int, is_balanced: bool) -> None:
    ids = make_routing("zipf", 12, SMALL, seed).ids
    counts = ids.flatten().bincount(minlength=6).tolist()
    placement = balanced(counts, 6 + num_ranks, num_ranks) if is_balanced else in_order(6, num_ranks)
    slots = placement.slots(ids)
    assert [[placement.experts[slot] for slot in row] for row in slots.tolist()] == ids.tolist()
    load = load_of(slots, placement)
    work, local, at_home, remote_rows = [0] * num_ranks, 0, 0, 0
    for token, row in enumerate(slots.tolist()):
        home, to = token * num_ranks // 12, [slot // placement.slots_per_rank for slot in row]
        for rank in to:
            work[rank] += 1
        local += to.count(home)
        at_home += home in to
        remote_rows += len(set(to) - {home})
    assert load.rank_imbalance == pytest.approx(max(work) / (24 / num_ranks))
    assert (load.local_pairs, load.local_tokens) == pytest.approx((local / 24, at_home / 12))
    assert (load.remote_pairs, load.remote_rows) == (24 - local, remote_rows)


def test_copies_of_an_expert_share_its_tokens() -> None:
    placement = Placement((0, 1, 0, 2), 2)
    ids = torch.tensor([[0]] * 100)
    assert placement.slots(ids).flatten().bincount().tolist() == [50, 0, 50]


@pytest.mark.parametrize("kind", ["uniform", "zipf", "zipf:2"])
def test_drawn_experts_of_a_token_differ(kind: str) -> None:
    shape = LayerShape(8, 8, 16, 4)
    routing, again, other = (make_routing(kind, 500, shape, 5, draw) for draw in (0, 0, 1))
    assert all(len(set(row)) == 4 for row in routing.ids.tolist())
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(500))
    assert routing.ids.equal(again.ids) and not routing.ids.equal(other.ids)
    counts, others = (r.ids.flatten().bincount(minlength=16) for r in (routing, other))
    if kind != "uniform":  # other tokens want the same experts
        assert counts.argmax() == others.argmax()
        assert counts.max() > 2 * counts.double().mean()


def test_recorded_experts_come_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "seen.jsonl"
    file.write_text("[0, 5]\n[1, 2]\n[4, 3]\n")
    assert make_routing(str(file), 4, SMALL, 0).ids.tolist() == [[0, 5], [1, 2], [4, 3], [0, 5]]
    assert make_routing(str(file), 2, SMALL, 0, draw=1).ids.tolist() == [[4, 3], [0, 5]]


@pytest.mark.parametrize(
    "content", ["", "[0, 6]\n", "[0]\n", "[1, 1]\n", "[0, -1]\n", "x", "{}\n", "[" * 10**5, "[1e9, 2]"]
)
def test_what_was_not_recorded_of_this_layer_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "seen.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match="--routing"):
        make_routing(str(file), 4, SMALL, 0)


def test_published_layers() -> None:
    assert read_layer(resolve_config("Qwen3-30B-A3B")) == LayerShape(2048, 768, 128, 8)
    assert read_layer(resolve_config("DeepSeek-V2-Lite")) == LayerShape(2048, 1408, 64, 6)
    assert read_layer(resolve_config("Mixtral-8x7B")) == LayerShape(4096, 14336, 8, 2)
    with pytest.raises(ModelError, match="has no experts"):
        read_layer(resolve_config("tiny"))


def test_what_differs_is_not_timed() -> None:
    routing = make_routing("uniform", 8, SMALL, 0)
    experts = random_experts(SMALL, range(6), 0, torch.float32, CPU)
    work = Work.of(torch.randn(8, 32), routing.ids, routing.weights, experts, Ranks(0, 1))
    expected = dense_loop(work, Clock(CPU))
    job = Job(
        rank=0, num_ranks=1, folder="", shape=SMALL, num_tokens=8, routing="uniform", seed=0, dtype="float32",
        device="cpu", placements=(in_order(6, 1),), warmup=0, runs=3, timeout_s=1,
    )  # fmt: skip

    def wrong(work: Work, clock: Clock) -> torch.Tensor:
        return dense_loop(work, clock) * 1.001

    right, off = (timed(job, Variant("v", run), work, expected, 0) for run in (dense_loop, wrong))
    assert len(right.seconds) == 3 and right.error == 0
    assert off.seconds == [] and off.error == pytest.approx(1e-3, rel=1e-2)


SETTINGS = [Grouped(capacity, meanwhile) for capacity in (None, 5, 8) for meanwhile in (False, True)]


def compare_settings(rank: int, folder: str) -> None:
    """One of three ranks: what every setting gives for its tokens, against all experts here."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    routing = make_routing("zipf", 24, SMALL, 1)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    whole, part = (
        random_experts(SMALL, which, 0, torch.float32, CPU) for which in (range(6), (2 * rank, 2 * rank + 1))
    )
    own = slice(8 * rank, 8 * rank + 8)
    expected = mix_loop(x, whole, routing.ids, routing.weights)[own]
    work = Work.of(x[own], routing.ids[own], routing.weights[own], part, Ranks(rank, 3))
    for setting in SETTINGS:
        if setting.capacity is None or setting.capacity >= int(work.visits().sum(0).max()):
            torch.testing.assert_close(setting(work, Clock(CPU)), expected)
        else:
            setting(work, Clock(CPU))  # tokens without a row stay at home, and nothing else happens
    dist.destroy_process_group()


@pytest.mark.timeout(200, method="thread")
def test_every_setting_gives_what_one_rank_gives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare_settings, (str(tmp_path),), nprocs=3)


# The command, in processes of its own

LAYER = ["--hidden-size", "32", "--intermediate-size", "16", "--num-experts", "6", "--batch-size", "2"]
TINY = [*LAYER, "--seq-len", "12", "--warmup", "1", "--runs", "3"]
VARIANTS = ["dense loop", "dense grouped", "EP padded", "EP packed", "all-gather + reduce-scatter", "EP grouped"]


def run(*arguments: str, **settings: object) -> tuple[int, str, str]:
    process = kvtool("moe-ep", *TINY, *arguments, **settings)
    stdout, stderr = process.communicate(timeout=200)
    return process.returncode, stdout, stderr


def test_three_ranks_give_what_one_gives(tmp_path: Path) -> None:
    """Recorded routing, so that bytes can be counted by hand; experts balanced, so that some stand twice."""
    wanted = [[0, 1], [0, 2], [0, 5], [0, 3]] * 6
    file, page = tmp_path / "seen.jsonl", tmp_path / "found.html"
    file.write_text("\n".join(map(json.dumps, wanted)))
    options = ("--ranks", "3", "--routing", str(file), "--balance", "--json", "--output", str(page))
    status, stdout, stderr = run(*options)
    assert (status, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["schema"] == "kvtool.moe-ep/1"
    rows = document["rows"]
    assert [row["variant"] for row in rows] == [*VARIANTS, "EP grouped"]
    assert [row["placement"] for row in rows] == ["in order"] * 6 + ["balanced"]
    by_name = {row["variant"]: row for row in rows[:6]}
    for row in rows:
        assert row["equal"] and row["error"] < 1e-5
        assert row["tokens_per_s"] == pytest.approx(24 / (row["ms"]["p50"] / 1e3))
        assert row["communication_share"] + row["control_share"] < 1
    # Two experts on a rank: each token is wanted by ranks 0 and {0, 1, 2, 1}[t mod 4]; eight tokens live on each.
    travel = sum(len({e // 2 for e in pair} - {token // 8}) for token, pair in enumerate(wanted))
    row_bytes, told_bytes = 32 * 4, 2 * 2 * 4
    assert by_name["EP packed"]["wire_bytes"] == travel * (2 * row_bytes + told_bytes)
    all_bytes, least = 3 * 8 * 2 * (2 * row_bytes + told_bytes), 2 * travel * row_bytes
    assert by_name["all-gather + reduce-scatter"]["wire_bytes"] == all_bytes
    assert by_name["all-gather + reduce-scatter"]["wire_over_least"] == pytest.approx(all_bytes / least)
    # Expert 0 gets all eight tokens of a rank, so all six get as many rows from each of three.
    assert by_name["EP padded"]["rows_over_needed"] == 6 * 3 * 8 / 48
    assert by_name["dense loop"]["shard_ratio"] == 1
    assert by_name["EP grouped"]["shard_ratio"] == pytest.approx(1 / 3)
    assert rows[-1]["shard_ratio"] == pytest.approx(3 / 6)  # an eighth of six experts is one slot more on each rank
    assert page.read_text().count("<svg") == 2


def test_two_ranks_in_16_bits_and_what_is_said_of_them() -> None:
    status, stdout, stderr = run("--dtype", "bfloat16", "--ranks", "2")
    assert (status, stderr) == (0, "")
    for said in (*VARIANTS, "fewer than 2 GPUs", "against the loop alone", "EP grouped was quickest as"):
        assert said in stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives() -> None:
    """By CUDA graphs, but for those variants in which the host waits."""
    status, stdout, stderr = run("--hidden-size", "64", "--dtype", "bfloat16", "--balance", "--json")
    assert status == 0, stderr
    rows = json.loads(stdout)["rows"]
    assert [row["variant"] for row in rows] == [*VARIANTS, "EP grouped"]
    assert all(row["equal"] and row["ms"]["p50"] > 0 for row in rows)
    assert [row["variant"] for row in rows if row["host_waits"]] == ["dense loop", "EP padded", "EP packed"]


def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    process = kvtool("moe-ep", *TINY, "--runs", "1000000")
    deadline = time.monotonic() + 60
    while len(ranks := children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("error: rank 1 ended with status -9: ") and stderr.count("\n") == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


RAISING = """
import sys
if any(word.endswith("job-0.json") for word in sys.orig_argv):
    import kvtool.expert_parallel.worker as worker
    def raising(*_):
        raise UnboundLocalError("a bug")
    worker.choose = raising
"""


def test_a_rank_that_raises_is_named(tmp_path: Path) -> None:
    """And not the other, which misses it."""
    (tmp_path / "sitecustomize.py").write_text(RAISING)
    status, stdout, stderr = run(env=beginning_with(tmp_path))
    assert (status, stdout, stderr) == (2, "", "error: rank 0 ended with status 1: UnboundLocalError: a bug\n")


def test_ranks_end_with_the_command(tmp_path: Path) -> None:
    process = kvtool("moe-ep", *TINY, "--runs", "1000000")
    deadline = time.monotonic() + 60
    while len(ranks := children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether it is there, and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_was_measured_before_ctrl_c_is_shown(tmp_path: Path) -> None:
    page = tmp_path / "found.json"
    slow = ("--hidden-size", "512", "--intermediate-size", "1024", "--seq-len", "512", "--runs", "30")
    process = kvtool("moe-ep", *TINY, *slow, "--output", str(page), env=os.environ | {"TMPDIR": str(tmp_path)})
    while not list(tmp_path.glob("kvtool-ranks-*/measured.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")
    assert "dense loop" in stdout
    assert json.loads(page.read_text())["rows"][0]["variant"] == "dense loop"


def test_time_is_bounded() -> None:
    status, stdout, stderr = run("--runs", "1000000", "--timeout", "1")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: --timeout 1: ") and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-experts", "7"], "--num-experts 7: 2 ranks cannot share them"),
        (["--top-k", "7"], "--top-k 7"),
        (["--batch-size", "1", "--seq-len", "3"], "is 3 tokens"),
        (["--batch-size", "2000000000", "--seq-len", "2000000000"], "at most 1048576"),
        (["--routing", "even"], "--routing even"),
        (["--routing", "zipf:x"], "--routing zipf:x"),
        (["--device", "cuda"], "--device cuda"),
        (["--replicas", "2"], "--balance"),
        (["--balance", "--replicas", "3"], "--replicas 3"),
        (["--model", "tiny"], "no experts"),
        (["--model", "/no/such"], "/no/such"),
        (["--ranks", "1"], "--ranks"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(arguments: list[str], said: str, command: Command) -> None:
    error = error_line(command("moe-ep", *TINY, *arguments))
    assert said in error
    assert not error.startswith("error: rank")  # it is what the user wrote, not a rank that failed
