"""Ranks as processes: how they find each other, and what happens when one does not come, dies or hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import REPOSITORY, ServerProcess, children, ended, kvtool, serving

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import ConfigError
from kvtool.processes import frame
from kvtool.ranks import Hello, read_hello, split_address
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


@pytest.mark.parametrize(
    ("victim", "number", "named"),
    [
        ("follower", signal.SIGKILL, "rank 1 (process {}"),
        ("follower", signal.SIGSTOP, "rank 1 (process {}"),
        ("rank 0", signal.SIGSTOP, "rank 0 has not answered"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_all(victim: str, number: signal.Signals, named: str) -> None:
    """Within ten seconds: streams get an error event, the exit code is not 0, and the log names the rank."""
    with serving(*SMALL, "--tp", "2") as server:
        engine = server.engine
        (follower,) = children(engine)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body(1900), timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            lost = time.monotonic()
            os.kill(follower if victim == "follower" else engine, number)
            *_, last = lines
        status, stderr = server.end()
        took = time.monotonic() - lost
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert status != 0
    assert named.format(follower) in stderr
    assert took < 10
    assert ended(engine) and ended(follower)


def test_restart_starts_all_ranks_anew() -> None:
    with serving(*SMALL, "--tp", "2", "--restart") as server:
        before, engine = complete(server), server.engine
        assert before
        os.kill(children(engine)[0], signal.SIGKILL)
        deadline = time.monotonic() + 100
        while not (after := complete(server)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert after == before and server.engine != engine


# Finding each other


@contextmanager
def one_network() -> Iterator[tuple[list[str], list[str], str]]:
    """How to run something on node 0 and on node 1, and node 0's address: both are this machine."""
    yield [], [], "127.0.0.1"


@contextmanager
def two_networks() -> Iterator[tuple[list[str], list[str], str]]:
    """The same with a network namespace for each, joined by a virtual cable."""
    names, ip = [f"kvtool-{os.getpid()}-{node}" for node in range(2)], shutil.which("ip")
    ends = [f"kv{os.getpid() % 10**6}n{node}" for node in range(2)]
    subnet = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in names:
            if subprocess.run([ip, "netns", "add", name], capture_output=True).returncode:
                pytest.skip("this machine allows no network namespaces")
        subprocess.run([ip, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for node, (name, end) in enumerate(zip(names, ends, strict=True)):
            subprocess.run([ip, "link", "set", end, "netns", name], check=True)
            for words in (f"addr add {subnet}.{node + 1}/24 dev {end}", f"link set {end} up", "link set lo up"):
                subprocess.run([ip, "-n", name, *words.split()], check=True)
        yield [ip, "netns", "exec", names[0]], [ip, "netns", "exec", names[1]], f"{subnet}.1"
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True)


@pytest.mark.parametrize(("networks", "ranks"), [(one_network, {"tp": 2}), (two_networks, {"tp": 2, "pp": 2})])
def test_two_nodes_answer_as_one_process_does(networks: Any, ranks: dict[str, int]) -> None:
    engine = Engine(EngineConfig(**CONFIG, kv=KVOptions(nbits="4")))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [c.token_ids for c in engine.generate([[5 + i for i in range(80)], [9, 8, 7]], params)]
    with networks() as (on_first, on_second, host):
        address = f"{host}:{free_port()}"
        config = CONFIG | ranks | {"nnodes": 2, "dist_init_addr": address}
        sizes = [word for name, count in ranks.items() for word in (f"--{name}", str(count))]
        options = [*sizes, "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", address]
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
        [*launch, "127.0.0.1", second, "--", *command], capture_output=True, text=True, timeout=100, env=hosts["env"]
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


def test_a_node_that_does_not_come_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    process = kvtool(
        "serve", *SMALL, "--tp", "2", "--nnodes", "2", "--dist-init-addr", address, "--dist-timeout", "1", "--port", "0"
    )
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    error = stderr.splitlines()[-1]
    assert error.startswith(f"error: rank 1 (node 1) did not come to {address} within --dist-timeout 1 s")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--tp 3", "--tp 3: does not divide the model's 4 query heads"),
        ("--tp-size 8", "--tp 8: does not divide the model's 4 query heads"),
        ("--tp 2 --nnodes 2", "--nnodes 2: needs --dist-init-addr HOST:PORT of node 0, the same on all nodes"),
        ("--tp 3 --nnodes 2 --node-rank 1", "--tp 3 --pp 1: 3 ranks cannot be shared out among --nnodes 2"),
        (
            "--tp 2 --nnodes 2 --node-rank 1 --dist-init-addr nowhere",
            "--dist-init-addr nowhere: write HOST:PORT, the address of node 0 and a free port",
        ),
        ("--tp 2 --all-reduce symmetric-memory", "--all-reduce symmetric-memory: there are no GPUs; leave it out"),
    ],
)
def test_ranks_that_cannot_be_are_refused_in_one_line(options: str, error: str) -> None:
    process = kvtool("serve", *options.split(), "--device", "cpu", "--port", "0")
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    assert [line for line in stderr.splitlines() if not line.startswith("loading")] == [f"error: {error}"]


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--tp 2 --pp 1 --device cuda: 2 ranks need as many GPUs; there are 1"):
        Engine(EngineConfig(tp=2, device="cuda"))


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 40, frame({"rank": 1}), b""])
def test_strangers_are_no_ranks(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.close()
    assert read_hello(ours) is None


def test_a_rank_is_known_by_its_hello() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(frame(Hello(3, 17, "host", "secret")))
    assert read_hello(ours) == Hello(3, 17, "host", "secret")


def test_addresses() -> None:
    assert split_address("10.0.0.1:29500") == ("10.0.0.1", 29500)
    assert split_address("[fe80::1]:1") == ("fe80::1", 1)
