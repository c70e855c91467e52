"""Addresses: what is one, what is not, and which stay on this machine."""

import pytest

from shoal.errors import UsageError
from shoal.net.transport import Address


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:4000", "tcp://host-1.example:0", "tcp://[::1]:65535"])
def test_an_address_is_printed_as_it_was_read(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1:1", "http://a:1", "tcp://a", "tcp://a:70000", "tcp://a:1/x", "tcp://a b:1", "tcp://a:1\n"]
)
def test_anything_else_is_a_usage_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="Cannot read the address") as caught:
        Address.parse(text)
    assert "tcp://HOST:PORT" in caught.value.hint


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    assert Address(host, 1).is_loopback is expected
