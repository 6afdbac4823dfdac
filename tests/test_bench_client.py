"""What a client makes of a response: every cut of it, every fault, and the same tokens over every API."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import h11
import msgspec
import pytest
from conftest import ServerProcess
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.bench.client import API, HttpTarget, samples
from kvtool.bench.events import WorkItem
from kvtool.bench.runner import check
from kvtool.bench.streams import ChunkedBody, Connection, StreamReader
from kvtool.bench.target import Answer, RequestFailed, engine_target
from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"  # up to the connection's end


def event(**chunk: Any) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def text(value: str, reason: str | None = None, ids: list[int] | None = None) -> bytes:
    return event(choices=[{"text": value, "finish_reason": reason, "token_ids": ids}])


def delta(reason: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"delta": fields, "finish_reason": reason}])


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event(choices=[], usage=counts | {"prompt_tokens_details": {"cached_tokens": cached}})


DONE = b"data: [DONE]\n\n"


@contextmanager
def scripted(*pieces: bytes, then: float = 0.0, braces: bool = True) -> Iterator[str]:
    """URL of a server that answers each request (with `braces` once its JSON is there) with `pieces`, a moment apart,
    waits and hangs up."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    received = b""
                    while b"\r\n\r\n" not in received or (braces and b"}" not in received):
                        received += connection.recv(1 << 16)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(0.01)
                    time.sleep(then)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def ask(url: str, api: API = "completions", prompt: Any = (1, 2, 3), timeout: float = 20, **item: Any) -> Answer:
    """The answer to one prompt, checked as the runner checks it."""
    asked = WorkItem(**({"id": 0, "prompt": prompt, "output_tokens": 2} | item))

    async def send() -> Answer:
        target, answer = HttpTarget(url, api, timeout=timeout), Answer()
        try:
            await target.send(asked.prompt, asked, answer)
            check(asked, asked.prompt, answer)
        finally:
            await target.close()
        return answer

    return asyncio.run(send())


# --- bytes -----------------------------------------------------------------------------------------------------------


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 999), max_size=8))
def test_a_chunked_body_is_what_h11_reads(parts: list[bytes], places: list[int]) -> None:
    framed = b"".join(b"%X;x=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nx-trailer: 1\r\n\r\n"
    oracle = h11.Connection(h11.CLIENT)
    oracle.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    oracle.send(h11.EndOfMessage())
    oracle.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framed)
    expected = b""
    while not isinstance(read := oracle.next_event(), h11.EndOfMessage):
        expected += bytes(read.data) if isinstance(read, h11.Data) else b""
    body, content = ChunkedBody(), b""
    for piece in cut(framed, places):
        assert not body.ended or not piece
        content += body.take(piece)
    assert body.ended
    assert content == expected


@given(st.lists(st.integers(0, 9999), max_size=8), st.booleans())
@settings(max_examples=50)
def test_events_are_the_same_however_they_are_cut(places: list[int], crlf: bool) -> None:
    stream = b": ping\n\n" + text("Zoë", ids=[1]) + text("", ids=[2]) + text("\n!", "length", [3]) + usage(3, 3) + DONE
    data = stream.replace(b"\n", b"\r\n") if crlf else stream
    answer = Answer()
    reader = StreamReader(answer)
    reader.begin(200, 0.0)
    for piece in cut(data, places):
        reader.data(piece, 1.0)
    reader.finish()
    assert (answer.text, answer.token_ids, "".join(answer.chunk_kinds)) == ("Zoë\n!", [1, 2, 3], "tit")
    assert (answer.prompt_tokens, answer.output_tokens, answer.finish_reason) == (3, 3, "length")


@given(st.binary(max_size=200))
def test_no_bytes_are_too_odd_for_a_reader(data: bytes) -> None:
    reader = StreamReader(Answer())
    reader.begin(200, 0.0)
    with suppress(RequestFailed):
        reader.data(data, 1.0)
        reader.finish()


# --- what counts -----------------------------------------------------------------------------------------------------


def test_the_first_token_is_no_role_and_reasoning_stands_apart() -> None:
    chunks = [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="yes"), delta("stop")]
    with scripted(HEAD, *chunks, usage(3, 2), DONE) as url:
        answer = ask(url, "chat", prompt="question")
    assert "".join(answer.chunk_kinds) == "erte"
    assert answer.first_byte is not None
    assert answer.sent < answer.first_byte < answer.chunk_times[0] < answer.chunk_times[1] < answer.chunk_times[2]
    assert answer.text == "yes"


def test_tokens_are_counted_by_ids_or_usage_never_by_chunks() -> None:
    with scripted(HEAD, text("a b", ids=[5, 6]), text(" c", "length", [7]), DONE) as url:
        assert ask(url, output_tokens=3).output_tokens == 3
    with scripted(HEAD, text("a b"), text(" c", "length"), usage(3, 9), DONE) as url:
        assert ask(url, output_tokens=9).output_tokens == 9
    with scripted(HEAD, text("a b"), text(" c", "length"), DONE) as url, pytest.raises(RequestFailed, match="neither"):
        ask(url)


# --- failures --------------------------------------------------------------------------------------------------------

GOOD = [HEAD, text("a", ids=[1]), text("b", "length", [2])]
FAILURES: list[tuple[str, str, list[bytes], dict[str, Any]]] = [
    ("connect", "closed", [], {}),
    ("connect", "no HTTP", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"], {}),
    ("http_status", "404: no one", [b'HTTP/1.1 404 Not Found\r\n\r\n{"error": {"message": "no one"}}'], {}),
    ("http_status", "500: <h1>", [b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\n<h1>"], {}),
    ("mid_stream", "ended before", GOOD[:2], {}),
    ("mid_stream", "closed", [HEAD.replace(b"connection: close", b"content-length: 9999"), *GOOD[1:]], {}),
    ("mid_stream", "ran out", [*GOOD[:2], event(error={"message": "ran out"})], {}),
    ("mid_stream", "not what", [*GOOD[:2], b"data: {oh\n\n"], {}),
    ("empty", "no token", [HEAD, text("", "stop", []), usage(3, 0), DONE], {}),
    ("empty", "no token", [HEAD], {}),
    ("wrong_length", "2 tokens came", [*GOOD, usage(3, 2), DONE], {"output_tokens": 4}),
    ("wrong_length", "saw 4 prompt", [*GOOD, usage(4, 2), DONE], {}),
    ("cached", "2 tokens of a new", [*GOOD, usage(3, 2, cached=2), DONE], {}),
]


@pytest.mark.parametrize("failure, message, pieces, item", FAILURES)
def test_failures_are_classed(failure: str, message: str, pieces: list[bytes], item: dict[str, Any]) -> None:
    with scripted(*pieces) as url, pytest.raises(RequestFailed, match=message) as failed:
        ask(url, **item)
    assert failed.value.failure == failure


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS: list[tuple[str, str, bytes, bytes]] = [
    ("connect", "its head", b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 9999),
    ("mid_stream", "size line", CHUNKED, b"1" * 99_999),
    ("mid_stream", "trailers", CHUNKED + b"0\r\n", b"x: y\r\n" * 9999),
    ("mid_stream", "no HTTP: a chunk of", CHUNKED + b"fffffffffff\r\n", b"x" * 9999),
    ("mid_stream", "an event has over", HEAD, b"data: x\n" * 99_999),
    ("mid_stream", "an event has over", HEAD + b"data: ", b"x" * 999_999),
    ("mid_stream", "no end", HEAD, text("") * 9999),
    ("mid_stream", "not what", HEAD, b'data: {"error":' + b"[" * 99_999 + b"\n\n"),
]


@pytest.mark.parametrize("failure, message, begin, more", ENDLESS)
def test_what_has_no_end_is_cut_off(
    failure: str, message: str, begin: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtool.bench.streams.MAX_EVENT_BYTES", 1 << 20)
    monkeypatch.setattr("kvtool.bench.streams.MAX_CHUNKS", 1 << 14)

    async def fed() -> None:
        connection, reader = Connection(), StreamReader(Answer())
        connection.connection_made(Unplugged())
        exchange = asyncio.ensure_future(connection.exchange(b"", reader))
        await asyncio.sleep(0)
        connection.data_received(begin)
        for _ in range(64):
            connection.data_received(more)
        with pytest.raises((ConnectionError, RequestFailed), match=message):
            await asyncio.wait_for(exchange, 5)
        assert (reader.status is None) == (failure == "connect")

    asyncio.run(fed())


class Unplugged(asyncio.Transport):
    """Takes what is sent, and is nowhere."""

    def write(self, data: object) -> None:
        pass

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("body", [b'{"data": 3}', b'{"data": ' + b"[" * 99_999, b"<h1>"])
def test_odd_models_are_an_error_or_none(body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"

    async def look(url: str) -> str:
        target = HttpTarget(url)
        try:
            await target.open()
        finally:
            await target.close()
        return target.name

    with scripted(head + body, braces=False) as url:
        if b"3" in body:
            with pytest.raises(ConfigError, match="not OpenAI's"):
                asyncio.run(look(url))
        else:
            assert asyncio.run(look(url)) == ""


def test_models_without_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtool.bench.client.MAX_SHORT_BYTES", 1 << 16)
    endless = scripted(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 99_999, then=30, braces=False)
    with endless as url, pytest.raises(ConfigError, match=r"cannot be reached .*/v1/models has over"):
        asyncio.run(HttpTarget(url).open())


def test_a_url_with_half_an_address_is_an_error() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        HttpTarget("http://[::1")


def test_what_is_allowed_is_no_failure() -> None:
    with scripted(*GOOD, usage(3, 2, cached=2), DONE) as url:
        assert ask(url, unique=False).cached_tokens == 2
        assert ask(url, unique=False, stops=True, output_tokens=9).output_tokens == 2


def test_a_server_that_says_nothing_more_runs_out_of_time() -> None:
    with scripted(*GOOD[:2], then=5) as url, pytest.raises(RequestFailed) as failed:
        ask(url, timeout=0.3)
    assert failed.value.failure == "timeout"


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RequestFailed) as failed:
        ask(url)
    assert failed.value.failure == "connect"


def test_an_idle_connection_that_the_server_closed_is_replaced() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*GOOD[1:], usage(3, 2), DONE)) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

    async def twice(url: str) -> list[str]:
        target, answers = HttpTarget(url), [Answer(), Answer()]
        for answer in answers:
            await target.send([1, 2, 3], WorkItem(id=0, prompt=[1, 2, 3], output_tokens=2), answer)
            await asyncio.sleep(0.05)
        await target.close()
        return [answer.text for answer in answers]

    with scripted(head, chunks) as url:
        assert asyncio.run(twice(url)) == ["ab", "ab"]


# --- real servers ----------------------------------------------------------------------------------------------------


def test_every_api_and_our_engine_give_the_same_tokens(server: ServerProcess) -> None:
    prompt = list(range(700, 730))
    item = WorkItem(id=0, prompt=prompt, output_tokens=12, unique=False)

    async def in_process() -> Answer:
        config = EngineConfig(kv=KVOptions(nbits="4"), kv_cache_memory=8 << 20, max_num_seqs=2)
        async with engine_target(config) as target:
            answer = Answer()
            await target.send(prompt, item, answer)
            return answer

    expected = asyncio.run(in_process())
    for api in ("completions", "generate"):
        answer = ask(server.url, api, prompt, output_tokens=12, unique=False)
        assert answer.token_ids == expected.token_ids
        assert sum(answer.chunk_tokens) == answer.output_tokens == expected.output_tokens == 12
        assert answer.prompt_tokens == expected.prompt_tokens == 30
        assert answer.finish_reason == expected.finish_reason == "length"
    assert expected.chunk_kinds == ["i"] * 12
    assert expected.queue_seconds is not None and 0 <= expected.queue_seconds < 5


def test_metrics_are_summed_over_labels() -> None:
    text = """# HELP a Things.
# TYPE a counter
a_total{model="x y",k="}"} 2
a_total{model="z"} 3.5 1700000000
b 1e3
c_bucket{le="1"} 7
d NaN
"""
    values = samples(text)
    assert {name: values[name] for name in ("a_total", "b")} == {"a_total": 5.5, "b": 1000.0}
    assert "c_bucket" not in values
