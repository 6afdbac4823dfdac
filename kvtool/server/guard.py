"""Who and what comes in: the API key, and bodies that are small, quick and flat enough to be read."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import re
from collections.abc import Mapping
from itertools import accumulate

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvtool.server.responses import error_body

MAX_HEADER_BYTES = 2**16
MAX_BODY_BYTES = 16 * 2**20
MAX_DEPTH = 128
# Python needs some 100 ns for a number and 500 ns for a list, and nobody else's turn comes meanwhile.
MAX_VALUES, MAX_CONTAINERS = 2**19, 2**16
BODY_SECONDS = 30.0
LINGER_SECONDS = 2.0

NEEDS_NO_KEY = {b"/health", b"/ready"}  # as they come over the wire: no other spelling of a path is like these
OPEN_TO_THE_END = {b"/health", b"/metrics"}
# `curl -d` says form, and a browser's fetch says plain text, whatever they send.
READ_AS_JSON = {"application/json", "application/x-www-form-urlencoded", "text/plain", "text/json"}
CLOSE = (b"connection", b"close")


class Refusal(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class Guard:
    """Stands before the application, as ASGI middleware.

    Requests come through with their whole body read, as JSON by content type, and with `state["cache_salt"]`, a hash
    of the key, if one is needed.

    Attributes:
        draining: nothing new comes in.
        num_under_way: requests that have come and are not answered in full.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None, body_seconds: float = BODY_SECONDS) -> None:
        self.app, self.body_seconds = app, body_seconds
        self.draining, self.num_under_way = False, 0
        self._key = api_key.encode() if api_key else None
        self._idle = asyncio.Event()

    async def drain(self) -> None:
        """Refuse what comes from now on, and wait until all that came before is answered."""
        self.draining = True
        if self.num_under_way:
            self._idle.clear()
            await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.num_under_way += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.num_under_way -= 1
            if not self.num_under_way:
                self._idle.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                raise Refusal(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes; send fewer")
            self._admit(scope["method"], scope["raw_path"], headers)
            body = await self._body(headers, receive) if has_body(headers) else b""
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send, has_body(headers))
            return
        if body is None:
            return

        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        async def send_and_close(message: Message) -> None:
            if self.draining and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), CLOSE]}
            await send(message)

        typed = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*typed, (b"content-type", b"application/json")]}
        if self._key:
            scope["state"] = {**scope.get("state", {}), "cache_salt": hashlib.sha256(self._key).hexdigest()}
        await self.app(scope, receive_whole, send_and_close)

    def _admit(self, method: str, path: bytes, headers: Mapping[bytes, bytes]) -> None:
        """Raises Refusal unless whoever asks has the key, asks of their own will, and is not too late."""
        if self._key and path not in NEEDS_NO_KEY:
            given = credentials(headers.get(b"authorization", b""))
            if not hmac.compare_digest(given, self._key):
                what = "a wrong API key" if given else "no API key"
                # The page is where a person stands who can be asked.
                scheme = 'Basic realm="kvtool", charset="UTF-8"' if path == b"/" else "Bearer"
                message = f"{what} was sent; send the header `Authorization: Bearer KEY`"
                raise Refusal(401, message, "invalid_api_key", {"WWW-Authenticate": scheme})
        # A page anywhere can make its reader's browser send a form or plain text here, key and all.
        if method not in ("GET", "HEAD") and headers.get(b"sec-fetch-site") == b"cross-site":
            raise Refusal(
                403, "a page of another site sent this; send requests from the server's own page or a program"
            )
        if self.draining and path not in OPEN_TO_THE_END:
            raise Refusal(503, "the server is shutting down; ask another one", "shutting_down", {"Connection": "close"})

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """All of the body; None: the client has gone."""
        coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if coding not in ("", "identity"):
            raise Refusal(400, f"Content-Encoding: {coding:.40} is not supported; send the body as it is")
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind and kind not in READ_AS_JSON and not kind.endswith("+json"):
            raise Refusal(400, f"Content-Type: {kind:.80} is not supported; send application/json")
        if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            raise too_large()
        try:
            return await asyncio.wait_for(read(receive), self.body_seconds)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self.body_seconds:g} seconds; send it faster or in parts"
            raise Refusal(408, message) from None


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0").strip(b"0") != b"" or b"transfer-encoding" in headers


def credentials(authorization: bytes) -> bytes:
    """The key in an Authorization header: a bearer's token, or the password that a browser has asked for."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value.strip()).partition(b":")[2]
    return b""


def too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less at once")


async def read(receive: Receive) -> bytes | None:
    """All of the body, looked through as it comes; None: the client has gone.

    Raises:
        Refusal: it is more than is ever read.
    """
    pieces, size, outline = list[bytes](), 0, Outline()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise too_large()
        outline.push(piece)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


NOT_MARKS = bytes(set(range(256)) - set(b'[]{},"'))
FOLD = bytes.maketrans(b"{}", b"[]")
STRING = re.compile(rb'"[^"]*"?')
STEP = {ord("["): 1, ord("]"): -1}


class Outline:
    """Depth and number of the values in a JSON text that comes in pieces, known before Python makes objects of them.

    Nothing here depends on the text being valid.
    """

    def __init__(self) -> None:
        self._open = b""  # a quote, if the last piece ended within a string
        self._escape = b""  # a backslash, if it ended with one
        self.depth = self.values = self.containers = 0

    def push(self, piece: bytes) -> None:
        """Raises Refusal if there is too much of anything."""
        if b"\0" in piece:  # JSON has none, but Python would read UTF-16, whose bytes mean something else
            raise Refusal(400, "the body: it holds NUL bytes; send JSON in UTF-8")
        # Pairs first, so that what is left of a run of backslashes belongs to what follows it.
        piece = (self._escape + piece).replace(rb"\\", b"")
        self._escape = b"\\" if piece.endswith(b"\\") else b""
        marks = self._open + piece.replace(rb"\"", b"").translate(FOLD, NOT_MARKS)
        self._open = b'"' if marks.count(b'"') % 2 else b""
        # Without its empty strings the text is the same, seen from here, and much shorter.
        marks = STRING.sub(b"", marks.replace(b'""', b""))

        brackets = marks.replace(b",", b"")
        depths = list(accumulate(map(STEP.__getitem__, brackets), initial=self.depth))
        self.depth = depths[-1]
        if max(depths) > MAX_DEPTH:
            most = f"send at most {MAX_DEPTH} in each other"
            raise Refusal(400, f"the body: its lists or objects are nested too deep; {most}")
        opening = brackets.count(b"[")
        self.containers += opening
        self.values += opening + marks.count(b",")
        if self.containers > MAX_CONTAINERS or self.values > MAX_VALUES:
            most = f"{MAX_VALUES:,} values, {MAX_CONTAINERS:,} of them lists and objects"
            raise Refusal(400, f"the body: it holds more than {most}; send less at once")


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send, unread: bool) -> None:
    """Answer with the error. A body that is still coming is let come for a moment and dropped, because a connection
    that is closed on a client while it sends takes the answer with it."""

    async def linger() -> None:
        while (await receive()).get("more_body", False):
            pass

    async def send_first(message: Message) -> None:
        last = message["type"] == "http.response.body"
        await send({**message, "more_body": True} if last else message)
        if last:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(linger(), LINGER_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    headers = refusal.headers | ({"Connection": "close"} if unread else {})
    response = JSONResponse(error_body(refusal.status, str(refusal), code=refusal.code), refusal.status, headers)
    await response(scope, receive, send_first if unread else send)
