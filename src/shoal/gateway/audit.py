"""Who could have read a request: entries of the audit log about every request that was given to a model.

    request.hosts   which machines are about to compute which blocks; again when others take over from a lost one
    request         how it ended, with all machines; also when it failed, was refused for a trust zone, or was left
    check           part of a request was computed again elsewhere, and the numbers differ (swarm.honesty)
    quarantine      a machine gets nothing any more because of that

Neither holds any text. The first kind is on its way to the disk when the inputs leave, and on the disk before the first
byte of the answer does; the second before the last byte. So whoever saw an answer finds it in the log, even if the
gateway was killed the moment after. When the log cannot be written, requests are refused until it can.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from contextlib import suppress

from shoal.client.checks import Found
from shoal.errors import PolicyUnmet, ShoalError, UsageError
from shoal.gateway.accounts import Account
from shoal.gateway.errors import AuditUnavailable
from shoal.gateway.metrics import RequestMeter
from shoal.gateway.served import Served
from shoal.manifest.chain import Head
from shoal.manifest.writer import AuditWriter
from shoal.spec.ids import BlockRange
from shoal.swarm.trust import Zones, written

logger = logging.getLogger("shoal.gateway")


class Audit:
    """The audit log as the gateway's requests use it; without a writer nothing is kept."""

    def __init__(self, writer: AuditWriter | None = None) -> None:
        self._writer = writer
        self._failed = False

    def trail(self, request_id: str, account: Account, served: Served) -> Trail:
        """What is to be noted about one request. Raises PolicyUnmet when the trust zone of its key cannot be read."""
        try:
            zones = Zones.parse(account.zones)
        except UsageError as error:
            logger.error("key %d: %s", account.id, error)
            raise PolicyUnmet(
                "The trust zone of this key cannot be read, so nothing was computed.", hint="Ask for a new key."
            ) from error
        return Trail(self, request_id, account.id, served, (zones,) if zones else ())

    async def ready(self) -> None:
        """After a write that failed, see first whether the log takes entries again. Raises AuditUnavailable."""
        if self._failed:
            await self.written(self.submit("log.resumed"))
            self._failed = False

    def submit(self, kind: str, /, **data: object) -> Future[Head] | None:
        """Write an entry; None when nobody keeps any. Raises AuditUnavailable when too many wait."""
        if self._writer is None:
            return None
        try:
            future = self._writer.submit(kind, **data)  # type: ignore[arg-type]
        except ShoalError as error:
            raise self._unavailable(error) from error
        future.add_done_callback(self._note)
        return future

    async def written(self, future: Future[Head] | None) -> None:
        """Wait until an entry is on the disk. Raises AuditUnavailable."""
        if future is None:
            return
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except (ShoalError, OSError, ValueError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> AuditUnavailable:
        # What went wrong names files: it stands in the gateway's log, and callers are told what it means for them.
        self._failed = True
        return AuditUnavailable(
            "The gateway cannot write its audit log, so it answers no requests.",
            hint="Its operator has to see to that.",
        )

    def _note(self, future: Future[Head]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed = True
            logger.critical("the audit log cannot be written: %s", error)


def note_check(audit: Audit, model: str, found: Found) -> None:
    """A check that did not find the same numbers: `check` says how it ended, `quarantine` names every node that gets
    nothing any more because of it. Written when the disk is ready; nobody waits for it."""
    if found.finding.result == "agreed":
        return
    about = {
        "model": model,
        "request": found.name,
        "blocks": str(found.blocks),
        "checked": found.finding.checked,
        "result": found.finding.result,
        "guilty": found.finding.guilty,
        "disputes": [list(pair) for pair in found.finding.disputes],
        "rows": found.comparison.rows,
        "wrong_rows": found.comparison.wrong,
        "reason": found.finding.reason,
    }
    try:
        audit.submit("check", **about)
        for node in found.quarantined:
            audit.submit("quarantine", node=node, model=model, request=found.name, reason=found.finding.reason)
    except AuditUnavailable as error:
        logger.critical("a check could not be noted in the audit log: %s", error)


class Trail:
    """One request's entries. `zones` are those of its key; those of the model are applied by the model itself."""

    def __init__(self, audit: Audit, request_id: str, key: int, served: Served, zones: tuple[Zones, ...]) -> None:
        self.zones = zones
        self._audit = audit
        self._about = {
            "request": request_id,
            "key": key,
            "model": served.name,
            "zones": written((*served.zones, *zones)),
        }
        self._hosts: list[list[str]] = []
        self._told = 0
        """How many of the hosts stand in an entry."""
        self._telling = False
        """They are told at the end of this turn of the loop."""
        self._waiting: list[Future[Head]] = []
        self._ended = False

    def on_host(self, node: str, blocks: BlockRange) -> None:
        """A machine is about to be given inputs. Called on the event loop, once or more for each."""
        host = [node, str(blocks)]
        if host in self._hosts:
            return
        self._hosts.append(host)
        if not self._telling:
            self._telling = True
            # The other machines of the chain are told in the same turn of the loop: one entry for all.
            asyncio.get_running_loop().call_soon(self._tell_if_possible)

    def _tell_if_possible(self) -> None:
        self._telling = False
        # With too much waiting for the disk, `begun` tries again before the first byte leaves.
        with suppress(AuditUnavailable):
            self._tell()

    def _tell(self) -> None:
        # Also after `end`: of several choices one may fail and end the answer while another still moves.
        new, known = self._hosts[self._told :], len(self._hosts)
        if new:
            self._keep(self._audit.submit("request.hosts", **self._about, hosts=new))
        self._told = known

    def _keep(self, future: Future[Head] | None) -> None:
        if future is not None:
            self._waiting.append(future)

    async def begun(self) -> None:
        """Wait until the machines known so far are in the log. Raises AuditUnavailable."""
        self._tell()
        await self._written()

    async def end(self, meter: RequestMeter) -> None:
        """The last entry, on the disk when this returns: "ok" or the code of an error, and how many tokens. Once; later
        calls do nothing. Raises AuditUnavailable."""
        if self._ended:
            return
        self._ended = True
        self._told = len(self._hosts)
        self._keep(
            self._audit.submit(
                "request",
                **self._about,
                hosts=self._hosts,
                outcome=meter.error or "ok",
                prompt_tokens=meter.prompt_tokens,
                tokens=meter.generated_tokens,
            )
        )
        await self._written()

    async def _written(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            await self._audit.written(future)
