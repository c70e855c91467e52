"""API keys: who may use which model.

A key is 256 random bits, shown once when it is made. Kept is its SHA-256 (a slow hash protects guessable passwords;
256 random bits cannot be guessed) and a prefix for people to tell keys apart. One SQLite file, readable by its owner
only; a key revoked by another process is refused from the next request on.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UsageError

_MARK = "sk-shoal-"
_PREFIX_CHARS = len(_MARK) + 8
_BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id      INTEGER PRIMARY KEY,
    name    TEXT NOT NULL,
    prefix  TEXT NOT NULL,
    digest  BLOB NOT NULL UNIQUE,
    models  TEXT,            -- JSON list of model names; NULL: every model
    created INTEGER NOT NULL -- Unix seconds
) STRICT;
CREATE INDEX IF NOT EXISTS keys_by_prefix ON keys (prefix);
"""


@dataclass(frozen=True, slots=True)
class Account:
    """One key, without its secret. `models` None means every model; `created` is in Unix seconds."""

    id: int
    name: str
    prefix: str
    models: frozenset[str] | None
    created: int

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class Accounts:
    """The keys of one gateway, kept in the SQLite file `path`.

    Raises UsageError when others may read the file, or when it is not ours.
    """

    def __init__(self, path: Path) -> None:
        _private(path)
        # Requests are checked on the event loop's thread, one indexed read each (some 20 microseconds).
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UsageError(
                f"{path} is not a key file of shoal ({error}).",
                hint="Move it away; a new one is made at the next start.",
            ) from error

    def close(self) -> None:
        self._db.close()

    def create(self, name: str, *, models: Sequence[str] | None = None) -> tuple[str, Account]:
        """A new key for `name` and the record that is kept of it. The key cannot be shown again."""
        key = _MARK + secrets.token_hex(32)
        allowed = None if models is None else json.dumps(sorted(set(models)))
        (row,) = self._write(
            "INSERT INTO keys (name, prefix, digest, models, created) VALUES (?, ?, ?, ?, ?) RETURNING *",
            (name, key[:_PREFIX_CHARS], _digest(key), allowed, int(time.time())),
        )
        return key, _account(row)

    def records(self) -> list[Account]:
        """Every key, oldest first."""
        return [_account(row) for row in self._db.execute("SELECT * FROM keys ORDER BY id")]

    def revoke(self, key_id: int) -> Account:
        """Forget a key. Raises UsageError when there is none with this id."""
        rows = self._write("DELETE FROM keys WHERE id = ? RETURNING *", (key_id,))
        if not rows:
            raise UsageError(f"There is no key {key_id}.", hint="The list of keys shows the ids.")
        return _account(rows[0])

    def check(self, key: str) -> Account | None:
        """Whose key this is, or None. The secret part is compared in constant time."""
        if not key.isascii():  # no key of ours, and SQLite takes no half surrogates
            return None
        digest = _digest(key)
        for row in self._db.execute("SELECT * FROM keys WHERE prefix = ?", (key[:_PREFIX_CHARS],)):
            if hmac.compare_digest(row[3], digest):
                return _account(row)
        return None

    def _write(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            raise ShoalError(
                f"The key file cannot be written: {error}.", hint="See that its disk has room and that it is writable."
            ) from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _account(row: tuple[int, str, str, bytes, str | None, int]) -> Account:
    key_id, name, prefix, _, models, created = row
    return Account(key_id, name, prefix, None if models is None else frozenset(json.loads(models)), created)


def _private(path: Path) -> None:
    """Make the file with mode 0600 before SQLite opens it; SQLite gives its journal files the same mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        raise UsageError(f"Cannot open the key file {path}: {error.strerror}.", hint="Choose another path.") from error
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UsageError(f"Others may read the key file {path}.", hint=f"Run: chmod 600 {path}")
