"""The page at `/`: a chat with the model, and a look at its cache."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()

PAGE = Path(__file__).parents[1] / "assets" / "page.html"


@router.get("/")
async def page() -> HTMLResponse:
    content, headers = load()
    return HTMLResponse(content, headers=headers)


@functools.cache
def load() -> tuple[str, dict[str, str]]:
    """The page, and headers that let it run what stands in it and talk to this server, nothing else."""
    content = PAGE.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src '{digest(content, 'script')}'; style-src '{digest(content, 'style')}'"
    )
    return content, {
        "Cache-Control": "no-store",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def digest(content: str, tag: str) -> str:
    """What a Content-Security-Policy calls the one inline element of this tag."""
    (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}"
