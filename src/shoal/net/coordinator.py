"""Gives blocks to servers that join without any: waits for all that are expected, places, assigns.

The decision is swarm/placement.py; this gathers the offers from the registry seed and sends Assign.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.net.seed import Seed
from shoal.swarm.placement import ModelNeeds, NodeOffer, Placement, place
from shoal.swarm.trust import Zones
from shoal.wire.messages import Assign, Record, Span


async def assign_blocks(
    seed: Seed, model: str, needs: ModelNeeds, *, stages: int, replicas: int, zones: Sequence[Zones] = ()
) -> Placement:
    """Wait for stages * replicas servers, place the model over them, and tell each its blocks.

    Raises NotEnoughRoom when the model does not fit on them, PolicyUnmet when it would but for `zones`.
    """
    expected = stages * replicas
    records = await seed.wait_for(lambda records: len(_servers(records)) >= expected)
    offers = [_offer(record) for record in _servers(records)]
    placement = place(needs, offers, stages=stages, replicas=replicas, zones=zones)
    for assignment in placement.assignments:
        blocks = assignment.blocks
        seed.send(assignment.node, Assign(Span(model, blocks.start, blocks.end), assignment.reason[:1024]))
    return placement


def _servers(records: list[Record]) -> list[Record]:
    return [record for record in records if record.role == "server"]


def _offer(record: Record) -> NodeOffer:
    return NodeOffer(
        node=record.node,
        decode_ms_per_block=record.decode_ms_per_block,
        memory_bytes=record.memory_bytes,
        prefill_ms_per_block_token=record.prefill_ms_per_block_token,
        labels=tuple(record.labels),
    )
