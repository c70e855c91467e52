"""A chat template is a program from a model's folder: it renders prompts, and cannot do anything else."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from support.gateway import TEMPLATE, byte_level_tokenizer

from shoal.gateway.chat import ChatTemplate
from shoal.gateway.errors import RequestError
from shoal.gateway.openai import Message

HELLO = [Message("user", "hello")]


def template(source: object, timeout_s: float = 5.0) -> ChatTemplate:
    tokenizer = SimpleNamespace(chat_template=source, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    return ChatTemplate(tokenizer, "toy", timeout_s=timeout_s)  # type: ignore[arg-type]


def rendered(source: str, *messages: Message) -> str:
    return template(source).render(messages or HELLO)


def test_the_usual_parts_of_a_template_work() -> None:
    source = """{{- bos_token }}
{%- set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- set ns.n = ns.n + 1 %}
    {%- if loop.first and message['role'] == 'system' %}{{ '[' + message.content|trim + ']' }}{% continue %}{% endif %}
    {%- generation %}{{ message.role }}={{ message.content }}{% endgeneration %}
    {%- if not loop.last %}{{ '|' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '>' ~ ns.n }}{% endif %}"""
    messages = [Message("system", " be kind "), Message("user", "<b>&"), Message("assistant", "ok")]
    assert rendered(source, *messages) == "<s>[be kind]user=<b>&|assistant=ok>3"


LLAMA_LIKE = """{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>\\n" + "Today: " + date_string + "\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""
CHECKING = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ message.content + eos_token }}
{% endif %}{% endfor %}
"""


@pytest.mark.parametrize("source", [LLAMA_LIKE, CHECKING, TEMPLATE])
def test_a_prompt_is_the_one_that_transformers_makes(source: str) -> None:
    tokenizer = byte_level_tokenizer(template=source)
    messages = [Message("user", " hi <b> "), Message("assistant", "ho"), Message("user", "ha\n")]
    ours = ChatTemplate(tokenizer, "toy").render(messages)
    theirs = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert ours == theirs


def test_json_is_written_as_transformers_writes_it() -> None:
    assert rendered("{{ messages | tojson }}") == '[{"role": "user", "content": "hello"}]'
    assert rendered("{{ {'ä': '<'} | tojson(indent=2) }}") == '{\n  "ä": "<"\n}'


def test_developer_is_left_alone_where_the_template_knows_it() -> None:
    message = Message("developer", "x")
    assert rendered("{{ messages[0].role }}", message) == "system"
    assert rendered("{# developer #}{{ messages[0].role }}", message) == "developer"


def test_the_default_one_of_several_templates_is_taken() -> None:
    assert template({"default": "A", "tool_use": "B"}).render(HELLO) == "A"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "line 1"),
        ("{{ messages[0].content.nothing.more }}", "no attribute"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", ""),
        ("{{ 'x' | nothing }}", "nothing"),
    ],
)
def test_a_template_that_fails_is_the_requests_error_400(source: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        rendered(source)
    assert (caught.value.http_status, caught.value.param) == (400, "messages")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ],
)
def test_no_template_leaves_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set many = range(99999) %}{% for a in many %}{% for b in many %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    ],
)
def test_a_template_that_runs_on_and_on_is_stopped(source: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(RequestError, match="too long"):
        template(source, timeout_s=0.1).render(HELLO)
    assert time.monotonic() - started_s < 20  # against hanging only


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * [0] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises(RequestError):
        rendered(source)


def test_an_oversized_template_is_refused() -> None:
    with pytest.raises(RequestError, match="longer than"):
        rendered("x" * 300_000)
