"""`shoal bench`: the measurements, one command each."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {}

bench = LazyGroup(name="bench", table=COMMANDS, help="Measure shoal on this machine.")
