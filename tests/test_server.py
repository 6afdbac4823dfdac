"""The server as clients see it: a real process, over HTTP, with the real `openai` client."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ServerProcess, children, kvtool, serving

from kvtool.errors import ModelError
from kvtool.server.generation import Defaults, read_model_defaults

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


def test_the_card_says_what_runs_and_what_to_try(server: ServerProcess) -> None:
    assert f"tiny at {server.url}" in server.card
    assert "4 bits" in server.card
    assert "at 16 bits an element" in server.card
    command = next(line for line in server.card.splitlines() if "curl" in line).strip().removeprefix("try").strip()
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["meta_info"]["completion_tokens"] > 0


def test_only_the_engine_has_a_process_of_its_own(server: ServerProcess) -> None:
    assert len(children(server.process.pid)) == 1


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "kvtool")
    assert client.models.retrieve("tiny") == model
    assert (Path(model.root) / "tokenizer.json").exists()  # type: ignore[attr-defined]


# Clients that leave


def long_answer(stream: bool) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": stream}


def test_who_leaves_makes_room(http: httpx.Client, server: ServerProcess) -> None:
    """The server runs two requests at once; four forgotten ones of 1,500 tokens would block it for long."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        return time.perf_counter() - started

    hundred = seconds(100)

    async def leave(stream: bool) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            if stream:
                async with client.stream("POST", "/v1/completions", json=long_answer(stream)) as response:
                    await anext(response.aiter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json=long_answer(stream), timeout=1)

    async def leave_all() -> None:
        await asyncio.gather(leave(False), leave(False))
        await asyncio.gather(leave(True), leave(True))

    asyncio.run(leave_all())
    assert seconds(1) < 5 * hundred


# Life and death


def test_a_dead_engine_ends_its_streams_and_the_server() -> None:
    with serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--served-model-name", "mine") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
            body = long_answer(True) | {"model": "mine"}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(server.engine, signal.SIGKILL)
                rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "data: [DONE]" not in rest
        status, stderr = server.end()
    assert status == 2
    assert stderr.splitlines()[-1].startswith("error: the engine ended")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_all_processes_also_while_loading(number: signal.Signals, status: int) -> None:
    process = kvtool("serve", "--port", "0")
    assert process.stderr is not None
    assert process.stderr.readline() == "loading tiny ...\n"
    while not children(process.pid):
        time.sleep(0.05)
    (engine,) = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (status, "")
    assert not Path(f"/proc/{engine}").exists()


def test_a_card_that_nobody_reads_ends_no_server() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = kvtool("serve", "--port", str(port), "--kv-cache-memory", "64MiB", stdout=writer)
    os.close(writer)
    while process.poll() is None:
        with suppress(httpx.TransportError):
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "loading tiny ...\n")


def test_sigterm_lets_a_short_answer_finish() -> None:
    with serving("--kv-cache-memory", "64MiB") as server:
        engine = server.engine
        body = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end() == (0, "loading tiny ...\n")
        assert not Path(f"/proc/{engine}").exists()


# What the model's folder says


def test_sampling_defaults_are_the_model_s(tmp_path: Path) -> None:
    assert read_model_defaults(tmp_path) == Defaults(1.0, 1.0, 0)
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}')
    assert read_model_defaults(tmp_path) == Defaults(0.7, 1.0, 20)
    file.write_text('{"temperature": "warm"}')
    with pytest.raises(ModelError, match=r"generation_config.json.*temperature"):
        read_model_defaults(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config.json"):
        read_model_defaults(tmp_path)
