"""How steps that leave together are cut into frames."""

from __future__ import annotations

import asyncio

import pytest
from support.networks import certified, identity

from shoal.client.sessions import FRAME_BYTES, Sessions, _frames
from shoal.errors import ProtocolError
from shoal.net.directory import Directory
from shoal.net.memory import MemoryNetwork, MemoryTransport
from shoal.swarm.session import Feed
from shoal.wire import messages as msg
from shoal.wire.rows import Rows

WIDTH = 4096


def replay(steps: int, rows: int) -> list[Feed]:
    """The journal of one session as replay steps; all share one buffer, as only sizes matter here."""
    data = bytes(rows * WIDTH * 4)
    return [
        Feed("server", msg.StepItem(bytes(16), at * rows, rows, 0), (Rows("f32", WIDTH, rows, data),))
        for at in range(steps)
    ]


def test_a_replay_larger_than_any_frame_leaves_in_several() -> None:
    steps = replay(40, 512)
    assert sum(step.item.rows for step in steps) * WIDTH * 4 > msg.MAX_BODY_BYTES
    frames = list(_frames(steps))
    assert [step for frame in frames for step in frame] == steps
    assert all(sum(step.item.rows for step in frame) * WIDTH * 4 <= FRAME_BYTES for frame in frames)


def test_decode_rows_of_many_sessions_share_frames_of_the_most_items_allowed() -> None:
    frames = list(_frames(replay(msg.MAX_ITEMS + 1, 1)))
    assert [len(frame) for frame in frames] == [msg.MAX_ITEMS, 1]


@pytest.mark.parametrize("tensor", [msg.Tensor("bf16", 1, 8), msg.Tensor("f32", 1, 9)], ids=["format", "width"])
def test_a_server_that_sends_rows_of_another_shape_broke_the_protocol(tensor: msg.Tensor) -> None:
    async def scenario() -> None:
        node = identity("gateway")
        transport = MemoryTransport(MemoryNetwork(), certified(node))
        sessions = Sessions("toy", 2, node=node.peer.node, transport=transport, directory=Directory(node), wire="f32")
        handle = sessions.open(4, on_rows=lambda position, rows: None, on_failed=lambda error: None)
        sessions.feed(handle, Rows("f32", 8, 1, bytes(32)))
        item = msg.StepItem(handle.session.id, 0, 1, 1)
        with pytest.raises(ProtocolError, match="were agreed"):
            sessions._on_message("server", msg.Journal(1, [item], tensor), memoryview(bytes(36)))
        await sessions.close()

    asyncio.run(scenario())
