"""Gives blocks to servers that join without any: waits for all that are expected, places, assigns.

It lives beside the registry seed. Decisions are in swarm/placement.py; this only gathers offers and sends Assign.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.net.directory import Directory
from shoal.swarm.placement import ModelNeeds, NodeOffer, Placement, place
from shoal.wire.messages import Assign, Message, Record, Span

Send = Callable[[str, Message], None]
"""send(node, message) to a connected server."""


async def assign_blocks(
    directory: Directory,
    changed: asyncio.Event,
    send: Send,
    *,
    model: str,
    needs: ModelNeeds,
    stages: int,
    replicas: int,
) -> Placement:
    """Wait for stages * replicas servers in state "joining", place the model over them, and tell each its blocks.

    Raises NotEnoughRoom when the model does not fit on them.
    """
    while True:
        offers = {record.node: record for record in directory.live() if record.role == "server"}
        if len(offers) >= stages * replicas:
            break
        changed.clear()
        await changed.wait()
    placement = place(needs, [_offer(record) for record in offers.values()], stages=stages, replicas=replicas)
    for assignment in placement.assignments:
        blocks = assignment.blocks
        send(assignment.node, Assign(Span(model, blocks.start, blocks.end), assignment.reason[:1024]))
    return placement


def _offer(record: Record) -> NodeOffer:
    return NodeOffer(
        node=record.node,
        decode_ms_per_block=record.decode_ms_per_block,
        memory_bytes=record.memory_bytes,
        prefill_ms_per_block_token=record.prefill_ms_per_block_token,
        labels=tuple(record.labels),
    )
