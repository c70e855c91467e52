"""The fleets that people write down: "4x RTX-4090, 2x A100-80GB @8/node, 400Gb"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal.errors import UsageError
from shoal.spec.catalog import device
from shoal.spec.hardware import Device

FLEET_FORM = '"4x RTX-4090", "64x H100-SXM @8/node, 400Gb", "3x RTX-3090, 2x Apple-M2-Max"'
MAX_DEVICES = 1_000_000


@dataclass(frozen=True, slots=True)
class Group:
    """Equal devices of a fleet."""

    count: int
    device: Device
    per_node: int | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """What somebody has: groups of devices, and the network between the machines if it was said."""

    groups: tuple[Group, ...]
    network_bytes_s: float | None = None

    @property
    def num_devices(self) -> int:
        return sum(group.count for group in self.groups)

    @classmethod
    def parse(cls, text: str) -> Fleet:
        """Read a fleet: groups `COUNTx DEVICE [@N/node]` and at most one network speed, separated by commas.

        Raises UsageError that names the part and the accepted forms: unknown device, bad count, GB where Gb is meant.
        """
        groups: list[Group] = []
        network: float | None = None
        for part in (each.strip() for each in text.split(",")):
            if not part:
                continue
            if speed := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(Gb|Gbit|Gbps|Gbit/s|Gb/s|GB|GB/s|GiB|GiB/s)", part):
                if speed[2].startswith(("GB", "GiB")):
                    raise _bad(text, part, "networks are written in Gb (gigabit per second): 100Gb")
                if network is not None or float(speed[1]) <= 0:
                    raise _bad(text, part, "one network speed above 0 may be given")
                network = float(speed[1]) * 1e9 / 8
                continue
            match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?([A-Za-z][\w.+ -]*?)\s*(?:@\s*(\d+)\s*/\s*node)?", part)
            if match is None:
                raise _bad(text, part, "a group is COUNTx DEVICE, with @N/node behind it if you like")
            count = int(match[1] or 1)
            per_node = int(match[3]) if match[3] else None
            if not 1 <= count <= MAX_DEVICES or per_node == 0:
                raise _bad(text, part, f"counts are 1 to {MAX_DEVICES}")
            groups.append(Group(count, device(match[2]), per_node))
        if not groups:
            raise _bad(text, text, "at least one device is needed")
        return cls(tuple(groups), network)


def _bad(text: str, part: str, why: str) -> UsageError:
    return UsageError(f"Cannot read {part!r} of the fleet {text!r}: {why}.", hint=f"Forms: {FLEET_FORM}")
