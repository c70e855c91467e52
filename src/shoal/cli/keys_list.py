"""`shoal keys list`: which API keys there are, and what they used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli import output


@click.command("list")
@click.option("--all", "revoked", is_flag=True, help="Revoked keys too.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_keys(revoked: bool, swarm_dir: Path | None, as_json: bool) -> None:
    """Show the API keys, their limits and what they used."""
    import time

    from shoal.cli.keys_file import described, open_accounts, shown_usage
    from shoal.gateway.accounts import day_of

    today = day_of(time.time())
    with open_accounts(swarm_dir) as (_, accounts):
        found = [
            {
                **described(account),
                "today": shown_usage(accounts.used(account.id, today, today)),
                "total": shown_usage(accounts.used(account.id)),
            }
            for account in accounts.records(revoked=revoked)
        ]
    if as_json:
        output.answer_json({"keys": found})
        return
    output.answer(f"{'id':>4}  {'key':<18} {'name':<20} {'tokens today':>14} {'in all':>12}  limits")
    for key in found:
        output.answer(
            f"{key['id']:>4}  {key['prefix']:<18} {key['name'][:20]:<20} {key['today']['tokens']:>14}"
            f" {key['total']['tokens']:>12}  {_limits(key)}"
        )


def _limits(key: dict[str, Any]) -> str:
    parts = [
        f"{key['requests_per_minute']} requests a minute" if key["requests_per_minute"] else "",
        f"{key['tokens_per_day']} tokens a day" if key["tokens_per_day"] else "",
        f"models {', '.join(key['models'])}" if key["models"] is not None else "",
        f"computed where {key['zones']}" if key["zones"] else "",
        "revoked" if key["revoked"] else "",
    ]
    return "; ".join(filter(None, parts)) or "none"
