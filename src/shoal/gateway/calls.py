"""How one model writes calls of tools and its reasoning: read off its own chat template.

A template that knows tools shows, when it renders a conversation with a call in it, exactly what its model was trained
to write: what stands before the name, between name and arguments, between two calls and at the end. So formats need no
list of model families; a probe with made-up names finds them. A template that does not know tools gets them described
in a system message, with a format of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.gateway.errors import RequestError

ID_CHARS = 9
"""Length of a call's id, letters and digits: Mistral's templates take no other."""

Plain = dict[str, Any]
Render = Callable[[list[Plain], list[Plain] | None, bool], str]
"""render(messages, tools, add_generation_prompt) -> the prompt. Raises RequestError."""

_NAME = "probe_function_%d"
_ID = "Probe000%d"
_VALUE = "probe_value_%d"
_RESULT = "probe_result_%d"
_TOOL: Plain = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "probe", "parameters": {"type": "object", "properties": {}}},
}
_USER: Plain = {"role": "user", "content": "probe_question"}
_MARKER = re.compile(r"\s*(<[^<>\s{]+>?|\[[A-Z_]{2,40}\])")
_OPEN_TAG = re.compile(r"(<[^<>/\s]{1,40}>|\[[A-Z_]{1,40}\])\s*$")
_CLOSE_TAG = re.compile(r"\s*(</[^<>\s]{1,40}>|\[/[A-Z_]{1,40}\])")


@dataclass(frozen=True, slots=True)
class CallFormat:
    """opening NAME middle ARGUMENTS (between NAME middle ARGUMENTS)* closing, the arguments as a JSON object.

    `between` and `closing` are pieces with an id of ID_CHARS letters and digits at each border. `between` is None for
    a model that makes one call at a time.
    """

    opening: str
    middle: str
    between: tuple[str, ...] | None
    closing: tuple[str, ...]
    native: bool = True
    """False: the template knows no tools, so prompts are written by `described`."""
    arguments_as_text: bool = False
    """The template wants the arguments of earlier calls as JSON text, not as an object."""
    no_content: str | None = ""
    """What the template wants as the content of a message that has only calls."""

    @property
    def marker(self) -> str | None:
        """The first part of `opening` that no ordinary text contains, white space before it left out; None: there is
        none, so only an answer that is a call from its first letter on is one."""
        found = _MARKER.match(self.opening)
        return found[1] if found else None

    @property
    def literals(self) -> tuple[str, ...]:
        return (self.opening, self.middle, *(self.between or ()), *self.closing)


@dataclass(frozen=True, slots=True)
class Tags:
    """What a model writes around its reasoning."""

    open: str
    close: str


DESCRIBED = CallFormat(
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between=('}\n</tool_call>\n<tool_call>\n{"name": "',),
    closing=("}\n</tool_call>",),
    native=False,
)


def call_format(render: Render, ends: Sequence[str]) -> CallFormat:
    """The format of the template behind `render`; DESCRIBED when it does not show one that can be used.

    `ends` are the texts of the tokens that end an answer.
    """
    try:
        start = render([_USER], [_TOOL], True)
        if "probe_tool" not in start:
            return DESCRIBED
    except RequestError:
        return DESCRIBED
    for no_content in ("", None):
        for as_text in (False, True):

            def parts(calls: int, no_content: str | None = no_content, as_text: bool = as_text) -> list[str] | None:
                return _parts(render, start, ends, _conversation(calls, no_content, as_text))

            single, double = parts(1), parts(2)
            if single is None:
                continue
            opening, middle, closing = single
            one_by_one = double is None or _split(double[-1]) != _split(closing) or double[:2] != single[:2]
            between = None if one_by_one or double is None or double[3] != middle else _split(double[2])
            return CallFormat(opening, middle, between, _split(closing), True, as_text, no_content)
    return DESCRIBED


def reasoning_tags(render: Render) -> Tags | None:
    """The tags around an answer's `reasoning_content`, where the template of `render` writes it between tags."""
    answer = {"role": "assistant", "content": "probe_content", "reasoning_content": "probe_reasoning"}
    try:
        before, found, after = render([_USER, answer], None, False).partition("probe_reasoning")
    except RequestError:
        return None
    opened, closed = _OPEN_TAG.search(before), _CLOSE_TAG.match(after)
    if not (found and opened and closed and "probe_content" in after):
        return None
    return Tags(opened[1], closed[1])


def opened_tags(prompt: str, template: str) -> Tags | None:
    """The tags of the reasoning that `prompt` has begun: it ends with a tag that the template knows how to close."""
    opened = _OPEN_TAG.search(prompt)
    if opened is None:
        return None
    tag = opened[1]
    close = f"{tag[0]}/{tag[1:]}"
    return Tags(tag, close) if close in template else None


def described(messages: Sequence[Plain], tools: Sequence[Plain]) -> list[Plain]:
    """The conversation for a template that knows no tools: they stand in the system message, calls and results in the
    text of messages that every template takes."""
    spelled: list[Plain] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content or ''}\n</tool_response>"
            if spelled and spelled[-1].get("results"):
                spelled[-1]["content"] += "\n" + content
            else:
                spelled.append({"role": "user", "content": content, "results": True})
        elif message.get("tool_calls"):
            calls = "\n".join(_spelled_call(call["function"]) for call in message["tool_calls"])
            spelled.append({"role": role, "content": f"{content}\n{calls}" if content else calls})
        else:
            spelled.append(dict(message))
    for message in spelled:
        message.pop("results", None)
    if not tools:
        return spelled
    definitions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _DESCRIPTION % definitions
    if spelled and spelled[0]["role"] in ("system", "developer"):
        spelled[0]["content"] = f"{spelled[0]['content']}\n\n{text}"
    else:
        spelled.insert(0, {"role": "system", "content": text})
    return spelled


_DESCRIPTION = """You can call functions. These are their definitions in JSON, one in a line:
%s
To call functions, write one block like this for each call, and nothing after the last:
<tool_call>
{"name": "the function's name", "arguments": {the arguments as JSON}}
</tool_call>
What they return comes back in <tool_response> blocks."""


def _spelled_call(function: Plain) -> str:
    arguments = function["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{DESCRIBED.opening}{function['name']}{DESCRIBED.middle}{written}{DESCRIBED.closing[0]}"


def _conversation(calls: int, no_content: str | None, as_text: bool) -> list[Plain]:
    """A question, an answer with so many calls, and their results."""
    answer: Plain = {"role": "assistant", "content": no_content, "tool_calls": []}
    results: list[Plain] = []
    for number in range(calls):
        arguments: Any = {"probe_key": _VALUE % number}
        function = {"name": _NAME % number, "arguments": json.dumps(arguments) if as_text else arguments}
        answer["tool_calls"].append({"id": _ID % number, "type": "function", "function": function})
        results.append(
            {"role": "tool", "tool_call_id": _ID % number, "name": _NAME % number, "content": _RESULT % number}
        )
    return [_USER, answer, *results]


def _parts(render: Render, start: str, ends: Sequence[str], conversation: list[Plain]) -> list[str] | None:
    """What the template writes before, between and after names and arguments: opening, middle, (between, middle,)
    closing. None when it does not write all of them, in this order, before the end of the answer."""
    try:
        whole = render(conversation, [_TOOL], False)
    except RequestError:
        return None
    text = whole[_common(start, whole) :]
    calls, at, parts = len(conversation[1]["tool_calls"]), 0, []
    for number in range(calls):
        name = text.find(_NAME % number, at)
        if name < 0:
            return None
        after = name + len(_NAME % number)
        arguments = re.compile(r'\{\s*"probe_key"\s*:\s*"%s"\s*\}' % (_VALUE % number)).search(text, after)
        if arguments is None:
            return None
        parts += [text[at:name], text[after : arguments.start()]]
        at = arguments.end()
    end = min((found for mark in ends if mark and (found := text.find(mark, at)) >= 0), default=-1)
    if end < 0 or not all(_RESULT % number in text[end:] for number in range(calls)):
        return None
    parts.append(text[at:end])
    opening, middle = parts[:2]
    plain = "Probe000" not in opening + middle and "probe_" not in "".join(parts)
    return parts if plain and opening and middle else None


def _common(start: str, whole: str) -> int:
    """Length of what both begin with, never ending inside a tag."""
    length = next(
        (at for at, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(len(start), len(whole))
    )
    tag = whole.rfind("<", 0, length)
    return tag if length < len(start) and tag > whole.rfind(">", 0, length) else length


def _split(text: str) -> tuple[str, ...]:
    """The pieces of `text` around the ids in it."""
    return tuple(re.split(r"Probe000\d", text))
