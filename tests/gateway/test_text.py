"""Tokens become text one at a time and give the same text as decoding them all at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gateway import byte_level_tokenizer
from support.tokenizers import spelled_out_tokenizer

from shoal.gateway.text import StopFilter, Vocabulary

BYTE_LEVEL = Vocabulary(byte_level_tokenizer())


SPELLED_OUT = Vocabulary(spelled_out_tokenizer())


def streamed(vocabulary: Vocabulary, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = vocabulary.stream(prompt)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.size - 1), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary_give_the_text_of_the_whole(tokens: list[int]) -> None:
    whole = BYTE_LEVEL.decode(tokens)
    text = "".join(streamed(BYTE_LEVEL, [], tokens))
    # Only an unfinished last character may be missing.
    assert whole in (text, text + "�")


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_without_broken_characters(text: str) -> None:
    for piece in streamed(BYTE_LEVEL, [], BYTE_LEVEL.encode(text, add_special_tokens=False)):
        assert "�" not in piece or "�" in text
    tokens = [3 + byte for byte in text.encode()]
    assert "".join(streamed(SPELLED_OUT, [1, 264], tokens)) == text


def test_a_leading_space_after_the_prompt_is_kept() -> None:
    the, sea = 261, 260
    assert SPELLED_OUT.decode([the, sea]) == "the sea"
    assert streamed(SPELLED_OUT, [1, the], [sea, the]) == [" sea", " the", ""]


def test_special_tokens_and_unknown_ids_are_no_text() -> None:
    for vocabulary in (BYTE_LEVEL, SPELLED_OUT):
        assert streamed(vocabulary, [], [1, 10**6, 1]) == ["", "", "", ""]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back() -> None:
    # A model with random weights writes these all the time.
    broken = 3 + 0xF0
    pieces = streamed(SPELLED_OUT, [], [broken] * 20 + [262])
    assert max(len(group) for group in _runs(pieces[:20])) < 4
    assert "".join(pieces) == "�" * 20 + "a"


def _runs(pieces: list[str]) -> list[list[str]]:
    """The stretches of empty pieces."""
    runs: list[list[str]] = [[]]
    for piece in pieces:
        if piece:
            runs.append([])
        else:
            runs[-1].append(piece)
    return runs


def test_the_window_stays_small_over_a_long_answer() -> None:
    rng = random.Random(5)
    seen = []

    class Counted(Vocabulary):
        def decode(self, tokens: list[int]) -> str:  # type: ignore[override]
            seen.append(len(tokens))
            return super().decode(tokens)

    stream = Counted(spelled_out_tokenizer()).stream([1])
    for _ in range(2000):
        stream.push(rng.randrange(3, 265))
    assert max(seen) <= 12


def test_the_bytes_of_a_token_are_those_of_its_text() -> None:
    for vocabulary in (BYTE_LEVEL, SPELLED_OUT):
        tokens = vocabulary.encode(" sea €", add_special_tokens=False)
        assert b"".join(map(vocabulary.token_bytes, tokens)).decode().lstrip() == "sea €"
        assert vocabulary.token_bytes(10**6) == b""


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@settings(max_examples=1000, deadline=None)
def test_stop_strings_cut_exactly_where_the_whole_text_has_the_first_one(pieces: list[str], stops: list[str]) -> None:
    whole, stop_filter, shown, stopped = "".join(pieces), StopFilter(stops), "", False
    for piece in pieces:
        text, stopped = stop_filter.push(piece)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += stop_filter.flush()
    # The first piece that completes a stop string decides, so a longer one that began earlier can still be open.
    cuts = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert stopped == bool(cuts)
    if not cuts:
        assert shown == whole
    else:
        assert whole.startswith(shown)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_only_the_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(text) for text in ("so E", "N", "d E", "ND!")] == [
        ("so ", False),
        ("", False),
        ("ENd ", False),
        ("", True),
    ]


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_text_without_a_stop_string_passes_whole(stops: list[str]) -> None:
    assert StopFilter(stops).push("hello") == ("hello", False)


def test_a_special_token_without_a_name_of_its_own_is_no_text_either() -> None:
    vocabulary = Vocabulary(byte_level_tokenizer(special=["[CALLS]"]))
    marked = vocabulary.encode("the[CALLS]sea", add_special_tokens=False)
    assert "".join(streamed(vocabulary, [], marked)) == "thesea"
    (mark,) = (token for token in marked if vocabulary.is_special(token))
    shown = vocabulary.byte_stream({mark})
    assert "".join([*(shown.push(token) for token in marked), shown.flush()]) == "the[CALLS]sea"


def test_the_text_of_bytes_is_that_of_the_tokens_but_for_a_first_space() -> None:
    for vocabulary in (BYTE_LEVEL, SPELLED_OUT):
        stream = vocabulary.byte_stream()
        tokens = vocabulary.encode("the sea, {ü}", add_special_tokens=False)
        assert "".join([*(stream.push(token) for token in tokens), stream.flush()]) == "the sea, {ü}"
