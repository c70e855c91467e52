"""docs/protocol.md names every message, field, kind and sender as the code has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from shoal.wire import codec, enrolment, messages, tensors
from shoal.wire.frames import FRAGMENT_BYTES, HEADER_BYTES
from shoal.wire.messages import Tensor

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]


def fields(cell: str) -> list[str]:
    """Field names of a table cell, without their defaults."""
    return [] if cell == "(none)" else [name.split(" = ")[0] for name in cell.split(", ")]


@pytest.mark.parametrize(("kind", "cls"), codec.KINDS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_every_message_has_a_row_that_tells_the_truth(kind: int, cls: Any) -> None:
    (row,) = [row for row in ROWS if row[:2] == [str(kind), cls.__name__]]
    assert fields(row[2]) == list(cls.__struct_fields__)
    senders = [role for role, may_send in codec.MAY_SEND.items() if cls in may_send]
    assert sorted(row[3].split(", ")) == (["all"] if len(senders) == len(codec.MAY_SEND) else sorted(senders))
    assert (row[4] == "yes") == (cls in (messages.Step, messages.Result, messages.Journal))


@pytest.mark.parametrize(
    "cls",
    [
        *(messages.Tensor, messages.StepItem, messages.Hop, messages.Span),
        *(messages.Record, messages.AuditHead, messages.Beat, messages.Revocations, messages.Signed),
    ],
)
def test_every_part_of_a_message_has_a_row(cls: Any) -> None:
    (row,) = [row for row in ROWS if row[0] == cls.__name__]
    assert fields(row[1]) == list(cls.__struct_fields__)


@pytest.mark.parametrize("cls", [*get_args(enrolment.Question), *get_args(enrolment.Answer)])
def test_every_message_of_enrolment_has_a_row_that_tells_the_truth(cls: Any) -> None:
    (row,) = [row for row in ROWS if row[1:2] == [cls.__name__]]
    assert row[0] == str(cls.__struct_config__.tag)
    assert fields(row[2]) == list(cls.__struct_fields__)
    assert f"1 to {enrolment.MAX_MESSAGE_BYTES:,}" in TEXT


def test_the_header_of_the_document_is_as_long_as_ours() -> None:
    rows = [row for row in ROWS if row[0].isdigit() and len(row) == 4]
    offset = 0
    for row in rows:
        assert int(row[0]) == offset
        offset += int(row[1])
    assert offset == HEADER_BYTES
    assert f"{FRAGMENT_BYTES:,} bytes" in TEXT
    assert f"version {messages.PROTOCOL_VERSION}\n" in TEXT.splitlines(keepends=True)[0]


def test_the_row_sizes_of_the_document_are_ours() -> None:
    for width in (1, 64, 65, 1000):
        sizes = {"f32": 4 * width, "bf16": 2 * width, "int8": width + 4 * -(-width // 64)}
        for dtype, size in sizes.items():
            assert tensors.body_bytes(Tensor(dtype, 3, width)) == 3 * size  # type: ignore[arg-type]
