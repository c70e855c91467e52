"""The swarm directory: what `shoal init` leaves, what can be taken away, and what is refused."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import msgspec
import pytest

from shoal.errors import UsageError
from shoal.net.home import Home, home_path
from shoal.net.identity import Authority, Trust, create_issuer, issue_node


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def test_a_new_swarm_has_a_root_an_issuer_and_an_admin_and_only_its_owner_reads_them(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "swarm", "bank")
    assert home.exists
    assert home.is_admin
    assert home.has_root_key
    assert home.read().swarm.startswith("bank-")
    admin = home.node("admin")
    assert admin.peer.role == "admin"
    Trust(home.root_pem).credential(admin.chain_der, now())
    for path in (tmp_path / "swarm").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_directory_that_holds_a_swarm_is_not_overwritten(tmp_path: Path) -> None:
    home = Home.create(tmp_path, "bank")
    key = (home.ca_dir / "ca.key").read_bytes()
    with pytest.raises(UsageError, match="holds a swarm already"):
        Home.create(tmp_path, "bank")
    (tmp_path / "swarm.json").unlink()
    with pytest.raises(UsageError, match="holds a swarm already"):
        Home.create(tmp_path, "bank")
    assert (home.ca_dir / "ca.key").read_bytes() == key


def test_a_name_that_cannot_be_a_swarm_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Home.create(tmp_path / "swarm", "No Name")
    assert not (tmp_path / "swarm").exists()


def test_nodes_are_certified_while_the_roots_key_is_away(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "swarm", "bank")
    (home.ca_dir / "ca.key").rename(tmp_path / "safe")
    assert not home.has_root_key
    node = issue_node(home.issuer(), "server")
    Trust(home.root_pem).credential(node.chain_der, now())
    assert not home.renew_issuer(now() + datetime.timedelta(days=89)), "nothing can be done without the key"


def test_the_issuer_is_signed_anew_in_its_last_thirty_days_when_the_roots_key_is_there(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "swarm", "bank")
    assert not home.renew_issuer(now())
    create_issuer(Authority.load(home.ca_dir), lifetime=datetime.timedelta(days=29)).save(home.ca_dir)
    before = home.issuer()
    node = issue_node(before, "server")
    assert home.renew_issuer(now())
    assert home.issuer().not_after > before.not_after
    assert home.issuer().key_pem == before.key_pem
    Trust(home.root_pem).credential(node.chain_der, now())
    assert not home.renew_issuer(now())


@pytest.mark.parametrize("name", ["", "..", "a/b", "../admin", "A", ".x", "a.b", "-a", "a" * 64, "a\n"])
def test_a_name_that_would_leave_the_directory_is_no_nodes(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot name a node"):
        Home(tmp_path).node_dir(name)


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no swarm") as caught:
        Home(tmp_path).read()
    assert "shoal init" in caught.value.hint
    with pytest.raises(UsageError, match="holds no swarm"):
        Home(tmp_path).issuer()
    member = Home.create(tmp_path / "swarm", "bank")
    (member.ca_dir / "issuer.key").unlink()
    with pytest.raises(UsageError, match="not the directory of this swarm's admin"):
        member.issuer()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"swarm": 1}', '{"seeds": []}', '{"swarm": "x", "seeds": [1]}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "swarm.json").write_text(text)
    with pytest.raises(UsageError, match=r"swarm\.json is damaged"):
        Home(tmp_path).read()


def test_swarm_json_is_rewritten_whole(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "swarm", "bank")
    home.write(msgspec.structs.replace(home.read(), seeds=["tcp://10.0.0.1:7700"]))
    assert home.read().seeds == ["tcp://10.0.0.1:7700"]
    assert not list((tmp_path / "swarm").glob(".*"))


def test_the_directory_is_the_one_given_else_of_the_environment_else_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOAL_SWARM_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home_path() == tmp_path / "data" / "shoal" / "swarm"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_path() == tmp_path / ".local" / "share" / "shoal" / "swarm"
    monkeypatch.setenv("SHOAL_SWARM_DIR", str(tmp_path / "env"))
    assert home_path() == tmp_path / "env"
    assert home_path(tmp_path / "given") == tmp_path / "given"
