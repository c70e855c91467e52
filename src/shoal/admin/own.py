"""Nodes of the machine that holds the issuing authority: they need no token."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from shoal.admin.store import AdminStore
from shoal.errors import UsageError
from shoal.net.home import Home
from shoal.net.identity import (
    NODE_LIFETIME,
    Authority,
    NodeIdentity,
    Role,
    certify,
    checked_labels,
    ders_of,
    issue_node,
    key_of_certificate,
    peer_of_pem,
)
from shoal.net.renewal import renewal_due


def own_node(home: Home, name: str, role: Role, *, labels: Sequence[str] | None = None) -> NodeIdentity:
    """The node `name` of the admin's own machine: the one that is there, with a new certificate if that is due, or a
    new one if there is none or it was removed. `labels` None: those it has. Raises UsageError when this is not the
    admin's machine."""
    issuer, now = home.issuer(), time.time()
    wanted = None if labels is None else checked_labels(labels)
    with closing(AdminStore(home.admin_db)) as store:
        identity: NodeIdentity | None = None
        if home.has_node(name):
            identity = home.node(name)
            if (identity.peer.role, identity.peer.swarm) != (role, issuer.swarm):
                raise UsageError(
                    f"{home.node_dir(name)} is another node ({identity.peer}).",
                    hint="Choose another name, or another directory with --swarm-dir.",
                )
            if store.is_revoked(identity.peer.node):
                identity = None
            elif wanted in (None, identity.peer.labels) and (
                now < renewal_due(identity) or not can_last_longer(issuer, identity)
            ):
                return identity
        if identity is None:
            identity = issue_node(issuer, role, labels=wanted or ())
        else:
            identity = reissued(issuer, identity, labels=wanted)
        store.certified(identity.peer, identity.valid_until.timestamp(), now=now)
    home.save_node(name, identity)
    return identity


def can_last_longer(issuer: Authority, identity: NodeIdentity) -> bool:
    """Whether a new certificate would end after the present one: no certificate outlives its issuer's."""
    return issuer.not_after > identity.valid_until


def reissued(
    issuer: Authority,
    identity: NodeIdentity,
    *,
    labels: Sequence[str] | None = None,
    lifetime: datetime.timedelta = NODE_LIFETIME,
) -> NodeIdentity:
    """`identity` with a new certificate for the same key and role; `labels` None: the same, too."""
    peer = identity.peer
    key = key_of_certificate(identity.chain_der[0])
    if labels is None or tuple(labels) == peer.labels:
        return identity.renewed(ders_of(certify(issuer, peer.role, key, labels=peer.labels, lifetime=lifetime)))
    # Other labels count at once, also when the certificate lasts no longer than the one before.
    cert_pem = certify(issuer, peer.role, key, labels=labels, lifetime=lifetime)
    return replace(identity, peer=peer_of_pem(cert_pem), cert_pem=cert_pem)
