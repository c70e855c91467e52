"""HTTP as clients, browsers and proxies use it: connections that stay open, CORS, headers, and many streams at once."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.gateway import (
    PATIENCE_S,
    Call,
    Gateway,
    Hold,
    ScriptedModel,
    Step,
    byte_level_tokenizer,
    eventually,
    running,
)

from shoal import __version__
from shoal.errors import Full
from shoal.gateway.accounts import Accounts
from shoal.gateway.app import create_app
from shoal.gateway.limits import Limits

MODEL = "org/chatty:1b"
HI = [{"role": "user", "content": "hi"}]
STREAMS = 200


def test_every_answer_says_how_long_it_took_and_when_it_was_made(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI)
    assert 0 <= int(answer.headers["openai-processing-ms"]) < 60_000
    assert answer.headers["date"].endswith("GMT")
    with gateway.http() as raw:
        for path in ("/health", "/nowhere", "/v1/models"):
            assert "openai-processing-ms" in raw.get(path).headers


def test_the_log_says_how_often_a_client_has_tried_before(
    gateway: Gateway, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shoal.gateway.access")
    tries: list[Call] = []

    def script(call: Call) -> Iterator[Step]:
        tries.append(call)
        if len(tries) < 3:
            yield Full("no room", retry_after_s=0.01)
        yield 1

    gateway.chatty.script = script
    with gateway.client(max_retries=2) as retrying:
        retrying.completions.create(model=MODEL, prompt="hi")

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "shoal.gateway.access"]

    # A line is written when its answer has been sent.
    assert eventually(lambda: [line.partition(" s")[2] for line in lines()] == ["", " retry 1", " retry 2"])
    with gateway.http() as raw:
        raw.get("/v1/models", headers={"x-stainless-retry-count": "1\tx; DROP"})
        raw.get("/v1/models", headers={"x-stainless-retry-count": "99999999"})
    assert eventually(lambda: len(lines()) == 5)
    assert all(line.endswith(" s") for line in lines()[-2:]), "only a small number is believed"


def test_one_connection_serves_many_requests(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.listening.port, timeout=PATIENCE_S)
    connection.connect()
    sockets = set()
    headers = {"authorization": f"Bearer {gateway.key}", "content-type": "application/json"}
    bodies = [
        b'{"model": "plain", "prompt": "hi"}',
        b'{"model": "plain", "prompt": "hi", "stream": true}',
        b'{"model": "nope", "prompt": "hi"}',
        b"{",
    ]
    for body in bodies * 3:
        connection.request("POST", "/v1/completions", body, headers)
        sockets.add(connection.sock)
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (200, 400, 404)
    assert len(sockets) == 1
    connection.close()


def test_a_body_is_asked_for_only_after_key_and_length_are_accepted(gateway: Gateway) -> None:
    def ask(key: str, length: int) -> tuple[bytes, socket.socket]:
        connection = socket.create_connection(("127.0.0.1", gateway.listening.port), timeout=PATIENCE_S)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.sendall(head.encode())
        return connection.recv(100).split(b"\r\n")[0], connection

    body = b'{"model": "plain", "prompt": "hi"}'
    status, connection = ask(gateway.key, len(body))
    assert status.startswith(b"HTTP/1.1 100")
    connection.sendall(body)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    for key, length, expected in (("wrong", len(body), b"401"), (gateway.key, 10**9, b"413")):
        status, connection = ask(key, length)
        assert status.split()[1] == expected
        connection.close()


def test_a_compressed_request_is_refused_and_a_compressed_answer_never_sent(gateway: Gateway) -> None:
    with gateway.http() as client:
        body = b'{"model": "plain", "prompt": "hi"}'
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
            answer = client.post("/v1/completions", content=body, headers={"content-encoding": coding})
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
        answer = client.post("/v1/completions", content=body, headers={"accept-encoding": "gzip"})
        assert "content-encoding" not in answer.headers


def told(prompt: list[int]) -> list[int]:
    """What the model of the next test answers: letters that depend on its prompt."""
    return [2 + (token * 7 + place) % 90 for place, token in enumerate(prompt * 3)]


def test_two_hundred_streams_at_once_do_not_mix_up(tmp_path: Path) -> None:
    prompts = [[5 + number, 6, 7 + number % 13] for number in range(STREAMS)]

    async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> tuple[set[str], str, str | None]:
        ids, text, finish = set(), "", None
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=50, stream=True)
        async for chunk in stream:
            ids.add(chunk.id)
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason
        return ids, text, finish

    async def all_at_once(gateway: Gateway, hold: Hold) -> list[tuple[set[str], str, str | None]]:
        async with gateway.async_client() as client:
            asking = [asyncio.create_task(one(client, prompt)) for prompt in prompts]
            while len(gateway.chatty.calls) < STREAMS:
                await asyncio.sleep(0.005)
            hold.release.set()  # all of them are under way now
            return await asyncio.gather(*asking)

    with running(tmp_path, Limits(requests=STREAMS)) as gateway:
        hold = Hold()
        gateway.chatty.script = lambda call: [None, hold, *told(call.prompt), 1]
        answers = asyncio.run(all_at_once(gateway, hold))
        for prompt, (ids, text, finish) in zip(prompts, answers, strict=True):
            assert (text, finish, len(ids)) == (gateway.chatty.tokenizer.decode(told(prompt)), "stop", 1)
        assert len(set.union(*(ids for ids, _, _ in answers))) == STREAMS


# --- browsers ------------------------------------------------------------------------------------------------


ORIGIN = "https://chat.example.org"


def asked(folder: Path, origins: list[str], method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    accounts = Accounts(folder / "keys.sqlite")
    key, _ = accounts.create("test")
    app = create_app({"plain": ScriptedModel("plain", byte_level_tokenizer())}, accounts, origins=origins)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            sent = {"authorization": f"Bearer {key}", **headers} if method != "OPTIONS" else headers
            return await client.request(method, path, headers=sent)

    try:
        return asyncio.run(send())
    finally:
        accounts.close()


PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


def test_without_an_allow_list_no_page_of_another_origin_reads_anything(tmp_path: Path) -> None:
    for method, headers in (("GET", {"origin": ORIGIN}), ("OPTIONS", PREFLIGHT)):
        answer = asked(tmp_path, [], method, "/v1/models", headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_origin_may_ask_and_read_and_another_one_may_not(tmp_path: Path) -> None:
    preflight = asked(tmp_path, [ORIGIN], "OPTIONS", "/v1/chat/completions", PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
    answer = asked(tmp_path, [ORIGIN], "GET", "/v1/models", {"origin": ORIGIN})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    for origin in ("https://evil.example", ORIGIN + ".evil.example", "null", "http://chat.example.org"):
        answer = asked(tmp_path, [ORIGIN], "GET", "/v1/models", {"origin": origin})
        assert "access-control-allow-origin" not in answer.headers
        refused = asked(tmp_path, [ORIGIN], "OPTIONS", "/v1/models", {**PREFLIGHT, "origin": origin})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)


def test_an_allowed_origin_needs_a_key_like_everybody(tmp_path: Path) -> None:
    answer = asked(tmp_path, [ORIGIN], "GET", "/v1/models", {"origin": ORIGIN, "authorization": "Bearer no"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == ORIGIN, "its page may read why"


def test_the_version_is_that_of_the_package(start: Callable[[Limits], Gateway]) -> None:
    assert httpx.get(f"{start(Limits()).listening.url}/version", trust_env=False).json() == {"version": __version__}
