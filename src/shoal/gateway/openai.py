"""The requests of OpenAI's API that the gateway takes: fields, types, ranges, and which field a complaint is about.

An explicit null means the same as an absent field. A field that is not declared here is accepted and left alone;
`ignored` names it, and the answer lists it in `x-shoal-ignored`. A field that would change the meaning of the answer
and is not offered (tools, JSON mode, echo) is refused, because ignoring it would be a wrong answer.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shoal.gateway.errors import RequestError
from shoal.spec.sampling import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024  # each costs a little at every token
MAX_CHOICES = 32
MAX_INPUTS = 2048  # OpenAI's bound, which packages count on when they cut their batches
MAX_EMBEDDED_VALUES = 2**23  # of all vectors of an answer: 160 MB of JSON
MAX_IGNORED_SHOWN = 20
DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI's legacy endpoint gives when nothing is asked

_Count = Annotated[int, Meta(ge=1, le=2**31)]
_Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
_Token = Annotated[int, Meta(ge=0, le=2**31)]


class TextPart(msgspec.Struct):
    """One part of a message's content. Only text parts can be read; others are named in the refusal."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def check(self, param: str) -> None:
        if self.content is None and not self.tool_calls:
            raise RequestError("A message needs content.", param=f"{param}.content", code="missing_field")
        for place, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"A content part of type {part.type[:40]!r} cannot be read: this model reads text.",
                    param=f"{param}.content[{place}]",
                    code="unsupported_content",
                    hint='Send {"type": "text", "text": "..."}.',
                )

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: one string of content, arguments of tool calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text or "" for part in content)
        plain: dict[str, Any] = {
            "role": self.role,
            "content": content,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        if self.tool_calls:
            plain["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        return {name: value for name, value in plain.items() if value is not None or name == "content"}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class _Request(msgspec.Struct, kw_only=True):
    """The fields that both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, _Bias], Meta(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = None

    def check(self, vocabulary_size: int) -> None:
        """Raises RequestError for what the types alone do not say."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        self.bias(vocabulary_size)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def bias(self, vocabulary_size: int) -> tuple[tuple[int, float], ...]:
        """The checked `logit_bias`: token ids of this vocabulary and what to add to their logits."""
        pairs = []
        for name, value in (self.logit_bias or {}).items():
            # Checked as text first: int() takes underscores and foreign digits, and is slow on a million of them.
            if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= vocabulary_size:
                raise RequestError(
                    f"logit_bias names {name[:20]!r}, which is no token id of this model (0 to {vocabulary_size - 1}).",
                    param="logit_bias",
                )
            pairs.append((int(name), value))
        return tuple(pairs)

    def sampling(self, vocabulary_size: int, alternatives: int | None) -> SamplingParams:
        """What the sampler is told; `alternatives` is the number of likeliest tokens to report, None for none."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.bias(vocabulary_size),
            logprobs=alternatives,
        )


class ChatRequest(_Request, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    def check(self, vocabulary_size: int) -> None:
        super().check(vocabulary_size)
        for place, message in enumerate(self.messages):
            message.check(f"messages[{place}]")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "max_tokens and max_completion_tokens say different things.",
                param="max_tokens",
                hint="Send only max_completion_tokens.",
            )
        if self.tools or self.functions:
            raise not_offered("tools" if self.tools else "functions", "Tool calls are not offered.")
        if self.response_format is not None and self.response_format.type != "text":
            raise not_offered("response_format", "Only answers of type text are offered.")
        if self.modalities not in (None, [], ["text"]):
            raise not_offered("modalities", "Only text is offered.")

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request, kw_only=True):
    """POST /v1/completions. `ignore_eos` is an extension: generate exactly `max_tokens` tokens."""

    prompt: str | Annotated[list[str | _Token | list[_Token]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self, vocabulary_size: int) -> None:
        super().check(vocabulary_size)
        prompts = self.prompts()
        if len(prompts) * self.choices > MAX_CHOICES:
            raise RequestError(
                f"Prompts times n is more than {MAX_CHOICES}.", param="prompt", hint="Send several requests."
            )
        for tokens in prompts:
            if not isinstance(tokens, str) and any(token >= vocabulary_size for token in tokens):
                raise RequestError(f"A prompt holds token ids above {vocabulary_size - 1}.", param="prompt")
        if self.echo:
            raise not_offered("echo", "Repeating the prompt is not offered.")
        if self.suffix:
            raise not_offered("suffix", "Text after the completion is not offered.")
        if self.best_of is not None and self.best_of != self.choices:
            raise not_offered("best_of", "Every choice that is generated is returned.")

    def prompts(self) -> list[str | list[int]]:
        """One prompt per entry, as text or as token ids. Raises RequestError for a mixture."""
        return entries(self.prompt, "prompt")

    @property
    def limit(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings."""

    model: str
    input: str | Annotated[list[str | _Token | list[_Token]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Count | None = None

    def check(self, vocabulary_size: int, embedding_size: int) -> None:
        """Raises RequestError for what the types alone do not say."""
        inputs = self.inputs()
        most = min(MAX_INPUTS, MAX_EMBEDDED_VALUES // embedding_size)
        if len(inputs) > most:
            raise RequestError(
                f"At most {most} inputs are embedded at once.", param="input", hint="Send several requests."
            )
        for tokens in inputs:
            if not isinstance(tokens, str) and any(token >= vocabulary_size for token in tokens):
                raise RequestError(f"An input holds token ids above {vocabulary_size - 1}.", param="input")
        if self.dimensions is not None and self.dimensions > embedding_size:
            raise RequestError(
                f"This model's embeddings have {embedding_size} dimensions.",
                param="dimensions",
                hint="Ask for that many, or for fewer.",
            )

    def inputs(self) -> list[str | list[int]]:
        return entries(self.input, "input")


def entries(prompt: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """One prompt per entry, as text or as token ids. Raises RequestError for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [entry for entry in prompt if isinstance(entry, str)]
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    lists = [entry for entry in prompt if isinstance(entry, list)]
    if len(texts) == len(prompt):
        return list(texts)
    if len(tokens) == len(prompt):
        return [tokens]
    if len(lists) == len(prompt):
        return list(lists)
    raise RequestError(
        f"The {param} is a string, a list of strings, a list of token ids or a list of such lists, not a mixture.",
        param=param,
    )


RequestT = TypeVar("RequestT", bound=msgspec.Struct)

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read(body: bytes, kind: type[RequestT]) -> tuple[RequestT, list[str]]:
    """The request in `body` and the names of the fields in it that have no effect.

    Raises RequestError (400): not JSON, a missing field, a wrong type, a value out of range; `param` says where.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
        given = _OBJECT.decode(body)
    except msgspec.ValidationError as error:
        message, param = _complaint(str(error))
        raise RequestError(message, param=param, code="invalid_value") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("The body is not valid JSON.", code="invalid_json") from error
    known = kind.__struct_fields__
    return request, [name for name, value in given.items() if name not in known and bytes(value) != b"null"]


def ignored_header(names: list[str]) -> str:
    """The names for `x-shoal-ignored`; what could not stand in a header is shown as "?"."""
    shown = [name if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else "?" for name in names[:MAX_IGNORED_SHOWN]]
    return ", ".join(shown)


def _complaint(text: str) -> tuple[str, str | None]:
    """msgspec's "Expected `int`, got `str` - at `$.n`" as a sentence and the field's name."""
    message, _, place = text.partition(" - at `$")
    param = place.rstrip("`").lstrip(".").replace("[...]", "")
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
    return f"{message.replace('`', '')}{f' in {param}' if param else ''}.", param or None


def not_offered(param: str, reason: str) -> RequestError:
    return RequestError(reason, param=param, code="unsupported_parameter", hint=f"Leave out {param}.")


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends the arguments of a call as a JSON string, templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
