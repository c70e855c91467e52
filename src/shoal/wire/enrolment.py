"""What a machine without a certificate says to the admin, with its bounds: the token, one question, one answer.

Length-prefixed msgpack over TLS. This is the only conversation a stranger may have with a swarm, so there is nothing in
it but fixed, small messages.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import struct
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shoal.errors import ProtocolError, UsageError
from shoal.wire.messages import AddressText, NameText, ReasonText

SECRET_BYTES = 16
MAX_MESSAGE_BYTES = 16 * 1024
_MARK = "shoal1."
_MAX_TOKEN_CHARS = 1024
_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size

Certificate = Annotated[bytes, Meta(min_length=1, max_length=4096)]


class Token(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `shoal invite` prints: where to ask, whom to believe, and the right to one certificate."""

    address: AddressText
    root_sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Of the root's certificate (DER)."""
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]

    def __str__(self) -> str:
        return _MARK + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"Token({self.address!r})"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read what `str` made. Raises UsageError, which does not repeat the text."""
        text = text.strip()
        try:
            if not text.startswith(_MARK) or len(text) > _MAX_TOKEN_CHARS:
                raise ValueError
            body = text.removeprefix(_MARK)
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            return msgspec.msgpack.decode(data, type=cls)
        except (ValueError, binascii.Error, msgspec.DecodeError):
            raise UsageError(
                "This is no token of shoal.",
                hint="Copy the whole line that `shoal invite` printed; it begins with shoal1.",
            ) from None


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class AskRoot(_Message, frozen=True, tag=1):
    """First connection: which root is this? The answer is checked against the token, so whoever answers may lie."""


class Root(_Message, frozen=True, tag=2):
    certificate: Certificate


class Enrol(_Message, frozen=True, tag=3):
    """Second connection, which trusts that root alone."""

    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    role: Literal["server", "client", "gateway"]
    """The role the machine means to have; a token for another one is refused and stays unused."""
    request: Certificate
    """A certificate request (PKCS #10, DER). Its key counts and nothing else in it."""

    def __repr__(self) -> str:
        return f"Enrol({self.role!r})"


class Enrolled(_Message, frozen=True, tag=4):
    chain: Annotated[list[Certificate], Meta(min_length=1, max_length=2)]
    swarm: NameText
    seeds: Annotated[list[AddressText], Meta(max_length=8)]


class Rejected(_Message, frozen=True, tag=5):
    """The answer is no. The same words for every reason that has to do with the token."""

    message: ReasonText
    retry_after_s: Annotated[float, Meta(ge=0.0, le=86_400.0)] = 0.0


Question = AskRoot | Enrol
Answer = Root | Enrolled | Rejected

_ENCODER = msgspec.msgpack.Encoder()
_QUESTION = msgspec.msgpack.Decoder(Question)
_ANSWER = msgspec.msgpack.Decoder(Answer)


def frame(message: Question | Answer) -> bytes:
    """`message` behind its length."""
    data = _ENCODER.encode(message)
    return _LENGTH.pack(len(data)) + data


def length(prefix: bytes) -> int:
    """How many bytes follow these LENGTH_BYTES. Raises ProtocolError for more than a message may have."""
    (size,) = _LENGTH.unpack(prefix)
    if not 1 <= size <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"A message of {size} bytes was announced; at most {MAX_MESSAGE_BYTES} are allowed.")
    return int(size)


def question(data: bytes) -> Question:
    """Raises ProtocolError for anything else."""
    with _malformed_named():
        asked: Question = _QUESTION.decode(data)
    return asked


def answer(data: bytes) -> Answer:
    """Raises ProtocolError for anything else."""
    with _malformed_named():
        answered: Answer = _ANSWER.decode(data)
    return answered


@contextlib.contextmanager
def _malformed_named() -> Iterator[None]:
    try:
        yield
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The message is malformed: {error}") from error
