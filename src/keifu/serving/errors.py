"""Errors of the service in OpenAI's format: {"error": {"message", "type", "param", "code", "request_id"}}.

Paths of other protocols have their format: Anthropic's {"type": "error", "error": {...}}, ollama's {"error": "text"}.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from keifu.errors import UserError
from keifu.serving.facts import current

LOG = logging.getLogger("keifu.serving")
ANTHROPIC = {  # types of errors by status
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
UNION = r"body|str|int|float|bool|(?!\d)[\w-]+\[.*|function-.*|\w*(?:Item|NamedTool)"  # in a path: types, not fields
FORM = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required": ["message"]}}}
ERROR = {"description": "An error, in a sentence", "content": {"application/json": {"schema": FORM}}}
TEXT_FORM = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
TEXT_ERROR = {"description": "An error, in a sentence", "content": {"application/json": {"schema": TEXT_FORM}}}
TEXT_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": TEXT_ERROR, "5XX": TEXT_ERROR}  # of ollama's paths
BODY = {  # messages for a body that is not valid JSON
    UnicodeDecodeError: "The body is not UTF-8 text: send JSON in UTF-8.",
    RecursionError: "The body's JSON is nested too deeply: send a flatter one.",
}


class ApiError(Exception):
    """Error that is sent to the client.

    param: name of the wrong field. code: a short name for programs. retry: seconds after which the same request may
    succeed. close: whether to close the connection. reason: the message for the log, without values sent by the
    client.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None,
        close: bool = False, reason: str | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry, self.close = status, param, code, retry, close
        self.reason = reason or message

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer, and store the reason for the access log."""
        facts = current()
        facts.reason = self.reason
        error_type = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        about = {"param": self.param, "code": self.code, "request_id": facts.id}
        if facts.protocol == "ollama":
            return {"error": str(self)}
        if facts.protocol == "anthropic":
            error_type = ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            error = {"type": error_type, "message": str(self), **about}
            return {"type": "error", "error": error, "request_id": facts.id}
        return {"error": {"message": str(self), "type": error_type, **about}}

    def response(self) -> Response:
        """Return the HTTP response. Half a surrogate pair is escaped, so that it can be sent."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        headers |= {"Connection": "close"} if self.close else {}
        return Response(json.dumps(self.body(), ensure_ascii=True), self.status, headers, "application/json")


def of_exception(error: BaseException, fields: Sequence[str] = ()) -> ApiError:
    """Return the client's error for any exception. A bug of keifu is also logged.

    Args:
        error: the exception.
        fields: names of the request's fields. A `UserError` that begins with one of them is assigned to it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        first = re.match(r"\w+", str(error))
        text = str(error).replace("with --cut", "with the field cut")  # the message names an option of the command line
        return ApiError(400, text, first[0] if first and first[0] in fields else None)
    if isinstance(error, TimeoutError):
        return ApiError(504, "The answer took longer than this server allows: ask for fewer tokens.", code="timeout")
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return ApiError(503, "There is not enough memory for this request: make it smaller.", code="out_of_memory")
    LOG.error("Request %s failed by a bug of keifu's.", current().id, exc_info=error)
    return ApiError(500, f"This is a bug of the server, not yours ({type(error).__name__}); its log says more.")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Combine pydantic's errors into one that contains the field's name and value.

    A field with several types has one error for each. The deepest one belongs to the type that the client meant. A
    wrong length of a list has priority.
    """
    first = max(errors, key=lambda e: (e["type"].startswith("too_"), len(e["loc"]), e["type"] == "literal_error"))
    path = ".".join(str(part) for part in first["loc"] if not re.fullmatch(UNION, str(part)))
    error_type, message = first["type"], str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    if error_type == "json_invalid":
        position = f" at character {first['loc'][-1]}" if len(first["loc"]) > 1 else ""
        reason = first.get("ctx", {}).get("error", message)
        return ApiError(400, f"The body is not JSON{position}: {reason}.", code="invalid_json")
    if error_type == "missing":
        return ApiError(400, f"The field {path or 'body'} is missing.", path or None, "missing_field")
    if error_type in ("unknown_field", "refused_field"):
        name = first["ctx"]["name"]
        return ApiError(400, str(first["msg"]), f"{path}.{name}" if path else name, error_type)
    if isinstance(first.get("input"), bytes):  # the body was not parsed as JSON
        return ApiError(400, "The body is not declared as JSON: send the header Content-Type: application/json.")
    value = json.dumps(first.get("input"), default=str)
    short_value = value if len(value) <= 60 else f"{value[:60]}…"
    sentence = f"{message[:1].lower()}{message[1:]}."
    subject = path or "The body"
    return ApiError(400, f"{subject} is {short_value}: {sentence}", path or None, reason=f"{subject}: {sentence}")


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """Return the error for a request that the framework refuses before it reaches a route."""
    message = reason = BODY.get(type(error.__cause__), str(error.detail))  # type: ignore[arg-type]
    if error.status_code == 404:
        message = f"There is nothing at {request.url.path}: /openapi.json lists what there is."
        reason = "There is nothing at this path."
    elif error.status_code == 405:
        message = f"{request.method} is not for {request.url.path}: /openapi.json says what is."
    return ApiError(error.status_code, message, reason=reason)


def install(app: FastAPI) -> None:
    """Make the app answer every error in this format."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError | ValidationError):
            return of_validation(error.errors()).response()
        return (_of_http(request, error) if isinstance(error, HTTPException) else of_exception(error)).response()

    for error_class in (RequestValidationError, ValidationError, HTTPException, ApiError, UserError, Exception):
        app.add_exception_handler(error_class, answer)
