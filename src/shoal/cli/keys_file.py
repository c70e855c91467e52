"""What the commands about API keys share: the key file of this machine's gateway, and how a key is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli import output
from shoal.errors import UsageError

if TYPE_CHECKING:
    from shoal.gateway.accounts import Account, Accounts, Usage
    from shoal.net.home import Home


@contextmanager
def open_accounts(swarm_dir: Path | None, *, create: bool = False) -> Iterator[tuple[Home, Accounts]]:
    """The swarm's directory and its key file. Raises UsageError when there is none, unless it is to be made."""
    from shoal.gateway.accounts import Accounts
    from shoal.launch import state
    from shoal.net.home import Home, home_path

    try:
        home = state.find_home(swarm_dir, on_several=output.note)
    except UsageError:
        # A gateway that others can reach does not start without a key, so a key may come before everything else.
        home = Home(home_path(swarm_dir))
        if home.exists or not (create or home.accounts_db.is_file()):
            raise
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        output.note(f"No swarm is in {home.path} yet: its keys are good at a gateway that is started there.")
    if not create and not home.accounts_db.is_file():
        raise UsageError(f"There are no API keys in {home.path}.", hint="`shoal keys create NAME` makes one.")
    accounts = Accounts(home.accounts_db)
    try:
        yield home, accounts
    finally:
        accounts.close()


def which(records: Sequence[Account], text: str) -> Account:
    """The valid key with this number, or whose own text begins so. Raises UsageError for none and for several."""
    if text.isascii() and text.isdigit():
        found = [account for account in records if account.id == int(text)]
    else:
        # A whole key is taken too: whoever finds a leaked one has just that.
        found = [account for account in records if text.startswith(account.prefix) or _begins(account, text)]
    if len(found) != 1:
        raise UsageError(
            f"{len(found) or 'No'} keys are meant by {text[:20]!r}.", hint="`shoal keys list` shows their numbers."
        )
    return found[0]


def _begins(account: Account, text: str) -> bool:
    return len(text) >= 12 and account.prefix.startswith(text)


def note_in_log(home: Home, kind: str, account: Account) -> None:
    """Into the audit log, signed by this machine's admin or gateway. Raises ShoalError when it cannot be written."""
    from shoal.net.auditing import audit_log

    name = next((name for name in ("admin", "gateway") if home.has_node(name)), None)
    if name is None:
        output.note("This is in no audit log: no admin and no gateway of a swarm is here yet.")
        return
    about = {name: value for name, value in described(account).items() if name not in ("created", "revoked")}
    audit_log(home, home.node(name)).append(kind, **about)


def described(account: Account) -> dict[str, Any]:
    """A key as JSON, without its secret."""
    return {
        "id": account.id,
        "name": account.name,
        "prefix": account.prefix,
        "models": None if account.models is None else sorted(account.models),
        "zones": account.zones,
        "requests_per_minute": account.requests_per_minute,
        "tokens_per_day": account.tokens_per_day,
        "created": account.created,
        "revoked": account.revoked,
    }


def shown_usage(usage: Usage) -> dict[str, int]:
    return {
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "tokens": usage.tokens,
    }
