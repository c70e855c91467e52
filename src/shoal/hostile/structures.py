"""Random values of any message type, read from the type itself, so that a new message is fuzzed without a word here.

Most values are right, or just at a bound; some are of another type. Names that tie messages together (a session, a
node) come from a small stock, so that messages meet: a Close that names no open session reaches nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from shoal.swarm.view import digest_key
from shoal.wire.messages import Beat, Record, Revocations

SESSIONS = tuple(bytes([number]) * 16 for number in range(3))
NODES = tuple(f"{number:032x}" for number in range(3))
MODELS = ("demo@0", "plain")
SWARM = "fuzz-" + "0" * 32

Stock = Mapping[str, Callable[[random.Random], Any]]

NAMED: Stock = {
    "session": lambda rng: rng.choice(SESSIONS),
    "sessions": lambda rng: rng.sample(SESSIONS, rng.randint(1, 2)),
    "node": lambda rng: rng.choice(NODES),
    "model": lambda rng: rng.choice(MODELS),
    "swarm": lambda rng: SWARM,
    "start": lambda rng: rng.choice((0, 0, 2, 4)),
    "end": lambda rng: rng.choice((4, 4, 8)),
    "block": lambda rng: rng.choice((0, 0, 4, 8)),
    "position": lambda rng: rng.choice((0, 0, 1, 2, 3, 8, 40)),
    "rows": lambda rng: rng.choice((1, 1, 1, 2, 5)),
    "max_tokens": lambda rng: rng.choice((1, 16, 64)),
    "epoch": lambda rng: rng.randint(0, 3),
    "incarnation": lambda rng: rng.randint(0, 3),
    "version": lambda rng: rng.randint(0, 9),
    "answers": lambda rng: rng.randint(0, 2),
    "digest": lambda rng: {
        digest_key(node): (rng.randint(0, 3), rng.randint(0, 9)) for node in rng.sample(NODES, rng.randint(0, 3))
    },
    "payload": lambda rng: msgspec.msgpack.encode(
        Maker(rng, wild=0.001).make(rng.choice((Record, Record, Record, Record, Beat, Beat, Revocations)))
    ),
    "chain": lambda rng: [b"certificate"] * rng.randint(1, 2),
    "addresses": lambda rng: [f"tcp://127.0.0.1:{rng.randint(1, 65_535)}"],
}
"""Fields whose values must meet those of other messages, by name."""

STRANGERS: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "\x00", "é" * 300, "../..", "9" * 50, "\U0010ffff"),
    *([], {}, [[]], [None] * 40, {"": None}, [[[[[1]]]]]),
)
"""What takes the place of a value of the right type."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Maker:
    """Makes values as plain lists, dicts and numbers, ready for msgpack or JSON."""

    def __init__(
        self, rng: random.Random, *, wild: float = 0.02, stock: Stock = NAMED, strangers: tuple[Any, ...] = STRANGERS
    ) -> None:
        """`wild`: how often a part is not of its type; 0.0 makes valid values only."""
        self._rng = rng
        self._wild = wild
        self._stock = stock
        self._strangers = strangers

    def make(self, kind: type) -> Any:
        """A value of the msgspec type `kind`."""
        return self._value(_type_of(kind), "", 0)

    def _value(self, kind: inspect.Type, name: str, depth: int) -> Any:
        rng = self._rng
        if rng.random() < self._wild:
            return rng.choice(self._strangers)
        known = self._stock.get(name)
        if known is not None and rng.random() < 0.9:
            value = known(rng)
            if isinstance(value, list) == isinstance(kind, inspect.ListType):  # "sessions" may be a count elsewhere
                return value
        match kind:
            case inspect.StructType():
                return self._struct(kind, depth)
            case inspect.UnionType(types):
                return self._value(rng.choice(types), "", depth)
            case inspect.ListType(item, least, most) | inspect.VarTupleType(item, least, most):
                return [self._value(item, "", depth + 1) for _ in range(self._length(least, most, depth))]
            case inspect.TupleType(items):
                return [self._value(item, "", depth + 1) for item in items]
            case inspect.DictType(key, value, least, most):
                count = self._length(least, most, depth)
                pairs = [(self._value(key, "", depth + 1), self._value(value, "", depth + 1)) for _ in range(count)]
                return {key: value for key, value in pairs if isinstance(key, str | int | bytes)}
        return self._plain(kind, depth)

    def _plain(self, kind: inspect.Type, depth: int) -> Any:
        rng = self._rng
        match kind:
            case inspect.IntType():
                low = -(2**63) if kind.ge is None else kind.ge
                high = 2**63 - 1 if kind.le is None else kind.le
                return self._between(int(low), int(high))
            case inspect.FloatType():
                least = kind.ge if kind.ge is not None else -1e308 if kind.gt is None else kind.gt + 1e-9
                most = 1e308 if kind.le is None else kind.le
                return float(rng.choice((least, most, rng.uniform(max(least, 0.0), min(most, 100.0)))))
            case inspect.StrType():
                return self._text(kind)
            case inspect.BytesType(least, most):
                return rng.randbytes(self._between(least or 0, min(most or 64, 4096)))
            case inspect.BoolType():
                return rng.random() < 0.5
            case inspect.LiteralType(values):
                return rng.choice(values)
            case inspect.NoneType():
                return None
        return rng.choice(self._strangers) if depth > 3 else [rng.choice(self._strangers)]

    def _struct(self, kind: inspect.StructType, depth: int) -> Any:
        rng = self._rng
        values = [(field, self._value(field.type, field.encode_name, depth + 1)) for field in kind.fields]
        if kind.array_like:
            tag = [] if kind.tag is None else [kind.tag]
            parts = [*tag, *(value for _, value in values)]
            if rng.random() < self._wild:
                parts = parts[: rng.randint(0, len(parts))]
            return parts
        return {
            field.encode_name: value
            for field, value in values
            if field.required or rng.random() < 0.4  # an object may leave out what has a default
        }

    def _length(self, least: int | None, most: int | None, depth: int) -> int:
        low = least or 0
        high = 2048 if most is None else most
        if self._rng.random() < 0.002 and depth < 2:
            return min(high + 1, 2049)  # one too many, now and then
        return min(high, low + self._rng.choice((0, 0, 1, 1, 2, 3)))

    def _between(self, low: int, high: int) -> int:
        if low >= high:
            return low
        near = (low, low + 1, high, high - 1, self._rng.randint(low, min(high, low + 300)))
        return self._rng.choice(near)

    def _text(self, kind: inspect.StrType) -> str:
        rng = self._rng
        most = 64 if kind.max_length is None else kind.max_length
        length = self._between(kind.min_length or 0, min(most, 64))
        if rng.random() < 0.01:
            length = most
        if kind.pattern is None and rng.random() < 0.1:
            return "".join(chr(rng.choice((0, 10, 34, 92, 0xE9, 0xFFFF, 0x1F600))) for _ in range(length))
        return "".join(rng.choices(_LETTERS, k=length))


_TYPES: dict[type, inspect.Type] = {}


def _type_of(kind: type) -> inspect.Type:
    if kind not in _TYPES:
        _TYPES[kind] = msgspec.inspect.type_info(kind)
    return _TYPES[kind]


_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xC1, 0xDD, 0xFE, 0xFF)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four changes: bytes flipped, overwritten, lost, repeated or made up, mostly near the front,
    where headers are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = min(int(rng.expovariate(1 / 80)), max(0, len(changed) - 1))
        match rng.randrange(5) if changed else 4:
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice(_INTERESTING)
            case 2:
                del changed[at : at + rng.randint(1, 8)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 40)]
            case _:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(changed)
