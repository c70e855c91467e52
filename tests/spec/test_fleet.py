"""What people write for the machines they have, and what they are told when it cannot be read."""

from __future__ import annotations

import pytest

from shoal.errors import UsageError
from shoal.spec import catalog
from shoal.spec.fleet import Fleet


def test_a_mixed_fleet_with_nodes_and_a_network_is_read() -> None:
    fleet = Fleet.parse("4x RTX-4090, 2x A100-80GB @8/node, 400Gb")

    assert [(g.count, g.device.name, g.per_node) for g in fleet.groups] == [
        (4, "RTX-4090", None),
        (2, "A100-SXM-80GB", 8),
    ]
    assert fleet.network_bytes_s == 50e9
    assert fleet.num_devices == 6


@pytest.mark.parametrize(
    ("text", "name"),
    [("h100-sxm @8/node", "H100-SXM-80GB"), ("rtx 4090", "RTX-4090"), ("64 x H200", "H200-SXM-141GB")],
)
def test_the_name_may_be_shortened_where_no_doubt_is_left(text: str, name: str) -> None:
    assert Fleet.parse(text).groups[0].device.name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least one device"),
        ("0x RTX-4090", "counts"),
        ("-2x RTX-4090", "group"),
        ("2x RTX-4090, 100GB", "gigabit"),
        ("2x RTX-4090 @0/node", "counts"),
        ("2x RTX-9999", "no device"),
        ("4x A100", "Several"),
        ("4x RTX-4090, 100Gb, 200Gb", "one network speed"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_accepted_forms(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        Fleet.parse(text)

    assert raised.value.hint


def test_every_device_has_memory_a_source_and_a_statement_of_trust() -> None:
    devices = [catalog.device(name) for name in catalog.device_names()]

    assert len(devices) >= 100
    for each in devices:
        assert each.memory_bytes > 0
        assert each.source
        assert each.checked in ("source", "recalled", "doubtful")
        assert each.checked != "doubtful" or each.notes
