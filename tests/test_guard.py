"""The server's door: who comes in, with what, and that those inside do not notice the rest."""

import asyncio
import base64
import gzip
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import ServerProcess, serving
from hypothesis import given
from hypothesis import strategies as st

from kvtool.server.guard import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, Guard, Outline, Refusal

KEY = "secret-5"
BEARER = {"Authorization": f"Bearer {KEY}"}
BODY = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    with serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def http(guarded: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60, headers=BEARER) as client:
        yield client


@contextmanager
def connection(server: ServerProcess) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), timeout=20) as connected:
        yield connected


def answer(server: ServerProcess, *pieces: bytes) -> bytes:
    """All that comes back for these bytes, until the server closes."""
    with connection(server) as connected:
        received = b""
        try:
            for piece in pieces:
                connected.sendall(piece)
            while more := connected.recv(2**16):
                received += more
        except ConnectionError:
            pass
        return received


def asking(authorization: str) -> bytes:
    """A request with this header, which httpx would not always send."""
    lines = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {authorization}\r\n\r\n"
    return lines.encode("latin-1")


def status(response: bytes) -> int:
    return int(response.split(maxsplit=2)[1])


def error(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# The key


def test_only_the_probes_need_no_key(guarded: ServerProcess) -> None:
    with httpx.Client(base_url=guarded.url) as stranger:
        probes = [(method, path) for method in ("GET", "HEAD") for path in ("/health", "/ready")]
        assert [stranger.request(*probe).status_code for probe in probes] == [200] * 4
        for method, path in [
            *[("GET", path) for path in ("/", "/v1/models", "/metrics", "/version", "/server_info", "/nowhere")],
            *[("POST", path) for path in ("/v1/completions", "/generate", "/tokenize", "/flush_cache", "/health/x")],
        ]:
            response = stranger.request(method, path)
            assert response.status_code == 401, path
            assert error(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "target",
    [
        *("//health", "/health/", "/Health", "/HEALTH", "/%68ealth", "/health%2f", "/health;x", "/./health"),
        *("/v1/../health", "/health/../v1/models", "/%2e%2e/v1/models", "//v1/models", "/v1//models", "/V1/models"),
        *("/health/..;/v1/models", "/health%00", "/ready/../generate", "http://localhost/health", "*"),
    ],
)
def test_no_other_spelling_of_a_path_opens_the_door(guarded: ServerProcess, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert status(answer(guarded, request.encode())) in (400, 401)
    assert status(answer(guarded, request.replace("\r\n\r\n", "\r\nX-Original-URL: /health\r\n\r\n").encode())) != 200


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
        ("Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode(), 200),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY.upper()}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (KEY, 401),
        ("Basic " + base64.b64encode(f"{KEY}:".encode()).decode(), 401),
        ("Basic !", 401),
        ("Bearer \xff", 401),
    ],
)
def test_a_key_is_sent_as_a_token_or_as_a_password(guarded: ServerProcess, authorization: str, expected: int) -> None:
    assert status(answer(guarded, asking(authorization))) == expected


def test_a_browser_is_asked_on_the_page_alone(guarded: ServerProcess) -> None:
    assert httpx.get(guarded.url).headers["www-authenticate"].startswith("Basic ")
    assert httpx.get(f"{guarded.url}/v1/models").headers["www-authenticate"] == "Bearer"


def test_another_site_s_page_can_send_nothing(http: httpx.Client) -> None:
    """A form or plain text needs no leave of the server's, and the browser adds the password that it knows."""
    sent = http.post("/generate", json=BODY, headers={"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"})
    assert sent.status_code == 403
    assert "another site" in error(sent)["message"]
    assert http.post("/generate", json=BODY, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert http.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link may lead here"


def test_the_key_is_told_to_nobody(guarded: ServerProcess, http: httpx.Client) -> None:
    assert KEY not in guarded.card
    assert KEY not in http.get("/server_info").text
    assert KEY not in http.get("/metrics").text


def test_without_a_key_an_empty_token_is_as_good_as_none(server: ServerProcess) -> None:
    assert status(answer(server, asking("Bearer "))) == 200


def test_prefixes_are_shared_by_those_of_one_key() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope.get("state", {}))

    scope = {
        "type": "http",
        "method": "GET",
        "raw_path": b"/",
        "headers": [(b"authorization", b"Bearer k")],
        "state": {"other": 1},
    }
    asyncio.run(Guard(app, "k")(scope, None, None))  # type: ignore[arg-type]
    assert seen == {"other": 1, "cache_salt": hashlib.sha256(b"k").hexdigest()}
    seen.clear()
    asyncio.run(Guard(app)(scope, None, None))  # type: ignore[arg-type]
    assert "cache_salt" not in seen


# Bodies


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, "multipart/form-data"),
        ({"Content-Type": "application/xml"}, "application/xml"),
        ({"Content-Type": "image/png"}, "image/png"),
        ({"Content-Encoding": "gzip"}, "gzip"),
        ({"Content-Encoding": "br"}, "br"),
    ],
)
def test_a_body_of_another_kind_is_a_400_that_names_it(http: httpx.Client, headers: dict[str, str], said: str) -> None:
    response = http.post("/generate", content=gzip.compress(b"[" * 2**20), headers=headers)
    assert response.status_code == 400
    assert said in error(response)["message"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8", None]
)
def test_json_is_json_whatever_it_is_called(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert http.post("/generate", content=json.dumps(BODY), headers=headers).status_code == 200


def head(length: str, path: str = "/generate", more: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {length}", more]
    return "\r\n".join([line for line in lines if line]).encode() + b"\r\n\r\n"


def test_a_length_beyond_the_limit_is_refused_before_any_of_it_comes(guarded: ServerProcess) -> None:
    with connection(guarded) as connected:
        connected.sendall(head(str(10**15)))
        assert status(connected.recv(2**16)) == 413


def test_a_body_without_a_length_is_read_up_to_the_limit(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b'"' + b"a" * 2**16

    assert http.post("/generate", content=endless()).status_code == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "+5", "5, 6", "0x10", "9" * 5000])
def test_a_length_that_is_none_is_a_400(guarded: ServerProcess, length: str) -> None:
    assert status(answer(guarded, head(length), b"{}")) == 400


def test_a_length_shorter_than_the_body_shows(guarded: ServerProcess) -> None:
    first, second = answer(guarded, head("5"), b'{"a"}' + b"GARBAGE\r\n\r\n").split(b"HTTP/1.1 ")[1:]
    assert (first[:3], second[:3]) == (b"400", b"400")


def test_headers_have_an_end(guarded: ServerProcess) -> None:
    response = answer(guarded, head("2", more="X-Long: " + "a" * 2**20), b"{}")
    assert not response or status(response) in (400, 431)


def test_a_body_that_does_not_come_is_a_408() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("came through")

    async def receive() -> Any:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": len(sent) < 2}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "raw_path": b"/generate", "headers": [(b"content-length", b"1000")]}
    asyncio.run(Guard(app, body_seconds=0.2)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert not sent[-1]["more_body"]


values = st.recursive(
    st.text('a"\\[]{},\n\ud7ff😀', max_size=8) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\[{', max_size=3), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def containers_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + sum(map(containers_of, inner))


@given(values, st.data(), st.booleans())
def test_the_outline_is_that_of_the_values(value: Any, data: st.DataObject, ascii: bool) -> None:
    """However the text is cut into pieces."""
    text = json.dumps(value, ensure_ascii=ascii).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    outline, deepest = Outline(), 0
    for start, end in pairwise([0, *cuts, len(text)]):
        outline.push(text[start:end])
    assert (outline.depth, outline.containers) == (0, containers_of(value))
    outline = Outline()
    for byte in text:
        outline.push(bytes([byte]))
        deepest = max(deepest, outline.depth)
    assert deepest == depth_of(value)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, True),
        (b"[" * (MAX_DEPTH + 1), False),
        (b'{"a":' * (MAX_DEPTH + 1), False),
        (b'"' + b"[" * 10**6 + b'"', True),
        (b'"\\"' + b"[" * 10**6 + b'"', True),
        (b'["\\\\",' + b"[" * MAX_DEPTH, False),
        (b"[" + b"1," * (MAX_VALUES - 1), True),
        (b"[" + b"1," * MAX_VALUES, False),
        (b"[]," * MAX_CONTAINERS, True),
        (b"[]," * (MAX_CONTAINERS + 1), False),
        ("[]".encode("utf-16"), False),
    ],
    ids=range(11),
)
def test_how_much_fits(text: bytes, fits: bool) -> None:
    outline = Outline()
    if fits:
        outline.push(text)
    else:
        with pytest.raises(Refusal) as caught:
            outline.push(text)
        assert caught.value.status == 400


def test_deep_bodies_are_a_400(http: httpx.Client) -> None:
    for content in (b"[" * 10**4 + b"]" * 10**4, b'{"text": ' * 10**4 + b"1" + b"}" * 10**4):
        response = http.post("/generate", content=content)
        assert response.status_code == 400
        assert "nested too deep" in error(response)["message"]


# Those inside


def texts(url: str, tokens: int = 200) -> tuple[str, list[float]]:
    """The text of a streamed answer, and when its parts came."""
    body = BODY | {"stream": True, "sampling_params": BODY["sampling_params"] | {"max_new_tokens": tokens}}  # type: ignore[operator]
    times, text = [], ""
    with httpx.stream("POST", f"{url}/generate", json=body, headers=BEARER, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                text = json.loads(line.removeprefix("data: "))["text"]
    return text, times


def longest_gap(times: list[float]) -> float:
    return max(later - earlier for earlier, later in pairwise(times))


BIG = {
    "text": b'{"text": "' + b"a" * 10**7 + b'"}',
    "ids": b'{"input_ids": [' + b"1234567890," * 900_000 + b"1]}",
    "small ids": b'{"input_ids": [' + b"1," * 5_000_000 + b"1]}",
    "lists": b'{"text": [' + b"[]," * 3_000_000 + b"[]]}",
    "strings": b'{"text": [' + b'"[",' * 2_500_000 + b'"["]}',
    "escapes": b'{"text": "' + b"\\n" * 5_000_000 + b'"}',
    "deep": b"[" * 10**7,
}


def test_large_bodies_change_no_stream(guarded: ServerProcess, http: httpx.Client) -> None:
    """Nor hold one up for long; most of a gap is the two processes' share of a busy machine."""
    alone, _ = texts(guarded.url)
    found: list[tuple[str, list[float]]] = []
    thread = threading.Thread(target=lambda: found.append(texts(guarded.url)))
    thread.start()
    for content in BIG.values():
        assert http.post("/generate", content=content).status_code == 400
    thread.join()
    assert found[0][0] == alone
    assert longest_gap(found[0][1]) < 3


def test_those_who_only_hold_connections_delay_nobody(guarded: ServerProcess, http: httpx.Client) -> None:
    """A thousand say nothing, fifty send a body byte by byte, and one reads nothing of its long answers."""

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(5):
            assert http.post("/generate", json=BODY).status_code == 200
        return time.perf_counter() - started

    alone = min(seconds() for _ in range(3))
    sampling = {"max_new_tokens": 120, "ignore_eos": True}
    long = json.dumps({"text": ["Once"] * 16, "stream": True, "sampling_params": sampling}).encode()
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connection(guarded))
        drips = [stack.enter_context(connection(guarded)) for _ in range(50)]
        for drip in drips:
            drip.sendall(head("1000") + b"{")
        for drip in drips:
            drip.sendall(b" ")
        reader = stack.enter_context(connection(guarded))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(head(str(len(long))) + long)
        wait_until(lambda: stats(http)["running"] > 0)
        wait_until(lambda: stats(http)["running"] == 0)
        assert min(seconds() for _ in range(3)) < 3 * alone + 0.5


def stats(http: httpx.Client) -> dict[str, int]:
    found: dict[str, int] = http.get("/server_info").json()["stats"]
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
