"""`shoal invite`: a token with which one machine can join, once."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("invite")
@click.option(
    "--role",
    type=click.Choice(["server", "client", "gateway"]),
    required=True,
    help="What the machine will be: it hosts blocks, it asks, or it answers the API.",
)
@click.option(
    "--label", "labels", multiple=True, help="What you vouch for, for example trusted; for several, repeat it."
)
@click.option(
    "--minutes", type=click.IntRange(1, 10_080), default=15, show_default=True, help="How long the token is good."
)
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def invite(role: str, labels: tuple[str, ...], minutes: int, swarm_dir: Path | None, as_json: bool) -> None:
    """Print a token with which one machine may join, once."""
    import time
    from typing import cast

    from shoal.admin.invites import invite as make
    from shoal.launch import state
    from shoal.net.identity import Role
    from shoal.net.transport import Address, answers

    home = state.find_home(swarm_dir, on_several=output.note)
    now = time.time()
    token = make(home, cast(Role, role), labels, now=now, lifetime_s=minutes * 60.0)
    listening = answers(Address.parse(token.address))
    if as_json:
        output.answer_json(
            {
                "token": str(token),
                "role": role,
                "labels": sorted(set(labels)),
                "address": token.address,
                "root_sha256": token.root_sha256.hex(),
                "expires": int(now + minutes * 60),
                "admin_answers": listening,
            }
        )
        return
    output.answer(str(token))
    named = f" with {', '.join(sorted(set(labels)))}" if labels else ""
    output.note(f"Good once, for a {role}{named}, until {time.strftime('%H:%M', time.localtime(now + minutes * 60))}.")
    if not listening:
        output.note(f"Nobody listens at {token.address} now: start `shoal admin`, or the token cannot be used.")
    if Address.parse(token.address).is_loopback:
        output.note("The admin listens on this machine only; `shoal admin --listen ADDRESS:PORT` lets others in.")
