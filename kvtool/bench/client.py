"""The client of a server with OpenAI's API or SGLang's `/generate`: what it asks, and what the server says."""

import asyncio
import contextlib
import re
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx
import msgspec

from kvtool.bench.events import WorkItem
from kvtool.bench.streams import Pool, StreamReader
from kvtool.bench.target import Answer, Prompt, RequestFailed, as_messages, token_counter
from kvtool.errors import ConfigError
from kvtool.request import EngineInfo

if TYPE_CHECKING:
    pass

API = Literal["completions", "chat", "generate"]
PATHS: dict[API, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
MAX_SHORT_BYTES, SHORT_SECONDS = 16 << 20, 30.0  # of what is no stream: models, metrics


# One token each, with the space before, wherever English was among the texts.
COMMON_WORDS = (
    "the of and to in that was he it his is with as had you not be her on at by which have from this him but all she "
    "they were are my one so there been their we who an when no would them will or if what said up out into man do "
    "time could now then some more like"
)
WORDS = COMMON_WORDS.split()


class HttpTarget:
    """A server with OpenAI's API or SGLang's `/generate`.

    Attributes:
        url: of the server, without `/v1`.
        info: what the server says of itself; empty where it says nothing.
        engine: the same of its engine, if it is ours.

    Args:
        api: which of its routes is asked.
        extra_body: goes into every request, over all that is there.
        timeout: seconds for one request.
    """

    def __init__(
        self,
        url: str,
        api: API = "completions",
        *,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.url, self.api, self.name = base_url(url), api, ""
        self.vocab_size: int | None = None
        self.max_model_len: int | None = None
        self.count_tokens: Callable[[str], int] | None = None
        self.info: dict[str, Any] = {}
        self.engine: EngineInfo | None = None
        self._extra_body, self._timeout = extra_body or {}, timeout
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False)
        self._pool = Pool(urlsplit(self.url), headers)
        self._template_tokens: int | None = None  # of a chat; asked for when the first prompt of ids comes

    async def open(self, model: str | None = None) -> None:
        """See what is there.

        Args:
            model: as the server knows it; None: the first that it names.

        Raises:
            ConfigError: nobody answers there, or not for this model.
        """
        try:
            status, models = await self._ask("/v1/models")
            if status in (401, 403):
                raise ConfigError(f"--url {self.url}: the server wants a key; give it with --api-key or KVTOOL_API_KEY")
            about = _json(*await self._ask("/get_model_info"))
            self.info = _json(*await self._ask("/get_server_info"))
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ConfigError(
                f"--url {self.url}: cannot be reached ({why}); start the server, or correct it"
            ) from error
        try:
            cards = msgspec.convert(_json(status, models), Models).data
        except msgspec.ValidationError as error:
            raise ConfigError(f"--url {self.url}: its /v1/models is not OpenAI's: {error}; correct it") from error
        names = [card.id for card in cards]
        if model is not None and names and model not in names:
            raise ConfigError(f"--model {model}: the server at {self.url} has {', '.join(names)}; choose one of these")
        self.name = model or next(iter(names), "")
        card = next((card for card in cards if card.id == self.name), ModelCard(self.name))
        vocab_size = about.get("vocab_size")
        self.vocab_size = vocab_size if isinstance(vocab_size, int) else None
        self.max_model_len = card.max_model_len
        with contextlib.suppress(msgspec.ValidationError):
            self.engine = msgspec.convert(self.info.get("engine"), EngineInfo)
            self.count_tokens = token_counter(self.engine)

    async def close(self) -> None:
        self._pool.close()
        await self._http.aclose()

    async def _ask(self, route: str, method: str = "GET") -> tuple[int, bytes]:
        """Status and body of what is no stream.

        Raises:
            httpx.HTTPError: nothing came, or too much, or for too long.
        """

        async def read() -> tuple[int, bytes]:
            async with self._http.stream(method, route) as response:
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_SHORT_BYTES:
                        raise httpx.ReadError(f"{route} has over {MAX_SHORT_BYTES >> 20} MiB")
                return response.status_code, bytes(body)

        try:
            return await asyncio.wait_for(read(), SHORT_SECONDS)
        except asyncio.TimeoutError:
            raise httpx.ReadTimeout(f"{route} has no end after {SHORT_SECONDS:g} s") from None

    async def send(self, prompt: Prompt, item: WorkItem, answer: Answer) -> None:
        if self.api == "chat" and (ids := [token for token in prompt if isinstance(token, int)]):
            prompt = await self._question(ids, answer)
        reader = StreamReader(answer)
        body = msgspec.json.encode(self.body(prompt, item) | self._extra_body)
        answer.sent = perf_counter()
        try:
            await asyncio.wait_for(self._pool.post(PATHS[self.api], body, reader), self._timeout)
        except asyncio.TimeoutError:
            raise RequestFailed("timeout", f"no end after {self._timeout:g} s") from None
        finally:
            answer.ended = perf_counter()
        reader.finish()

    def body(self, prompt: Prompt, item: WorkItem) -> dict[str, Any]:
        """What is sent for a request, but for `extra_body`."""
        if self.api == "generate":
            sampling = {"max_new_tokens": item.output_tokens, "temperature": 0, "ignore_eos": not item.stops}
            prompt_field = "text" if isinstance(prompt, str) else "input_ids"
            return {prompt_field: prompt, "sampling_params": sampling, "stream": True}
        if self.api == "chat":
            asked: dict[str, Any] = {"messages": as_messages(prompt)}
        else:
            asked = {"prompt": prompt}
        if self.name:
            asked["model"] = self.name
        return asked | {
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "ignore_eos": not item.stops,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _question(self, ids: list[int], answer: Answer) -> str:
        """A question that the server will see as so many tokens as there are `ids`, by the words that these choose.

        Raises:
            ConfigError: there can be none.
        """
        if self._template_tokens is None:
            self._template_tokens = await self._measure_template()
        answer.template_tokens = self._template_tokens
        if len(ids) <= self._template_tokens:
            raise ConfigError(
                f"--prompt-tokens {len(ids)}: the server's chat template alone takes {self._template_tokens}; ask for "
                "more, or choose --api completions"
            )
        return " ".join(WORDS[token % len(WORDS)] for token in ids[self._template_tokens :])

    async def _measure_template(self) -> int:
        """Tokens of a chat beside its words, by what the server says of two chats."""
        counts = []
        for words in (WORDS[:8], WORDS):
            answer, question = Answer(), " ".join(words)
            await self.send(question, WorkItem(id=0, prompt=question, output_tokens=1), answer)
            counts.append((answer.prompt_tokens or 0) - len(words))
        if counts[0] != counts[1] or counts[0] < 0:
            raise ConfigError(
                "--api chat: the server splits words so that no exact length can be asked for; choose --api completions"
            )
        return counts[0]

    async def flush_cache(self) -> None:
        try:
            for route in ("/flush_cache", "/reset_prefix_cache"):  # ours and SGLang's, vLLM's
                if (await self._ask(route, "POST"))[0] == 200:
                    return
        except httpx.HTTPError:
            return  # a server that has gone; the requests that follow will tell
        raise ConfigError(f"--flush-cache: {self.url} has neither /flush_cache nor /reset_prefix_cache; leave it out")

    async def metrics(self) -> dict[str, float]:
        try:
            status, exposition = await self._ask("/metrics")
        except httpx.HTTPError:
            return {}
        return samples(exposition.decode(errors="replace")) if status == 200 else {}

    def describe(self) -> dict[str, Any]:
        return {"url": self.url, "api": self.api, "model": self.name, "server": self.info}


class ModelCard(msgspec.Struct):
    """What `/v1/models` says of one."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[ModelCard] = []


def base_url(url: str) -> str:
    """The server's address without route.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("no address")
    except ValueError as error:
        raise ConfigError(f"--url {url}: is no address of a server; write http://HOST:PORT") from error
    return f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/').removesuffix('/v1')}"


SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", re.MULTILINE)


def samples(exposition: str) -> dict[str, float]:
    """Values of Prometheus' text format by name, summed over labels; no buckets. Prometheus' own parser would keep the
    streams waiting."""
    values: dict[str, float] = {}
    for name, value in SAMPLE.findall(exposition):
        if not name.endswith("_bucket"):
            with contextlib.suppress(ValueError):
                values[name] = values.get(name, 0.0) + float(value)
    return values


def _json(status: int, body: bytes) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        value = msgspec.json.decode(body) if status == 200 else {}
    except (msgspec.DecodeError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}
