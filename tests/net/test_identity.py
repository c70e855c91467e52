"""Certificates: what they prove, how they lie on the disk, and what is not accepted as one."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from support.networks import authority, certified, identity

from shoal.errors import Refused, ShoalError, UsageError
from shoal.net import identity as identities
from shoal.net.identity import NODE_LIFETIME, Authority, NodeIdentity, Peer, create_ca, issue_node, peer_of_certificate


def test_a_certificate_names_swarm_role_and_node() -> None:
    node = issue_node(authority(), "server")
    assert certified(node) == node.peer
    assert Peer.from_uri(node.peer.uri) == node.peer
    assert node.peer.swarm.startswith("demo-")


def test_the_node_id_is_the_fingerprint_of_its_key() -> None:
    ca = authority()
    node = issue_node(ca, "server")
    stranger = Peer(node="0" * 32, role="server", swarm=ca.swarm)
    key = x509.load_pem_x509_certificate(node.cert_pem).public_key()
    forged = identities._certify(ca, stranger, key, NODE_LIFETIME)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="not the fingerprint of its key"):
        peer_of_certificate(ssl.PEM_cert_to_DER_cert(forged.decode()))


def test_two_swarms_of_one_name_have_different_ids() -> None:
    assert create_ca("demo").swarm != create_ca("demo").swarm


def test_an_authoritys_certificate_is_no_nodes() -> None:
    with pytest.raises(Refused, match="names no shoal node"):
        peer_of_certificate(ssl.PEM_cert_to_DER_cert(authority().cert_pem.decode()))


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://demo/server/" + "0" * 32,
        "shoal://demo/root/" + "0" * 32,
        "shoal://demo/server/short",
        "shoal://demo/server/" + "0" * 32 + "/more",
        "shoal://demo/server/" + "0" * 32 + "\n",
    ],
)
def test_a_uri_that_is_not_quite_ours_is_refused(uri: str) -> None:
    with pytest.raises(Refused, match="names no shoal node"):
        Peer.from_uri(uri)


@pytest.mark.parametrize("name", ["", "Demo", "a b", "-a", "a-", "x" * 25, "../etc", "a\n"])
def test_a_name_that_cannot_be_a_swarm_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a swarm") as caught:
        create_ca(name)
    assert "lower-case letters" in caught.value.hint


def test_the_extensions_that_strict_verifiers_demand_are_there() -> None:
    ca = x509.load_pem_x509_certificate(authority().cert_pem)
    node = x509.load_pem_x509_certificate(identity("server").cert_pem)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).critical
    assert ca.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert not node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not node.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for cert in (ca, node):
        cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert node.not_valid_after_utc - node.not_valid_before_utc < datetime.timedelta(days=8)


def test_what_is_saved_is_loaded_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    ca, node = authority(), identity("gateway")
    ca.save(tmp_path / "ca")
    node.save(tmp_path / "node")
    assert Authority.load(tmp_path / "ca") == ca
    assert NodeIdentity.load(tmp_path / "node") == node
    for path in (tmp_path / "ca" / "ca.key", tmp_path / "node" / "node.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert not list(tmp_path.rglob(".*")), "no partial files are left"


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    identity("server").save(tmp_path)
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others") as caught:
        NodeIdentity.load(tmp_path)
    assert "chmod 600" in caught.value.hint


def test_a_missing_or_damaged_identity_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read"):
        NodeIdentity.load(tmp_path)
    identity("server").save(tmp_path)
    (tmp_path / "node.pem").write_bytes(b"not a certificate")
    with pytest.raises(UsageError, match="is damaged"):
        NodeIdentity.load(tmp_path)


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = identity("server")
    node.save(tmp_path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(ShoalError, match="No space left on device") as caught:
        identity("server").save(tmp_path)
    assert "Free some space" in caught.value.hint
    assert NodeIdentity.load(tmp_path) == node
    assert not list(tmp_path.glob(".*"))


def test_neither_key_shows_in_a_repr() -> None:
    node = identity("server")
    serialization.load_pem_private_key(node.key_pem, None)
    assert "KEY" not in repr(node) + repr(authority())


def test_the_contexts_speak_tls_1_3_only_and_demand_a_certificate() -> None:
    node = identity("server")
    for context in (node.server_context(), node.client_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.cert_store_stats()["x509"] == 1, "our authority and no other"
