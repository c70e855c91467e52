"""Activation formats: exact where they promise it, bounded errors where not, and no number that is not one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import NotFinite, ProtocolError
from shoal.wire import tensors
from shoal.wire.messages import Tensor, WireType

FORMATS: tuple[WireType, ...] = ("f32", "bf16", "int8")
LARGEST = float(np.float32(tensors.MAX_ABS))
arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 5), st.integers(1, 200)),
    elements=st.floats(-LARGEST, LARGEST, width=32) | st.floats(-10, 10, width=32),
)


def trip(values: np.ndarray, dtype: WireType) -> np.ndarray:
    tensor, buffers = tensors.encode(values, dtype)
    body = b"".join(buffers)
    assert (tensor.rows, tensor.width) == values.shape
    assert len(body) == tensors.body_bytes(tensor)
    return tensors.decode(tensor, body)


@given(arrays)
def test_f32_is_exact(values: np.ndarray) -> None:
    assert trip(values, "f32").tobytes() == values.tobytes()


@given(arrays)
def test_bf16_is_off_by_at_most_half_a_step(values: np.ndarray) -> None:
    restored = trip(values, "bf16")
    # 8 significant bits; below the normal range the step is fixed.
    assert np.all(np.abs(values.astype(np.float64) - restored) <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-134))


@given(arrays)
def test_int8_is_off_by_at_most_half_a_scale(values: np.ndarray) -> None:
    restored = trip(values, "int8")
    for start in range(0, values.shape[1], tensors.BLOCK):
        block = values[:, start : start + tensors.BLOCK].astype(np.float64)
        largest = np.abs(block).max(axis=1, initial=0.0, keepdims=True)
        # 1.001: the scale itself is rounded to float32. 2e-36: blocks below the smallest scale become zeros.
        allowed = 0.5 / 127 * largest * 1.001 + 2e-36
        assert np.all(np.abs(block - restored[:, start : start + tensors.BLOCK]) <= allowed)


def test_int8_keeps_an_outlier_inside_its_block() -> None:
    values = np.ones((1, 130), np.float32)
    values[0, 0] = 1e6
    restored = trip(values, "int8")
    assert np.all(restored[0, 64:] == 1)
    assert restored[0, 0] == pytest.approx(1e6)
    assert tensors.relative_error(values[:, 64:], restored[:, 64:]) == 0.0


def test_the_error_of_normal_values_is_what_the_protocol_says() -> None:
    values = np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32)
    errors = {dtype: tensors.relative_error(values, trip(values, dtype)) for dtype in FORMATS}
    assert errors["f32"] == 0.0
    assert 0.001 < errors["bf16"] < 0.002
    assert 0.005 < errors["int8"] < 0.007


def test_relative_error_of_zeros() -> None:
    zeros = np.zeros((1, 2), np.float32)
    assert tensors.relative_error(zeros, zeros) == 0.0
    assert tensors.relative_error(zeros, zeros + 1) == float("inf")


@given(st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7F80 != 0x7F80))
def test_every_finite_bf16_survives_float32_and_back(bits: int) -> None:
    array = np.array([[bits]], np.uint16)
    assert tensors.bf16_from_f32(tensors.f32_from_bf16(array)) == array


def test_bf16_rounds_to_the_nearest_and_ties_to_even() -> None:
    bits = np.array([0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF818000], np.uint32)
    assert tensors.bf16_from_f32(bits.view(np.float32)).tolist() == [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0xBF82]


def test_bf16_bits_travel_untouched() -> None:
    bits = np.arange(0x3F00, 0x3F80, dtype=np.uint16).reshape(2, 64)
    tensor, buffers = tensors.encode(bits, "bf16")
    body = b"".join(buffers)
    assert np.array_equal(tensors.decode_bf16(tensor, body), bits)
    assert np.array_equal(tensors.decode(tensor, body), tensors.f32_from_bf16(bits))
    assert np.array_equal(trip(bits, "f32"), tensors.f32_from_bf16(bits))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.2e38])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_number_that_is_not_one_is_not_sent(bad: float, dtype: WireType) -> None:
    values = np.ones((3, 70), np.float32)
    values[2, 69] = bad
    with pytest.raises(NotFinite, match="NaN, infinite"):
        tensors.encode(values, dtype)


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_a_number_that_is_not_one_is_not_accepted(bad: int) -> None:
    bits = np.full((1, 64), bad, np.uint16)
    with pytest.raises(NotFinite):
        tensors.encode(bits, "bf16")
    with pytest.raises(NotFinite):
        tensors.decode(Tensor("bf16", 1, 64), bits.tobytes())
    with pytest.raises(NotFinite):
        tensors.decode(Tensor("f32", 1, 64), tensors.f32_from_bf16(bits).tobytes())


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3.4e38])
def test_a_hostile_scale_is_not_accepted(scale: float) -> None:
    body = np.array([1.0, scale], np.float32).tobytes() + b"\x80" * 70
    with pytest.raises(NotFinite, match="scale"):
        tensors.decode(Tensor("int8", 1, 70), body)


def test_the_largest_scale_times_the_smallest_value_is_finite() -> None:
    values = trip(np.full((1, 64), tensors.MAX_ABS, np.float32), "int8")
    assert np.isfinite(values).all()
    body = np.array([3.0e38 / 127], np.float32).tobytes() + b"\x80" * 64
    assert np.isfinite(tensors.decode(Tensor("int8", 1, 64), body)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_body_of_another_size_is_refused_before_it_is_read(dtype: WireType) -> None:
    tensor = Tensor(dtype, 2, 70)
    for size in (0, tensors.body_bytes(tensor) - 1, tensors.body_bytes(tensor) + 1):
        with pytest.raises(ProtocolError, match=f"A body of {size} bytes"):
            tensors.decode(tensor, bytes(size))


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        tensors.encode(np.zeros(3, np.float32), "f32")
    with pytest.raises(ValueError, match="not bf16"):
        tensors.decode_bf16(Tensor("f32", 1, 1), bytes(4))


def test_a_view_with_strides_is_sent_row_by_row() -> None:
    values = np.arange(20, dtype=np.float32).reshape(4, 5)[::2, 1:3]
    assert np.array_equal(trip(values, "f32"), values)
