"""Codec: every kind survives the trip; whatever is not exactly a message is a ProtocolError."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.messages import RECORD, SESSION, journal, samples, step

from shoal.errors import ProtocolError
from shoal.wire import codec
from shoal.wire.frames import Lane
from shoal.wire.messages import MAX_ITEMS, MAX_META_BYTES, Close, Open, Ping, Result, Step, StepItem, Sync, Tensor

STEP_KIND = 13


def pack(*fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(("message", "body"), samples(), ids=lambda value: type(value).__name__)
def test_every_message_survives_the_trip(message: Any, body: bytes) -> None:
    kind, meta = codec.encode(message)
    assert codec.decode(kind, meta, len(body)) == message


def test_the_samples_cover_every_kind_and_every_kind_has_a_sender() -> None:
    assert {type(message) for message, _ in samples()} == set(codec.KINDS.values())
    assert frozenset().union(*codec.MAY_SEND.values()) == set(codec.KINDS.values())


@pytest.mark.parametrize(("message", "body"), samples(), ids=lambda value: type(value).__name__)
def test_a_field_too_many_is_refused(message: Any, body: bytes) -> None:
    kind, meta = codec.encode(message)
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(meta), "new"])
    with pytest.raises(ProtocolError, match=f"malformed {type(message).__name__}"):
        codec.decode(kind, longer, len(body))


@pytest.mark.parametrize(
    ("kind", "meta", "says"),
    [
        (99, pack(99), "unknown kind 99"),
        (2, pack(3, 1), "malformed Ping"),
        (2, pack(2, -1), "malformed Ping"),
        (2, pack(2, 2**53 + 1), "malformed Ping"),
        (2, pack(2, True), "malformed Ping"),
        (2, b"", "malformed Ping"),
        (2, pack(2, 1) + b"\0", "malformed Ping"),
        (2, b"\x91" * 60_000, "malformed Ping"),
        (4, pack(4, "full", "x", float("nan")), "malformed Fault"),
        (4, pack(4, "full", "x", float("inf")), "malformed Fault"),
        (4, b"\x93\x04\xa1\xff\xa1x", "malformed Fault"),
        (4, pack(4, "x" * 257, "x"), "malformed Fault"),
        (18, pack(18, [b"short"]), "malformed Close"),
        (18, pack(18, []), "malformed Close"),
        (18, pack(18, [SESSION] * (MAX_ITEMS + 1)), "malformed Close"),
        (1, pack(1, 1, "swarm", "../../etc", "server"), "malformed Hello"),
        (1, pack(1, 1, "swarm", "node", "root"), "malformed Hello"),
        (STEP_KIND, pack(13, [[SESSION, 0, 0]], ["f32", 0, 4]), "malformed Step"),
        (STEP_KIND, pack(13, [[SESSION, 0, 1]], ["f64", 1, 4]), "malformed Step"),
        (STEP_KIND, pack(13, [[SESSION, 0, 1]], ["f32", 2**40, 2**40]), "malformed Step"),
    ],
)
def test_a_malformed_message_is_refused_and_named(kind: int, meta: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        codec.decode(kind, meta, 0)


def test_a_nan_in_a_record_is_refused() -> None:
    for name in ("lease_s", "decode_ms_per_block", "prefill_ms_per_block_token"):
        record = msgspec.structs.replace(RECORD, **{name: float("nan")})
        kind, meta = codec.encode(Sync({}, [record], 0))
        with pytest.raises(ProtocolError, match="malformed Sync"):
            codec.decode(kind, meta, 0)


def test_an_open_for_no_token_is_refused() -> None:
    kind, meta = codec.encode(Open(SESSION, 1, "demo", 0, 4, 1, 0, "f32", None))
    with pytest.raises(ProtocolError, match="malformed Open"):
        codec.decode(kind, meta, 0)


def test_a_body_that_does_not_fit_its_tensor_is_refused() -> None:
    kind, meta = codec.encode(step(3)[0])
    with pytest.raises(ProtocolError, match="body of 839 bytes; its tensor takes 840"):
        codec.decode(kind, meta, 839)
    with pytest.raises(ProtocolError, match="body of 1 bytes; its tensor takes 0"):
        codec.decode(*codec.encode(Ping(1)), 1)


def test_items_that_do_not_add_up_are_refused() -> None:
    kind, meta = codec.encode(Step([StepItem(SESSION, 0, 2)], Tensor("f32", 3, 1)))
    with pytest.raises(ProtocolError, match="do not add up"):
        codec.decode(kind, meta, 12)


def test_a_message_that_fits_no_frame_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match=f"room for {MAX_META_BYTES}"):
        codec.encode(Sync({}, [RECORD] * 1000, 0))


def test_lanes_follow_who_is_waiting() -> None:
    decode_batch = Result([StepItem(SESSION, 0, 1)] * 64, Tensor("f32", 64, 4096))
    assert codec.lane(decode_batch) is Lane.URGENT, "64 people wait for it, whatever its size"
    assert codec.lane(step(4)[0]) is Lane.URGENT
    assert codec.lane(step(512, width=1024)[0]) is Lane.BULK
    assert codec.lane(journal(1)[0]) is Lane.JOURNAL
    assert codec.lane(Sync({}, [], 2)) is Lane.JOURNAL
    assert codec.lane(Close([SESSION])) is Lane.CONTROL
    assert codec.order_keys(step(4)[0]) == (SESSION,)
    assert codec.order_keys(Close([SESSION])) == ()
