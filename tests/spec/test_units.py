"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.spec.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20GiB", 20 * 1024**3),
        ("20GB", 20 * 10**9),
        ("800 mb", 800 * 10**6),
        ("1.5KiB", 1536),
        (" 7 ", 7),
        ("7b", 7),
        ("2TiB", 2 << 40),
    ],
)
def test_a_size_is_read_with_its_unit_binary_and_decimal_apart(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "12 parsecs", "1.GiB", "1 GiB extra", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="size") as caught:
        parse_bytes(text)
    assert "20GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1610612736, "1.5 GiB"), (-2048, "-2.0 KiB")],
)
def test_a_size_is_shown_in_the_largest_unit_that_leaves_a_whole_one(count: int, text: str) -> None:
    assert show_bytes(count) == text


@given(st.integers(0, 1 << 50))
def test_a_shown_size_can_be_read_again_and_is_right_to_a_twentieth(count: int) -> None:
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=0.05)
