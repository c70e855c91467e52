"""API keys: who may use which model, how much of it, and what was used.

A key is 256 random bits, shown once when it is made. Kept is its SHA-256 (a slow hash protects guessable passwords;
256 random bits cannot be guessed) and a prefix for people to tell keys apart. One SQLite file, readable by its owner
only; a key revoked by another process is refused from the next request on. A revoked key's record and usage stay: the
audit log names keys by id, and an id must not come to mean somebody else.

What requests use is gathered and written many at a time (`charge`, then `write_usage` in a worker thread): one wait
for the disk then serves all requests that ended meanwhile.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UsageError

DAY_S = 86_400
MAX_NAME_CHARS = 100
MAX_REQUESTS_PER_MINUTE = 60_000
"""The gateway remembers the time of each request of the last minute."""
MAX_TOKENS_PER_DAY = 10**15

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
CREATE TABLE IF NOT EXISTS usage (
    key               INTEGER NOT NULL,
    day               INTEGER NOT NULL, -- days since 1 January 1970, UTC
    requests          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (key, day)
) STRICT, WITHOUT ROWID;
"""
# Columns that files of earlier versions lack.
_LATER_COLUMNS = {
    "zones": "TEXT NOT NULL DEFAULT ''",  # where this key's requests may be computed; empty: anywhere
    "requests_per_minute": "INTEGER",  # NULL: no limit, as below
    "tokens_per_day": "INTEGER",
    "revoked": "INTEGER",  # Unix seconds; NULL: valid
}
_COLUMNS = "id, name, prefix, digest, models, created, zones, requests_per_minute, tokens_per_day, revoked"
_ADD = (
    "INSERT INTO usage VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, "
    "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
    "completion_tokens = completion_tokens + excluded.completion_tokens"
)


@dataclass(frozen=True, slots=True)
class Account:
    """One key, without its secret. `created` and `revoked` are in Unix seconds; None means: every model, no limit, not
    revoked. `zones` says on which machines its requests may be computed (swarm/trust.py); empty: on any."""

    id: int
    name: str
    prefix: str
    models: frozenset[str] | None
    created: int
    zones: str = ""
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    revoked: int | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used: requests that were admitted, and their tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


def day_of(unix_s: float) -> int:
    """The UTC day that daily limits count by."""
    return int(unix_s // DAY_S)


class Accounts:
    """The keys of one gateway, kept in the SQLite file `path`.

    Raises UsageError when others may read the file, or when it is not ours.
    """

    def __init__(self, path: Path) -> None:
        _private(path)
        # Requests are checked on the event loop's thread, one indexed read each (some 20 microseconds).
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        # Usage is written by worker threads, one at a time.
        self._usage_db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._writing = threading.Lock()
        self._noting = threading.Lock()
        self._noted: dict[tuple[int, int], Usage] = {}
        self._closed = False
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            for database in (self._db, self._usage_db):
                database.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._upgrade()
        except sqlite3.DatabaseError as error:
            self._db.close()
            self._usage_db.close()
            raise UsageError(
                f"{path} is not a key file of shoal ({error}).",
                hint="Move it away; a new one is made at the next start.",
            ) from error

    def _upgrade(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")  # another process may be doing the same
        known = {row[1] for row in self._db.execute("PRAGMA table_info(keys)")}
        for name, kind in _LATER_COLUMNS.items():
            if name not in known:
                self._db.execute(f"ALTER TABLE keys ADD COLUMN {name} {kind}")
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Write what is still to be written, and close the file. Nothing that is noted later is written."""
        try:
            self.write_usage()
        finally:
            with self._writing:
                self._closed = True
                self._usage_db.close()
                self._db.close()

    # --- keys ------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        models: Sequence[str] | None = None,
        zones: str = "",
        requests_per_minute: int | None = None,
        tokens_per_day: int | None = None,
    ) -> tuple[str, Account]:
        """A new key for `name` and the record that is kept of it. The key cannot be shown again.

        Raises UsageError for a name or a limit that cannot be.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise UsageError(
                f"A key's name has 1 to {MAX_NAME_CHARS} printable characters.",
                hint="Choose one that says whose it is.",
            )
        for limit, most, what in (
            (requests_per_minute, MAX_REQUESTS_PER_MINUTE, "requests per minute"),
            (tokens_per_day, MAX_TOKENS_PER_DAY, "tokens per day"),
        ):
            if limit is not None and not 1 <= limit <= most:
                raise UsageError(f"{limit} {what}: a limit lies between 1 and {most}.", hint="Leave it out for none.")
        key = _MARK + secrets.token_hex(32)
        allowed = None if models is None else json.dumps(sorted(set(models)))
        (row,) = self._write(
            "INSERT INTO keys (name, prefix, digest, models, created, zones, requests_per_minute, tokens_per_day) "
            f"VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
            (
                *(name, key[:_PREFIX_CHARS], _digest(key), allowed, int(time.time())),
                *(zones, requests_per_minute, tokens_per_day),
            ),
        )
        return key, _account(row)

    def records(self, *, revoked: bool = False) -> list[Account]:
        """Every valid key, oldest first; with `revoked` also those that were revoked."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM keys WHERE revoked IS NULL OR ? ORDER BY id", (revoked,))
        return [_account(row) for row in rows]

    def revoke(self, key_id: int) -> Account:
        """Make a key worthless. Raises UsageError when there is no valid one with this id."""
        rows = self._write(
            f"UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL RETURNING {_COLUMNS}",
            (int(time.time()), key_id),
        )
        if not rows:
            raise UsageError(f"There is no key {key_id}.", hint="`shoal keys list` shows the ids.")
        return _account(rows[0])

    def check(self, key: str) -> Account | None:
        """Whose key this is, or None. The secret part is compared in constant time."""
        if not key.isascii():  # no key of ours, and SQLite takes no half surrogates
            return None
        digest = _digest(key)
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM keys WHERE prefix = ? AND revoked IS NULL", (key[:_PREFIX_CHARS],)
        )
        for row in rows:
            if hmac.compare_digest(row[3], digest):
                return _account(row)
        return None

    def _write(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            raise _cannot_write(error) from error

    # --- usage -----------------------------------------------------------------------------------------------

    def charge(self, key_id: int, day: int, usage: Usage) -> None:
        """Note what a request has used; `write_usage` puts it on the disk."""
        with self._noting:
            self._noted[key_id, day] = self._noted.get((key_id, day), Usage()) + usage

    def write_usage(self) -> None:
        """Everything noted so far to the disk, in one transaction. May run in any thread.

        Raises ShoalError when the disk does not take it; it stays noted and goes with the next write.
        """
        with self._writing:
            with self._noting:
                batch, self._noted = self._noted, {}
            if self._closed or not batch:
                return
            rows = [
                (*place, used.requests, used.prompt_tokens, used.completion_tokens) for place, used in batch.items()
            ]
            try:
                self._usage_db.execute("BEGIN IMMEDIATE")
                self._usage_db.executemany(_ADD, rows)
                self._usage_db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if self._usage_db.in_transaction:
                    self._usage_db.execute("ROLLBACK")
                for (key_id, day), used in batch.items():
                    self.charge(key_id, day, used)
                raise _cannot_write(error) from error

    def used(self, key_id: int, first_day: int = 0, last_day: int = 2**31) -> Usage:
        """What a key used from one day to another, both included, as far as it is on the disk."""
        (row,) = self._db.execute(
            "SELECT total(requests), total(prompt_tokens), total(completion_tokens) FROM usage "
            "WHERE key = ? AND day BETWEEN ? AND ?",
            (key_id, first_day, last_day),
        )
        return Usage(*map(int, row))


def _cannot_write(error: sqlite3.OperationalError) -> ShoalError:
    return ShoalError(
        f"The key file cannot be written: {error}.", hint="See that its disk has room and that it is writable."
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _account(row: tuple[Any, ...]) -> Account:
    key_id, name, prefix, _, models, *rest = row
    return Account(key_id, name, prefix, None if models is None else frozenset(json.loads(models)), *rest)


def _private(path: Path) -> None:
    """Make the file with mode 0600 before SQLite opens it; SQLite gives its journal files the same mode.

    A file that is there is only looked at. To open and close it would drop this process's locks on it (POSIX locks
    belong to the process and the file): the next process that closes it would think itself alone and remove the
    write-ahead log, and a gateway that is open meanwhile would never see a revoked key.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise _cannot_open(path, error.strerror) from error
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise _cannot_open(path, "it is a link or no file")
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"Others may read the key file {path}.", hint=f"Run: chmod 600 {path}")


def _cannot_open(path: Path, why: str | None) -> UsageError:
    return UsageError(f"Cannot open the key file {path}: {why}.", hint="Choose another path.")
