"""Looks at ports, seeds and the API: a few short connections, all at once, none of which changes anything."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.doctor.facts import Door, Member, Port, Seed, Swarm
from shoal.errors import PeerLost, ShoalError
from shoal.net.directory import Directory
from shoal.net.identity import NodeIdentity
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address
from shoal.wire.messages import Record, Sync

DIAL_S = 2.0
REGISTRY_S = 1.5
API_S = 2.0
MAX_ANSWER_BYTES = 8 << 20


# --- ports ---------------------------------------------------------------------------------------------------


def port(address: str) -> Port:
    """Whether one could listen on HOST:PORT (with or without tcp://) now. Raises UsageError for no address."""
    wanted = Address.parse(address if "://" in address else f"tcp://{address}")
    family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((wanted.host, wanted.port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, -2, -3, -5):  # the negative ones: no such name
                return Port(str(wanted), free=False, here=False)
            pid = next((each.pid for each in listening() if each.port == wanted.port), 0)
            command = _command(pid)
            holder = f"process {pid} ({command[:40]})" if pid else error.strerror or ""
            return Port(str(wanted), free=False, holder=holder, ours="shoal" in command)
    return Port(str(wanted), free=True)


@dataclass(frozen=True, slots=True)
class Listening:
    """A TCP socket that a process of this user listens on."""

    host: str
    port: int
    pid: int

    @property
    def outside(self) -> bool:
        """Other machines can reach it."""
        return not (self.host.startswith("127.") or self.host == "::1")


def listening() -> Iterator[Listening]:
    """Every listening TCP socket whose process can be told. Other users' processes cannot, unless one is root."""
    by_inode: dict[str, tuple[str, int]] = {}
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            if len(parts) > 9 and parts[3] == "0A":
                host, _, number = parts[1].partition(":")
                by_inode[parts[9]] = _host(host, family), int(number, 16)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            for inode in _sockets(folder):
                if inode in by_inode:
                    yield Listening(*by_inode[inode], int(folder.name))


def _host(text: str, family: int) -> str:
    """An address as /proc/net writes it: words in the order of this machine's memory."""
    raw = bytes.fromhex(text)
    words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return socket.inet_ntop(family, words)


def _sockets(folder: Path) -> Iterator[str]:
    try:
        for file in (folder / "fd").iterdir():
            target = os.readlink(file)
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def doors() -> tuple[Door, ...]:
    """Ports of gateways on this machine that others can reach, each asked for its models without a key."""
    found = []
    for each in listening():
        if each.outside and "shoal" in (command := _command(each.pid)) and ("gateway" in command or " up" in command):
            host = "127.0.0.1" if each.host in ("0.0.0.0", "::") else each.host
            answer = ask(f"http://{host}:{each.port}/v1/models", "")
            if answer.status:
                found.append(Door(f"{each.host}:{each.port}", encrypted=False, asks_for_key=answer.status != 200))
                continue
            answer = ask(f"https://{host}:{each.port}/v1/models", "", verify=False)
            if answer.status:
                found.append(Door(f"{each.host}:{each.port}", encrypted=True, asks_for_key=answer.status != 200))
    return tuple(found)


# --- the API -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the API. `status` 0: none came."""

    status: int = 0
    body: Any = None
    skew_s: float | None = None


def ask(url: str, key: str, *, verify: bool = True) -> Answer:
    """One GET of a JSON page. Redirects are not followed, proxies not used."""
    parts = urlsplit(url)
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if not parts.hostname:
        return Answer()
    connection = (
        http.client.HTTPSConnection(parts.hostname, parts.port, timeout=API_S, context=context)
        if parts.scheme == "https"
        else http.client.HTTPConnection(parts.hostname, parts.port, timeout=API_S)
    )
    try:
        connection.request("GET", parts.path, headers={"authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        data = response.read(MAX_ANSWER_BYTES)
        body = json.loads(data) if "json" in (response.getheader("content-type") or "") else None
        return Answer(response.status, body, _skew(response.getheader("date")))
    except (OSError, http.client.HTTPException, ValueError):
        return Answer()
    finally:
        connection.close()


def _skew(date: str | None) -> float | None:
    """This clock minus the one that wrote an HTTP date, which has whole seconds."""
    try:
        return time.time() - email.utils.parsedate_to_datetime(date or "").timestamp() - 0.5
    except (ValueError, TypeError):
        return None


def told_by_gateway(page: Any) -> Swarm:
    """The swarm as the gateway's status page describes it."""
    if not isinstance(page, dict) or not isinstance(page.get("servers"), list):
        return Swarm(error="The gateway's status page cannot be read.")
    members = []
    for each in page["servers"]:
        start, _, end = str(each.get("blocks") or "0:0").partition(":")
        members.append(
            Member(
                node=str(each.get("id", "")),
                state=str(each.get("state", "")),
                start=int(start),
                end=int(end or 0),
                model=str(page.get("swarm_model", "")),
                dtype=str(each.get("dtype", "")),
                weights=str(each.get("weights", "native")),
                addresses=tuple(map(str, each.get("addresses", ()))),
                cache_free=int(each.get("cache_tokens_free", 0)),
                cache_total=int(each.get("cache_tokens_total", 0)),
            )
        )
    return Swarm(tuple(members), blocks=page.get("blocks"), model=str(page.get("swarm_model", "")))


# --- seeds and registry --------------------------------------------------------------------------------------


async def seeds(addresses: Sequence[str], identity: NodeIdentity | None) -> tuple[tuple[Seed, ...], Swarm | None]:
    """Each seed tried, and what the first one that lets us in says of the swarm."""
    tried = await asyncio.gather(*(_try(address, identity) for address in addresses))
    swarms = [swarm for _, swarm in tried if swarm is not None]
    return tuple(seed for seed, _ in tried), swarms[0] if swarms else None


async def _try(address: str, identity: NodeIdentity | None) -> tuple[Seed, Swarm | None]:
    try:
        wanted = Address.parse(address)
        async with asyncio.timeout(DIAL_S):
            await asyncio.get_running_loop().getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM)
    except (ShoalError, OSError, UnicodeError, TimeoutError) as error:  # UnicodeError: a name that no DNS can carry
        return Seed(address, resolves=False, error=str(error)), None
    if identity is None:
        return await _connects(address, wanted), None
    try:
        conn = await TlsTransport(identity).dial([address], timeout_s=DIAL_S)
    except PeerLost as error:
        return Seed(address, connects=False, error=str(error)), None
    except ShoalError as error:
        return Seed(address, greets=False, error=str(error)), None
    try:
        directory = Directory(identity)
        await conn.send(directory.view.sync(time.monotonic()))
        async with asyncio.timeout(REGISTRY_S):
            while not directory.live():
                message, _ = await conn.receive()
                if isinstance(message, Sync):
                    directory.on_sync(message, conn.peer.node)
        return Seed(address, greets=True), told_by_registry(directory.live())
    except (ShoalError, TimeoutError):
        return Seed(address, greets=True), None
    finally:
        await conn.close()


async def _connects(address: str, wanted: Address) -> Seed:
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(wanted.host, wanted.port)
    except (OSError, TimeoutError) as error:
        return Seed(address, connects=False, error=str(error) or "no answer")
    writer.close()
    return Seed(address)


def told_by_registry(records: Sequence[Record]) -> Swarm:
    """The swarm as its records describe it. How many blocks the model has, they do not say."""
    servers = [record for record in records if record.role == "server"]
    members = tuple(
        Member(
            node=record.node,
            state=record.state,
            start=record.span.start if record.span is not None else 0,
            end=record.span.end if record.span is not None else 0,
            model=record.span.model if record.span is not None else "",
            dtype=record.dtype,
            weights=str(getattr(record, "weights", "native")),
            addresses=tuple(record.addresses),
            cache_free=record.cache_tokens_free,
            cache_total=record.cache_tokens_total,
        )
        for record in servers
    )
    return Swarm(members, model=next((each.model for each in members if each.model), ""))
