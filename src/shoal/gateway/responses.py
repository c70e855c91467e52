"""POST /v1/responses: OpenAI's newer endpoint, as far as it is text in and text out.

A request becomes a chat request and is generated like one, also held to a schema; only its fields and the shape of its
answer differ. Nothing is stored, so answers cannot be fetched or referred to later. What would need storage, tools or
other media is refused.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.types import Receive, Scope, Send

from shoal.errors import ShoalError
from shoal.gateway.accounts import Account
from shoal.gateway.choices import Choices, Order, Piece
from shoal.gateway.errors import RequestError, error_body
from shoal.gateway.generate import Generator, count, told_in_stream
from shoal.gateway.limits import Limits, patient, read_body, while_connected
from shoal.gateway.metrics import RequestMeter
from shoal.gateway.openai import (
    ChatRequest,
    JsonSchemaFormat,
    Message,
    ResponseFormat,
    TextPart,
    ignored_header,
    not_offered,
    read,
)
from shoal.gateway.replies import PING, STREAM_HEADERS, event, send_end, send_json, send_part, send_start

_TEXT_PARTS = ("input_text", "output_text", "text")


class InputMessage(msgspec.Struct):
    """One item of the input. Only messages can be read; items of other types are named in the refusal."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None

    def check(self, param: str) -> None:
        if self.type != "message":
            raise RequestError(
                f"An input item of type {self.type[:40]!r} cannot be read.", param=f"{param}.type",
                code="unsupported_content", hint="Send messages with text.",
            )  # fmt: skip
        for name, value in (("role", self.role), ("content", self.content)):
            if value is None:
                raise RequestError(f"A message needs {name}.", param=f"{param}.{name}", code="missing_field")
        for place, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if part.type not in _TEXT_PARTS or part.text is None:
                raise RequestError(
                    f"A content part of type {part.type[:40]!r} cannot be read: this model reads text.",
                    param=f"{param}.content[{place}]",
                    code="unsupported_content",
                    hint='Send {"type": "input_text", "text": "..."}.',
                )

    def message(self) -> Message:
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text or "" for part in content)
        return Message(role=self.role or "user", content=content)


class TextFormat(msgspec.Struct):
    """What the answer's text must be; the fields of chat's `response_format`, one level higher."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    def chat(self) -> ResponseFormat:
        if self.type != "json_schema":
            return ResponseFormat(self.type)
        return ResponseFormat(self.type, JsonSchemaFormat(self.name or "answer", self.schema, self.strict))

    def shown(self) -> dict[str, Any]:
        fields = {"name": self.name, "schema": self.schema, "strict": self.strict}
        return {"type": self.type, **({} if self.type != "json_schema" else fields)}


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[InputMessage], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    # Not stored whatever it says, and the answer says so: OpenAI's packages leave it out, which would mean true.
    store: bool | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    truncation: str | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    include: list[str] | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        """Raises RequestError for what cannot be read, and for what is not offered and would change the answer."""
        for place, item in enumerate(self.input if isinstance(self.input, list) else ()):
            item.check(f"input[{place}]")
        if self.tools:
            raise not_offered("tools", "Tools are offered by /v1/chat/completions only.")
        for param, reason in (
            ("previous_response_id", "Answers are not stored; send the whole conversation as input."),
            ("conversation", "Conversations are not stored; send the whole conversation as input."),
            ("prompt", "Prompts are not stored; send the text as input."),
            ("background", "Answers are not stored, so they cannot be fetched later."),
            ("include", "Nothing beside the text is offered."),
            ("top_logprobs", "Log-probabilities are offered by /v1/chat/completions only."),
        ):
            if getattr(self, param):
                raise not_offered(param, reason)
        if self.truncation not in (None, "disabled"):
            raise not_offered("truncation", "An input that is too long is refused, not cut.")

    def chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions."""
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [item.message() for item in self.input]
        return ChatRequest(
            model=self.model,
            messages=messages,
            stream=self.stream,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self.format.chat(),
        )

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat("text")


class Responder:
    """The endpoint; it shares models, limits and quotas with the chat endpoint."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def respond(self, scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        """POST /v1/responses."""
        generator = self._generator
        with generator.gate.enter():
            body = await read_body(scope, receive, generator.limits)
            request, ignored = read(body, ResponseRequest)
            request.check()
            model = generator.pick(request.model, account)
            chat = request.chat()
            try:
                chat.check(model.vocabulary.size)
                order = await generator.chat_order(scope, chat, model, account)
            except RequestError as error:
                # The chat endpoint's name for it; here it stands elsewhere.
                error.param = (error.param or "").replace("response_format.json_schema", "text.format") or None
                raise
            headers = {"x-shoal-ignored": ignored_header(ignored)} if ignored else {}
            wording = _Wording(request, order)
            async with generator.metered(order.most_tokens, account, order.trail, scope) as (meter, bill):
                sending = bill.before_the_end(patient(send, generator.limits))
                work = _stream if request.stream else _answer
                await while_connected(receive, work(order, wording, meter, generator.limits, headers, sending))


class _Wording:
    """One answer in the shapes of this endpoint, and the events that tell it piece by piece."""

    def __init__(self, request: ResponseRequest, order: Order) -> None:
        self._request = request
        self._order = order
        self._created = int(time.time())
        self._text: list[str] = []
        self._tokens = 0
        self._reasoning_tokens = 0
        self._finish = ""
        self._sequence = 0
        self._item_id = f"msg_{order.request_id}"

    def add(self, piece: Piece) -> None:
        """One token's part of the answer. What a model thinks to itself is counted, not shown."""
        self._text.append(piece.text)
        self._tokens += 1
        self._reasoning_tokens += bool(piece.reasoning)
        self._finish = piece.finish or ""

    @property
    def complete(self) -> bool:
        """The model ended by itself; else the longest allowed answer was cut there."""
        return self._finish == "stop"

    def response(self, *, ended: bool) -> dict[str, Any]:
        """The response object, before its first token or after its last."""
        request = self._request
        status = ("completed" if self.complete else "incomplete") if ended else "in_progress"
        return {
            "id": f"resp_{self._order.request_id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._order.served.name,
            "output": [self._item(ended=True)] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._order.params.temperature,
            "text": {"format": request.format.shown()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._order.params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }

    def beginning(self) -> bytes:
        """The events before the first token."""
        response, item = self.response(ended=False), self._item(ended=False)
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._place(), part=self._part(""))
        )

    def delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self) -> bytes:
        """The events after the last token."""
        text = "".join(self._text)
        last = "response.completed" if self.complete else "response.incomplete"
        return (
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=self._part(text))
            + self._event("response.output_item.done", output_index=0, item=self._item(ended=True))
            + self._event(last, response=self.response(ended=True))
        )

    def broken(self, error: ShoalError) -> bytes:
        """The event of an answer that cannot go on: OpenAI's fields, and the error object that makes packages raise."""
        body = error_body(error)
        fields = {name: body["error"][name] for name in ("code", "message", "param")}
        return self._event("error", **fields, **body)

    def _item(self, *, ended: bool) -> dict[str, Any]:
        status = ("completed" if self.complete else "incomplete") if ended else "in_progress"
        content = [self._part("".join(self._text))] if ended else []
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self._order.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": self._order.prompt_tokens + self._tokens,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        made = event({"type": kind, "sequence_number": self._sequence, **fields}, kind)
        self._sequence += 1
        return made


async def _answer(
    order: Order, wording: _Wording, meter: RequestMeter, limits: Limits, headers: dict[str, str], send: Send
) -> None:
    """Generate everything, then send one JSON object."""
    async with Choices(order) as choices:
        await choices.admitted()
        meter.admitted(order.prompt_tokens)
        async with aclosing(choices.pieces()) as arriving:
            async for piece in arriving:
                if piece is not None:
                    count(piece, meter)
                    wording.add(piece)
    await send_json(send, wording.response(ended=True), headers)


async def _stream(
    order: Order, wording: _Wording, meter: RequestMeter, limits: Limits, headers: dict[str, str], send: Send
) -> None:
    """Send every piece as an event of its own, as it comes."""
    async with Choices(order) as choices:
        await choices.admitted()
        meter.admitted(order.prompt_tokens)
        await send_start(send, 200, {**STREAM_HEADERS, **headers})

        async def tell(error: ShoalError) -> None:
            await send_end(send, wording.broken(error))

        async with told_in_stream(tell, meter, order.request_id):
            await send_part(send, wording.beginning())
            async with aclosing(choices.pieces(limits.ping_s)) as arriving:
                async for piece in arriving:
                    if piece is None:
                        await send_part(send, PING)
                        continue
                    count(piece, meter)
                    wording.add(piece)
                    if piece.text:
                        await send_part(send, wording.delta(piece.text))
            await send_end(send, wording.end())
