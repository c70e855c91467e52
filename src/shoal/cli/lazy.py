"""A click group that imports a command only when it is called.

Importing torch takes seconds. So a group is a table of names, each with one line of help and the place of its click
command; `--help` reads the table alone, and only the command that is called gets imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import click

from shoal.cli.unpickling import refuse_unpickling


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives and what the group's help says about it."""

    target: str
    """`module:attribute` of a click command."""
    help: str
    """One line; the first line of the command's own docstring says the same (a test compares them)."""
    process: bool = False
    """A child process that other commands start: not shown in help, and not able to unpickle anything."""

    def load(self) -> click.Command:
        """Import the module and return its command."""
        module, _, attribute = self.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{self.target} is no click command"
        return command


class LazyGroup(click.Group):
    """A click group over a table of entries."""

    def __init__(self, *, name: str, table: Mapping[str, Entry], **attributes: object) -> None:
        super().__init__(name=name, **attributes)  # type: ignore[arg-type]
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names that help shows, in table order."""
        return [name for name, entry in self.table.items() if not entry.process]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the called command; None when the table has no such name."""
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        if entry.process:
            refuse_unpickling()
        return entry.load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none of them."""
        rows = [(name, self.table[name].help) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the called command; a mistyped name is answered with the nearest ones."""
        name = args[0]
        if name not in self.table and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {name!r}.{self._nearest(ctx, name)}", ctx)
        return super().resolve_command(ctx, args)

    def _nearest(self, ctx: click.Context, name: str) -> str:
        from difflib import get_close_matches

        near = get_close_matches(name, self.list_commands(ctx), n=2, cutoff=0.5)
        return f" Did you mean {' or '.join(repr(each) for each in near)}?" if near else ""
