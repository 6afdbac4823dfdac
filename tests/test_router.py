"""Prefill, decode and router as servers of their own: what a client sees of them, and of their ends."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import pytest
from conftest import ServerProcess, events, kvtool, serving

from commands.serve import check_role
from kvtool.disagg.router import Prefixes, Side, base, prompt_of
from kvtool.errors import ConfigError

COMMON = ("--nbits", "4", "--dtype", "float64", "--kv-cache-memory", "64MiB", "--no-preflight")
SECRET = ("--kv-secret", "only-these-tests")
TEXT = "It was a dark and stormy night, and the rain fell in torrents. " * 10


class Cluster(NamedTuple):
    decode: ServerProcess
    prefill: ServerProcess
    router: ServerProcess


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A decode server whose KV port the prefill server is told, and a router before both."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    with ExitStack() as stack:
        decode = stack.enter_context(serving("--role", "decode", "--kv-port", port, *SECRET, *COMMON))
        assert f"arrives   at 127.0.0.1:{port}" in decode.card
        to = ("--role", "prefill", "--peer", f"localhost:{port}", "--kv-timeout", "20")
        prefill = stack.enter_context(serving(*to, *SECRET, *COMMON))
        router = stack.enter_context(serving("--role", "router", "--prefill", prefill.url, "--decode", decode.url))
        yield Cluster(decode, prefill, router)


def ask(server: ServerProcess, **body: Any) -> dict[str, Any]:
    fields = {"prompt": TEXT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{server.url}/v1/completions", json=fields | body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stats(server: ServerProcess) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{server.url}/server_info").json()["stats"]
    return found


def wait_until_idle(server: ServerProcess) -> None:
    deadline = time.monotonic() + 20
    while any(stats(server)[name] for name in ("running", "waiting", "used_blocks", "used_tails")):
        assert time.monotonic() < deadline, stats(server)
        httpx.post(f"{server.url}/flush_cache")  # an engine tells its stats when it is told something
        time.sleep(0.05)


def test_two_servers_answer_as_one(cluster: Cluster) -> None:
    shared = ask(cluster.router)
    assert stats(cluster.decode)["arrivals_total"] == 1 and stats(cluster.prefill)["prefix_queries_total"] > 0
    httpx.post(f"{cluster.decode.url}/flush_cache")
    alone = ask(cluster.decode)
    assert shared["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    assert shared["usage"] == alone["usage"], "nobody had any of the prompt before"
    with httpx.stream(
        "POST",
        f"{cluster.router.url}/v1/completions",
        json={"prompt": TEXT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True},
        timeout=60,
    ) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == alone["choices"][0]["text"]
    assert stats(cluster.decode)["arrivals_total"] == 2
    for server in (cluster.decode, cluster.prefill):
        wait_until_idle(server)


def test_what_one_engine_must_answer_alone_it_does(cluster: Cluster) -> None:
    before = stats(cluster.decode)["arrivals_total"]
    assert len(ask(cluster.router, n=2, temperature=1)["choices"]) == 2
    assert ask(cluster.router, logprobs=1)["choices"][0]["logprobs"] is not None
    assert stats(cluster.decode)["arrivals_total"] == before
    wait_until_idle(cluster.prefill)


def test_what_is_wrong_with_a_request_is_said_through_the_router(cluster: Cluster) -> None:
    for path, body, status in (
        ("/v1/completions", {"prompt": "", "max_tokens": 3}, 400),
        ("/v1/completions", {"prompt": "x", "max_tokens": -3}, 400),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404),
        ("/nowhere", {}, 404),
    ):
        response = httpx.post(f"{cluster.router.url}{path}", json=body, timeout=30)
        assert response.status_code == status and response.json()["error"]["message"]
    assert httpx.get(f"{cluster.router.url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{cluster.router.url}/health").status_code == 200
    secret = httpx.get(f"{cluster.decode.url}/server_info").text
    assert SECRET[1] not in secret
    header = {"x-kvtool-shared": "a b c"}
    response = httpx.post(f"{cluster.decode.url}/v1/completions", json={"prompt": "x"}, headers=header)
    assert response.status_code == 400 and "x-kvtool-shared" in response.json()["error"]["message"]


def test_a_client_that_leaves_leaves_nothing_behind(cluster: Cluster) -> None:
    body = {"prompt": TEXT, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.router.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for server in (cluster.decode, cluster.prefill):
        wait_until_idle(server)


def test_ends_of_servers_cost_what_was_half_said(cluster: Cluster) -> None:
    """The last test here: none of the servers is left."""
    expected = ask(cluster.router)["choices"][0]["token_ids"]
    os.kill(cluster.prefill.engine, signal.SIGSTOP)  # it hangs
    started = time.monotonic()
    os.kill(cluster.prefill.process.pid, signal.SIGSTOP)
    assert ask(cluster.router)["choices"][0]["token_ids"] == expected, "the decode side computes it"
    assert time.monotonic() - started < 60
    for pid in (cluster.prefill.engine, cluster.prefill.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert ask(cluster.router)["choices"][0]["token_ids"] == expected
    wait_until_idle(cluster.decode)
    body = {"prompt": TEXT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.router.url}/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        os.kill(cluster.decode.engine, signal.SIGKILL)
        *_, last = lines
    assert "error" in json.loads(last.removeprefix("data: "))
    response = httpx.post(f"{cluster.router.url}/v1/completions", json={"prompt": "x"}, timeout=60)
    assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"
    cluster.router.process.send_signal(signal.SIGTERM)
    assert cluster.router.end()[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--role", "decode"], "--role decode: needs --kv-secret"),
        (["--role", "prefill", *SECRET], "--role prefill: needs --peer"),
        (["--role", "router", "--prefill", "http://127.0.0.1:9"], "--role router: needs --decode"),
        (["--peer", "h:1"], "--peer: is for --role prefill; add it"),
        (
            ["--role", "decode", *SECRET, "--peer", "h:1"],
            "--peer: is for --role prefill; --role decode has no use for it",
        ),
        (["--role", "prefill", *SECRET, "--peer", "h"], "--peer h: is no address; write HOST:PORT"),
        (["--role", "prefill", *SECRET, "--peer", "127.0.0.1:9", "--kv-timeout", "0.5"], "no decode side answers"),
    ],
)
def test_roles_that_cannot_be_are_refused_in_a_line(options: list[str], says: str) -> None:
    process = kvtool("serve", "--port", "0", "--no-preflight", *options)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == ""
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert says in error


@pytest.mark.parametrize("role", ["router", None])
def test_the_secret_of_a_shell_bothers_nobody_who_has_no_use_for_it(role: str | None) -> None:
    """README exports KVTOOL_KV_SECRET and starts all three roles below."""
    options = {"peer": None, "kv-secret": "abc", "prefill": role and "http://h:1", "decode": role and "http://h:2"}
    check_role(role, options)


def test_a_prompt_goes_where_its_beginning_is_unless_that_side_is_busy() -> None:
    sides = [Side("prefill", f"http://{i}") for i in range(3)]
    prefixes = Prefixes()
    first = prefixes.choose(sides, "a" * 1000)
    first.num_requests = 1
    other = prefixes.choose(sides, "b" * 1000)
    assert other is not first
    assert prefixes.choose(sides, "a" * 700 + "c" * 500) is first
    first.num_requests = 3
    assert prefixes.choose(sides, "a" * 700 + "d" * 500) is not first


def test_prompts_of_all_apis_are_seen() -> None:
    assert prompt_of(b'{"prompt": "abc"}') == prompt_of(b'{"text": "abc"}') == "abc"
    assert prompt_of(b'{"input_ids": [1, 2]}') == "[1, 2]"
    assert prompt_of(b"[1]") == prompt_of(b"{") == prompt_of(b"{}") == ""
    assert base("--decode", "host:1") == "http://host:1" == base("--decode", "http://host:1/v1")
    with pytest.raises(ConfigError, match="--decode ftp://x: is no address"):
        base("--decode", "ftp://x")
