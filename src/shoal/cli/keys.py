"""`shoal keys`: API keys of this machine's gateway, one command each."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {
    "create": Entry("shoal.cli.keys_create:create", "Make an API key and show it, once."),
    "list": Entry("shoal.cli.keys_list:list_keys", "Show the API keys, their limits and what they used."),
    "revoke": Entry("shoal.cli.keys_revoke:revoke", "Make an API key worthless, at once and for good."),
}

keys = LazyGroup(name="keys", table=COMMANDS, help="API keys of this machine's gateway.")
