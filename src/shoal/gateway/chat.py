"""Chat messages to prompt text, by the template that comes with the model.

A template is a program from a model directory, so it runs in jinja2's immutable sandbox, with a deadline that every
loop turn and every call checks, bounds on what one expression may build, and a bound on the whole text. Work that has
no bound of its own in jinja2 (padding methods, huge repetition) is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.gateway.calls import ID_CHARS, CallFormat, Plain, Tags, call_format, described, opened_tags, reasoning_tags
from shoal.gateway.errors import RequestError
from shoal.gateway.openai import Message
from shoal.gateway.served import Tokenizer

RENDER_TIMEOUT_S = 2.0
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_TEXT_CHARS = 8 * 1024 * 1024
MAX_NUMBER_BITS = 4096

_PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_WIDE_FORMAT = re.compile(r"\d{4}")

_deadline: ContextVar[float] = ContextVar("deadline")


class ChatTemplate:
    """The chat template of one model. `render` may run in any thread."""

    def __init__(self, tokenizer: Tokenizer, model: str, *, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        source = getattr(tokenizer, "chat_template", None)
        # Some tokenizers carry several named templates; "default" is the one for plain chat.
        self._source: str | None = source.get("default") if isinstance(source, Mapping) else source
        self._tool_source: str | None = source.get("tool_use") if isinstance(source, Mapping) else None
        self._model = model
        self._timeout_s = timeout_s
        self._calls: CallFormat | None = None
        self._tags: tuple[Tags | None] | None = None
        # bos_token, eos_token and the like, for templates that write them.
        tokens = getattr(tokenizer, "special_tokens_map", {})
        self._given: dict[str, Any] = {
            name: str(token) for name, token in tokens.items() if not isinstance(token, list)
        }
        # Templates ask for these with "is none", not only with "is defined".
        self._given |= {"tools": None, "documents": None, "add_generation_prompt": True}

    def render(self, messages: Sequence[Message], tools: Sequence[Plain] = (), *, ends: Sequence[str] = ()) -> str:
        """The prompt text, up to where the answer begins. Raises RequestError (400), also for a broken template.

        `ends` are the texts of the tokens that end an answer; needed with tools, or with calls in the messages.
        """
        plain = [self._plain(message) for message in messages]
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            form = self.call_format(ends)
            if not form.native:
                return self._described(plain, tools)
            for message in plain:
                _fit(message, form)
            try:
                return self._render(plain, list(tools) or None, True)
            except RequestError:
                # Mistral's templates take ids as they are made here and no others; calls may have been made elsewhere.
                if not _shorten_ids(plain):
                    raise
        return self._render(plain, list(tools) or None, True)

    def call_format(self, ends: Sequence[str]) -> CallFormat:
        """How the model calls tools; found out once."""
        if self._calls is None:
            self._calls = call_format(self._render, ends)
        return self._calls

    def tags(self, prompt: str) -> tuple[Tags | None, bool]:
        """The tags around the reasoning of an answer to `prompt`, if the template says that there are any, and whether
        the prompt itself has opened it."""
        if self._tags is None:
            self._tags = (reasoning_tags(self._render),)
        (tags,) = self._tags
        if tags is None:
            tags = opened_tags(prompt, self._source or "")
            return tags, tags is not None
        return tags, prompt.rstrip().endswith(tags.open)

    def _described(self, plain: list[Plain], tools: Sequence[Plain]) -> str:
        messages = described(plain, tools)
        try:
            return self._render(messages, None, True)
        except RequestError:
            if not (len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user"):
                raise
        # Some templates take no system message.
        system, user, *others = messages
        merged = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        return self._render([merged, *others], None, True)

    def _render(self, messages: list[Plain], tools: list[Plain] | None, add_generation_prompt: bool) -> str:
        if self._source is None:
            raise RequestError(
                f"The model {self._model} has no chat template, so it cannot take messages.",
                param="model",
                code="chat_template_missing",
                hint="Send the text to /v1/completions instead.",
            )
        given = self._given | {"tools": tools, "add_generation_prompt": add_generation_prompt}
        reset = _deadline.set(time.monotonic() + self._timeout_s)
        try:
            template = self._tool_template if tools and self._tool_source else self._template
            return _joined(template.generate(given, messages=messages))
        except TemplateSyntaxError as error:
            raise self._refuse(f"line {error.lineno}: {error.message}") from error
        except TemplateError as error:
            raise self._refuse(str(error.message)) from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError, LookupError) as error:
            # What an expression of a template can raise when messages have a shape it does not expect.
            raise self._refuse(f"{type(error).__name__} while rendering") from error
        finally:
            _deadline.reset(reset)

    @cached_property
    def _template(self) -> Template:
        return _compiled(self._source or "")

    @cached_property
    def _tool_template(self) -> Template:
        return _compiled(self._tool_source or "")

    def _plain(self, message: Message) -> dict[str, Any]:
        plain = message.plain()
        # OpenAI renamed "system" to "developer"; models older than that know only the first name.
        if plain["role"] == "developer" and "developer" not in (self._source or ""):
            plain["role"] = "system"
        return plain

    def _refuse(self, reason: str) -> RequestError:
        return RequestError(
            f"The chat template of {self._model} does not take these messages: {reason}.",
            param="messages",
            code="chat_template_error",
        )


def _compiled(source: str) -> Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
    return _ENVIRONMENT.from_string(source)


def _fit(message: Plain, form: CallFormat) -> None:
    """Write a message's calls as the template wants them."""
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if form.arguments_as_text and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    if message.get("tool_calls") and not message["content"]:
        message["content"] = form.no_content


def _shorten_ids(messages: Sequence[Plain]) -> bool:
    """Give calls ids of the usual length, the same to a call and its result. False when all have one."""
    changed = False
    holders = [(message, "tool_call_id") for message in messages if "tool_call_id" in message]
    holders += [(call, "id") for message in messages for call in message.get("tool_calls", ())]
    for holder, name in holders:
        if not re.fullmatch(f"[a-zA-Z0-9]{{{ID_CHARS}}}", holder[name]):
            holder[name] = hashlib.blake2b(holder[name].encode(errors="replace")).hexdigest()[:ID_CHARS]
            changed = True
    return changed


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, and bounds on time and size."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Put a clock into every loop and a size check on every value that a template keeps."""
        template = Parser(self, source, name, filename).parse()
        for loop in list(template.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_each", [], [], None, None, lineno=loop.lineno)
        for kept in list(template.find_all(nodes.Assign)):
            kept.node = nodes.Filter(kept.node, "_kept", [], [], None, None, lineno=kept.lineno)
        template.set_environment(self)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The odd names are jinja2's: keyword arguments of a template's own call must not collide with ours.
        _check_clock()
        for value in (*args, *kwargs.values()):
            _bounded(value)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and integers and left.bit_length() * right > MAX_NUMBER_BITS:
            raise TemplateError(f"a number of more than {MAX_NUMBER_BITS} bits")
        if operator == "*":
            size = max(_length(left) * right if isinstance(right, int) else 0,
                       _length(right) * left if isinstance(left, int) else 0)  # fmt: skip
            if size > MAX_TEXT_CHARS:
                raise TemplateError("a repetition that is too long")
        if operator == "%" and isinstance(left, str):
            _narrow(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _narrow(value.__self__)
        return wrapped


class _Generation(Extension):
    """`{% generation %}`, with which training marks the answer's tokens; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=64)
    for unbounded in ("center", "format", "indent", "pprint", "urlize", "wordwrap", "xmlattr"):
        del environment.filters[unbounded]
    environment.filters.update(tojson=_tojson, _each=_each, _kept=_bounded)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _check_clock() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateError("it runs too long")


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_clock()
        yield value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _bounded(value: Any) -> Any:
    if _length(value) > MAX_TEXT_CHARS:
        raise TemplateError(f"it builds more than {MAX_TEXT_CHARS} characters")
    return value


def _narrow(pattern: str) -> None:
    if _WIDE_FORMAT.search(pattern):
        raise TemplateError("a format that pads to a thousand characters or more")


def _joined(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        _check_clock()
        size += len(part)
        if size > MAX_TEXT_CHARS:
            raise TemplateError(f"it builds more than {MAX_TEXT_CHARS} characters")
        kept.append(part)
    return "".join(kept)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: jinja2's own filter escapes HTML, which would change the prompt."""
    indent = None if indent is None else min(max(indent, 0), 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


_ENVIRONMENT = _environment()
