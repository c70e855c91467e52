"""When certificates are renewed, and where: pure decisions."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from support.messages import RECORD
from support.networks import identity, run

from shoal.net.identity import NODE_LIFETIME, NodeIdentity
from shoal.net.renewal import MAX_SEEDS, admin_addresses, keep_renewed, meeting_places, next_attempt, renewal_due
from shoal.wire.messages import Record


def record(role: str, *addresses: str) -> Record:
    return msgspec.structs.replace(RECORD, role=role, addresses=list(addresses))


def test_a_third_of_the_lifetime_is_left_when_it_is_due() -> None:
    node = identity("server")
    left_s = node.valid_until.timestamp() - renewal_due(node)
    assert left_s == pytest.approx(NODE_LIFETIME.total_seconds() / 3)


def test_nodes_that_joined_together_do_not_ask_together() -> None:
    rng = random.Random(1)
    waits = {next_attempt(1000.0, 1500.0, 0.0, 0, rng) for _ in range(100)}
    assert len(waits) == 100
    assert all(900 <= wait <= 1000 for wait in waits)


def test_what_is_due_already_is_asked_for_now() -> None:
    assert next_attempt(10.0, 20.0, 15.0, 0, random.Random(0)) == 0


def test_attempts_get_denser_towards_the_end_and_are_neither_hasty_nor_rare() -> None:
    rng = random.Random(0)
    due, until, now, waits = 0.0, 2.3 * 86_400, 0.0, []
    while now < until:
        waits.append(next_attempt(due, until, now, 1, rng))
        now += waits[-1]
    assert all(0.5 <= wait <= 660 for wait in waits)
    assert 100 < len(waits) < 1000, "bounded, with many chances"
    assert until - (now - waits[-1]) < 60, "the last one is close to the end"


def test_admins_are_asked_first_then_seeds_then_gateways_and_never_servers() -> None:
    records = [record("gateway", "g"), record("server", "s"), record("admin", "a"), record("client")]
    assert admin_addresses(["seed", "a"], records) == ["a", "seed", "g"]


def test_the_swarm_is_met_at_live_nodes_before_those_known_earlier() -> None:
    records = [record("server", "s", "s2"), record("gateway", "g"), record("admin", "a"), record("client")]
    assert meeting_places(records, ["own"], ["old", "s"]) == ["own", "a", "g", "s", "old"]
    many = [record("server", f"s{number}") for number in range(50)]
    assert len(meeting_places(many, ["own"], ["old"])) == MAX_SEEDS
    assert meeting_places([], [], ["old"]) == ["old"]


def test_a_disk_that_is_full_for_a_while_ends_no_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr("shoal.net.renewal.next_attempt", lambda *_: 0.0)
        node, tried = identity("server"), 0
        worked = asyncio.Event()

        async def ask(present: NodeIdentity) -> NodeIdentity:
            return present

        def on_renewed(renewed: NodeIdentity) -> None:
            nonlocal tried
            tried += 1
            if tried == 1:
                raise OSError(28, "No space left on device")
            worked.set()

        renewing = asyncio.create_task(keep_renewed(node, ask, on_renewed))
        ended = asyncio.create_task(worked.wait())
        await asyncio.wait([renewing, ended], return_when=asyncio.FIRST_COMPLETED)
        assert worked.is_set()
        renewing.cancel()
        await asyncio.wait([renewing])

    run(scenario)
