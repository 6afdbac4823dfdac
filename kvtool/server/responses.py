"""What every route needs to answer: the engine, and errors in OpenAI's form."""

import re
import reprlib
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from kvtool.errors import EngineDeadError, KVToolError, RequestError
from kvtool.server.generation import ContextLengthError, NotSharedError, QueueFullError, Shared, TextEngine

SHARED_HEADER = "x-kvtool-shared"


def _engine(request: Request) -> TextEngine:
    engine: TextEngine = request.app.state.engine
    return engine


# Where pydantic's own words are about Python.
WORDS = {"missing": "is missing", "model_attributes_type": "should be an object", "too_short": "is empty"}

EngineArg = Annotated[TextEngine, Depends(_engine)]


def cache_salt(asked: str | None, request: Request) -> str:
    """Who may share prefixes with a request: those of the same salt, by default those of the same API key."""
    of_key: str = getattr(request.state, "cache_salt", "")
    return asked or of_key


def shared_with(request: Request) -> Shared | None:
    """What a router says of a request that two engines share: `ID`, or `ID HOST:PORT` where the other one goes on.

    Raises:
        RequestError: it says something else.
    """
    text = request.headers.get(SHARED_HEADER)
    if text is None:
        return None
    words = re.fullmatch(r"([\w-]{1,64})(?: (\S{1,256}))?", text)
    if words is None:
        raise RequestError(f"{SHARED_HEADER}: {text:.80} is neither ID nor ID HOST:PORT")
    return Shared(words[1], words[2])


class UnknownModelError(RequestError):
    """A request for another model than the one that is served."""


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body that tell a client of `error`."""
    if isinstance(error, UnknownModelError):
        return 404, error_body(404, str(error), error.param, "model_not_found")
    if isinstance(error, ContextLengthError):
        return 400, error_body(400, str(error), error.param, "context_length_exceeded")
    if isinstance(error, RequestError):
        return 400, error_body(400, str(error), error.param)
    if isinstance(error, NotSharedError):
        return 409, error_body(409, str(error), code="not_shared")
    if isinstance(error, QueueFullError):
        return 429, error_body(429, str(error), code="queue_full")
    if isinstance(error, EngineDeadError):
        return 503, error_body(503, str(error), code="engine_dead")
    if isinstance(error, RequestValidationError):
        return 400, error_body(400, *_first_fault(error))
    if isinstance(error, StarletteHTTPException):
        return error.status_code, error_body(error.status_code, _unreadable(error.__cause__) or str(error.detail))
    return 500, error_body(
        500, str(error) if isinstance(error, KVToolError) else "internal error; see the server's log"
    )


def _unreadable(cause: BaseException | None) -> str | None:
    """What is wrong with a body that Python's json cannot take, though it may be JSON."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body: {cause.reason} at byte {cause.start}; send JSON in UTF-8"
    if isinstance(cause, ValueError):
        return "the body: it holds an integer of too many digits; send a shorter one"
    return None


def _first_fault(error: RequestValidationError) -> tuple[str, str | None]:
    """Message and field of the first of pydantic's complaints."""
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return f"the body is no valid JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}", None
    path = [str(part) for part in fault["loc"][1:]]
    path += [fault.get("ctx", {}).get("field")] if fault["type"] == "unsupported" else []
    message = WORDS.get(fault["type"], fault["msg"].removeprefix("Input "))
    if not path:
        return f"the body: {message}; send a JSON object", None
    given = (
        "" if fault["type"] in ("missing", "unsupported") else f"; got {reprlib.repr(fault['input']):.60}"
    )  # that of a long list takes long
    return f"{'.'.join(path)}: {message}{given}", ".".join(path)


def install_error_handlers(app: FastAPI) -> None:
    """Every failure becomes OpenAI's error object."""

    def answer(_: Request, error: Exception) -> Response:
        status, body = error_of(error)
        return JSONResponse(body, status, getattr(error, "headers", None))

    def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        allowed = (error.headers or {}).get("Allow")
        what = f"is for {allowed}, not for {request.method}" if allowed else "is no route of this server"
        body = error_body(error.status_code, f"{request.scope['path']:.80} {what}")
        return JSONResponse(body, error.status_code, error.headers)

    def nobody_listens(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    for kind in (RequestValidationError, StarletteHTTPException, KVToolError, Exception):
        app.add_exception_handler(kind, answer)
    for status in (404, 405):
        app.add_exception_handler(status, no_route)
    app.add_exception_handler(ClientDisconnect, nobody_listens)
