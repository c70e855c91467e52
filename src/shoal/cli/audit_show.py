"""`shoal audit show`: who could have read which request."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output
from shoal.errors import UsageError

if TYPE_CHECKING:
    from shoal.manifest.chain import Entry

_SPAN = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NO_END = "no end noted"
"""Of a request that runs, or whose gateway was killed."""


@dataclass
class Row:
    """One request, of all its entries, or one other event."""

    at_ms: int
    by: str
    kind: str
    data: dict[str, Any]
    hosts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_request(self) -> bool:
        return self.kind == "request"


@click.command("show")
@click.option("--request", "request", default=None, help="Only this request (x-request-id, or how it begins).")
@click.option("--node", default=None, help="Only what this node computed or did (its id, or how it begins).")
@click.option("--key", type=int, default=None, help="Only requests of the API key with this number.")
@click.option("--since", default=None, help="Only what came later: 30m, 12h, 7d, or a date like 2026-11-23.")
@click.option("--ca", type=click.Path(path_type=Path), default=None, help="Root's certificate; default: the swarm's.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(
    request: str | None,
    node: str | None,
    key: int | None,
    since: str | None,
    ca: Path | None,
    swarm_dir: Path | None,
    as_json: bool,
) -> int:
    """Show who could have read which request, and what else was noted."""
    from shoal.launch import state
    from shoal.manifest import chain
    from shoal.net.auditing import certificates_of, own_nodes, root_pem

    after_ms = 0 if since is None else _after_ms(since)
    home = state.find_home(swarm_dir, on_several=output.note)
    rows: dict[str, Row] = {}
    verdict = chain.verify(home.path, certificates_of(root_pem(home, ca)), on_entry=lambda entry: _take(rows, entry))
    found = [row for row in rows.values() if _wanted(row, request, node, key, after_ms)]
    names = own_nodes(home)
    if as_json:
        output.answer_json({"whole": verdict.whole, "bad": verdict.bad, "entries": [_object(row) for row in found]})
    else:
        for row in found:
            _show(row, names, alone=request is not None)
        if not found:
            output.note("nothing of that kind is in the log")
        if not verdict.whole:
            output.note(f"the log was changed, and is shown up to there: {verdict.bad}")
    return 0 if verdict.whole else 3


def _after_ms(text: str) -> int:
    """Milliseconds since 1970 of the moment that `--since` names. Raises UsageError."""
    now = datetime.datetime.now(datetime.UTC)
    if match := _SPAN.fullmatch(text):
        moment = now - datetime.timedelta(seconds=int(match[1]) * _SECONDS[match[2]])
    else:
        try:
            moment = datetime.datetime.fromisoformat(text).astimezone()
        except ValueError:
            raise UsageError(
                f"Cannot read the time {text!r}.", hint="Write 30m, 12h, 7d, or a date like 2026-11-23."
            ) from None
    return int(moment.timestamp() * 1000)


def _take(rows: dict[str, Row], entry: Entry) -> None:
    """Put an entry where it belongs: the entries of one request make up one row."""
    data = dict(entry.data)
    if entry.kind == "log.signer":
        return  # certificates, for whoever verifies
    if entry.kind not in ("request", "request.hosts"):
        rows[f"entry {entry.seq}"] = Row(entry.at, entry.by, entry.kind, data)
        return
    row = rows.setdefault(f"request {data['request']}", Row(entry.at, entry.by, "request", {"outcome": _NO_END}))
    hosts = data.pop("hosts", [])
    row.hosts += [(node, blocks) for node, blocks in hosts if (node, blocks) not in row.hosts]
    row.data.update(data)


def _wanted(row: Row, request: str | None, node: str | None, key: int | None, after_ms: int) -> bool:
    if row.at_ms < after_ms:
        return False
    if request is not None and not (row.is_request and row.data["request"].startswith(request)):
        return False
    if key is not None and row.data.get("key") != key:
        return False
    if node is not None:
        involved = [
            row.by,
            *(host for host, _ in row.hosts),
            *(str(row.data.get(name, "")) for name in ("node", "checked")),
        ]
        return any(each.startswith(node) for each in involved)
    return True


def _object(row: Row) -> dict[str, Any]:
    about = {"at": _time(row.at_ms), "kind": row.kind, "by": row.by, **row.data}
    if row.is_request:
        about["readers"] = [
            {"node": row.by, "part": "text, embedding and head"},
            *({"node": node, "part": f"blocks {blocks}"} for node, blocks in row.hosts),
        ]
    return about


def _show(row: Row, names: dict[str, str], *, alone: bool) -> None:
    def called(node: str) -> str:
        return f"{node[:8]} ({names[node]})" if node in names else node[:8]

    when = _time(row.at_ms)
    if not row.is_request:
        about = ", ".join(f"{name} {_brief(value)}" for name, value in sorted(row.data.items()))
        output.answer(f"{when}  {row.kind} by {called(row.by)}: {about}" if about else f"{when}  {row.kind}")
        return
    data = row.data
    tokens = f", {data['prompt_tokens']} + {data['tokens']} tokens" if "tokens" in data else ""
    zones = f", under {data['zones']}" if data.get("zones") else ""
    identifier = data["request"] if alone else data["request"][:12]
    output.answer(
        f"{when}  request {identifier} of key {data['key']} to {data['model']}: {data['outcome']}{tokens}{zones}"
    )
    readers = [f"{called(node)} blocks {blocks}" for node, blocks in row.hosts]
    if alone:
        output.answer(f"  {called(row.by)} the text itself: it is the gateway, with embedding and head")
        for reader in readers:
            output.answer(f"  {reader}")
    else:
        output.answer(f"  could be read by the gateway {called(row.by)}" + "".join(f", {each}" for each in readers))


def _brief(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _time(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
