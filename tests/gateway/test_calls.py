"""How a model writes calls and reasoning is read off its chat template."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from support import templates
from support.gateway import TEMPLATE

from shoal.gateway.calls import DESCRIBED, CallFormat, Tags
from shoal.gateway.chat import ChatTemplate
from shoal.gateway.errors import RequestError
from shoal.gateway.openai import FunctionCall, Message, ToolCall

ENDS = ["<|im_end|>", "</s>", "<|eot_id|>", "<｜end▁of▁sentence｜>"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def template(source: object) -> ChatTemplate:
    tokenizer = SimpleNamespace(chat_template=source, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    return ChatTemplate(tokenizer, "toy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            templates.HERMES,
            CallFormat(
                '<tool_call>\n{"name": "',
                '", "arguments": ',
                ('}\n</tool_call>\n<tool_call>\n{"name": "',),
                ("}\n</tool_call>",),
            ),
        ),
        (
            templates.MISTRAL,
            CallFormat(
                '[TOOL_CALLS] [{"name": "',
                '", "arguments": ',
                (', "id": "', '"}, {"name": "'),
                (', "id": "', '"}]'),
            ),
        ),
        (templates.LLAMA, CallFormat('{"name": "', '", "parameters": ', None, ("}",))),
        (
            templates.DEEPSEEK,
            CallFormat(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                "\n```json\n",
                ("\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",),
                ("\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",),
                arguments_as_text=True,
                no_content=None,
            ),
        ),
    ],
)
def test_the_format_of_calls_is_the_templates_own(source: str, expected: CallFormat) -> None:
    assert template(source).call_format(ENDS) == expected


@pytest.mark.parametrize("source", [templates.THINKING, templates.OPENED])
def test_reasoning_in_a_template_does_not_hide_its_calls(source: str) -> None:
    assert template(source).call_format(ENDS) == template(templates.HERMES).call_format(ENDS)


@pytest.mark.parametrize("source", [TEMPLATE, templates.XML, "{{ tools }}", "{{ raise_exception('no') }}"])
def test_a_template_that_shows_no_usable_format_gets_ours(source: str) -> None:
    assert template(source).call_format(ENDS) == DESCRIBED


@pytest.mark.parametrize(
    ("source", "marker"),
    [
        (templates.HERMES, "<tool_call>"),
        (templates.MISTRAL, "[TOOL_CALLS]"),
        (templates.LLAMA, None),
        (templates.DEEPSEEK, "<｜tool▁calls▁begin｜>"),
        (TEMPLATE, "<tool_call>"),
    ],
)
def test_the_marker_is_what_no_ordinary_text_contains(source: str, marker: str | None) -> None:
    assert template(source).call_format(ENDS).marker == marker


CONVERSATION = [
    Message("user", "how warm?"),
    Message(
        "assistant",
        None,
        tool_calls=[
            ToolCall("abcdefgh1", FunctionCall("weather", '{"at":"Rome"}')),
            ToolCall("abcdefgh2", FunctionCall("weather", '{"at":"Oslo"}')),
        ],
    ),
    Message("tool", "30", tool_call_id="abcdefgh1"),
    Message("tool", "-3", tool_call_id="abcdefgh2"),
]


@pytest.mark.parametrize("source", [templates.HERMES, templates.MISTRAL, templates.DEEPSEEK, templates.THINKING])
def test_calls_and_results_of_a_conversation_go_through_the_template(source: str) -> None:
    prompt = template(source).render(CONVERSATION, [TOOL], ends=ENDS)
    assert prompt.count('{"at": "Rome"}') == prompt.count('{"at": "Oslo"}') == 1
    assert prompt.index("Rome") < prompt.index("Oslo") < prompt.index("30") < prompt.index("-3")


def test_a_conversation_from_elsewhere_gets_ids_that_the_template_takes() -> None:
    call, other = (ToolCall(f"call_{n * 24}", FunctionCall("weather", "{}")) for n in "ab")
    messages = [Message("user", "?"), Message("assistant", None, tool_calls=[call, other])]
    messages += [Message("tool", "30", tool_call_id=call.id), Message("tool", "31", tool_call_id=other.id)]
    prompt = template(templates.MISTRAL).render(messages, [TOOL], ends=ENDS)
    made = re.findall(r'"id": "(\w{9})"', prompt)
    assert len(set(made)) == 2
    assert re.findall(r'"call_id": "(\w{9})"', prompt) == made


def test_tools_are_described_to_a_model_whose_template_knows_none() -> None:
    prompt = template(TEMPLATE).render([Message("system", "Be brief."), *CONVERSATION], [TOOL], ends=ENDS)
    assert prompt.startswith("<s><system>Be brief.\n\nYou can call functions.")
    assert '"name": "weather"' in prompt
    calls = "\n".join(
        f'<tool_call>\n{{"name": "weather", "arguments": {{"at": "{city}"}}}}\n</tool_call>'
        for city in ("Rome", "Oslo")
    )
    assert f"<assistant>{calls}\n" in prompt
    # One message for both: many templates want user and assistant in turn.
    results = "<tool_response>\n30\n</tool_response>\n<tool_response>\n-3\n</tool_response>"
    assert f"<user>{results}\n<assistant>" in prompt


def test_the_description_goes_to_the_user_where_no_system_message_is_taken() -> None:
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    prompt = template(source).render([Message("user", "how warm?")], [TOOL], ends=ENDS)
    assert prompt.startswith("<user>You can call functions.")
    assert prompt.endswith("how warm?")
    with pytest.raises(RequestError, match="no system"):
        template(source).render([Message("system", "x"), Message("system", "y")], [TOOL], ends=ENDS)


def test_a_conversation_without_tools_is_rendered_as_ever() -> None:
    assert "Tools" not in template(templates.HERMES).render([Message("user", "hi")])


def test_a_template_of_its_own_for_tools_is_used_with_tools() -> None:
    both = template({"default": "PLAIN", "tool_use": templates.HERMES})
    assert both.render([Message("user", "hi")]) == "PLAIN"
    assert "# Tools" in both.render([Message("user", "hi")], [TOOL], ends=ENDS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (templates.THINKING, (Tags("<think>", "</think>"), False)),
        (templates.OPENED, (Tags("<think>", "</think>"), True)),
        (templates.HERMES, (None, False)),
        (TEMPLATE, (None, False)),
        # DeepSeek R1: it never shows earlier reasoning, but begins it in the prompt and knows how it ends.
        ("{{ messages[0].content.split('</think>')[-1] }}<think>\n", (Tags("<think>", "</think>"), True)),
        ("{{ messages[0].content }}<think>\n", (None, False)),
    ],
)
def test_reasoning_is_split_off_only_where_the_template_says_so(
    source: str, expected: tuple[Tags | None, bool]
) -> None:
    chat = template(source)
    assert chat.tags(chat.render([Message("user", "hi")])) == expected


def test_earlier_reasoning_is_given_back_to_the_template() -> None:
    answer = Message("assistant", "4", reasoning_content="2 and 2")
    assert "<think>\n2 and 2\n</think>\n\n4" in template(templates.THINKING).render([Message("user", "?"), answer])
