"""What clients of OpenAI's API rely on, checked with the real `openai` package: the fields of a request."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from support.gateway import Gateway

MODEL = "org/chatty:1b"
HI = [{"role": "user", "content": "hi"}]
TOP_TOKEN, BIASED = 60, 77


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 12, **fields})


def text(client: openai.OpenAI, **fields: Any) -> str:
    return chat(client, **fields).choices[0].message.content


# Lengths


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_answer_length_are_honoured(gateway: Gateway, client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, **{name: 2})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")
    for wrong in (0, -1):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=HI, **{name: wrong})
        assert caught.value.param == name


def test_two_different_answer_lengths_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=3, max_completion_tokens=4)
    assert caught.value.param == "max_tokens"


def test_an_answer_without_a_length_fits_the_context(gateway: Gateway, client: openai.OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=HI)
    (call,) = gateway.chatty.calls
    assert len(call.prompt) + call.max_tokens == gateway.chatty.context_length
    client.completions.create(model=MODEL, prompt="hi")
    assert gateway.chatty.calls[1].max_tokens == 16


def test_ignore_eos_generates_the_asked_length(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.script = lambda call: [40, 1] * 3
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=6, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "length")
    assert client.completions.create(model=MODEL, prompt="hi", max_tokens=6).usage.completion_tokens == 2


# Stop strings


@pytest.mark.parametrize(
    ("stop", "left"),
    [("wor", "hello "), (["xyz", "lo w"], "hel"), (["d"], "hello worl"), (["hello"], ""), (None, "hello world"),
     ([], "hello world"), ("worldly", "hello world")],
)  # fmt: skip
def test_a_stop_string_ends_the_answer_and_is_not_shown(
    gateway: Gateway, client: openai.OpenAI, stop: Any, left: str
) -> None:
    # Letter by letter, so that every stop string lies across token borders.
    tokenizer = gateway.chatty.tokenizer
    letters = [token for letter in "hello world" for token in tokenizer.encode(letter, add_special_tokens=False)]
    gateway.chatty.does(*letters, 1)
    assert text(client, stop=stop) == left
    chunks = list(chat(client, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == left
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(call.closed.is_set() for call in gateway.chatty.calls)


@pytest.mark.parametrize("stop", [["a", "b", "c", "d", "e"], "", [""], 3])
def test_a_wrong_stop_is_refused(client: openai.OpenAI, stop: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stop=stop)
    assert caught.value.param.startswith("stop")


# Sampling


def test_temperature_zero_is_greedy_and_gives_the_same_text_twice(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    assert text(client, temperature=0) == text(client, temperature=0)
    assert all(call.params.greedy for call in gateway.chatty.calls)
    assert len({text(client, temperature=2) for _ in range(3)}) > 1


def test_a_seed_repeats_the_answer_and_another_one_changes_it(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    assert text(client, seed=7) == text(client, seed=7) != text(client, seed=8)
    first, second = (choice.message.content for choice in chat(client, seed=7, n=2).choices)
    assert first != second
    assert [first, second] == [choice.message.content for choice in chat(client, seed=7, n=2).choices]


def test_top_p_keeps_only_the_likeliest_tokens(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    assert text(client, top_p=1e-6, temperature=2) == text(client, temperature=0)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_how_often_tokens_come_back(gateway: Gateway, client: openai.OpenAI, name: str) -> None:
    gateway.chatty.samples()
    # Two likely tokens, so that each of them comes back unless it is penalised.
    likely = {str(TOP_TOKEN): 5.0, str(BIASED): 5.0}
    encode = gateway.chatty.tokenizer.encode

    def different(penalty: float) -> int:
        answer = text(client, temperature=0, logit_bias=likely, **{name: penalty})
        return len(set(encode(answer, add_special_tokens=False)))

    assert different(2) > different(-2)
    assert getattr(gateway.chatty.calls[0].params, name) == 2.0


def test_a_logit_bias_forces_a_token(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    forced = gateway.chatty.tokenizer.decode([BIASED])
    assert text(client, logit_bias={str(BIASED): 100}, max_tokens=3) == forced * 3


# Several choices


def test_n_choices_have_the_right_indices(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    whole = chat(client, n=3, seed=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.completion_tokens == 36
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, seed=1, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == {choice.index: choice.message.content for choice in whole.choices}


def test_every_form_of_a_prompt_is_taken(gateway: Gateway, client: openai.OpenAI) -> None:
    encode = gateway.chatty.tokenizer.encode
    forms = ["the sea", ["the sea", "the ship"], [5, 6, 7], [[5, 6], [7]]]
    seen = [[encode("the sea")], [encode("the sea"), encode("the ship")], [[5, 6, 7]], [[5, 6], [7]]]
    for form, prompts in zip(forms, seen, strict=True):
        gateway.chatty.calls.clear()
        answer = client.completions.create(model=MODEL, prompt=form, n=2, max_tokens=20)
        assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
        assert sorted(call.prompt for call in gateway.chatty.calls) == sorted(prompts * 2)


@pytest.mark.parametrize("prompt", ["mixed", [], [5, "a"], [[5], 6], [-1], [10**6], [[2**40]], [5.5], [[]], 3])
def test_a_wrong_prompt_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    prompt = ["a", 5] if prompt == "mixed" else prompt
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param.startswith("prompt")


# Log-probabilities


@pytest.mark.parametrize("top", [None, 0, 3])
def test_chat_logprobs_with_and_without_alternatives_whole_and_streamed(
    gateway: Gateway, client: openai.OpenAI, top: int | None
) -> None:
    gateway.chatty.samples()
    fields = {"logprobs": True, "seed": 3} | ({} if top is None else {"top_logprobs": top})
    choice = chat(client, **fields).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 12
    whole = bytes(byte for entry in entries for byte in entry.bytes)
    assert whole.decode(errors="replace") == choice.message.content
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == (top or 0)
        assert all(other.logprob <= entry.top_logprobs[0].logprob for other in entry.top_logprobs)
    streamed = [
        entry
        for chunk in chat(client, **fields, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    assert chat(client).choices[0].logprobs is None


def test_completion_logprobs_have_the_older_shape(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.chatty.samples()
    bias = {str(token): -100 for token in range(96, len(gateway.chatty.tokenizer))}  # plain characters only

    def ask(**fields: Any) -> Any:
        return client.completions.create(
            model=MODEL, prompt="hi", max_tokens=5, seed=1, logit_bias=bias, top_p=0.3, **fields
        )

    choice = ask(logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert math.isclose(top[token], logprob)
        assert len(top) in (2, 3)
    streamed = list(ask(logprobs=2, stream=True))
    assert [name for chunk in streamed for name in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens
    assert ask(logprobs=0).choices[0].logprobs.top_logprobs is None
    assert ask().choices[0].logprobs is None


def test_logprobs_cover_exactly_the_text_that_is_shown(gateway: Gateway, client: openai.OpenAI) -> None:
    tokenizer = gateway.chatty.tokenizer
    letters = [token for letter in "hello world" for token in tokenizer.encode(letter, add_special_tokens=False)]
    gateway.chatty.does(*letters, 1)
    for stop, left in (("lo w", "hel"), ("o", "hell"), (None, "hello world")):
        for stream in (False, True):
            answer = chat(client, logprobs=True, stop=stop, stream=stream)
            reports = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
            assert "".join(entry.token for report in reports if report for entry in report.content) == left


# What is accepted and left alone


def test_unknown_fields_are_accepted_and_listed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=HI,
        user="someone",
        metadata={"a": "b"},
        store=True,
        extra_body={"top_k": 40, "böse\r\nx-evil": 1, "nothing": None},
    )
    assert sorted(answer.headers["x-shoal-ignored"].split(", ")) == ["?", "metadata", "store", "top_k", "user"]
    assert "x-evil" not in answer.headers
    assert answer.parse().choices[0].message.content == "hello world"
    assert "x-shoal-ignored" not in client.chat.completions.with_raw_response.create(model=MODEL, messages=HI).headers


def test_an_explicit_null_is_the_same_as_an_absent_field(gateway: Gateway, client: openai.OpenAI) -> None:
    # fmt: off
    names = [
        "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature",
        "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias",
        "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "functions",
        "modalities", "user",
    ]
    # fmt: on
    fields = {"model": MODEL, "messages": [{"role": "user", "content": "hi", "name": None}]}
    with gateway.http() as raw:
        answer = raw.post("/v1/chat/completions", json=fields | dict.fromkeys(names))
    assert answer.status_code == 200
    client.chat.completions.create(model=MODEL, messages=HI)
    with_nulls, without = gateway.chatty.calls
    assert (with_nulls.prompt, with_nulls.params, with_nulls.max_tokens) == (
        without.prompt,
        without.params,
        without.max_tokens,
    )
    names = ["suffix", "echo", "best_of", "logprobs", "n", "stop", "seed", "max_tokens", "ignore_eos", "stream"]
    with gateway.http() as raw:
        answer = raw.post("/v1/completions", json={"model": MODEL, "prompt": "hi"} | dict.fromkeys(names))
    assert answer.status_code == 200


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "x"), ("best_of", 4)])
def test_what_would_change_the_answer_and_is_not_offered_is_refused(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="hi", **{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


# Messages


def test_content_may_be_a_list_of_text_parts(gateway: Gateway, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the sea"}, {"type": "text", "text": "the ship"}]
    chat(client, messages=[{"role": "user", "content": parts}])
    assert "<user>the sea\nthe ship\n" in gateway.chatty.tokenizer.decode(gateway.chatty.calls[0].prompt)


def test_an_image_is_refused_by_name(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError, match="image_url") as caught:
        chat(client, messages=[{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}])
    assert caught.value.param == "messages[0].content[1]"


def test_every_role_reaches_the_template(gateway: Gateway, client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat(
        client,
        messages=[
            {"role": "system", "content": "a"},
            {"role": "developer", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
    )
    prompt = gateway.chatty.tokenizer.decode(gateway.chatty.calls[0].prompt)
    # A template that knows no developer gets its older name, one that knows no tools gets their text.
    assert "<system>a\n<system>b\n<user>c\n" in prompt
    assert '<assistant><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n' in prompt
    assert "<user><tool_response>\nd\n</tool_response>\n<assistant>" in prompt


def test_a_model_without_a_template_points_to_completions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/completions") as caught:
        chat(client, model="plain")
    assert caught.value.code == "chat_template_missing"
