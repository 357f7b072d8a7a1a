"""The page for people at /: files of this package, and the policy that lets it load and ask this server alone."""

import base64
import hashlib
import os
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from keifu import lineage
from keifu.errors import UserError, require_known, unknown
from keifu.serving.errors import ApiError

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data: blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
LANGUAGES = ("en", "ja")
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def in_language(page: bytes, language: str) -> bytes:
    """Return the page that begins in this language, unless its reader chose another; "": in the browser's."""
    if not language:
        return page
    require_known("language (KEIFU_LANG)", language, LANGUAGES)
    return page.replace(b'<html lang="en"', f'<html lang="{language}" data-language="{language}"'.encode(), 1)


def routes() -> APIRouter:
    """Return the routes of the page and its files, which are read once."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    files["index.html"] = in_language(files["index.html"], os.environ.get("KEIFU_LANG", ""))

    def answer(name: str, request: Request) -> Response:
        tag = f'"{hashlib.sha256(files[name]).hexdigest()[:16]}"'
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=f"{TYPES[Path(name).suffix]}; charset=utf-8")

    router.add_api_route("/", partial(answer, "index.html"))
    router.add_api_route("/docs", partial(answer, "docs.html"))

    @router.get("/lineage")
    async def landmarks() -> Response:
        try:
            page, digest = lineage.page(), hashlib.sha256(lineage.style().encode()).digest()
        except UserError as error:
            raise ApiError(404, str(error)) from None
        source = f"style-src 'sha256-{base64.b64encode(digest).decode()}'"
        own = HEADERS["Content-Security-Policy"].replace("style-src 'self'", source)
        headers = {**HEADERS, "Content-Security-Policy": own}
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    @router.get("/page/{name}")
    async def part(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, str(unknown("file of the page called", name, files)))
        return answer(name, request)

    return router
