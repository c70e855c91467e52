"""The requests of OpenAI's API that the gateway takes: fields, types, ranges, and which field a complaint is about.

An explicit null means the same as an absent field. A field that is not declared here is accepted and left alone;
`ignored` names it, and the answer lists it in `x-shoal-ignored`. A field that would change the meaning of the answer
and is not offered (functions, echo) is refused, because ignoring it would be a wrong answer.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shoal.gateway.errors import RequestError
from shoal.gateway.schemas import Schema, check_size
from shoal.spec.sampling import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024  # each costs a little at every token
MAX_CHOICES = 32
MAX_INPUTS = 2048  # OpenAI's bound, which packages count on when they cut their batches
MAX_EMBEDDED_VALUES = 2**23  # of all vectors of an answer: 160 MB of JSON
MAX_TOOLS = 128
MAX_IGNORED_SHOWN = 20
DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI's legacy endpoint gives when nothing is asked

_Count = Annotated[int, Meta(ge=1, le=2**31)]
_Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
_Token = Annotated[int, Meta(ge=0, le=2**31)]
_Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(msgspec.Struct):
    """One part of a message's content. Only text parts can be read; others are named in the refusal."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct):
    """What an earlier answer called; `arguments` is JSON text."""

    name: str
    arguments: str

    def parsed(self) -> Any:
        """The arguments as templates expect them: an object; the text itself when it is no JSON."""
        try:
            return json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return self.arguments


class ToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def check(self, param: str) -> None:
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError(
                "A message of the role tool needs the id of the call that it answers.",
                param=f"{param}.tool_call_id",
                code="missing_field",
            )
        if self.tool_calls and self.role != "assistant":
            raise RequestError("Only an assistant calls tools.", param=f"{param}.tool_calls")
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
            "reasoning_content": self.reasoning_content,
        }
        if self.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed()},
                }
                for call in self.tool_calls
            ]
        return {name: value for name, value in plain.items() if value is not None or name == "content"}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class JsonSchemaFormat(msgspec.Struct):
    name: _Name
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def schema(self, param: str = "response_format") -> Schema | None:
        """What the content must keep to; None for any text. Raises RequestError when the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Schema({"type": "object"}, True, param)
        if self.json_schema is None or self.json_schema.schema is None:
            raise RequestError(
                "A response_format of type json_schema needs json_schema.schema.",
                param=f"{param}.json_schema",
                code="missing_field",
            )
        return Schema(self.json_schema.schema, bool(self.json_schema.strict), f"{param}.json_schema.schema")


class Function(msgspec.Struct):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def schema(self, param: str) -> Schema:
        """What the arguments must keep to: always an object. A function without parameters takes none."""
        parameters = self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        kind = parameters.get("type", "object")
        if kind != "object":
            raise RequestError("Parameters are described by a schema of type object.", param=f"{param}.type")
        return Schema({**parameters, "type": "object"}, bool(self.strict), param)

    def plain(self) -> dict[str, Any]:
        """The function as chat templates expect it."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        # Templates read `parameters` without asking whether there are any, and tell models nothing of `strict`.
        fields["parameters"] = self.parameters or {"type": "object", "properties": {}}
        fields["description"] = self.description or ""
        return fields


class Tool(msgspec.Struct):
    type: str
    function: Function | None = None


class FunctionName(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    type: str = "function"
    function: FunctionName | None = None


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct):
    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class Callee(msgspec.Struct, frozen=True):
    """A function that an answer may call, and what its arguments must keep to."""

    name: str
    arguments: Schema


class Calling(msgspec.Struct, frozen=True):
    """What an answer may call, after all checks. `required`: it must."""

    functions: list[Callee]
    required: bool = False
    parallel: bool = True


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
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    def check(self, vocabulary_size: int) -> None:
        super().check(vocabulary_size)
        for place, message in enumerate(self.messages):
            message.check(f"messages[{place}]")
        self._check_results()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "max_tokens and max_completion_tokens say different things.",
                param="max_tokens",
                hint="Send only max_completion_tokens.",
            )
        if self.functions:
            raise not_offered("functions", "Functions are called by way of tools.")
        if self.modalities not in (None, [], ["text"]):
            raise not_offered("modalities", "Only text is offered.")
        form, calling = self.form, self.calling
        schemas = [form] if form else []
        schemas += [function.arguments for function in calling.functions] if calling else []
        check_size(schemas)
        if self.ignore_eos and schemas:
            raise RequestError("An answer that keeps to a grammar ends when the grammar does.", param="ignore_eos")

    @property
    def form(self) -> Schema | None:
        """What the content must keep to, if anything. Raises RequestError."""
        return None if self.response_format is None else self.response_format.schema()

    @property
    def calling(self) -> Calling | None:
        """What the answer may call; None when nothing. Raises RequestError."""
        choice = self.tool_choice
        functions = self._functions()
        if isinstance(choice, ToolChoice):
            names, required = _chosen(choice)
            for name in names:
                if name not in functions:
                    raise RequestError(f"tool_choice names {name[:64]!r}, which is not in tools.", param="tool_choice")
            functions = {name: function for name, function in functions.items() if name in names}
        else:
            required = choice == "required"
        if required and not functions:
            raise RequestError("tool_choice asks for a call, and there are no tools.", param="tool_choice")
        if choice == "none" or not functions:
            return None
        # A call of one function by name is one call.
        single = isinstance(choice, ToolChoice) and choice.type == "function"
        return Calling(list(functions.values()), required, self.parallel_tool_calls is not False and not single)

    def definitions(self) -> list[dict[str, Any]]:
        """The tools that may be called, as chat templates expect them."""
        calling = self.calling
        names = {function.name for function in calling.functions} if calling else set()
        return [
            {"type": "function", "function": tool.function.plain()}
            for tool in self.tools or ()
            if tool.function is not None and tool.function.name in names
        ]

    def _functions(self) -> dict[str, Callee]:
        functions: dict[str, Callee] = {}
        for place, tool in enumerate(self.tools or ()):
            param = f"tools[{place}]"
            if tool.type != "function":
                raise RequestError(f"Tools of type {tool.type[:40]!r} are not offered.", param=f"{param}.type")
            if tool.function is None:
                raise RequestError("A tool needs its function.", param=f"{param}.function", code="missing_field")
            name = tool.function.name
            if name in functions:
                raise RequestError(f"Two tools have the name {name!r}.", param=f"{param}.function.name")
            functions[name] = Callee(name, tool.function.schema(f"{param}.function.parameters"))
        return functions

    def _check_results(self) -> None:
        """Raises RequestError for a result of a call that no earlier message made."""
        made: set[str] = set()
        for place, message in enumerate(self.messages):
            made |= {call.id for call in message.tool_calls or ()}
            if message.role == "tool" and message.tool_call_id not in made:
                raise RequestError(
                    "A message of the role tool answers a call of an earlier message.",
                    param=f"messages[{place}].tool_call_id",
                    hint="Send the assistant's message with its tool_calls before it.",
                )

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


def _chosen(choice: ToolChoice) -> tuple[list[str], bool]:
    """The names that a tool_choice object allows, and whether it demands a call."""
    if choice.type == "function" and choice.function is not None:
        return [choice.function.name], True
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        return [tool.function.name for tool in allowed.tools if tool.function], allowed.mode == "required"
    raise RequestError(
        f"A tool_choice of type {choice.type[:40]!r} is not offered.",
        param="tool_choice",
        hint='Send "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}.',
    )
