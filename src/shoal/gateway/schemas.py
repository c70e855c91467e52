"""JSON schemas of requests: how they are given to the grammar engine, and which are refused before it sees them.

The engine itself says what it cannot do. Refused here is what would keep it busy for minutes, and what it takes but
could not keep to the letter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from shoal.gateway.errors import RequestError

MAX_SCHEMA_CHARS = 128 * 1024
"""All schemas of one request together, as JSON. OpenAI takes 120,000 characters."""
MAX_SCHEMA_DEPTH = 48
MAX_MULTIPLE = 10_000
"""Largest common multiple of the `multipleOf` in a schema: a number automaton has a state for each remainder (a million
of them: 8 s to compile)."""
MAX_JOINED = 8
"""Patterns and formats that one text must fit at once, by allOf or $ref. Whether any text fits them all is found out by
building an automaton of all of them: twelve took half a second, fourteen more than a minute."""
_MAX_REFERENCES = 300
"""Longest chain of $ref to $ref."""

# One space, or a new line with its indentation, wherever JSON allows white space. Without a bound a model that is
# unsure fills the rest of its answer with spaces.
_WHITESPACE = r"( |\n[ \t]{0,40})"
# No \uXXXX: it could write a listed name so that it does not look like it ("\u0061" for "a"), and half surrogates.
_ESCAPES = 'nrbtf\\"'


@dataclass(frozen=True, slots=True)
class Schema:
    """A JSON schema of a request and the field it stands in. When not strict, what cannot be kept to is left out."""

    value: dict[str, Any]
    strict: bool
    param: str

    @property
    def refers(self) -> bool:
        """Whether it may refer to parts of itself."""
        return '"$ref"' in json.dumps(self.value)

    def rule(self) -> str:
        """The schema as a rule's body. Raises RequestError for what is refused before anything is compiled."""
        _check(self.value, self.strict, self.param)
        options = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": _ESCAPES, "lenient": not self.strict}
        # The engine takes options from the schema itself; a caller's own are overwritten.
        return "%json " + json.dumps({**self.value, "x-guidance": options})


def check_size(schemas: Sequence[Schema]) -> None:
    """Raises RequestError when the schemas of a request are too much together."""
    size = 0
    for schema in schemas:
        size += len(json.dumps(schema.value))
        if size > MAX_SCHEMA_CHARS:
            raise RequestError(
                f"The schemas of this request are longer than {MAX_SCHEMA_CHARS} characters.",
                param=schema.param,
                code="schema_too_large",
            )


def unsupported(reason: str, param: str | None) -> RequestError:
    return RequestError(
        f"The schema cannot be kept to: {plain(reason)}.",
        param=param,
        code="unsupported_schema",
        hint="docs/guides/tools-and-json.md lists what a schema may hold.",
    )


def plain(reason: str) -> str:
    """The engine's complaint without the grammar's source, which it quotes."""
    reason = re.split(r"\n\s*\d+ \|", reason, maxsplit=1)[0].partition("<state>")[0]
    reason = reason.rpartition("failed to compile JSON schema: ")[2]
    if reason.startswith("NoExtension"):
        reason = "nothing fits it"
    return " ".join(reason.split())[:300].rstrip(". ") or "no token fits"


def _check(schema: dict[str, Any], strict: bool, param: str) -> None:
    """Raises RequestError for what would compile for too long, or could come out invalid."""
    multiples: list[Decimal] = []
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise RequestError(
                f"The schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", param=param, code="schema_too_large"
            )
        if isinstance(value, dict):
            multiple, at_least = _number(value, "multipleOf"), _number(value, "minProperties")
            if 0 < multiple < math.inf:
                multiples.append(Decimal(str(multiple)))
            if strict and at_least > 1:
                # The same name twice would count twice for the grammar and once for whoever reads the object.
                raise unsupported("minProperties above 1 is not supported", param)
            waiting += ((inner, depth + 1) for inner in value.values())
        elif isinstance(value, list):
            waiting += ((inner, depth + 1) for inner in value)
    common = 1
    for each in multiples:
        digits = each.normalize().as_tuple().digits  # 2500 and 0.25 are both 25
        common = math.lcm(common, int("".join(map(str, digits))))
        if common > MAX_MULTIPLE:
            raise unsupported(f"multipleOf is supported up to {MAX_MULTIPLE}", param)
    if joined(schema) > MAX_JOINED:
        raise unsupported(f"one text would have to fit more than {MAX_JOINED} patterns at once", param)


def _number(schema: dict[str, Any], name: str) -> float:
    """A number of a schema; 0 for anything else. (True is a number to Python, and to nobody else.)"""
    value = schema.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def joined(schema: dict[str, Any]) -> int:
    """At most so many patterns and formats hold for one text of an answer (an upper bound)."""
    everything = _patterns(schema)
    known: dict[str, _Count] = {}

    def of(value: Any, references: int) -> _Count:
        if not isinstance(value, dict):
            return _Count()
        nested = [value.get(name) for name in ("items", "additionalProperties")]
        for name in ("properties", "patternProperties"):
            inner = value.get(name)
            nested += inner.values() if isinstance(inner, dict) else ()
        inner = value.get("prefixItems")
        nested += inner if isinstance(inner, list) else ()
        here = _Count(sum(name in value for name in ("pattern", "format")))
        # The others hold for the same text as this very schema and what is inside it.
        together = [_most([here, *(of(each, references) for each in nested)])]
        for name in ("allOf", "anyOf", "oneOf"):
            parts = value.get(name)
            counts = [of(part, references) for part in parts] if isinstance(parts, list) else []
            together += counts if name == "allOf" else [_most(counts)]
        target = value.get("$ref")
        if isinstance(target, str):
            together.append(of_reference(target, references + 1))
        counting = [count for count in together if count.patterns or count.open]
        if len(counting) > 1 and any(count.open for count in counting):
            return _Count(everything)
        return _Count(sum(count.patterns for count in counting), any(count.open for count in counting))

    def of_reference(target: str, references: int) -> _Count:
        if target not in known:
            known[target] = _Count(0, open=True)  # inside itself: what it counts is not known yet
            value = _referred(schema, target)
            lost = value is None or references > _MAX_REFERENCES
            known[target] = _Count(everything) if lost else of(value, references)
        return known[target]

    return of_reference("#", 0).patterns


@dataclass(frozen=True, slots=True)
class _Count:
    patterns: int = 0
    open: bool = False
    """There are those of an enclosing schema besides."""


def _most(counts: Sequence[_Count]) -> _Count:
    return _Count(max((count.patterns for count in counts), default=0), any(count.open for count in counts))


def _patterns(value: Any) -> int:
    """All patterns and formats in a schema."""
    count, waiting = 0, [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            count += sum(isinstance(inner.get(name), str) for name in ("pattern", "format"))
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
    return count


def _referred(schema: dict[str, Any], target: str) -> Any:
    """The part that a reference such as "#/$defs/name" means; None for every other kind of reference."""
    if target == "#":
        return schema
    if not target.startswith("#/"):
        return None
    value: Any = schema
    for step in target[2:].split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return None
    return value
