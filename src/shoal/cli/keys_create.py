"""`shoal keys create`: a new API key."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("create")
@click.argument("name")
@click.option("--model", "models", multiple=True, help="Model it may use; may be repeated. Default: every model.")
@click.option("--zones", default="", help="Where its requests may be computed, for example all=trusted.")
@click.option("--requests-per-minute", type=int, default=None, help="Default: no limit.")
@click.option("--tokens-per-day", type=int, default=None, help="Prompts and answers, by UTC days. Default: no limit.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def create(
    name: str,
    models: tuple[str, ...],
    zones: str,
    requests_per_minute: int | None,
    tokens_per_day: int | None,
    swarm_dir: Path | None,
    as_json: bool,
) -> None:
    """Make an API key and show it, once."""
    from shoal.cli.keys_file import described, note_in_log, open_accounts
    from shoal.errors import ShoalError
    from shoal.swarm.trust import Zones

    policy = str(Zones.parse(zones))
    with open_accounts(swarm_dir, create=True) as (home, accounts):
        key, account = accounts.create(
            name,
            models=list(models) or None,
            zones=policy,
            requests_per_minute=requests_per_minute,
            tokens_per_day=tokens_per_day,
        )
        try:
            note_in_log(home, "key.create", account)
        except ShoalError:
            accounts.revoke(account.id)  # a key that no log knows must not exist
            raise
    if as_json:
        output.answer_json({"key": key, **described(account)})
        return
    output.answer(key)
    output.note(f"Key {account.id} for {account.name}. It is shown this once; only its hash is kept.")
