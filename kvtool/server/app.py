"""The application: its routes and what holds for all of them."""

from typing import Any

from fastapi import FastAPI

from kvtool.server import admin_api, generate_api, openai_api, page, tokenizer_api
from kvtool.server.generation import TextEngine
from kvtool.server.metrics import Metrics
from kvtool.server.responses import install_error_handlers


def create_app(engine: TextEngine, metrics: Metrics, configuration: dict[str, Any]) -> FastAPI:
    """The application on `engine`; `configuration` is what it tells of itself."""
    app = FastAPI(title="kvtool", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.engine, app.state.metrics, app.state.configuration = engine, metrics, configuration
    install_error_handlers(app)
    for part in (openai_api, generate_api, tokenizer_api, admin_api, page):
        app.include_router(part.router)
    return app
