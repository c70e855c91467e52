"""The gateway under fire: its whole application with a model that needs no weights, and what is thrown at it."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import random
import tempfile
from collections.abc import AsyncGenerator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from shoal.gateway.accounts import Accounts
from shoal.gateway.app import create_app
from shoal.gateway.limits import Limits
from shoal.gateway.openai import ChatRequest, CompletionRequest, EmbeddingRequest
from shoal.gateway.responses import ResponseRequest
from shoal.gateway.served import Tokenizer
from shoal.gateway.server import serve
from shoal.hostile.structures import STRANGERS, Maker, damaged
from shoal.hostile.targets import Target
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Sampled, SamplingParams
from shoal.swarm.trust import Zones

MODEL = "plain"
LIMITS = Limits(body_timeout_s=0.2, head_timeout_s=0.2, idle_timeout_s=0.2, send_timeout_s=0.5, shutdown_s=1.0)


class Letters:
    """A tokenizer of bytes: every byte is a token, and two more mark begin and end."""

    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"

    def __init__(self) -> None:
        self.all_special_ids = [256, 257]
        self.special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}

    def __len__(self) -> int:
        return 258

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*([256] if add_special_tokens else []), *text.encode()]

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return f"<0x{ids:02X}>" if 0 <= ids < 256 else "</s>"


class Parrot:
    """A model that answers at once: the same few letters, whatever it is asked."""

    def __init__(self) -> None:
        self.name = MODEL
        self.context_length = 512
        self.created = 1_700_000_000
        self.eos_ids = frozenset({257})
        self.embedding_size = 4
        self.zones: tuple[Zones, ...] = ()
        self.tokenizer: Tokenizer = Letters()

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        ignore_eos: bool,
        request_id: str,
        **others: Any,
    ) -> AsyncGenerator[Sampled | None, None]:
        words = b'{"a": 1}' * 64 if ignore_eos else b'{"a": 1}'
        tokens = [*words, 257][:max_tokens] if not ignore_eos else list(words)[:max_tokens]
        tokens += [0] * (max_tokens - len(tokens)) if ignore_eos else []
        top = tuple((token, -1.0) for token in range(params.logprobs or 0))
        for token in tokens:
            yield Sampled(token, None if params.logprobs is None else -0.5, top)

    async def embed(self, prompt: list[int], *, request_id: str, **others: Any) -> list[float]:
        return [0.5] * self.embedding_size

    def coverage(self) -> list[tuple[BlockRange, int]]:
        return [(BlockRange(0, 2), 1)]

    async def status(self) -> dict[str, Any]:
        return {"model": self.name, "covered": True}


def application(folder: Path, limits: Limits = LIMITS) -> tuple[Starlette, Accounts]:
    """The gateway's application over `Parrot`, its key file in `folder`."""
    accounts = Accounts(folder / "accounts.sqlite")

    model = Parrot()
    app = create_app({model.name: model}, accounts, limits=limits)
    return app, accounts


def posts(app: Starlette) -> list[str]:
    """The paths that take a body."""
    return [route.path for route in app.routes if isinstance(route, Route) and "POST" in (route.methods or ())]


BODIES: dict[str, type] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/embeddings": EmbeddingRequest,
}
"""What each path reads its body as; a test holds it against the application's routes."""


def schema_of(rng: random.Random, depth: int = 0) -> Any:
    """A JSON schema, or nearly one; some of them cost more than they look."""
    if depth > 3 or rng.random() < 0.3:
        return rng.choice(_LEAVES)
    inner = [schema_of(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    match rng.randrange(5):
        case 0:
            properties = {f"p{number}": each for number, each in enumerate(inner)}
            return {"type": "object", "properties": properties, "required": list(properties)[:2]}
        case 1:
            return {"type": "array", "items": inner[0] if inner else {}, "minItems": rng.choice((0, 3, 10**6))}
        case 2:
            return {rng.choice(("anyOf", "allOf", "oneOf", "prefixItems")): inner}
        case 3:
            return {"$defs": {"a": inner[0] if inner else {}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/b"}
    return {"type": rng.choice(("object", "string", ["null", "integer"], "nothing")), "additionalProperties": inner[:1]}


_LEAVES: tuple[Any, ...] = (
    *({}, True, False, {"type": "string"}, {"type": "integer"}, {"type": "number", "multipleOf": 0.01}, {"enum": []}),
    *({"enum": ["a", 1, None]}, {"const": {"a": [1]}}, {"type": "integer", "minimum": -(10**30), "maximum": 10**30}),
    *({"type": "string", "pattern": "^(a|aa)+$"}, {"type": "string", "pattern": "(?=x)y"}, {"$ref": "#"}),
    *(
        {"type": "string", "pattern": "^(.{0,99}){0,99}$"},
        {"type": "string", "minLength": 10**9},
        {"$ref": "#/$defs/z"},
    ),
    *({"type": "string", "format": "date-time"}, {"type": "integer", "multipleOf": 9973}, {"not": {}}, {"type": 5}),
)

_STOCK = {
    "model": lambda rng: MODEL,
    "type": lambda rng: rng.choice(("text", "text", "function", "json_object", "image_url")),
    "n": lambda rng: rng.choice((None, 1, 1, 2)),
    "max_tokens": lambda rng: rng.choice((None, 1, 8)),
    "max_completion_tokens": lambda rng: rng.choice((None, 8)),
    "best_of": lambda rng: None,
    "modalities": lambda rng: None,
    "suffix": lambda rng: None,
    "prompt": lambda rng: rng.choice(("hi", "hello", [5, 6], [[5], [6]], ["a", "b"], "")),
    "input": lambda rng: rng.choice(("hi", ["a", "b"], [5, 6])),
    "content": lambda rng: rng.choice(("hi", None, [{"type": "text", "text": "hello"}])),
    "schema": schema_of,
    "parameters": schema_of,
    "logit_bias": lambda rng: rng.choice((None, {}, {"5": 1}, {"999999": 1}, {"٣": 1})),
    "tools": lambda rng: rng.choice(
        (None, None, [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
    ),
}
_JSON_STRANGERS = tuple(value for value in STRANGERS if value == value and value not in (float("inf"),))


def make_body(seed: int) -> bytes:
    """One line with the path and perhaps an idempotency key, then the body."""
    rng = random.Random(seed)
    path = rng.choice(sorted(BODIES))
    value = Maker(rng, wild=0.01, stock=_STOCK, strangers=_JSON_STRANGERS).make(BODIES[path])
    if rng.random() < 0.04:
        path, value = "/v1/chat/completions", _with_schema(rng)
    if isinstance(value, dict) and rng.random() < 0.2:
        name = rng.choice(["extra", "stream_options", "x\r\ny", "é", "_5"])
        value[name] = copy.deepcopy(rng.choice(_JSON_STRANGERS))
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5, default=_as_text).encode(errors="surrogatepass")
    if rng.random() < 0.3:
        data = damaged(rng, data)
        if rng.random() < 0.1:
            data = data[:20] + rng.choice([b'"', b"\\ud800", b"\\u0000", b"1e999", b"[" * 2000, b"," * 9]) + data[20:]
    again = rng.choice((b"", b"", b" k1", b" k2", b" " + b"x" * 300)) if rng.random() < 0.2 else b""
    return path.encode() + again + b"\n" + data


def _with_schema(rng: random.Random) -> dict[str, Any]:
    """A chat that is right but for its schema, which is compiled before anything else happens."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    schema = schema_of(rng)
    if rng.random() < 0.5:
        named = {"name": "f", "schema": schema, "strict": rng.random() < 0.5}
        return body | {"response_format": {"type": "json_schema", "json_schema": named}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": rng.random() < 0.5}}
    return body | {"tools": [tool], "tool_choice": rng.choice(("auto", "required"))}


def _as_text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


class Rig:
    """One application in one event loop, for all inputs of a process."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-fuzz-")
        self.app, self.accounts = application(Path(self._folder.name))
        self.key = self.accounts.create("fuzz")[0]
        self._port = 0

    async def post(self, path: str, body: bytes, again: bytes = b"") -> tuple[int, bytes]:
        """Status and body of one request that comes in without a socket; `again` is its idempotency key."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [
                (b"host", b"localhost"),
                (b"authorization", b"Bearer " + self.key.encode()),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *([(b"idempotency-key", again)] if again else []),
            ],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8080),
        }
        sent: list[Any] = []
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the client waits for its answer and does not hang up
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], text

    async def say(self, data: bytes) -> bytes:
        """What a real connection answers to these bytes."""
        if not self._port:
            ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve(ready))
            self._port = await ready
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(5):
                return await reader.read(1 << 20)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def _serve(self, ready: asyncio.Future[int]) -> None:
        async with serve(self.app, limits=LIMITS) as listening:
            ready.set_result(listening.port)
            await asyncio.Event().wait()


@cache
def _rig() -> Rig:
    return Rig()


def run_body(data: bytes) -> str:
    """The application without its sockets. Any status but 200 and 4xx is a finding, and so is an odd error body."""
    line, _, body = data.partition(b"\n")
    path, _, again = line.partition(b" ")
    rig = _rig()
    status, text = rig.runner.run(rig.post(path.decode("latin-1"), body, again))
    return _judged(status, text)


def _judged(status: int, text: bytes) -> str:
    if status == 200:
        if b'"error"' in text and b'"code":"interrupted"' in text:
            raise AssertionError(f"a stream broke off: {text[-300:]!r}")
        return "200"
    if not 400 <= status < 500 and status != 503:
        raise AssertionError(f"status {status}: {text[:300]!r}")
    error = json.loads(text)["error"]
    if set(error) != {"message", "type", "param", "code"}:
        raise AssertionError(f"an error of another shape: {text[:300]!r}")
    return f"{status} {error['code']} {str(error['param'] or '')[:20]}"


_METHODS = ("GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "PRI", "CONNECT", "get")
_PATHS = ("/v1/completions", "/v1/models", "/health", "/v1/models/plain", "*", "//x", "/%00", "http://evil/", "/../v1")
_HEADERS = (
    *("host: localhost", "host: evil.example", "connection: close", "connection: keep-alive", "expect: 100-continue"),
    *("transfer-encoding: chunked", "content-length: 2", "content-length: -1", "content-length: 99999999999999999999"),
    *("content-encoding: gzip", "x-forwarded-for: 1.2.3.4", "upgrade: websocket", "upgrade: h2c", "te: trailers"),
    *("authorization: Bearer sk-shoal-0", "authorization: ", "x: " + "y" * 300, ": empty", "x y: z", "x:\x00"),
)


_BODIES = (b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"1;x=" + b"y" * 300 + b"\r\n")


def make_http(seed: int) -> bytes:
    """The bytes of one or two requests, hardly any of them right."""
    rng = random.Random(seed)
    data = b""
    for _ in range(rng.randint(1, 2)):
        lines = [f"{rng.choice(_METHODS)} {rng.choice(_PATHS)}{rng.choice(('', '?a=b', '?' + 'é' * 3))} HTTP/1.1"]
        if rng.random() < 0.8:
            lines.append("host: localhost")
        lines += rng.sample(_HEADERS, rng.randint(0, 4))
        data += "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        data += rng.choice(_BODIES)
    return damaged(rng, data) if rng.random() < 0.6 else data


class _Alarms(logging.Handler):
    """Collects what the gateway would have written to its log as an error: no stranger may cause such a line."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {record.exc_text or record.exc_info or ''}")


def run_http(data: bytes) -> str:
    """A real connection: whatever the bytes, each answer is one of HTTP, none says 5xx, no error is logged."""
    rig = _rig()
    alarms = _Alarms()
    root = logging.getLogger()
    root.addHandler(alarms)
    try:
        answer = rig.runner.run(rig.say(data))
    finally:
        root.removeHandler(alarms)
    if alarms.lines:
        raise AssertionError(f"logged: {alarms.lines[0]}")
    statuses = []
    rest = answer
    while rest.startswith(b"HTTP/1.1 "):
        head, _, rest = rest.partition(b"\r\n\r\n")
        statuses.append(int(head[9:12]))
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0]) if lengths else 0
        rest = rest[length:] if not rest.startswith(b"HTTP/1.1 ") else rest  # an answer to HEAD has no body
    if any(status >= 500 and status != 503 for status in statuses) or (answer and not statuses):
        raise AssertionError(f"answered {answer[:300]!r}")
    return " ".join(map(str, statuses)) or "hung up"


HTTP: tuple[Target, ...] = (
    Target("http-body", 8, make_body, run_body),
    Target("http", 4, make_http, run_http),
)
