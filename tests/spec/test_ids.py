"""Ranges of blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.spec.ids import BlockRange

ranges = st.tuples(st.integers(0, 40), st.integers(1, 40)).map(lambda pair: BlockRange(pair[0], sum(pair)))


@given(ranges)
def test_a_range_is_read_as_it_is_written(blocks: BlockRange) -> None:
    assert BlockRange.parse(str(blocks)) == blocks
    assert len(blocks) == blocks.end - blocks.start


@given(ranges, ranges)
def test_a_range_lies_in_another_when_all_its_blocks_do(inner: BlockRange, outer: BlockRange) -> None:
    assert (inner in outer) == all(block in outer for block in range(inner.start, inner.end))


@given(ranges, st.integers(-5, 90))
def test_a_block_lies_in_a_range_from_start_to_before_end(blocks: BlockRange, block: int) -> None:
    assert (block in blocks) == (block in range(blocks.start, blocks.end))


@pytest.mark.parametrize("text", ["", "4", "4:", ":4", "4:4", "8:4", "-1:4", "1:2:3", "0x1:2", "1.0:2", "1:9999999"])
def test_what_is_no_range_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        BlockRange.parse(text)
    assert "0:12" in caught.value.hint
