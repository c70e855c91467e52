"""The registry over connections: nodes hear of each other, also without seeds, and of those that were removed."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
from support.networks import InMemory, OverTls, identity, issuer, run
from support.records import record

from shoal.errors import Refused
from shoal.net.directory import Directory, Signatures
from shoal.net.identity import NodeIdentity, certify, ders_of, key_of_certificate
from shoal.net.seed import Seed
from shoal.net.transport import Conn, Listener, Transport
from shoal.wire.messages import Assign, Message, Record, Signed, Span, Sync

ANY_PORT = "tcp://127.0.0.1:0"


@asynccontextmanager
async def seeded(network: InMemory | OverTls | None = None) -> AsyncIterator[tuple[InMemory | OverTls, Seed, str]]:
    """A network with a seed: (network, seed, its address)."""
    network, gateway = network or InMemory(), identity("gateway")
    seed = Seed(gateway)
    transport = network.transport(gateway)
    listener = await transport.listen(ANY_PORT, seed.on_conn)
    rounds = asyncio.create_task(seed.directory.rounds(transport))
    try:
        yield network, seed, listener.address
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)
        await listener.close()


@asynccontextmanager
async def joined(
    node: NodeIdentity, transport: Transport, address: str, heard: list[Message]
) -> AsyncIterator[Directory]:
    """A node that syncs with the seed."""
    directory = Directory(node)

    def on_message(sender: str, message: Message, body: memoryview) -> None:
        heard.append(message)

    rounds = asyncio.create_task(directory.rounds(transport, [address], on_message))
    try:
        yield directory
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)


class Member:
    """A node with a listener and rounds of its own, as every server is one."""

    def __init__(self, network: InMemory | OverTls, node: NodeIdentity | None = None) -> None:
        self.identity = node or identity("server")
        self.node = self.identity.peer.node
        self.directory = Directory(self.identity)
        self.transport = network.transport(self.identity)
        self.conns: list[Conn] = []
        self._listener: Listener | None = None
        self._rounds: asyncio.Task[None] | None = None

    async def start(self, seeds: Sequence[str] = ()) -> str:
        """Listen, publish a record, make rounds; the address."""
        self._listener = await self.transport.listen(ANY_PORT, self._on_conn)
        address = self._listener.address
        self.directory.publish(record(self.node, (0, 4), addresses=[address], incarnation=Directory.incarnation()))
        self._rounds = asyncio.create_task(self.directory.rounds(self.transport, seeds))
        return address

    async def _on_conn(self, conn: Conn) -> None:
        self.conns.append(conn)
        while True:
            message, _ = await conn.receive()
            if isinstance(message, Sync):
                for answer in self.directory.on_sync(message, conn.peer.node):
                    await conn.send(answer)

    async def stop(self) -> None:
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        if self._listener is not None:
            await self._listener.close()

    def sees(self) -> set[str]:
        return {record.node for record in self.directory.live()}


@asynccontextmanager
async def members(network: InMemory | OverTls, count: int, seeds: Sequence[str] = ()) -> AsyncIterator[list[Member]]:
    """Members that know the first of them as their seed, or `seeds`."""
    group = [Member(network) for _ in range(count)]
    try:
        known = list(seeds) or [await group[0].start()]
        for member in group if seeds else group[1:]:
            await member.start(known)
        yield group
    finally:
        for member in group:
            await member.stop()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_a_record_reaches_the_seed_at_once_and_other_nodes_through_it() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address):
            one, two = identity("server"), identity("server")
            async with (
                joined(one, network.transport(one), address, []) as first,
                joined(two, network.transport(two), address, []) as second,
            ):
                first.publish(record(one.peer.node, (0, 4)))
                await seed.wait_for(lambda records: len(records) == 1)
                second.publish(record(two.peer.node, (4, 8)))
                await seed.wait_for(lambda records: len(records) == 2)
                await until(lambda: len(second.live()) == 2)
                first.update(state="draining")
                await seed.wait_for(lambda records: any(each.state == "draining" for each in records))

    run(scenario)


def test_the_seed_can_speak_to_a_node_that_joined_and_ignores_one_that_left() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address):
            heard: list[Message] = []
            server = identity("server")
            assign = Assign(Span("toy", 0, 4), "It is the only one.")
            async with joined(server, network.transport(server), address, heard) as directory:
                directory.publish(record(server.peer.node))
                await seed.wait_for(lambda records: len(records) == 1)
                seed.send(server.peer.node, assign)
                await until(lambda: bool(heard))
            assert heard == [assign]
            seed.send(server.peer.node, assign)
            seed.send("nobody", assign)

    run(scenario)


def test_a_seed_is_found_by_name_once_it_has_announced_itself() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address), members(network, 1, [address]) as (member,):
            seed.announce([address])
            await until(lambda: len(member.sees()) == 2)
            (gateway,) = [each for each in member.directory.live() if each.role == "gateway"]
            assert gateway.addresses == [address]

    run(scenario)


def test_the_registry_goes_on_when_every_seed_is_dead() -> None:
    async def scenario() -> None:
        network = InMemory()
        async with members(network, 4) as group:
            seed, *others = group
            await until(lambda: all(len(member.sees()) == 4 for member in others))
            await seed.stop()
            others[0].directory.update(state="draining")
            await until(
                lambda: all(
                    each.state == "draining"
                    for member in others
                    for each in member.directory.live()
                    if each.node == others[0].node
                )
            )

    run(scenario)


def test_a_newcomer_is_known_to_all_at_once() -> None:
    async def scenario() -> None:
        network = InMemory()
        async with members(network, 4) as group:
            await until(lambda: all(len(member.sees()) == 4 for member in group))
            newcomer = Member(network)
            began = asyncio.get_running_loop().time()
            assert group[0].directory.record is not None
            await newcomer.start(group[0].directory.record.addresses)
            try:
                await until(lambda: all(newcomer.node in member.sees() for member in group))
                assert asyncio.get_running_loop().time() - began < 5.0
            finally:
                await newcomer.stop()

    run(scenario)


@pytest.mark.slow
def test_a_node_that_vanishes_without_a_word_is_out_of_every_view_within_ten_seconds() -> None:
    async def scenario() -> None:
        network = OverTls()
        async with members(network, 5) as group:
            await until(lambda: all(len(member.sees()) == 5 for member in group))
            *others, dead = group
            began = asyncio.get_running_loop().time()
            await dead.stop()
            await until(lambda: not any(dead.node in member.sees() for member in others))
            assert 1.0 < asyncio.get_running_loop().time() - began < 10.0
            assert all(len(member.sees()) == 4 for member in others), "nobody else is missed"
        await network.close()

    run(scenario)


def test_round_trips_to_partners_are_measured_and_told() -> None:
    async def scenario() -> None:
        async with members(InMemory(), 3) as group:
            everybody = {member.node for member in group}
            await until(lambda: all(len(member.directory.rtts_ms) == 2 for member in group[1:]))
            await until(
                lambda: all(
                    {node for node, _ in each.rtts} == everybody - {each.node}
                    for each in group[0].directory.live()
                    if each.node != group[0].node
                )
            )
            assert all(0.0 < rtt_ms < 1000.0 for each in group[0].directory.live() for _, rtt_ms in each.rtts)

    run(scenario)


def test_a_node_that_no_seed_lets_in_is_told_so() -> None:
    async def scenario() -> None:
        async with seeded() as (network, _, address):
            stranger = identity("server", swarm="other")
            with pytest.raises(Refused, match="not let into the swarm"):
                await Directory(stranger).rounds(network.transport(stranger), [address])

    run(scenario)


# -- what others cannot do ------------------------------------------------------------------------------------------


def seal(writer: NodeIdentity, content: Record, chain: Sequence[bytes] | None = None) -> Signed:
    payload = msgspec.msgpack.encode(content)
    return Signed(payload, writer.sign(payload), list(writer.chain_der if chain is None else chain))


def test_bad_records_end_no_connection_are_counted_and_reach_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """The one who brings them may be honest: older, newer, or deceived itself."""

    async def scenario() -> None:
        network = InMemory()
        async with seeded(network) as (_, seed, address), members(network, 1, [address]) as (member,):
            liar, victim, foreigner = identity("server"), identity("server"), identity("server", swarm="other")
            mine = record(victim.peer.node)
            honest = seal(victim, mine)
            conn = await network.transport(liar).dial([address])
            bad = [
                seal(liar, mine),
                seal(liar, mine, victim.chain_der),
                seal(foreigner, record(foreigner.peer.node)),
                Signed(honest.payload + b"x", honest.signature, honest.chain),
                Signed(honest.payload, honest.signature, [b"no certificate"]),
                seal(victim, record(victim.peer.node, role="gateway")),
                seal(victim, record(victim.peer.node, labels=["trusted"])),
            ]
            await conn.send(Sync({}, bad, 2))
            assert isinstance((await conn.receive())[0], Sync)
            refused = seed.directory.view.refused
            assert refused == {"overclaimed": 3, "forged": 3, "malformed": 1}
            await conn.send(Sync({}, [honest], 2))
            await until(lambda: victim.peer.node in member.sees())
            assert foreigner.peer.node not in member.sees()
            assert member.directory.view.refused.total() == 0, "nothing bad was passed on"
            assert conn.is_open
            await conn.close()
            (warning,) = [line for line in caplog.messages if "refused" in line]
            assert "forged 3, malformed 1, overclaimed 3" in warning

    run(scenario)


def test_the_certificates_of_a_record_must_be_valid_now() -> None:
    expired = identity("server")
    cert_pem = certify(
        issuer(), "server", key_of_certificate(expired.chain_der[0]), lifetime=datetime.timedelta(seconds=-1)
    )
    mine = seal(expired, record(expired.peer.node))
    signatures = Signatures(identity("server"))
    assert signatures.writer(mine.payload, mine.signature, mine.chain) == expired.peer
    assert signatures.writer(mine.payload, mine.signature, ders_of(cert_pem)) is None


def test_a_renewed_certificate_goes_along_with_the_next_record() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address):
            node = identity("server")
            async with joined(node, network.transport(node), address, []) as directory:
                directory.publish(record(node.peer.node, incarnation=5))
                await seed.wait_for(lambda records: len(records) == 1)
                cert_pem = certify(issuer(), "server", key_of_certificate(node.chain_der[0]), labels=["trusted"])
                peer = dataclasses.replace(node.peer, labels=("trusted",))
                directory.renewed(NodeIdentity(peer, node.key_pem, cert_pem, node.ca_pem))
                directory.update(labels=["trusted"])
                await seed.wait_for(lambda records: records[0].labels == ["trusted"])
                assert seed.directory.view.refused.total() == 0
                with pytest.raises(ValueError, match="another node"):
                    directory.renewed(identity("server"))

    run(scenario)


# -- revocation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [InMemory, OverTls])
def test_a_revoked_node_is_cut_off_by_everybody_at_once(network: type[InMemory | OverTls]) -> None:
    async def scenario() -> None:
        net = network()
        async with seeded(net) as (_, seed, address), members(net, 4, [address]) as group:
            await until(lambda: all(len(member.sees()) == 4 for member in group))
            *others, removed = group
            conn = await others[0].transport.dial(list(removed.directory.record.addresses))  # type: ignore[union-attr]
            began = asyncio.get_running_loop().time()
            assert seed.directory.revoke_as(identity("admin"), 1, [removed.node])
            await until(lambda: not any(removed.node in member.sees() for member in others))
            await until(lambda: not conn.is_open)
            await until(lambda: not any(each.is_open for each in removed.conns))
            assert asyncio.get_running_loop().time() - began < 5.0
            with pytest.raises(Refused):
                await others[0].transport.dial(list(removed.directory.record.addresses))  # type: ignore[union-attr]
            assert not seed.directory.revoke_as(identity("admin"), 1, [removed.node]), "the same list is no news"
        await net.close()

    run(scenario)


def test_a_server_cannot_revoke_anybody() -> None:
    async def scenario() -> None:
        async with seeded() as (_, seed, _):
            assert not seed.directory.revoke_as(identity("server"), 1, ["x"])
            assert seed.directory.view.refused == {"overclaimed": 1}

    run(scenario)


# -- a node's own record --------------------------------------------------------------------------------------------


def test_a_change_is_told_once_and_figures_of_load_are_none() -> None:
    async def scenario() -> None:
        changes: list[int] = []
        one, two = identity("server"), identity("server")
        directory = Directory(one, on_change=lambda: changes.append(1))
        other = Directory(two)
        for fields, told in (({}, 1), ({"queue_rows": 5}, 1), ({"state": "draining"}, 2)):
            if other.record is None:
                other.publish(record(two.peer.node, (0, 4)))
            else:
                other.update(**fields)
            waiting = [(directory, other, other.view.sync(0.0))]
            while waiting:
                receiver, sender, message = waiting.pop()
                answers = receiver.on_sync(message, sender.node)
                waiting += [(sender, receiver, answer) for answer in answers]
            assert len(changes) == told

    run(scenario)


def test_an_update_before_the_first_record_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing was published"):
        Directory(identity("server")).update(state="gone")
