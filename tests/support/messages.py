"""One sample of every message kind, with a body where it has one. Also the source of tests/golden/messages.json."""

from __future__ import annotations

import msgspec
import numpy as np

from shoal.wire import tensors
from shoal.wire.messages import (
    PROTOCOL_VERSION,
    Assign,
    AuditHead,
    Beat,
    Close,
    Denied,
    Drain,
    Draining,
    Fault,
    Gone,
    Hello,
    Hop,
    Journal,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Record,
    Relink,
    Relinked,
    Renew,
    Renewed,
    Result,
    Revocations,
    Signed,
    Span,
    Step,
    StepItem,
    Sync,
    Tensor,
    WireType,
)

SESSION = bytes(range(16))
NODE = "0123456789abcdef0123456789abcdef"
HOP = Hop(NODE, ["tcp://127.0.0.1:4000"])
RECORD = Record(
    node=NODE,
    incarnation=1_700_000_000,
    version=7,
    lease_s=5.0,
    role="server",
    state="online",
    addresses=["tcp://127.0.0.1:4000"],
    span=Span("demo", 0, 4),
    pid=1234,
    dtype="float32",
    decode_ms_per_block=0.25,
    prefill_ms_per_block_token=0.125,
    memory_bytes=2**30,
    cache_tokens_free=1000,
    cache_tokens_total=4096,
    queue_rows=3,
    sessions=2,
    labels=["trusted"],
    serves="demo",
    reason="No live server hosts blocks 0:4.",
    rtts=[("fedcba9876543210fedcba9876543210", 0.5)],
    busy=0.25,
    threads=4,
    audit=AuditHead(12, bytes(32)),
)
CHAIN = [b"\x30\x03leaf", b"\x30\x05issuer"]
SIGNED = Signed(msgspec.msgpack.encode(RECORD), b"\x30\x04sign", CHAIN, 1200)
BEAT = Signed(msgspec.msgpack.encode(Beat(NODE, 1_700_000_000, 7, 8)), b"\x30\x04sign", [], 100)
REVOKED = Signed(msgspec.msgpack.encode(Revocations(3, [NODE])), b"\x30\x04sign", CHAIN)


def activations(rows: int, width: int = 70) -> np.ndarray:
    """[rows, width] float32 with exact decimal fractions, the same on every machine."""
    return (np.arange(rows * width, dtype=np.float32).reshape(rows, width) - 100) / 8


def rows_body(rows: int, dtype: WireType = "f32", width: int = 70) -> tuple[Tensor, bytes]:
    tensor, buffers = tensors.encode(activations(rows, width), dtype)
    return tensor, b"".join(buffers)


def step(rows: int, *, session: bytes = SESSION, position: int = 0, width: int = 70) -> tuple[Step, bytes]:
    tensor, body = rows_body(rows, width=width)
    return Step([StepItem(session, position, rows)], tensor), body


def journal(rows: int, *, position: int = 0, width: int = 70) -> tuple[Journal, bytes]:
    tensor, body = rows_body(rows, width=width)
    return Journal(4, [StepItem(SESSION, position, rows)], tensor), body


def samples() -> list[tuple[Message, bytes]]:
    """(message, body) for every kind, in the order of their tags; the rows kinds in all three wire formats."""
    items = [StepItem(SESSION, 12, 1, 4), StepItem(SESSION[::-1], 0, 2, 4)]
    f32, f32_body = rows_body(3)
    bf16, bf16_body = rows_body(3, "bf16")
    int8, int8_body = rows_body(3, "int8")
    return [
        (Hello(PROTOCOL_VERSION, "demo-0123456789abcdef", NODE, "server"), b""),
        (Ping(1), b""),
        (Pong(2**53), b""),
        (Fault("full", "No room now.", 1.5), b""),
        (Open(SESSION, 3, "demo", 0, 4, 2, 2048, "int8", HOP), b""),
        (Opened(SESSION, 3), b""),
        (Denied(SESSION, 3, "full", "No room now.", 0.5), b""),
        (Step(items, f32), f32_body),
        (Result(items, bf16), bf16_body),
        (Journal(4, items, int8), int8_body),
        (Relink(SESSION, 4, HOP), b""),
        (Relinked(SESSION, 4, 99), b""),
        (Close([SESSION]), b""),
        (Gone([SESSION], "expired", "Not used for 600 s."), b""),
        (Sync({bytes(range(8)): (1_700_000_000, 7)}, [SIGNED], 2, REVOKED, 3, True, [BEAT]), b""),
        (Assign(Span("demo", 4, 8), "No live server hosts blocks 4:8."), b""),
        (Drain("The machine is needed elsewhere."), b""),
        (Draining(), b""),
        (Renew(), b""),
        (Renewed(CHAIN), b""),
    ]
