"""Every route of the gateway with every kind of credential that must not open it.

The routes come from the application, so a new one is tried without a word here. What may answer is a list: whoever adds
a route that answers without a key has to write it down.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from shoal.errors import ShoalError
from shoal.hostile.http import MODEL, application

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PROBES = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Open to this machine without a key: no prompts, no answers, no names of users in them."""
LISTS = frozenset({"/v1/models", "/v1/shoal/status"})
"""Open to every valid key; they show only what that key may use."""
HERE, THERE = "127.0.0.1", "192.0.2.9"
"""The peer's address: this machine, another one."""
_TEXT = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "max_tokens": 2}
BODIES = (_TEXT, {"prompt": "hi", "max_tokens": 2})
"""Between them every endpoint finds what it needs; fields it does not know it ignores."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A way to ask. `opens`: which declared paths may answer it with 2xx; None means every one."""

    name: str
    headers: Mapping[str, str]
    peer: str
    opens: frozenset[str] | None
    model: str = MODEL


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and its status."""

    method: str
    path: str
    """As it is declared."""
    credential: Credential
    status: int

    @property
    def unexpected(self) -> bool:
        """It was answered with 2xx, and should not have been."""
        return 200 <= self.status < 300 and self.credential.opens is not None and self.path not in self.credential.opens

    def __str__(self) -> str:
        return f"{self.method} {self.path} with {self.credential.name}: {self.status}"


def paths(app: Starlette) -> list[str]:
    """The declared paths. Raises ShoalError for anything that is no plain route: this walk would miss what is in it."""
    others = [route for route in app.routes if not isinstance(route, Route)]
    if others:
        raise ShoalError(
            f"The application has {type(others[0]).__name__} {others[0]}, which this walk cannot see into."
        )
    return sorted({route.path for route in app.routes if isinstance(route, Route)})


def credentials(good: str, other: str, revoked: str) -> Iterator[Credential]:
    """Everything but a good key: `other` is valid for another model only, `revoked` was valid once."""
    for peer, where, open_ in ((HERE, "", PROBES), (THERE, " from afar", frozenset[str]())):
        for name, value in (
            ("no key", None),
            ("an empty header", ""),
            ("a bare Bearer", "Bearer"),
            ("a made-up key", "Bearer sk-shoal-" + "0" * 64),
            ("a good key cut short", f"Bearer {good[:-1]}"),
            ("a good key with more", f"Bearer {good}0"),
            ("a good key as Basic", f"Basic {good}"),
            ("a revoked key", f"Bearer {revoked}"),
            ("a key of bytes", "Bearer \u00ff\u00fe"),
        ):
            yield Credential(name + where, {} if value is None else {"authorization": value}, peer, open_)
    bearer = {"authorization": f"Bearer {good}"}
    nothing = frozenset[str]()
    for header, value in (
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-for", "203.0.113.5"),
        ("forwarded", "for=127.0.0.1"),
    ):
        yield Credential(f"{header}: {value}", {header: value}, HERE, nothing)
        yield Credential(f"{header}: {value} from afar", {header: value}, THERE, nothing)
    for header in ("x-real-ip", "x-client-ip", "true-client-ip"):
        yield Credential(f"{header}: 127.0.0.1 from afar", {header: "127.0.0.1"}, THERE, nothing)
    for host in (
        *("evil.example", "localhost.evil.example", "localhost@evil.example", "127.0.0.1.evil.example:80", "[::1"),
        *("", "localhost/../", "evil.example#localhost", "localhost:80@evil.example", "0.0.0.0", "LOCALHOST."),
    ):
        yield Credential(f"a good key and host {host!r}", bearer | {"host": host}, HERE, nothing)
        yield Credential(f"no key and host {host!r}", {"host": host}, HERE, nothing)
    allowed = PROBES | LISTS
    yield Credential("a key for another model", {"authorization": f"Bearer {other}"}, HERE, allowed)
    yield Credential("a good key and a model that is not there", bearer, HERE, allowed, model="other")
    yield Credential("a good key and a path as model", bearer, HERE, allowed, model="../plain")


def good(key: str) -> Credential:
    """The control: with this every route answers."""
    return Credential("a good key", {"authorization": f"Bearer {key}"}, THERE, None)


async def walk(app: Starlette, each: Credential) -> list[Attempt]:
    """Ask every route with every method, and every body where there is one."""
    found = []
    transport = httpx.ASGITransport(app, client=(each.peer, 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for path in paths(app):
            real = re.sub(r"\{[^}]*\}", each.model, path)
            for method in METHODS:
                for body in BODIES if method == "POST" else (None,):
                    content = None if body is None else json.dumps({"model": each.model, **body})
                    headers = httpx.Headers(dict(each.headers), encoding="latin-1")
                    response = await client.request(method, real, content=content, headers=headers)
                    found.append(Attempt(method, path, each, response.status_code))
    return found


def attempts() -> tuple[list[Attempt], list[Attempt]]:
    """All attempts of the matrix over a gateway of its own, and those of the control."""
    with TemporaryDirectory(prefix="shoal-routes-") as folder:
        app, accounts = application(Path(folder))
        key = accounts.create("good")[0]
        other = accounts.create("other", models=["other"])[0]
        revoked, account = accounts.create("revoked")
        accounts.revoke(account.id)

        async def run() -> tuple[list[Attempt], list[Attempt]]:
            tried = [attempt for each in credentials(key, other, revoked) for attempt in await walk(app, each)]
            return tried, await walk(app, good(key))

        try:
            return asyncio.run(run())
        finally:
            accounts.close()
