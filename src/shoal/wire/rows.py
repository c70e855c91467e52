"""Rows of activations as they travel: cut by rows and joined by rows without decoding.

Every wire format keeps a row in one run of bytes, so a frame that carries many sessions is taken apart, journalled and
put together again at the cost of slicing. A replay from the journal therefore feeds a stage the very bytes it got
the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import ProtocolError
from shoal.wire.messages import StepItem, Tensor, WireType
from shoal.wire.tensors import row_bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """`data` holds `count` rows of `width` values in the wire format `dtype`."""

    dtype: WireType
    width: int
    count: int
    data: memoryview | bytes

    @property
    def tensor(self) -> Tensor:
        return Tensor(self.dtype, self.count, self.width)

    def __getitem__(self, part: slice) -> Rows:
        start, stop, step = part.indices(self.count)
        if step != 1:
            raise ValueError("rows are cut in steps of one")
        size = row_bytes(self.dtype, self.width)
        return Rows(self.dtype, self.width, max(0, stop - start), memoryview(self.data)[start * size : stop * size])

    def copy(self) -> Rows:
        """The same rows in memory of their own, so that a slice does not keep the whole frame it came in alive."""
        return Rows(self.dtype, self.width, self.count, bytes(self.data))


def cut(items: Sequence[StepItem], tensor: Tensor, body: bytes | bytearray | memoryview) -> list[tuple[StepItem, Rows]]:
    """The rows of each item of a Step, Result or Journal. Raises ProtocolError when the counts do not add up."""
    if sum(item.rows for item in items) != tensor.rows:
        raise ProtocolError(f"The items of a step name {sum(i.rows for i in items)} rows, its tensor {tensor.rows}.")
    size = row_bytes(tensor.dtype, tensor.width)
    view = memoryview(body)
    if view.nbytes != size * tensor.rows:
        raise ProtocolError(f"A body of {view.nbytes} bytes came for a tensor that takes {size * tensor.rows}.")
    found = []
    at = 0
    for item in items:
        found.append((item, Rows(tensor.dtype, tensor.width, item.rows, view[at : at + item.rows * size])))
        at += item.rows * size
    return found


def join(parts: Sequence[Rows]) -> tuple[Tensor, list[memoryview | bytes]]:
    """One tensor and its buffers out of many parts of the same format and width; nothing is copied."""
    first = parts[0]
    if any(part.dtype != first.dtype or part.width != first.width for part in parts):
        raise ValueError("only rows of one format and width can be joined")
    return Tensor(first.dtype, sum(part.count for part in parts), first.width), [part.data for part in parts]
