"""The demo model, too small to know what JSON is, over a real swarm: its grammar is all that it keeps to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import jsonschema
import openai
import pytest
from support.swarm import Swarm, is_running, until

pytestmark = pytest.mark.slow

ASK: Any = [{"role": "user", "content": "Which index is used, and why?"}]
REPORT = {
    "type": "object",
    "properties": {
        "index": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "used": {"type": "boolean"},
        "reasons": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 1, "maxItems": 4},
        "rows": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9999}, {"type": "null"}]},
    },
    "required": ["index", "used", "reasons", "rows"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "report", "schema": REPORT, "strict": True}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "explain", "description": "Explain an index.", "parameters": REPORT}},
    {"type": "function", "function": {"name": "vacuum"}},
]


def ask(client: openai.OpenAI, swarm: Swarm, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": swarm.model, "messages": ASK, "max_tokens": 400, **fields})


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid), "the end of a killed server")


def test_by_a_schema_at_every_temperature(swarm: Swarm) -> None:
    with swarm.client() as client:
        for fields in ({"temperature": 0}, {"temperature": 0.8, "seed": 1}, {"temperature": 2, "seed": 2}):
            answer = ask(client, swarm, response_format=FORM, n=4, **fields)
            for choice in answer.choices:
                assert choice.finish_reason == "stop"
                jsonschema.validate(json.loads(choice.message.content), REPORT)


def test_as_an_object_of_any_kind(swarm: Swarm) -> None:
    with swarm.client() as client:
        answer = ask(client, swarm, response_format={"type": "json_object"}, n=8, seed=1, temperature=1.2)
        for choice in answer.choices:
            assert choice.message.content.startswith("{")
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content), dict)


def test_as_the_arguments_of_a_call(swarm: Swarm) -> None:
    with swarm.client() as client:
        named: Any = {"type": "function", "function": {"name": "explain"}}
        for tool_choice in (named, "required"):
            answer = ask(client, swarm, tools=TOOLS, tool_choice=tool_choice, n=4, seed=1, parallel_tool_calls=False)
            for choice in answer.choices:
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
                (call,) = choice.message.tool_calls
                if call.function.name == "explain":
                    jsonschema.validate(json.loads(call.function.arguments), REPORT)
                else:
                    assert (call.function.name, json.loads(call.function.arguments)) == ("vacuum", {})


def test_beside_answers_that_are_not_held_to_anything_and_stay_what_they_are(swarm: Swarm) -> None:
    async def together() -> tuple[list[str], list[Any]]:
        async with openai.AsyncOpenAI(base_url=swarm.api, api_key=swarm.key, max_retries=0) as client:

            async def one(**fields: Any) -> str:
                create: Any = client.chat.completions.create
                answer = await create(model=swarm.model, messages=ASK, temperature=0, **fields)
                return answer.choices[0].message.content

            free = [one(max_tokens=120) for _ in range(3)]
            held = [one(max_tokens=400, response_format=FORM) for _ in range(3)]
            texts = await asyncio.gather(*free, *held)
            return list(texts[:3]), [json.loads(text) for text in texts[3:]]

    with swarm.client() as client:
        alone = ask(client, swarm, max_tokens=120, temperature=0).choices[0].message.content
    free, held = asyncio.run(together())
    assert free == [alone] * 3
    for value in held:
        jsonschema.validate(value, REPORT)


def test_also_when_a_server_is_killed_in_the_middle(swarm: Swarm) -> None:
    long = {
        "type": "array",
        "items": {"type": "integer", "minimum": 100000, "maximum": 999999},
        "minItems": 60,
        "maxItems": 60,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": long, "strict": True}}
    fields: Any = {"response_format": form, "temperature": 0.8, "seed": 5, "max_tokens": 1200}
    with swarm.client() as client:
        undisturbed = ask(client, swarm, **fields).choices[0].message.content
        text, killed = "", False
        for chunk in ask(client, swarm, stream=True, **fields):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 60 and not killed:
                kill(swarm.busy(1)["pid"])
                killed = True
    assert text == undisturbed
    assert killed
    jsonschema.validate(json.loads(text), long)
