"""Keys of simulated nodes: a signature is a hash over certificate and payload, and a certificate says what it proves.

The registry's real code asks them what it asks real keys (swarm.view.Keys): whether a signature is of that payload and
of the holder of that certificate, and whether the certificate is one of this swarm.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shoal.wire.messages import Record, Revocations, Signed

CERTIFICATE_BYTES = 560
"""As long as real ones: two of them make a node's chain."""
SIGNATURE_BYTES = 71


@dataclass(frozen=True)
class Member:
    """What a toy certificate says."""

    swarm: str
    node: str
    role: str
    labels: tuple[str, ...] = ()


class ToyKeys:
    """See swarm.view.Keys."""

    def __init__(
        self, node: str, role: str = "server", labels: tuple[str, ...] = ("trusted",), swarm: str = "toy"
    ) -> None:
        self.member = Member(swarm, node, role, labels)
        certificate = msgspec.msgpack.encode(self.member)
        self.chain: Sequence[bytes] = (certificate.ljust(CERTIFICATE_BYTES, b"\xc0"), b"i" * CERTIFICATE_BYTES)
        self.checks = 0
        """Signatures checked so far."""

    def sign(self, payload: bytes) -> bytes:
        return _signature(payload, self.chain)

    def writer(self, payload: bytes, signature: bytes, chain: Sequence[bytes]) -> Member | None:
        self.checks += 1
        member = _member(payload, signature, chain[0])
        return member if member is not None and member.swarm == self.member.swarm else None

    def seal(self, content: Record | Revocations, *, age_s: float = 0.0, chain: bool = True) -> Signed:
        """`content` as this node would send it."""
        payload = msgspec.msgpack.encode(content)
        return Signed(payload, self.sign(payload), list(self.chain) if chain else [], round(1e3 * age_s))


def _signature(payload: bytes, chain: Sequence[bytes]) -> bytes:
    return hashlib.sha256(chain[0] + payload).digest().ljust(SIGNATURE_BYTES, b"\0")


@functools.lru_cache(maxsize=1 << 15)
def _member(payload: bytes, signature: bytes, certificate: bytes) -> Member | None:
    """Whose signature it is. The same for whoever asks, so a thousand nodes of one process compute it once."""
    if signature != _signature(payload, [certificate]):
        return None
    return msgspec.msgpack.decode(certificate.rstrip(b"\xc0"), type=Member)
