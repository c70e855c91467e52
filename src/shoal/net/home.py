"""The swarm directory ("home") of one machine: which swarm it belongs to, its keys, and on the admin's machine the
authorities.

    swarm.json                  id of the swarm, addresses of its registry seeds, where joins are taken
    ca/ca.pem ca.key            root authority; the key may be taken away after `shoal init`
    ca/issuer.pem issuer.key    issuing authority (admin's machine only)
    nodes/NAME/                 node.key node.pem ca.pem of every node this machine runs
    admin.sqlite                invites, issued certificates, revocations (admin's machine only)
    accounts.sqlite             API keys (gateway only)

Directories are 0700 and files 0600, written whole or not at all.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

import msgspec

from shoal.errors import UsageError
from shoal.manifest.files import write_private
from shoal.net.identity import Authority, NodeIdentity, create_ca, create_issuer, issue_node

RENEW_ISSUER_BELOW = datetime.timedelta(days=30)
_NODE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class SwarmFile(msgspec.Struct, frozen=True):
    """What swarm.json says."""

    swarm: str
    seeds: list[str] = []
    """Addresses (tcp://HOST:PORT) at which the registry is met first."""
    join: str = ""
    """Where `shoal admin` took joins when it last ran; empty on machines that are not the admin's."""


def home_path(given: Path | None = None) -> Path:
    """The directory to use: `given`, else $SHOAL_SWARM_DIR, else $XDG_DATA_HOME/shoal/swarm. It need not exist."""
    if given is not None:
        return given
    if named := os.environ.get("SHOAL_SWARM_DIR"):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "shoal" / "swarm"


class Home:
    """One swarm directory. Making the object touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, name: str) -> Home:
        """A new swarm called `name` at `path`: root, issuing authority and the admin's identity.

        Raises UsageError when there is a swarm already, ShoalError when the disk does not take it.
        """
        home = cls(path)
        if home.exists or home.ca_dir.exists():
            raise UsageError(
                f"{path} holds a swarm already.", hint="Choose another directory with --swarm-dir, or move that one."
            )
        root = create_ca(name)
        issuer = create_issuer(root)
        admin = issue_node(issuer, "admin")
        root.save(home.ca_dir)
        issuer.save(home.ca_dir)
        home.save_node("admin", admin)
        # Last: a directory without it is no swarm yet, so a disk that was full half-way is found by the next try.
        home.write(SwarmFile(root.swarm))
        return home

    # Which swarm

    @property
    def exists(self) -> bool:
        return (self.path / "swarm.json").is_file()

    def read(self) -> SwarmFile:
        """Raises UsageError when there is no swarm here."""
        try:
            return msgspec.json.decode((self.path / "swarm.json").read_bytes(), type=SwarmFile)
        except OSError as error:
            raise UsageError(
                f"{self.path} holds no swarm ({error.strerror}).",
                hint="Name its directory with --swarm-dir; `shoal init` makes a new swarm, `shoal join` enters one.",
            ) from error
        except msgspec.DecodeError as error:
            raise UsageError(
                f"{self.path / 'swarm.json'} is damaged: {error}", hint="Restore it, or join the swarm again."
            ) from error

    def write(self, file: SwarmFile) -> None:
        """Replace swarm.json. Raises ShoalError when the disk does not take it."""
        write_private(self.path / "swarm.json", msgspec.json.format(msgspec.json.encode(file)) + b"\n")

    # Authorities

    @property
    def ca_dir(self) -> Path:
        return self.path / "ca"

    @property
    def is_admin(self) -> bool:
        """Whether this machine can admit others: it holds the issuing authority."""
        return (self.ca_dir / "issuer.key").is_file()

    @property
    def has_root_key(self) -> bool:
        return (self.ca_dir / "ca.key").is_file()

    @property
    def root_pem(self) -> bytes:
        """The root's certificate. Raises UsageError when this is not the admin's machine."""
        self._must_be_admin()
        return (self.ca_dir / "ca.pem").read_bytes()

    def issuer(self) -> Authority:
        """Raises UsageError when this is not the admin's machine."""
        self._must_be_admin()
        return Authority.load_issuer(self.ca_dir)

    def renew_issuer(self, now: datetime.datetime) -> bool:
        """Sign the issuing authority anew when the root's key is here and less than 30 days are left. True when it was
        done."""
        issuer = self.issuer()
        if not self.has_root_key or issuer.not_after - now >= RENEW_ISSUER_BELOW:
            return False
        create_issuer(Authority.load(self.ca_dir), key_pem=issuer.key_pem).save(self.ca_dir)
        return True

    def _must_be_admin(self) -> None:
        if not self.is_admin:
            self.read()  # no swarm at all is the better message
            raise UsageError(
                f"{self.path} is not the directory of this swarm's admin: it holds no ca/issuer.key.",
                hint="Run this where `shoal init` was run.",
            )

    # Nodes

    def node_dir(self, name: str) -> Path:
        """Raises UsageError for a name that is none."""
        if _NODE_NAME.fullmatch(name) is None:
            raise UsageError(
                f"{name!r} cannot name a node.",
                hint="Use lower-case letters, digits and hyphens, for example server-1.",
            )
        return self.path / "nodes" / name

    def has_node(self, name: str) -> bool:
        return (self.node_dir(name) / "node.pem").is_file()

    def node(self, name: str) -> NodeIdentity:
        """Raises UsageError when it is missing, damaged or readable by others."""
        return NodeIdentity.load(self.node_dir(name))

    def save_node(self, name: str, identity: NodeIdentity) -> None:
        """Raises ShoalError when the disk does not take it."""
        identity.save(self.node_dir(name))

    # Files of others

    @property
    def admin_db(self) -> Path:
        return self.path / "admin.sqlite"

    @property
    def accounts_db(self) -> Path:
        return self.path / "accounts.sqlite"

    @property
    def audit_log(self) -> Path:
        return self.path / "audit.jsonl"
