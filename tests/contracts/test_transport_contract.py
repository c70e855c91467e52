"""What every transport promises. Each test runs in memory, over TLS, and over TLS with uvloop."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.messages import SESSION, journal, samples, step
from support.networks import FAST, InMemory, Network, OverTls, claiming, collect, identity, run

from shoal.errors import Full, PeerLost, ProtocolError, Refused, UsageError
from shoal.net.transport import Conn, ConnSettings, Role
from shoal.wire import codec
from shoal.wire.frames import Limits
from shoal.wire.messages import Close, Hello, Open, Opened, Ping, Pong, Result, Step

ANY_PORT = "tcp://127.0.0.1:0"
Scenario = Callable[[Network], Awaitable[None]]
Play = Callable[[Scenario], None]


@pytest.fixture(params=["memory", "tls", "tls on uvloop"])
def play(request: pytest.FixtureRequest) -> Play:
    def play(scenario: Scenario) -> None:
        async def with_network() -> None:
            network = InMemory() if request.param == "memory" else OverTls()
            try:
                await scenario(network)
            finally:
                await network.close()

        run(with_network, fast_loop=request.param == "tls on uvloop")

    return play


@asynccontextmanager
async def joined(
    network: Network, *, settings: ConnSettings = FAST, serving: ConnSettings | None = None, role: Role = "gateway"
) -> AsyncIterator[tuple[Conn, Conn]]:
    """A gateway's (or another role's) connection to a server, and the server's end of it."""
    accepted: asyncio.Future[Conn] = asyncio.get_running_loop().create_future()

    async def hold(conn: Conn) -> None:
        accepted.set_result(conn)
        await asyncio.Event().wait()

    listener = await network.transport(identity("server"), serving or settings).listen(ANY_PORT, hold)
    gateway = await network.transport(identity(role), settings).dial([await network.reach(listener)])
    try:
        yield gateway, await accepted
    finally:
        await gateway.close()
        await listener.close()


async def fill(conn: Conn) -> int:
    """Send large steps until nothing on the way takes more; how many were sent."""
    for sent in range(1000):
        try:
            conn.send_nowait(*step(512, width=512))
        except Full:
            return sent
        await asyncio.sleep(0.01)
    raise AssertionError("a thousand MiB fit nowhere")


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.005)


def test_both_sides_know_who_the_other_is(play: Play) -> None:
    async def scenario(network: Network) -> None:
        server, gateway = identity("server"), identity("gateway")
        peers = []

        async def note(conn: Conn) -> None:
            peers.append(conn.peer)

        listener = await network.transport(server).listen(ANY_PORT, note)
        conn = await network.transport(gateway).dial([listener.address], expect_node=server.peer.node)
        assert conn.peer == server.peer
        with pytest.raises(PeerLost):
            await conn.receive()
        assert peers == [gateway.peer]
        await conn.close()
        await listener.close()

    play(scenario)


def test_every_message_arrives_as_it_was_sent(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server), joined(network, role="admin") as (admin, administered):
            for message, body in samples():
                if isinstance(message, Hello | Ping | Pong):
                    continue
                ways = {"server": (server, gateway), "gateway": (gateway, server), "admin": (admin, administered)}
                sender, receiver = next(way for role, way in ways.items() if type(message) in codec.MAY_SEND[role])
                await sender.send(message, body)
                received, received_body = await receiver.receive()
                assert received == message
                assert received_body == body

    play(scenario)


def test_a_body_of_eight_mebibytes_arrives_whole_from_many_buffers(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            message, body = step(2048, width=1024)
            await gateway.send(message, [body[:100], body[100:5_000_000], body[5_000_000:]])
            received, received_body = await server.receive()
            assert received == message
            assert received_body == body
            assert not received_body.readonly, "torch.frombuffer needs writable memory"

    play(scenario)


def test_the_deadline_arrives_on_the_receivers_clock(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            before = asyncio.get_running_loop().time()
            await gateway.send(*step(1), deadline_ms=60_000)
            await gateway.send(*step(1))
            first, second = await server.receive_delivery(), await server.receive_delivery()
            assert first.expires_at is not None
            assert before + 60 <= first.expires_at <= asyncio.get_running_loop().time() + 60
            assert second.expires_at is None

    play(scenario)


def test_steps_of_one_session_keep_their_order_whatever_their_size(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            sizes = [2000, 1, 500, 3, 1, 1000, 1]
            for position, rows in enumerate(sizes):
                await gateway.send(*step(rows, position=position))
            received = await collect(server, len(sizes))
            assert [message.items[0].position for message in received] == list(range(len(sizes)))

    play(scenario)


def test_a_decode_result_does_not_wait_behind_journals(play: Play) -> None:
    async def scenario(network: Network) -> None:
        patient = dataclasses.replace(FAST, send_queue_bytes=64 * 2**20, receive_queue_bytes=64 * 2**20)
        async with joined(network, settings=patient) as (gateway, server):
            for position in range(24):
                await server.send(*journal(512, width=1024, position=position))
            queued = server.statistics().send_queue_bytes
            message, body = step(1)
            await server.send(Result(message.items, message.tensor), body)
            kinds = [type(message) for message in await collect(gateway, 25)]
            # What the operating system's buffers had swallowed already cannot be overtaken.
            assert queued > 30 * 2**20
            assert kinds.index(Result) < 12

    play(scenario)


def test_concurrent_senders_lose_and_mix_nothing(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):

            async def send_all(number: int) -> None:
                for position in range(30):
                    rows = 1 if (position + number) % 3 else 400
                    await gateway.send(*step(rows, session=bytes([number]) * 16, position=position))

            async with asyncio.TaskGroup() as senders:
                for number in range(8):
                    senders.create_task(send_all(number))
                received = await collect(server, 8 * 30)
            for number in range(8):
                items = [message.items[0] for message in received]
                mine = [item.position for item in items if item.session == bytes([number]) * 16]
                assert mine == list(range(30))

    play(scenario)


def test_pings_are_answered_while_the_application_does_not_receive(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            # Far beyond silent_after_s, and nobody receives on either side.
            await until(lambda: gateway.statistics().messages_received >= 16)
            assert gateway.is_open
            assert server.is_open
            assert gateway.rtt_s is not None
            assert 0 < gateway.rtt_s < FAST.heartbeat.silent_after_s

    play(scenario)


def test_a_process_that_stood_still_does_not_blame_its_peers(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            time.sleep(2 * FAST.heartbeat.silent_after_s)
            await gateway.send(*step(1))
            await server.receive()
            count = gateway.statistics().messages_received
            await until(lambda: gateway.statistics().messages_received >= count + 3)
            assert gateway.is_open

    play(scenario)


def test_a_silent_peer_is_lost(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            network.freeze()
            for conn in (gateway, server):
                with pytest.raises(PeerLost, match=r"was silent for \d\.\d s"):
                    await conn.receive()

    play(scenario)


def test_a_cut_connection_is_lost_on_both_sides(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            network.cut()
            for conn in (gateway, server):
                with pytest.raises(PeerLost):
                    await conn.receive()
                with pytest.raises(PeerLost):
                    await conn.send(Close([SESSION]))

    play(scenario)


def test_what_a_peer_sent_before_it_closed_is_received_first(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            await server.send(Opened(SESSION, 1))
            await server.send(Opened(SESSION, 2))
            await server.close()
            assert await collect(gateway, 2) == [Opened(SESSION, 1), Opened(SESSION, 2)]
            with pytest.raises(PeerLost, match="closed"):
                await gateway.receive()

    play(scenario)


def test_close_may_be_called_again_and_wakes_a_waiting_receiver(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            receiving = asyncio.ensure_future(gateway.receive())
            await asyncio.sleep(0)
            await asyncio.gather(gateway.close(), gateway.close())
            await gateway.close()
            with pytest.raises(PeerLost, match="This side closed"):
                await receiving
            with pytest.raises(PeerLost, match="This side closed"):
                await gateway.send(Close([SESSION]))
            with pytest.raises(PeerLost):
                await server.receive()

    play(scenario)


def test_a_receiver_that_stalls_holds_the_sender_back_and_loses_nothing(play: Play) -> None:
    async def scenario(network: Network) -> None:
        narrow = dataclasses.replace(FAST, send_queue_bytes=2**20, receive_queue_bytes=2**20)
        async with joined(network, settings=narrow) as (gateway, server):
            count = 40

            async def send_all() -> None:
                for position in range(count):
                    await gateway.send(*step(512, width=512, position=position))

            sending = asyncio.ensure_future(send_all())
            await until(lambda: gateway.statistics().send_queue_bytes >= 2**20)
            # Neither side may take the other for dead meanwhile: wait for several rounds of heartbeats.
            frames = server.statistics().frames_sent
            await until(lambda: server.statistics().frames_sent >= frames + 20)
            assert not sending.done(), "40 MiB fit no buffer on the way"
            assert server.statistics().receive_queue_bytes <= 2 * 2**20
            await asyncio.wait_for(gateway.send(Close([SESSION])), 1)
            with pytest.raises(Full, match="bytes waiting"):
                gateway.send_nowait(*step(512, width=512))
            received = await collect(server, count + 1)
            await sending
            positions = [message.items[0].position for message in received if isinstance(message, Step)]
            assert positions == list(range(count))

    play(scenario)


def test_a_sender_that_gives_up_does_not_keep_the_next_one_waiting(play: Play) -> None:
    async def scenario(network: Network) -> None:
        narrow = dataclasses.replace(FAST, send_queue_bytes=2**20, receive_queue_bytes=2**20)
        async with joined(network, settings=narrow) as (gateway, server):
            sent = await fill(gateway)
            waiting = [asyncio.ensure_future(gateway.send(*step(512, width=512))) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await collect(server, sent + 2)
            assert [type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)] == [
                asyncio.CancelledError,
                type(None),
                type(None),
            ]

    play(scenario)


def test_a_body_above_the_receivers_budget_is_refused(play: Play) -> None:
    async def scenario(network: Network) -> None:
        small = dataclasses.replace(FAST, limits=Limits(max_body_bytes=100_000))
        async with joined(network, serving=small) as (gateway, server):
            await gateway.send(*step(1000))
            with pytest.raises(ProtocolError, match="body of 280000 bytes; this connection accepts 100000"):
                await server.receive()
            with pytest.raises(PeerLost, match=r"server \w+ ended the connection: .*accepts 100000"):
                await gateway.receive()

    play(scenario)


def test_a_message_its_role_may_not_send_ends_the_connection(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            await server.send(next(message for message, _ in samples() if isinstance(message, Open)))
            with pytest.raises(ProtocolError, match="A server may not send Open"):
                await gateway.receive()
            with pytest.raises(PeerLost, match="A server may not send Open"):
                await server.receive()

    play(scenario)


def test_a_body_that_does_not_fit_its_message_is_not_sent(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, _):
            message, body = step(2)
            with pytest.raises(ValueError, match="needs a body of 560 bytes, got 559"):
                await gateway.send(message, body[:-1])
            assert gateway.is_open

    play(scenario)


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"role": "admin"}, "its certificate says"),
        ({"node": "f" * 32}, "its certificate says"),
        ({"swarm": "other-swarm"}, "swarm"),
    ],
    ids=["role", "node", "swarm"],
)
def test_a_hello_that_differs_from_the_certificate_is_refused(play: Play, claims: dict[str, Any], says: str) -> None:
    async def scenario(network: Network) -> None:
        handled = []

        async def note(conn: Conn) -> None:
            handled.append(conn)

        listener = await network.transport(identity("server")).listen(ANY_PORT, note)
        with pytest.raises(Refused, match=says):
            await network.transport(claiming(identity("gateway"), **claims)).dial([listener.address])
        await listener.close()
        assert not handled

    play(scenario)


def test_a_server_that_lies_about_itself_is_refused_by_the_dialer(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async def wait(conn: Conn) -> None:
            with pytest.raises(PeerLost):
                await conn.receive()

        liar = claiming(identity("server"), node="f" * 32)
        listener = await network.transport(liar).listen(ANY_PORT, wait)
        with pytest.raises(Refused, match="its certificate says"):
            await network.transport(identity("gateway")).dial([listener.address])
        await listener.close()

    play(scenario)


def test_another_node_than_the_expected_one_is_refused(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async def never(conn: Conn) -> None:
            raise AssertionError("the dialer must not let this happen")

        listener = await network.transport(identity("server")).listen(ANY_PORT, never)
        with pytest.raises(Refused, match="was expected at this address"):
            await network.transport(identity("gateway")).dial([listener.address], expect_node="0" * 32)
        await listener.close()

    play(scenario)


def test_dialing_goes_on_to_the_next_address(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async def wait(conn: Conn) -> None:
            await conn.receive()

        transport = network.transport(identity("server"))
        gone = await transport.listen(ANY_PORT, wait)
        await gone.close()
        listener = await transport.listen(ANY_PORT, wait)
        gateway = network.transport(identity("gateway"))
        conn = await gateway.dial([gone.address, listener.address])
        await conn.close()
        await listener.close()
        with pytest.raises(PeerLost, match=gone.address):
            await gateway.dial([gone.address])

    play(scenario)


def test_an_address_in_use_is_a_usage_error(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async def wait(conn: Conn) -> None:
            await conn.receive()

        transport = network.transport(identity("server"))
        listener = await transport.listen(ANY_PORT, wait)
        with pytest.raises(UsageError, match="in use") as caught:
            await transport.listen(listener.address, wait)
        assert "another port" in caught.value.hint
        await listener.close()

    play(scenario)


def test_a_listener_that_closes_takes_its_connections_along(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async def wait(conn: Conn) -> None:
            await asyncio.Event().wait()

        listener = await network.transport(identity("server")).listen(ANY_PORT, wait)
        conn = await network.transport(identity("gateway")).dial([listener.address])
        await listener.close()
        with pytest.raises(PeerLost, match="closed"):
            await conn.receive()
        await conn.close()

    play(scenario)


def test_a_handler_that_fails_is_heard(play: Play) -> None:
    async def scenario(network: Network) -> None:
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

        async def fail(conn: Conn) -> None:
            raise KeyError("a bug in the handler")

        listener = await network.transport(identity("server")).listen(ANY_PORT, fail)
        conn = await network.transport(identity("gateway")).dial([listener.address])
        with pytest.raises(PeerLost):
            await conn.receive()
        await conn.close()
        with pytest.raises(KeyError, match="a bug in the handler"):
            await listener.close()
        assert [type(error) for error in reported] == [KeyError]

    play(scenario)


def test_two_coroutines_may_not_receive_at_once(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            receiving = asyncio.ensure_future(gateway.receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="two coroutines"):
                await gateway.receive()
            await server.send(Opened(SESSION, 1))
            assert (await receiving)[0] == Opened(SESSION, 1)

    play(scenario)


def test_a_cancelled_receiver_loses_no_message(play: Play) -> None:
    async def scenario(network: Network) -> None:
        async with joined(network) as (gateway, server):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(gateway.receive(), 0.01)
            await server.send(Opened(SESSION, 1))
            assert (await gateway.receive())[0] == Opened(SESSION, 1)

    play(scenario)
