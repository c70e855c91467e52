"""Answers that keep to a grammar: JSON schemas and call formats as grammars, and what they allow token by token.

The grammar engine is llguidance. A grammar is compiled in a thread before an answer begins, so that what cannot be
compiled is refused with a proper status. Then every generation has a `Constraint` of its own: when a token is chosen,
a thread computes which tokens may follow it, while the servers compute their blocks.

What a stranger may ask for is bounded: by what schemas may hold (schemas.py), by the work of compiling and of every
step inside the engine (`_LIMITS`), and by the few threads that do it, which are nobody else's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from shoal.errors import ShoalError
from shoal.gateway.errors import RequestError
from shoal.gateway.schemas import Schema, plain, unsupported
from shoal.gateway.text import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms of compiling
    "step_lexer_fuel": 200_000,  # about 15 ms of one step
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # 1-2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}

COMPILE_TIMEOUT_S = 10.0
"""A grammar that has not been compiled by then is refused. Its thread goes on until it is done, so that two of them at
most are kept from others; answers without a grammar need none."""
_THREADS = 2


class GrammarBroken(ShoalError):
    """The grammar of a running answer cannot go on: a step is too much work, or no token fits."""

    code = "grammar_broken"


class Grammars:
    """The grammar engine for one vocabulary. Methods may run in any thread; `compile` takes milliseconds, the first
    one of a model up to a second."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._building = Lock()
        names = {id: vocabulary.token_bytes(id).decode(errors="replace") for id in vocabulary.special}
        self._special_by_text = {name: id for id, name in names.items() if name}

    def compile(self, rules: str, schemas: Sequence[Schema]) -> Grammar:
        """`rules` in llguidance's dialect of Lark, in which `schemas` are used. Raises RequestError (400)."""
        if not self._eos_ids:
            raise RequestError("This model has no end token, so no grammar can end its answer.", param="model")
        failure = self._try(rules)
        if isinstance(failure, Grammar):
            return failure
        # Which of the schemas is it?
        for schema in schemas if len(schemas) > 1 else ():
            alone = self._try(f"start: {schema.rule()}")
            if not isinstance(alone, Grammar):
                raise unsupported(alone, schema.param)
        raise unsupported(failure, schemas[0].param if schemas else None)

    def check(self, schema: Schema) -> None:
        """Raises RequestError when the schema cannot be compiled, or nothing fits it."""
        failure = self._try(f"start: {schema.rule()}", alone=True)
        if not isinstance(failure, Grammar):
            raise unsupported(failure, schema.param)

    def literal(self, text: str) -> str:
        """`text` as part of a rule: special tokens in it are tokens, the rest is text."""
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else quoted(part) for part in self.split(text) if part != ""
        )

    def split(self, text: str) -> Iterator[str | int]:
        """Text and special tokens in turn; text may be empty."""
        while True:
            found = [(at, -len(name), id) for name, id in self._special_by_text.items() if (at := text.find(name)) >= 0]
            if not found:
                yield text
                return
            at, length, id = min(found)  # the first one; the longest of those that begin there
            yield text[:at]
            yield id
            text = text[at - length :]

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens that the texts contain."""
        return frozenset(part for text in texts for part in self.split(text) if isinstance(part, int))

    def free_special_ids(self, taken: frozenset[int]) -> list[int]:
        """Special tokens that may stand anywhere in free text: no end tokens and none that means something else."""
        return sorted(self._vocabulary.special - self._eos_ids - taken)

    def _try(self, rules: str, *, alone: bool = False) -> Grammar | str:
        """The grammar, or why it is none. `alone`: nothing else is allowed, not even a first space."""
        from llguidance import LLMatcher, LLParserLimits

        if self._vocabulary.starts_with_space and not alone:
            rules = rules.replace("start:", 'start: " "? spaced\nspaced:', 1)
        matcher = LLMatcher(self._tokenizer, rules, log_level=0, limits=LLParserLimits(**_LIMITS))
        # The first step as well: a schema that nothing fits compiles, and then allows no token.
        first = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error()
        if not any(first):
            return "nothing fits it"
        return Grammar(matcher, first)

    @property
    def _tokenizer(self) -> LLTokenizer:
        with self._building:
            return self._built

    @cached_property
    def _built(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        words = _Words(self._vocabulary, self._eos_ids)
        return LLTokenizer(TokenizerWrapper(words), eos_token=sorted(self._eos_ids))


class Grammar:
    """A compiled grammar; every generation starts its own constraint from it."""

    def __init__(self, matcher: LLMatcher, first: bytes) -> None:
        self._matcher = matcher
        self._first = first

    def start(self) -> Running:
        return Running(self._matcher.deep_copy(), self._first)


class Running:
    """A grammar under way in one generation: `spec.sampling.Constraint`."""

    def __init__(self, matcher: LLMatcher, first: bytes) -> None:
        self._matcher = matcher
        self._step: Future[bytes] = Future()
        self._step.set_result(first)

    def ready(self, then: Callable[[], None]) -> bool:
        if self._step.done():
            return True
        self._step.add_done_callback(lambda step: then())
        return False

    def mask(self) -> bytes:
        return self._step.result()

    def accept(self, token: int) -> None:
        self._step = _pool("step").submit(self._next, token, self._step)

    def _next(self, token: int, before: Future[bytes]) -> bytes:
        before.result()  # usually long done, since a token is chosen by its mask; the matcher takes one call at a time
        matcher = self._matcher
        matcher.consume_token(token)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error() or not any(mask):
            raise GrammarBroken(f"The grammar of the answer cannot go on: {plain(matcher.get_error())}.")
        return mask


class _Words:
    """The vocabulary as llguidance wants it."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        size = max(vocabulary.size, *(id + 1 for id in eos_ids))
        self.tokens = [vocabulary.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(vocabulary.special | eos_ids)
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = None
        self._encode = vocabulary.encode
        special = set(self.special_token_ids)
        self._ids = {data: token for token, data in enumerate(self.tokens) if data and token not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """The tokens that the tokenizer itself would make of `text`, so that fixed parts of an answer look to the model
        as they did in its training. Takes no bytes (TypeError), which is how the engine finds out."""
        if isinstance(text, bytes):
            raise TypeError("text, not bytes")
        data = text.encode()
        tokens = self._encode(text, add_special_tokens=False)
        if self._bytes(tokens) == data:
            return tokens
        # SentencePiece puts a space before the first word; behind a character of its own that word is not the first.
        tokens = self._encode("\x02" + text, add_special_tokens=False)
        for place in range(min(len(tokens), 4)):
            if self._bytes(tokens[place:]) == data:
                return tokens[place:]
        return self._greedy(data)

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in tokens)

    def _greedy(self, data: bytes) -> list[int]:
        tokens = []
        while data:
            length = next(
                (length for length in range(min(len(data), self._longest), 0, -1) if data[:length] in self._ids), 0
            )
            if not length:
                break  # no token for this byte: the engine takes what there is
            tokens.append(self._ids[data[:length]])
            data = data[length:]
        return tokens


async def in_time(compile: Callable[[], Grammar | None], param: str | None) -> Grammar | None:
    """compile(), in one of the threads that are for it alone. Raises what it raises, and RequestError when it takes too
    long."""
    loop = asyncio.get_running_loop()
    try:
        return await asyncio.wait_for(loop.run_in_executor(_pool("compile"), compile), COMPILE_TIMEOUT_S)
    except TimeoutError as error:
        raise RequestError(
            f"The schema was not compiled within {COMPILE_TIMEOUT_S:g} s.",
            param=param,
            code="schema_too_large",
            hint="Ask for something simpler, or try again when the gateway has less to do.",
        ) from error


def quoted(text: str) -> str:
    """A string of the grammar language."""
    return json.dumps(text, ensure_ascii=False)


_POOLS: dict[str, ThreadPoolExecutor] = {}


def _pool(name: str) -> ThreadPoolExecutor:
    """Threads for one purpose, started with its first job."""
    if name not in _POOLS:
        _POOLS[name] = ThreadPoolExecutor(_THREADS, f"grammar-{name}")
    return _POOLS[name]
