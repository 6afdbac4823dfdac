"""The application: its routes and what holds for all of them."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from kvtool.server import generate_api, openai_api
from kvtool.server.generation import TextEngine
from kvtool.server.responses import EngineArg, JSONBodies, error_body, install_error_handlers


def create_app(engine: TextEngine) -> FastAPI:
    app = FastAPI(title="kvtool", docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.add_middleware(JSONBodies)
    install_error_handlers(app)
    app.include_router(openai_api.router)
    app.include_router(generate_api.router)
    app.add_api_route("/health", health)
    return app


async def health(engine: EngineArg) -> Response:
    if not engine.client.alive:
        return JSONResponse(error_body(503, "the engine has ended; restart the server", code="engine_dead"), 503)
    return Response()
