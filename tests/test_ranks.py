"""Ranks as processes: how they find each other, and what happens when one does not come, dies or hangs."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import httpx
import msgspec
import pytest
import torch
from checkpoints import QWEN_MOE, make_checkpoint
from conftest import REPOSITORY, ServerProcess, beginning_with, children, ended, in_time, kvtool, serving
from prometheus_client.parser import text_string_to_metric_families
from torch.distributed import HashStore

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import ConfigError
from kvtool.models.resolve import EMBEDDED
from kvtool.processes import frame
from kvtool.ranks.leader import Ranks
from kvtool.ranks.link import Link, watch
from kvtool.ranks.messages import Beat, End
from kvtool.ranks.rendezvous import INTERFACES, Hello, Meeting, read_hello, split_address
from kvtool.request import SamplingParams

SMALL = ("--dtype", "float64", "--device", "cpu", "--kv-cache-memory", "16MiB", "--max-num-seqs", "2")
ANSWER = """
import json, sys
from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.request import SamplingParams
engine = Engine(EngineConfig(**json.loads(sys.argv[1]), kv=KVOptions(nbits="4")))
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
print(json.dumps([c.token_ids for c in engine.generate([[5 + i for i in range(80)], [9, 8, 7]], params)]))
engine.close()
"""
CONFIG: dict[str, Any] = {"dtype": "float64", "device": "cpu", "kv_cache_memory": 16 << 20, "max_num_seqs": 2}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def body(tokens: int) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}


def complete(server: ServerProcess) -> str | None:
    """An answer; None where the server gives none."""
    asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    try:
        response = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120)
    except httpx.TransportError:
        return None
    return str(response.json()["choices"][0]["text"]) if response.is_success else None


# A rank that is lost


@contextmanager
def losing(server: ServerProcess, pid: int, number: signal.Signals) -> Iterator[None]:
    """Send a signal to a rank while a client streams, who hears of it."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body(1900), timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        os.kill(pid, number)
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    yield


@pytest.mark.parametrize(
    ("victim", "named"), [("follower", "rank 1 (process {}"), ("rank 0", "rank 0 has not answered for 8 s")]
)
def test_a_rank_that_hangs_ends_all(victim: str, named: str) -> None:
    """Streams get an error event, the exit code is not 0, and the log names the rank, some 7 s later."""
    with serving(*SMALL, "--tp", "2") as server:
        engine = server.engine
        (follower,) = children(engine)
        lost = time.monotonic()
        with losing(server, follower if victim == "follower" else engine, signal.SIGSTOP):
            status, stderr = server.end()
            took = time.monotonic() - lost
    assert status != 0
    assert named.format(follower) in stderr
    assert took < 20
    assert ended(engine) and ended(follower)


STUCK = """
import sys, threading, time
from pathlib import Path

def stick():
    while not hasattr(sys.modules.get("kvtool.follower"), "main"):
        time.sleep(0.01)
    from kvtool.runner import Runner
    collect = Runner.collect

    def stuck(runner, handle):
        while Path(__file__).with_name("stuck").exists():
            time.sleep(0.1)
        return collect(runner, handle)

    Runner.collect = stuck

if any("kvtool.follower" in word for word in sys.orig_argv):
    threading.Thread(target=stick, daemon=True).start()
"""
STREAM = """
import json, sys, time
from contextlib import closing
from pathlib import Path
from kvtool.config import EngineConfig
from kvtool.engine import Engine
with closing(Engine(EngineConfig(**json.loads(sys.argv[1]), tp=2))) as engine:
    for _ in engine.stream("Once upon a time"):
        Path(sys.argv[2]).touch()
        print(time.monotonic(), flush=True)
"""


def test_a_rank_whose_device_hangs_ends_all(tmp_path: Path) -> None:
    """It lives, and goes on saying so, but a step that it has launched does not end."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    done = subprocess.run(
        [sys.executable, "-c", STREAM, json.dumps(CONFIG), tmp_path / "stuck"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=200,
        env=beginning_with(tmp_path),
    )
    ended = time.monotonic()
    assert done.returncode == 1
    assert re.search(r"error: rank 1 \(process .*\) has been in one step for 8 s; all ranks end with it", done.stderr)
    assert ended - float(done.stdout.split()[-1]) < 20


# In every process of an engine: `victim` raises in the midst of its start, of a graph that it captures, or of a step.
# Without GPUs, to leave a group hangs, as it does in NCCL where others do not leave.
BREAKING = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import kvtool.runner
from kvtool.parallel import Group

victim, during, trigger = os.environ["BREAKING"].split(":")
rank = 1 if any("kvtool.follower" in word for word in sys.orig_argv) else 0
if during != "capture":
    dist.destroy_process_group = lambda: time.sleep(1000)
if rank == int(victim):
    def broken(function):
        def raising(*args, **kwargs):
            if Path(trigger).exists() and (during != "capture" or torch.cuda.is_current_stream_capturing()):
                raise UnboundLocalError("a bug")
            return function(*args, **kwargs)
        return raising

    if during == "start":
        kvtool.runner.capacity = broken(kvtool.runner.capacity)
    Group.all_reduce = broken(Group.all_reduce)
"""


def breaking(folder: Path, victim: int, during: str, config: dict[str, Any]) -> None:
    """See that all ranks end, and say why, when one raises."""
    (folder / "sitecustomize.py").write_text(BREAKING)
    trigger = folder / "trigger"
    if during != "step":  # in which it comes with the first text
        trigger.touch()
    status, stdout, stderr = in_time(
        [sys.executable, "-c", STREAM, json.dumps(config), trigger],
        env=beginning_with(folder) | {"BREAKING": f"{victim}:{during}:{trigger}"},
    )
    ended = time.monotonic()
    assert status == 1
    named = "rank 0" if victim == 0 else r"rank 1 \(process .*\)"
    assert re.search(f"error: {named} has failed: .*; all ranks end with it", stderr), stderr
    assert "UnboundLocalError: a bug" in stderr and "in raising" in stderr, "what, and where"
    if during == "step":
        assert ended - float(stdout.split()[-1]) < 20


@pytest.mark.parametrize("during", ["start", "step"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_ends_all(victim: int, during: str, tmp_path: Path) -> None:
    """The others, in the midst of what needs that rank, would wait for it for ever; and so would it for them."""
    breaking(tmp_path, victim, during, CONFIG)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("during", ["capture", "step"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_gpus_that_raises_ends_all(victim: int, during: str, tmp_path: Path) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "all_reduce": "nccl", "cuda_graph": during == "capture"}
    breaking(tmp_path, victim, during, CONFIG | options)


def test_a_rank_that_dies_ends_all_and_restart_starts_them_anew() -> None:
    with serving(*SMALL, "--tp", "2", "--restart") as server:
        before, engine = complete(server), server.engine
        assert before
        (follower,) = children(engine)
        with losing(server, follower, signal.SIGKILL):
            deadline = time.monotonic() + 100
            while not (after := complete(server)):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert after == before and server.engine != engine
        assert ended(engine) and ended(follower)
        server.process.send_signal(signal.SIGTERM)
        status, stderr = server.end()
    assert status == 0
    assert f"rank 1 (process {follower} on {socket.gethostname()}) has ended; all ranks end with it" in stderr


def test_a_mixture_is_served_by_ranks_that_have_whole_experts(tmp_path: Path) -> None:
    """Its tokens are those of one process, its experts' load is told, and a lost rank ends all."""
    model = make_checkpoint("qwen3_moe", tmp_path, vocab_size=4096, max_position_embeddings=2048, **QWEN_MOE).config
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED["tiny"] / file, tmp_path)
    prompts, params = [[9, 8, 7], list(range(5, 85))], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = Engine(EngineConfig(model=str(tmp_path), **CONFIG, kv=KVOptions(nbits="4")))
    expected = [c.token_ids for c in engine.generate(prompts, params)]
    with serving("--model", str(tmp_path), *SMALL, "--nbits", "4", "--no-preflight", "--ep-size", "2") as server:
        assert "2 ranks" in server.card
        for prompt, token_ids in zip(prompts, expected, strict=True):
            asked = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            response = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).raise_for_status()
            assert response.json()["choices"][0]["token_ids"] == token_ids
        whole, single = (httpx.get(f"{server.url}/metrics{path}", timeout=60).text for path in ("", "/experts"))
        load = {layer: [0.0] * model.num_experts for layer in range(model.num_hidden_layers)}
        for family in text_string_to_metric_families(single):
            for sample in family.samples:
                load[int(sample.labels["layer"])][int(sample.labels["expert"])] = sample.value
        assert load == engine.expert_tokens()
        told = {
            (sample.name, int(sample.labels["layer"])): sample.value
            for family in text_string_to_metric_families(whole)
            for sample in family.samples
            if sample.name.startswith("kvtool:expert")
        }
        for layer, tokens in load.items():
            assert told["kvtool:expert_imbalance", layer] == pytest.approx(max(tokens) / (sum(tokens) / 8))
            halves = sum(tokens[:4]), sum(tokens[4:])
            assert told["kvtool:expert_rank_imbalance", layer] == pytest.approx(max(halves) / (sum(halves) / 2))
        assert len(told) == 2 * len(load)
        (follower,) = children(server.engine)
        with losing(server, follower, signal.SIGKILL):
            status, stderr = server.end()
    assert status != 0 and f"rank 1 (process {follower} on {socket.gethostname()}) has ended" in stderr


def test_experts_of_a_model_without_any_are_refused_in_one_line() -> None:
    process = kvtool("serve", "--ep", "2", "--device", "cpu", "--port", "0")
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.splitlines()[-1] == "error: --ep 2: a qwen2 model has no experts to share out; use --tp"


# Finding each other


@contextmanager
def two_networks() -> Iterator[tuple[list[str], list[str], str]]:
    """How to run something on either node, and node 0's address: two network namespaces joined by a virtual cable, or
    where the machine allows none, one network for both."""
    names, ip = [f"kvtool-{os.getpid()}-{node}" for node in range(2)], shutil.which("ip") or "ip"
    ends = [f"kv{os.getpid() % 10**6}n{node}" for node in range(2)]
    subnet = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
    commands = [f"netns add {name}" for name in names] + [f"link add {ends[0]} type veth peer name {ends[1]}"]
    for node, (name, end) in enumerate(zip(names, ends, strict=True)):
        commands += [f"link set {end} netns {name}", f"-n {name} addr add {subnet}.{node + 1}/24 dev {end}"]
        commands += [f"-n {name} link set {end} up", f"-n {name} link set lo up"]
    try:
        for words in commands:
            subprocess.run([ip, *words.split()], check=True, capture_output=True)
        yield [ip, "netns", "exec", names[0]], [ip, "netns", "exec", names[1]], f"{subnet}.1"
    except (subprocess.CalledProcessError, FileNotFoundError):
        yield [], [], "127.0.0.1"
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run([ip, "netns", "delete", name], capture_output=True)


def test_two_nodes_answer_as_one_process_does() -> None:
    engine = Engine(EngineConfig(**CONFIG, kv=KVOptions(nbits="4")))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [c.token_ids for c in engine.generate([[5 + i for i in range(80)], [9, 8, 7]], params)]
    with two_networks() as (on_first, on_second, host):
        address = f"{host}:{free_port()}"
        config = CONFIG | {"tp": 2, "pp": 2, "nnodes": 2, "dist_init_addr": address}
        options = ["--tp", "2", "--pp", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", address]
        second = subprocess.Popen(
            [*on_second, sys.executable, "-m", "commands", "serve", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        first = subprocess.run(
            [*on_first, sys.executable, "-c", ANSWER, json.dumps(config)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=200,
        )
        stdout, stderr = second.communicate(timeout=30)
    assert first.returncode == 0, first.stderr + stderr
    assert json.loads(first.stdout) == expected
    assert (second.returncode, stdout) == (0, ""), stderr


def test_torchrun_starts_ranks_too(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "commands", "bench-ttft", "--tp", "2", *SMALL, "--prompt-tokens", "8", "--output", str(report)]
    done = subprocess.run(
        [*command, "--trials", "1", "--requests", "1"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["rows"][0]["success_rate"] == 1


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, Any]:
    """Hosts that are all this machine, but for "bad", which ssh does not reach, and a checkout on them."""
    for name, script in (
        ("ssh", 'case "$*" in *" bad "*) exit 255 ;; esac\nexec sh -c "${@: -1}"'),
        ("scripts/kvtool", f'cd {REPOSITORY} && exec {sys.executable} -m commands "$@"'),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(0o755)
    return {"env": os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, "cwd": tmp_path}


@pytest.mark.parametrize(("second", "status"), [("127.0.0.1", 0), ("bad", 255)])
def test_all_nodes_are_launched_over_ssh(second: str, status: int, hosts: dict[str, Any]) -> None:
    launch = [REPOSITORY / "scripts" / "launch_distributed", "--dir", hosts["cwd"], "--port", str(free_port())]
    command = ["bench-ttft", "--tp", "2", *SMALL, "--prompt-tokens", "8", "--trials", "1", "--requests", "1", "--json"]
    launched = subprocess.run(
        [*launch, "127.0.0.1", second, "--", *command], capture_output=True, text=True, timeout=200, env=hosts["env"]
    )
    assert launched.returncode == status, launched.stderr
    if status == 0:
        assert json.loads(launched.stdout)["rows"][0]["success_rate"] == 1
    else:
        assert "error: node 1 (bad) ended with status 255" in launched.stderr.splitlines()


def test_a_first_node_that_does_not_answer_is_named() -> None:
    port = free_port()
    options = ["--tp", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", f"127.0.0.1:{port}"]
    process = kvtool("serve", *options, "--dist-timeout", "1")
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    _, error = stderr.splitlines()
    assert error.startswith(f"error: --dist-init-addr 127.0.0.1:{port} did not answer within --dist-timeout 1 s")


def test_a_first_node_that_is_something_else_is_told_in_one_line() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        options = ["--tp", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", address, "--dist-timeout", "1"]
        process = kvtool("serve", *options)
        stdout, stderr = process.communicate(timeout=100)
        other.shutdown()
    assert (process.returncode, stdout) == (2, "")
    assert stderr.splitlines()[-1].startswith(f"error: --dist-init-addr {address}: what answers there is not node 0")
    assert "Traceback" not in stderr


def test_every_node_hears_which_rank_is_lost() -> None:
    address = f"127.0.0.1:{free_port()}"
    options = ["--pp", "3", "--nnodes", "3", "--dist-init-addr", address]
    others = [kvtool("serve", *options, "--node-rank", str(node)) for node in (1, 2)]
    with serving(*SMALL, *options) as server:
        (lost,) = children(others[1].pid)
        os.kill(lost, signal.SIGKILL)
        _, first = server.end()
    (_, second), (_, third) = (node.communicate(timeout=30) for node in others)
    why = f"rank 2 (process {lost} on {socket.gethostname()}) has ended"
    assert f"error: {why}; all ranks end with it" in first.splitlines()
    assert second.splitlines()[-1] == f"error: rank 0 ends, because {why}; rank 1 ends with it"
    assert third.splitlines()[-1] == "error: signal 9 has ended rank 2"
    assert [node.returncode for node in others] == [1, 1]


def test_nodes_that_disagree_on_the_ranks_hear_so() -> None:
    address = f"127.0.0.1:{free_port()}"
    options = [*SMALL, "--tp", "2", "--nnodes", "2", "--dist-init-addr", address]
    nodes = [
        kvtool("serve", *options, "--port", "0", "--node-rank", str(node), "--pp", pp) for node, pp in enumerate("21")
    ]
    (_, first), (_, second) = (node.communicate(timeout=200) for node in nodes)
    assert [node.returncode for node in nodes] == [2, 2]
    why = first.splitlines()[-1].removeprefix("error: ")
    assert re.match(r"rank 1 \(process \d+ on .*\), of 2, is none of the 4 that are awaited: start all nodes with", why)
    assert second.splitlines()[-1] == f"error: rank 0 has failed: {why}; rank 1 ends with it"


def test_a_node_that_does_not_come_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    process = kvtool(
        "serve", *SMALL, "--tp", "2", "--nnodes", "2", "--dist-init-addr", address, "--dist-timeout", "1", "--port", "0"
    )
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    error = stderr.splitlines()[-1]
    assert error.startswith(f"error: rank 1 (node 1) did not come to {address} within --dist-timeout 1 s")


def test_nodes_hear_why_the_first_has_failed() -> None:
    address = f"127.0.0.1:{free_port()}"
    options = [*SMALL, "--kv-cache-memory", "1KiB", "--tp", "2", "--nnodes", "2", "--dist-init-addr", address]
    nodes = [kvtool("serve", *options, "--port", "0", "--node-rank", str(node)) for node in range(2)]
    (_, first), (_, second) = (node.communicate(timeout=200) for node in nodes)
    assert [node.returncode for node in nodes] == [2, 2]
    why = first.splitlines()[-1].removeprefix("error: ")
    assert why.startswith("--kv-cache-memory")
    assert second.splitlines()[-1] == f"error: rank 0 has failed: {why}; rank 1 ends with it"


def test_ranks_that_cannot_be_are_refused_in_one_line() -> None:
    process = kvtool("serve", "--tp-size", "3", "--device", "cpu", "--port", "0")
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.splitlines() == ["loading tiny ...", "error: --tp 3: does not divide the model's 4 query heads"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tp": 2, "nnodes": 2}, "--nnodes 2: needs --dist-init-addr HOST:PORT of node 0, the same on all nodes"),
        ({"nnodes": 2, "dist_init_addr": "a:1"}, "--tp 1 --pp 1: 1 ranks cannot be shared out among --nnodes 2"),
        ({"tp": 2, "nnodes": 2, "node_rank": 2}, "--node-rank 2: --nnodes 2 are counted from 0"),
        ({"tp": 2, "nnodes": 2, "dist_init_addr": "nowhere"}, "--dist-init-addr nowhere: write HOST:PORT"),
        ({"tp": 2, "all_reduce": "symmetric-memory"}, "--all-reduce symmetric-memory: there are no GPUs; leave it out"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Engine(EngineConfig(device="cpu", **options))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--tp 2 --pp 1 --device cuda: 2 ranks need as many GPUs; there are 1"):
        Engine(EngineConfig(tp=2, device="cuda"))


# What they say to each other


@pytest.fixture
def linked() -> Iterator[tuple[Link, Link]]:
    """Both ends of a link between two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = socket.create_connection(listener.getsockname()), listener.accept()[0]
    yield Link(ends[0], "rank 1"), Link(ends[1], "rank 0")
    for end in ends:
        end.close()


def heard(link: Link) -> list[object]:
    """All that comes, until the other end is lost."""
    messages: list[object] = []

    def receive(link: Link, body: bytes) -> None:
        messages.append(msgspec.msgpack.decode(body, type=Beat | End))

    watch([link], receive, lambda link, why: messages.append(why))
    return messages


def test_an_end_that_is_said_is_heard_whatever_the_other_end_left_unread(linked: tuple[Link, Link]) -> None:
    """A socket that closes with something unread resets the connection, behind what it has sent."""
    rank_0_to_1, rank_1_to_0 = linked
    rank_1_to_0.send(Beat())
    assert select.select([rank_0_to_1.socket], [], [], 10)[0], "it lies there, unread"
    rank_0_to_1.send_within(0, End())
    rank_0_to_1.socket.close()
    assert heard(rank_1_to_0) == [End(), "has ended"]


def test_who_cannot_be_understood_is_lost(linked: tuple[Link, Link]) -> None:
    rank_0_to_1, rank_1_to_0 = linked
    rank_0_to_1.send({"type": "nonsense"})
    (why,) = heard(rank_1_to_0)
    assert str(why).startswith("cannot be understood: ")


def test_an_end_is_said_behind_what_is_being_said(linked: tuple[Link, Link]) -> None:
    """A beat can be left out; last words cannot."""
    rank_0_to_1, rank_1_to_0 = linked
    with rank_0_to_1._sending:  # by another thread
        rank_0_to_1.send_within(0, Beat())
        last = Thread(target=rank_0_to_1.send_within, args=[30, End()])
        last.start()
    last.join()
    rank_0_to_1.socket.close()
    assert heard(rank_1_to_0) == [End(), "has ended"]


def test_ranks_that_are_there_hear_from_rank_0_while_it_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence would end them long before --dist-timeout is over."""
    for variable in INTERFACES:
        monkeypatch.setenv(variable, "lo")
    monkeypatch.setattr("kvtool.ranks.leader.BEAT_SECONDS", 0.1)
    ranks, store = Ranks.__new__(Ranks), HashStore()
    ranks._links, ranks._processes, ranks._answers = [], [], {}
    config = EngineConfig(tp=3, device="cpu", dist_timeout=30)
    gathering = Thread(target=ranks._gather, args=[store, config, "127.0.0.1:1"])
    gathering.start()
    meeting = msgspec.json.decode(store.get("meeting"), type=Meeting)

    def come(rank: int) -> socket.socket:
        connection = socket.create_connection((meeting.host, meeting.port))
        connection.sendall(frame(Hello(rank, 3, 17, "host", meeting.secret)))
        return connection

    with come(1) as first:
        link = Link(first, "rank 0")
        first.settimeout(20)
        assert msgspec.msgpack.decode(next(link.inbox.wait()), type=Beat) == Beat()
        with come(2):
            gathering.join(20)
            assert not gathering.is_alive() and len(ranks._links) == 2
    for each in ranks._links:
        each.socket.close()


def test_who_dismisses_the_ranks_a_second_time_waits_until_it_is_said(linked: tuple[Link, Link]) -> None:
    """An engine process ends in whichever of two threads sees first that its client is gone."""
    rank_0_to_1, rank_1_to_0 = linked
    ranks = Ranks.__new__(Ranks)
    ranks._links, ranks._processes, ranks._last_words, ranks._speaking_last = [rank_0_to_1], [], None, Lock()
    threads = [Thread(target=ranks.dismiss, args=[End()]) for _ in range(2)]
    with rank_0_to_1._sending:
        for thread in threads:
            thread.start()
        threads[0].join(0.1)
        threads[1].join(0.1)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    rank_0_to_1.socket.close()
    assert heard(rank_1_to_0) == [End(), "has ended"]


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 40, frame({"rank": 1}), b""])
def test_strangers_are_no_ranks(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.close()
    assert read_hello(ours) is None


def test_a_rank_is_known_by_its_hello() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(frame(Hello(3, 4, 17, "host", "secret")))
    assert read_hello(ours) == Hello(3, 4, 17, "host", "secret")


def test_addresses() -> None:
    assert split_address("10.0.0.1:29500") == ("10.0.0.1", 29500)
    assert split_address("[fe80::1]:1") == ("fe80::1", 1)
