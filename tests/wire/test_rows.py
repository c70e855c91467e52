"""Rows cut from frames and joined to frames keep their bytes, in every wire format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolError
from shoal.wire import rows, tensors
from shoal.wire.messages import StepItem, Tensor, WireType
from shoal.wire.rows import Rows

WIDTH = 70
"""No multiple of the int8 format's 64."""
FORMATS: tuple[WireType, ...] = ("f32", "bf16", "int8")


def frame(count: int, kind: WireType) -> tuple[np.ndarray, Tensor, bytes]:
    """Values as they arrive [count, WIDTH], and the frame that carries them."""
    values = np.random.default_rng(count).standard_normal((count, WIDTH), dtype=np.float32)
    tensor, buffers = tensors.encode(values, kind)
    body = b"".join(buffers)
    return tensors.decode(tensor, body), tensor, body


def items(counts: list[int]) -> list[StepItem]:
    return [StepItem(bytes([number]) * 16, 0, count) for number, count in enumerate(counts)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from(FORMATS))
def test_a_frame_that_is_cut_and_joined_is_the_same_frame(counts: list[int], kind: WireType) -> None:
    values, tensor, body = frame(sum(counts), kind)
    parts = rows.cut(items(counts), tensor, body)
    at = 0
    for item, part in parts:
        np.testing.assert_array_equal(tensors.decode(part.tensor, part.data), values[at : at + item.rows])
        at += item.rows
    joined, buffers = rows.join([part for _, part in parts])
    assert joined == tensor
    assert b"".join(buffers) == body


@given(st.integers(1, 12), st.slices(12), st.sampled_from(FORMATS))
def test_rows_are_sliced_as_python_slices(count: int, part: slice, kind: WireType) -> None:
    values, _, body = frame(count, kind)
    whole = Rows(kind, WIDTH, count, body)
    if part.indices(count)[2] != 1:
        with pytest.raises(ValueError, match="steps of one"):
            whole[part]
        return
    sliced = whole[part]
    assert sliced.count == len(range(count)[part])
    np.testing.assert_array_equal(tensors.decode(sliced.tensor, sliced.data), values[part])


def test_a_copy_does_not_keep_the_frame_it_came_in() -> None:
    body = bytearray(frame(4, "f32")[2])
    part = Rows("f32", WIDTH, 4, memoryview(body))[1:2]
    copy = part.copy()
    before = bytes(part.data)
    body[:] = bytes(len(body))
    assert copy.data == before
    assert (copy.dtype, copy.width, copy.count) == ("f32", WIDTH, 1)


@pytest.mark.parametrize("counts", [[1], [2, 2], []])
def test_items_that_do_not_add_up_to_the_tensor_are_refused(counts: list[int]) -> None:
    _, tensor, body = frame(3, "f32")
    with pytest.raises(ProtocolError, match="tensor 3"):
        rows.cut(items(counts), tensor, body)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_body_of_another_size_than_the_tensor_takes_is_refused(change: int) -> None:
    _, tensor, body = frame(3, "int8")
    with pytest.raises(ProtocolError, match="body of"):
        rows.cut(items([3]), tensor, bytes(len(body) + change))


@pytest.mark.parametrize("other", [Rows("bf16", WIDTH, 1, bytes(2 * WIDTH)), Rows("f32", 4, 1, bytes(16))])
def test_only_rows_of_one_format_and_width_are_joined(other: Rows) -> None:
    with pytest.raises(ValueError, match="one format"):
        rows.join([Rows("f32", WIDTH, 1, bytes(4 * WIDTH)), other])
