"""`shoal revoke`: throw a node out of the swarm."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("revoke")
@click.argument("node")
@click.option("--reason", default="", help="For the admin's records, for example: laptop stolen.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def revoke(node: str, reason: str, swarm_dir: Path | None, as_json: bool) -> None:
    """Throw a node out: its connections are cut within seconds, for good."""
    import time

    from shoal.admin.invites import revoke as remove
    from shoal.launch import state
    from shoal.net.transport import Address, answers

    home = state.find_home(swarm_dir, on_several=output.note)
    member, was_new = remove(home, node, reason=reason, now=time.time())
    address = home.read().join
    listening = bool(address) and answers(Address.parse(address))
    if as_json:
        output.answer_json(
            {
                "node": member.node,
                "role": member.role,
                "labels": list(member.labels),
                "already": not was_new,
                "admin_answers": listening,
            }
        )
        return
    output.answer(f"{member.role} {member.node} " + ("is removed." if was_new else "was removed before."))
    if not listening:
        output.note("No admin of this swarm runs now: the others hear of it as soon as `shoal admin` does.")
