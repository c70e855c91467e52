"""What the admin types: init, invite, revoke and the list of members; each says what happened and what to do next."""

from __future__ import annotations

import json
import stat
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.admin.store import AdminStore
from shoal.cli.main import run
from shoal.net.home import Home
from shoal.net.identity import issue_node
from shoal.wire.enrolment import Token

SWARM_DIR = "--swarm-dir"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command finds anything of the person who runs the tests."""
    for name, folder in (("XDG_STATE_HOME", "state"), ("XDG_DATA_HOME", "data")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("SHOAL_SWARM_DIR", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A swarm whose admin ran once, and is away now."""
    home = Home.create(tmp_path / "swarm", "bank")
    home.write(msgspec.structs.replace(home.read(), join="tcp://127.0.0.1:1"))
    return home


def answer(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert run([*args, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out)


def said(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert run(list(args)) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_init_makes_a_swarm_in_the_users_directory_and_says_where_the_keys_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "init", "--name", "bank")
    assert told["swarm_dir"] == str(tmp_path / "data" / "shoal" / "swarm")
    assert told["swarm"].startswith("bank-")
    assert Path(told["root_key"]).is_file()
    assert len(bytes.fromhex(told["root_sha256"])) == 32
    assert Home(Path(told["swarm_dir"])).node("admin").peer.node == told["admin"]


def test_init_tells_a_person_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "init", "--name", "bank", SWARM_DIR, str(tmp_path / "here"))
    assert str(tmp_path / "here" / "ca" / "ca.key") in out
    assert "`shoal admin`" in out
    assert "`shoal invite`" in out


@pytest.mark.parametrize("again", [["--name", "bank"], ["--name", "other"]])
def test_init_never_overwrites_a_swarm(again: list[str], home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}
    told = answer(capsys, "init", *again, SWARM_DIR, str(home.path), code=2)
    assert "holds a swarm already" in told["error"]["message"]
    assert before == {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}


def test_invite_prints_the_token_alone_on_stdout(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "invite", "--role", "server", "--label", "trusted", SWARM_DIR, str(home.path))
    token = Token.parse(out)
    assert out == f"{token}\n"
    assert token.address == "tcp://127.0.0.1:1"
    assert "Good once, for a server with trusted, until" in err
    assert "Nobody listens at tcp://127.0.0.1:1 now: start `shoal admin`" in err
    assert "lets others in" in err


def test_invite_says_to_programs_what_the_token_is_good_for(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    told = answer(
        capsys,
        *("invite", "--role", "gateway", "--label", "b", "--label", "a", "--minutes", "3"),
        *(SWARM_DIR, str(home.path)),
    )
    assert told["role"] == "gateway"
    assert told["labels"] == ["a", "b"]
    assert not told["admin_answers"]
    assert abs(told["expires"] - began - 180) < 5
    assert Token.parse(told["token"]).root_sha256.hex() == told["root_sha256"]


def test_no_token_makes_an_admin(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "invite", "--role", "admin", SWARM_DIR, str(home.path), code=2)["error"]["code"] == "usage"


@pytest.mark.parametrize(
    ("prepare", "message", "hint"),
    [
        (lambda home: (home.ca_dir / "issuer.key").unlink(), "not the directory of this swarm's admin", "shoal init"),
        (lambda home: home.write(msgspec.structs.replace(home.read(), join="")), "has not run", "shoal admin"),
        (lambda home: (home.path / "swarm.json").unlink(), "holds no swarm", "--swarm-dir"),
        (lambda home: (home.ca_dir / "issuer.key").chmod(0o644), "can be read by others", "chmod 600"),
    ],
    ids=["member", "before the first run", "no swarm", "open key"],
)
def test_what_keeps_an_invite_from_being_made_is_named(
    prepare: Any, message: str, hint: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(home)
    told = answer(capsys, "invite", "--role", "server", SWARM_DIR, str(home.path), code=2)
    assert message in told["error"]["message"]
    assert hint in told["error"]["hint"]


def test_a_label_that_is_none_makes_no_token(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "invite", "--role", "server", "--label", "Not One", SWARM_DIR, str(home.path), code=2)
    assert "is no label" in told["error"]["message"]
    assert not home.admin_db.exists() or not _invites(home)


def _invites(home: Home) -> int:
    with closing(AdminStore(home.admin_db)) as store:
        return len(store._write("SELECT * FROM invites", ()))


def admitted(home: Home, role: str = "server") -> str:
    """The id of a node that was admitted."""
    node = issue_node(home.issuer(), role, labels=["trusted"])  # type: ignore[arg-type]
    with closing(AdminStore(home.admin_db)) as store:
        store.certified(node.peer, node.valid_until.timestamp(), now=time.time())
    return node.peer.node


def test_revoke_takes_the_beginning_of_an_id_and_says_who_went(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    node, other = admitted(home), admitted(home, "gateway")
    told = answer(capsys, "revoke", node[:10], "--reason", "stolen", SWARM_DIR, str(home.path))
    assert told == {"node": node, "role": "server", "labels": ["trusted"], "already": False, "admin_answers": False}
    out, err = said(capsys, "revoke", node, SWARM_DIR, str(home.path))
    assert out == f"server {node} was removed before.\n"
    assert "as soon as `shoal admin` does" in err
    members = answer(capsys, "admin", "--members", SWARM_DIR, str(home.path))["members"]
    assert {member["node"]: member["removed"] for member in members} == {node: True, other: False}
    out, _ = said(capsys, "admin", "--members", SWARM_DIR, str(home.path))
    assert node in out
    assert "removed" in out


@pytest.mark.parametrize("text", ["", "abc", "zzzz", "g" * 32, "0" * 33, "%", "' OR 1=1 --", "\N{SNOWMAN}"])
def test_revoke_of_nobody_is_a_usage_error(text: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    admitted(home)
    told = answer(capsys, "revoke", text, SWARM_DIR, str(home.path), code=2)
    assert "was admitted here" in told["error"]["message"]
    assert "shoal admin --members" in told["error"]["hint"]


def test_revoke_of_several_asks_for_more_of_the_id(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(AdminStore(home.admin_db)) as store:
        for tail in "01":
            peer = issue_node(home.issuer(), "server").peer
            store.certified(
                type(peer)(type(peer.node)("abcd" + tail * 28), "server", peer.swarm), time.time() + 60, now=time.time()
            )
    told = answer(capsys, "revoke", "abcd", SWARM_DIR, str(home.path), code=2)
    assert "2 nodes begin with abcd" in told["error"]["message"]
    answer(capsys, "revoke", "abcd1", SWARM_DIR, str(home.path))


def test_the_admin_cannot_throw_itself_out(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    admin = home.node("admin").peer.node
    told = answer(capsys, "revoke", admin[:8], SWARM_DIR, str(home.path), code=2)
    assert "this swarm's admin" in told["error"]["message"]


def test_every_invite_and_removal_is_in_the_audit_log_and_no_secret_is(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    node = admitted(home)
    token = answer(capsys, "invite", "--role", "server", SWARM_DIR, str(home.path))["token"]
    answer(capsys, "revoke", node, "--reason", "stolen", SWARM_DIR, str(home.path))
    log = home.audit_log.read_text()
    entries = [json.loads(line) for line in log.splitlines()]
    assert [entry["kind"] for entry in entries if entry["kind"].startswith("member.")] == [
        "member.invite",
        "member.revoke",
    ]
    assert token not in log
    assert Token.parse(token).secret.hex() not in log


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "tcp://0.0.0.0:7700"])
def test_an_admin_that_listens_everywhere_must_say_how_others_reach_it(
    listen: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "admin", "--listen", listen, SWARM_DIR, str(home.path), code=2)
    assert "--advertise" in told["error"]["hint"]


def test_files_of_the_admin_are_the_owners_alone(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "invite", "--role", "server", SWARM_DIR, str(home.path))
    for path in home.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    home.admin_db.chmod(0o644)
    told = answer(capsys, "invite", "--role", "server", SWARM_DIR, str(home.path), code=2)
    assert "Others may read" in told["error"]["message"]
