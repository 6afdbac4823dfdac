"""One address before prefill and decode servers: each request gets one of both, and another one when that fails."""

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvtool.config import ServerConfig
from kvtool.errors import ConfigError, KVToolError
from kvtool.server.guard import Guard
from kvtool.server.lifecycle import GuardedServer, address_of
from kvtool.server.responses import SHARED_HEADER, error_body
from kvtool.server.streaming import EventStream, event, while_connected

Role = Literal["prefill", "decode"]
T = TypeVar("T")

SHARED_ROUTES = ("/v1/completions", "/v1/chat/completions", "/generate")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
KEPT_HEADERS = ("authorization", "accept", "content-type")
START_SECONDS, HEALTH_SECONDS, CONNECT_SECONDS = 60.0, 1.0, 5.0
MAX_SICK, SICK_SECONDS = 2, 3.0  # probes in a row without an answer in time: a side that hangs is found in 8 s
CHUNK_CHARS, MAX_CHUNKS, MAX_KNOWN = 256, 256, 1 << 16  # of prompts, for the choice of a prefill side
SPREAD = 2  # requests more than the least busy side may have, for the sake of a prefix
PROBE_SECONDS = 0.25  # at the start
NOT_SHARED = 409

logger = logging.getLogger(__name__)


class SideGone(KVToolError):
    """A server has ended, or does not answer, before it has said anything of a request."""


@dataclass(eq=False)
class Side:
    """One server behind the router.

    Attributes:
        kv_address: of a decode side, where KV arrives.
        num_requests: that it does something for.
        gone: set while it does not answer.
    """

    role: Role
    url: str
    kv_address: str = ""
    num_requests: int = 0
    sick: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`, which ends when the server does.

        Raises:
            SideGone: it did.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise SideGone(f"the {self.role} side {self.url} does not answer any more")
            return task.result()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError):
                self.gone.set()  # until a probe says otherwise
            raise SideGone(f"the {self.role} side {self.url} has gone ({error or type(error).__name__})") from error
        finally:
            task.cancel()
            gone.cancel()


class Prefixes:
    """Which prefill side has seen which beginnings of prompts, the newest so many of them."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, Side] = OrderedDict()

    def choose(self, sides: Sequence[Side], prompt: str) -> Side:
        """The side that has seen most of the prompt, unless it is busier than others; it will have seen all of it."""
        least = min(side.num_requests for side in sides)
        allowed = [side for side in sides if side.num_requests <= least + SPREAD]
        digests = list(self._digests(prompt))
        known = (self._seen.get(digest) for digest in reversed(digests))
        chosen = next((side for side in known if side in allowed), None)
        chosen = chosen or min(sides, key=lambda side: side.num_requests)
        for digest in digests:
            self._seen[digest] = chosen
            self._seen.move_to_end(digest)
        while len(self._seen) > MAX_KNOWN:
            self._seen.popitem(last=False)
        return chosen

    def _digests(self, prompt: str) -> Iterator[bytes]:
        digest = b""
        for start in range(0, min(len(prompt), CHUNK_CHARS * MAX_CHUNKS), CHUNK_CHARS):
            digest = hashlib.sha256(digest + prompt[start : start + CHUNK_CHARS].encode()).digest()
            yield digest


class Router:
    """Gives each request a prefill and a decode side.

    As long as a client has seen nothing of an answer, the request is sent again when a side fails: to others, or to
    one side alone, which then computes all of it. Later on the client gets an error event.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], api_key: str | None = None) -> None:
        self.sides = [Side("prefill", url) for url in prefill] + [Side("decode", url) for url in decode]
        self._prefixes = Prefixes()
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), limits=limits)

    async def start(self, seconds: float = START_SECONDS) -> None:
        """Wait until all sides answer, and hear who they are.

        Raises:
            ConfigError: one does not answer, or is not what it should be.
        """
        models = set()
        for side in self.sides:
            info = await self._introduce(side, seconds)
            handoff = (info.get("configuration", {}).get("engine", {}).get("handoff") or {}).get("role")
            if handoff != side.role:
                raise ConfigError(f"--{side.role} {side.url}: is no server with --role {side.role}")
            port = str(info["engine"]["kv_address"]).rpartition(":")[2]
            side.kv_address = f"{urlsplit(side.url).hostname}:{port}" if port else ""
            models.add(info["model"])
        if len(models) > 1:
            raise ConfigError(f"the sides serve different models: {', '.join(sorted(models))}")
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._watcher.cancel()
        await self._http.aclose()

    async def _introduce(self, side: Side, seconds: float) -> dict[str, Any]:
        deadline = asyncio.get_running_loop().time() + seconds
        while await self._status(side) != 200:
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"--{side.role} {side.url}: nobody answers there, tried for {seconds:g} s; start it")
            await asyncio.sleep(PROBE_SECONDS)
        try:
            response = await self._http.get(f"{side.url}/server_info", headers=self._headers, timeout=CONNECT_SECONDS)
            if response.status_code == 401:
                raise ConfigError(f"--{side.role} {side.url}: wants a key; give this router the same --api-key")
            info: dict[str, Any] = response.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(f"--{side.role} {side.url}: says nothing of itself ({error})") from error
        return info

    async def _status(self, side: Side) -> int | None:
        """What a side says when asked whether it is ready; None: nothing."""
        try:
            return (await self._http.get(f"{side.url}/ready", timeout=SICK_SECONDS)).status_code
        except httpx.HTTPError:
            return None

    async def _watch(self) -> None:
        """See who is there."""

        async def probe(side: Side) -> None:
            well = await self._status(side) == 200
            side.sick = 0 if well else side.sick + 1
            if well and side.gone.is_set():
                logger.warning("the %s side %s is back", side.role, side.url)
                side.gone.clear()
            elif side.sick == MAX_SICK:
                logger.warning("the %s side %s does not answer", side.role, side.url)
                side.gone.set()

        while True:
            await asyncio.gather(*map(probe, self.sides))
            await asyncio.sleep(HEALTH_SECONDS)

    def there(self, role: Role) -> list[Side]:
        """Sides that answer."""
        return [side for side in self.sides if side.role == role and not side.gone.is_set()]

    async def handle(self, http: Request) -> Response:
        """Answer a request of a client."""
        if http.url.path in ("/health", "/ready"):
            well = bool(self.there("decode") or self.there("prefill"))
            return Response() if well else unavailable("no side answers")
        body = await http.body()
        work = self._answer(http, body)
        return await (while_connected(http, work) if body else work)

    async def _answer(self, http: Request, body: bytes) -> Response:
        tried: list[Side] = []
        while True:
            with contextlib.suppress(SideGone):
                return await self._try(http, body, tried)

    async def _try(self, http: Request, body: bytes, tried: list[Side]) -> Response:
        """One way to answer; a side that fails is added to `tried`, which are left alone.

        Raises:
            SideGone: it was none; the client has seen nothing.
        """
        prefills, decodes = ([side for side in self.there(role) if side not in tried] for role in ("prefill", "decode"))
        if http.method == "POST" and http.url.path in SHARED_ROUTES and prefills and decodes:
            decode = min(decodes, key=lambda side: side.num_requests)
            prefill = self._prefixes.choose(prefills, prompt_of(body))
            return await self._share(http, body, prefill, decode, tried)
        alone = decodes or prefills
        if not alone:
            return unavailable("no server that has not failed is left; try again later")
        side = min(alone, key=lambda side: side.num_requests)
        with side.busy(), failing(side, tried):
            return await self._relay(side, await side.unless_gone(self._send(side, http, body)))

    async def _share(self, http: Request, body: bytes, prefill: Side, decode: Side, tried: list[Side]) -> Response:
        """A prefill and a decode side do their parts."""
        request_id = uuid4().hex
        push = f"{request_id} {decode.kv_address}"
        with prefill.busy(), decode.busy():
            answer = asyncio.ensure_future(decode.unless_gone(self._send(decode, http, body, request_id)))
            begun = asyncio.ensure_future(prefill.unless_gone(self._begin(prefill, http, body, push)))
            try:
                await asyncio.wait({answer, begun}, return_when=asyncio.FIRST_COMPLETED)
                if begun.done() and not answer.done():
                    with failing(prefill, tried):
                        begun.result()
                with failing(decode, tried):
                    return await self._relay(decode, await answer)
            finally:
                begun.cancel()
                answer.cancel()

    async def _send(self, side: Side, http: Request, body: bytes, shared: str | None = None) -> httpx.Response:
        """The head of a side's response; a decode side's comes with its first token."""
        headers = {name: http.headers[name] for name in KEPT_HEADERS if name in http.headers}
        headers |= {} if shared is None else {SHARED_HEADER: shared}
        path = http.url.path + (f"?{http.url.query}" if http.url.query else "")
        request = self._http.build_request(http.method, side.url + path, headers=headers, content=body)
        return await self._http.send(request, stream=True)

    async def _begin(self, side: Side, http: Request, body: bytes, shared: str) -> None:
        """Let a prefill side do its part, unless the request is one that the decode side answers alone.

        Raises:
            SideGone: it does not do it.
        """
        response = await self._send(side, http, body, shared)
        try:
            if response.status_code not in (200, NOT_SHARED):
                raise SideGone(f"the prefill side {side.url} answers with status {response.status_code}")
            async for _ in response.aiter_raw():
                pass
        finally:
            await response.aclose()

    async def _relay(self, side: Side, response: httpx.Response) -> Response:
        """A side's response as ours: a stream as it comes, anything else once it is whole.

        Raises:
            SideGone: the side went before that.
        """
        if response.status_code == 503:  # its engine has ended, or it is about to
            await response.aclose()
            raise SideGone(f"the {side.role} side {side.url} takes nothing more")
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            try:
                content = await side.unless_gone(response.aread())
            finally:
                await response.aclose()
            return Response(content, response.status_code, media_type=kind or None)

        async def events() -> AsyncGenerator[str, None]:
            try:
                with side.busy():
                    parts = response.aiter_text()
                    while (part := await side.unless_gone(anext(parts, None))) is not None:
                        yield part
            except SideGone as error:
                yield event(error_body(502, str(error), code="side_gone"))
            finally:
                await response.aclose()

        return EventStream(events())


@contextlib.contextmanager
def failing(side: Side, tried: list[Side]) -> Iterator[None]:
    """Remember a side that fails."""
    try:
        yield
    except SideGone as error:
        logger.warning("%s; the request is sent elsewhere", error)
        tried.append(side)
        raise


def unavailable(why: str) -> Response:
    return JSONResponse(error_body(503, why, code="unavailable"), 503, {"Retry-After": "1"})


def prompt_of(body: bytes) -> str:
    """What a body's prompt begins with, in a form that is the same for the same beginnings."""
    try:
        fields = json.loads(body)
    except ValueError:  # the server will say what is wrong with it
        return ""
    if not isinstance(fields, dict):
        return ""
    asked = next((fields[name] for name in ("messages", "prompt", "text", "input_ids") if name in fields), "")
    return asked if isinstance(asked, str) else json.dumps(asked)


def run_router(
    prefill: Sequence[str], decode: Sequence[str], config: ServerConfig, on_ready: Callable[[str], None]
) -> None:
    """Route until SIGINT or SIGTERM.

    Raises:
        ConfigError: host and port cannot be listened on, or a side is not there or not what it should be.
        KeyboardInterrupt: after SIGINT, when all is closed.
    """
    with address_of(config) as listener:

        async def serve() -> list[signal.Signals]:
            router = Router(
                [base("--prefill", url) for url in prefill], [base("--decode", url) for url in decode], config.api_key
            )
            app = Starlette(
                routes=[Route("/{path:path}", router.handle, methods=METHODS)],
                exception_handlers={ClientDisconnect: lambda http, error: Response(status_code=499)},
            )
            server = RouterServer(Guard(app, config.api_key), config.shutdown_timeout)
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, server.stop, number)
            starting = asyncio.ensure_future(router.start())
            stopped = asyncio.ensure_future(server.stopped.wait())
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not starting.done():
                starting.cancel()
                return server.received
            starting.result()
            listener.listen()
            on_ready(f"http://{config.host}:{listener.getsockname()[1]}")
            await server.serve(sockets=[listener])
            await router.close()
            return server.received

        if signal.SIGINT in asyncio.run(serve()):
            raise KeyboardInterrupt


class RouterServer(GuardedServer):
    """Lets answers under way finish when it is told to stop, and ends at once when told again."""

    def __init__(self, guard: Guard, shutdown_timeout: float) -> None:
        super().__init__(guard, int(shutdown_timeout))
        self.received, self.stopped = list[signal.Signals](), asyncio.Event()

    def stop(self, number: signal.Signals) -> None:
        self.force_exit = bool(self.received)
        self.received.append(number)
        self.guard.draining = True
        self.should_exit = True
        self.stopped.set()


def base(option: str, url: str) -> str:
    """A server's address without a route.

    Raises:
        ConfigError: it is none.
    """
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{option} {url}: is no address of a server; write http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"
