"""How a server starts and ends, as processes and signals see it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PROMPT, ServerProcess, children, ended, kvtool, serving

from kvtool.server.lifecycle import LAST_SECONDS, bind

LOADING = "loading tiny ...\n"
FINISHING = "finishing {}, for 30 s at most; stop again to end at once\n"
# What ends at once takes a second or two, and more on a busy machine; what must not be waited for takes 30 s (answers),
# or for ever (a reader that has stopped).
AT_ONCE = 10


def stream(tokens: int) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}


@contextmanager
def streaming(server: ServerProcess, tokens: int) -> Iterator[Iterator[str]]:
    """Lines of an answer that has begun."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=stream(tokens), timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


@contextmanager
def stopped_reader(server: ServerProcess) -> Iterator[None]:
    """A client process that has asked for a long answer, and is stopped before it reads any."""
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", json.dumps(stream(1900))]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    client.stdout.read(1)
    client.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        client.kill()
        client.communicate()


def wait_until(condition: Any, most: float = 30) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + most
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    """That a process has computed, also when it has ended and nobody has taken note."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_a_killed_engine_ends_streams_and_server() -> None:
    """Within two seconds of a machine that does nothing else, though one client has stopped reading."""
    before = shared_memory()
    with serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--served-model-name", "mine") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "mine"
        engine, pid = server.engine, server.process.pid
        with streaming(server, 1900) as lines, stopped_reader(server):
            computed = cpu_seconds(pid)
            os.kill(engine, signal.SIGKILL)
            *_, last = lines
            health = httpx.get(f"{server.url}/health")
            wait_until(lambda: ended(pid), AT_ONCE)
            took = cpu_seconds(pid) - computed + 2 * LAST_SECONDS  # what it waits for streams, and then for readers
            status, stderr = server.end()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
    assert took < 2
    assert status == 2
    assert stderr.splitlines()[-1].startswith("error: the engine ended")
    assert "Traceback" not in stderr
    assert ended(engine)
    assert shared_memory() <= before


@pytest.mark.parametrize("reading", [True, False])
def test_a_killed_server_takes_its_engine_along(reading: bool) -> None:
    """At once, though the engine is busy for longer, and whether or not anybody takes what it has to say."""
    before = shared_memory()
    with serving("--kv-cache-memory", "64MiB") as server, ExitStack() as stack:
        engine = server.engine
        for _ in range(8):
            stack.enter_context(stopped_reader(server))
        if not reading:
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)  # the engine goes on meanwhile
        server.process.kill()
        wait_until(lambda: ended(engine), AT_ONCE)
        server.process.communicate()
    assert shared_memory() <= before


def test_sigterm_lets_answers_finish_and_nothing_begin() -> None:
    with serving("--kv-cache-memory", "64MiB") as server, httpx.Client(base_url=server.url, timeout=60) as idle:
        engine = server.engine
        assert idle.get("/ready").status_code == 200
        with streaming(server, 300) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            assert idle.get("/health").status_code == 200
            refused = idle.post("/v1/completions", json=stream(1))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["connection"] == "close"
            *_, done = lines
        assert done == "data: [DONE]"
        assert server.end() == (0, LOADING + FINISHING.format("1 request"))
    assert ended(engine)


def test_sigterm_waits_no_longer_than_it_is_told() -> None:
    options = ("--kv-cache-memory", "64MiB", "--shutdown-timeout", "1")
    with serving(*options) as server, streaming(server, 1900) as lines, stopped_reader(server):
        server.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        *_, last, done = lines
        status, stderr = server.end()
        took = time.monotonic() - asked
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert done == "data: [DONE]"
    assert took < 1 + AT_ONCE
    assert (status, stderr.count("\n")) == (0, 2)


def test_a_second_sigterm_ends_at_once() -> None:
    with serving("--kv-cache-memory", "64MiB") as server:
        engine = server.engine
        with streaming(server, 1900) as lines, stopped_reader(server):
            server.process.send_signal(signal.SIGTERM)
            assert server.process.stderr is not None
            assert [server.process.stderr.readline() for _ in range(2)] == [LOADING, FINISHING.format("2 requests")]
            server.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            status, stderr = server.end()
            took = time.monotonic() - asked
            with pytest.raises(httpx.TransportError):
                list(lines)
    assert took < AT_ONCE
    assert (status, stderr) == (0, "")
    assert ended(engine)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_all_processes_also_while_loading(number: signal.Signals, status: int) -> None:
    process = kvtool("serve", "--port", "0")
    assert process.stderr is not None
    assert process.stderr.readline() == LOADING
    while not children(process.pid):
        time.sleep(0.05)
    (engine,) = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (status, "")
    assert ended(engine)


def test_what_is_sent_does_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm would hold a first token back until the client has acknowledged the response's head."""

    async def no_delay() -> int:
        accepted = asyncio.get_running_loop().create_future()
        with bind("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(lambda reader, writer: accepted.set_result(writer), sock=listener)
            _, client = await asyncio.open_connection(*listener.getsockname())
            writer = await accepted
            option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.close()
            writer.close()
            server.close()
            return int(option)

    assert asyncio.run(no_delay())


def test_a_card_that_nobody_reads_ends_no_server() -> None:
    """Nor does one that others can reach want a key, though it says so."""
    reader, writer = os.pipe()
    os.close(reader)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--host", "0.0.0.0", "--port", str(port), "--kv-cache-memory", "64MiB")
    process = kvtool("serve", *options, stdout=writer)
    os.close(writer)
    while process.poll() is None:
        with suppress(httpx.TransportError):
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=60)
    warning = "warning: who reaches 0.0.0.0 can use this server; set --api-key\n"
    assert (process.returncode, stderr) == (0, warning + LOADING)


def test_answers_on_a_kept_connection_do_not_wait_for_acknowledgements() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
