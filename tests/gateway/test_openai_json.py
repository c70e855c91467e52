"""What clients of OpenAI's API rely on, checked with the real `openai` package: answers in JSON."""

from __future__ import annotations

import enum
import json
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel
from support.gateway import Gateway

MODEL = "org/chatty:1b"
HI: Any = [{"role": "user", "content": "hi"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["calm", "stormy", None]},
        "ports": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{3}$"}, "minItems": 1, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
        "ship": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/ship"}]},
    },
    "required": ["name", "age", "mood", "ports", "born", "ship"],
    "additionalProperties": False,
    "$defs": {
        "ship": {
            "type": "object",
            "properties": {"tons": {"type": "number", "minimum": 1, "maximum": 5}},
            "required": ["tons"],
            "additionalProperties": False,
        }
    },
}


def schema_format(schema: dict[str, Any], *, strict: bool = True) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}


def ask(client: openai.OpenAI, form: Any, **fields: Any) -> Any:
    usual = {"model": MODEL, "messages": HI, "max_tokens": 480, "response_format": form}
    return client.chat.completions.create(**{**usual, **fields}).choices


@pytest.mark.parametrize("seed", range(10))
def test_a_strict_answer_keeps_to_the_schema_whatever_the_model_would_say(
    gateway: Gateway, client: openai.OpenAI, seed: int
) -> None:
    gateway.chatty.dreams()
    (choice,) = ask(client, schema_format(PERSON), seed=seed)
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert choice.message.tool_calls is None


def test_a_streamed_answer_is_the_same_one(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.dreams()
    (choice,) = ask(client, schema_format(PERSON), seed=1)
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=480, seed=1, stream=True, response_format=schema_format(PERSON)
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")


def test_json_object_means_an_object_or_a_cut_one(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.dreams()
    ends = set()
    for seed in range(12):
        (choice,) = ask(client, {"type": "json_object"}, seed=seed, logit_bias={"96": 6, "62": 6, "3": 4})
        ends.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.startswith("{")
    assert "stop" in ends


def test_a_model_that_knows_what_it_does_is_not_in_the_way(gateway: Gateway, client: openai.OpenAI) -> None:
    said = '{\n  "a": [1, 2.5, -3e7, null, true, "\\n\\"ü😀"],\n  "b": {"c": {}}\n}'
    gateway.chatty.says(said)
    (choice,) = ask(client, {"type": "json_object"})
    assert (choice.message.content, choice.finish_reason) == (said, "stop")


def test_a_limit_inside_json_is_length(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.dreams()
    (whole,) = ask(client, schema_format(PERSON), seed=1)
    for tokens in (1, 7, 20):
        (choice,) = ask(client, schema_format(PERSON), seed=1, max_tokens=tokens)
        assert choice.finish_reason == "length"
        assert whole.message.content.startswith(choice.message.content)


def test_a_stop_string_cuts_json_as_it_cuts_text(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.says('{"a": 1, "b": 2}')
    (choice,) = ask(client, {"type": "json_object"}, stop=[', "b"'])
    assert (choice.message.content, choice.finish_reason) == ('{"a": 1', "stop")


def test_choices_seeds_and_temperatures_work_with_a_schema(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.dreams()
    fields: Any = {"n": 3, "seed": 7, "logprobs": True, "top_logprobs": 1}
    texts = [choice.message.content for choice in ask(client, schema_format(PERSON), temperature=1.5, **fields)]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in ask(client, schema_format(PERSON), temperature=1.5, **fields)]
    for temperature in (0, 0.2, 2):
        for choice in ask(client, schema_format(PERSON), temperature=temperature, top_p=0.9, **fields):
            jsonschema.validate(json.loads(choice.message.content), PERSON)
            written = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
            assert written.decode() == choice.message.content


# What schemas may hold


def described(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", 'q"\\', "é", "a b", ""])
    objects = st.builds(
        lambda properties, optional, others: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in optional],
            "additionalProperties": others,
        },
        st.dictionaries(names, inner, max_size=3),
        st.sets(names, max_size=1),
        st.just(False),
    )
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return objects | arrays | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))


LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            {"type": "null"},
            {"type": "boolean"},
            {"type": ["boolean", "null"]},
            {"const": 'say "x"\n'},
            {"const": {"k": [1, None]}},
            {"type": "string", "pattern": "a|b$", "maxLength": 6},
            {"type": "string", "pattern": "^\\w{1,3}-\\d+$", "maxLength": 9},
            {"type": "string", "format": "date-time"},
            {"type": "string", "format": "ipv4"},
            {"type": "string", "format": "uuid"},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 99},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
            {"enum": ["é", 1.5, None, [], {"z": True}]},
            {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
        ]
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 99),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(LEAVES, described, max_leaves=6), seed=st.integers(0, 10**6))
def test_answers_to_any_schema_are_valid_by_another_implementations_word(
    gateway: Gateway, client: openai.OpenAI, schema: dict[str, Any], seed: int
) -> None:
    gateway.chatty.dreams()
    (choice,) = ask(client, schema_format(schema), seed=seed)
    if choice.finish_reason == "stop":
        jsonschema.validate(json.loads(choice.message.content), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "schema",
    [
        # What the grammar engine would let through, and a validator would not.
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    ],
)
def test_names_that_are_not_listed_are_others_than_those_that_are(
    gateway: Gateway, client: openai.OpenAI, schema: dict[str, Any]
) -> None:
    gateway.chatty.dreams()
    ended = 0
    for seed in range(30):
        (choice,) = ask(client, schema_format(schema), seed=seed, logit_bias={"96": 5, "62": 5, "3": 4})
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)
            ended += 1
    assert ended


DEEP: Any = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "^(?!a)"}, "look-ahead"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "strnig"}, "strnig"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"$ref": "#/$defs/nobody"}, "Pointer|nobody"),
        ({"$ref": "#"}, "nothing fits it"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "unsatisfiable"),
        ({"enum": []}, "empty"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "integer", "multipleOf": 999_983}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf"),
        (DEEP, "levels deep"),
        ({"type": "string", "x-guidance": {"lenient": True}, "format": "colour"}, "colour"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_400_before_a_stream_begins(
    client: openai.OpenAI, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        ask(client, schema_format(schema), stream=True)
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code in ("unsupported_schema", "schema_too_large")
    assert "%json" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x y", "schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
        ({"type": "yaml"}, "response_format.type"),
        (schema_format({"const": "x" * 200_000}), "response_format.json_schema.schema"),
    ],
)
def test_a_wrong_response_format_is_400_and_named(client: openai.OpenAI, form: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, form)
    assert caught.value.param == param


def test_a_schema_that_is_not_strict_is_kept_to_as_far_as_it_goes(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.dreams()
    loose = PERSON | {"not": {"required": ["nobody"]}, "if": {}, "then": {}}
    (choice,) = ask(client, schema_format(loose, strict=False), seed=1)
    jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_text_is_not_held_to_anything(gateway: Gateway, client: openai.OpenAI) -> None:
    assert ask(client, {"type": "text"})[0].message.content == "hello world"
    assert gateway.chatty.calls[0].constraint is None


# The package's own helpers


class Mood(enum.Enum):
    calm = "calm"
    stormy = "stormy"


class Port(BaseModel):
    name: str
    depth: int | None


class Voyage(BaseModel):
    """A voyage."""

    ship: str
    mood: Mood
    ports: list[Port]


def test_parse_gives_back_the_callers_class(gateway: Gateway, client: openai.OpenAI) -> None:
    voyage = Voyage(ship="Pequod", mood=Mood.stormy, ports=[Port(name="Nantucket", depth=None)])
    gateway.chatty.says(voyage.model_dump_json())
    answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Voyage)
    assert answer.choices[0].message.parsed == voyage
    assert gateway.chatty.calls[0].constraint is not None


class Small(BaseModel):
    mood: Mood
    deep: bool


@pytest.mark.parametrize("seed", range(4))
def test_parse_works_whatever_the_model_would_say(gateway: Gateway, client: openai.OpenAI, seed: int) -> None:
    gateway.chatty.dreams()
    answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Small, seed=seed, max_tokens=400)
    assert isinstance(answer.choices[0].message.parsed, Small)


def test_a_cut_answer_is_the_packages_length_error(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.says('{"mood": "calm", "deep": true}')
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=HI, response_format=Small, max_tokens=4)


def test_the_stream_helper_ends_with_the_message_that_its_deltas_make(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.says('{"mood": "calm", "deep": true}')
    content = ""
    with client.chat.completions.stream(model=MODEL, messages=HI, response_format=Small) as stream:
        for event in stream:
            if event.type == "content.delta":
                content += event.delta
        final = stream.get_final_completion().choices[0]
    assert final.message.content == content == '{"mood": "calm", "deep": true}'
    assert final.message.parsed == Small(mood=Mood.calm, deep=True)


def test_the_packages_own_form_of_a_class_is_taken(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.says('{"ship":"a","mood":"calm","ports":[{"name":"b","depth":5}]}')
    (choice,) = ask(client, type_to_response_format_param(Voyage))
    assert json.loads(choice.message.content)["ports"][0]["depth"] == 5
