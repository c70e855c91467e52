"""What clients of OpenAI's API rely on, checked with the real `openai` package: /v1/responses, text in and text out."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pydantic
import pytest
from support.gateway import Gateway, Hold, dreamt_tokens

from shoal.errors import SwarmIncomplete
from shoal.gateway.accounts import Usage

MODEL = "org/chatty:1b"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def respond(client: openai.OpenAI, **fields: object) -> openai.types.responses.Response:
    return client.responses.create(**{"model": MODEL, "input": "hi", **fields})


def test_text_in_is_text_out(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", temperature=0, metadata={"a": "b"})
    assert answer.output_text == "hello world"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.id.startswith("resp_")
    assert (answer.model, answer.temperature, answer.metadata) == (MODEL, 0, {"a": "b"})
    assert [item.type for item in answer.output] == ["message"]
    call = gateway.chatty.calls[0]
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(call.prompt)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert gateway.chatty.tokenizer.decode(call.prompt) == "<s><system>Be brief.\n<user>hi\n<assistant>"
    assert call.params.greedy


def test_a_conversation_is_a_list_of_messages_in_any_of_their_forms(gateway: Gateway, client: openai.OpenAI) -> None:
    first = respond(client)
    respond(
        client,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"role": "user", "content": "more"},
        ],
    )
    prompt = gateway.chatty.tokenizer.decode(gateway.chatty.calls[1].prompt)
    assert prompt == "<s><system>Be brief.\n<user>hi\n<assistant>hello world\n<user>more\n<assistant>"


def test_a_stream_has_the_events_that_the_package_knows_in_their_order(gateway: Gateway, client: openai.OpenAI) -> None:
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "hello world"
    last = events[-1].response
    assert (last.output_text, last.status) == ("hello world", "completed")
    assert events[0].response.id == last.id
    assert last.usage.output_tokens == gateway.chatty.calls[0].steps_done
    with client.responses.stream(model=MODEL, input="hi") as stream:
        assert stream.get_final_response().output_text == "hello world"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_at_its_length_is_incomplete_and_says_why(
    gateway: Gateway, client: openai.OpenAI, stream: bool
) -> None:
    gateway.chatty.does(40, 41)
    made = respond(client, max_output_tokens=1, stream=stream)
    answer = list(made)[-1].response if stream else made
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == gateway.chatty.tokenizer.decode([40])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 3}}}}, "text.format.schema"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "hi"}]}, "input[0].role"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)
def test_what_is_not_offered_or_wrong_is_400_and_named(
    gateway: Gateway, client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **fields)
    assert caught.value.param == param.replace("[...]", "")
    assert not gateway.chatty.calls


class Card(pydantic.BaseModel):
    colour: Literal["red", "black"]
    number: Literal[1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_held_to_a_schema_and_parsed_by_the_package(
    gateway: Gateway, client: openai.OpenAI, stream: bool
) -> None:
    model = gateway.chatty
    model.script = lambda call: dreamt_tokens(call, len(model.tokenizer), model.eos_ids)
    if stream:
        with client.responses.stream(model=MODEL, input="a card", text_format=Card) as events:
            answer = events.get_final_response()
    else:
        answer = client.responses.parse(model=MODEL, input="a card", text_format=Card)
    assert isinstance(answer.output_parsed, Card)
    assert answer.text.format.type == "json_schema"
    free = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=300)
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


def test_nothing_is_stored_and_the_answer_says_so(gateway: Gateway, client: openai.OpenAI) -> None:
    for store in (True, False, None):
        assert respond(client, store=store).store is False
    answer = respond(client)
    for ask in (lambda: client.responses.retrieve(answer.id), lambda: client.responses.delete(answer.id)):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "unknown_url"


def test_unknown_fields_are_listed_and_defaults_may_be_said(client: openai.OpenAI) -> None:
    answer = client.responses.with_raw_response.create(
        model=MODEL, input="hi", user="me", service_tier="auto", tools=[], text={"format": {"type": "text"}},
        truncation="disabled", include=[], extra_body={"previous_response_id": None},
    )  # fmt: skip
    assert answer.headers["x-shoal-ignored"] == "service_tier, user"


def test_a_chain_lost_for_good_is_an_error_in_the_stream_and_not_its_end(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.chatty.does(40, 41, SwarmIncomplete("Blocks 4 to 7 were lost and nobody else hosts them."))
    seen = []
    with pytest.raises(openai.APIError, match="Blocks 4 to 7 were lost") as caught:
        seen.extend(event.type for event in respond(client, stream=True))
    assert "response.output_text.delta" in seen
    assert "response.completed" not in seen
    assert caught.value.code == "swarm_incomplete"
    with gateway.http() as raw:
        body = {"model": MODEL, "input": "hi", "stream": True}
        last = raw.post("/v1/responses", json=body).text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")


def test_a_refusal_is_a_status_and_no_stream(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.does(SwarmIncomplete("nobody"))
    with pytest.raises(openai.InternalServerError) as caught:
        respond(client, stream=True)
    assert caught.value.status_code == 503
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, model="plain")
    assert refused.value.code == "chat_template_missing"


def test_a_waiting_stream_says_so_and_the_package_reads_over_it(gateway: Gateway, client: openai.OpenAI) -> None:
    hold = Hold()
    gateway.chatty.does(None, 40, hold, 41, 1)
    seen = []
    with (
        gateway.http() as raw,
        raw.stream("POST", "/v1/responses", json={"model": MODEL, "input": "hi", "stream": True}) as answer,
    ):
        for line in answer.iter_lines():
            seen.append(line)
            if seen.count(": ping") == 2:
                hold.release.set()
    assert seen.count(": ping") >= 2
    hold = Hold()
    gateway.chatty.does(None, 40, hold, 41, 1)
    text = ""
    for event in respond(client, stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
            hold.release.set()
    assert text == gateway.chatty.tokenizer.decode([40, 41])


def test_tokens_are_charged_as_for_chats(gateway: Gateway) -> None:
    gateway.chatty.script = lambda call: [40] * call.max_tokens
    key, account = gateway.new_key(tokens_per_day=1000)
    with gateway.client(key) as client:
        respond(client, max_output_tokens=5)
        list(respond(client, max_output_tokens=5, stream=True))
    prompts = sum(len(call.prompt) for call in gateway.chatty.calls)
    assert gateway.used(account) == Usage(2, prompts, 10)
