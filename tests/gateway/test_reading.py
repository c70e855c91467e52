"""An answer is taken apart as it comes, however its text is cut into pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gateway.calls import DESCRIBED, CallFormat, Tags
from shoal.gateway.reading import AnswerReader, CallPart, Read

LLAMA = CallFormat('{"name": "', '", "parameters": ', None, ("}",))
MISTRAL = CallFormat(
    '[TOOL_CALLS] [{"name": "', '", "arguments": ', (', "id": "', '"}, {"name": "'), (', "id": "', '"}]')
)
THINK = Tags("<think>", "</think>")


def taken_apart(text: str, cuts: random.Random | None = None, **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, calls. `cuts` None: letter by letter."""
    reader = AnswerReader(options.pop("stops", ()), **options)
    parts: list[Read] = []
    while text:
        length = cuts.randint(1, 9) if cuts else 1
        parts.append(reader.push(text[:length]))
        text = text[length:]
        if parts[-1].stopped:
            break
    else:
        parts.append(reader.flush())
    calls: dict[int, list[str]] = {}
    for part in (call for read in parts for call in read.calls):
        if part.name is not None:
            assert part.index not in calls
            assert part.id is not None
            calls[part.index] = [part.name, ""]
        calls[part.index][1] += part.arguments
    assert list(calls) == list(range(len(calls)))
    content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
    return content, reasoning, [(name, arguments) for name, arguments in calls.values()]


def written(form: CallFormat, *calls: tuple[str, str]) -> str:
    return (
        form.opening
        + "Abcdefgh9".join(form.between or ("",)).join(f"{name}{form.middle}{arguments}" for name, arguments in calls)
        + "Abcdefgh9".join(form.closing)
    )


TRICKY = json.dumps({"a": '}{"] \\" </tool_call>', "b": [{"c": []}], "d": "<tool_call>"})


@pytest.mark.parametrize("form", [DESCRIBED, MISTRAL])
@given(seed=st.integers(0, 2**32))
def test_text_and_calls_are_told_apart_wherever_the_pieces_are_cut(form: CallFormat, seed: int) -> None:
    calls = [("weather", TRICKY), ("time", "{}")]
    text = "Let me look. < [TOOL\n\n" + written(form, *calls)
    assert taken_apart(text, random.Random(seed), calls=form) == ("Let me look. < [TOOL", "", calls)


@given(st.text(alphabet='<tool_cal>{}" \n', max_size=40))
def test_text_without_a_call_comes_out_as_it_went_in(text: str) -> None:
    if "<tool_call>" not in text:
        assert taken_apart(text, calls=DESCRIBED) == (text, "", [])


def test_a_call_without_a_marker_is_one_from_its_first_letter_on_or_none() -> None:
    call = written(LLAMA, ("weather", TRICKY))
    assert taken_apart(call, calls=LLAMA) == ("", "", [("weather", TRICKY)])
    assert taken_apart("I say " + call, calls=LLAMA) == ("I say " + call, "", [])
    assert taken_apart('{"nam', calls=LLAMA) == ('{"nam', "", [])


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = AnswerReader(calls=DESCRIBED)
    assert reader.push(DESCRIBED.opening).calls == []
    (first, second) = reader.push('f", "arguments": {"a').calls
    assert (first.name, first.arguments, second) == ("f", "", CallPart(0, arguments='{"a'))
    assert reader.push('": 1').calls == [CallPart(0, arguments='": 1')]
    assert not reader.called
    assert reader.push("}").calls == [CallPart(0, arguments="}")]
    assert reader.called


def test_a_cut_call_shows_what_there_is() -> None:
    whole = written(DESCRIBED, ("f", '{"a": "b"}'))
    for length in range(len(whole)):
        content, _, calls = taken_apart(whole[:length], calls=DESCRIBED)
        if length >= len("<tool_call>"):
            assert content == ""
        assert not calls or (calls[0][0] == "f" and '{"a": "b"}'.startswith(calls[0][1]))


@given(seed=st.integers(0, 2**32))
def test_reasoning_is_split_off(seed: int) -> None:
    cuts = random.Random(seed)
    for opened in (True, False):
        text = "" if opened else "<think>"
        text += "\nfirst </ thin\nthen\n</think>\n\nso <think> it is"
        found = taken_apart(text, cuts, tags=THINK, reasoning=opened)
        assert found == ("so <think> it is", "first </ thin\nthen", [])


def test_an_answer_that_does_not_reason_is_content() -> None:
    assert taken_apart("<thin air> </think>", tags=THINK) == ("<thin air> </think>", "", [])
    assert taken_apart("thoughts without end", tags=THINK, reasoning=True) == ("", "thoughts without end", [])


def test_reasoning_about_calls_is_no_call() -> None:
    call = written(DESCRIBED, ("f", "{}"))
    text = f"<think>I could write {call}.</think>{call}"
    assert taken_apart(text, tags=THINK, calls=DESCRIBED) == ("", f"I could write {call}.", [("f", "{}")])


def test_a_stop_string_cuts_content_and_nothing_else() -> None:
    call = written(DESCRIBED, ("f", '{"a": "STOP"}'))
    assert taken_apart("go STOP" + call, calls=DESCRIBED, stops=["STOP"]) == ("go ", "", [])
    assert taken_apart("go ST" + call, calls=DESCRIBED, stops=["STOP", "\n"]) == ("go ST", "", [("f", '{"a": "STOP"}')])
    text = "<think>STOP</think>go STOP on"
    assert taken_apart(text, tags=THINK, stops=["STOP"]) == ("go ", "STOP", [])


@given(st.text(alphabet='<tool_cal>{"nm: STOP', max_size=60), st.integers(0, 2**32))
def test_everything_is_settled_in_the_end_or_up_to_the_stop(text: str, seed: int) -> None:
    cuts = random.Random(seed)
    reader = AnswerReader(["STOP"], calls=DESCRIBED)
    rest, pushed, before = text, 0, 0
    while rest:
        length = cuts.randint(1, 5)
        read = reader.push(rest[:length])
        pushed += len(rest[:length])
        rest = rest[length:]
        assert before <= read.settled <= pushed
        before = read.settled
        if read.stopped:
            assert text[read.settled :].startswith("STOP")
            return
    read = reader.flush()
    assert read.stopped or read.settled == len(text)
