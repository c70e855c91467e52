"""Everything the checks look at, as plain values. What could not be found out is None: no check may guess from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Package:
    """A package that shoal needs. `installed` None: it is missing; `accepted`: the version is one that shoal takes."""

    name: str
    needed: str
    installed: str | None
    accepted: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine and the process's own limits on it. Sizes in bytes."""

    system: str = "Linux"
    python: tuple[int, int] = (3, 11)
    bits: int = 64
    packages: tuple[Package, ...] = ()
    memory_total: int | None = None
    memory_available: int | None = None
    memory_limit: int | None = None
    """Of the control group this process runs in; None: no limit."""
    swap_used: int | None = None
    cores: int = 1
    core_limit: float | None = None
    """Of the control group."""
    load: float | None = None
    """Processes that want a core, average of a minute."""
    threads_wanted: int | None = None
    """OMP_NUM_THREADS, or what else sets the threads of numerical libraries."""
    governor: str | None = None
    huge_pages: str | None = None
    """always, madvise or never."""
    open_files: int | None = None
    temp: str = ""
    temp_free: int | None = None
    """None: nothing can be written there."""
    clock_synchronised: bool | None = None
    proxies: tuple[str, ...] = ()
    """Names of the proxy variables that are set."""
    no_proxy: str = ""
    is_root: bool = False
    core_dumps: bool = False


@dataclass(frozen=True, slots=True)
class Private:
    """A file or folder that only its owner should reach."""

    path: str
    mode: int
    mine: bool
    """It belongs to the user who asks."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate. Times in Unix seconds."""

    name: str
    """Whose: "root", "issuer", or a node's name."""
    path: str
    not_before: float = 0.0
    not_after: float = 0.0
    key_fits: bool | None = None
    """The private key beside it is its own; None: there is none beside it."""
    from_root: bool | None = None
    """Its chain ends at the home's root."""
    error: str = ""
    """Why it could not be read; the other fields mean nothing then."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str
    limited: bool
    """It has a quota."""
    days_old: float


@dataclass(frozen=True, slots=True)
class AuditLog:
    entries: int | None
    """None: too long to be read now."""
    error: str = ""
    """What `shoal audit verify` would say against it."""


@dataclass(frozen=True, slots=True)
class Home:
    """The swarm directory."""

    path: str
    exists: bool
    mode: int = 0o700
    mine: bool = True
    writable: bool = True
    free: int | None = None
    swarm: str = ""
    swarm_error: str = ""
    """Why swarm.json tells nothing."""
    seeds: tuple[str, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    private: tuple[Private, ...] = ()
    root_key: bool = False
    issuer_key: bool = False
    databases: tuple[tuple[str, str], ...] = ()
    """(file, what is wrong with it or "")."""
    keys: tuple[ApiKey, ...] | None = None
    """The gateway's keys; None: no gateway has run from here."""
    requests: int = 0
    """Requests that the gateway has counted for its keys, ever."""
    audit: AuditLog | None = None
    open_invites: int = 0
    """Not used and not expired."""
    revoked_valid: int | None = None
    """Revoked nodes whose certificates have not expired; None on machines that admit nobody."""
    unfinished: tuple[str, ...] = ()
    """Files that an interrupted write left behind."""


@dataclass(frozen=True, slots=True)
class Running:
    """What the running.*.json of this user's swarms say, and what of it is true. The first fields are about the newest
    swarm whose process exists."""

    path: str
    api: str = ""
    swarm_dir: str = ""
    key: str = field(default="", repr=False)
    answers: bool | None = None
    """Its API answered; None: not asked."""
    error: str = ""
    """Why the file cannot be read."""
    private: Private | None = None
    stale: tuple[str, ...] = ()
    """Files whose process is gone."""
    leftovers: tuple[str, ...] = ()
    """Folders of swarms whose process is gone, with keys in them."""


@dataclass(frozen=True, slots=True)
class Port:
    """An address this machine means to listen on. `holder` is a process that does, "" for a free one."""

    address: str
    free: bool
    holder: str = ""
    ours: bool = False
    """The holder is a process of shoal."""
    here: bool = True
    """The address is one of this machine's."""


@dataclass(frozen=True, slots=True)
class Seed:
    """One way into the swarm, tried."""

    address: str
    resolves: bool = True
    connects: bool = True
    greets: bool | None = None
    """It accepted our certificate; None: we have none to show."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Door:
    """A port of the gateway that other machines can reach."""

    address: str
    encrypted: bool
    asks_for_key: bool


@dataclass(frozen=True, slots=True)
class Network:
    ports: tuple[Port, ...] = ()
    seeds: tuple[Seed, ...] = ()
    doors: tuple[Door, ...] = ()
    skew_s: float | None = None
    """This clock minus that of the gateway, in seconds."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A weight file of a model. `expected` is the size its header demands."""

    name: str
    size: int
    expected: int | None
    tensors: frozenset[str] = frozenset()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory."""

    path: str
    exists: bool = True
    in_cache: bool | None = None
    """For a hub id: it was fetched before."""
    hub_offline: bool = False
    config_error: str = ""
    model_type: str = ""
    quantised: bool = False
    files: tuple[Weights, ...] = ()
    index: tuple[tuple[str, str], ...] | None = None
    """(tensor, file) of the index; None: there is no index."""
    index_error: str = ""
    pickles: tuple[str, ...] = ()
    tokenizer: str = ""
    """The file with the tokenizer, "" for none."""
    tokenizer_error: str = ""
    fingerprint: str = ""
    """The name that servers give this model in the registry."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Member:
    """One server as the swarm knows it."""

    node: str
    state: str
    start: int
    end: int
    """The blocks it hosts; 0:0 for none."""
    model: str = ""
    dtype: str = ""
    weights: str = "native"
    addresses: tuple[str, ...] = ()
    cache_free: int = 0
    cache_total: int = 0


@dataclass(frozen=True, slots=True)
class Swarm:
    """The swarm as its registry or its gateway tells it."""

    members: tuple[Member, ...] = ()
    blocks: int | None = None
    """How many the model has; None: not told."""
    model: str = ""
    error: str = ""
    """Why nothing is known."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at everything. `now` in Unix seconds. What was not looked at is None."""

    now: float
    machine: Machine = field(default_factory=Machine)
    home: Home | None = None
    running: Running | None = None
    network: Network = field(default_factory=Network)
    model: Model | None = None
    swarm: Swarm | None = None
