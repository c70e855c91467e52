"""The checks: each looks at the facts and says ok, warn or fail, with the remedy in one line. Pure functions.

A failure is something that does not work, or keeps no promise; a warning is something that will not work one day, works
badly, or may be meant. A check that has nothing to look at says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from shoal.doctor.facts import Certificate, Facts, Member
from shoal.spec.units import show_bytes

Status = Literal["ok", "warn", "fail"]
GROUPS = ("machine", "home", "network", "model", "swarm", "security")

GIB = 1 << 30
MIN_PYTHON = (3, 11)
LEAST_MEMORY = 2 * GIB
SWAP_SHARE = 0.1
LEAST_DISK = 1 * GIB
LITTLE_DISK = 5 * GIB
LEAST_OPEN_FILES = 1280
"""The connections of a listener, and what a process opens besides."""
GOOD_OPEN_FILES = 4096
SKEW_S = 60.0
"""Certificates are valid from five minutes before they were made; a minute still leaves room for drift."""
FATAL_SKEW_S = 300.0
NODE_WARN_S = 2 * 86_400.0
"""Nodes renew themselves when half of their seven days is over. With less than two left, nobody renews."""
ISSUER_WARN_S = 30 * 86_400.0
ROOT_WARN_S = 180 * 86_400.0
OVERCOMMITTED = 1.5
FULL_CACHE = 0.05
KEY_DAYS = 365.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check found. `remedy` is one line, empty when all is well."""

    status: Status
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `id` is stable: programs may rely on it."""

    id: str
    group: str
    title: str
    judge: Callable[[Facts], Verdict | None]


@dataclass(frozen=True, slots=True)
class Result:
    check: Check
    verdict: Verdict


CHECKS: list[Check] = []


def check(
    group: str, id: str, title: str
) -> Callable[[Callable[[Facts], Verdict | None]], Callable[[Facts], Verdict | None]]:
    """Enters a function into the table of checks."""

    def enter(judge: Callable[[Facts], Verdict | None]) -> Callable[[Facts], Verdict | None]:
        CHECKS.append(Check(id, group, title, judge))
        return judge

    return enter


def judge(facts: Facts, *, security: bool = False) -> list[Result]:
    """The verdicts of all checks that have something to say, in the order of the groups."""
    found = []
    for each in sorted(CHECKS, key=lambda check: GROUPS.index(check.group)):
        if each.group == "security" and not security:
            continue
        verdict = each.judge(facts)
        if verdict is not None:
            found.append(Result(each, verdict))
    return found


def ok(text: str) -> Verdict:
    return Verdict("ok", _line(text))


def warn(text: str, remedy: str) -> Verdict:
    return Verdict("warn", _line(text), _line(remedy))


def fail(text: str, remedy: str) -> Verdict:
    return Verdict("fail", _line(text), _line(remedy))


def _line(text: str) -> str:
    """One line: what libraries and files say may have many."""
    return " ".join(text.split())[:500]


def some(names: Iterable[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def span(seconds: float) -> str:
    """A time in the unit that people would use."""
    for size, unit in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


# --- machine -------------------------------------------------------------------------------------------------


@check("machine", "python", "Python")
def python(facts: Facts) -> Verdict | None:
    machine = facts.machine
    version = ".".join(map(str, machine.python))
    if machine.python < MIN_PYTHON or machine.bits != 64:
        return fail(
            f"Python {version}, {machine.bits} bit; shoal needs {MIN_PYTHON[0]}.{MIN_PYTHON[1]}, 64 bit.",
            "Install a newer Python and make the environment again: make clean; make PYTHON=python3.12 up",
        )
    if machine.system != "Linux":
        return warn(f"{machine.system} is not tried; shoal is developed on Linux.", "Run it on Linux.")
    return ok(f"{version}, {machine.bits} bit, {machine.system}")


@check("machine", "packages", "Packages")
def packages(facts: Facts) -> Verdict | None:
    wrong = [each for each in facts.machine.packages if not each.accepted]
    if wrong:
        shown = some(f"{each.name} {each.installed or 'missing'} (needed {each.needed})" for each in wrong)
        return fail(shown, "Install again in a fresh environment: make clean; make up")
    torch = next((each.installed for each in facts.machine.packages if each.name == "torch"), None)
    return ok(f"{len(facts.machine.packages)} as needed" + (f", torch {torch}" if torch else ""))


@check("machine", "memory", "Memory")
def memory(facts: Facts) -> Verdict | None:
    machine = facts.machine
    if machine.memory_available is None or machine.memory_total is None:
        return None
    limit = machine.memory_limit
    if limit is not None and limit < LEAST_MEMORY:
        return fail(
            f"The control group of this process allows {show_bytes(limit)}.",
            "Raise the limit of the container or service (MemoryMax, --memory).",
        )
    if machine.memory_available < LEAST_MEMORY:
        return warn(
            f"{show_bytes(machine.memory_available)} of {show_bytes(machine.memory_total)} are available.",
            "Close other programs, or let this machine host fewer blocks (--memory).",
        )
    return ok(f"{show_bytes(machine.memory_available)} of {show_bytes(machine.memory_total)} available")


@check("machine", "swap", "Swap")
def swap(facts: Facts) -> Verdict | None:
    machine = facts.machine
    if machine.swap_used is None or not machine.memory_total:
        return None
    if machine.swap_used > SWAP_SHARE * machine.memory_total:
        return warn(
            f"{show_bytes(machine.swap_used)} are swapped out; weights that are will make every step slow.",
            "Offer less memory (--memory), or stop what else runs here.",
        )
    return ok(f"{show_bytes(machine.swap_used)} in use")


@check("machine", "disk", "Room on the disk")
def disk(facts: Facts) -> Verdict | None:
    places = [(facts.machine.temp, facts.machine.temp_free)] if facts.machine.temp else []
    if facts.home is not None and facts.home.free is not None:
        places.append((facts.home.path, facts.home.free))
    known = [(path, free) for path, free in places if free is not None]
    if not known:
        return None
    path, free = min(known, key=lambda place: place[1])
    if free < LEAST_DISK:
        return fail(f"{show_bytes(free)} are free at {path}.", "Free some space there, or use another --swarm-dir.")
    if free < LITTLE_DISK:
        return warn(f"{show_bytes(free)} are free at {path}; logs grow.", "Free some space there.")
    return ok(f"{show_bytes(free)} free")


@check("machine", "temp", "Folder for temporary files")
def temp(facts: Facts) -> Verdict | None:
    if not facts.machine.temp:
        return None
    if facts.machine.temp_free is None:
        return fail(
            f"Nothing can be written to {facts.machine.temp}; TLS keys pass through there.",
            "Make it writable, or name another with TMPDIR.",
        )
    return ok(facts.machine.temp)


@check("machine", "open-files", "Open files")
def open_files(facts: Facts) -> Verdict | None:
    count = facts.machine.open_files
    if count is None:
        return None
    remedy = "Run `ulimit -n 65536` before shoal, or set LimitNOFILE= of its service."
    if count < LEAST_OPEN_FILES:
        return fail(f"{count} may be open at once; a gateway takes 1,024 connections.", remedy)
    if count < GOOD_OPEN_FILES:
        return warn(f"{count} may be open at once, which is little for many clients.", remedy)
    return ok(f"{count:,} may be open at once")


@check("machine", "cores", "Processor cores")
def cores(facts: Facts) -> Verdict | None:
    machine = facts.machine
    usable = min(machine.cores, machine.core_limit or machine.cores)
    if machine.threads_wanted is not None and machine.threads_wanted > usable:
        return warn(
            f"OMP_NUM_THREADS asks for {machine.threads_wanted} threads on {usable:g} cores: they wait for each other.",
            f"Unset OMP_NUM_THREADS, or set it to {max(1, int(usable))}.",
        )
    if machine.load is not None and machine.load > OVERCOMMITTED * usable:
        return warn(
            f"{machine.load:.1f} processes want {usable:g} cores.",
            "Stop what else runs here, or start fewer servers on this machine.",
        )
    return ok(f"{usable:g}" + (f", load {machine.load:.1f}" if machine.load is not None else ""))


@check("machine", "governor", "Processor speed")
def governor(facts: Facts) -> Verdict | None:
    if facts.machine.governor is None:
        return None
    if facts.machine.governor == "powersave":
        return warn("The processor saves power and answers late.", "Run `cpupower frequency-set -g performance`.")
    return ok(facts.machine.governor)


@check("machine", "huge-pages", "Huge pages")
def huge_pages(facts: Facts) -> Verdict | None:
    if facts.machine.huge_pages is None:
        return None
    if facts.machine.huge_pages == "never":
        return warn(
            "They are switched off; walking through the weights takes some per cent longer.",
            "Write madvise to /sys/kernel/mm/transparent_hugepage/enabled.",
        )
    return ok(facts.machine.huge_pages)


@check("machine", "clock", "Clock")
def clock(facts: Facts) -> Verdict | None:
    remedy = "Switch on time synchronisation: timedatectl set-ntp true"
    skew = facts.network.skew_s
    if skew is not None and abs(skew) > SKEW_S:
        ahead = "ahead of" if skew > 0 else "behind"
        text = f"This clock is {span(abs(skew))} {ahead} the gateway's; certificates are judged by it."
        return fail(text, remedy) if abs(skew) > FATAL_SKEW_S else warn(text, remedy)
    early = [each for each in _certificates(facts) if each.not_before > facts.now]
    if early:
        return fail(
            f"The certificate of {early[0].name} begins in {span(early[0].not_before - facts.now)}: "
            "this clock is behind the one it was made by.",
            remedy,
        )
    if facts.machine.clock_synchronised is False:
        return warn("Nothing keeps this clock right.", remedy)
    return ok("agrees with the gateway's" if skew is not None else "nothing speaks against it")


@check("machine", "proxies", "Proxies")
def proxies(facts: Facts) -> Verdict | None:
    machine = facts.machine
    if not machine.proxies:
        return ok("none set")
    spared = {name.strip() for name in machine.no_proxy.split(",")}
    if not spared & {"*", "localhost", "127.0.0.1"}:
        return warn(
            f"{some(machine.proxies)} holds for this machine too: curl and other clients ask the proxy for the API.",
            "Set NO_PROXY=localhost,127.0.0.1",
        )
    return ok(f"{some(machine.proxies)}, not for this machine")


# --- home ----------------------------------------------------------------------------------------------------


def _certificates(facts: Facts) -> list[Certificate]:
    return [] if facts.home is None else [each for each in facts.home.certificates if not each.error]


@check("home", "home", "Swarm directory")
def home(facts: Facts) -> Verdict | None:
    found = facts.home
    if found is None:
        return None
    if not found.exists:
        return ok(f"none at {found.path}: this machine is in no swarm yet (`shoal up`, `shoal init`, `shoal join`)")
    if not found.mine:
        return fail(f"{found.path} belongs to another user.", f"Run as that user, or: chown -R $USER {found.path}")
    if not found.writable:
        return fail(f"{found.path} cannot be written to.", f"chmod u+rwx {found.path}")
    return ok(found.path)


@check("home", "swarm-file", "swarm.json")
def swarm_file(facts: Facts) -> Verdict | None:
    found = facts.home
    if found is None or not found.exists or (not found.swarm and not found.swarm_error):
        return None
    if found.swarm_error:
        return fail(found.swarm_error, "Restore the file from a copy, or join the swarm again with a new invitation.")
    return ok(found.swarm)


@check("home", "permissions", "Private files")
def permissions(facts: Facts) -> Verdict | None:
    if facts.home is None or not facts.home.exists:
        return None
    files = list(facts.home.private)
    if facts.running is not None and facts.running.private is not None:
        files.append(facts.running.private)
    open_ = [each for each in files if each.mode & 0o077]
    if open_:
        return fail(
            f"Others may read {some(f'{each.path} ({each.mode:o})' for each in open_)}.",
            f"chmod go= {' '.join(each.path for each in open_[:3])}",
        )
    foreign = [each for each in files if not each.mine]
    if foreign:
        return fail(f"{some(each.path for each in foreign)} belongs to another user.", f"chown $USER {foreign[0].path}")
    return ok(f"{len(files)} readable by their owner only")


@check("home", "node-certificates", "Certificates of nodes")
def node_certificates(facts: Facts) -> Verdict | None:
    nodes = [each for each in _certificates(facts) if each.name not in ("root", "issuer")]
    if not nodes:
        return None
    expired = [each for each in nodes if each.not_after <= facts.now]
    if expired:
        return fail(
            f"Expired: {some(each.name for each in expired)}, {span(facts.now - expired[0].not_after)} ago.",
            "Join again with a new invitation: `shoal invite` on the admin's machine, `shoal join TOKEN` here.",
        )
    first = min(nodes, key=lambda each: each.not_after)
    left_s = first.not_after - facts.now
    if left_s < NODE_WARN_S:
        return warn(
            f"{first.name} is valid for {span(left_s)} more and was not renewed.",
            "See that the node runs and reaches the admin: renewal is its own doing.",
        )
    return ok(f"{len(nodes)}, valid for {span(left_s)} or more")


@check("home", "issuer", "Issuing authority")
def issuer(facts: Facts) -> Verdict | None:
    found = next((each for each in _certificates(facts) if each.name == "issuer"), None)
    if found is None:
        return None
    left_s = found.not_after - facts.now
    remedy = "Bring ca.key back into the ca folder and restart `shoal admin`, which signs it anew."
    if left_s <= 0:
        return fail(f"Expired {span(-left_s)} ago: nobody can join or renew.", remedy)
    if left_s < ISSUER_WARN_S:
        return warn(f"Valid for {span(left_s)} more.", remedy)
    return ok(f"valid for {span(left_s)}")


@check("home", "root", "Root authority")
def root(facts: Facts) -> Verdict | None:
    found = next((each for each in _certificates(facts) if each.name == "root"), None)
    if found is None:
        return None
    left_s = found.not_after - facts.now
    remedy = "Make a new swarm (`shoal init`) and let every machine join it: a root cannot be renewed."
    if left_s <= 0:
        return fail(f"Expired {span(-left_s)} ago: no certificate of this swarm is worth anything.", remedy)
    if left_s < ROOT_WARN_S:
        return warn(f"Valid for {span(left_s)} more.", remedy)
    return ok(f"valid for {span(left_s)}")


@check("home", "chains", "Keys and certificates belong together")
def chains(facts: Facts) -> Verdict | None:
    if facts.home is None or not facts.home.certificates:
        return None
    damaged = [each for each in facts.home.certificates if each.error]
    if damaged:
        return fail(
            f"Cannot read the certificate of {damaged[0].name}: {damaged[0].error}",
            f"Restore {damaged[0].path} from a copy, or join again with a new invitation.",
        )
    odd = [each for each in facts.home.certificates if each.key_fits is False]
    if odd:
        return fail(
            f"The key of {some(each.name for each in odd)} is not the one in its certificate.",
            f"Restore the folder of {odd[0].name} whole, or join again with a new invitation.",
        )
    foreign = [each for each in facts.home.certificates if each.from_root is False]
    if foreign:
        return fail(
            f"The certificate of {some(each.name for each in foreign)} is not of this swarm's authority.",
            "Two swarms got mixed in one directory: restore it, or join again in an empty one.",
        )
    return ok(f"{len(facts.home.certificates)} certificates")


@check("home", "databases", "Databases")
def databases(facts: Facts) -> Verdict | None:
    if facts.home is None or not facts.home.databases:
        return None
    broken = [(path, error) for path, error in facts.home.databases if error]
    if broken:
        return fail(f"{broken[0][0]}: {broken[0][1]}", "Stop shoal and restore the file from a copy.")
    return ok(f"{len(facts.home.databases)} sound")


@check("home", "audit", "Audit log")
def audit(facts: Facts) -> Verdict | None:
    if facts.home is None or facts.home.audit is None:
        return None
    if facts.home.audit.error:
        return fail(
            facts.home.audit.error,
            "Compare it with a copy kept elsewhere: somebody changed it, or the disk did (`shoal audit verify`).",
        )
    entries = facts.home.audit.entries
    return ok("long; `shoal audit verify` reads it" if entries is None else f"{entries:,} entries, unbroken")


@check("home", "running", "Running swarm")
def running(facts: Facts) -> Verdict | None:
    found = facts.running
    if found is None:
        return None
    if found.error:
        return fail(found.error, f"rm {found.path}")
    if found.stale:
        return warn(
            f"{some(found.stale, 1)} tells of a swarm whose process is gone: it ended without cleaning up.",
            f"rm {' '.join(found.stale[:3])}",
        )
    if not found.api:
        return ok("no swarm of this user runs here")
    if found.answers is False:
        return fail(
            f"The swarm's process runs, but its API at {found.api} does not answer.",
            "Look into the gateway's log; stop `shoal up` and start it again.",
        )
    return ok(f"the API at {found.api} answers" if found.answers else f"a swarm runs at {found.api}")


@check("home", "leftovers", "What ended swarms left behind")
def leftovers(facts: Facts) -> Verdict | None:
    if facts.running is None:
        return None
    left = [*facts.running.leftovers, *(facts.home.unfinished if facts.home is not None else ())]
    if left:
        return warn(f"{some(left, 2)} hold keys or halves of files.", f"rm -r {' '.join(left[:2])}")
    return ok("nothing")


# --- network -------------------------------------------------------------------------------------------------


@check("network", "ports", "Ports to listen on")
def ports(facts: Facts) -> Verdict | None:
    found = facts.network.ports
    if not found:
        return None
    away = [each for each in found if not each.here]
    if away:
        return fail(
            f"{away[0].address} is no address of this machine.",
            "Listen on an address of this machine, or on 0.0.0.0; tell others the outer one with --advertise.",
        )
    taken = [each for each in found if not each.free and not each.ours]
    if taken:
        by = f" by {taken[0].holder}" if taken[0].holder else ""
        return fail(f"{taken[0].address} is taken{by}.", "Stop that program, or listen on another port.")
    return ok(some(f"{each.address} {'free' if each.free else 'ours'}" for each in found))


@check("network", "names", "Names of the seeds")
def names(facts: Facts) -> Verdict | None:
    if not facts.network.seeds:
        return None
    lost = [each.address for each in facts.network.seeds if not each.resolves]
    if lost:
        return fail(
            f"No address is known for {some(lost)}.", "Correct the name in swarm.json, or add it to DNS or /etc/hosts."
        )
    return ok(f"{len(facts.network.seeds)} resolve")


@check("network", "seeds", "Way into the swarm")
def seeds(facts: Facts) -> Verdict | None:
    tried = [each for each in facts.network.seeds if each.resolves]
    if not tried:
        return None
    refused = [each for each in tried if each.connects and each.greets is False]
    if refused and not any(each.greets for each in tried):
        error = refused[0].error
        if "version" in error:
            remedy = "Install the same release of shoal on every machine of the swarm."
        elif "not yet valid" in error or "expired" in error:
            remedy = "See to the clock and the certificate (checks clock and node-certificates)."
        else:
            remedy = "Join with an invitation of this swarm; a revoked machine needs a new one."
        return fail(f"{refused[0].address} does not let us in: {error}", remedy)
    dead = [each for each in tried if not each.connects]
    if len(dead) == len(tried):
        return fail(
            f"No seed can be reached; {dead[0].address}: {dead[0].error}",
            "Start `shoal up`, `shoal gateway` or `shoal admin` there, and let its port through the firewall.",
        )
    if dead:
        return warn(f"{some(each.address for each in dead)} cannot be reached.", "Start it, or remove it as a seed.")
    return ok(f"{len(tried)} reached")


@check("network", "addresses", "Addresses that others are told")
def addresses(facts: Facts) -> Verdict | None:
    home = facts.home
    members = facts.swarm.members if facts.swarm is not None else ()
    hidden = [each for each in members if each.addresses and all(map(is_loopback, each.addresses))]
    shown = [each for each in members if each.addresses and not all(map(is_loopback, each.addresses))]
    if hidden and shown:
        return fail(
            f"Server {hidden[0].node[:8]} says it is at {hidden[0].addresses[0]}, which is everybody's own machine.",
            "Restart it with --listen tcp://0.0.0.0:PORT and --advertise tcp://ITS-NAME:PORT.",
        )
    if home is not None and home.seeds and not home.issuer_key and all(map(is_loopback, home.seeds)):
        return warn(
            f"The seed {home.seeds[0]} is this machine itself; from any other it leads nowhere.",
            "If the admin runs elsewhere: let it listen on its own address and join again.",
        )
    return ok("others can use them") if members or (home is not None and home.seeds) else None


def is_loopback(address: str) -> bool:
    """True for tcp://HOST:PORT that only this machine can reach."""
    host = address.partition("://")[2].rpartition(":")[0].strip("[]")
    return host == "localhost" or host.startswith("127.") or host == "::1"


# --- model ---------------------------------------------------------------------------------------------------

_AGAIN = "Copy or download the model again."


@check("model", "model", "Model directory")
def model(facts: Facts) -> Verdict | None:
    found = facts.model
    if found is None:
        return None
    if found.in_cache is False:
        if found.hub_offline:
            return fail(
                f"{found.path} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it.",
                "Unset HF_HUB_OFFLINE once, or copy the model here and name its directory.",
            )
        return warn(f"{found.path} will be fetched from the hub at the first start.", "Fetch it before, to start fast.")
    if not found.exists:
        return fail(f"There is no directory {found.path}.", "Name the directory that holds config.json, or a hub id.")
    if found.config_error:
        return fail(found.config_error, "A model directory holds config.json and *.safetensors. " + _AGAIN)
    if found.quantised:
        return fail("The weights are quantised; shoal reads fp32, fp16 and bf16.", "Take the unquantised checkpoint.")
    return ok(f"{found.model_type} in {found.path}")


@check("model", "weights", "Weights")
def weights(facts: Facts) -> Verdict | None:
    found = facts.model
    if found is None or not found.exists or found.in_cache is False:
        return None
    if not found.files:
        if found.pickles:
            return fail(
                f"They are pickle only ({found.pickles[0]}), which can run code when it is opened.",
                "Convert them where you trust the file: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
            )
        return fail("There are no safetensors files.", _AGAIN)
    broken = [each for each in found.files if each.error]
    if broken:
        return fail(f"{broken[0].name}: {broken[0].error}", _AGAIN)
    short = [each for each in found.files if each.expected is not None and each.size < each.expected]
    if short:
        missing = (short[0].expected or 0) - short[0].size
        return fail(f"{short[0].name} ends {show_bytes(missing)} too early.", _AGAIN)
    return ok(f"{len(found.files)} files, {show_bytes(found.bytes)}")


@check("model", "index", "Index of the weights")
def index(facts: Facts) -> Verdict | None:
    found = facts.model
    if found is None or not found.files:
        return None
    if found.index_error:
        return fail(found.index_error, _AGAIN)
    if found.index is None:
        if len(found.files) > 1 and all(each.name != "model.safetensors" for each in found.files):
            return fail(f"{len(found.files)} shards and no model.safetensors.index.json.", "Copy the index as well.")
        return None
    present = {each.name: each.tensors for each in found.files}
    lost = sorted({file for _, file in found.index if file not in present})
    if lost:
        return fail(f"The index names {some(lost)}, which is not there.", _AGAIN)
    wrong = [tensor for tensor, file in found.index if tensor not in present[file] and present[file]]
    if wrong:
        return fail(f"{some(wrong, 1)} is not in the file that the index names.", "Index and shards differ. " + _AGAIN)
    return ok(f"{len(found.index)} tensors in {len({file for _, file in found.index})} files")


@check("model", "tokenizer", "Tokenizer")
def tokenizer(facts: Facts) -> Verdict | None:
    found = facts.model
    if found is None or not found.exists or found.in_cache is False:
        return None
    if found.tokenizer_error:
        return fail(found.tokenizer_error, "Copy tokenizer.json and tokenizer_config.json again.")
    if not found.tokenizer:
        return fail(
            "None: the gateway could neither read nor write text.", "Copy tokenizer.json and tokenizer_config.json."
        )
    return ok(found.tokenizer)


@check("model", "model-memory", "Room for the model")
def model_memory(facts: Facts) -> Verdict | None:
    found, available = facts.model, facts.machine.memory_available
    if found is None or not found.bytes or available is None:
        return None
    limit = facts.machine.memory_limit
    room = min(available, limit) if limit is not None else available
    if found.bytes > room:
        return warn(
            f"The weights take {show_bytes(found.bytes)}, {show_bytes(room)} are available: not all fit here.",
            "Spread the blocks over more machines (`shoal join TOKEN --serve MODEL --blocks A:B`).",
        )
    return ok(f"{show_bytes(found.bytes)} of {show_bytes(room)}")


# --- swarm ---------------------------------------------------------------------------------------------------


def _online(facts: Facts) -> list[Member]:
    return [] if facts.swarm is None else [each for each in facts.swarm.members if each.state == "online"]


def _cover(facts: Facts) -> list[int] | None:
    """How many servers are online for each block; None when that cannot be known."""
    if facts.swarm is None or facts.swarm.error:
        return None
    blocks = facts.swarm.blocks or max((each.end for each in facts.swarm.members), default=0)
    if not blocks:
        return None
    cover = [0] * blocks
    for each in _online(facts):
        for block in range(each.start, min(each.end, blocks)):
            cover[block] += 1
    return cover


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] as "0:3, 5:6"."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return some(f"{start}:{end}" for start, end in found)


@check("swarm", "registry", "Registry")
def registry(facts: Facts) -> Verdict | None:
    if facts.swarm is None:
        return None
    if facts.swarm.error:
        return fail(facts.swarm.error, "See the checks seeds and running above.")
    return ok(f"{len(facts.swarm.members)} servers known")


@check("swarm", "blocks", "Every block is hosted")
def blocks(facts: Facts) -> Verdict | None:
    cover = _cover(facts)
    if cover is None:
        return None
    missing = [block for block, count in enumerate(cover) if not count]
    if missing:
        return fail(
            f"Blocks {_ranges(missing)} of {len(cover)} are hosted by nobody: every request is refused.",
            f"Start a server for them: `shoal join TOKEN --serve MODEL --blocks {_ranges(missing).split(',')[0]}`",
        )
    return ok(f"{len(cover)} of {len(cover)}")


@check("swarm", "replicas", "A second server for every block")
def replicas(facts: Facts) -> Verdict | None:
    cover = _cover(facts)
    if cover is None or not all(cover):
        return None
    single = [block for block, count in enumerate(cover) if count == 1]
    if single:
        return warn(
            f"Blocks {_ranges(single)} are hosted by one server each: when it dies, answers break off.",
            "Start a second one: `shoal up --replicas 2`, or `shoal join TOKEN --serve MODEL` on another machine.",
        )
    return ok(f"{min(cover)} or more")


@check("swarm", "same-model", "One model everywhere")
def same_model(facts: Facts) -> Verdict | None:
    if facts.swarm is None or facts.swarm.error:
        return None
    hosted = Counter(each.model for each in _online(facts) if each.model)
    ours = facts.model.fingerprint if facts.model is not None else ""
    if ours and hosted and ours not in hosted:
        return fail(
            f"This machine has {ours}, the swarm serves {some(hosted)}: the same name is not the same weights.",
            "Copy the model from a machine of the swarm.",
        )
    alike = Counter(name.partition("@")[0] for name in hosted)
    if any(count > 1 for count in alike.values()):
        return fail(
            f"Servers host different weights under one name: {some(sorted(hosted))}.",
            "Copy the model from one machine to all others.",
        )
    return ok(some(sorted(hosted))) if hosted else None


@check("swarm", "precision", "One precision everywhere")
def precision(facts: Facts) -> Verdict | None:
    kinds = Counter((each.dtype, each.weights) for each in _online(facts) if each.dtype)
    if len(kinds) > 1:
        shown = some(
            f"{count} in {dtype}" + ("" if weights == "native" else f" ({weights})")
            for (dtype, weights), count in kinds.most_common()
        )
        return warn(
            f"Servers compute differently: {shown}. After a loss the text may change.",
            "Start all servers with the same --dtype.",
        )
    return ok(next(iter(kinds))[0]) if kinds else None


@check("swarm", "states", "Servers that do not come up or leave")
def states(facts: Facts) -> Verdict | None:
    if facts.swarm is None or not facts.swarm.members:
        return None
    other = [each for each in facts.swarm.members if each.state not in ("online", "gone")]
    if other:
        return warn(
            some(f"{each.node[:8]} is {each.state}" for each in other),
            "Loading takes minutes on slow disks; look into its log when it lasts.",
        )
    return ok(f"{len(_online(facts))} online")


@check("swarm", "cache", "Room for sessions")
def cache(facts: Facts) -> Verdict | None:
    offered = [each for each in _online(facts) if each.cache_total]
    if not offered:
        return None
    full = [each for each in offered if each.cache_free < FULL_CACHE * each.cache_total]
    if full:
        return warn(
            f"{some(each.node[:8] for each in full)} has no room left: long requests get 429.",
            "Offer more memory there (--memory), or add a server for the same blocks.",
        )
    return ok(f"{min(each.cache_free / each.cache_total for each in offered):.0%} free or more")


# --- security ------------------------------------------------------------------------------------------------


@check("security", "root-key", "The root's key is elsewhere")
def root_key(facts: Facts) -> Verdict | None:
    if facts.home is None or not facts.home.exists or not (facts.home.root_key or facts.home.issuer_key):
        return None
    if facts.home.root_key:
        return warn(
            "ca.key lies on this machine: whoever takes it is the swarm for ten years.",
            f"Move {facts.home.path}/ca/ca.key to a medium in a safe; joins and renewals go on without it.",
        )
    return ok("ca.key is not on this machine")


@check("security", "doors", "What the network can reach")
def doors(facts: Facts) -> Verdict | None:
    bare = [each for each in facts.network.doors if not each.encrypted]
    if bare:
        return fail(
            f"The API at {bare[0].address} can be reached from other machines without TLS: keys and text are readable.",
            "Give it a certificate (`shoal gateway --help`), or listen on 127.0.0.1 behind a TLS proxy.",
        )
    free = [each for each in facts.network.doors if not each.asks_for_key]
    if free:
        return fail(
            f"The API at {free[0].address} answers other machines without a key.",
            "Let nothing between clients and the gateway add a key by itself.",
        )
    return ok("nothing" if not facts.network.doors else some(each.address for each in facts.network.doors))


@check("security", "api-keys", "API keys")
def api_keys(facts: Facts) -> Verdict | None:
    if facts.home is None or facts.home.keys is None:
        return None
    keys = facts.home.keys
    endless = [each for each in keys if not each.limited]
    if endless:
        return warn(
            f"{some(each.name for each in endless)} has no quota: one holder can take the whole swarm.",
            "Make a new key with a quota (`shoal keys create --help`), revoke this one.",
        )
    old = [each for each in keys if each.days_old > KEY_DAYS]
    if old:
        return warn(
            f"{some(each.name for each in old)} is more than a year old.",
            "Make a new key, hand it out, revoke this one.",
        )
    return ok(f"{len(keys)}, each with a quota")


@check("security", "audit-kept", "The audit log is kept")
def audit_kept(facts: Facts) -> Verdict | None:
    if facts.home is None or facts.home.keys is None:
        return None
    if facts.home.audit is None and facts.home.requests:
        return fail(
            f"{facts.home.requests:,} requests were counted, and there is no log: it was removed.",
            "Put it back from a copy; other members remember its last entry (`shoal audit verify --swarm`).",
        )
    return ok("there is one" if facts.home.audit is not None else "the first request will begin it")


@check("security", "invites", "Open invitations")
def invites(facts: Facts) -> Verdict | None:
    if facts.home is None or not facts.home.issuer_key:
        return None
    if facts.home.open_invites > 5:
        return warn(
            f"{facts.home.open_invites} invitations wait to be used; whoever finds one is in.",
            "They end after 15 minutes by themselves: make one when it is needed, not before.",
        )
    return ok(f"{facts.home.open_invites}")


@check("security", "revoked", "Revoked machines")
def revoked(facts: Facts) -> Verdict | None:
    if facts.home is None or facts.home.revoked_valid is None:
        return None
    running_admin = any(each.greets for each in facts.network.seeds) if facts.network.seeds else None
    if facts.home.revoked_valid and running_admin is False:
        return fail(
            f"{facts.home.revoked_valid} revoked machines have valid certificates, and no node can be told.",
            "Start `shoal admin`, which tells all others.",
        )
    return ok(f"{facts.home.revoked_valid} with a certificate that is still valid")


@check("security", "user", "Runs as an ordinary user")
def user(facts: Facts) -> Verdict | None:
    if facts.machine.is_root:
        return warn("This is root; shoal needs no rights of the administrator.", "Make a user for it: useradd shoal")
    return ok("not root")


@check("security", "core-dumps", "No copies of memory")
def core_dumps(facts: Facts) -> Verdict | None:
    if facts.machine.core_dumps:
        return warn("A crash would write memory, with keys and text, to the disk.", "Run `ulimit -c 0` before shoal.")
    return ok("crashes write none")
