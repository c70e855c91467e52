"""The admin beside running nodes: certificates renew themselves, removals reach everybody and cut what is live, and all
of it goes on while the root's key is away."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.admission import joined, new_home, serving, token_for
from support.networks import FAST, run

from shoal.admin.attach import in_good_standing
from shoal.admin.invites import revoke
from shoal.admin.own import own_node
from shoal.admin.service import AdminService, AlreadyAdmin
from shoal.errors import DiskFull, PeerLost, Refused, UsageError
from shoal.net.directory import Directory
from shoal.net.home import Home
from shoal.net.identity import Authority, NodeIdentity, create_issuer, issue_node
from shoal.net.renewal import admin_addresses, ask_over, keep_renewed, taking_effect
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport
from shoal.net.transport import Conn
from shoal.wire.messages import Signed

pytestmark = pytest.mark.usefixtures("looks_often")
ANY_PORT = "tcp://127.0.0.1:0"
SHORT = datetime.timedelta(seconds=3)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.admin.service.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("shoal.admin.service.ISSUER_EVERY_S", 0.2)
    monkeypatch.setattr("shoal.net.renewal.NOTE_EVERY_S", 0.2)


@dataclass
class Node:
    """A node of the swarm with a listener and gossip, as servers have them."""

    identity: NodeIdentity
    transport: TlsTransport
    seed: Seed
    address: str


@asynccontextmanager
async def running(home: Home, name: str, **options: object) -> AsyncIterator[tuple[Node, AdminService | None]]:
    """Node `name` of `home`, as `shoal admin` and gateways run it."""
    identity = home.node(name)
    transport = TlsTransport(identity, FAST)
    seed = Seed(identity)
    listener = await transport.listen(ANY_PORT, seed.on_conn)
    known = [address for address in home.read().seeds if address != listener.address]
    seed.announce([listener.address])
    gossip = asyncio.create_task(seed.directory.rounds(transport, known))
    try:
        async with in_good_standing(
            home, name, seed, transport, address=listener.address, seeds=known, **options
        ) as service:
            yield Node(identity, transport, seed, listener.address), service
    finally:
        gossip.cancel()
        await asyncio.wait([gossip])
        await listener.close()


async def eventually(look: Callable[[], object], within_s: float = 8.0) -> float:
    """Waits until `look` is true; the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not look():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


def with_brief_admin(home: Home) -> NodeIdentity:
    """An admin whose certificate is soon to be renewed."""
    brief = issue_node(home.issuer(), "admin", lifetime=SHORT)
    home.save_node("admin", brief)
    return brief


async def enter(home: Home, folder: Path, role: str = "server", name: str = "server-0") -> Home:
    """A machine that joins with a token."""
    there = Home(folder)
    await joined(token_for(home, role), there, role, name)  # type: ignore[arg-type]
    return there


@pytest.mark.slow
def test_a_certificate_renews_itself_and_connections_live_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        brief = with_brief_admin(home)
        async with running(home, "admin", lifetime=SHORT) as (admin, _):
            there = await enter(home, tmp_path / "machine")
            async with running(there, "server-0") as (server, _):
                client = TlsTransport(issue_node(home.issuer(), "client"), FAST)
                kept = await client.dial([server.address])
                first = server.identity.valid_until
                await eventually(lambda: datetime.datetime.now(datetime.UTC) > first + datetime.timedelta(seconds=2))
                assert server.transport.identity.valid_until > first
                assert there.node("server-0") == server.transport.identity
                assert server.transport.identity.peer == server.identity.peer
                assert admin.transport.identity.valid_until > brief.valid_until, "the admin's own as well"
                assert kept.is_open
                new = await client.dial([server.address], expect_node=server.identity.peer.node)
                assert new.is_open
                live = {record.node for record in admin.seed.directory.live()}
                assert server.identity.peer.node in live, "its records are signed with the newer one"
                for conn in (kept, new):
                    await conn.close()

    run(scenario)


@pytest.mark.slow
def test_joins_renewals_and_removals_go_on_while_the_roots_key_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        (home.ca_dir / "ca.key").rename(tmp_path / "safe")
        async with running(home, "admin", lifetime=SHORT) as (admin, _):
            there = await enter(home, tmp_path / "machine")
            async with running(there, "server-0") as (server, _):
                first = server.identity.valid_until
                await eventually(lambda: server.transport.identity.valid_until > first)
                revoke(home, server.identity.peer.node, reason="", now=time.time())
                await eventually(lambda: server.identity.peer.node in admin.seed.directory.view.revoked)

    run(scenario)


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_removed_node_is_cut_off_by_everybody_within_five_seconds(tmp_path: Path, fast_loop: bool) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin"):
            bad = await enter(home, tmp_path / "bad")
            good = await enter(home, tmp_path / "good")
            async with running(good, "server-0") as (server, _), running(bad, "server-0") as (thief, _):
                await eventually(lambda: len(server.seed.directory.live()) == 3)
                ends: list[float] = []
                inward = await thief.transport.dial([server.address])
                outward = await server.transport.dial([thief.address])
                watching = [asyncio.create_task(ended(conn, ends)) for conn in (inward, outward)]
                member, was_new = revoke(home, thief.identity.peer.node[:8], reason="stolen", now=time.time())
                told_at = time.monotonic()
                assert was_new
                assert member.node == thief.identity.peer.node
                await eventually(lambda: len(ends) == 2, within_s=5.0)
                assert max(ends) - told_at < 5.0
                with pytest.raises(Refused, match="was removed"):
                    await thief.transport.dial([server.address])
                with pytest.raises(Refused, match="was removed"):
                    await server.transport.dial([thief.address])
                await eventually(lambda: len(server.seed.directory.live()) == 2)
                await asyncio.gather(*watching)
                for conn in (inward, outward):
                    await conn.close()

    run(scenario, fast_loop=fast_loop)


async def ended(conn: Conn, ends: list[float]) -> None:
    with contextlib.suppress(PeerLost):
        while True:
            await conn.receive()
    ends.append(time.monotonic())


def test_a_removed_node_gets_no_new_certificate_and_a_machine_may_come_back_only_with_a_new_token(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin") as (admin, service):
            there = await enter(home, tmp_path / "machine")
            thief = there.node("server-0")
            conn = await TlsTransport(thief, FAST).dial([admin.address])
            accepted = next(iter(admin.transport._conns))
            assert service is not None
            revoke(home, thief.peer.node, reason="", now=time.time())
            with pytest.raises(Refused, match="was removed from the swarm"):
                await service.renew(accepted)
            await eventually(lambda: thief.peer.node in admin.seed.directory.view.revoked)
            await conn.close()
            again = await joined(token_for(home), there)
            assert again.peer.node != thief.peer.node
            back = await TlsTransport(again, FAST).dial([admin.address])
            await back.close()

    run(scenario)


@pytest.mark.slow
def test_a_node_without_its_admin_keeps_what_it_has_and_is_renewed_when_the_admin_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin") as (admin, _):
            there = await enter(home, tmp_path / "machine")
            port = admin.address
        short = issue_node(home.issuer(), "server", lifetime=datetime.timedelta(seconds=6))
        transport = TlsTransport(short, FAST)
        there.save_node("server-0", short)
        directory = Directory(short)
        renewal = asyncio.create_task(
            keep_renewed(
                short,
                ask_over(transport, lambda: admin_addresses([port], directory.live())),
                taking_effect(there, "server-0", transport, directory),
            )
        )
        await asyncio.sleep(4.5)
        assert transport.identity == short
        identity = own_node(home, "admin", "admin")
        back = TlsTransport(identity, FAST)
        seed = Seed(identity)
        listener = await back.listen(port, seed.on_conn)
        async with in_good_standing(home, "admin", seed, back, address=listener.address):
            await eventually(lambda: transport.identity != short)
        renewal.cancel()
        await asyncio.gather(renewal, return_exceptions=True)
        await listener.close()

    run(scenario)


@pytest.mark.slow
def test_a_certificate_that_nobody_renewed_ends_with_what_to_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        short = issue_node(home.issuer(), "server", lifetime=datetime.timedelta(seconds=1))
        transport = TlsTransport(short, FAST)
        with pytest.raises(Refused, match="certificate ended") as caught:
            await keep_renewed(
                short,
                ask_over(transport, lambda: ["tcp://127.0.0.1:1"]),
                taking_effect(home, "server-0", transport),
            )
        assert "shoal admin" in caught.value.hint

    run(scenario)


def test_a_home_has_one_admin_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        own_node(home, "gateway", "gateway")
        async with running(home, "admin") as (_, first):
            assert first is not None
            with pytest.raises(AlreadyAdmin):
                async with running(home, "admin", must_be_admin=True):
                    pass
            async with running(home, "gateway") as (_, second):
                assert second is None
        async with running(home, "gateway") as (_, third):
            assert third is not None

    run(scenario)


@pytest.mark.slow
def test_the_gateway_of_the_admins_machine_renews_itself_and_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        identity = issue_node(home.issuer(), "gateway", lifetime=datetime.timedelta(seconds=2))
        home.save_node("gateway", identity)
        async with running(home, "gateway", lifetime=SHORT) as (gateway, _):
            there = await enter(home, tmp_path / "machine")
            async with running(there, "server-0") as (server, _):
                first = server.identity.valid_until
                await eventually(lambda: gateway.transport.identity.valid_until > identity.valid_until)
                await eventually(lambda: server.transport.identity.valid_until > first)

    run(scenario)


def test_only_a_node_that_keeps_the_issuer_renews_and_the_others_say_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin") as (admin, _):
            there = await enter(home, tmp_path / "machine", "gateway", "gateway")
            node = issue_node(home.issuer(), "server", lifetime=datetime.timedelta(minutes=1))
            transport = TlsTransport(node, FAST)
            async with running(there, "gateway") as (gateway, _):
                with pytest.raises(PeerLost, match="keeps no issuing authority"):
                    await ask_over(transport, lambda: [gateway.address])(node)
                renewed = await ask_over(transport, lambda: [gateway.address, admin.address])(node)
                assert renewed.valid_until > node.valid_until

    run(scenario)


def test_renewals_of_one_node_are_limited(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin") as (admin, _):
            node = issue_node(home.issuer(), "server", lifetime=datetime.timedelta(minutes=1))
            ask = ask_over(TlsTransport(node, FAST), lambda: [admin.address])
            for _ in range(10):
                await ask(node)
            with pytest.raises(PeerLost, match="too often"):
                await ask(node)

    run(scenario)


def test_an_admin_whose_certificate_has_expired_while_it_was_away_comes_back_as_the_same_node(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    admin = home.node("admin")
    stale = issue_node(home.issuer(), "admin", lifetime=datetime.timedelta(seconds=-1))
    home.save_node("admin", stale)
    again = own_node(home, "admin", "admin")
    assert again.peer == stale.peer
    assert again.peer != admin.peer
    assert again.valid_until > datetime.datetime.now(datetime.UTC)
    assert home.node("admin") == again


def test_labels_of_the_admins_own_nodes_are_those_last_given_and_the_node_stays_the_same(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    first = own_node(home, "gateway", "gateway", labels=["hq", "bank"])
    assert first.peer.labels == ("bank", "hq")
    assert own_node(home, "gateway", "gateway") == first
    other = own_node(home, "gateway", "gateway", labels=["hq"])
    assert (other.peer.node, other.peer.labels) == (first.peer.node, ("hq",))
    assert home.node("gateway") == other
    assert own_node(home, "gateway", "gateway", labels=[]).peer.labels == ()
    with pytest.raises(UsageError, match="no label"):
        own_node(home, "gateway", "gateway", labels=["No"])


@pytest.mark.slow
def test_a_list_of_removed_nodes_is_signed_anew_with_each_certificate_of_the_admin(tmp_path: Path) -> None:
    """Nobody takes over a list whose signer's certificate has ended, so who joins later must find a newer one."""

    async def scenario() -> None:
        home = new_home(tmp_path)
        with_brief_admin(home)
        async with running(home, "admin", lifetime=SHORT) as (admin, _):
            there = await enter(home, tmp_path / "machine")
            node = there.node("server-0").peer.node
            revoke(home, node, reason="", now=time.time())
            view = admin.seed.directory.view
            await eventually(lambda: node in view.revoked)
            version, chain = view.revoked_version, list(view.revocations.chain)  # type: ignore[union-attr]
            await eventually(lambda: view.revoked_version > version)
            await eventually(lambda: list(view.revocations.chain) != chain)  # type: ignore[union-attr]
            assert node in view.revoked

    run(scenario)


def test_an_admin_that_comes_back_elsewhere_and_members_that_start_anew_find_the_swarm(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with running(home, "admin") as (admin, _):
            there = await enter(home, tmp_path / "one")
            elsewhere = await enter(home, tmp_path / "two")
            stack = AsyncExitStack()
            one, _ = await stack.enter_async_context(running(there, "server-0"))
            two, _ = await stack.enter_async_context(running(elsewhere, "server-0"))
            # Each has noted the others.
            await eventually(lambda: {one.address, two.address} <= set(home.read().seeds))
            await eventually(lambda: two.address in there.read().seeds)
            late = await enter(home, tmp_path / "three")
            assert late.read().seeds[0] == admin.address
            assert {one.address, two.address} <= set(late.read().seeds)
        # The admin is gone. A member that only knew the admin's address when it joined starts anew.
        async with stack, running(late, "server-0") as (third, _):
            await eventually(lambda: third.identity.peer.node in {r.node for r in one.seed.directory.live()})
            async with running(home, "admin") as (back, _):
                assert back.address != admin.address
                await eventually(lambda: len(back.seed.directory.live()) == 4)

    run(scenario)


def test_while_the_issuing_authority_ends_the_admin_starts_invites_and_removes(tmp_path: Path) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        issuer = create_issuer(Authority.load(home.ca_dir), lifetime=datetime.timedelta(days=1))
        issuer.save(home.ca_dir)
        (home.ca_dir / "ca.key").unlink()
        home.save_node("admin", issue_node(issuer, "admin"))
        told: list[Signed] = []
        late = time.time() + 20 * 3600  # a new certificate is due, and would last no longer than the present one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shoal.admin.own.time.time", lambda: late)
            async with serving(home, clock=lambda: late, on_revoked=told.append):
                identity = await joined(token_for(home, now=late), Home(tmp_path / "member"))
                await asyncio.to_thread(revoke, home, identity.peer.node, reason="", now=late)
                await eventually(lambda: any(identity.peer.node.encode() in list_.payload for list_ in told))

    run(scenario)


@pytest.mark.parametrize("failure", [DiskFull("no room"), OSError(28, "No space left on device")])
def test_a_disk_that_takes_no_renewal_keeps_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async def scenario() -> None:
        home = new_home(tmp_path)
        told: list[Signed] = []
        now = [time.time()]
        async with serving(home, clock=lambda: now[0], on_revoked=told.append):
            identity = await joined(token_for(home), Home(tmp_path / "member"))

            def full(self: Home, name: str, identity: NodeIdentity) -> None:
                raise failure

            monkeypatch.setattr(Home, "save_node", full)
            monkeypatch.setattr("shoal.admin.service.reissued", lambda issuer, identity, lifetime: identity)
            monkeypatch.setattr("shoal.admin.service.renewal_due", lambda identity: 0.0)
            monkeypatch.setattr("shoal.admin.service.can_last_longer", lambda issuer, identity: True, raising=False)
            await asyncio.sleep(0.2)  # some looks fail
            await asyncio.to_thread(revoke, home, identity.peer.node, reason="", now=time.time())
            await eventually(lambda: any(identity.peer.node.encode() in list_.payload for list_ in told))

    run(scenario)
