"""What clients of OpenAI's API rely on, checked with the real `openai` package: streams, and how they end."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable

import httpx
import openai
import pytest
from support.gateway import PATIENCE_S, Call, Gateway, Hold, Step, eventually

from shoal.errors import SwarmIncomplete
from shoal.gateway.limits import Limits

HI = [{"role": "user", "content": "hi"}]
MODEL = "org/chatty:1b"


def lines(gateway: Gateway, path: str = "/v1/chat/completions", **fields: object) -> list[str]:
    """The lines of a streamed answer as they are on the wire, empty ones left out."""
    body = {"model": MODEL, "stream": True, **fields}
    with gateway.http() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200
    return [line for line in answer.text.split("\n") if line]


def test_the_first_delta_has_the_role_and_later_ones_only_content(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == "hello world"


def test_id_created_and_model_are_constant_over_all_chunks(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].model == MODEL


@pytest.mark.parametrize(("max_tokens", "reason"), [(50, "stop"), (2, "length")])
def test_finish_reason_is_null_until_the_last_chunk(client: openai.OpenAI, max_tokens: int, reason: str) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, max_tokens=max_tokens, stream=True))
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [reason]


def test_every_token_is_one_chunk(gateway: Gateway, client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model=MODEL, prompt="hi", max_tokens=9, stream=True, extra_body={"ignore_eos": True})
    )
    assert len(chunks) == 9
    assert gateway.chatty.calls[0].ignore_eos


def test_done_comes_last(gateway: Gateway) -> None:
    assert lines(gateway, messages=HI)[-1] == "data: [DONE]"


def test_include_usage_adds_one_chunk_without_choices(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}, max_tokens=2
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2


def test_without_include_usage_no_chunk_is_without_choices_or_speaks_of_usage(gateway: Gateway) -> None:
    for line in lines(gateway, messages=HI)[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        assert chunk["choices"]
        assert "usage" not in chunk


def test_usage_adds_up_and_has_the_detail_of_cached_tokens(gateway: Gateway, client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(model=MODEL, messages=HI).usage
    assert usage.prompt_tokens == len(gateway.chatty.calls[0].prompt)
    # The end token was generated as well.
    assert usage.completion_tokens == len(gateway.chatty.tokenizer.encode("hello world", add_special_tokens=False)) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("place", ["after the admission", "between tokens"])
def test_a_waiting_stream_says_so_and_the_package_reads_over_it(gateway: Gateway, place: str) -> None:
    hold = Hold()
    gateway.chatty.does(*([None, hold, 40, 41, 1] if place == "after the admission" else [40, hold, 41, 1]))
    body = {"model": MODEL, "messages": HI, "stream": True}
    seen = []
    with gateway.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            seen.append(line)
            if seen.count(": ping") == 2:
                hold.release.set()
    assert seen.count(": ping") >= 2
    hold = Hold()
    gateway.chatty.does(40, hold, 41, 1)
    with gateway.client() as openai_client:
        stream = openai_client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            hold.release.set()
    assert text == gateway.chatty.tokenizer.decode([40, 41])


def test_a_stream_waits_at_most_fifteen_seconds_between_two_signs_of_life() -> None:
    assert Limits().ping_s <= 15


def test_a_chain_lost_for_good_is_an_error_in_the_stream_and_not_its_end(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.chatty.does(40, 41, SwarmIncomplete("Blocks 4 to 7 were lost and nobody else hosts them."))
    seen = []
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="Blocks 4 to 7 were lost") as caught:
        seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(seen) == gateway.chatty.tokenizer.decode([40, 41])
    assert caught.value.code == "swarm_incomplete"
    last = lines(gateway, messages=HI)[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize("end", [[], [RuntimeError("srv12")]])
def test_a_fault_of_ours_in_a_stream_is_an_error_too(
    gateway: Gateway, client: openai.OpenAI, end: list[Exception]
) -> None:
    # [] : the generator just ends, with no end token and short of the asked length.
    gateway.chatty.does(40, 41, *end)
    with pytest.raises(openai.APIError, match="failed inside the swarm"):
        list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=HI)


def test_a_stream_that_stalls_while_a_server_is_replaced_goes_on_with_the_same_words(gateway: Gateway) -> None:
    reference = lines(gateway, messages=HI)
    tokens = gateway.chatty.tokenizer.encode("hello world", add_special_tokens=False)
    hold = Hold()
    gateway.chatty.does(tokens[0], hold, *tokens[1:], 1)
    body = {"model": MODEL, "messages": HI, "stream": True}
    with gateway.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        seen = []
        for line in filter(None, answer.iter_lines()):
            seen.append(line)
            if line == ": ping":
                hold.release.set()

    def texts(of: list[str]) -> list[object]:
        chunks = [json.loads(line.removeprefix("data: ")) for line in of[:-1] if line != ": ping"]
        return [chunk["choices"] for chunk in chunks]

    assert ": ping" in seen
    assert texts(seen) == texts(reference)


def endless(call: Call) -> itertools.repeat[Step]:
    return itertools.repeat(40)


def test_a_client_that_leaves_a_stream_frees_its_session(
    gateway: Gateway, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hold = Hold()
    gateway.chatty.does(40, hold, 41, 1)
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        next(iter(stream))
        assert hold.reached.wait(PATIENCE_S)
    (call,) = gateway.chatty.calls
    assert call.closed.wait(PATIENCE_S)
    assert call.steps_done == 1  # not one step more than before it left
    assert eventually(lambda: "POST /v1/chat/completions 200" in caplog.text)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_session(gateway: Gateway, stream: bool) -> None:
    hold = Hold()
    gateway.chatty.does(hold, 40, 1)

    async def leave() -> None:
        async with gateway.async_client() as client:
            create = client.chat.completions.create(model=MODEL, messages=HI, stream=stream, n=2)
            asking = asyncio.create_task(create)
            await asyncio.to_thread(hold.reached.wait, PATIENCE_S)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert eventually(lambda: len(gateway.chatty.calls) == 2)
    assert all(call.closed.wait(PATIENCE_S) for call in gateway.chatty.calls)
    assert [call.steps_done for call in gateway.chatty.calls] == [0, 0]


def test_a_character_split_over_tokens_never_shows_as_a_broken_one(gateway: Gateway, client: openai.OpenAI) -> None:
    text = "naïve €5 😀 鯨 and more"
    assert len(gateway.chatty.tokenizer.encode(text)) > len(text)  # characters are split indeed
    gateway.chatty.says(text)
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    for tokens in range(1, 30):
        cut = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=tokens).choices[0].message.content
        assert "�" not in cut
        assert text.startswith(cut)


def test_proxies_are_told_not_to_buffer_or_keep_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=HI, stream=True) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_headers_leave_only_after_every_choice_is_admitted(gateway: Gateway) -> None:
    first, second = Hold(), Hold()
    holds = iter([first, second])
    gateway.chatty.script = lambda call: [next(holds), 40, 1]

    async def ask() -> None:
        async with gateway.async_client() as client:
            asking = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HI, stream=True, n=2))
            await asyncio.to_thread(second.reached.wait, PATIENCE_S)
            first.release.set()
            await asyncio.to_thread(eventually, lambda: any(call.steps_done for call in gateway.chatty.calls))
            assert not asking.done()
            second.release.set()
            chunks = [chunk async for chunk in await asking]
        assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason) == [0, 1]

    asyncio.run(ask())


def test_one_refused_choice_refuses_the_request_and_frees_the_others(gateway: Gateway, client: openai.OpenAI) -> None:
    scripts = iter([endless, lambda call: [SwarmIncomplete("gone")]])
    gateway.chatty.script = lambda call: next(scripts)(call)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, stream=True, n=2)
    assert caught.value.status_code == 503
    assert all(call.closed.wait(PATIENCE_S) for call in gateway.chatty.calls)


def test_forty_streams_at_once_do_not_mix_up(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits())
    gateway.chatty.script = lambda call: [*call.prompt[-40:], 1]
    prompts = [[2 + (start * 7 + place) % 80 for place in range(40)] for start in range(40)]

    async def ask(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=60, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with gateway.async_client() as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    answers = asyncio.run(ask_all())
    alone = [gateway.chatty.tokenizer.decode(prompt) for prompt in prompts]
    assert answers == alone


def test_a_slow_reader_gets_the_whole_answer(gateway: Gateway) -> None:
    gateway.chatty.script = lambda call: [*itertools.repeat(40, call.max_tokens)]
    body = {"model": MODEL, "messages": HI, "stream": True, "max_tokens": 480, "n": 8}
    with gateway.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert eventually(lambda: all(call.closed.is_set() for call in gateway.chatty.calls))
        whole = answer.read().decode()
    assert whole.count('"finish_reason":"length"') == 8
    assert whole.endswith("data: [DONE]\n\n")


def test_a_client_that_asks_to_close_the_connection_is_answered_first(gateway: Gateway) -> None:
    headers = {"authorization": f"Bearer {gateway.key}", "connection": "close"}
    answer = httpx.post(
        f"{gateway.listening.url}/v1/completions",
        json={"model": "plain", "prompt": "hi"},
        headers=headers,
        trust_env=False,
    )
    assert answer.json()["choices"][0]["text"] == "hello world"
