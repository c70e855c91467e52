"""What clients of OpenAI's API rely on, checked with the real `openai` package: models, keys, and every refusal."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable

import httpx
import openai
import pytest
from support.gateway import Gateway, Hold

from shoal.errors import Full, PeerLost, Refused, ShoalError, SwarmIncomplete
from shoal.gateway.limits import Limits

HI = [{"role": "user", "content": "hi"}]
FAULTS = [ShoalError("disk /srv12"), PeerLost("node srv12"), Refused("role of srv12"), RuntimeError("srv12")]


def chat(client: openai.OpenAI, **fields: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(**{"model": "org/chatty:1b", "messages": HI, **fields})


def body_of(error: openai.APIStatusError) -> dict[str, object]:
    """The error object, after checking that it has exactly the four fields of OpenAI's shape."""
    whole = error.response.json()
    assert list(whole) == ["error"]
    assert set(whole["error"]) == {"message", "type", "param", "code"}
    return whole["error"]


def test_the_list_of_models_has_object_id_created_and_owner(client: openai.OpenAI) -> None:
    page = client.models.list()
    assert page.object == "list"
    assert [(model.id, model.object, model.owned_by) for model in page] == [
        ("org/chatty:1b", "model", "shoal"),
        ("plain", "model", "shoal"),
    ]
    assert all(model.created == 1_700_000_000 for model in page)


def test_a_model_is_found_by_an_id_with_slash_and_colon(client: openai.OpenAI) -> None:
    assert client.models.retrieve("org/chatty:1b").id == "org/chatty:1b"


def test_an_unknown_model_is_404_model_not_found(client: openai.OpenAI) -> None:
    for ask in (lambda: chat(client, model="nope"), lambda: client.models.retrieve("a/b")):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert body_of(caught.value)["code"] == "model_not_found"


@pytest.mark.parametrize("key", ["sk-shoal-" + "0" * 64, "x", "ключ"])
def test_a_bad_key_is_401_invalid_api_key(gateway: Gateway, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".encode()}
    answer = httpx.get(f"{gateway.listening.url}/v1/models", headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_no_key_is_401_with_a_challenge_and_the_package_knows_it(gateway: Gateway) -> None:
    with gateway.client(key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert body_of(caught.value)["code"] == "invalid_api_key"
    answer = httpx.get(f"{gateway.listening.url}/v1/models", trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_key_that_may_not_use_the_model_is_403_and_does_not_see_it(gateway: Gateway) -> None:
    with gateway.client(gateway.plain_key) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            chat(client)
        assert body_of(caught.value)["code"] == "model_not_allowed"
        with pytest.raises(openai.PermissionDeniedError):
            client.models.retrieve("org/chatty:1b")
        assert [model.id for model in client.models.list()] == ["plain"]
        assert client.completions.create(model="plain", prompt="hi").choices[0].text == "hello world"


def test_errors_of_every_kind_have_openais_shape(gateway: Gateway, client: openai.OpenAI) -> None:
    refused = [
        lambda: chat(client, model="nope"),
        lambda: chat(client, temperature="hot"),
        lambda: chat(client, messages=[]),
        lambda: client.get("/nothing", cast_to=object),
        lambda: client.get("/chat/completions", cast_to=object),
    ]
    for ask in refused:
        with pytest.raises(openai.APIStatusError) as caught:
            ask()
        assert body_of(caught.value)["message"]


def test_every_answer_carries_a_request_id(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = chat(client)
    assert len(answer._request_id) == 32
    assert answer.id == f"chatcmpl-{answer._request_id}"
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="nope")
    assert caught.value.request_id not in (None, answer._request_id)
    for path in ("/health", "/ready", "/metrics", "/nothing", "/v1/models"):
        assert httpx.get(gateway.listening.url + path, trust_env=False).headers["x-request-id"]
    gateway.chatty.does(RuntimeError("a fault of ours"))
    with pytest.raises(openai.InternalServerError) as fault:
        chat(client)
    assert fault.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_context_is_refused_before_the_stream(gateway: Gateway, client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=512, stream=stream)
    assert body_of(caught.value)["code"] == "context_length_exceeded"
    assert "512 tokens" in str(body_of(caught.value)["message"])
    assert gateway.chatty.calls == []


def test_a_full_gateway_is_429_with_retry_after_and_rate_limits(
    start: Callable[[Limits], Gateway],
) -> None:
    gateway = start(Limits(requests=1))
    hold = Hold()
    gateway.chatty.does(None, hold, 5, 1)
    with gateway.client() as client, chat(client, stream=True), pytest.raises(openai.RateLimitError) as caught:
        chat(client)
    assert body_of(caught.value)["code"] == "too_many_requests"
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-ratelimit-limit-requests"] == "1"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert gateway.chatty.calls[0].closed.wait(20)


def test_a_full_swarm_is_429_with_its_own_retry_after(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.does(Full("No server has room for 40 tokens.", retry_after_s=2.5))
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client, stream=True)
    assert body_of(caught.value)["code"] == "full"
    assert caught.value.response.headers["retry-after"] == "3"
    assert "x-should-retry" not in caught.value.response.headers


def test_no_chain_is_503_swarm_incomplete_with_retry_after(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.does(SwarmIncomplete("Blocks 4 to 7 are hosted by no live server.", hint="Start one."))
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client, stream=stream)
        assert caught.value.status_code == 503
        assert body_of(caught.value)["code"] == "swarm_incomplete"
        assert body_of(caught.value)["message"] == "Blocks 4 to 7 are hosted by no live server. Start one."
        assert caught.value.response.headers["retry-after"] == "5"


def test_the_package_itself_retries_a_passing_fault(gateway: Gateway) -> None:
    tries = []

    def script(call: object) -> list[object]:
        tries.append(call)
        return [SwarmIncomplete("not yet", retry_after_s=0.01)] if len(tries) == 1 else [5, 1]

    gateway.chatty.script = script
    with gateway.client(max_retries=2) as client:
        assert chat(client).choices[0].finish_reason == "stop"
    assert len(tries) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_permanent_fault_is_not_retried_and_tells_nothing_about_the_inside(
    gateway: Gateway, fault: Exception
) -> None:
    gateway.chatty.does(fault)
    with gateway.client(max_retries=2) as client, pytest.raises(openai.InternalServerError) as caught:
        chat(client)
    assert len(gateway.chatty.calls) == 1
    assert caught.value.status_code == 500
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "srv12" not in caught.value.response.text
    assert body_of(caught.value)["type"] == "server_error"


def test_invalid_json_is_400(gateway: Gateway) -> None:
    with gateway.http() as client:
        for body in (b"", b"{", b"[]", b'{"model": "\xff"}', b"[" * 100_000, b'{"model":' * 50_000):
            answer = client.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400, body[:20]
            assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
        ({"messages": []}, "messages"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logit_bias": {"5": 200}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_wrong_field_is_400_and_named(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert body_of(caught.value)["param"] == param


def test_a_missing_field_is_400_and_named(gateway: Gateway) -> None:
    with gateway.http() as client:
        answer = client.post("/v1/chat/completions", json={"model": "org/chatty:1b"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_too_large_a_body_is_413_in_the_same_shape(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(body_bytes=10_000))
    with gateway.client() as client, pytest.raises(openai.APIStatusError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * 20_000}])
    assert caught.value.status_code == 413
    assert body_of(caught.value)["code"] == "body_too_large"


def test_an_unknown_url_is_404_json_and_a_wrong_method_405(gateway: Gateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.fine_tuning.jobs.list()
    assert body_of(caught.value)["code"] == "unknown_url"
    with gateway.http() as raw:
        assert raw.get("/").json()["error"]["code"] == "unknown_url"
        wrong = raw.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        assert raw.delete("/v1/models").status_code == 405


def test_bytes_that_are_no_http_get_an_error_of_the_same_shape(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.listening.port, timeout=20)
    connection.connect()
    connection.sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    assert answer.status == 400
    assert answer.headers["x-request-id"]
    assert json.loads(answer.read())["error"]["code"] == "invalid_http"
    connection.close()
