"""Who gets in: every route without a key, with a wrong key, from another machine, under another name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from support.gateway import Gateway, ScriptedModel, byte_level_tokenizer

from shoal.gateway.accounts import Accounts
from shoal.gateway.app import create_app
from shoal.spec.ids import BlockRange

PROBES = {"/health", "/ready", "/metrics", "/version"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


def filled_in(path: str) -> str:
    return path.replace("{id:path}", "plain")


def routes(app: Starlette) -> list[str]:
    assert all(isinstance(route, Route) for route in app.routes)  # no mounts or redirects that this walk would miss
    return [route.path for route in app.routes if isinstance(route, Route)]


def app_with_key(folder: Path) -> tuple[Starlette, str]:
    accounts = Accounts(folder / "keys.sqlite")
    key, _ = accounts.create("test")
    model = ScriptedModel("plain", byte_level_tokenizer())

    return create_app({"plain": model}, accounts, hosts=["shoal.internal"]), key


def ask(app: Starlette, method: str, path: str, peer: str, headers: dict[str, str]) -> int:
    async def send() -> int:
        transport = httpx.ASGITransport(app, client=(peer, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.request(method, path, headers=headers)).status_code

    return asyncio.run(send())


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "192.168.0.9", "2001:db8::1"])
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Basic c2s6", "Bearer", ""])
def test_without_a_valid_key_no_route_answers_except_probes_on_this_machine(
    tmp_path: Path, peer: str, key: str | None
) -> None:
    app, _ = app_with_key(tmp_path)
    headers = {} if key is None else {"authorization": key}
    local = peer in ("127.0.0.1", "::1")
    opened = set()
    for path in routes(app):
        statuses = {ask(app, method, filled_in(path), peer, headers) for method in METHODS}
        assert statuses <= {200, 401, 405}
        opened |= {path} if 200 in statuses else set()
    assert opened == (PROBES if local else set())


def test_with_a_key_probes_answer_other_machines_too(tmp_path: Path) -> None:
    app, key = app_with_key(tmp_path)
    headers = {"authorization": f"bearer {key}"}
    for path in (*PROBES, "/v1/models", "/v1/shoal/status"):
        assert ask(app, "GET", path, "192.168.0.9", headers) == 200


@pytest.mark.parametrize("header", [{"x-forwarded-for": "203.0.113.5"}, {"forwarded": "for=203.0.113.5"}])
def test_a_forwarded_request_is_not_from_this_machine(tmp_path: Path, header: dict[str, str]) -> None:
    app, _ = app_with_key(tmp_path)
    assert ask(app, "GET", "/metrics", "127.0.0.1", header) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("shoal.internal", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("localhost:80@evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("[::1", 403),
        ("", 403),
        ("localhost/../", 403),
    ],
)
def test_only_our_own_names_are_answered(tmp_path: Path, host: str, status: int) -> None:
    app, key = app_with_key(tmp_path)
    for path in ("/health", "/v1/models"):
        assert ask(app, "GET", path, "127.0.0.1", {"host": host, "authorization": f"Bearer {key}"}) == status


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1/../v1/models", "/V1/models", "/v1/models%2f", "/v1"]
)
def test_other_spellings_of_a_path_open_nothing(gateway: Gateway, path: str) -> None:
    answer = httpx.get(gateway.listening.url + path, trust_env=False)
    assert answer.status_code in (401, 404)
    assert "location" not in answer.headers


def test_ready_says_no_with_the_reason_and_for_each_model(gateway: Gateway) -> None:
    gateway.chatty.replicas = [(BlockRange(0, 4), 2), (BlockRange(4, 8), 0)]
    with gateway.http() as client:
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "swarm_incomplete")
        assert "blocks 4:8 of org/chatty:1b" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/ready", params={"model": "org/chatty:1b"}).status_code == 503
        assert client.get("/ready", params={"model": "plain"}).json() == {"status": "ready", "models": {"plain": True}}
        assert client.get("/ready", params={"model": "nope"}).status_code == 404
        assert client.get("/health").json() == {"status": "ok"}
        gateway.chatty.as_new()
        assert client.get("/ready").json()["models"] == {"org/chatty:1b": True, "plain": True}


def test_status_has_every_model_that_the_key_may_use(gateway: Gateway) -> None:
    gateway.plain.replicas = [(BlockRange(0, 6), 0)]
    chatty, plain = {"model": "org/chatty:1b", "covered": True}, {"model": "plain", "covered": False}
    with gateway.http() as client:
        answer = client.get("/v1/shoal/status")
        assert answer.json() == {**chatty, "covered": False, "models": [chatty, plain]}
        assert answer.headers["cache-control"] == "no-store"
        assert client.get("/v1/shoal/status", params={"model": "plain"}).json() == plain
    with gateway.http(key=gateway.plain_key) as client:
        assert client.get("/v1/shoal/status").json() == plain
        assert client.get("/v1/shoal/status", params={"model": "org/chatty:1b"}).status_code == 404


def test_the_version_is_told_without_a_key_on_this_machine_only(tmp_path: Path) -> None:
    app, key = app_with_key(tmp_path)
    assert ask(app, "GET", "/version", "127.0.0.1", {}) == 200
    assert ask(app, "GET", "/version", "192.168.0.9", {}) == 401
    assert ask(app, "GET", "/version", "192.168.0.9", {"authorization": f"Bearer {key}"}) == 200
