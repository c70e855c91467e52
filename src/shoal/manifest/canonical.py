"""One value, one text: JSON whose bytes can be hashed and signed.

A subset of RFC 8785: objects with sorted keys, lists, strings, whole numbers, true, false, null; no white space, UTF-8.
Fractions are left out, because two programs may write the same one differently.
"""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, "Json"] | list["Json"] | str | int | bool | None

_MAX_NUMBER = 2**53
"""Beyond it other languages read a JSON number as another one."""


def canonical(value: Json) -> bytes:
    """The bytes that stand for `value`. Raises ValueError for what they cannot stand for."""
    _check(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()


def read_canonical(text: bytes) -> Any:
    """The value whose canonical bytes are exactly `text`. Raises ValueError for any other text, also for one that means
    the same."""
    try:
        value = json.loads(text)
        if canonical(value) == text:
            return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    raise ValueError("not in canonical form")


def _check(value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no string")
            _check(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, float) or not isinstance(value, str | int | bool | None):
        raise ValueError(f"{type(value).__name__} has no canonical form")
    elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise ValueError("a number beyond 2^53")
