"""Records for tests, with the few fields that matter there."""

from __future__ import annotations

from typing import Any

from shoal.wire.messages import Record, Span

MODEL = "toy"


def record(node: str, span: tuple[int, int] | None = None, **fields: Any) -> Record:
    """An online server's record; `span` = (start, end) of MODEL."""
    values: dict[str, Any] = {
        "incarnation": 1,
        "version": 1,
        "lease_s": 10.0,
        "role": "server",
        "state": "online",
        "addresses": [f"{node}:1"],
        "pid": 1,
        "dtype": "float32",
        "decode_ms_per_block": 1.0,
        "prefill_ms_per_block_token": 0.1,
        "memory_bytes": 2**30,
        "cache_tokens_free": 10_000,
        "cache_tokens_total": 10_000,
        "queue_rows": 0,
        "sessions": 0,
    }
    values.update(fields)
    return Record(node=node, span=None if span is None else Span(MODEL, *span), **values)
