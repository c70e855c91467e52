"""A POST with an idempotency key is computed and billed once, however often it is sent and however it is cut off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx
import openai
import pytest
from support.gateway import PATIENCE_S, Gateway, Hold, eventually

from shoal.errors import SwarmIncomplete
from shoal.gateway.accounts import Usage
from shoal.gateway.limits import Limits

MODEL = "org/chatty:1b"
HI = [{"role": "user", "content": "hi"}]
PATHS = {
    "/v1/chat/completions": {"model": MODEL, "messages": HI},
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/responses": {"model": MODEL, "input": "hi"},
    "/v1/embeddings": {"model": MODEL, "input": "hi"},
}


def keyed(key: str) -> dict[str, str]:
    return {"idempotency-key": key}


@pytest.mark.parametrize(
    ("path", "stream"),
    [(path, stream) for path in PATHS for stream in (False, True) if not (stream and path == "/v1/embeddings")],
)
def test_a_retry_with_the_same_key_is_computed_and_billed_once(gateway: Gateway, path: str, stream: bool) -> None:
    gateway.chatty.samples()
    key, account = gateway.new_key()
    body = {**PATHS[path], **({"stream": True} if stream else {})}
    with gateway.http(key=key) as client:
        first, second = (client.post(path, json=body, headers=keyed(f"{path}-{stream}")) for _ in range(2))
        assert first.status_code == second.status_code == 200
        assert first.content == second.content
        assert "idempotent-replayed" not in first.headers
        assert second.headers["idempotent-replayed"] == "true"
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert second.headers["content-type"] == first.headers["content-type"]
        assert len(gateway.chatty.calls) == 1
        billed = gateway.used(account)
        assert billed.requests == 1
        other = client.post(path, json=body, headers=keyed("another"))
        assert (path == "/v1/embeddings") or other.content != first.content
    assert len(gateway.chatty.calls) == 2
    assert gateway.used(account).requests == 2


def test_the_package_retries_under_its_own_key(gateway: Gateway) -> None:
    with gateway.client() as client:
        made = [
            client.chat.completions.create(model=MODEL, messages=HI, extra_headers=keyed("the-package"))
            for _ in range(2)
        ]
    assert made[0].id == made[1].id
    assert len(gateway.chatty.calls) == 1


def test_the_same_key_with_another_body_is_400(gateway: Gateway, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="one", extra_headers=keyed("reused"))
    with pytest.raises(openai.BadRequestError, match="with another body") as caught:
        client.completions.create(model=MODEL, prompt="two", extra_headers=keyed("reused"))
    assert caught.value.code == "idempotency_key_reused"
    # On another path or under another API key it is another key.
    client.chat.completions.create(model=MODEL, messages=HI, extra_headers=keyed("reused"))
    other, _ = gateway.new_key()
    with gateway.client(other) as stranger:
        stranger.completions.create(model=MODEL, prompt="two", extra_headers=keyed("reused"))
    assert len(gateway.chatty.calls) == 3


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
def test_a_key_that_cannot_be_is_400(gateway: Gateway, key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    with gateway.http() as client:
        answer = client.post("/v1/completions", json=PATHS["/v1/completions"], headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


@pytest.mark.parametrize("stream", [False, True])
def test_duplicates_that_come_at_once_wait_for_the_first(gateway: Gateway, stream: bool) -> None:
    hold = Hold()
    gateway.chatty.does(None, 40, hold, 41, 1)
    key, account = gateway.new_key()
    body = {**PATHS["/v1/completions"], "stream": stream}

    async def all_at_once() -> list[bytes]:
        headers = {"authorization": f"Bearer {key}", **keyed(f"at once {stream}".replace(" ", "-"))}
        async with httpx.AsyncClient(base_url=gateway.listening.url, headers=headers, timeout=PATIENCE_S) as client:
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(10)]
            while not hold.reached.is_set():
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            hold.release.set()
            return [answer.content for answer in await asyncio.gather(*asking)]

    assert len(set(asyncio.run(all_at_once()))) == 1
    assert len(gateway.chatty.calls) == 1
    assert gateway.used(account).requests == 1


def test_a_client_that_was_cut_off_comes_back_for_the_whole_stream(gateway: Gateway) -> None:
    hold = Hold()
    tokens = gateway.chatty.tokenizer.encode("hello world", add_special_tokens=False)
    gateway.chatty.does(tokens[0], hold, *tokens[1:], 1)
    key, account = gateway.new_key()
    body = {**PATHS["/v1/completions"], "stream": True}
    with gateway.http(key=key) as client:
        with client.stream("POST", "/v1/completions", json=body, headers=keyed("cut-off")) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        # The connection is closed here; what it asked for goes on.
        late: list[bytes] = []
        again = threading.Thread(
            target=lambda: late.append(client.post("/v1/completions", json=body, headers=keyed("cut-off")).read())
        )
        again.start()
        assert hold.reached.wait(PATIENCE_S)
        assert not gateway.chatty.calls[0].closed.is_set()
        hold.release.set()
        again.join(PATIENCE_S)
    assert late[0].endswith(b"data: [DONE]\n\n")
    assert late[0].count(b"data: {") == len(tokens) + 1
    assert len(gateway.chatty.calls) == 1
    assert gateway.used(account).requests == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_failed_is_not_kept(gateway: Gateway, stream: bool) -> None:
    def ask() -> httpx.Response:
        body = {**PATHS["/v1/completions"], "stream": stream}
        with gateway.http() as client:  # a connection of its own: uvicorn closes it after a fault
            return client.post("/v1/completions", json=body, headers=keyed(f"failed-{stream}"))

    gateway.chatty.does(SwarmIncomplete("nobody"))
    assert ask().status_code == 503
    gateway.chatty.does(40, SwarmIncomplete("nobody any more"))
    broken = ask()
    assert broken.status_code == (200 if stream else 503)
    assert b"nobody any more" in broken.content
    gateway.chatty.does(RuntimeError("srv12"))
    assert ask().status_code == 500
    gateway.chatty.says("hello world")
    good = ask()
    assert b"nobody" not in good.content
    assert ask().content == good.content


def test_kept_answers_are_bounded_and_the_oldest_go_first(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(kept_answers_bytes=4 * 6_000))
    greedy, _ = gateway.new_key()
    with gateway.http() as client, gateway.http(key=greedy) as other:
        mine = client.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("mine")).content
        for place in range(12):
            other.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed(str(place)))
        calls = len(gateway.chatty.calls)
        other.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("11"))
        assert len(gateway.chatty.calls) == calls, "the newest is kept"
        other.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("0"))
        assert len(gateway.chatty.calls) == calls + 1, "the oldest is not"
        again = client.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("mine")).content
        assert again == mine, "nobody pushes out the answers of others"


def test_an_answer_too_long_to_keep_is_sent_whole_and_computed_again(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(kept_answer_bytes=4_000))
    body = {**PATHS["/v1/completions"], "stream": True, "max_tokens": 100, "ignore_eos": True}
    with gateway.http() as client:
        for number in (1, 2):
            answer = client.post("/v1/completions", json=body, headers=keyed("long"))
            assert answer.text.count("data: {") == 100
            assert answer.text.endswith("data: [DONE]\n\n")
            assert len(gateway.chatty.calls) == number
        # Nobody reads it, and it cannot be kept: it is not computed to its end.
        hold = Hold()
        gateway.chatty.does(*[40] * 50, hold, *[40] * 50)
        gateway.chatty.calls.clear()
        with client.stream("POST", "/v1/completions", json=body, headers=keyed("left")) as stream:
            next(stream.iter_lines())
        labels = {"method": "POST", "route": "/v1/completions", "status": "200"}
        registry = gateway.metrics.registry
        assert eventually(lambda: registry.get_sample_value("shoal_http_requests_total", labels) == 3)
        hold.release.set()
        assert eventually(lambda: gateway.chatty.calls[0].closed.is_set())
        assert gateway.chatty.calls[0].steps_done < 99


def test_a_kept_answer_is_forgotten_after_its_time(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(kept_answer_s=0.0))
    with gateway.http() as client:
        for _ in range(2):
            client.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("short-lived"))
    assert len(gateway.chatty.calls) == 2


def test_a_stopping_gateway_tells_those_who_wait_for_a_recorded_stream(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(shutdown_s=1.0))
    hold = Hold()
    gateway.chatty.does(40, hold)
    body = {**PATHS["/v1/completions"], "stream": True}
    with gateway.http() as client:
        with client.stream("POST", "/v1/completions", json=body, headers=keyed("stopped")) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert hold.reached.wait(PATIENCE_S)
            stopping = threading.Thread(target=gateway.stop)
            stopping.start()
            rest = [line for line in lines if line]
        stopping.join(PATIENCE_S)
    assert '"code":"interrupted"' in rest[-1]
    assert gateway.chatty.calls[0].closed.is_set()


def test_replays_count_against_the_requests_per_minute_but_cost_no_tokens(gateway: Gateway) -> None:
    key, account = gateway.new_key(requests_per_minute=2)
    with gateway.http(key=key) as client:
        statuses = [
            client.post("/v1/completions", json=PATHS["/v1/completions"], headers=keyed("again")).status_code
            for _ in range(3)
        ]
    assert statuses == [200, 200, 429]
    assert gateway.used(account).requests == 1
    assert gateway.used(account) != Usage()
