"""Encodes activations for the wire and keeps an eye on what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.wire import tensors
from shoal.wire.messages import WireType
from shoal.wire.rows import Rows

MEASURE_EVERY = 64
"""One encoding in this many is decoded again and compared: the error hardly changes from step to step."""


class Encoder:
    """Turns arrays into Rows. `error` is the relative error of a lately measured encoding, 0.0 while all are lossless.

    One thread uses it; others may read `error`.
    """

    def __init__(self) -> None:
        self.error = 0.0
        self._lossy = 0

    def encode(self, array: npt.NDArray[Any], wire: WireType) -> Rows:
        """`array` [rows, width], float32 or the uint16 bits of bfloat16. Raises NotFinite."""
        tensor, buffers = tensors.encode(array, wire)
        rows = Rows(wire, tensor.width, tensor.rows, buffers[0])
        if wire != "f32" and not (wire == "bf16" and array.dtype == np.uint16):
            if self._lossy % MEASURE_EVERY == 0:
                exact = tensors.f32_from_bf16(array) if array.dtype == np.uint16 else array
                self.error = tensors.relative_error(exact, tensors.decode(tensor, rows.data))
            self._lossy += 1
        return rows
