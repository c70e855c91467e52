"""Audit logs for tests: real keys and certificates, and a check that remembers what it has checked."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import Refused
from shoal.manifest.chain import AuditLog, Verdict, verify
from shoal.net.identity import Credential, NodeIdentity, Trust
from support.networks import identity, issuer


@cache
def _credential(chain: tuple[bytes, ...], at: float) -> Credential:
    return Trust(issuer("demo").trusted_pem).credential(chain, datetime.datetime.fromtimestamp(at, datetime.UTC))


def check(chain: Sequence[bytes], at: float, node: str) -> Credential:
    credential = _credential(tuple(chain), at)
    if credential.peer.node != node:
        raise Refused("other node")
    return credential


def log_of(folder: Path, node: NodeIdentity | None = None, **options: Any) -> AuditLog:
    node = node or identity("gateway")
    return AuditLog(folder, node.sign, node.peer.node, node.chain_der, **options)


def verdict(folder: Path, **options: Any) -> Verdict:
    return verify(folder, check, **options)
