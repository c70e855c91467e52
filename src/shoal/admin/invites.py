"""What `shoal invite` and `shoal revoke` do: write the records that the running service reads."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from contextlib import closing

from shoal.admin.own import own_node
from shoal.admin.store import AdminStore, Member
from shoal.errors import UsageError
from shoal.net.auditing import audit_log
from shoal.net.home import Home
from shoal.net.identity import NODE_LIFETIME, Role, checked_labels, ders_of
from shoal.wire.enrolment import SECRET_BYTES, Token

TOKEN_LIFETIME_S = 15 * 60.0


def invite(
    home: Home, role: Role, labels: Sequence[str] = (), *, now: float, lifetime_s: float = TOKEN_LIFETIME_S
) -> Token:
    """A token that makes one machine a node of this role, once. Raises UsageError when this is not the admin's machine,
    the admin has never run, or a label is none."""
    if role == "admin":
        raise UsageError("No token makes an admin.", hint="A swarm has the admin that `shoal init` made.")
    labels = checked_labels(labels)
    (root_der,) = ders_of(home.root_pem)
    address = home.read().join
    if not address:
        raise UsageError(
            "Nobody could use a token yet: this swarm's admin has not run.", hint="Start `shoal admin` (or `shoal up`)."
        )
    secret = secrets.token_bytes(SECRET_BYTES)
    # First: a token that is in no log is never made.
    book = audit_log(home, own_node(home, "admin", "admin"))
    book.append("member.invite", role=role, labels=list(labels), lifetime_s=int(lifetime_s))
    with closing(AdminStore(home.admin_db)) as store:
        store.invite(secret, role, labels, now=now, lifetime_s=lifetime_s)
    return Token(address, hashlib.sha256(root_der).digest(), secret)


def revoke(home: Home, node: str, *, reason: str, now: float) -> tuple[Member, bool]:
    """Remove the node whose id begins with `node`: (the node, False when it was removed already). Raises UsageError
    when there is no such node, or when it is the admin itself."""
    home.issuer()  # not the admin's machine: a usage error that says so
    admin = home.node("admin").peer.node
    with closing(AdminStore(home.admin_db)) as store:
        if len(node) >= 4 and admin.startswith(node):
            raise UsageError(
                "That is this swarm's admin: without it nobody could be removed any more.",
                hint="If its key is stolen, make a new swarm with `shoal init`.",
            )
        member = store.find(node)
        # Records restored from a backup may not know its newest certificate.
        not_after = max(member.not_after, now + NODE_LIFETIME.total_seconds())
        was_new = store.revoke(member.node, reason=reason, not_after=not_after, now=now)
    # Behind it: a log that cannot be written must not keep anybody in.
    if was_new:
        book = audit_log(home, own_node(home, "admin", "admin"))
        book.append("member.revoke", node=member.node, role=member.role, reason=reason)
    return member, was_new
