"""Frames: any cut of the byte stream gives the same messages, small ones overtake, strangers are bounded."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolError, Refused
from shoal.wire.frames import FRAGMENT_BYTES, HEADER_BYTES, Frame, FrameReader, FrameWriter, Lane, Limits
from shoal.wire.messages import PROTOCOL_VERSION

KIND = 13


def echo(kind: int, meta: bytes, body_len: int) -> bytes:
    return meta


def drain(writer: FrameWriter) -> bytes:
    data = b""
    while (buffers := writer.next_frame()) is not None:
        data += b"".join(buffers)
    return data


def header(
    *,
    magic: int = 0x4853,
    version: int = PROTOCOL_VERSION,
    kind: int = KIND,
    flags: int = 0,
    reserved: bytes = b"\0\0\0",
    stream: int = 0,
    seq: int = 0,
    meta_len: int = 1,
    body_len: int = 0,
    deadline_ms: int = 0,
) -> bytes:
    """Written out here and not imported, so that a changed layout fails these tests."""
    fields = (magic, version, kind, flags, reserved, stream, seq, meta_len, body_len, deadline_ms)
    return struct.pack("<HBBB3sIIIQI", *fields)


messages = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=40),
        st.sampled_from([0, 1, 100, FRAGMENT_BYTES, FRAGMENT_BYTES + 1, 3 * FRAGMENT_BYTES - 1]),
        st.sampled_from(Lane),
        st.integers(0, 2**32 - 1),
    ),
    max_size=6,
)


# Small pieces cut headers and metadata; the large one at the end keeps long bodies affordable.
@given(messages, st.lists(st.integers(1, 200), max_size=40).map(lambda cuts: [*cuts, 100_000]))
def test_any_cut_of_the_stream_gives_every_message_back(
    sent: list[tuple[bytes, int, Lane, int]], cuts: list[int]
) -> None:
    writer = FrameWriter()
    for number, (meta, size, lane, deadline_ms) in enumerate(sent):
        writer.push(KIND, meta, [bytes([number]) * size], lane=lane, deadline_ms=deadline_ms)
    data = drain(writer)
    reader = FrameReader(echo)
    received: list[Frame[bytes]] = []
    at = turn = 0
    while at < len(data):
        received += reader.feed(data[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1
    for lane in Lane:
        expected = [(m, bytes([n]) * s, d) for n, (m, s, ln, d) in enumerate(sent) if ln is lane]
        assert [(f.message, bytes(f.body), f.deadline_ms) for f in received if f.lane is lane] == expected


def test_a_body_may_come_in_several_buffers_and_is_received_in_one() -> None:
    writer = FrameWriter()
    pieces = [bytes([n]) * 50_000 for n in range(5)]
    writer.push(KIND, b"m", pieces, lane=Lane.BULK)
    (frame,) = FrameReader(echo).feed(drain(writer))
    assert frame.body == b"".join(pieces)
    assert not frame.body.readonly


def test_a_small_message_overtakes_a_large_one_and_control_overtakes_both() -> None:
    writer = FrameWriter()
    writer.push(KIND, b"bulk", [bytes(10 * FRAGMENT_BYTES)], lane=Lane.BULK)
    first = writer.next_frame()
    writer.push(KIND, b"step", [b"x"], lane=Lane.URGENT)
    writer.push(KIND, b"ping", lane=Lane.CONTROL)
    assert first is not None
    received = FrameReader(echo).feed(b"".join(first) + drain(writer))
    assert [frame.message for frame in received] == [b"ping", b"step", b"bulk"]


def test_bulk_and_journal_share_the_line() -> None:
    writer = FrameWriter()
    for name, lane in ((b"bulk", Lane.BULK), (b"journal", Lane.JOURNAL)):
        writer.push(KIND, name, [bytes(4 * FRAGMENT_BYTES)], lane=lane)
    streams = [struct.unpack_from("<I", buffers[0], 8)[0] for buffers in iter(writer.next_frame, None)]
    assert streams == [2, 3] * 4


def test_urgent_traffic_without_end_does_not_starve_the_journal() -> None:
    writer = FrameWriter()
    writer.push(KIND, b"journal", lane=Lane.JOURNAL)
    sent = 0
    while writer.queued_messages(Lane.JOURNAL):
        writer.push(KIND, b"step", lane=Lane.URGENT)
        writer.next_frame()
        sent += 1
    assert sent == FrameWriter.URGENT_BURST + 1


def test_a_small_step_waits_for_a_large_one_of_the_same_session() -> None:
    writer = FrameWriter()
    writer.push(KIND, b"chunk", [bytes(2 * FRAGMENT_BYTES)], lane=Lane.BULK, order_keys=[b"a", b"b"])
    writer.push(KIND, b"a small", lane=Lane.URGENT, order_keys=[b"a"])
    writer.push(KIND, b"c small", lane=Lane.URGENT, order_keys=[b"c"])
    received = FrameReader(echo).feed(drain(writer))
    assert [frame.message for frame in received] == [b"c small", b"chunk", b"a small"]
    writer.push(KIND, b"a later", lane=Lane.URGENT, order_keys=[b"a"])
    assert writer.queued_messages(Lane.URGENT) == 1, "nothing of that session waits in bulk any more"


def test_the_queue_counts_what_waits() -> None:
    writer = FrameWriter()
    writer.push(KIND, b"meta", [bytes(100_000)], lane=Lane.BULK)
    assert writer
    assert writer.queued_bytes(Lane.BULK) == 100_004
    writer.next_frame()
    assert writer.queued_bytes(Lane.BULK) == 100_000 - FRAGMENT_BYTES
    writer.next_frame()
    assert writer.queued_bytes(Lane.BULK) == 0
    assert not writer


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header(magic=0x5448), "does not speak"),
        (header(flags=2), "flags or reserved"),
        (header(reserved=b"\0\1\0"), "flags or reserved"),
        (header(stream=4), "stream 4"),
        (header(stream=2**32 - 1), "stream 4294967295"),
        (header(seq=1), "skips from message 0 to 1"),
        (header(meta_len=0), "0 bytes of metadata"),
        (header(meta_len=64 * 1024 + 1), "65537 bytes of metadata"),
        (header(meta_len=2**32 - 1), "4294967295 bytes of metadata"),
        (header(body_len=1_000_001), "body of 1000001 bytes; this connection accepts 1000000"),
        (header(body_len=2**64 - 1), "this connection accepts 1000000"),
        (header(flags=1, meta_len=0, body_len=10), "never begun"),
        (header(body_len=100_000) + b"m" + bytes(FRAGMENT_BYTES) + header(body_len=100_000), "before the last one"),
        (
            header(body_len=100_000) + b"m" + bytes(FRAGMENT_BYTES) + header(flags=1, meta_len=0, body_len=99_999),
            "another message",
        ),
        (
            header(body_len=100_000) + b"m" + bytes(FRAGMENT_BYTES) + header(flags=1, meta_len=1, body_len=100_000),
            "another message",
        ),
        (
            header(body_len=100_000) + b"m" + bytes(FRAGMENT_BYTES) + header(flags=1, seq=1, meta_len=0, body_len=9),
            "skips from message 0 to 1",
        ),
    ],
)
def test_a_frame_that_breaks_the_rules_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        FrameReader(echo, Limits(max_body_bytes=1_000_000)).feed(data)


def test_another_protocol_version_is_refused_by_name_after_three_bytes() -> None:
    with pytest.raises(
        Refused, match=f"version {PROTOCOL_VERSION + 1}, this side speaks version {PROTOCOL_VERSION}"
    ) as caught:
        FrameReader(echo).feed(header(version=PROTOCOL_VERSION + 1)[:3])
    assert "same shoal release" in caught.value.hint


def test_a_browser_is_turned_away_after_three_bytes() -> None:
    with pytest.raises(ProtocolError, match="does not speak the shoal protocol"):
        FrameReader(echo).feed(b"GET")


def test_nothing_is_allocated_for_a_body_whose_description_is_refused() -> None:
    def refuse(kind: int, meta: bytes, body_len: int) -> bytes:
        raise ProtocolError("no")

    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="no"):
            FrameReader(refuse).feed(header(body_len=60 * 2**20) + b"m")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_after_an_error_the_reader_repeats_it() -> None:
    reader = FrameReader(echo)
    with pytest.raises(ProtocolError, match="stream 9"):
        reader.feed(header(stream=9))
    with pytest.raises(ProtocolError, match="stream 9"):
        reader.feed(header() + b"m")


def test_the_writer_refuses_what_the_reader_would() -> None:
    with pytest.raises(ValueError, match="metadata of 65537 bytes"):
        FrameWriter().push(KIND, bytes(64 * 1024 + 1))
    with pytest.raises(ValueError, match="limits exceed"):
        Limits(max_body_bytes=2**40)


def test_the_header_takes_32_bytes() -> None:
    assert len(header()) == HEADER_BYTES == 32
