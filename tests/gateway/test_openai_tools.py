"""What clients of OpenAI's API rely on, checked with the real `openai` package: tools, and reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel
from support import templates
from support.gateway import TEMPLATE, Gateway, ScriptedModel, byte_level_tokenizer, running
from support.tokenizers import spelled_out_tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
LIGHTS = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"},
        "rooms": {"type": "array", "items": {"enum": ["hall", "attic"]}, "maxItems": 3},
    },
    "required": ["on"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "lights": LIGHTS, "now": {"type": "object", "additionalProperties": False}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "How it will be.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "lights", "parameters": LIGHTS, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: Any = [{"role": "user", "content": "how warm is it in Rome?"}]
ARGUMENTS = '{"city": "Rome", "unit": "celsius", "days": 2}'
MODELS = ("hermes", "mistral", "llama", "deepseek", "thinking", "described", "spelled-out")


def tool_models() -> list[ScriptedModel]:
    im = ["<|im_start|>", "<|im_end|>"]
    tokenizers = {
        "hermes": byte_level_tokenizer(template=templates.HERMES, special=im, eos="<|im_end|>"),
        "mistral": byte_level_tokenizer(template=templates.MISTRAL, special=["[TOOL_CALLS]", "[INST]", "[/INST]"]),
        "llama": byte_level_tokenizer(template=templates.LLAMA, special=["<|eot_id|>"], eos="<|eot_id|>"),
        "deepseek": byte_level_tokenizer(
            template=templates.DEEPSEEK, special=["<｜end▁of▁sentence｜>"], eos="<｜end▁of▁sentence｜>"
        ),
        "thinking": byte_level_tokenizer(template=templates.THINKING, special=im, eos="<|im_end|>"),
        "opened": byte_level_tokenizer(template=templates.OPENED, special=im, eos="<|im_end|>"),
        "described": byte_level_tokenizer(template=TEMPLATE),
        "spelled-out": spelled_out_tokenizer(template=TEMPLATE),
    }
    return [ScriptedModel(name, tokenizer, context_length=4096) for name, tokenizer in tokenizers.items()]


@pytest.fixture(scope="module")
def tool_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), others=tool_models()) as gateway:
        yield gateway


@pytest.fixture
def models(tool_gateway: Gateway) -> dict[str, ScriptedModel]:
    for model in tool_gateway.others.values():
        model.as_new()
    return tool_gateway.others


@pytest.fixture
def client(tool_gateway: Gateway) -> Iterator[openai.OpenAI]:
    with tool_gateway.client() as client:
        yield client


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": ASK, "tools": TOOLS, "max_tokens": 600, **fields}
    )


def prompt_of(model: ScriptedModel) -> str:
    return model.tokenizer.decode(model.calls[-1].prompt)


def check_calls(message: Any, *, at_least: int = 1) -> None:
    """Every call is of a tool and its arguments keep to the tool's schema, by another implementation's word."""
    assert len(message.tool_calls or []) >= at_least
    for call in message.tool_calls or []:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


# A model that knows what it does, in the words of its template

CALL_OF = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": %s, "id": "abcDEF123"}]',
    "llama": '{"name": "weather", "parameters": %s}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n%s"
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "thinking": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "described": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "spelled-out": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
}


@pytest.mark.parametrize("name", MODELS)
def test_a_call_in_the_models_own_words_is_a_tool_call(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str
) -> None:
    models[name].says(CALL_OF[name] % ARGUMENTS)
    choice = ask(client, name).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", ARGUMENTS)
    assert call.id
    assert models[name].calls[0].closed.is_set()


@pytest.mark.parametrize("name", MODELS)
def test_a_call_is_streamed_as_openai_streams_it(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str
) -> None:
    models[name].says(CALL_OF[name] % ARGUMENTS)
    chunks = list(ask(client, name, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    first, *rest = deltas
    assert (first.index, first.type, first.function.name, first.function.arguments) == (0, "function", "weather", "")
    assert first.id
    # Id, type and name once; vLLM repeated the name, Ollama dropped the call.
    assert all((delta.index, delta.id, delta.type, delta.function.name) == (0, None, None, None) for delta in rest)
    assert len(rest) > 5
    assert "".join(delta.function.arguments for delta in rest) == ARGUMENTS
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]


@pytest.mark.parametrize("name", MODELS)
def test_with_tool_choice_auto_a_model_may_just_talk(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str
) -> None:
    said = 'It is 30 °C {"name"} <tool\n in Rome.'
    models[name].says(said)
    choice = ask(client, name, tool_choice="auto").choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", said, None)
    chunks = list(ask(client, name, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_before_a_call_is_content(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    models["hermes"].says("Let me look.\n\n" + CALL_OF["hermes"] % ARGUMENTS)
    choice = ask(client, "hermes").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS


def test_several_calls_in_one_answer(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    second = '{"on": true}'
    models["hermes"].says(
        f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "lights", "arguments": {second}}}\n</tool_call>'
    )
    models["mistral"].says(
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "abcDEF123"}}, '
        f'{{"name": "lights", "arguments": {second}, "id": "abcDEF124"}}]'
    )
    for name in ("hermes", "mistral"):
        message = ask(client, name).choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["weather", "lights"]
        assert [call.function.arguments for call in message.tool_calls] == [ARGUMENTS, second]
        assert len({call.id for call in message.tool_calls}) == 2
        deltas = [call for chunk in ask(client, name, stream=True) for call in chunk.choices[0].delta.tool_calls or []]
        assert [delta.index for delta in deltas if delta.id] == [0, 1]
        for index, arguments in ((0, ARGUMENTS), (1, second)):
            assert "".join(delta.function.arguments for delta in deltas if delta.index == index) == arguments


# A model that says anything: what it is held to

SEEDS = range(6)
HELD = [name for name in MODELS if name != "thinking"]  # which may think by chance, and for ever


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("seed", SEEDS)
def test_required_means_a_valid_call_whatever_the_model_would_say(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str, seed: int
) -> None:
    models[name].dreams()
    choice = ask(client, name, tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=900).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 1
    check_calls(choice.message)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("called", ["weather", "lights", "now"])
def test_a_tool_chosen_by_name_is_the_one_that_is_called(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str, called: str
) -> None:
    models[name].dreams()
    choice = ask(client, name, tool_choice={"type": "function", "function": {"name": called}}, seed=3).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == [called]
    assert choice.finish_reason == "tool_calls"
    check_calls(choice.message)


def test_required_and_streamed_is_the_same_call(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    models["hermes"].dreams()
    fields: Any = {"tool_choice": "required", "seed": 5, "parallel_tool_calls": False}
    whole = ask(client, "hermes", **fields).choices[0].message
    state = ChatCompletionStreamState()
    for chunk in ask(client, "hermes", **fields, stream=True):
        state.handle_chunk(chunk)
    streamed = state.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [call.function.arguments for call in streamed.message.tool_calls or []] == [
        call.function.arguments for call in whole.tool_calls
    ]


def test_calls_at_once_happen_only_when_allowed(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    for name in ("hermes", "mistral"):
        models[name].dreams()
        counts = set()
        for seed in range(8):
            message = ask(client, name, tool_choice="required", seed=seed, max_tokens=3000).choices[0].message
            check_calls(message)
            counts.add(len(message.tool_calls))
        assert max(counts) > 1, "the model was never allowed a second call"
    models["llama"].dreams()
    for seed in range(4):
        assert len(ask(client, "llama", tool_choice="required", seed=seed).choices[0].message.tool_calls) == 1


def test_a_limit_inside_a_call_is_length_as_openai_has_it(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].says(CALL_OF["hermes"] % ARGUMENTS)
    seen = set()
    for tokens in range(1, 60):
        choice = ask(client, "hermes", max_tokens=tokens).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.content in (None, "")
        arguments = choice.message.tool_calls[0].function.arguments if choice.message.tool_calls else ""
        assert ARGUMENTS.startswith(arguments)
        seen.add(arguments)
    assert len(seen) > 10


def test_choices_seeds_temperature_and_logprobs_work_with_tools(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].dreams()
    fields: Any = {
        "tool_choice": "required",
        "n": 3,
        "seed": 1,
        "temperature": 0.7,
        "parallel_tool_calls": False,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 900,
    }
    answer = ask(client, "hermes", **fields)
    arguments = [choice.message.tool_calls[0].function.arguments for choice in answer.choices]
    assert len(set(arguments)) == 3
    for choice in answer.choices:
        check_calls(choice.message)
        whole = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        assert whole.startswith("<tool_call>\n")
        assert arguments[choice.index] in whole
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) + 1 for choice in answer.choices)
    again = ask(client, "hermes", **fields)
    assert [choice.message.tool_calls[0].function.arguments for choice in again.choices] == arguments
    # llama.cpp refuses these three together.
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in ask(client, "hermes", **fields, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            streamed[chunk.choices[0].index] += call.function.arguments
    assert list(streamed.values()) == arguments


def test_a_stop_string_does_not_cut_a_call(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    models["hermes"].says(CALL_OF["hermes"] % ARGUMENTS)
    choice = ask(client, "hermes", stop=["\n", "Rome", "}"]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS
    models["hermes"].says("Well,\n" + CALL_OF["hermes"] % ARGUMENTS)
    choice = ask(client, "hermes", stop=["\n"]).choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "Well,", None)


# What goes in


def test_the_template_gets_the_tools_calls_and_results(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    model = models["hermes"]
    model.says(CALL_OF["hermes"] % ARGUMENTS)
    message = ask(client, "hermes").choices[0].message
    assert '"name": "weather", "description": "How it will be."' in prompt_of(model)
    model.says("It is warm.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "30"}
    answer = ask(client, "hermes", messages=[*ASK, message, result])
    assert answer.choices[0].message.content == "It is warm."
    prompt = prompt_of(model)
    assert prompt.index('{"name": "weather", "arguments": {"city": "Rome"') < prompt.index("<tool_response>\n30\n")


@pytest.mark.parametrize("name", MODELS)
def test_a_call_and_its_result_can_be_sent_back_to_every_model(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str
) -> None:
    models[name].says(CALL_OF[name] % ARGUMENTS)
    message = ask(client, name).choices[0].message
    models[name].says("It is warm.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "30"}
    for tools in (TOOLS, openai.NOT_GIVEN):
        answer = ask(client, name, messages=[*ASK, message, result], tools=tools)
        assert answer.choices[0].message.content.strip() == "It is warm."
        assert '"Rome"' in prompt_of(models[name])


@pytest.mark.parametrize(("name", "told"), [("hermes", None), ("described", "described")])
def test_a_header_says_when_the_template_knew_no_tools(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str, told: str | None
) -> None:
    for stream in (False, True):
        create = client.chat.completions.with_raw_response.create
        answer = create(model=name, messages=ASK, tools=TOOLS, stream=stream)
        assert answer.headers.get("x-shoal-tools") == told
        answer.http_response.close()
    answer = client.chat.completions.with_raw_response.create(model=name, messages=ASK)
    assert "x-shoal-tools" not in answer.headers


def test_tool_choice_none_means_no_calls_and_no_tools_in_the_prompt(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].says("<tool_call> is what I could write")
    choice = ask(client, "hermes", tool_choice="none").choices[0]
    assert choice.message.content == "<tool_call> is what I could write"
    assert models["hermes"].calls[0].constraint is None
    assert "weather" not in prompt_of(models["hermes"])


def test_allowed_tools_narrow_the_choice(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    models["hermes"].dreams()
    only = [{"type": "function", "function": {"name": "lights"}}]
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": only}}
    message = ask(client, "hermes", tool_choice=choice, seed=2, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["lights"]


def test_without_tools_nothing_is_held_to_anything(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    for tools in (openai.NOT_GIVEN, []):
        assert ask(client, "hermes", tools=tools).choices[0].message.content == "hello world"
    assert all(call.constraint is None for call in models["hermes"].calls)


DEEP: Any = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "array", "items": DEEP}


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


def taking(argument: Any, **others: Any) -> dict[str, Any]:
    """Parameters with one argument."""
    return {"type": "object", "properties": {"a": argument}, **others}


FIRST = "tools[0].function.parameters"
UNANSWERED = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": function(strict=True, parameters={"type": "object", "not": {}})}, FIRST),
        ({"tools": function(parameters={"type": "string"})}, f"{FIRST}.type"),
        ({"tools": function(parameters=taking({"type": "foo"}))}, FIRST),
        ({"tools": function(parameters=taking(DEEP))}, FIRST),
        (
            {"tools": [*TOOLS, *function(parameters=taking({"type": "string", "pattern": "(?=x)"}))]},
            "tools[3].function.parameters",
        ),
        ({"tools": function(name="no spaces")}, "tools[0].function.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": function() * 200}, "tools"),
        ({"tools": function(parameters={"type": "object", "description": "x" * 200_000})}, FIRST),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "weather"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required", "tools": openai.NOT_GIVEN}, "tool_choice"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"messages": [*ASK, {"role": "tool", "content": "30"}]}, "messages[1].tool_call_id"),
        ({"messages": [*ASK, {"role": "tool", "content": "30", "tool_call_id": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [UNANSWERED]}, "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_what_cannot_be_done_with_tools_is_400_and_named_before_a_stream_begins(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hermes", stream=True, **fields)
    assert caught.value.param == param


def test_a_tool_that_is_not_strict_may_say_more_than_can_be_kept_to(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].dreams()
    numbers = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "maxItems": 2}
    loose = taking(numbers, required=["a"], additionalProperties=False, **{"not": {"type": "string"}})
    message = ask(client, "hermes", tools=function(parameters=loose), tool_choice="required", seed=1).choices[0].message
    kept_to = taking({"maxItems": 2, "items": {"enum": [1, 2]}}, required=["a"], additionalProperties=False)
    jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), kept_to)


# The package's own helpers


class Weather(BaseModel):
    """How it will be."""

    city: str
    days: int


def test_parse_gives_the_arguments_as_an_object_of_the_callers_class(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].says('<tool_call>\n{"name": "Weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>')
    answer = client.chat.completions.parse(model="hermes", messages=ASK, tools=[openai.pydantic_function_tool(Weather)])
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=2)


def test_the_stream_helper_ends_with_the_message_that_its_deltas_make(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].says("Let me see. " + CALL_OF["hermes"] % ARGUMENTS)
    arguments, content = "", ""
    strict: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    with client.chat.completions.stream(model="hermes", messages=ASK, tools=strict) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                arguments += event.arguments_delta
            elif event.type == "content.delta":
                content += event.delta
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert (final.message.content, content) == ("Let me see.", "Let me see.")
    (call,) = final.message.tool_calls or []
    assert call.function.arguments == arguments == ARGUMENTS
    assert call.function.parsed_arguments == json.loads(ARGUMENTS)


# Reasoning


@pytest.mark.parametrize(("name", "opening"), [("thinking", "<think>\n"), ("opened", "")])
def test_reasoning_is_beside_the_content_where_the_template_has_it(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str, opening: str
) -> None:
    models[name].says(f"{opening}It is July.\n</think>\n\nWarm.")
    message = ask(client, name, tools=openai.NOT_GIVEN).choices[0].message
    assert (message.content, message.reasoning_content) == ("Warm.", "It is July.")
    chunks = list(ask(client, name, tools=openai.NOT_GIVEN, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Warm."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "It is July."
    assert "<think>" not in str(chunks)
    assert "July" not in "".join(delta.content or "" for delta in deltas)


def test_reasoning_is_content_where_the_template_does_not_have_it(
    client: openai.OpenAI, models: dict[str, ScriptedModel]
) -> None:
    models["hermes"].says("<think>\nIt is July.\n</think>\n\nWarm.")
    message = ask(client, "hermes", tools=openai.NOT_GIVEN).choices[0].message
    assert message.content == "<think>\nIt is July.\n</think>\n\nWarm."
    assert not hasattr(message, "reasoning_content")


@pytest.mark.parametrize(("name", "opening"), [("thinking", "<think>\n"), ("opened", "")])
def test_a_model_may_reason_before_it_calls_or_answers_in_json(
    client: openai.OpenAI, models: dict[str, ScriptedModel], name: str, opening: str
) -> None:
    thought = f"{opening}I could write <tool_call> or not.\n</think>\n\n"
    models[name].says(thought + CALL_OF["hermes"] % ARGUMENTS)
    for tool_choice in ("auto", "required"):
        choice = ask(client, name, tool_choice=tool_choice).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.reasoning_content == "I could write <tool_call> or not."
        check_calls(choice.message)
    models[name].says(thought + '{"a": 1}')
    message = ask(client, name, tools=openai.NOT_GIVEN, response_format={"type": "json_object"}).choices[0].message
    assert (message.content, message.reasoning_content) == ('{"a": 1}', "I could write <tool_call> or not.")


# The template


def test_what_a_template_does_not_take_is_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Only user, assistant and tool roles") as caught:
        ask(client, "mistral", messages=[{"role": "system", "content": "x"}, *ASK])
    assert (caught.value.code, caught.value.param) == ("chat_template_error", "messages")


def test_tools_and_json_together_are_a_call_or_json(client: openai.OpenAI, models: dict[str, ScriptedModel]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": LIGHTS, "strict": True}}
    for said in (CALL_OF["hermes"] % ARGUMENTS, '{"on": false}'):
        models["hermes"].says(said)
        message = ask(client, "hermes", response_format=form).choices[0].message
        assert (message.content == said) is not bool(message.tool_calls)
    models["hermes"].dreams()
    for seed in range(6):
        message = ask(client, "hermes", response_format=form, seed=seed, max_tokens=2000).choices[0].message
        if message.tool_calls:
            check_calls(message)
        else:
            jsonschema.validate(json.loads(message.content), LIGHTS)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "llama", response_format=form)
    assert caught.value.param == "response_format"
