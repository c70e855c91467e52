"""What the answer to one chat may look like: text, JSON, calls of tools, reasoning before them.

From it follow the grammar that the answer is held to and the reader that takes it apart again. An answer that may be
any text has no grammar, so it costs nothing and is exactly what it is without this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.gateway.calls import ID_CHARS, CallFormat, Tags
from shoal.gateway.errors import RequestError
from shoal.gateway.grammar import Grammar, Grammars, in_time, quoted
from shoal.gateway.openai import Calling
from shoal.gateway.reading import AnswerReader
from shoal.gateway.schemas import Schema

MAX_CALLS = 32
"""Calls in one answer; a model that is unsure goes on calling."""

_ANY = "/(?s:.*)/"


@dataclass(frozen=True, slots=True)
class Shape:
    """`form`: what content must keep to. `calling` and `calls`: what may be called, and how the model writes it.
    `tags`: around reasoning; `reasoning`: the prompt has opened it already."""

    form: Schema | None = None
    calling: Calling | None = None
    calls: CallFormat | None = None
    tags: Tags | None = None
    reasoning: bool = False

    @property
    def plain(self) -> bool:
        """The answer may be any text, and all of it is content."""
        return self.form is None and self.only_content

    @property
    def only_content(self) -> bool:
        """Nothing of the answer is anything else than content."""
        return self.calling is None and self.tags is None

    def reader(self, stops: Sequence[str]) -> AnswerReader:
        calls = self.calls if self.calling else None
        return AnswerReader(stops, calls=calls, tags=self.tags, reasoning=self.reasoning)

    def shown(self, grammars: Grammars) -> frozenset[int]:
        """Special tokens that the reader has to see."""
        texts = [*(self.calls.literals if self.calls and self.calling else ())]
        texts += [self.tags.open, self.tags.close] if self.tags else []
        return grammars.special_ids(texts)

    async def grammar(self, grammars: Grammars) -> Grammar | None:
        """What the answer is held to; None for any text. Raises RequestError (400) when a schema cannot be kept to."""
        if self.form is None and self.calling is None:
            return None
        schemas = [self.form] if self.form else []
        schemas += [callee.arguments for callee in self.calling.functions] if self.calling else []
        return await in_time(lambda: self.compiled(grammars, schemas), schemas[0].param)

    def compiled(self, grammars: Grammars, schemas: Sequence[Schema]) -> Grammar:
        """The grammar, in milliseconds; not in the event loop."""
        # A schema that refers to itself without end compiles. By itself it allows no token, which is noticed; as a part
        # it would be a dead end in the middle of an answer.
        for schema in schemas:
            if schema.refers:
                grammars.check(schema)
        return grammars.compile("\n".join(_Rules(self, grammars).lines()), schemas)


class _Rules:
    """The rules of a shape, in llguidance's dialect of Lark."""

    def __init__(self, shape: Shape, grammars: Grammars) -> None:
        self._shape = shape
        self._grammars = grammars
        self._literal = grammars.literal

    def lines(self) -> list[str]:
        shape = self._shape
        lines = [f"TEXT: {_ANY}", self._free()]
        # Special tokens that a free text may hold like any other; those of the format mean what they mean there.
        others = self._grammars.free_special_ids(shape.shown(self._grammars))
        lines.append(f"others: (FREE <[{','.join(map(str, others))}]>)*" if others else 'others: ""')
        start = "answer"
        if shape.tags is not None:
            lines += self._reasoning(shape.tags)
            start = (
                "reasoned answer" if shape.reasoning else f"answer | {self._literal(shape.tags.open)} reasoned answer"
            )
        if shape.form is not None:
            lines.append(f"json: {shape.form.rule()}")
        if shape.calling is not None:
            lines += self._calls(shape.calling)
        else:
            lines.append("answer: json")
        return [f"start: {start}", *lines]

    def _reasoning(self, tags: Tags) -> list[str]:
        """Everything up to the closing tag, and the white space behind it."""
        space = r"/[ \n]{1,8}/?"
        if self._grammars.special_ids([tags.close]):
            return [f"reasoned: others TEXT {self._literal(tags.close)} {space}"]
        return [f"reasoned: others thought {space}", f"thought[lazy]: TEXT {quoted(tags.close)}"]

    def _calls(self, calling: Calling) -> list[str]:
        form = self._shape.calls
        assert form is not None
        lines = [
            f"callee_{number}: {self._literal(callee.name + form.middle)} arguments_{number}"
            for number, callee in enumerate(calling.functions)
        ]
        lines += [f"arguments_{n}: {callee.arguments.rule()}" for n, callee in enumerate(calling.functions)]
        lines.append("callee: " + " | ".join(f"callee_{number}" for number in range(len(calling.functions))))
        more = ""
        if calling.parallel and form.between is not None:
            more = f"({self._around_ids(form.between)} callee){{0,{MAX_CALLS - 1}}}"
        behind = f"callee {more} {self._around_ids(form.closing)}"
        if calling.required:
            return [*lines, f"answer: {self._literal(form.opening)} {behind}"]
        marker = form.marker
        if self._shape.form is not None:
            if marker is None:
                raise RequestError(
                    "This model writes calls as JSON, so an answer that may be a call cannot be other JSON as well.",
                    param="response_format",
                    code="unsupported_parameter",
                    hint="Leave out response_format, or demand a call with tool_choice.",
                )
            return [*lines, f"answer: json | {self._literal(form.opening)} {behind}"]
        if marker is None:
            return [*lines, f"answer: others FREE | {self._literal(form.opening)} {behind}"]
        at = form.opening.find(marker) + len(marker)
        rest = self._literal(form.opening[at:])
        if self._grammars.special_ids([marker]):
            head = f"head: FREE {self._literal(marker)}"
        else:
            head = f"head[lazy]: FREE {quoted(marker)}"
        return [*lines, head, f"answer: others FREE | others head {rest} {behind}"]

    def _free(self) -> str:
        """Free text: anything that does not begin like something else. (A marker inside it ends it.)"""
        shape, begins = self._shape, []
        if shape.calling is not None and shape.calls is not None and shape.calls.marker is None:
            begins.append(shape.calls.opening)
        if shape.tags is not None and not shape.reasoning:
            begins.append(shape.tags.open)
        begins = [text for text in begins if not self._grammars.special_ids([text])]
        return f"FREE: {_ANY}" + "".join(f" & ~({quoted(text)} {_ANY})" for text in begins)

    def _around_ids(self, pieces: Sequence[str]) -> str:
        return f" /[a-zA-Z0-9]{{{ID_CHARS}}}/ ".join(self._literal(piece) for piece in pieces if piece)
