"""Errors as clients see them: `{"error": {"message", "type", "param", "code"}}`, with a status and retry headers.

Who may read what: a message written for the caller (a bad field, a full swarm) is shown; whatever else goes wrong
inside is shown as its code only, because such messages name nodes and paths. The log has it under the request id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from shoal.errors import Full, PolicyUnmet, ShoalError, SwarmIncomplete, UsageError
from shoal.gateway.replies import dumps

# OpenAI's clients branch on the status and show `type`; these are the names their own API uses.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Said when an error of this kind brings no time of its own; clients wait at least this long before they try again.
_RETRY_AFTER_S = {"full": 1.0, "swarm_incomplete": 5.0, "policy_unmet": 30.0, "audit_unavailable": 30.0}

_PASSING = (408, 409, 429, 503)


class RequestError(UsageError):
    """The request cannot be answered as it is; `param` names the field, `status` is the HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_request",
        status: int = 400,
        hint: str = "",
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, retry_after_s=retry_after_s)
        self.param = param
        self.code = code
        self.http_status = status
        self.headers = dict(headers or {})


class AuditUnavailable(ShoalError):
    """Nothing is computed while nobody could say later who computed it."""

    code = "audit_unavailable"
    http_status = 503


class Interrupted(ShoalError):
    """The gateway stops, or failed, while an answer was running."""

    code = "interrupted"


def shown_to_callers(error: ShoalError) -> bool:
    """True when the message was written for whoever sent the request."""
    return isinstance(error, UsageError | Full | SwarmIncomplete | PolicyUnmet | AuditUnavailable)


def status_of(error: ShoalError) -> int:
    """The HTTP status; 500 for everything that is not the caller's doing, whatever the error means between nodes."""
    return error.http_status if shown_to_callers(error) else 500


def error_body(error: ShoalError) -> dict[str, Any]:
    """The JSON object of an error; the same in a response body and inside a stream."""
    if shown_to_callers(error):
        message = f"{error} {error.hint}".strip()
    else:
        message = "The request failed inside the swarm; the gateway's log has the cause under this request id."
    status = status_of(error)
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": error.code},
    }


def error_response(error: ShoalError) -> Response:
    """An error as a whole HTTP answer, with `retry-after` or `x-should-retry: false`, whichever is true."""
    headers = dict(getattr(error, "headers", {}))
    retry_after_s = error.retry_after_s or _RETRY_AFTER_S.get(error.code)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if status_of(error) not in _PASSING:
        headers["x-should-retry"] = "false"
    return Response(dumps(error_body(error)), status_of(error), headers, media_type="application/json")
