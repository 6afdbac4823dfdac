"""The application: its routes and what holds for all of them."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from kvtool.server import generate_api, openai_api
from kvtool.server.generation import Generator
from kvtool.server.responses import GeneratorArg, JSONBodies, error_body, install_error_handlers


def create_app(generator: Generator) -> FastAPI:
    app = FastAPI(title="kvtool", docs_url=None, redoc_url=None)
    app.state.generator = generator
    app.add_middleware(JSONBodies)
    install_error_handlers(app)
    app.include_router(openai_api.router)
    app.include_router(generate_api.router)
    app.add_api_route("/health", health)
    return app


async def health(generator: GeneratorArg) -> Response:
    if not generator.client.alive:
        return JSONResponse(error_body(503, "the engine has ended; restart the server", code="engine_dead"), 503)
    return Response()
