"""Random changes to an audit log by somebody who can write its files and has no key: is every one of them found?"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from shoal.errors import Refused
from shoal.manifest.canonical import canonical, read_canonical
from shoal.manifest.chain import AuditLog, verify
from shoal.net.identity import Credential, Trust, create_ca, create_issuer, issue_node

Files = dict[str, bytes]
Edit = Callable[[Files, random.Random, Sequence[Files]], None]
"""edit(files, rng, past): change `files`, by name, in place; `past` are all earlier states of the log."""


@dataclass
class Found:
    """How many edits of each kind were made, and which of them `verify` did not find."""

    made: Counter[str] = field(default_factory=Counter)
    unnoticed: list[str] = field(default_factory=list)


def check_edits(folder: Path, count: int) -> Found:
    """Make a log of two writers and several parts in `folder`, and `count` edits, each to the whole log."""
    root = create_ca("edits")
    issuer = create_issuer(root)
    nodes = [issue_node(issuer, "gateway"), issue_node(issuer, "admin")]
    logs = [AuditLog(folder, node.sign, node.peer.node, node.chain_der, part_bytes=2500) for node in nodes]
    trust = Trust(root.cert_pem)

    @lru_cache
    def credential(chain: tuple[bytes, ...], at: float) -> Credential:
        return trust.credential(chain, datetime.datetime.fromtimestamp(at, datetime.UTC))

    def check(chain: Sequence[bytes], at: float, node: str) -> Credential:
        found = credential(tuple(chain), at)
        if found.peer.node != node:
            raise Refused("These certificates are of another node.")
        return found

    past: list[Files] = []
    rng = random.Random(count)
    for number in range(8):
        logs[number % 3 == 2].append_all([("request", {"n": number, "i": i}) for i in range(1 + number % 2)])
        past.append(files_of(folder))
    original = past.pop()
    found = Found()
    if not verify(folder, check).whole:
        found.unnoticed.append("the log was not whole before it was touched")
    while found.made.total() < count:
        edit = rng.choice(EDITS)
        content = dict(original)
        edit(content, rng, past)
        if content == original:
            continue
        put_files(folder, content)
        found.made[edit.__name__] += 1
        if content and verify(folder, check).whole:
            found.unnoticed.append(f"edit {found.made.total()}: {edit.__name__}")
    put_files(folder, original)
    if not verify(folder, check).whole:
        found.unnoticed.append("the log was not whole after it was put back")
    return found


def files_of(folder: Path) -> Files:
    """What there is to tamper with."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "audit.lock"}


def put_files(folder: Path, content: Files) -> None:
    """Make the folder hold exactly these files."""
    for path in folder.iterdir():
        if path.name not in content and path.name != "audit.lock":
            path.unlink()
    for name, data in content.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.touch(mode=0o600)
            path.write_bytes(data)


def flip(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    name = rng.choice(sorted(content))
    data = bytearray(content[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    content[name] = bytes(data)


def delete(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    name, lines = _lines(content, rng)
    at = rng.randrange(len(lines))
    del lines[at : at + rng.randint(1, 3)]
    content[name] = b"".join(lines)


def swap(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    name, lines = _lines(content, rng)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    content[name] = b"".join(lines)


def insert(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    name, lines = _lines(content, rng)
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    content[name] = b"".join(lines)


def forge(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    """Change one entry's contents and make all hashes after it, and the head's, fit again; only keys are missing."""
    name, lines = _lines(content, rng)
    at = rng.randrange(len(lines))
    prev = ""
    for number in range(at, len(lines)):
        entry = read_canonical(lines[number][:-1])
        if number == at:
            entry["data"] = {"forged": True}
        else:
            entry["prev"] = prev
        line = canonical(entry)
        prev = hashlib.sha256(line).hexdigest()
        lines[number] = line + b"\n"
    content[name] = b"".join(lines)
    head = read_canonical(content["audit.head"][:-1])
    content["audit.head"] = canonical({**head, "hash": prev}) + b"\n"


def append(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    """A further entry that fits, unsigned or with the signature of another, with or without a head that fits."""
    lines = content["audit.jsonl"].splitlines()
    last = read_canonical(lines[-1])
    more = {**last, "seq": last["seq"] + 1, "prev": hashlib.sha256(lines[-1]).hexdigest()}
    if rng.random() < 0.5:
        more.pop("sig", None)
    line = canonical(more)
    content["audit.jsonl"] += line + b"\n"
    if rng.random() < 0.5:
        head = read_canonical(content["audit.head"][:-1])
        forged = {**head, "seq": more["seq"], "hash": hashlib.sha256(line).hexdigest()}
        content["audit.head"] = canonical(forged) + b"\n"


def truncate(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    name = rng.choice(sorted(content))
    if name.endswith(".jsonl") and rng.random() < 0.5:
        lines = content[name].splitlines(keepends=True)
        content[name] = b"".join(lines[: rng.randrange(len(lines))])
    else:
        content[name] = content[name][: rng.randrange(len(content[name]))]


def remove(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    del content[rng.choice(sorted(content))]


def older_head(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    content["audit.head"] = rng.choice(past)["audit.head"]


def older_log(content: Files, rng: random.Random, past: Sequence[Files]) -> None:
    """The log of an earlier moment under the head of now."""
    head = content["audit.head"]
    content.clear()
    content.update({**rng.choice(past), "audit.head": head})


EDITS: tuple[Edit, ...] = (flip, delete, swap, insert, forge, append, truncate, remove, older_head, older_log)


def _lines(content: Files, rng: random.Random) -> tuple[str, list[bytes]]:
    name = rng.choice([name for name in sorted(content) if name.endswith(".jsonl")])
    return name, content[name].splitlines(keepends=True)
