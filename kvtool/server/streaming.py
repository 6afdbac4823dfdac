"""Server-sent events, and an eye on the client who reads them."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Send

from kvtool.errors import KVToolError
from kvtool.server.generation import Piece
from kvtool.server.responses import error_of

T = TypeVar("T")

logger = logging.getLogger(__name__)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went.
    """
    task = asyncio.ensure_future(work)
    # The body has been read, so all that can still come from the client is its leaving.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; the generator behind them is closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events)
        self.events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.events):
            await super().stream_response(send)


async def stream(
    request: Request,
    pieces: AsyncGenerator[Piece, None],
    show: Callable[[Piece], dict[str, Any]],
    last: Callable[[], Iterable[dict[str, Any]]] = tuple,
) -> Response:
    """An event for each piece, then those of `last`, then [DONE].

    The response begins with the first piece: what goes wrong before it still gets a status of its own. What goes wrong
    later is an event with an error, and no [DONE] follows.
    """
    piece = await while_connected(request, anext(pieces))

    async def events() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(pieces):
                yield event(show(piece))
                async for later in pieces:
                    yield event(show(later))
            for closing in last():
                yield event(closing)
            yield "data: [DONE]\n\n"
        except Exception as error:
            if not isinstance(error, KVToolError):
                logger.exception("a stream failed")
            yield event(error_of(error)[1])

    return EventStream(events())


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
