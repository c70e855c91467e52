"""Real faults, planted one at a time in a healthy home, model and swarm: each is named by its check, with a remedy."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import http.server
import json
import os
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.sources import PACKAGE, REPOSITORY

from shoal.compute.fingerprint import model_name
from shoal.doctor.checks import CHECKS, Result, judge
from shoal.doctor.facts import Facts, Machine
from shoal.doctor.look import look
from shoal.gateway.accounts import Accounts
from shoal.manifest import chain
from shoal.net import identity as identities
from shoal.net.home import Home
from shoal.net.identity import create_ca, create_issuer, issue_node
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport
from shoal.wire import codec
from shoal.wire.frames import FrameWriter
from shoal.wire.messages import Fault

DEMO = PACKAGE / "assets" / "demo"
HOUR = datetime.timedelta(hours=1)


class Background:
    """A loop in a thread, on which a registry seed of the healthy swarm listens."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="seed")
        self._thread.start()
        self._listeners: list[Any] = []
        self._servers: list[asyncio.Server] = []

    def seed(self, home: Home) -> str:
        """The address of a seed that shows the admin's certificate of `home`."""

        async def start() -> Any:
            admin = home.node("admin")
            transport = TlsTransport(admin)
            return await transport.listen("tcp://127.0.0.1:0", Seed(admin).on_conn)

        listener = asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)
        self._listeners.append(listener)
        return str(listener.address)

    def other_version(self, home: Home) -> str:
        """The address of a member of the same swarm whose release is another one."""
        writer = FrameWriter()
        writer.push(*codec.encode(Fault("refused", "The peer speaks protocol version 2, this side speaks version 9.")))
        said = b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))

        async def greet(reader: asyncio.StreamReader, stream: asyncio.StreamWriter) -> None:
            await reader.read(1)
            stream.write(said)
            await stream.drain()
            stream.close()

        async def start() -> asyncio.Server:
            context = home.node("admin").server_context()
            return await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)

        server = asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)
        self._servers.append(server)
        return f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        for server in self._servers:
            self._loop.call_soon_threadsafe(server.close)
        for listener in self._listeners:
            asyncio.run_coroutine_threadsafe(listener.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def server(name: str, blocks: str, **more: Any) -> dict[str, Any]:
    """One server of a status page."""
    page = {"id": name * 8, "state": "online", "blocks": blocks, "dtype": "float32", "weights": "native"}
    page |= {"addresses": [f"tcp://10.0.0.{len(name)}:7000"], "cache_tokens_free": 900, "cache_tokens_total": 1000}
    return page | more


@dataclass
class World:
    """A machine in good health, and everything that can be broken about it."""

    folder: Path
    home: Home
    model: Path
    listen: list[str] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    date_shift_s: float = 0.0
    api: str = ""
    background: Background | None = None
    taken: list[socket.socket] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def tell(self, **changes: Any) -> None:
        """Write running.json."""
        entry = {"api": self.api, "key": "sk", "swarm_dir": str(self.home.path), "pid": os.getpid()} | changes
        file = self.state / f"running.{entry['pid']}.json"
        file.write_text(json.dumps(entry))
        file.chmod(0o600)

    def seeds(self, *addresses: str) -> None:
        self.home.write(type(self.home.read())(self.home.read().swarm, list(addresses)))

    def examine(self, *, security: bool = False) -> dict[str, Result]:
        facts = look(self.home.path, self.state, model=str(self.model), listen=self.listen, security=security)
        facts = healthy_machine(facts)
        return {result.check.id: result for result in judge(facts, security=security)}


def healthy_machine(facts: Facts) -> Facts:
    """The facts with what this test machine may really lack (rest, memory) set right; what a fault plants stays."""
    real = facts.machine
    kept = {name: getattr(real, name) for name in ("open_files", "proxies", "no_proxy", "threads_wanted", "packages")}
    machine = Machine(cores=4, memory_total=1 << 35, memory_available=1 << 34, load=0.5, **kept)
    return type(facts)(facts.now, machine, facts.home, facts.running, facts.network, facts.model, facts.swarm)


@contextmanager
def gateway(world: World) -> Iterator[None]:
    """Answers the status page of `world`, with its clock."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(world.status).encode()
            self.send_response_only(200)
            self.send_header("content-type", "application/json")
            self.send_header("date", email.utils.formatdate(time.time() + world.date_shift_s, usegmt=True))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        world.api = f"http://127.0.0.1:{httpd.server_port}/v1"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        httpd.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.stop()


@pytest.fixture
def world(tmp_path: Path, background: Background, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in (*("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), *("http_proxy", "https_proxy", "all_proxy")):
        monkeypatch.delenv(name, raising=False)
    for name in ("SHOAL_API", "SHOAL_KEY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    home = Home.create(tmp_path / "home", "bank")
    home.save_node("server-0", issue_node(home.issuer(), "server"))
    model = tmp_path / "demo"
    shutil.copytree(DEMO, model)
    world = World(tmp_path, home, model, background=background)
    world.seeds(background.seed(home))
    world.state.mkdir()
    name = model_name(model)
    world.status = {
        "swarm_model": name,
        "blocks": 8,
        "servers": [server(each, blocks) for each, blocks in zip("abcd", ["0:4", "0:4", "4:8", "4:8"], strict=True)],
    }
    with gateway(world):
        world.tell()
        yield world
    for each in world.taken:
        each.close()
    for process in world.processes:
        process.kill()
        process.communicate()


def test_a_healthy_machine_hears_no_alarm(world: World) -> None:
    results = world.examine()
    assert {id: result.verdict for id, result in results.items() if result.verdict.status != "ok"} == {}
    assert len(results) >= 30


def test_an_audit_log_that_is_whole_is_no_alarm(world: World) -> None:
    write_log(world)
    verdict = world.examine()["audit"].verdict
    assert (verdict.status, verdict.text[:2]) == ("ok", "21"), verdict  # and the one with the certificates


def test_looking_changes_nothing_and_takes_little_time(world: World) -> None:
    Accounts(world.home.accounts_db).close()

    def everything() -> dict[str, tuple[int, float, bytes]]:
        return {
            str(path): (path.stat().st_mode, path.stat().st_mtime, path.read_bytes() if path.is_file() else b"")
            for path in sorted(world.folder.rglob("*"))
        }

    before = everything()
    start = time.monotonic()
    world.examine(security=True)
    assert time.monotonic() - start < 5.0
    assert everything() == before


Plant = Callable[[World], None]
FAULTS: dict[str, tuple[str, str, Plant]] = {}


def fault(id: str, status: str = "fail") -> Callable[[Plant], Plant]:
    """Enters a fault: the check that must name it, and how badly."""

    def enter(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (id, status, plant)
        return plant

    return enter


@fault("permissions")
def a_key_that_others_may_read(world: World) -> None:
    (world.home.node_dir("server-0") / "node.key").chmod(0o644)


@fault("permissions")
def a_home_that_others_may_enter(world: World) -> None:
    world.home.path.chmod(0o755)


@fault("permissions")
def a_running_json_that_others_may_read(world: World) -> None:
    (world.state / f"running.{os.getpid()}.json").chmod(0o644)


@fault("node-certificates")
def an_expired_certificate(world: World) -> None:
    world.home.save_node("server-0", issue_node(world.home.issuer(), "server", lifetime=-HOUR))


@fault("node-certificates", "warn")
def a_certificate_that_nobody_renewed(world: World) -> None:
    world.home.save_node("server-0", issue_node(world.home.issuer(), "server", lifetime=24 * HOUR))


@fault("issuer", "warn")
def an_issuer_that_ends_soon(world: World) -> None:
    root = identities.Authority.load(world.home.ca_dir)
    create_issuer(root, key_pem=world.home.issuer().key_pem, lifetime=240 * HOUR).save(world.home.ca_dir)


@fault("root")
def a_root_that_has_ended(world: World) -> None:
    lifetime, identities.AUTHORITY_LIFETIME = identities.AUTHORITY_LIFETIME, -HOUR
    try:
        create_ca("bank").save(world.home.ca_dir)
    finally:
        identities.AUTHORITY_LIFETIME = lifetime


@fault("chains")
def the_key_of_another_node(world: World) -> None:
    shutil.copy(world.home.node_dir("admin") / "node.key", world.home.node_dir("server-0") / "node.key")


@fault("chains")
def a_node_of_another_swarm(world: World) -> None:
    other = Home.create(world.folder / "other", "bank")
    world.home.save_node("server-0", issue_node(other.issuer(), "server"))
    shutil.rmtree(world.home.node_dir("admin"))


@fault("chains")
def half_a_certificate(world: World) -> None:
    file = world.home.node_dir("server-0") / "node.pem"
    file.write_bytes(file.read_bytes()[:200])


@fault("swarm-file")
def a_damaged_swarm_json(world: World) -> None:
    (world.home.path / "swarm.json").write_text('{"swarm": ')


@fault("databases")
def a_damaged_database(world: World) -> None:
    accounts = Accounts(world.home.accounts_db)
    for number in range(300):
        accounts.create(f"key {number}")
    accounts.close()
    data = bytearray(world.home.accounts_db.read_bytes())
    data[4096 : 4096 * 3] = b"\xa5" * 8192
    world.home.accounts_db.write_bytes(data)


@fault("running", "warn")
def a_running_json_of_a_dead_swarm(world: World) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    world.tell(pid=ended.pid)


@fault("running")
def an_api_that_is_silent(world: World) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        world.tell(api=f"http://127.0.0.1:{unused.getsockname()[1]}/v1")


@fault("running")
def a_damaged_running_json(world: World) -> None:
    (world.state / f"running.{os.getpid()}.json").write_text("{}")


@fault("leftovers", "warn")
def keys_of_a_killed_swarm(world: World) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (world.state / f"swarm-{ended.pid}-x1" / "ca").mkdir(parents=True)


@fault("ports")
def a_port_that_is_taken(world: World) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    world.listen = [f"127.0.0.1:{taken.getsockname()[1]}"]
    world.taken.append(taken)


@fault("seeds")
def a_seed_that_is_down(world: World) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        world.seeds(f"tcp://127.0.0.1:{unused.getsockname()[1]}")


@fault("seeds")
def a_seed_of_another_swarm(world: World) -> None:
    assert world.background is not None
    world.seeds(world.background.seed(Home.create(world.folder / "other", "bank")))


@fault("names")
def a_seed_whose_name_nobody_knows(world: World) -> None:
    world.seeds("tcp://no..such..name:7000")


@fault("clock")
def a_clock_that_is_ten_minutes_ahead(world: World) -> None:
    world.date_shift_s = -600.0


@fault("weights")
def a_weight_file_that_ends_too_early(world: World) -> None:
    with (world.model / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)


@fault("weights")
def weights_as_pickle_only(world: World) -> None:
    (world.model / "model.safetensors").rename(world.model / "pytorch_model.bin")


@fault("index")
def a_shard_that_is_missing(world: World) -> None:
    (world.model / "model.safetensors").rename(world.model / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (world.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@fault("index")
def an_index_of_another_model(world: World) -> None:
    (world.model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.layers.99.weight": "model.safetensors"}})
    )


@fault("tokenizer")
def a_tokenizer_that_is_missing(world: World) -> None:
    (world.model / "tokenizer.json").unlink()


@fault("model")
def a_damaged_config(world: World) -> None:
    (world.model / "config.json").write_text('{"model_type": "lla')


@fault("model")
def a_model_that_is_not_in_the_cache_offline(world: World) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    world.model = Path("nobody/no-such-model")


@fault("blocks")
def blocks_that_nobody_hosts(world: World) -> None:
    world.status["servers"] = world.status["servers"][:2]


@fault("replicas", "warn")
def blocks_that_only_one_server_hosts(world: World) -> None:
    world.status["servers"].pop()


@fault("same-model")
def other_weights_than_the_swarm_s(world: World) -> None:
    config = json.loads((world.model / "config.json").read_text())
    (world.model / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))


@fault("precision", "warn")
def servers_of_two_precisions(world: World) -> None:
    world.status["servers"][0]["dtype"] = "bfloat16"


@fault("states", "warn")
def a_server_that_is_still_loading(world: World) -> None:
    world.status["servers"].append(server("e", "0:0", state="loading"))


@fault("cache", "warn")
def a_server_without_room(world: World) -> None:
    world.status["servers"][0]["cache_tokens_free"] = 1


@fault("addresses")
def a_server_that_names_a_loopback_address(world: World) -> None:
    world.status["servers"][0]["addresses"] = ["tcp://127.0.0.1:7000"]


@fault("open-files")
def too_few_open_files(world: World) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@fault("proxies", "warn")
def a_proxy_that_holds_for_this_machine_too(world: World) -> None:
    os.environ["HTTP_PROXY"] = "http://proxy.example:3128"


@fault("cores", "warn")
def more_threads_than_cores(world: World) -> None:
    os.environ["OMP_NUM_THREADS"] = "64"


@fault("packages")
def a_package_of_another_version(world: World) -> None:
    fake = world.folder / "site" / "torch-1.0.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    sys.path.insert(0, str(fake.parent))


@fault("root-key", "warn")
def the_root_s_key_on_the_admin_s_machine(world: World) -> None:
    assert world.home.has_root_key


def write_log(world: World) -> Path:
    """An audit log of twenty entries."""
    admin = world.home.node("admin")
    log = chain.AuditLog(world.home.path, admin.sign, admin.peer.node, admin.chain_der)
    for number in range(20):
        log.append("test", number=number)
    return world.home.path / "audit.jsonl"


@fault("audit")
def an_audit_log_with_a_changed_line(world: World) -> None:
    file = write_log(world)
    file.write_bytes(file.read_bytes().replace(b'"number":7', b'"number":8'))


@fault("audit")
def an_audit_log_that_was_cut_off(world: World) -> None:
    file = write_log(world)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-3]))


@fault("api-keys", "warn")
def a_key_without_a_quota(world: World) -> None:
    accounts = Accounts(world.home.accounts_db)
    accounts.create("everybody")
    accounts.close()


@fault("audit-kept")
def an_audit_log_that_was_removed(world: World) -> None:
    accounts = Accounts(world.home.accounts_db)
    _, account = accounts.create("everybody", tokens_per_day=1000)
    accounts.close()
    with closing(sqlite3.connect(world.home.accounts_db)) as database:
        database.execute(
            "INSERT INTO usage (key, day, requests, prompt_tokens, completion_tokens) VALUES (?, 1, 7, 1, 1)",
            (account.id,),
        )
        database.commit()


OPEN_GATEWAY = """
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = socketserver.TCPServer(("0.0.0.0", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@fault("doors")
def an_api_in_the_clear_on_every_interface(world: World) -> None:
    # In a process of its own, which calls itself what it stands for: the tests' own may not listen out there.
    gateway = subprocess.Popen([sys.executable, "-c", OPEN_GATEWAY, "shoal", "gateway"], stdout=subprocess.PIPE)
    assert gateway.stdout is not None
    gateway.stdout.readline()
    world.processes.append(gateway)


@fault("seeds")
def a_seed_that_speaks_another_version(world: World) -> None:
    assert world.background is not None
    address = world.background.other_version(world.home)
    world.seeds(address)


SECURITY = {"root-key", "api-keys", "audit-kept", "doors"}


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts back what a fault may change of this process."""
    environment, path = dict(os.environ), list(sys.path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_its_remedy(world: World, restored: None, name: str) -> None:
    id, status, plant = FAULTS[name]
    plant(world)

    results = world.examine(security=id in SECURITY)

    verdict = results[id].verdict
    assert verdict.status == status, results[id]
    assert verdict.remedy
    assert "\n" not in verdict.text + verdict.remedy


def test_the_command_prints_each_check_with_its_remedy_and_exits_with_3_when_one_fails(world: World) -> None:
    command = [sys.executable, "-m", "shoal", "doctor", "--swarm-dir", str(world.home.path)]
    environment = os.environ | {"XDG_STATE_HOME": str(world.folder / "nowhere")}

    fine = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    # An address of another machine; a process of its own, because the tests' own may not even try to take it.
    away = subprocess.run(
        [*command, "--listen", "203.0.113.7:7000"], env=environment, capture_output=True, text=True, check=False
    )

    page = json.loads(fine.stdout)
    assert (fine.returncode, page["fail"]) == (0, 0)
    assert {"id", "group", "status", "text", "remedy"} == set(page["checks"][0])
    assert away.returncode == 3
    assert "fail  Ports to listen on" in away.stdout
    assert "-> Listen on an address of this machine" in away.stdout
    assert not (world.folder / "nowhere").exists()


def test_the_page_about_the_doctor_lists_its_checks() -> None:
    page = (REPOSITORY / "docs" / "reference" / "doctor.md").read_text()
    listed = re.findall(r"^\| (\w+) \| `([\w-]+)` \| (.+) \|$", page, re.MULTILINE)
    assert sorted(listed) == sorted((check.group, check.id, check.title) for check in CHECKS)


def test_at_least_twenty_faults_are_planted_and_most_checks_have_one() -> None:
    assert len(FAULTS) >= 20
    assert len(CHECKS) >= 20
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    assert len({id for id, _, _ in FAULTS.values()}) >= 20
