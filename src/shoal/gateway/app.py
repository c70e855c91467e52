"""The gateway's HTTP surface: every route, and who may use it.

Each route is guarded by itself and refuses by default; nothing is decided from the text of a path, which proxies and
clients can bend.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal import __version__
from shoal.errors import ShoalError, SwarmIncomplete
from shoal.gateway.accounts import Account, Accounts
from shoal.gateway.audit import Audit
from shoal.gateway.embeddings import Embedder
from shoal.gateway.errors import RequestError, error_response, shown_to_callers
from shoal.gateway.generate import Generator, OfferedModel
from shoal.gateway.idempotency import Endpoint, Idempotency
from shoal.gateway.limits import ClientGone, Gate, HostCheck, Limits
from shoal.gateway.metrics import CONTENT_TYPE, Metrics
from shoal.gateway.quotas import Quotas
from shoal.gateway.replies import json_response
from shoal.gateway.responses import Responder
from shoal.gateway.served import Served, ready_state, status_page

logger = logging.getLogger("shoal.gateway")
access = logging.getLogger("shoal.gateway.access")

Page = Callable[[Scope], Awaitable[Response]]


def create_app(
    models: Mapping[str, Served],
    accounts: Accounts,
    *,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    audit: Audit | None = None,
) -> Starlette:
    """The gateway as an ASGI application, for one model or several.

    `hosts` are names besides the loopback ones by which this gateway may be addressed. `origins` are web origins
    ("https://chat.example.org") whose pages may read its answers in a browser. `metrics` is given by whoever counts
    failovers into it. `audit` keeps who computed what; None: nobody does.
    """
    limits = limits or Limits()
    metrics = metrics or Metrics()
    metrics.watch(lambda: {name: served.coverage() for name, served in models.items()})
    offered = {name: OfferedModel(served) for name, served in models.items()}
    quotas = Quotas(accounts)
    keeping = audit or Audit()
    generator = Generator(offered, limits, metrics, Gate(limits.requests), quotas, keeping)
    embedder = Embedder(generator)
    responder = Responder(generator)
    idempotency = Idempotency(limits)

    def seen_by(account: Account) -> dict[str, Served]:
        return {name: served for name, served in models.items() if account.may_use(name)}

    async def list_models(scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        entries = [_model_entry(served) for served in seen_by(account).values()]
        await json_response({"object": "list", "data": entries})(scope, receive, send)

    async def show_model(scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        model = generator.pick(scope["path_params"]["id"], account)
        await json_response(_model_entry(model.served))(scope, receive, send)

    async def show_status(scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        await json_response(await status_page(_chosen(scope, seen_by(account))))(scope, receive, send)

    async def health(scope: Scope) -> Response:
        return json_response({"status": "ok"})

    async def version(scope: Scope) -> Response:
        return json_response({"version": __version__})

    async def readiness(scope: Scope) -> Response:
        await keeping.ready()  # also tries whether a log that failed takes entries again
        state = ready_state(_chosen(scope, models))
        if not state.ready:
            return error_response(SwarmIncomplete(state.reason))
        return json_response({"status": "ready", "models": dict(state.models)})

    async def exposition(scope: Scope) -> Response:
        return Response(metrics.exposition(), media_type=None, headers={"content-type": CONTENT_TYPE})

    def keyed(path: str, method: str, endpoint: Endpoint) -> Route:
        return Route(path, _Keyed(accounts, endpoint), methods=[method])

    def counted(path: str, endpoint: Endpoint) -> Route:
        async def count(scope: Scope, receive: Receive, send: Send, account: Account) -> None:
            scope["state"]["headers"].update(quotas.request(account))
            await idempotency.run(endpoint, scope, receive, send, account)

        return keyed(path, "POST", count)

    def local(path: str, page: Page) -> Route:
        return Route(path, _KeyedUnlessLocal(accounts, page), methods=["GET"])

    # Starlette calls each with the error it is named for; its type hints say only Exception.
    handlers: dict[Any, Any] = {
        ShoalError: _on_shoal_error,
        HTTPException: _on_http_error,
        500: _on_fault,
    }
    app = Starlette(
        routes=[
            counted("/v1/chat/completions", generator.chat),
            counted("/v1/completions", generator.completion),
            counted("/v1/responses", responder.respond),
            counted("/v1/embeddings", embedder.embed),
            keyed("/v1/models", "GET", list_models),
            keyed("/v1/models/{id:path}", "GET", show_model),
            keyed("/v1/shoal/status", "GET", show_status),
            local("/health", health),
            local("/ready", readiness),
            local("/metrics", exposition),
            local("/version", version),
        ],
        middleware=[Middleware(_Identified, metrics=metrics), Middleware(HostCheck, hosts=hosts), *_cors(origins)],
        exception_handlers=handlers,
    )
    # A redirect would be built from the Host header.
    app.router.redirect_slashes = False
    return app


class _Keyed:
    """An endpoint that only a valid key opens."""

    def __init__(self, accounts: Accounts, endpoint: Endpoint) -> None:
        self._accounts = accounts
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send, authenticate(scope, self._accounts))


class _KeyedUnlessLocal:
    """A page for probes: open to this machine, behind a key for every other peer."""

    def __init__(self, accounts: Accounts, page: Page) -> None:
        self._accounts = accounts
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_local(scope):
            authenticate(scope, self._accounts)
        response = await self._page(scope)
        await response(scope, receive, send)


def authenticate(scope: Scope, accounts: Accounts) -> Account:
    """Whose request this is. Raises RequestError (401)."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    account = accounts.check(key.strip()) if scheme.lower() == "bearer" else None
    if account is None:
        raise RequestError(
            "No valid API key was given.",
            code="invalid_api_key",
            status=401,
            hint="Send the header Authorization: Bearer sk-shoal-...",
            headers={"www-authenticate": 'Bearer realm="shoal"'},
        )
    return account


def _chosen(scope: Scope, models: Mapping[str, Served]) -> Mapping[str, Served]:
    """The models, or the one that `?model=` names. Raises RequestError (404)."""
    name = QueryParams(scope["query_string"]).get("model")
    if name is None:
        return models
    if name not in models:
        raise RequestError(
            f"The model {name[:100]!r} does not exist here.", param="model", code="model_not_found", status=404
        )
    return {name: models[name]}


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Lets pages of these origins read answers. They need a key like everybody; cookies play no part."""
    if not origins:
        return []
    exposed = ["openai-processing-ms", "retry-after", "x-request-id", "x-shoal-ignored", "x-should-retry"]
    exposed += [f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in _COUNTED]
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript package sends a dozen of its own
            expose_headers=exposed,
        )
    ]


_COUNTED = ("requests", "tokens")


def _is_local(scope: Scope) -> bool:
    """True for a peer on this machine, unless it says that it forwards for somebody else."""
    headers = Headers(scope=scope)
    if "forwarded" in headers or "x-forwarded-for" in headers or not scope.get("client"):
        return False
    return ip_address(scope["client"][0]).is_loopback


def _model_entry(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}


class _Identified:
    """Gives every request an id that its answer, its errors and the log carry; counts it and logs one line.

    The line has the route as it is declared, never the query or the body: those can hold what a user wrote.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        added: dict[str, str] = {}  # what inner parts want to say in headers of the answer, whatever it will be
        scope.setdefault("state", {}).update(request_id=request_id, headers=added)
        started_s = time.perf_counter()
        status = 0

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started_s) * 1e3))
                for name, value in added.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, send_identified)
        except ClientGone:
            pass  # nobody is left to be answered
        except Exception:
            status = status or 500  # sent further out, by `_on_fault`
            raise
        finally:
            shown = str(status) if status else "none"  # cut off, or left by its client, before any answer
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_requests.labels(method, _route(scope), shown).inc()
            elapsed_s = time.perf_counter() - started_s
            access.info("%s %s %s %s %.3f s%s", request_id, method, _route(scope), shown, elapsed_s, _retries(scope))


def _retries(scope: Scope) -> str:
    """How often the client has tried before, if it says so; OpenAI's packages do."""
    said = Headers(scope=scope).get("x-stainless-retry-count", "0")
    return f" retry {said}" if re.fullmatch(r"[1-9][0-9]{0,3}", said) else ""


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _route(scope: Scope) -> str:
    """The declared path of the route that took the request; "unknown" keeps strangers from making up labels."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "unknown"


async def _on_shoal_error(request: Request, error: ShoalError) -> Response:
    if not shown_to_callers(error):
        logger.error("request %s: %s", request.state.request_id, error)
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        known = RequestError("There is nothing at this URL.", code="unknown_url", status=404)
    elif error.status_code == 405:
        known = RequestError(f"{request.method[:20]} is not possible here.", code="method_not_allowed", status=405)
    else:
        known = RequestError(error.detail, status=error.status_code)
    known.headers.update(error.headers or {})
    return error_response(known)


async def _on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours. Its text stays in the log: it may name paths or quote the request."""
    response = error_response(ShoalError("fault"))
    response.headers["x-request-id"] = request.state.request_id
    return response
