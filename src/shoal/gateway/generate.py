"""POST /v1/chat/completions and /v1/completions: from the checked request to the last byte of the answer.

Headers leave only after every choice has been admitted, so a refusal has its proper status. After that an error can
only be said inside the stream: as an error object and without the final [DONE], because every client reads a stream
that just ends as a complete answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive, Scope, Send

from shoal.errors import ContextTooLong, ShoalError
from shoal.gateway.accounts import Account
from shoal.gateway.answers import ChatDialect, CompletionDialect, Dialect, usage
from shoal.gateway.audit import Audit, Trail
from shoal.gateway.chat import ChatTemplate
from shoal.gateway.choices import Choices, Order, Piece
from shoal.gateway.errors import Interrupted, RequestError, error_body, shown_to_callers
from shoal.gateway.grammar import Grammars
from shoal.gateway.limits import FAREWELL_S, ClientGone, Gate, Limits, patient, read_body, while_connected
from shoal.gateway.metrics import Metrics, RequestMeter
from shoal.gateway.openai import ChatRequest, CompletionRequest, ignored_header, read
from shoal.gateway.quotas import Bill, Quotas
from shoal.gateway.replies import PING, STREAM_HEADERS, event, send_end, send_json, send_part, send_start
from shoal.gateway.served import Served
from shoal.gateway.shape import Shape
from shoal.gateway.text import Vocabulary

logger = logging.getLogger("shoal.gateway")

_DONE = b"data: [DONE]\n\n"


class OfferedModel:
    """A served model with what the gateway derives from it once: its vocabulary, its chat template, its grammars."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.vocabulary = Vocabulary(served.tokenizer)
        self.template = ChatTemplate(served.tokenizer, served.name)
        self.grammars = Grammars(self.vocabulary, served.eos_ids)
        self._ends = [self.vocabulary.token_bytes(token).decode(errors="replace") for token in served.eos_ids]

    def chat(self, request: ChatRequest) -> Chat:
        """The prompt, and what its answer may look like. Takes long enough to stall the streams of everybody else, so
        not in the event loop. Raises RequestError."""
        text = self.template.render(request.messages, request.definitions(), ends=self._ends)
        # The template writes the special tokens itself.
        prompt = self.encode(text, "messages", add_special_tokens=False)
        tags, reasoning = self.template.tags(text)
        calling = request.calling
        calls = self.template.call_format(self._ends) if calling else None
        shape = Shape(request.form, calling, calls, tags, reasoning)
        return Chat(prompt, shape, shape.shown(self.grammars))

    def prompts(self, request: CompletionRequest) -> list[list[int]]:
        return [
            self.encode(prompt, "prompt", add_special_tokens=True) if isinstance(prompt, str) else prompt
            for prompt in request.prompts()
        ]

    def answer_lengths(self, prompts: Sequence[list[int]], limit: int | None, default: int) -> list[int]:
        """Most tokens to generate for each prompt. Raises ContextTooLong before anything is started."""
        lengths = []
        for prompt in prompts:
            if not prompt:
                raise RequestError("The prompt has no tokens.", param="prompt")
            room = self.served.context_length - len(prompt)
            wanted = limit or min(default, max(room, 1))
            if wanted > room:
                raise ContextTooLong(
                    f"This model's maximum context length is {self.served.context_length} tokens. However, you "
                    f"requested {len(prompt) + wanted} tokens ({len(prompt)} in the prompt, "
                    f"{wanted} in the completion).",
                    hint="Shorten the prompt or ask for fewer tokens.",
                )
            lengths.append(wanted)
        return lengths

    def encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """A text of the request as token ids; `param` is the field it stands in."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("The text holds half of a surrogate pair.", param=param) from error
        return self.vocabulary.encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that is ready to be answered: its prompt in tokens, and what Order says of the answer."""

    prompt: list[int]
    shape: Shape
    shown: frozenset[int]


@dataclass(frozen=True, slots=True)
class Generator:
    """Both generation endpoints of one gateway."""

    models: Mapping[str, OfferedModel]
    limits: Limits
    metrics: Metrics
    gate: Gate
    quotas: Quotas
    audit: Audit

    async def chat(self, scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        """POST /v1/chat/completions."""
        with self.gate.enter():
            body = await read_body(scope, receive, self.limits)
            request, ignored = read(body, ChatRequest)
            model = self.pick(request.model, account)
            request.check(model.vocabulary.size)
            order = await self.chat_order(scope, request, model, account)
            dialect = ChatDialect(
                model.served.name,
                order.request_id,
                model.vocabulary,
                logprobs=request.alternatives is not None,
                plain=order.shape.only_content,
            )
            await self._deliver(_Delivery(order, dialect, request, ignored), account, scope, receive, send)

    async def completion(self, scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        """POST /v1/completions."""
        with self.gate.enter():
            body = await read_body(scope, receive, self.limits)
            request, ignored = read(body, CompletionRequest)
            model = self.pick(request.model, account)
            request.check(model.vocabulary.size)
            prompts = await asyncio.to_thread(model.prompts, request)
            order = self.order(scope, request, model, prompts, account)
            dialect = CompletionDialect(
                model.served.name, order.request_id, model.vocabulary, alternatives=request.alternatives
            )
            await self._deliver(_Delivery(order, dialect, request, ignored), account, scope, receive, send)

    def pick(self, name: str, account: Account) -> OfferedModel:
        """The model of that name. Raises RequestError: 403 not for this key (existing or not), 404 unknown."""
        if not account.may_use(name):
            raise RequestError(
                "This key may not use the model.", param="model", code="model_not_allowed", status=403,
                hint="GET /v1/models lists what it may use.",
            )  # fmt: skip
        model = self.models.get(name)
        if model is None:
            raise RequestError(
                f"The model {name[:100]!r} does not exist here.", param="model", code="model_not_found", status=404,
                hint="GET /v1/models lists the models.",
            )  # fmt: skip
        return model

    async def chat_order(self, scope: Scope, request: ChatRequest, model: OfferedModel, account: Account) -> Order:
        """What to generate for a chat. Raises RequestError, also for a schema that no answer can be held to."""
        chat = await asyncio.to_thread(model.chat, request)
        order = self.order(scope, request, model, [chat.prompt], account)
        grammar = await chat.shape.grammar(model.grammars)
        return replace(order, shape=chat.shape, grammar=grammar, shown=chat.shown)

    def order(
        self,
        scope: Scope,
        request: ChatRequest | CompletionRequest,
        model: OfferedModel,
        prompts: list[list[int]],
        account: Account,
    ) -> Order:
        return Order(
            served=model.served,
            vocabulary=model.vocabulary,
            prompts=prompts,
            choices_per_prompt=request.choices,
            max_tokens=model.answer_lengths(prompts, request.limit, self.limits.default_chat_tokens),
            params=request.sampling(model.vocabulary.size, request.alternatives),
            stops=request.stops,
            ignore_eos=bool(request.ignore_eos),
            request_id=scope["state"]["request_id"],
            trail=self.audit.trail(scope["state"]["request_id"], account, model.served),
        )

    async def _deliver(self, delivery: _Delivery, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        work = _stream if delivery.request.stream else _answer
        order = delivery.order
        async with self.metered(order.most_tokens, account, order.trail, scope) as (meter, bill):
            sending = bill.before_the_end(patient(send, self.limits))
            await while_connected(receive, work(delivery, meter, self.limits, sending))

    @asynccontextmanager
    async def metered(
        self, most_tokens: int, account: Account, trail: Trail, scope: Scope
    ) -> AsyncIterator[tuple[RequestMeter, Bill]]:
        """Measures, bills and logs what the block does. Raises QuotaExceeded before anything begins, for a request that
        may use more than its key may, and what the audit log raises when it cannot be written."""
        state = scope["state"]
        with self.metrics.request() as meter:
            try:
                await self.audit.ready()
                with self.quotas.bill(account, meter, most_tokens, trail) as bill:
                    state["headers"].update(self.quotas.token_headers(account))
                    yield meter, bill
            except ShoalError as error:
                meter.failed(error.code)
                raise
            except ClientGone:
                meter.failed("client_gone")
                raise
            except BaseException:
                meter.failed(Interrupted.code)
                raise
            finally:
                state["failed"] = meter.error is not None
                await trail.end(meter)


@dataclass(frozen=True, slots=True)
class _Delivery:
    """An order and how its answer is to be worded and sent."""

    order: Order
    dialect: Dialect
    request: ChatRequest | CompletionRequest
    ignored: list[str]

    @property
    def headers(self) -> dict[str, str]:
        headers = {"x-shoal-ignored": ignored_header(self.ignored)} if self.ignored else {}
        calls = self.order.shape.calls
        # Native or described changes how well a model calls, so that whoever wonders can see it.
        return headers if calls is None or calls.native else {**headers, "x-shoal-tools": "described"}


async def _answer(delivery: _Delivery, meter: RequestMeter, limits: Limits, send: Send) -> None:
    """Generate everything, then send one JSON object."""
    order = delivery.order
    kept: list[list[Piece]] = [[] for _ in range(order.choices)]
    async with Choices(order) as choices:
        await choices.admitted()
        meter.admitted(order.prompt_tokens)
        async with aclosing(choices.pieces()) as arriving:
            async for piece in arriving:
                if piece is not None:
                    count(piece, meter)
                    kept[piece.choice].append(piece)
    answer = {
        **delivery.dialect.envelope(stream=False),
        "choices": [delivery.dialect.whole(pieces) for pieces in kept],
        "usage": usage(order.prompt_tokens, sum(map(len, kept))),
    }
    await send_json(send, answer, delivery.headers)


async def _stream(delivery: _Delivery, meter: RequestMeter, limits: Limits, send: Send) -> None:
    """Send every piece as a chunk of its own, as it comes."""
    async with Choices(delivery.order) as choices:
        await choices.admitted()
        meter.admitted(delivery.order.prompt_tokens)
        await send_start(send, 200, {**STREAM_HEADERS, **delivery.headers})

        async def tell(error: ShoalError) -> None:
            await send_end(send, event(error_body(error)))

        async with told_in_stream(tell, meter, delivery.order.request_id):
            await _send_chunks(delivery, choices, meter, limits, send)


@asynccontextmanager
async def told_in_stream(
    tell: Callable[[ShoalError], Awaitable[None]], meter: RequestMeter, request_id: str
) -> AsyncIterator[None]:
    """For a stream that has begun: what fails inside the block is told to the client by `tell`."""
    try:
        yield
    except ShoalError as error:
        if not shown_to_callers(error):
            logger.error("request %s: %s", request_id, error)
        meter.failed(error.code)
        await tell(error)
    except ClientGone:
        raise
    except BaseException as error:
        # A fault of ours, or the gateway stops: the client must not take what it has for the whole answer.
        # When it was the client that left, this is sent to nobody; when it reads no more, nobody waits for it.
        meter.cut = True
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await tell(Interrupted(type(error).__name__))
        raise


async def _send_chunks(delivery: _Delivery, choices: Choices, meter: RequestMeter, limits: Limits, send: Send) -> None:
    order, dialect = delivery.order, delivery.dialect
    envelope = dialect.envelope(stream=True)
    # With include_usage every chunk has the field, null until the last; without it no chunk has.
    extra: dict[str, Any] = {"usage": None} if delivery.request.include_usage else {}

    async def send_choice(entry: dict[str, Any]) -> None:
        await send_part(send, event({**envelope, "choices": [entry], **extra}))

    for choice in range(order.choices):
        opening = dialect.opening(choice)
        if opening is not None:
            await send_choice(opening)
    tokens = 0
    async with aclosing(choices.pieces(limits.ping_s)) as arriving:
        async for piece in arriving:
            if piece is None:
                await send_part(send, PING)
                continue
            tokens += 1
            count(piece, meter)
            await send_choice(dialect.delta(piece))
    last = b""
    if delivery.request.include_usage:
        last = event({**envelope, "choices": [], "usage": usage(order.prompt_tokens, tokens)})
    await send_end(send, last + _DONE)


def count(piece: Piece, meter: RequestMeter) -> None:
    meter.token(piece.choice)
    if piece.finish:
        meter.finished(piece.finish)
