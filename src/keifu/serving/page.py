"""Web page at /: files of this package, with a policy that only allows requests to this server."""

import base64
import hashlib
import html
import os
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Request, Response

from keifu import lineage
from keifu.errors import UserError, require_known, unknown
from keifu.inference.text.sampling_params import SETTINGS
from keifu.serving.errors import ApiError
from keifu.serving.openai.schemas import NUMBERS

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LINKS = {  # links of the lineage: to its other language, and to the page
    "en": '<p><a href="/lineage?language=ja" lang="ja">日本語</a> · <a href="/">The page of this server</a></p>',
    "ja": '<p><a href="/lineage?language=en" lang="en">English</a> · <a href="/">このサーバーのページ</a></p>',
}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def in_language(page: bytes, language: str) -> bytes:
    """Return the page in this language, unless the reader chose another. "": the browser's language."""
    if not language:
        return page
    require_known("language (KEIFU_LANG)", language, lineage.LANGUAGES)
    return page.replace(b'<html lang="en"', f'<html lang="{language}" data-language="{language}"'.encode(), 1)


def preferred(accepted: str) -> str:
    """Return the first language of an Accept-Language header that the lineage has; else English."""
    tags = (part.partition(";")[0].strip().lower().partition("-")[0] for part in accepted.split(","))
    return next((tag for tag in tags if tag in lineage.LANGUAGES), "en")


def with_controls(page: bytes) -> bytes:
    """Return the page with a control for each sampling setting that is one number."""
    controls = []
    for name, row in SETTINGS.items():
        if name not in NUMBERS or row.range is None:
            continue
        help_text, step = html.escape(row.setting.help), "1" if row.range.is_integer else "any"
        least = 0 if row.range.or_zero else row.range.least
        controls.append(
            f'<label title="{help_text}"><span data-setting="{name}"></span>'
            f'<input id="{name}" type="number" min="{least:g}" max="{row.range.most}" step="{step}"></label>'
        )
    return page.replace(b"<!-- sampling settings -->", "\n      ".join(controls).encode(), 1)


def routes() -> APIRouter:
    """Return the routes of the page and its files. The files are read once."""
    router = APIRouter(include_in_schema=False)
    paths = FOLDER.rglob("*")
    files = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths if path.suffix in TYPES}
    default = os.environ.get("KEIFU_LANG", "")
    files["index.html"] = in_language(with_controls(files["index.html"]), default)

    def answer(name: str, request: Request) -> Response:
        tag = f'"{hashlib.sha256(files[name]).hexdigest()[:16]}"'
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=f"{TYPES[Path(name).suffix]}; charset=utf-8")

    router.add_api_route("/", partial(answer, "index.html"), methods=["GET", "HEAD"])  # ollama's clients ask HEAD
    router.add_api_route("/docs", partial(answer, "docs.html"))

    @router.get("/lineage")
    async def landmarks(request: Request, language: str = default) -> Response:
        language = language or preferred(request.headers.get("accept-language", ""))
        try:
            page = lineage.page(language).replace("</h1>", f"</h1>{LINKS[language]}", 1)
        except UserError as error:
            raise ApiError(404, str(error)) from None
        digest = base64.b64encode(hashlib.sha256(lineage.style().encode()).digest()).decode()
        policy = POLICY.replace("style-src 'self'", f"style-src 'sha256-{digest}'")
        headers = {**HEADERS, "Content-Security-Policy": policy}
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    @router.get("/page/{name:path}")
    async def part(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, str(unknown("file of the page called", name, files)))
        return answer(name, request)

    return router
