"""What the admin remembers: invites, the certificates that were issued, and who was removed. One SQLite file.

`shoal invite` and `shoal revoke` write it, the running service reads it, both at once when need be. No secret is in it:
of an invite only the SHA-256 is kept (128 random bits cannot be guessed, so a slow hash would protect nothing more).
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shoal.errors import DiskFull, Full, ShoalError, UsageError
from shoal.manifest.files import make_private
from shoal.net.identity import Peer, Role
from shoal.wire.messages import MAX_REVOKED

_BUSY_TIMEOUT_S = 5.0
_FULL = "database or disk is full"
_NODE = re.compile(r"[0-9a-f]{4,32}")
_KEPT_AFTER_EXPIRY_S = 86_400.0
"""A removed node stays in the list this long after its certificate has ended: clocks differ."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invites (
    digest  BLOB PRIMARY KEY,       -- SHA-256 of the secret
    role    TEXT NOT NULL,
    labels  TEXT NOT NULL,          -- comma-separated, sorted
    created REAL NOT NULL,          -- Unix seconds, as all times here
    expires REAL NOT NULL,
    used    REAL                    -- NULL: not yet
) STRICT;
CREATE TABLE IF NOT EXISTS certificates (
    node      TEXT PRIMARY KEY,
    role      TEXT NOT NULL,
    labels    TEXT NOT NULL,
    joined    REAL NOT NULL,
    not_after REAL NOT NULL         -- of the newest one
) STRICT;
CREATE TABLE IF NOT EXISTS revocations (
    node      TEXT PRIMARY KEY,
    revoked   REAL NOT NULL,
    reason    TEXT NOT NULL,
    not_after REAL NOT NULL         -- from then on its certificate is worthless anyhow
) STRICT;
CREATE TABLE IF NOT EXISTS version (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL        -- of the list of revocations; grows with every change
) STRICT;
"""

# The time and not a count: a list that was begun anew after the loss of this file is still the newer one.
_RAISE_VERSION = """
INSERT INTO version VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET version = MAX(version + 1, excluded.version)
"""


@dataclass(frozen=True, slots=True)
class Invite:
    """What a token grants."""

    role: Role
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A node that was certified here."""

    node: str
    role: Role
    labels: tuple[str, ...]
    joined: float
    not_after: float


class AdminStore:
    """The file `path`. Raises UsageError when others may read it, or when it is not ours."""

    def __init__(self, path: Path) -> None:
        _private(path)
        # One connection, used by one thread at a time: the service has a thread of its own for it.
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            # A used token must stay used when the power fails right behind the answer.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise _failure(error, path) from error

    def close(self) -> None:
        self._db.close()

    # Invites

    def invite(self, secret: bytes, role: Role, labels: Sequence[str], *, now: float, lifetime_s: float) -> None:
        """Remember that `secret` may be used once, for this role, until now + lifetime_s. Old invites are forgotten."""
        self._write("DELETE FROM invites WHERE expires < ?", (now - _KEPT_AFTER_EXPIRY_S,))
        self._write(
            "INSERT INTO invites (digest, role, labels, created, expires) VALUES (?, ?, ?, ?, ?)",
            (_digest(secret), role, ",".join(labels), now, now + lifetime_s),
        )

    def redeem(self, secret: bytes, role: Role, *, now: float) -> Invite | None:
        """Use an invite up: what it grants, or None when there is none with this secret for this role that is neither
        used nor expired. One statement decides, so of two who ask at once one gets it.

        The search is for a hash: how long it takes tells nothing from which the secret could be built.
        """
        rows = self._write(
            "UPDATE invites SET used = ? WHERE digest = ? AND role = ? AND used IS NULL AND expires > ? "
            "RETURNING role, labels",
            (now, _digest(secret), role, now),
        )
        return Invite(cast(Role, rows[0][0]), _labels(rows[0][1])) if rows else None

    # Certificates

    def certified(self, peer: Peer, not_after: float, *, now: float) -> None:
        """Remember a certificate that was issued."""
        self._write(
            "INSERT INTO certificates (node, role, labels, joined, not_after) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (node) DO UPDATE SET labels = excluded.labels, not_after = excluded.not_after",
            (peer.node, peer.role, ",".join(peer.labels), now, not_after),
        )

    def members(self) -> list[Member]:
        """Every node that was ever certified here, oldest first."""
        rows = self._write("SELECT node, role, labels, joined, not_after FROM certificates ORDER BY joined, node", ())
        return [
            Member(node, role, _labels(labels), joined, not_after) for node, role, labels, joined, not_after in rows
        ]

    def find(self, text: str) -> Member:
        """The member whose node id begins with `text` (4 characters or more). Raises UsageError for none or several."""
        found = [member for member in self.members() if member.node.startswith(text)] if _NODE.fullmatch(text) else []
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{len(found)} nodes begin with {text}.", hint="Give more of the node id.")
        raise UsageError(
            f"No node {text!r} was admitted here.",
            hint="`shoal admin --members` lists the nodes; give their id or its first characters.",
        )

    # Revocations

    def revoke(self, node: str, *, reason: str, not_after: float, now: float) -> bool:
        """Put `node` on the list of removed nodes. False when it was there already. Raises Full when the list is."""
        self._write("BEGIN IMMEDIATE", ())
        try:
            known = self._db.execute("SELECT 1 FROM revocations WHERE node = ?", (node,)).fetchone() is not None
            if not known:
                self._db.execute("DELETE FROM revocations WHERE not_after < ?", (now - _KEPT_AFTER_EXPIRY_S,))
                (count,) = self._db.execute("SELECT COUNT(*) FROM revocations").fetchone()
                if count >= MAX_REVOKED:
                    raise Full(
                        f"The list of removed nodes is full ({MAX_REVOKED}).",
                        hint="A node leaves it when its certificate ends; with so many, make a new swarm.",
                    )
                self._db.execute("INSERT INTO revocations VALUES (?, ?, ?, ?)", (node, now, reason, not_after))
                self._db.execute(_RAISE_VERSION, (int(now * 1000),))
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise _failure(error, None) from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        return not known

    def revocations(self) -> tuple[int, tuple[str, ...]]:
        """(version, node ids) of the list; version 0 while nobody was ever removed."""
        # One statement, so that version and nodes belong together while another process writes.
        rows = self._write(
            "SELECT version.version, revocations.node FROM version LEFT JOIN revocations "
            "ORDER BY revocations.revoked, revocations.node",
            (),
        )
        return (int(rows[0][0]) if rows else 0, tuple(node for _, node in rows if node is not None))

    def retell(self, *, now: float) -> None:
        """Raise the list's version, so that it spreads once more under the admin's newest certificate: nobody takes a
        list from others when the certificate it was signed with has ended."""
        self._write("UPDATE version SET version = MAX(version + 1, ?)", (int(now * 1000),))

    def is_revoked(self, node: str) -> bool:
        return bool(self._write("SELECT 1 FROM revocations WHERE node = ?", (node,)))

    def _write(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise _failure(error, None) from error


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _labels(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _failure(error: sqlite3.DatabaseError, path: Path | None) -> ShoalError:
    if str(error) == _FULL:
        return DiskFull("The admin's records cannot be written: the disk is full.", hint="Free some space there.")
    if path is not None and not isinstance(error, sqlite3.OperationalError):
        return UsageError(f"{path} is no file of shoal's admin ({error}).", hint="Restore it from a backup.")
    return ShoalError(
        f"The admin's records cannot be read or written: {error}.", hint="See that its disk has room and is writable."
    )


def _private(path: Path) -> None:
    """Make the file with mode 0600 before SQLite opens it; SQLite gives its journal files the same mode.

    A file that is there is only looked at: to open and close it would drop this process's locks on it, and another
    process would then take away the write-ahead log under an admin that is running (gateway/accounts.py has the story).
    """
    try:
        make_private(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(f"Cannot open {path}: {error.strerror}.", hint="Choose another directory.") from error
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise UsageError(f"Cannot open {path}: it is a link or no file.", hint="Choose another directory.")
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"Others may read {path}.", hint=f"chmod 600 {path}")
