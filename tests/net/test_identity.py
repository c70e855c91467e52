"""Certificates: what they prove, how they lie on the disk, and what is not accepted as one."""

from __future__ import annotations

import dataclasses
import datetime
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.networks import authority, certified, identity, issuer

from shoal.errors import DiskFull, Refused, ShoalError, UsageError
from shoal.net import identity as identities
from shoal.net.identity import (
    NODE_LIFETIME,
    Authority,
    NodeIdentity,
    Peer,
    Trust,
    certify,
    create_ca,
    create_issuer,
    issue_node,
    peer_of_certificate,
)


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
    with pytest.raises(DiskFull, match="No space left on device") as caught:
        identity("server").save(tmp_path)
    assert "Free some space" in caught.value.hint
    assert caught.value.exit_code == 5
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


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def test_a_node_signs_and_its_certificate_chain_is_all_that_a_reader_needs() -> None:
    node = identity("server", labels=["trusted", "gpu"])
    credential = Trust(authority().cert_pem).credential(node.chain_der, now())
    assert credential.peer == node.peer
    assert credential.peer.labels == ("gpu", "trusted")
    assert credential.not_after == node.valid_until.timestamp()
    signature = node.sign(b"said")
    assert credential.verify(b"said", signature)
    assert not credential.verify(b"said otherwise", signature)
    assert not credential.verify(b"said", identity("server").sign(b"said"))
    for nonsense in (b"", b"\x30", signature[:-1], signature + b"\0"):
        assert not credential.verify(b"said", nonsense)


def test_what_a_node_signs_for_another_protocol_is_not_taken_for_ours() -> None:
    node = identity("server")
    key = serialization.load_pem_private_key(node.key_pem, None)
    signature = key.sign(b"said", ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr,call-arg,arg-type]
    assert not Trust(authority().cert_pem).credential(node.chain_der, now()).verify(b"said", signature)


def signed_by_a_node() -> tuple[bytes, ...]:
    """A member uses its own certificate as if it were an authority's."""
    node = identity("admin")
    as_authority = Authority(node.peer.swarm, node.key_pem, node.cert_pem, authority().cert_pem)
    return (issue_node(as_authority, "admin").chain_der[0], *node.chain_der)


def signed_by_a_deeper_authority() -> tuple[bytes, ...]:
    deeper = create_issuer(dataclasses.replace(issuer(), root_pem=b""))
    return (issue_node(deeper, "admin").chain_der[0], *identities.ders_of(deeper.cert_pem + issuer().cert_pem))


def of_another_swarm_under_our_name() -> tuple[bytes, ...]:
    return issue_node(dataclasses.replace(issuer("other"), swarm=authority().swarm), "admin").chain_der


@pytest.mark.parametrize(
    "chain",
    [
        signed_by_a_node,
        lambda: signed_by_a_node()[:2],
        signed_by_a_deeper_authority,
        of_another_swarm_under_our_name,
        lambda: identity("server", swarm="other").chain_der,
        lambda: issue_node(issuer(), "server", lifetime=datetime.timedelta(seconds=-1)).chain_der,
        lambda: (),
        lambda: identity("server").chain_der[:1],
        lambda: identity("server").chain_der[::-1],
        lambda: (identity("server").chain_der[0], identity("server").chain_der[0]),
        lambda: identities.ders_of(authority().cert_pem),
        lambda: identities.ders_of(issuer().cert_pem),
        lambda: (*identity("server").chain_der, b""),
        lambda: (b"", b""),
        lambda: (b"\x30\x82" + bytes(5000),),
        lambda: (bytes(64), identity("server").chain_der[1]),
    ],
)
def test_a_chain_that_does_not_lead_from_a_node_to_our_root_is_refused(chain: Callable[[], tuple[bytes, ...]]) -> None:
    with pytest.raises(Refused):
        Trust(authority().cert_pem).credential(chain(), now())


def test_a_chain_with_any_bit_flipped_is_refused() -> None:
    trust, node = Trust(authority().cert_pem), identity("server")
    leaf = bytearray(node.chain_der[0])
    for at in range(0, len(leaf) * 8, 7):
        leaf[at // 8] ^= 1 << at % 8
        with pytest.raises(Refused):
            trust.credential((bytes(leaf), node.chain_der[1]), now())
        leaf[at // 8] ^= 1 << at % 8
    trust.credential((bytes(leaf), node.chain_der[1]), now())


@pytest.mark.parametrize("labels", [["A"], [""], ["a b"], ["a,b"], ["a&role=admin"], ["x" * 33], ["ä"], ["a\n"]])
def test_a_label_that_a_certificate_cannot_carry_is_a_usage_error(labels: list[str]) -> None:
    with pytest.raises(UsageError, match="is no label"):
        issue_node(issuer(), "server", labels=labels)


def test_a_node_has_at_most_sixteen_labels() -> None:
    many = [f"label-{number}" for number in range(17)]
    assert len(issue_node(issuer(), "server", labels=many[:16]).peer.labels) == 16
    with pytest.raises(UsageError, match="at most 16"):
        issue_node(issuer(), "server", labels=many)


@pytest.mark.parametrize("labels", ["?labels=", "?labels=b,a", "?labels=a,a", "?labels=A", "?role=x", "?labels=a&x=1"])
def test_labels_that_are_not_written_as_we_write_them_are_refused(labels: str) -> None:
    with pytest.raises(Refused, match="names no shoal node"):
        Peer.from_uri(f"shoal://demo/server/{'0' * 32}{labels}")


def test_the_issuer_certifies_no_longer_than_it_is_valid_itself() -> None:
    brief = create_issuer(authority(), lifetime=datetime.timedelta(hours=1))
    assert issue_node(brief, "server").valid_until <= brief.not_after
    ended = create_issuer(authority(), lifetime=datetime.timedelta(seconds=-1))
    with pytest.raises(ShoalError, match="issuing authority expired") as caught:
        issue_node(ended, "server")
    assert "ca.key" in caught.value.hint


def test_an_issuer_that_is_signed_anew_keeps_its_key_and_the_chains_it_has_signed(tmp_path: Path) -> None:
    first = create_issuer(authority(), lifetime=datetime.timedelta(days=10))
    again = create_issuer(authority(), key_pem=first.key_pem)
    assert again.key_pem == first.key_pem
    assert again.not_after > first.not_after
    node = issue_node(first, "server")
    Trust(authority().cert_pem).credential((node.chain_der[0], *identities.ders_of(again.cert_pem)), now())
    authority().save(tmp_path)
    again.save(tmp_path)
    (tmp_path / "ca.key").unlink()
    assert Authority.load_issuer(tmp_path) == again


def test_an_issuer_of_another_root_is_not_loaded(tmp_path: Path) -> None:
    issuer("other").save(tmp_path)
    authority().save(tmp_path)
    with pytest.raises(UsageError, match="damaged"):
        Authority.load_issuer(tmp_path)


def test_a_root_whose_name_is_not_its_keys_is_no_root() -> None:
    named = x509.load_pem_x509_certificate(authority().cert_pem)
    other = create_ca("demo")
    renamed = identities._authority_certificate(
        x509.load_pem_x509_certificate(other.cert_pem).public_key(),  # type: ignore[arg-type]
        named.subject,
        identities._private_key(other.key_pem),
        named.subject,
        NODE_LIFETIME,
        path_length=1,
    )
    with pytest.raises(Refused, match="fingerprint"):
        Trust(identities._pem(renamed))


def test_only_a_longer_certificate_of_the_same_key_and_role_is_a_renewal() -> None:
    node = issue_node(issuer(), "server", lifetime=datetime.timedelta(days=1))
    key = x509.load_pem_x509_certificate(node.cert_pem).public_key()
    longer = node.renewed(identities.ders_of(certify(issuer(), "server", key)))  # type: ignore[arg-type]
    assert longer.peer == node.peer
    assert longer.key_pem == node.key_pem
    assert longer.valid_until > node.valid_until
    for chain in (
        node.chain_der,
        identity("server").chain_der,
        identities.ders_of(certify(issuer(), "admin", key)),  # type: ignore[arg-type]
        identities.ders_of(certify(issuer("other"), "server", key)),  # type: ignore[arg-type]
    ):
        with pytest.raises(Refused):
            node.renewed(chain)
