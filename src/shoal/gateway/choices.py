"""One request, several answers at once: every choice is a session of its own, their pieces come in one stream.

`pieces` turns the tokens of one choice into text, up to a stop string or the end. `Choices` runs one of these per
choice, each in its own task: first come all admissions, then the pieces of all choices as they arrive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from shoal.errors import ShoalError
from shoal.gateway.audit import Trail
from shoal.gateway.grammar import Grammar
from shoal.gateway.reading import CallPart
from shoal.gateway.served import Served
from shoal.gateway.shape import Shape
from shoal.gateway.text import Vocabulary
from shoal.spec.sampling import Sampled, SamplingParams

Finish = Literal["stop", "length", "tool_calls"]


class AnswerBroken(ShoalError):
    """The model's side stopped without an end token and short of the asked length."""

    code = "answer_broken"


@dataclass(frozen=True, slots=True)
class Order:
    """What to generate, after all checks. `max_tokens` has one entry per prompt.

    `shape` says what an answer may look like, `grammar` holds it to that, `shown` are the special tokens that are part
    of it.
    """

    served: Served
    vocabulary: Vocabulary
    prompts: Sequence[list[int]]
    choices_per_prompt: int
    max_tokens: Sequence[int]
    params: SamplingParams
    stops: tuple[str, ...]
    ignore_eos: bool
    request_id: str
    trail: Trail
    shape: Shape = field(default_factory=Shape)
    grammar: Grammar | None = None
    shown: frozenset[int] = frozenset()

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.choices_per_prompt

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def most_tokens(self) -> int:
        """Tokens of all prompts and, at most, of all answers."""
        return self.prompt_tokens + self.choices_per_prompt * sum(self.max_tokens)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A shown token with its log-probabilities; `offset` is where its text begins in the answer, in characters."""

    offset: int
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to a choice. `text` may be empty: part of a character, or of a possible stop string."""

    choice: int
    text: str
    reports: tuple[TokenReport, ...]
    finish: Finish | None
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()


async def pieces(order: Order, choice: int) -> AsyncGenerator[Piece | None, None]:
    """The pieces of one choice, exactly one per token; the last one carries `finish`.

    None comes first when the model's side says that it has admitted the choice. Whatever way this ends, the session
    behind it is closed before it returns.
    """
    number, place = divmod(choice, order.choices_per_prompt)
    prompt, max_tokens = order.prompts[number], order.max_tokens[number]
    params = order.params
    if params.seed is not None:
        # Choices of one prompt must differ, and each must be repeatable.
        params = replace(params, seed=(params.seed + place) % 2**63)
    # A grammar knows the bytes of tokens, so the text has to be exactly these.
    words = order.vocabulary
    stream = words.stream(prompt) if order.shape.plain else words.byte_stream(order.shown)
    reader = order.shape.reader(order.stops)
    waiting: deque[tuple[int, int, Sampled]] = deque()  # reports whose text is held back: start, end, token
    made = count = 0
    generation = order.served.generate(
        prompt,
        params,
        max_tokens=max_tokens,
        ignore_eos=order.ignore_eos,
        request_id=f"{order.request_id}-{choice}",
        zones=order.trail.zones,
        on_host=order.trail.on_host,
        constraint=None if order.grammar is None else order.grammar.start(),
    )
    async with aclosing(generation) as tokens:
        async for sampled in tokens:
            if sampled is None:
                yield None
                continue
            count += 1
            finish: Finish | None = None
            ended = not order.ignore_eos and sampled.token in order.served.eos_ids
            new = "" if ended else stream.push(sampled.token)
            read = reader.push(new)
            if not ended and params.logprobs is not None:
                waiting.append((made, made + len(new), sampled))
            made += len(new)
            if not read.stopped and (ended or count == max_tokens):
                read += reader.push(stream.flush())
                if not read.stopped:
                    read += reader.flush(cut=not ended)
                finish = "length" if not ended else "tool_calls" if reader.called else "stop"
            if read.stopped:
                finish = "stop"
            reports = []
            # A report waits until all the text of its token is out; at a stop string the tokens after the cut go.
            while waiting and (waiting[0][1] <= read.settled or finish):
                start, _, token = waiting.popleft()
                if not read.stopped or start < read.settled:
                    reports.append(TokenReport(start, token))
            yield Piece(choice, read.content, tuple(reports), finish, read.reasoning, tuple(read.calls))
            if finish:
                return
    raise AnswerBroken(f"Choice {choice} ended without an end token after {count} of {max_tokens} tokens.")


class Choices:
    """Runs all choices of an order, each in its own task, and hands out their pieces in the order of arrival.

        async with Choices(order) as choices:
            await choices.admitted()          # raises what the first refused choice raised
            async for piece in choices.pieces(): ...

    Leaving the block cancels whatever still runs and waits until every session is closed.
    The queue has no bound of its own: it holds at most `max_tokens` small pieces per choice, and a bound would let
    one choice that nobody reads yet block the admission of the next.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._arrived: asyncio.Queue[Piece | asyncio.Task[None] | None] = asyncio.Queue()
        self._early: deque[Piece] = deque()  # came while another choice still waited for its admission
        self._waiting = set(range(order.choices))
        self._running = order.choices
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Choices:
        for choice in range(self._order.choices):
            task = asyncio.create_task(self._run(choice))
            task.add_done_callback(self._arrived.put_nowait)
            self._tasks.append(task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def admitted(self) -> None:
        """Wait until every choice has its place. Raises what a refused choice raised."""
        while self._waiting:
            piece = await self._next(None)
            if piece is not None:
                self._early.append(piece)

    async def pieces(self, silence_s: float | None = None) -> AsyncGenerator[Piece | None, None]:
        """Every piece of every choice; None each time that nothing came for `silence_s`.

        Raises what a choice raised.
        """
        while self._early:
            yield self._early.popleft()
        while self._running:
            try:
                piece = await self._next(silence_s)
            except _Silence:
                yield None
                continue
            if piece is not None:
                yield piece

    async def _run(self, choice: int) -> None:
        async with aclosing(pieces(self._order, choice)) as own:
            async for piece in own:
                self._waiting.discard(choice)
                self._arrived.put_nowait(piece)

    async def _next(self, silence_s: float | None) -> Piece | None:
        try:
            # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes together with an item.
            async with asyncio.timeout(silence_s):
                arrived = await self._arrived.get()
        except TimeoutError:
            raise _Silence from None
        if isinstance(arrived, asyncio.Task):
            self._running -= 1
            arrived.result()  # raises what the choice raised
            return None
        return arrived


class _Silence(Exception):
    """Nothing arrived in time. Not TimeoutError, which a choice may raise for reasons of its own."""
