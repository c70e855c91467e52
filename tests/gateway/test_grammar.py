"""Grammars: what they allow is valid, whatever the tokenizer and the schema, and what they may cost is bounded."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.gateway import byte_level_tokenizer
from support.tokenizers import spelled_out_tokenizer

from shoal.gateway import grammar as engine
from shoal.gateway.errors import RequestError
from shoal.gateway.grammar import Grammar, GrammarBroken, Grammars, Running
from shoal.gateway.schemas import Schema, check_size, joined
from shoal.gateway.text import Vocabulary

BYTE_LEVEL = Vocabulary(byte_level_tokenizer(special=["[CALLS]"]))
SPELLED_OUT = Vocabulary(spelled_out_tokenizer())
END = {id(BYTE_LEVEL): 1, id(SPELLED_OUT): 2}


def grammars_of(vocabulary: Vocabulary) -> Grammars:
    return Grammars(vocabulary, frozenset({END[id(vocabulary)]}))


BYTES, PIECES = grammars_of(BYTE_LEVEL), grammars_of(SPELLED_OUT)


def compiled(grammars: Grammars, schema: dict[str, Any]) -> Grammar:
    whole = Schema(schema, True, "schema")
    return grammars.compile(f"start: {whole.rule()}", [whole])


def allowed(running: Running, vocabulary: Vocabulary) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(running.mask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits[: vocabulary.size])


def says(grammar: Grammar, vocabulary: Vocabulary, text: str) -> bool:
    """Whether the grammar allows exactly this answer, in the tokenizer's own tokens."""
    running = grammar.start()
    for token in [*vocabulary.encode(text, add_special_tokens=False), END[id(vocabulary)]]:
        if token not in allowed(running, vocabulary):
            return False
        running.accept(token)
    return True


def by_chance(grammar: Grammar, vocabulary: Vocabulary, rng: random.Random, most: int = 250) -> bytes | None:
    """An answer of tokens by chance, most of them such that close something; None when it finds no end."""
    running, answer, end = grammar.start(), b"", END[id(vocabulary)]
    for _ in range(most):
        tokens = allowed(running, vocabulary).tolist()
        closing = [token for token in tokens if vocabulary.token_bytes(token) in (b'"', b"}", b"]", b",", b":")]
        if end in tokens and rng.random() < 0.5:
            return answer
        token = rng.choice(closing if closing and rng.random() < 0.35 else tokens)
        if token == end:
            return answer
        answer += vocabulary.token_bytes(token)
        running.accept(token)
    return None


DRAFT = jsonschema.Draft202012Validator
NAMES = ("a", "b", 'q"\\', "é", "", "a b", "aa")
PATTERNS = ("a|b$", "^a+$", "x", "^(ab|cd)*$", "\\d{2}", "^[^a]{1,3}$", "\\s", "^.{2}$", '["\\\\]', "^é?$", "a.b")
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def leaf(rng: random.Random) -> Any:
    choices: list[Any] = [
        *({"type": kind} for kind in ("null", "boolean", "integer", "number")),
        {"type": "string", "maxLength": rng.randint(0, 5)},
        {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 9},
        {"type": "string", "format": rng.choice(FORMATS)},
        {"type": "integer", "minimum": rng.randint(-50, 50), "maximum": rng.randint(51, 200)},
        {"type": "number", "minimum": -0.5, "exclusiveMaximum": rng.choice([0.25, 1e3, 2])},
        {"type": "integer", "multipleOf": rng.choice([2, 7, 25])},
        {"type": ["string", "integer"], "maxLength": 2, "maximum": 9},
        {"enum": rng.sample([1, 2.5, "x", "é", None, True, [], {"z": 1}, "a\nb", 0], rng.randint(1, 4))},
        {"const": rng.choice(['say "x"', {"k": [1]}, -1, ""])},
        {},
    ]
    return rng.choice(choices)


def schema_by_chance(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 2 or kind < 0.3:
        return leaf(rng)
    if kind < 0.6:
        properties = {name: schema_by_chance(rng, depth + 1) for name in rng.sample(NAMES, rng.randint(0, 3))}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        schema["required"] = [name for name in properties if rng.random() < 0.6]
        schema |= rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": leaf(rng)}])
        schema |= rng.choice([{}, {}, {}, {"maxProperties": 2}, {"minProperties": 1}])
        schema |= rng.choice([{}, {}, {}, {"patternProperties": {rng.choice(["^a", "b$", "x"]): leaf(rng)}}])
        return schema
    if kind < 0.8:
        items = {"type": "array", "items": schema_by_chance(rng, depth + 1), "minItems": rng.randint(0, 2)}
        return items | rng.choice([{}, {"maxItems": 3}, {"prefixItems": [leaf(rng)]}])
    parts = [schema_by_chance(rng, depth + 1) for _ in range(2)]
    return {"anyOf": parts} if kind < 0.9 else {"allOf": parts} if kind < 0.95 else {"oneOf": parts}


@pytest.mark.parametrize("part", range(4))
def test_whatever_a_grammar_allows_is_valid_by_another_implementations_word(part: int) -> None:
    ended = refused = 0
    for seed in range(part * 100, part * 100 + 100):
        rng = random.Random(seed)
        schema = schema_by_chance(rng)
        grammars, vocabulary = rng.choice([(BYTES, BYTE_LEVEL), (PIECES, SPELLED_OUT)])
        try:
            grammar = compiled(grammars, schema)
        except RequestError:
            refused += 1
            continue
        for _ in range(2):
            answer = by_chance(grammar, vocabulary, rng)
            if answer is not None:
                ended += 1
                validator = jsonschema.Draft202012Validator(
                    schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
                )
                validator.validate(json.loads(answer.decode().removeprefix(" ")))
    assert ended > 100, (ended, refused)


@pytest.mark.parametrize(("grammars", "vocabulary"), [(BYTES, BYTE_LEVEL), (PIECES, SPELLED_OUT)])
def test_a_tokenizers_own_tokens_for_an_answer_are_allowed(grammars: Grammars, vocabulary: Vocabulary) -> None:
    grammar = compiled(grammars, {"type": "object"})
    for text in ('{"the sea": [1, "ü😀\\n"]}', '{\n  "a": {\n    "b": null\n  }\n}', "{}"):
        assert says(grammar, vocabulary, text)
    for text in ('{"a"}', '{"a": 1,}', "[]", '{"a": 01}', "{}}", '{"a":   1}', '{"\\u0061": 1}', '{"a": "\n"}'):
        assert not says(grammar, vocabulary, text)


def test_fixed_parts_come_in_the_tokens_that_the_tokenizer_itself_would_take() -> None:
    for grammars, vocabulary in ((BYTES, BYTE_LEVEL), (PIECES, SPELLED_OUT)):
        running = compiled(grammars, {"const": "the sea and the ship"}).start()
        tokens = []
        while (token := int(allowed(running, vocabulary)[0])) != END[id(vocabulary)]:
            assert len(allowed(running, vocabulary)) == 1 or not tokens  # a first space is left open
            tokens.append(token)
            running.accept(token)
        whole = b"".join(map(vocabulary.token_bytes, tokens)).decode().strip()
        assert whole == '"the sea and the ship"'
        assert len(tokens) <= len(vocabulary.encode('"the sea and the ship"', add_special_tokens=False)) + 1


def test_special_tokens_in_a_literal_are_tokens_and_never_text() -> None:
    assert BYTES.literal("ab[CALLS]\nc") == f'"ab" <[{BYTE_LEVEL.size - 1}]> "\\nc"'
    grammar = BYTES.compile(f"start: {BYTES.literal('[CALLS]')} /[a-z]{{3}}/", [])
    running = grammar.start()
    assert allowed(running, BYTE_LEVEL).tolist() == [BYTE_LEVEL.size - 1]
    # In free text the letters of it are only letters.
    free = BYTES.compile("start: /(?s:.*)/", []).start()
    assert BYTE_LEVEL.size - 1 not in allowed(free, BYTE_LEVEL)


@pytest.mark.parametrize("grammars", [BYTES, PIECES])
def test_a_schema_without_end_is_noticed_before_it_is_a_dead_end(grammars: Grammars) -> None:
    endless = {"$defs": {"d": {"$ref": "#/$defs/e"}, "e": {"$ref": "#/$defs/d"}}, "$ref": "#/$defs/d"}
    for schema in ({"$ref": "#"}, endless):
        with pytest.raises(RequestError, match="nothing fits it"):
            grammars.check(Schema(schema, True, "schema"))


def test_every_generation_has_a_state_of_its_own() -> None:
    grammar = compiled(BYTES, {"enum": ["ab", "cd"]})
    one, other = grammar.start(), grammar.start()
    for letter in ('"', "a"):
        one.accept(BYTE_LEVEL.encode(letter, add_special_tokens=False)[0])
    assert not np.array_equal(allowed(one, BYTE_LEVEL), allowed(other, BYTE_LEVEL))
    assert np.array_equal(allowed(grammar.start(), BYTE_LEVEL), allowed(other, BYTE_LEVEL))


def test_a_token_that_is_not_allowed_breaks_its_own_generation_only() -> None:
    grammar = compiled(BYTES, {"type": "object"})
    running = grammar.start()
    running.accept(BYTE_LEVEL.encode("x", add_special_tokens=False)[0])
    with pytest.raises(GrammarBroken):
        running.mask()
    assert allowed(grammar.start(), BYTE_LEVEL).size


def test_when_a_step_is_under_way_its_end_is_told_once() -> None:
    running = compiled(BYTES, {"type": "object"}).start()
    told: list[None] = []
    assert running.ready(lambda: told.append(None))
    running.accept(BYTE_LEVEL.encode("{", add_special_tokens=False)[0])
    later = running.ready(lambda: told.append(None))
    running.mask()
    deadline = time.monotonic() + 10
    while not later and not told and time.monotonic() < deadline:
        pass
    assert len(told) == (not later)
    assert running.ready(lambda: None)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


def expensive() -> Iterator[dict[str, Any]]:
    """Schemas that were, or look, made to keep a server busy."""
    yield {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}
    yield {"type": "string", "pattern": "^(.*a.{300})$"}
    yield {"type": "string", "pattern": "(x+x+)+y"}
    yield {"type": "string", "pattern": "^\\p{L}{1,10000}$"}
    yield {"type": "string", "minLength": 99_999, "maxLength": 1_000_000}
    yield {"type": "array", "items": {"type": "string", "maxLength": 100_000}, "minItems": 10_000}
    yield {"enum": [f"value number {number}" for number in range(5000)]}
    yield {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{length}}}"} for length in range(10, 22)]}
    yield {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{length}}}"} for length in range(10, 24)]}
    yield {
        "$defs": {f"d{n}": {"pattern": f"x{n}y", "$ref": f"#/$defs/d{n + 1}"} for n in range(20)},
        "$ref": "#/$defs/d0",
    }
    yield {"type": "integer", "multipleOf": 999_983}
    yield {"type": "integer", "multipleOf": 9973}
    yield {"allOf": [{"type": "number", "multipleOf": 0.9973}, {"multipleOf": 9967}]}
    yield {"type": "integer", "minimum": -(10**18) + 7, "maximum": 9 * 10**18}
    yield {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": f"^a{{{n}}}$"} for n in range(1500)}}
    yield nested(14)
    yield {
        "$defs": {
            f"d{n}": {
                "anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}}]
            }
            for n in range(40)
        }
        | {"d40": {"type": "string"}},
        "$ref": "#/$defs/d0",
    }


@pytest.mark.parametrize("schema", list(expensive()), ids=lambda schema: json.dumps(schema)[:50])
def test_no_schema_keeps_a_thread_for_long(schema: dict[str, Any]) -> None:
    started_s = time.thread_time()
    grammar = None
    with suppress(RequestError):
        grammar = compiled(BYTES, schema)
    assert time.thread_time() - started_s < 2.0  # against hanging; the longest takes a tenth of that
    if grammar is None:
        return  # refused
    rng, running = random.Random(0), grammar.start()
    with suppress(GrammarBroken):  # a step was more work than it may be: that answer ends with an error
        for _ in range(30):
            started_s = time.process_time()
            tokens = allowed(running, BYTE_LEVEL)
            assert time.process_time() - started_s < 1.0
            if (token := int(rng.choice(tokens.tolist()))) == 1:
                break
            running.accept(token)


def test_schemas_are_bounded_together() -> None:
    half = Schema({"const": "x" * 70_000}, True, "first")
    check_size([half])
    with pytest.raises(RequestError) as caught:
        check_size([half, Schema({"const": "x" * 70_000}, True, "second")])
    assert (caught.value.param, caught.value.code) == ("second", "schema_too_large")


@pytest.mark.parametrize(
    ("schema", "count"),
    [
        ({"type": "string", "pattern": "a", "format": "date"}, 2),
        ({"properties": {"a": {"pattern": "a"}, "b": {"pattern": "b"}}}, 1),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}], "pattern": "c"}, 3),
        ({"anyOf": [{"pattern": "a"}, {"allOf": [{"pattern": "b"}, {"format": "c"}]}], "pattern": "d"}, 3),
        ({"allOf": [{"properties": {"a": {"pattern": "a"}}}, {"properties": {"a": {"pattern": "b"}}}]}, 2),
        ({"$defs": {"d": {"pattern": "a", "$ref": "#/$defs/e"}, "e": {"pattern": "b"}}, "$ref": "#/$defs/d"}, 2),
        # A tree, as many schemas are: each node is another text.
        ({"properties": {"name": {"pattern": "a"}, "below": {"items": {"$ref": "#"}}}}, 1),
        # Written so that each round adds one more.
        ({"pattern": "a", "properties": {"b": {"allOf": [{"$ref": "#"}, {"pattern": "b"}]}}}, 2),
        ({"$ref": "https://example.org", "pattern": "a", "properties": {"b": {"pattern": "b"}}}, 3),
        ({"$defs": {"a/b": {"pattern": "x"}}, "$ref": "#/$defs/a~1b"}, 1),
        ({"properties": {"pattern": {"type": "string"}, "format": {"type": "string"}}}, 0),
    ],
)
def test_patterns_that_hold_for_one_text_are_counted(schema: dict[str, Any], count: int) -> None:
    assert joined(schema) == count


def test_a_grammar_that_takes_too_long_is_refused_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "COMPILE_TIMEOUT_S", 0.05)
    release = threading.Event()

    def forever() -> None:
        release.wait(20)

    async def scenario() -> None:
        with pytest.raises(RequestError) as caught:
            await engine.in_time(forever, "schema")
        assert (caught.value.code, caught.value.param) == ("schema_too_large", "schema")
        # The other thread is free, and steps have threads of their own.
        monkeypatch.setattr(engine, "COMPILE_TIMEOUT_S", 20.0)
        assert await engine.in_time(lambda: compiled(BYTES, {"type": "object"}), "schema") is not None

    try:
        asyncio.run(scenario())
    finally:
        release.set()
