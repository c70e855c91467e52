"""One look at everything: gathers the facts that the checks judge."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.doctor import files, network
from shoal.doctor.facts import Facts, Home, Model, Network, Running, Swarm
from shoal.doctor.machine import machine
from shoal.doctor.model import model as look_at_model
from shoal.errors import ShoalError
from shoal.net.identity import NodeIdentity

_PREFERRED = ("admin", "gateway")
"""Identities to ask the swarm with, before those of servers."""


def look(
    swarm_dir: Path,
    state_dir: Path,
    *,
    model: str | None = None,
    listen: Sequence[str] = (),
    security: bool = False,
    on_progress: Callable[[str], None] = lambda part: None,
) -> Facts:
    """Everything the checks need, within seconds. Nothing is written and no folder is made.

    `swarm_dir`: the swarm directory; where it does not exist, that of a running `shoal up` is taken. `listen`: the
    addresses that somebody means to listen on. Raises UsageError when one of them is no address.
    """
    on_progress("machine")
    here = machine()
    on_progress("home")
    now = time.time()
    running = files.running(state_dir)
    if running.swarm_dir and not swarm_dir.is_dir():
        swarm_dir = Path(running.swarm_dir)
    home = files.home(swarm_dir, now)
    found: Model | None = None
    if model is not None:
        on_progress("model")
        found = look_at_model(model)
    on_progress("network")
    ports = tuple(network.port(address) for address in listen)
    running, skew_s, swarm = _ask_gateway(running)
    tried, told_by_seeds = asyncio.run(network.seeds(home.seeds, _identity(home)))
    doors = network.doors() if security else ()
    return Facts(
        now,
        machine=here,
        home=home,
        running=running,
        network=Network(ports, tried, doors, skew_s),
        model=found,
        swarm=swarm or told_by_seeds,
    )


def _ask_gateway(running: Running) -> tuple[Running, float | None, Swarm | None]:
    """What the API of a swarm says: the one of SHOAL_API, else the running one."""
    api = os.environ.get("SHOAL_API") or running.api
    key = os.environ.get("SHOAL_KEY") or (running.key if api == running.api else "")
    if not api:
        return running, None, None
    answer = network.ask(f"{api.rstrip('/')}/shoal/status", key)
    if api == running.api:
        running = dataclasses.replace(running, answers=answer.status != 0)
    if answer.status == 200:
        return running, answer.skew_s, network.told_by_gateway(answer.body)
    return running, answer.skew_s, None


def _identity(home: Home) -> NodeIdentity | None:
    """A node of this machine that can show a certificate."""
    nodes = [each.name for each in home.certificates if each.name not in ("root", "issuer") and not each.error]
    for name in sorted(nodes, key=lambda name: (name not in _PREFERRED, name)):
        try:
            return NodeIdentity.load(Path(home.path) / "nodes" / name)
        except ShoalError:
            continue  # what is wrong with it, the checks of the home say
    return None
