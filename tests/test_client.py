"""The process boundary, with a real engine process behind it."""

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from kvtool import engine_process
from kvtool.client import EngineClient
from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import EngineDeadError, KVToolError, RequestError
from kvtool.processes import frame
from kvtool.request import EngineFailed, EngineInfo, Request, SamplingParams

CONFIG = EngineConfig(kv=KVOptions(nbits="4"), max_num_seqs=1, kv_cache_memory=16 << 20)


def with_engine(test: Callable[[EngineClient], Awaitable[None]], config: EngineConfig = CONFIG) -> None:
    async def run() -> None:
        client = await EngineClient.start(config)
        try:
            await asyncio.wait_for(test(client), 120)
        finally:
            await client.close()
        assert not client.alive

    asyncio.run(run())


def request(name: str, max_tokens: int, prompt: int = 20) -> Request:
    return Request(
        name, [5 + i for i in range(prompt)], SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    )


def test_tokens_are_those_of_the_engine_in_process():
    async def test(client: EngineClient) -> None:
        ids, reasons = [], []
        async for tokens in client.submit(request("a", 30)):
            ids += tokens.token_ids
            reasons.append(tokens.finish_reason)
        assert ids == Engine(CONFIG).generate([request("a", 30).prompt], request("a", 30).params)[0].token_ids
        assert reasons == [None] * 29 + ["length"]

    with_engine(test)


def test_leaving_early_makes_room_for_the_next():
    async def test(client: EngineClient) -> None:
        stream = client.submit(request("long", 2000))
        await anext(stream)
        await stream.aclose()
        async for tokens in client.submit(request("next", 3)):  # the only slot is free again
            assert tokens.id == "next"

    with_engine(test)


def test_what_can_never_run_is_an_error_for_that_request_alone():
    async def test(client: EngineClient) -> None:
        with pytest.raises(RequestError, match="context") as caught:
            await anext(client.submit(request("bad", 5000)))
        assert caught.value.param == "max_tokens"
        assert len([tokens async for tokens in client.submit(request("good", 3))]) == 3

    with_engine(test)


def test_an_engine_that_cannot_start_says_why():
    with pytest.raises(KVToolError, match="too small"):
        asyncio.run(EngineClient.start(EngineConfig(kv_cache_memory=10)))


def test_python_files_in_the_current_folder_are_not_run(tmp_path, monkeypatch):
    (tmp_path / "msgspec.py").write_text("raise SystemExit('ran')")
    (tmp_path / "random.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)

    async def test(client: EngineClient) -> None:
        assert len([tokens async for tokens in client.submit(request("a", 2))]) == 2

    with_engine(test)


def test_a_sigterm_that_reaches_the_engine_too_is_the_servers_to_answer():
    async def test(client: EngineClient) -> None:
        stream = client.submit(request("a", 200))
        await anext(stream)
        os.kill(client._process.pid, signal.SIGTERM)
        assert len([tokens async for tokens in stream]) == 199

    with_engine(test)


def test_a_bug_while_the_engine_starts_is_named(monkeypatch):
    def broken(config: EngineConfig) -> Engine:
        raise ZeroDivisionError("of the test's making")

    monkeypatch.setattr(engine_process, "Engine", broken)
    ours, theirs = socket.socketpair()
    ours.sendall(frame((CONFIG, False)))
    engine_process.serve(theirs, [])
    answer = msgspec.msgpack.decode(ours.recv(1 << 16)[4:], type=EngineInfo | EngineFailed)
    assert isinstance(answer, EngineFailed)
    assert answer.error == "ZeroDivisionError: of the test's making (a bug in kvtool)"


def test_a_killed_engine_ends_every_stream():
    async def test(client: EngineClient) -> None:
        streams = [client.submit(request(name, 2000)) for name in ("runs", "waits")]
        await anext(streams[0])
        waiting = asyncio.ensure_future(anext(streams[1]))
        await asyncio.sleep(0)
        os.kill(client._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            while True:
                await anext(streams[0])
        with pytest.raises(EngineDeadError):
            await waiting
        assert await client.wait_closed() == -signal.SIGKILL and not client.alive
        with pytest.raises(EngineDeadError):
            await anext(client.submit(request("late", 1)))

    with_engine(test)
