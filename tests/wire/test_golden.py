"""The bytes on the wire do not change by accident.

A failure here means that nodes of the last release can no longer read this one. If that is wanted, raise
PROTOCOL_VERSION, then write the new bytes with `python tests/wire/test_golden.py` and say so in CHANGELOG.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.messages import samples

from shoal.wire import codec
from shoal.wire.frames import FrameReader, FrameWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "messages.json"
DEADLINE_MS = 1500


def written(message: Any, body: bytes) -> bytes:
    """`message` as the first on its lane."""
    kind, meta = codec.encode(message)
    writer = FrameWriter()
    writer.push(kind, meta, [body], lane=codec.lane(message), deadline_ms=DEADLINE_MS)
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


@pytest.mark.parametrize(("message", "body"), samples(), ids=lambda value: type(value).__name__)
def test_every_message_is_written_as_before_and_the_old_bytes_are_read(message: Any, body: bytes) -> None:
    golden = bytes.fromhex(json.loads(GOLDEN.read_text())[type(message).__name__])
    assert written(message, body).hex() == golden.hex()
    (frame,) = FrameReader(codec.decode).feed(golden)
    assert (frame.message, bytes(frame.body), frame.deadline_ms) == (message, body, DEADLINE_MS)


def test_there_are_golden_bytes_of_every_kind_and_no_other() -> None:
    assert set(json.loads(GOLDEN.read_text())) == {kind.__name__ for kind in codec.KINDS.values()}


if __name__ == "__main__":
    lines = {type(message).__name__: written(message, body).hex() for message, body in samples()}
    GOLDEN.write_text(json.dumps(lines, indent=1) + "\n")
