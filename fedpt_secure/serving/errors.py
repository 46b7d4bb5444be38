"""Errors in OpenAI's shape, which every client library of theirs understands.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

| status | type | when |
| --- | --- | --- |
| 400 | invalid_request_error | a parameter is unknown, out of range or not supported; a prompt is too long |
| 401 | invalid_request_error, code invalid_api_key | a key is asked for, and none or another was given |
| 404 | invalid_request_error, code model_not_found | no such model or path |
| 408, 413, 415, 421 | invalid_request_error | body too slow, too large, not JSON; a foreign Host header |
| 429 | rate_limit_error | too many requests of a key, or at once; `Retry-After` says when |
| 500, 503 | server_error | our fault, or the server is stopping |
| 502 | server_error, code black_box_error | the large model's API failed |
"""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from fedpt_secure.errors import BlackBoxError, ConfigError, FedptError, ModelError
from fedpt_secure.serving.scheduler import EngineFailure, Stopped


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def response(self) -> JSONResponse:
        """As HTTP."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def unexpected() -> ApiError:
    """What a client is told of a failure that no rule foresaw: nothing about it."""
    return ApiError(500, "the server failed to answer this request", kind="server_error", code="internal_error")


def told(error: FedptError) -> ApiError:
    """One of the package's errors as a client sees it."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, Stopped):
        return ApiError(503, error.message, kind="server_error", code="stopping")
    if isinstance(error, EngineFailure):
        return unexpected()
    if isinstance(error, BlackBoxError):
        # Its message quotes the API's answer, which may quote the prompts of others in the same batch, and names hosts.
        return ApiError(502, "the large model's API failed", kind="server_error", code="black_box_error")
    if isinstance(error, ConfigError | ModelError):
        return ApiError(400, message)
    return unexpected()
