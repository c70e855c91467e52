"""What `shoal join` works out before it starts a server: does it fit, and where will others find it."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from shoal.compute.facts import ModelFacts
from shoal.errors import CannotSplit, UsageError
from shoal.net.transport import Address
from shoal.server.node import ServerConfig, needs_of
from shoal.spec.ids import BlockRange
from shoal.swarm.balance import check_room
from shoal.swarm.neighbour import NeighbourConfig


def plan(
    model_dir: Path,
    facts: ModelFacts,
    *,
    blocks: str | None,
    memory_bytes: int,
    idle_only: bool,
    back_after: int,
    threads: str,
    listen: str | None,
    advertise: str | None,
    dtype: str,
    device: str,
    exact: bool,
    cache_tokens: int | None,
) -> ServerConfig:
    """The server that the options of `shoal join` describe, still without seeds.

    Raises UsageError for options that make no sense, CannotSplit for a span at borders that the family does not allow,
    NotEnoughRoom with how many blocks would fit."""
    span = None if blocks is None else BlockRange.parse(blocks)
    if span is not None and span.end > facts.num_blocks:
        raise UsageError(
            f"{facts.name.partition('@')[0]} has blocks 0:{facts.num_blocks}, {span} was asked for.",
            hint=f"Choose START:END within 0:{facts.num_blocks}, or leave --blocks away.",
        )
    borders = {0, facts.num_blocks, *facts.legal_cuts}
    if span is not None and not {span.start, span.end} <= borders:
        raise CannotSplit(
            f"This family cannot be cut at both ends of {span}.",
            hint=f"Borders may be at {', '.join(map(str, sorted(borders)))}.",
        )
    kind: torch.dtype = getattr(torch, dtype)
    check_room(needs_of(facts, kind, cache_tokens), span, memory_bytes)
    return ServerConfig(
        model_dir=model_dir,
        listen="" if listen is None else str(address(listen)),
        seeds=(),
        blocks=span,
        dtype=kind,
        device=device,
        memory_bytes=memory_bytes,
        cache_tokens=cache_tokens,
        exact=exact,
        threads=number_of_threads(threads),
        advertise=None if advertise is None else str(address(advertise)),
        free=span is None,
        own_directory=True,
        idle_only=idle_only,
        neighbour=NeighbourConfig(quiet_for_s=float(back_after)),
    )


def number_of_threads(text: str) -> int | None:
    """ "auto" -> None. Raises UsageError for anything but that and a number from 1 on."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise UsageError(f"{text!r} is no number of threads.", hint="Use --threads auto, or a number such as 4.")
    return int(text)


def address(text: str) -> Address:
    """HOST:PORT or tcp://HOST:PORT. Raises UsageError."""
    return Address.parse(text if text.startswith("tcp://") else f"tcp://{text}")


def reachable(seeds: tuple[str, ...], listen: str, advertise: str | None) -> tuple[str, str | None]:
    """Where to listen, and what to tell others when that is no address they could use.

    Without wishes: on the address of this machine that the way to the swarm leaves from, so others on that network
    reach it, and nobody else does."""
    own = _own_host(seeds)
    if not listen:
        listen = str(Address(own, 0))
    if advertise is None and Address.parse(listen).host in ("0.0.0.0", "::"):
        advertise = str(Address(own, 0))
    return listen, advertise


def _own_host(seeds: tuple[str, ...]) -> str:
    for seed in map(Address.parse, seeds):
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(seed.host, seed.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)  # sends nothing: it only asks the system for the way
                return str(probe.getsockname()[0])
        except OSError:
            continue
    raise UsageError(
        f"No way leads from this machine to the swarm ({', '.join(seeds) or 'no address is known'}).",
        hint="Check the network; or say where others reach this machine with --listen and --advertise.",
    )
