"""One value has one text, and no other text is taken for it."""

from __future__ import annotations

import pytest

from shoal.manifest.canonical import canonical, read_canonical


def test_keys_are_sorted_and_nothing_is_left_to_taste() -> None:
    value = {"b": [1, True, None, "é\n"], "a": {"z": -5, "y": ""}}
    text = '{"a":{"y":"","z":-5},"b":[1,true,null,"é\\n"]}'.encode()
    assert canonical(value) == text
    assert read_canonical(text) == value


@pytest.mark.parametrize("value", [1.0, float("nan"), 2**54, b"bytes", {1: 2}, [object()], {"a": [0.5]}])
def test_what_two_programs_may_write_differently_has_no_text(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b" 1", b"1 ", b"[1, 2]", b'{"b":1,"a":2}', b'{"a":1,"a":1}', b"1.0", b"1e3", b"-0", b"01", b"NaN"),
        *(
            b'"\\u00e9"',
            b'"\xe9"',
            b'"\\ud800"',
            b"\xef\xbb\xbf1",
            "1".encode("utf-16"),
            b"{}\n",
            b"[" * 100_000,
            b"9" * 5000,
        ),
    ],
)
def test_another_text_of_the_same_value_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_canonical(text)
