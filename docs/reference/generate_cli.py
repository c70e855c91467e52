"""Writes docs/reference/cli.md from the commands themselves; a test compares the two.

.venv/bin/python docs/reference/generate_cli.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from shoal.cli.main import shoal

PAGE = Path(__file__).with_name("cli.md")

HEADER = """# The command line

Written by `docs/reference/generate_cli.py` from the commands; do not edit it by hand.

Answers go to stdout, everything said about them to stderr. With `--json` stdout holds JSON only, errors included.
[Exit codes](../start.md#when-something-goes-wrong) are the same for all commands.
"""


def commands(group: click.Group, ctx: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """(full name, command, its context) of every command that help shows, in the order of help."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=ctx)
        if isinstance(command, click.Group):
            yield from commands(command, inner)
        else:
            yield inner.command_path, command, inner


def span(type_: click.IntRange | click.FloatRange) -> str:
    """The values of a range in words; every range of ours has a least value."""
    least = f"above {type_.min}" if type_.min_open else f"{type_.min}"
    return f"{least} or more" if type_.max is None else f"{least} to {type_.max}"


def option_row(option: click.Option, ctx: click.Context) -> str:
    """One line of a command's table."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        values = ""
    elif isinstance(option.type, click.Choice):
        values = ", ".join(f"`{choice}`" for choice in option.type.choices)
    elif isinstance(option.type, click.IntRange | click.FloatRange):
        values = span(option.type)
    else:
        values = {"integer": "number", "filename": "path", "directory": "path"}.get(option.type.name, option.type.name)
    default = f"`{option.default}`" if option.show_default and option.default is not None else ""
    needed = " Required." if option.required else ""
    return f"| {names} | {values} | {default} | {option.help or ''}{needed} |"


def section(name: str, command: click.Command, ctx: click.Context) -> str:
    """A command's part of the page."""
    rows = [
        option_row(parameter, ctx)
        for parameter in command.get_params(ctx)
        if isinstance(parameter, click.Option) and "--help" not in parameter.opts
    ]
    table = "\n".join(["| option | value | default | |", "| --- | --- | --- | --- |", *rows])
    return f"## {name}\n\n{' '.join((command.help or '').split())}\n\n{table}\n"


def reference() -> str:
    """The whole page."""
    ctx = click.Context(shoal, info_name="shoal")
    return "\n".join([HEADER, *(section(*found) for found in commands(shoal, ctx))])


if __name__ == "__main__":
    PAGE.write_text(reference())
