"""Looks at the swarm directory, at running.json and at what they point to. Opens everything for reading only."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from shoal.doctor.facts import ApiKey, AuditLog, Certificate, Home, Private, Running
from shoal.doctor.machine import free_bytes
from shoal.errors import Refused, ShoalError
from shoal.manifest import chain
from shoal.net.identity import Trust

_UNREADABLE = (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound)
MAX_FILE_BYTES = 1 << 20
"""No certificate, key or settings file of a swarm is longer."""
MAX_AUDIT_BYTES = 32 << 20
"""Some 100,000 entries, which take a second or two."""


def home(path: Path, now: float) -> Home:
    """The swarm directory at `path`; `now` in Unix seconds."""
    if not path.is_dir():
        return Home(str(path), exists=False, free=free_bytes(path))
    found = path.stat()
    swarm, error = _swarm_file(path / "swarm.json")
    seeds = swarm.get("seeds")
    issuer = (path / "ca" / "issuer.key").is_file()
    return Home(
        str(path),
        exists=True,
        mode=stat.S_IMODE(found.st_mode),
        mine=_mine(found),
        writable=os.access(path, os.R_OK | os.W_OK | os.X_OK),
        free=free_bytes(path),
        swarm=str(swarm.get("swarm", "")),
        swarm_error=error,
        seeds=tuple(each for each in seeds if isinstance(each, str)) if isinstance(seeds, list) else (),
        certificates=tuple(_certificates(path)),
        private=tuple(_private(path)),
        root_key=(path / "ca" / "ca.key").is_file(),
        issuer_key=issuer,
        databases=tuple((str(file), _database_error(file)) for file in sorted(path.glob("*.sqlite"))),
        keys=_api_keys(path / "accounts.sqlite", now),
        requests=_count(path / "accounts.sqlite", _REQUESTS) or 0,
        audit=_audit(path),
        open_invites=_count(path / "admin.sqlite", _OPEN_INVITES, now) or 0,
        revoked_valid=(_count(path / "admin.sqlite", _REVOKED, now) or 0) if issuer else None,
        unfinished=tuple(str(file) for file in sorted(path.rglob(".*.partial"))),
    )


def running(state_dir: Path) -> Running:
    """What the running.*.json in the user's state folder say, and what swarms left behind there."""
    left = tuple(str(folder) for folder in sorted(state_dir.glob("swarm-*-*")) if _orphaned(folder))
    newest = Running("", leftovers=left)
    stale: list[str] = []
    changed = {file: file.stat().st_mtime_ns for file in state_dir.glob("running.*.json")}
    for file in sorted(changed, key=lambda file: changed[file]):
        try:
            told = json.loads(file.read_text())
            api, home, pid = str(told["api"]), str(told["swarm_dir"]), int(told["pid"])
            key = str(told["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Running(str(file), error=f"{file} cannot be read: {error}", leftovers=left)
        if process_exists(pid):
            newest = Running(str(file), api, home, key, private=_private_file(file), leftovers=left)
        else:
            stale.append(str(file))
    return dataclasses.replace(newest, stale=tuple(stale))


def process_exists(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").is_dir()


def _orphaned(folder: Path) -> bool:
    pid = folder.name.split("-")[1]
    keys = (folder / "ca").is_dir() or (folder / "nodes").is_dir()
    return pid.isdigit() and keys and not process_exists(int(pid))


def _mine(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid()


def _swarm_file(path: Path) -> tuple[dict[str, Any], str]:
    """What swarm.json says, and why it says nothing. A directory of `shoal up` may have none."""
    try:
        found = json.loads(_read(path))
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read: {error}"
    if not isinstance(found, dict) or not isinstance(found.get("swarm"), str):
        return {}, f"{path} names no swarm."
    return found, ""


def _private(path: Path) -> Iterator[Private]:
    """The folders and files that hold secrets."""
    yield _private_file(path)
    for pattern in ("ca", "nodes", "**/*.key", "*.sqlite", "*.sqlite-wal", "swarm.json", "audit.*"):
        for file in sorted(path.glob(pattern)):
            yield _private_file(file)


def _private_file(path: Path) -> Private:
    found = path.stat()
    return Private(str(path), stat.S_IMODE(found.st_mode), _mine(found))


# --- certificates --------------------------------------------------------------------------------------------


def _certificates(path: Path) -> Iterator[Certificate]:
    places = [("root", path / "ca" / "ca.pem", path / "ca" / "ca.key")]
    places += [("issuer", path / "ca" / "issuer.pem", path / "ca" / "issuer.key")]
    folders = sorted(folder for folder in (path / "nodes").glob("*") if folder.is_dir())
    places += [(folder.name, folder / "node.pem", folder / "node.key") for folder in folders]
    for name, certificate, key in places:
        if certificate.exists() or (name not in ("root", "issuer") and key.exists()):
            root = path / "ca" / "ca.pem"
            beside = certificate.parent / "ca.pem"
            yield _certificate(name, certificate, key, root if root.is_file() else beside)


def _certificate(name: str, path: Path, key: Path, root: Path) -> Certificate:
    try:
        chain = x509.load_pem_x509_certificates(_read(path))
        roots = x509.load_pem_x509_certificates(_read(root))
        fits = _key_fits(chain[0], key)
    except _UNREADABLE as error:
        return Certificate(name, str(path), error=str(error) or type(error).__name__)
    return Certificate(
        name,
        str(path),
        not_before=chain[0].not_valid_before_utc.timestamp(),
        not_after=chain[0].not_valid_after_utc.timestamp(),
        key_fits=fits,
        from_root=_ends_at(chain, roots),
    )


def _key_fits(certificate: x509.Certificate, path: Path) -> bool | None:
    if not path.is_file():
        return None
    key = serialization.load_pem_private_key(_read(path), password=None)
    return _public(key.public_key()) == _public(certificate.public_key())


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _ends_at(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> bool:
    """Each certificate was issued by the next, the last one by one of the roots. Dates are judged elsewhere."""
    try:
        for issued, by in pairwise(chain):
            issued.verify_directly_issued_by(by)
    except (InvalidSignature, ValueError, TypeError):
        return False
    for root in roots:
        try:
            chain[-1].verify_directly_issued_by(root)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return True
    return False


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is longer than {MAX_FILE_BYTES} bytes")
    return data


# --- databases -----------------------------------------------------------------------------------------------

_OPEN_INVITES = "SELECT count(*) FROM invites WHERE used IS NULL AND expires > ?"
_REQUESTS = "SELECT coalesce(sum(requests), 0) FROM usage"
_REVOKED = "SELECT count(*) FROM revocations WHERE not_after > ?"


def _open(path: Path) -> sqlite3.Connection:
    """A database as it is, without making a file. One that nobody has open is read without its lock files."""
    still = "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
    return sqlite3.connect(f"file:{path}?mode=ro{still}", uri=True, timeout=0.5)


def _database_error(path: Path) -> str:
    try:
        with closing(_open(path)) as database:
            (answer,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return str(error)
    return "" if answer == "ok" else str(answer)


def _count(path: Path, query: str, *values: float) -> int | None:
    """The answer of a counting query; None when there is no such table."""
    if not path.is_file():
        return None
    try:
        with closing(_open(path)) as database:
            return int(database.execute(query, values).fetchone()[0])
    except sqlite3.Error:
        return None


def _api_keys(path: Path, now: float) -> tuple[ApiKey, ...] | None:
    if not path.is_file():
        return None
    try:
        with closing(_open(path)) as database:
            database.row_factory = sqlite3.Row
            rows = [dict(row) for row in database.execute("SELECT * FROM keys")]
    except sqlite3.Error:
        return None  # said by the check of databases
    return tuple(
        ApiKey(
            str(row["name"]),
            limited=row.get("requests_per_minute") is not None or row.get("tokens_per_day") is not None,
            days_old=(now - row["created"]) / 86_400,
        )
        for row in rows
        if row.get("revoked") is None
    )


# --- audit log -----------------------------------------------------------------------------------------------


def _audit(path: Path) -> AuditLog | None:
    """What the log of this home comes to. A long one is left to `shoal audit verify`: a look takes seconds."""
    parts = [path / "audit.jsonl", *path.glob("audit-*.jsonl")]
    sizes = [part.stat().st_size for part in parts if part.is_file()]
    if not sizes and not (path / "audit.head").exists():
        return None
    if sum(sizes) > MAX_AUDIT_BYTES:
        return AuditLog(None)
    try:
        verdict = chain.verify(path, _checker(path))
    except (*_UNREADABLE, ShoalError) as error:
        return AuditLog(0, error=str(error) or type(error).__name__)
    return AuditLog(verdict.entries, error=verdict.bad)


def _checker(path: Path) -> chain.Check:
    """Certificates in the log are those of this home's own root."""
    roots = [path / "ca" / "ca.pem", *sorted((path / "nodes").glob("*/ca.pem"))]
    trust = Trust(_read(next((root for root in roots if root.is_file()), roots[0])))

    def check(certificates: Sequence[bytes], at: float, node: str) -> chain.Signer:
        credential = trust.credential(certificates, datetime.datetime.fromtimestamp(at, datetime.UTC))
        if credential.peer.node != node:
            raise Refused(f"Node {credential.peer.node} signed for node {node}.")
        return credential

    return check
