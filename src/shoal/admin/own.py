"""Nodes of the machine that holds the issuing authority: they need no token."""

from __future__ import annotations

import time
from contextlib import closing

from shoal.admin.store import AdminStore
from shoal.net.home import Home
from shoal.net.identity import NodeIdentity, Role, issue_node
from shoal.net.renewal import renewal_due


def own_node(home: Home, name: str, role: Role) -> NodeIdentity:
    """The node `name` of the admin's own machine: the one that is there, if its certificate is good for a while and it
    was not removed, else a new one. Raises UsageError when this is not the admin's machine."""
    issuer, now = home.issuer(), time.time()
    with closing(AdminStore(home.admin_db)) as store:
        if home.has_node(name):
            identity = home.node(name)
            fits = (identity.peer.role, identity.peer.swarm) == (role, issuer.swarm)
            if fits and now < renewal_due(identity) and not store.is_revoked(identity.peer.node):
                return identity
        identity = issue_node(issuer, role)
        store.certified(identity.peer, identity.valid_until.timestamp(), now=now)
    home.save_node(name, identity)
    return identity
