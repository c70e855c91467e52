"""What members of a swarm say about an audit log, also when one of them says nonsense."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.networks import identity, run

from shoal.net.auditing import heads_told
from shoal.net.home import Home, SwarmFile
from shoal.net.tls import TlsTransport
from shoal.net.transport import Conn
from shoal.wire.messages import Signed, Sync


def test_a_member_that_signs_nonsense_is_not_believed_and_ends_nothing(tmp_path: Path) -> None:
    home, liar, own = Home(tmp_path / "home"), identity("server"), identity("gateway")

    async def lie(conn: Conn) -> None:
        await conn.receive()
        await conn.send(Sync({}, [Signed(b"\xc1", liar.sign(b"\xc1"), list(liar.chain_der))], 0))
        await asyncio.Event().wait()

    async def scenario() -> None:
        listener = await TlsTransport(liar).listen("tcp://127.0.0.1:0", lie)
        home.save_node("gateway", own)
        home.write(SwarmFile(own.peer.swarm, [listener.address], ""))
        try:
            assert await heads_told(home) == []
        finally:
            await listener.close()

    run(scenario)
