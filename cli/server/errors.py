"""Errors in OpenAI's form."""

import re
from collections.abc import Mapping
from typing import Any

from layerskip_core.errors import ConfigError, ContextError, LayerSkipError
from layerskip_core.serving import QueueFull, Stopped

# Options that have another name in the API.
_NAMES = {"max_new_tokens": "max_tokens", "schema": "response_format"}
_NAMES |= {name: f"guided_{name}" for name in ("regex", "grammar", "choice")}


class ApiError(Exception):
    """A request that is refused or fails, with the status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.document: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """Of an endpoint at which the parameter, the message's first word, has another name."""
        said = self.document["error"]
        if (name := names.get(param := said["param"])) is not None:
            said |= {"param": name, "message": said["message"].replace(param, name, 1)}
        return self


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The client's fault."""
    return ApiError(status, message, "invalid_request_error", param, code)


def api_error(error: BaseException) -> ApiError:
    """The response for an exception. An unexpected one says only that the server failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "rate_limit_error", code="queue_full")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "server_error", code="shutting_down")
    if isinstance(error, ConfigError):
        param = None if error.field is None else _NAMES.get(error.field, error.field)
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return invalid(_named(str(error)), param, code)
    if isinstance(error, LayerSkipError):
        return invalid(_named(str(error)))
    return ApiError(500, "the server failed to answer this request; its log says why", "server_error")


def _named(message: str) -> str:
    """A message of the core, with the API's names of the settings in it."""
    return re.sub(r"`(\w+)`", lambda match: _NAMES.get(match[1], match[1]), message)
