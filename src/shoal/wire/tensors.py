"""How activations travel: raw float32, raw bfloat16, or blockwise int8. Everything here is numpy on [rows, width].

numpy has no bfloat16, so bfloat16 arrays are uint16 arrays of the same bits (torch: `tensor.view(torch.uint16)`).

The int8 format cuts every row into blocks of 64 values (the last may be shorter); each block has one float32 scale,
max|x| / 127, and its values are rint(x / scale). A row is its scales [blocks] float32, then its values [width] int8:
in every format a row is one run of bytes, so rows of many sessions are cut apart and joined without being decoded
(wire/rows.py). The largest error of a value is half a scale, i.e. 0.4 % of the largest value in its block.

Values that are not finite, or beyond MAX_ABS, are refused on both sides (NotFinite): no format here could carry them
on without harm, and the step that made them is already wrong.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.errors import NotFinite, ProtocolError
from shoal.wire.messages import Tensor, WireType

BLOCK = 64
MAX_ABS = 3.0e38
"""Below float32's 3.4e38, so that neither rounding to bfloat16 nor -128 * scale can overflow."""
_MAX_SCALE = np.float32(MAX_ABS / 127)
_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Blocks with a smaller scale are sent as zeros: 1 / scale would overflow, and the error is below 2e-36."""

F32: TypeAlias = npt.NDArray[np.float32]
U16: TypeAlias = npt.NDArray[np.uint16]
Body: TypeAlias = bytes | bytearray | memoryview


def body_bytes(tensor: Tensor) -> int:
    """Exact size of the body that `tensor` describes."""
    return tensor.rows * row_bytes(tensor.dtype, tensor.width)


def row_bytes(dtype: WireType, width: int) -> int:
    """Bytes of one row of `width` values."""
    if dtype == "int8":
        return width + 4 * _blocks(width)
    return width * (4 if dtype == "f32" else 2)


def encode(array: F32 | U16, dtype: WireType) -> tuple[Tensor, list[memoryview]]:
    """Describe and pack `array` [rows, width], float32 or the uint16 bits of bfloat16.

    The buffers share memory with `array` where no conversion is needed; they are little-endian. Raises NotFinite.
    """
    if array.ndim != 2:
        raise ValueError(f"activations must be [rows, width], not {array.shape}")
    rows, width = array.shape
    tensor = Tensor(dtype, rows, width)
    if array.dtype == np.uint16 and dtype == "bf16":
        bits = np.ascontiguousarray(array, dtype="<u2")
        _require_finite_bits(bits)
        return tensor, _buffers(bits)
    values = f32_from_bf16(array) if array.dtype == np.uint16 else np.ascontiguousarray(array, dtype="<f4")
    _require_finite(values)
    if dtype == "f32":
        return tensor, _buffers(values)
    if dtype == "bf16":
        return tensor, _buffers(bf16_from_f32(values))
    return tensor, _buffers(_quantize(values))


def decode(tensor: Tensor, body: Body) -> F32:
    """The activations as float32 [rows, width]; for "f32" a view of `body`. Raises ProtocolError, NotFinite."""
    _require_size(tensor, body)
    shape = tensor.rows, tensor.width
    if tensor.dtype == "bf16":
        return f32_from_bf16(decode_bf16(tensor, body))
    if tensor.dtype == "int8":
        return _dequantize(tensor, body)
    values = np.frombuffer(body, "<f4").reshape(shape)
    _require_finite(values)
    return values


def decode_native(tensor: Tensor, body: Body) -> F32 | U16:
    """Without widening: the bits of a "bf16" tensor, float32 for the other formats. Raises ProtocolError, NotFinite."""
    return decode_bf16(tensor, body) if tensor.dtype == "bf16" else decode(tensor, body)


def decode_bf16(tensor: Tensor, body: Body) -> U16:
    """The bits of a "bf16" tensor, uint16 [rows, width], as a view of `body`. Raises ProtocolError, NotFinite."""
    if tensor.dtype != "bf16":
        raise ValueError(f"the tensor travels as {tensor.dtype}, not bf16")
    _require_size(tensor, body)
    bits = np.frombuffer(body, "<u2").reshape(tensor.rows, tensor.width)
    _require_finite_bits(bits)
    return bits


def bf16_from_f32(values: F32) -> U16:
    """Round to the nearest bfloat16, ties to even. Finite values only: a NaN may come out as zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


def f32_from_bf16(bits: npt.NDArray[Any]) -> F32:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def relative_error(original: F32, restored: F32) -> float:
    """||original - restored|| / ||original|| over all values, in float64; 0.0 when both are zero."""
    difference = float(np.linalg.norm((original.astype(np.float64) - restored).ravel()))
    size = float(np.linalg.norm(original.astype(np.float64).ravel()))
    return difference / size if size else (0.0 if difference == 0.0 else float("inf"))


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _quantize(values: F32) -> npt.NDArray[np.uint8]:
    """[rows, width] float32 -> [rows, row_bytes]."""
    rows, width = values.shape
    blocks = _as_blocks(values)
    scales: F32 = np.abs(blocks).max(axis=2)
    scales /= np.float32(127)
    scales[scales < _SMALLEST_SCALE] = 0
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = blocks * inverse[:, :, None]
    np.rint(scaled, out=scaled)
    quantized = scaled.astype(np.int8).reshape(rows, scaled.shape[1] * BLOCK)
    packed = np.empty((rows, row_bytes("int8", width)), np.uint8)
    packed[:, : 4 * scales.shape[1]] = scales.astype("<f4").view(np.uint8)
    packed[:, 4 * scales.shape[1] :] = quantized[:, :width].view(np.uint8)
    return packed


def _dequantize(tensor: Tensor, body: Body) -> F32:
    rows, width, blocks = tensor.rows, tensor.width, _blocks(tensor.width)
    packed = np.frombuffer(body, np.uint8).reshape(rows, row_bytes("int8", width))
    scales = np.ascontiguousarray(packed[:, : 4 * blocks]).view("<f4").reshape(rows, blocks, 1)
    if not np.all((scales >= 0) & (scales <= _MAX_SCALE)):
        raise NotFinite("The peer sent int8 activations with a scale that is negative, too large or not a number.")
    quantized = packed[:, 4 * blocks :].view(np.int8)
    values = _as_blocks(quantized.astype(np.float32))
    values *= scales
    return np.ascontiguousarray(values.reshape(rows, blocks * BLOCK)[:, :width])


def _as_blocks(values: F32) -> F32:
    """[rows, width] -> [rows, blocks, BLOCK]; a short last block is filled with zeros, which change no maximum of
    absolute values."""
    rows, width = values.shape
    if width % BLOCK:
        padded = np.zeros((rows, _blocks(width) * BLOCK), np.float32)
        padded[:, :width] = values
        values = padded
    return values.reshape(rows, _blocks(width), BLOCK)


def _buffers(*arrays: npt.NDArray[Any]) -> list[memoryview]:
    return [array.reshape(-1).view(np.uint8).data for array in arrays if array.size]


def _require_size(tensor: Tensor, body: Body) -> None:
    size = len(memoryview(body).cast("B"))
    if size != body_bytes(tensor):
        raise ProtocolError(f"A body of {size} bytes came for a tensor that takes {body_bytes(tensor)}.")


def _require_finite(values: F32) -> None:
    # Two reductions without a temporary; max and min are NaN as soon as one value is.
    if values.size and not (values.max() <= MAX_ABS and values.min() >= -MAX_ABS):
        raise _not_finite()


def _require_finite_bits(bits: U16) -> None:
    # Sign dropped, the order of bfloat16 bits is the order of their values, with infinities and NaN on top.
    if bits.size and int((bits & np.uint16(0x7FFF)).max()) > _MAX_ABS_BITS:
        raise _not_finite()


_MAX_ABS_BITS = int(bf16_from_f32(np.array([MAX_ABS], np.float32))[0])


def _not_finite() -> NotFinite:
    return NotFinite(
        f"Activations hold NaN, infinite values or values above {MAX_ABS:g}.",
        hint="The model computed them: try float32, and check that its weights are intact.",
    )
