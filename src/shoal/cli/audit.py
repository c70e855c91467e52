"""`shoal audit`: the log of who computed what, and whether it is still what was written."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {
    "verify": Entry(
        "shoal.cli.audit_verify:verify", "Check that nobody has changed the audit log; exit code 3 when somebody has."
    ),
    "show": Entry("shoal.cli.audit_show:show", "Show who could have read which request, and what else was noted."),
}

audit = LazyGroup(name="audit", table=COMMANDS, help="Look into the log of who computed what.")
