"""`shoal keys revoke`: an API key stops working."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("revoke")
@click.argument("key")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def revoke(key: str, swarm_dir: Path | None, as_json: bool) -> None:
    """Make an API key worthless, at once and for good.

    KEY is its number, or the beginning of the key as `shoal keys list` shows both.
    """
    from shoal.cli.keys_file import described, note_in_log, open_accounts, which

    with open_accounts(swarm_dir) as (home, accounts):
        account = accounts.revoke(which(accounts.records(), key).id)
        note_in_log(home, "key.revoke", account)
    if as_json:
        output.answer_json(described(account))
        return
    output.answer(f"Key {account.id} ({account.prefix}..., {account.name}) is revoked.")
