"""What clients of OpenAI's API rely on, checked with the real `openai` package: embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Iterator

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import Call, Gateway, Given, Hold, Step, eventually

from shoal.errors import Full, SwarmIncomplete
from shoal.gateway.accounts import Usage
from shoal.gateway.embeddings import AT_ONCE, shortened

MODEL = "org/chatty:1b"
SIZE = 8


def embed(client: openai.OpenAI, **fields: object) -> openai.types.CreateEmbeddingResponse:
    return client.embeddings.create(**{"model": MODEL, "input": "hello", **fields})


def length(vector: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in vector))


def test_an_embedding_has_openais_shape_and_length_one(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = embed(client)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [(entry.object, entry.index) for entry in answer.data] == [("embedding", 0)]
    assert len(answer.data[0].embedding) == SIZE
    assert length(answer.data[0].embedding) == pytest.approx(1, abs=1e-6)
    prompt = gateway.chatty.tokenizer.encode("hello")
    assert gateway.chatty.calls[0].prompt == prompt
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(prompt)


def test_base64_and_float_say_the_same(client: openai.OpenAI) -> None:
    floats = embed(client, encoding_format="float").data[0].embedding
    raw = embed(client, encoding_format="base64").data[0].embedding
    assert isinstance(raw, str)
    assert list(struct.unpack(f"<{SIZE}f", base64.b64decode(raw))) == pytest.approx(floats, rel=1e-6)
    # The package asks for base64 by itself and hands out floats.
    assert embed(client).data[0].embedding == pytest.approx(floats, rel=1e-6)


def test_every_form_of_an_input_is_taken_and_keeps_its_place(gateway: Gateway, client: openai.OpenAI) -> None:
    def vectors(given: object) -> list[list[float]]:
        answer = embed(client, input=given)
        assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
        return [entry.embedding for entry in answer.data]

    hello, world = (gateway.chatty.tokenizer.encode(text) for text in ("hello", "world"))
    (alone,) = vectors("hello")
    assert vectors(["hello", "world"])[0] == alone
    assert vectors(hello) == [alone]
    assert vectors([world, hello])[1] == alone
    many = vectors([f"text {place}" for place in range(3 * AT_ONCE)])
    assert len({tuple(vector) for vector in many}) == 3 * AT_ONCE
    assert many[7] == vectors("text 7")[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["hello", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["hello", [5]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [-1]}, "input[0]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": SIZE + 1}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_wrong_field_is_400_and_named(gateway: Gateway, fields: dict[str, object], param: str) -> None:
    with gateway.http() as client:
        answer = client.post("/v1/embeddings", json={"model": MODEL, "input": "hello", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not gateway.chatty.calls


def test_too_long_an_input_is_400_before_anything_is_computed(gateway: Gateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, input=[[5], [5] * (gateway.chatty.context_length + 1)])
    assert caught.value.code == "context_length_exceeded"
    assert not gateway.chatty.calls
    embed(client, input=[5] * gateway.chatty.context_length)


def test_dimensions_cut_the_vector_and_bring_it_back_to_length_one(client: openai.OpenAI) -> None:
    whole = embed(client, encoding_format="float").data[0].embedding
    cut = embed(client, encoding_format="float", dimensions=3).data[0].embedding
    assert length(cut) == pytest.approx(1, abs=1e-6)
    assert cut == pytest.approx([value / length(whole[:3]) for value in whole[:3]])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.integers(1, 20))
def test_a_cut_vector_keeps_its_direction(vector: list[float], dimensions: int) -> None:
    cut = shortened(vector, min(dimensions, len(vector)))
    assert len(cut) == min(dimensions, len(vector))
    if dimensions < len(vector) and length(vector[:dimensions]) > 1e-6:
        assert length(list(cut)) == pytest.approx(1)


def test_an_unknown_field_is_listed_and_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    answer = client.embeddings.with_raw_response.create(model=MODEL, input="x", user="me", extra_body={"task": 1})
    assert answer.headers["x-shoal-ignored"] == "user, task"
    with pytest.raises(openai.NotFoundError):
        embed(client, model="nope")


def test_a_swarm_without_room_is_429_and_one_without_servers_503(gateway: Gateway, client: openai.OpenAI) -> None:
    for error, status in ((Full("no room", retry_after_s=3.0), 429), (SwarmIncomplete("nobody"), 503)):
        gateway.chatty.embedding_script = lambda call, error=error: [error]
        with pytest.raises(openai.APIStatusError) as caught:
            embed(client, input=["a", "b", "c"])
        assert caught.value.status_code == status
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert all(call.closed.is_set() for call in gateway.chatty.calls)


def test_a_long_list_waits_for_room_that_its_own_texts_take(gateway: Gateway, client: openai.OpenAI) -> None:
    inside, most = 0, 0

    def script(call: Call) -> Iterator[Step]:
        nonlocal inside, most
        if inside == 2:
            yield Full("two at once, no more")
        inside += 1
        most = max(most, inside)
        hold = Hold()
        asyncio.get_running_loop().call_later(0.005, hold.release.set)
        yield hold
        inside -= 1

    gateway.chatty.embedding_script = script
    answer = embed(client, input=[f"text {place}" for place in range(20)])
    assert (len(answer.data), most, inside) == (20, 2, 0)


def test_a_client_that_leaves_frees_the_sessions_of_its_texts(gateway: Gateway) -> None:
    hold = Hold()
    gateway.chatty.embedding_script = lambda call: [hold]
    with gateway.client() as client, pytest.raises(openai.APITimeoutError):
        client.embeddings.create(model=MODEL, input=["a"] * 20, timeout=0.3)
    assert eventually(lambda: all(call.closed.is_set() for call in gateway.chatty.calls))
    assert len(gateway.chatty.calls) == AT_ONCE
    hold.release.set()


def test_a_client_that_leaves_is_charged_the_texts_that_were_computed(gateway: Gateway) -> None:
    key, account = gateway.new_key(tokens_per_day=100)
    hold = Hold()
    scripts = {5: [Given("n1", "0:8")], 6: [Given("n1", "0:8"), hold], 7: [hold]}
    gateway.chatty.embedding_script = lambda call: scripts[call.prompt[0]]
    with gateway.client(key) as client, pytest.raises(openai.APITimeoutError):
        client.embeddings.create(model=MODEL, input=[[5, 5, 5], [6, 6], [7]], timeout=0.5)
    # The first is ready, the second was under way, and nobody has seen the third.
    assert eventually(lambda: gateway.used(account) == Usage(1, 5, 0))
    hold.release.set()


def test_tokens_are_charged_when_every_vector_is_there(gateway: Gateway) -> None:
    key, account = gateway.new_key(tokens_per_day=9)
    with gateway.client(key) as client:
        embed(client, input=[[5, 6, 7], [8]])
        assert gateway.used(account) == Usage(1, 4, 0)
        gateway.chatty.embedding_script = lambda call: [SwarmIncomplete("nobody")]
        with pytest.raises(openai.InternalServerError):
            embed(client, input=[5, 6, 7])
        assert gateway.used(account) == Usage(1, 4, 0)
        gateway.chatty.as_new()
        with pytest.raises(openai.RateLimitError):
            embed(client, input=[5, 6, 7, 8, 9, 10])
        assert not gateway.chatty.calls
