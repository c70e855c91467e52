"""What is fuzzed: for every surface that bytes from outside reach, how to make such bytes and the code they go to.

A target's `run` takes the bytes as the process would get them and returns a short word for what came of it. Whatever
it raises is a finding: the surface itself must have turned every error into one of the outcomes that its callers
expect. Bytes are made from a seed alone, so a finding can be made again, and kept as a file besides.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from shoal.errors import NotFinite, ProtocolError, Refused, ShoalError, UsageError
from shoal.hostile.structures import MODELS, NODES, SESSIONS, SWARM, Maker, damaged
from shoal.net.connection import Conn, ConnSettings
from shoal.net.identity import Peer, Trust
from shoal.spec.ids import BlockRange, NodeId
from shoal.swarm import session as driving
from shoal.swarm.routing import Hop
from shoal.swarm.serving import Serving, ServingConfig
from shoal.swarm.view import View
from shoal.wire import codec, enrolment, rows, tensors
from shoal.wire import messages as msg
from shoal.wire.frames import Frame, FrameReader, FrameWriter, Lane, Limits

MUTATIONS = 16
"""Inputs made from one valid stream; making the stream costs more than damaging it."""
_LIMITS = Limits()
_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Target:
    """One surface. `share`: how many of a hundred seeds go to it."""

    name: str
    share: int
    make: Callable[[int], bytes]
    """The bytes of a seed."""
    run: Callable[[bytes], str]
    """What came of the bytes. Raises only when something is wrong with shoal."""


# --- making streams of frames --------------------------------------------------------------------------------


def message_of(rng: random.Random, kind: int, *, wild: float) -> tuple[bytes, bytes]:
    """(metadata, body) of a message of one kind; with `wild` 0.0 it is a valid one."""
    fields = Maker(rng, wild=wild).make(codec.KINDS[kind])
    body = b""
    if codec.KINDS[kind] in (msg.Step, msg.Result, msg.Journal):
        body = _fit_rows(rng, fields)
    return msgspec.msgpack.encode(fields), body


def _fit_rows(rng: random.Random, fields: list[Any]) -> bytes:
    """Make the tensor of a message with rows fit its items, and return a body that fits the tensor."""
    if not isinstance(fields, list) or len(fields) < 3:
        return b""  # a stranger took the message's place, or it was cut off
    items = fields[-2]
    count = 0
    for item in items if isinstance(items, list) else ():
        if isinstance(item, list) and len(item) > 2 and isinstance(item[2], int) and item[2] > 0:
            item[2] = min(item[2], 8)
            count += item[2]
    width = rng.choice((_WIDTH, _WIDTH, 1, 70)) if count < 200 else 1
    dtype: msg.WireType = rng.choice(("f32", "f32", "bf16", "int8"))
    fields[-1] = [dtype, count, width]
    size = count * tensors.row_bytes(dtype, width)
    # Mostly small numbers: a body of random bytes is full of NaN and never gets beyond the check for them.
    return bytes(size) if rng.random() < 0.7 else rng.randbytes(size)


def stream_of(rng: random.Random, kinds: tuple[int, ...], count: int, *, wild: float) -> bytes:
    """The bytes of `count` messages, framed as a peer frames them."""
    writer = FrameWriter()
    for _ in range(count):
        kind = rng.choice(kinds)
        meta, body = message_of(rng, kind, wild=wild)
        if 0 < len(meta) <= msg.MAX_META_BYTES:
            lane = Lane.BULK if len(body) > 65_536 else rng.choice(tuple(Lane))
            writer.push(kind, meta, [body], lane=lane, deadline_ms=rng.choice((0, 0, 1, 2**32 - 1)))
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


_ALL_KINDS = tuple(sorted(codec.KINDS))
_LONG = msgspec.msgpack.encode([13, [[SESSIONS[0], 0, 300, 0]], ["f32", 300, 70]]), bytes(300 * 70 * 4)


@lru_cache(maxsize=4)
def _any_stream(base: int) -> bytes:
    rng = random.Random(base)
    if rng.random() < 0.02:  # longer than a fragment
        writer = FrameWriter()
        writer.push(13, _LONG[0], [_LONG[1]], lane=Lane.BULK)
        return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))
    return stream_of(rng, _ALL_KINDS, rng.randint(1, 4), wild=0.0)


def make_frames(seed: int) -> bytes:
    rng = random.Random(seed)
    if seed % 3 == 0:  # wrong inside, with a frame around it that is right
        return stream_of(rng, _ALL_KINDS, rng.randint(1, 3), wild=0.05)
    return damaged(rng, _any_stream(seed // MUTATIONS))


def _pieces(data: bytes) -> Iterator[bytes]:
    """The bytes cut as a network might cut them; where, follows from the bytes themselves."""
    rng = random.Random(len(data) * 257 + (data[-1] if data else 0))
    at = 0
    while at < len(data):
        size = rng.choice((1, 7, 64, 100_000))
        yield data[at : at + size]
        at += size


# --- frames, metadata and tensors ----------------------------------------------------------------------------


def run_frames(data: bytes) -> str:
    """The frame reader, every decoder of metadata and every format of tensors."""
    reader = FrameReader(codec.decode, _LIMITS)
    try:
        for piece in _pieces(data):
            for frame in reader.feed(piece):
                if isinstance(frame.message, msg.Step | msg.Result | msg.Journal):
                    for item, part in rows.cut(frame.message.items, frame.message.tensor, frame.body):
                        tensors.decode(msg.Tensor(part.dtype, item.rows, part.width), part.data)
                    tensors.decode_native(frame.message.tensor, frame.body)
    except (ProtocolError, Refused, NotFinite) as error:
        return _outcome(error)
    return "read"


def _outcome(error: BaseException) -> str:
    """A word for what came of an input: the kind of error and its text without the numbers in it."""
    text = "".join("#" if char.isdigit() else char for char in str(error))
    return f"{type(error).__name__}: {text[:80]}"


# --- connections ---------------------------------------------------------------------------------------------


class _Wire(asyncio.Transport):
    """A transport that goes nowhere. What a connection writes is counted and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += len(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


_ROLES = ("server", "client", "gateway", "admin")


def make_greeted(seed: int) -> bytes:
    """Hello of some role, then whatever: the first byte says which role the certificate has."""
    rng = random.Random(seed)
    role = rng.randrange(len(_ROLES))
    writer = FrameWriter()
    hello = msg.Hello(msg.PROTOCOL_VERSION, SWARM, NODES[0], _ROLES[role])  # type: ignore[arg-type]
    writer.push(*codec.encode(hello))
    greeting = b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))
    allowed = codec.MAY_SEND[_ROLES[role]] - {msg.Hello, msg.Fault}
    kinds = tuple(kind for kind in _ALL_KINDS if codec.KINDS[kind] in allowed)
    wild = 0.02 if rng.random() < 0.3 else 0.0
    rest = stream_of(rng, kinds if rng.random() < 0.9 else _ALL_KINDS, rng.randint(1, 3), wild=wild)
    # The numbers of messages go on from the greeting's, which was number 0 on the control stream.
    return bytes([role]) + (damaged(rng, greeting + rest) if rng.random() < 0.3 else greeting + _renumbered(rest))


def _renumbered(stream: bytes) -> bytes:
    """The stream with its control messages numbered from 1."""
    changed = bytearray(stream)
    at = 0
    while at + 32 <= len(changed):
        kind_stream = int.from_bytes(changed[at + 8 : at + 12], "little")
        if kind_stream == 0:
            number = int.from_bytes(changed[at + 12 : at + 16], "little")
            changed[at + 12 : at + 16] = (number + 1).to_bytes(4, "little")
        meta = int.from_bytes(changed[at + 16 : at + 20], "little")
        body = int.from_bytes(changed[at + 20 : at + 28], "little")
        if body > 65_536:  # fragments follow each other in ways this walk does not know
            break
        at += 32 + meta + body
    return bytes(changed)


@cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()


def run_connection(data: bytes) -> str:
    """A connection between greeting and end: roles, order of messages, queues."""
    return _runner().run(_connection(data))


async def _connection(data: bytes) -> str:
    role = _ROLES[data[0] % len(_ROLES)] if data else "server"
    conn = Conn(Peer(NodeId("f" * 32), "server", SWARM), ConnSettings(), dialed=False)
    wire = _Wire()
    conn.made(wire, Peer(NodeId(NODES[0]), role, SWARM))  # type: ignore[arg-type]
    for piece in _pieces(data[1:]):
        conn.feed(memoryview(piece))
    received, outcome = 0, ""
    while not outcome:
        try:
            async with asyncio.timeout(0):
                await conn.receive()
            received += 1
        except TimeoutError:
            outcome = "open"
        except ShoalError as error:
            outcome = _outcome(error)
    conn.abort()
    conn.lost(None)
    return f"{outcome}, {min(received, 3)} messages"


# --- the server's sessions -----------------------------------------------------------------------------------

_DRIVER_KINDS = tuple(kind for kind, cls in codec.KINDS.items() if cls in (msg.Open, msg.Step, msg.Relink, msg.Close))


def make_orders(seed: int) -> bytes:
    rng = random.Random(seed)
    writer = FrameWriter()
    sessions = rng.sample(SESSIONS, rng.randint(0, 2))
    for session in sessions:
        writer.push(10, msgspec.msgpack.encode([10, session, 0, MODELS[0], 0, 4, 2, 16, "f32", None]))
    head = b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))
    rest = stream_of(rng, (13, *_DRIVER_KINDS), rng.randint(3, 14), wild=0.0)
    for _ in sessions:
        rest = _renumbered(rest)
    return head + rest


def _frames(data: bytes) -> list[Frame[msg.Message]]:
    """The frames of a stream up to its first error."""
    found: list[Frame[msg.Message]] = []
    reader = FrameReader(codec.decode, _LIMITS)
    try:
        for piece in _pieces(data):
            found += reader.feed(piece)
    except (ProtocolError, Refused):
        pass
    return found


def run_serving(data: bytes) -> str:
    """The server's decisions about sessions, with orders from two drivers, computed between them now and then."""
    serving = Serving(ServingConfig(MODELS[0], BlockRange(0, 8), cache_tokens=200, max_sessions=8))
    seen: set[str] = set()
    now = 0.0
    for number, frame in enumerate(_frames(data)):
        now += 0.25
        driver = NODES[number % 5 == 4]
        match frame.message:
            case msg.Open() as message:
                seen.update(type(action).__name__ for action in serving.on_open(driver, message, now))
            case msg.Relink() as message:
                serving.on_relink(driver, message, now)
            case msg.Close(sessions):
                serving.on_close(driver, sessions, now)
            case msg.Step(items, tensor):
                try:
                    serving.on_steps(rows.cut(items, tensor, frame.body), now)
                except ProtocolError as error:
                    seen.add(_outcome(error))
        if number % 3 == 2:
            works = serving.next_batch(now)
            serving.on_computed(works, [work.payload for work in works], now)
            seen.add(f"batch of {min(len(works), 2)}")
    serving.expire(now + 1e6)
    if serving.sessions or serving.pool.free_tokens != serving.pool.total_tokens:
        raise AssertionError(f"{serving.sessions} sessions and {serving.pool.free_tokens} free tokens are left")
    return " ".join(sorted(seen))


# --- the driver's session ------------------------------------------------------------------------------------

_ANSWER_KINDS = tuple(
    kind
    for kind, cls in codec.KINDS.items()
    if cls in (msg.Opened, msg.Denied, msg.Result, msg.Journal, msg.Relinked, msg.Gone)
)
_CHAIN = (
    Hop(NODES[1], ("tcp://127.0.0.1:1",), BlockRange(0, 4)),
    Hop(NODES[2], ("tcp://127.0.0.1:2",), BlockRange(4, 8)),
)


def make_answers(seed: int) -> bytes:
    rng = random.Random(seed)
    opened = [msgspec.msgpack.encode([11, SESSIONS[0], 1])] * 2 if rng.random() < 0.8 else []
    writer = FrameWriter()
    for meta in opened:
        writer.push(11, meta)
    rest = stream_of(rng, _ANSWER_KINDS, rng.randint(2, 12), wild=0.0)
    head = b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))
    return head + (_renumbered(_renumbered(rest)) if opened else rest)


def run_driver(data: bytes) -> str:
    """The driver's state of one session on two servers that answer what they like."""
    session = driving.Session(
        SESSIONS[0],
        model=MODELS[0],
        num_blocks=8,
        max_tokens=64,
        wire="f32",
        plan=lambda blocks, avoid, need, now: [
            hop for hop in _CHAIN if blocks.start <= hop.blocks.start and hop.blocks.end <= blocks.end
        ],
        results_from=0,
        config=driving.SessionConfig(),
    )
    now = 0.0
    done: list[driving.Action] = list(session.start(now))
    done += session.feed(3, rows.Rows("f32", _WIDTH, 3, bytes(96)), now)
    for number, frame in enumerate(_frames(data)):
        if session.ended:
            break
        now += 0.2
        node = NODES[1 + number % 2]
        match frame.message:
            case msg.Result(items, tensor) if (tensor.dtype, tensor.width) == ("f32", _WIDTH):
                for item, part in rows.cut(items, tensor, frame.body):
                    done += session.on_result(node, item, part, now)
            case msg.Journal(block, items, tensor) if (tensor.dtype, tensor.width) == ("f32", _WIDTH):
                for item, part in rows.cut(items, tensor, frame.body):
                    done += session.on_journal(node, block, item, part, now)
            case msg.Opened() | msg.Relinked() | msg.Denied() | msg.Gone():
                done += session.on_message(node, frame.message, now)
        if not session.ended and session.wake_at is not None and session.wake_at <= now:
            done += session.on_timer(now)
    if not session.ended:
        done += session.close()
    return " ".join(sorted({type(action).__name__ for action in done}))


# --- the registry --------------------------------------------------------------------------------------------

_SYNC = next(kind for kind, cls in codec.KINDS.items() if cls is msg.Sync)


@dataclass(frozen=True, slots=True)
class _Writer:
    node: str
    role: str
    labels: tuple[str, ...] = ()


class _Keys:
    """Signatures that cost nothing: a chain of one "certificate" that says ROLE NODE LABELS, and the signature "ok"."""

    chain = (b"server " + NODES[0].encode(),)

    def sign(self, payload: bytes) -> bytes:
        return b"ok"

    def writer(self, payload: bytes, signature: bytes, chain: Sequence[bytes]) -> _Writer | None:
        role, node, labels, *_ = [*b"".join(chain[:1]).decode("latin-1").split(" "), "", ""]
        return _Writer(node, role, tuple(labels.split(","))) if signature == b"ok" else None


_LABELS = msg.Record.__struct_fields__.index("labels")


def make_gossip(seed: int) -> bytes:
    rng = random.Random(seed)
    writer = FrameWriter()
    for _ in range(rng.randint(1, 3)):
        fields = Maker(rng, wild=0.0).make(msg.Sync)
        fields[2] = [_signed(rng, msg.Record) for _ in range(rng.choice((0, 1, 1, 2)))]
        fields[4] = _signed(rng, msg.Revocations) if rng.random() < 0.2 else None
        meta = msgspec.msgpack.encode(fields)
        if len(meta) <= msg.MAX_META_BYTES:
            writer.push(_SYNC, meta, lane=Lane.JOURNAL)
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


def _signed(rng: random.Random, kind: type) -> list[Any]:
    """A Signed around a record or a list of revocations, most of them by the one who may write it."""
    inner = Maker(rng, wild=0.02 if rng.random() < 0.1 else 0.0).make(kind)
    payload = msgspec.msgpack.encode(inner)
    if rng.random() < 0.1:
        payload = damaged(rng, payload)
    node, role, labels = rng.choice(NODES), "admin", ""
    if kind is msg.Record and isinstance(inner, list) and len(inner) > 4 and rng.random() < 0.9:
        node, role = str(inner[0]), str(inner[4])
        claimed = inner[_LABELS] if len(inner) > _LABELS else []
        labels = ",".join(map(str, claimed)) if isinstance(claimed, list) else ""
    signature = b"ok" if rng.random() < 0.9 else rng.randbytes(8)
    chain = [f"{role} {node} {labels}".encode("latin-1", "replace")] if rng.random() < 0.9 else []
    return [payload[:4096] or b"\0", signature, chain, rng.choice((0, 0, 1500, 2**53))]


def run_registry(data: bytes) -> str:
    """What a node believes about the others, with a bound on what it remembers and on what it answers."""
    view = View(NODES[0], _Keys(), max_nodes=64)
    answers = 0
    for number, frame in enumerate(_frames(data)):
        if isinstance(frame.message, msg.Sync):
            replies = view.on_sync(frame.message, NODES[1], float(number))
            if len(replies) > 4:
                raise AssertionError(f"{len(replies)} answers to one message")
            for answer in replies:
                codec.encode(answer)
            answers += len(replies)
    if len(view) > 64:
        raise AssertionError(f"{len(view)} nodes are remembered; 64 is the bound")
    revoked = "revoked, " if view.revoked else ""
    return f"{min(answers, 2)} answers, {min(len(view), 3)} nodes, {revoked}{' '.join(sorted(view.refused))}"


# --- certificates that come as bytes -------------------------------------------------------------------------

_THEN = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
"""A moment at which the certificates of chain.pem are valid."""


@cache
def _certificates() -> tuple[Trust, tuple[bytes, ...]]:
    """The root of a swarm that never was, and the chain of one of its nodes; their keys were thrown away."""
    pem = (Path(__file__).with_name("chain.pem")).read_bytes()
    *chain, root = x509.load_pem_x509_certificates(pem)
    der = tuple(each.public_bytes(serialization.Encoding.DER) for each in chain)
    return Trust(root.public_bytes(serialization.Encoding.PEM)), der


def make_chain(seed: int) -> bytes:
    """A chain of certificates, some damaged, missing or twice, and a signature."""
    rng = random.Random(seed)
    parts = list(_certificates()[1])
    for _ in range(rng.randint(0, 2)):
        place = rng.randrange(len(parts)) if parts else 0
        match rng.randrange(5) if parts else 4:
            case 0 | 1 | 2:
                parts[place] = damaged(rng, parts[place][rng.choice((0, 0, 100, 300)) :])
            case 3:
                del parts[place]
            case _:
                parts.insert(place, rng.randbytes(rng.choice((0, 1, 40, 5000))))
    return msgspec.msgpack.encode([parts, rng.randbytes(rng.choice((0, 8, 71)))])


def run_chain(data: bytes) -> str:
    """Who a chain of certificates is, and whether a signature is theirs."""
    try:
        parts, signature = msgspec.msgpack.decode(data, type=tuple[list[bytes], bytes])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "no chain"
    try:
        credential = _certificates()[0].credential(parts, _THEN)
    except Refused as error:
        return _outcome(error)[:60]
    if tuple(parts) != _certificates()[1]:
        # Bytes that no signature covers may differ, if the certificate is still the one that was signed.
        same = x509.load_der_x509_certificate(parts[0]).tbs_certificate_bytes
        if same != x509.load_der_x509_certificate(_certificates()[1][0]).tbs_certificate_bytes:
            raise AssertionError(f"accepted as {credential.peer.uri}")
    return f"accepted, signature {credential.verify(b'payload', signature)}"


# --- strangers who want to become members --------------------------------------------------------------------


def make_enrolment(seed: int) -> bytes:
    """A question, an answer or a token; the first byte says which."""
    rng = random.Random(seed)
    which = rng.randrange(3)
    kinds: tuple[type, ...] = (enrolment.Enrol, enrolment.AskRoot)
    if which == 1:
        kinds = (enrolment.Root, enrolment.Enrolled, enrolment.Rejected)
    if which == 2:
        secret, root = rng.randbytes(enrolment.SECRET_BYTES), rng.randbytes(32)
        token = str(enrolment.Token(f"tcp://h:{rng.randint(0, 99_999)}", root, secret))
        return b"\2" + (damaged(rng, token.encode()) if rng.random() < 0.8 else token.encode())
    data = msgspec.msgpack.encode(Maker(rng, wild=0.1).make(rng.choice(kinds)))
    if rng.random() < 0.5:
        data = damaged(rng, data)
    return bytes([which]) + (struct.pack("<I", len(data)) if rng.random() < 0.9 else rng.randbytes(4)) + data


def run_enrolment(data: bytes) -> str:
    """The conversation in which a machine is admitted, on both sides, and the token that begins it."""
    which, rest = data[:1], data[1:]
    try:
        if which == b"\2":
            return f"token {enrolment.Token.parse(rest.decode('latin-1')).address[:4]}"
        if len(rest) < enrolment.LENGTH_BYTES:
            return "short"
        size = enrolment.length(rest[: enrolment.LENGTH_BYTES])
        body = rest[enrolment.LENGTH_BYTES :][:size]
        return type(enrolment.question(body) if which == b"\0" else enrolment.answer(body)).__name__
    except (ProtocolError, UsageError) as error:
        return _outcome(error)[:60]


NETWORK: tuple[Target, ...] = (
    Target("frames", 47, make_frames, run_frames),
    Target("connection", 12, make_greeted, run_connection),
    Target("serving", 8, make_orders, run_serving),
    Target("driver", 8, make_answers, run_driver),
    Target("registry", 5, make_gossip, run_registry),
    Target("certificates", 4, make_chain, run_chain),
    Target("enrolment", 4, make_enrolment, run_enrolment),
)
