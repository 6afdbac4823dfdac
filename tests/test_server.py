"""The server as clients see it: a real process, over HTTP, from its card to those who leave."""

import asyncio
import json
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from conftest import PROMPT, ServerProcess, children

from kvtool.errors import ModelError
from kvtool.server.generation import Defaults, read_model_defaults


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


def held(http: httpx.Client) -> dict[str, int]:
    """What requests hold; nothing, where there are none."""
    stats = http.get("/server_info").json()["stats"]
    return {name: stats[name] for name in ("running", "waiting", "used_blocks", "used_tails") if stats[name]}


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_in_any_phase_holds_nothing_a_second_later(
    http: httpx.Client, server: ServerProcess, stream: bool
) -> None:
    """Two requests run at once, so that of four that answer at length two are still in the queue."""

    async def leave(seconds: float) -> None:
        body = {"prompt": PROMPT * 40, "max_tokens": 1500, "ignore_eos": True, "stream": stream}

        async def ask() -> None:
            async with (
                httpx.AsyncClient(base_url=server.url, timeout=60) as client,
                client.stream("POST", "/v1/completions", json=body) as response,
            ):
                await response.aread()

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(), seconds)

    async def leave_all(seconds: float) -> None:
        await asyncio.gather(*(leave(seconds) for _ in range(4)))

    for seconds in (0.02, 0.2, 1.5):  # while the prompt is read or computed; in the midst of the answer
        asyncio.run(leave_all(seconds))
        left = time.perf_counter()
        while remaining := held(http):
            assert time.perf_counter() - left < 1, remaining


# Defaults


def test_sampling_defaults_are_the_model_s(tmp_path: Path) -> None:
    assert read_model_defaults(tmp_path) == Defaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}')
    assert read_model_defaults(tmp_path) == Defaults(temperature=0.7, top_k=20, repetition_penalty=1.05)
    file.write_text('{"temperature": "warm"}')
    with pytest.raises(ModelError, match=r"generation_config.json.*temperature"):
        read_model_defaults(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config.json"):
        read_model_defaults(tmp_path)
