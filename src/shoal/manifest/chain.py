"""The audit log: lines that are chained by hashes and closed by signatures, so that no line can be changed, removed,
moved, added or cut off unnoticed.

    audit-000000000000.jsonl    older parts, named by their first entry; nothing in them changes any more
    audit.jsonl                 the part being written
    audit.head                  number and hash of the last entry, signed
    audit.lock                  whoever writes, or reads all, holds a lock on it

A line is canonical JSON: {"at": milliseconds since 1970, "by": node, "data": {...}, "kind", "prev", "seq"} and, in the
last line of everything that was written at once, "sig". `prev` is the SHA-256 of the whole line before, so every byte
of every line stands under all later signatures, and the last line under that of audit.head. An entry "log.signer"
brings the certificates of a writer before its first signature; renewed ones are of the same key.

Several processes of one home write one log (a gateway, an admin, commands). Each append takes the lock, looks whether
others wrote meanwhile, writes its lines with one write, waits until the disk has them, then replaces the head. A
process killed in between leaves either a part of a line, which nobody was told is written, or a head that is behind
the log; the next writer repairs both and says so in an entry ("log.repaired").

Who has the node's key and the files can write another history. That is why the head also goes to the other nodes
(Record.audit): they remember it, and a log that does not contain it any more was rolled back.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shoal.errors import ShoalError, UsageError
from shoal.manifest.canonical import Json, canonical, read_canonical
from shoal.manifest.files import cannot_write, make_private, write_private

MAX_LINE_BYTES = 256 * 1024
PART_BYTES = 64 * 1024 * 1024
"""A part that has grown beyond this is closed, and a new one begun."""

_ENTRY = b"shoal audit entry\0"
_HEAD = b"shoal audit head\0"
"""What a signature is for stands before what is signed: a head never passes for an entry."""
_FIRST_PREV = hashlib.sha256(b"shoal audit log 1").hexdigest()
_FIELDS = frozenset({"at", "by", "data", "kind", "prev", "seq"})
_MAX_KIND = 64


class AuditBroken(ShoalError):
    """The log on the disk is not what was written. Nothing is appended to it any more."""

    code = "audit_broken"
    exit_code = 3
    http_status = 503


class Signer(Protocol):
    """A certificate that was checked (net.identity.Credential)."""

    def verify(self, payload: bytes, signature: bytes) -> bool: ...


Check = Callable[[Sequence[bytes], float, str], Signer]
"""check(chain, at, node) -> whose certificates (DER) these were at that time (Unix seconds). Raises ShoalError when
they are not accepted or are not those of `node`."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry: its number and the SHA-256 of its line."""

    seq: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. `at` is in milliseconds since 1970."""

    seq: int
    at: int
    by: str
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found. `bad` names the first thing that is wrong; empty: the log is whole."""

    entries: int
    parts: int
    head: Head | None
    bad: str
    bad_seq: int | None
    notes: tuple[str, ...]
    """Repairs after crashes, which are no tampering but worth knowing."""
    hashes: Mapping[int, bytes]
    """The hashes that were asked for, by number of the entry."""

    @property
    def whole(self) -> bool:
        return not self.bad


class AuditLog:
    """Appends to the log in `folder`. Several processes may; threads of one may not.

    Raises AuditBroken when the end of the log is not what its head says, UsageError when others may read it."""

    def __init__(
        self,
        folder: Path,
        sign: Callable[[bytes], bytes],
        signer: str,
        chain: Sequence[bytes],
        *,
        clock: Callable[[], float] = time.time,
        part_bytes: int = PART_BYTES,
        renewed: Callable[[], Sequence[bytes]] | None = None,
    ) -> None:
        """`sign` and `chain` (DER certificates, the node's own first) are those of the node `signer`. A process that
        outlives them gives `renewed`, the chain as it is now: an entry must not bring certificates that have ended."""
        self._folder = folder
        self._path = folder / "audit.jsonl"
        self._sign = sign
        self._signer = signer
        self._chain = _as_text(chain)
        self._renewed = renewed
        self._clock = clock
        self._part_bytes = part_bytes
        self._head: Head | None = None
        """The last entry that this process has seen."""
        self._seen: tuple[int, int] | None = None
        """(inode, size) of the part when it was last looked at; None: never."""
        self._announced = False
        """The certificates stand in the present part."""
        self._repaired = ""
        """What a crash had left, to be said in the next entry."""
        make_private(folder)
        with _locked(folder):
            self._look()

    @property
    def head(self) -> Head | None:
        """The last entry written or seen; None for an empty log."""
        return self._head

    def append(self, kind: str, **data: Json) -> Head:
        """One entry; it is on the disk when this returns. Raises AuditBroken, DiskFull, or ValueError for data that is
        too large or has no canonical form."""
        return self.append_all([(kind, data)])

    def append_all(self, entries: Sequence[tuple[str, Mapping[str, Json]]]) -> Head:
        """Several entries under one signature and one wait for the disk."""
        with _locked(self._folder):
            self._look()
            wanted: list[tuple[str, Mapping[str, Json]]] = []
            if self._seen is not None and self._seen[1] >= self._part_bytes and self._head is not None:
                self._rotate()
            if self._renewed is not None and (chain := _as_text(self._renewed())) != self._chain:
                self._chain, self._announced = chain, False
            if not self._announced:
                wanted.append(("log.signer", {"chain": list(self._chain)}))
            if self._repaired:
                wanted.append(("log.repaired", {"found": self._repaired}))
            head, lines = self._compose([*wanted, *entries])
            self._write(lines)
            self._head = head
            self._announced = True
            self._repaired = ""
            self._write_head(head)
            return head

    # --- what is on the disk ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Bring `_head` up to date with the disk, and repair what a crash left. Raises AuditBroken."""
        known, on_disk = self._seen, _identity(self._path)
        if known is not None and known == on_disk:
            return
        if known is not None and on_disk is not None and known[0] == on_disk[0] and on_disk[1] < known[1]:
            raise self._broken("audit.jsonl became shorter while it was in use")
        if self._head is not None and known is not None and on_disk is not None and known[0] == on_disk[0]:
            self._look_on(self._head, known[1])
            return
        data = b"" if on_disk is None else self._path.read_bytes()
        end, last = _last_signed(data)
        parts = _parts(self._folder)
        if last is None and parts:  # a part was just begun
            last = _last_signed(parts[-1].read_bytes())[1]
        head = _read_head(self._folder)
        if head is not None and (last is None or head.seq > last.seq):
            ends = "is empty" if last is None else f"ends at {last.seq}"
            raise self._broken(f"audit.head is at entry {head.seq}, the log {ends}")
        if last is None:
            if self._head is not None:
                raise self._broken("it is empty")
            if data:
                self._repaired = f"{len(data)} bytes of an unfinished first entry"
                self._cut(0)
            self._seen = _identity(self._path)
            self._announced = False
            return
        if head is not None and head.seq == last.seq and head.hash != last.hash:
            raise self._broken(f"audit.head names another entry {head.seq} than the log has")
        if self._head is not None and not _contains(self._head, data, parts):
            raise self._broken(f"entry {self._head.seq} is not what this process wrote or saw")
        if end < len(data):
            rest = data[end:]
            self._repaired = f"{len(rest)} bytes of unfinished entries, sha256 {hashlib.sha256(rest).hexdigest()}"
            self._cut(end)
        elif head is None or head.seq < last.seq:
            self._repaired = "a head that was behind the log" if head is not None else "no head"
        self._head = last
        self._announced = canonical(list(self._chain)) in data
        self._seen = _identity(self._path)

    def _look_on(self, known: Head, size: int) -> None:
        """Read what others have written behind `known` and these many bytes: a gateway and its admin take turns."""
        with self._path.open("rb") as file:
            file.seek(size)
            data = file.read()
        end, last = _last_signed(data)
        if last is not None and _prev_of(data) != known.hash.hex():
            raise self._broken(f"entry {known.seq + 1} does not follow what this process wrote or saw")
        head = _read_head(self._folder)
        if head is not None and head.seq > (last or known).seq:
            raise self._broken(f"audit.head is at entry {head.seq}, the log ends at {(last or known).seq}")
        self._head = last or known
        if end < len(data):
            rest = data[end:]
            self._repaired = f"{len(rest)} bytes of unfinished entries, sha256 {hashlib.sha256(rest).hexdigest()}"
            self._cut(size + end)
        elif head != self._head:
            self._repaired = "a head that was behind the log"
        self._seen = _identity(self._path)

    def _broken(self, what: str) -> AuditBroken:
        return AuditBroken(
            f"The audit log in {self._folder} was changed: {what}.",
            hint="`shoal audit verify` names the first bad entry. Keep the files for whoever looks into it; once they"
            " are moved away, a new log begins.",
        )

    def _cut(self, end: int) -> None:
        os.truncate(self._path, end)

    def _rotate(self) -> None:
        """Close the present part: rename it by its first entry, and let the next write begin another one."""
        with self._path.open("rb") as file:
            first = read_canonical(file.readline(MAX_LINE_BYTES).rstrip(b"\n"))["seq"]
        os.replace(self._path, self._folder / f"audit-{first:012d}.jsonl")
        self._seen = None
        self._announced = False

    def _compose(self, entries: Sequence[tuple[str, Mapping[str, Json]]]) -> tuple[Head, bytes]:
        seq, prev = (0, _FIRST_PREV) if self._head is None else (self._head.seq + 1, self._head.hash.hex())
        at = int(self._clock() * 1000)
        lines: list[bytes] = []
        for number, (kind, data) in enumerate(entries):
            if len(kind) > _MAX_KIND:
                raise ValueError(f"{kind[:_MAX_KIND]!r}... is no kind of entry")
            entry: dict[str, Json] = {
                "at": at,
                "by": self._signer,
                "data": dict(data),
                "kind": kind,
                "prev": prev,
                "seq": seq,
            }
            if number == len(entries) - 1:
                entry["sig"] = base64.b64encode(self._sign(_ENTRY + canonical(entry))).decode()
            line = canonical(entry)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"an audit entry of {len(line)} bytes")
            lines.append(line)
            prev = hashlib.sha256(line).hexdigest()
            seq += 1
        return Head(seq - 1, bytes.fromhex(prev)), b"\n".join(lines) + b"\n"

    def _write(self, lines: bytes) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    _write_all(descriptor, lines)
                    os.fsync(descriptor)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, size)  # half a line would be taken for a crash
                    raise
                self._seen = (os.fstat(descriptor).st_ino, size + len(lines))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _write_head(self, head: Head) -> None:
        value: dict[str, Json] = {"by": self._signer, "hash": head.hash.hex(), "seq": head.seq}
        value["sig"] = base64.b64encode(self._sign(_HEAD + canonical(value))).decode()
        # Not durable: after a power failure an older head may be found, which the next writer repairs.
        write_private(_head_path(self._folder), canonical(value) + b"\n", durable=False)


# --- reading ------------------------------------------------------------------------------------------------------


def verify(
    folder: Path, check: Check, *, hashes_of: Sequence[int] = (), on_entry: Callable[[Entry], None] | None = None
) -> Verdict:
    """Read the whole log, in all its parts, and say what is the first thing wrong with it. `on_entry` gets every entry
    up to there. `hashes_of`: numbers of entries whose hashes the verdict is to hold. Raises UsageError when there is no
    log."""
    current = folder / "audit.jsonl"
    if not (_parts(folder) or current.exists() or _head_path(folder).exists()):
        raise UsageError(f"There is no audit log in {folder}.", hint="Give the swarm's directory: --swarm-dir DIR.")
    reading = _Reading(check, frozenset(hashes_of), on_entry)
    with contextlib.ExitStack() as stack:
        # Alone with the log only for as long as it takes to see where it ends: its writers must not wait for us.
        with _locked(folder, reading=True):
            # Between closing a part and the first entry of the next there is no audit.jsonl; audit.head knows.
            paths = [*_parts(folder), *([current] if current.exists() else [])]
            files = [stack.enter_context(path.open("rb")) for path in paths]
            sizes = [os.fstat(file.fileno()).st_size for file in files]
            head = _head_path(folder).read_bytes() if _head_path(folder).exists() else None
        try:
            for path, file, size in zip(paths, files, sizes, strict=True):
                reading.part(path.name, file, size)
            reading.end(head)
        except _Bad as bad:
            reading.bad, reading.bad_seq = str(bad), bad.seq
    return Verdict(
        reading.seq,
        reading.parts,
        reading.head,
        reading.bad,
        reading.bad_seq,
        tuple(reading.notes),
        reading.hashes,
    )


class _Bad(Exception):
    def __init__(self, text: str, seq: int | None) -> None:
        super().__init__(text)
        self.seq = seq


class _Reading:
    """One pass over a log."""

    def __init__(self, check: Check, hashes_of: frozenset[int], on_entry: Callable[[Entry], None] | None) -> None:
        self.seq = 0
        """The number that the next entry must have: how many were good."""
        self.parts = 0
        self.head: Head | None = None
        self.bad = ""
        self.bad_seq: int | None = None
        self.notes: list[str] = []
        self.hashes: dict[int, bytes] = {}
        self._check = check
        self._hashes_of = hashes_of
        self._on_entry = on_entry
        self._prev = _FIRST_PREV
        self._signers: dict[str, Signer] = {}
        self._open: str | None = None
        """Who has to close the entries since the last signature."""

    def part(self, name: str, file: BinaryIO, size: int) -> None:
        """The first `size` bytes of one file."""
        self.parts += 1
        if name != "audit.jsonl" and name != f"audit-{self.seq:012d}.jsonl":
            raise _Bad(f"a part is missing: entry {self.seq} should begin the next one, which is {name}", self.seq)
        number = 0
        while line := file.readline(min(MAX_LINE_BYTES + 1, size)):
            number += 1
            size -= len(line)
            self._line(line, f"line {number} of {name}")
        if not number:
            raise _Bad(f"{name} is empty", self.seq)

    def _line(self, line: bytes, where: str) -> None:
        entry, body = self._parsed(line, where)
        by = entry.by
        if entry.kind == "log.signer":
            self._signer(entry, where)
        if self._open not in (None, by):
            raise self._wrong(where, "stands between entries that were written at once")
        if "sig" in body:
            signature = body.pop("sig")
            signer = self._signers.get(by)
            if signer is None:
                raise self._wrong(where, f"is signed by {by}, whose certificates the log does not have")
            if not _verified(signer, _ENTRY + canonical(body), signature):
                raise self._wrong(where, "has a signature that is not that of its writer")
            self._open = None
        else:
            self._open = by
        digest = hashlib.sha256(line[:-1]).digest()
        if entry.seq in self._hashes_of:
            self.hashes[entry.seq] = digest
        self.head = Head(entry.seq, digest)
        self._prev = digest.hex()
        self.seq += 1
        if entry.kind == "log.repaired":
            self.notes.append(f"before entry {entry.seq} a writer found {entry.data.get('found')} and repaired it")
        if self._on_entry is not None:
            self._on_entry(entry)

    def _parsed(self, line: bytes, where: str) -> tuple[Entry, dict[str, Any]]:
        if not line.endswith(b"\n"):
            raise self._wrong(where, "is cut off" if len(line) <= MAX_LINE_BYTES else "is too long")
        try:
            body = read_canonical(line[:-1])
        except ValueError as error:
            raise self._wrong(where, f"cannot be read ({error})") from None
        if not isinstance(body, dict) or set(body) - {"sig"} != _FIELDS or not isinstance(body["data"], dict):
            raise self._wrong(where, "is no entry")
        texts = [body["by"], body["kind"], body["prev"], body.get("sig", "")]
        if not all(isinstance(text, str) for text in texts) or not all(type(body[k]) is int for k in ("at", "seq")):
            raise self._wrong(where, "is no entry")
        if body["seq"] != self.seq:
            raise self._wrong(where, f"is entry {body['seq']}")
        if body["prev"] != self._prev:
            raise self._wrong(where, "does not follow from the line before: one of the two was changed")
        return Entry(body["seq"], body["at"], body["by"], body["kind"], body["data"]), body

    def _signer(self, entry: Entry, where: str) -> None:
        try:
            chain = [_unbase64(text) for text in entry.data["chain"]]
            self._signers[entry.by] = self._check(chain, entry.at / 1000, entry.by)
        except (ShoalError, ValueError, KeyError, TypeError) as error:
            raise self._wrong(where, f"brings certificates that are not accepted ({error})") from None

    def _wrong(self, where: str, what: str) -> _Bad:
        return _Bad(f"entry {self.seq} ({where}) {what}", self.seq)

    def end(self, text: bytes | None) -> None:
        """Nothing follows; `text` is audit.head."""
        if self._open is not None:
            raise _Bad(f"the last entries, up to {self.seq - 1}, are not signed", self.seq - 1)
        if text is None:
            raise _Bad("audit.head is gone, so nobody can tell whether entries were cut off the end", self.seq)
        try:
            head = read_canonical(text.removesuffix(b"\n"))
            if set(head) != {"by", "hash", "seq", "sig"} or not text.endswith(b"\n"):
                raise ValueError("other fields")
            signature = head.pop("sig")
            signer = self._signers[head["by"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Bad("audit.head cannot be read, or its writer is unknown to the log", None) from None
        if not _verified(signer, _HEAD + canonical(head), signature):
            raise _Bad("the signature of audit.head is not that of its writer", None)
        last = self.head
        if last is None or (head["seq"], head["hash"]) != (last.seq, last.hash.hex()):
            at = "nothing" if last is None else f"entry {last.seq}"
            why = f"audit.head is about entry {head['seq']}, and the log ends with {at}"
            raise _Bad(why, min(head["seq"] + 1, self.seq))


# --- bytes ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Path, *, reading: bool = False) -> Iterator[None]:
    """Alone with the log. Locks of a process that dies are gone with it. A copy on a medium that cannot be written to
    is read without."""
    try:
        descriptor = os.open(folder / "audit.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if reading and error.errno in (errno.EROFS, errno.EACCES):
            yield
            return
        raise cannot_write(folder / "audit.lock", error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _head_path(folder: Path) -> Path:
    return folder / "audit.head"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


def _identity(path: Path) -> tuple[int, int] | None:
    """(inode, size); None when there is no such file. Raises UsageError when others may read it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if found.st_mode & 0o077:
        raise UsageError(f"Others may read the audit log {path}.", hint=f"Run: chmod 600 {path}")
    return found.st_ino, found.st_size


def _read_head(folder: Path) -> Head | None:
    """What audit.head says, unchecked; None when it is missing or damaged."""
    try:
        value = read_canonical(_head_path(folder).read_bytes().removesuffix(b"\n"))
        return Head(int(value["seq"]), bytes.fromhex(value["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_signed(data: bytes) -> tuple[int, Head | None]:
    """(where the last signed line ends, that entry) of one part."""
    end = data.rfind(b"\n") + 1
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        line = data[start : end - 1]
        try:
            entry = read_canonical(line)
            if "sig" in entry:
                return end, Head(int(entry["seq"]), hashlib.sha256(line).digest())
        except (ValueError, KeyError, TypeError):
            pass
        end = start
    return 0, None


def _prev_of(data: bytes) -> str:
    """What the first line names as the hash of the line before it; empty when it cannot be read."""
    try:
        return str(read_canonical(data[: data.index(b"\n")])["prev"])
    except (ValueError, KeyError, TypeError):
        return ""


def _contains(head: Head, data: bytes, parts: Sequence[Path]) -> bool:
    """The entry `head` stands in this part, or in the one that was closed last."""
    return any(
        hashlib.sha256(line).digest() == head.hash
        for text in (data, *(path.read_bytes() for path in parts[-1:]))
        for line in text.split(b"\n")
    )


def _verified(signer: Signer, payload: bytes, signature: str) -> bool:
    try:
        return signer.verify(payload, _unbase64(signature))
    except ValueError:
        return False


def _as_text(chain: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(der).decode() for der in chain]


def _unbase64(text: object) -> bytes:
    """Raises ValueError for anything but the one way in which these bytes are written."""
    if not isinstance(text, str):
        raise ValueError("no text")
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("not the canonical base64")
    return data


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
