"""How often one address may ask: a bucket of attempts for each, that fills again with time."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

MAX_ADDRESSES = 4096


class Attempts:
    """`burst` attempts at once, then one in `every_s` seconds, for each address by itself. Pure: `now` in seconds.

    IPv6 addresses count by their /64, which is what one machine is given. When more than MAX_ADDRESSES are known, the
    one that was quiet longest is forgotten.
    """

    def __init__(self, *, burst: int, every_s: float) -> None:
        self._burst = float(burst)
        self._every_s = every_s
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """(attempts left, when that was), by address; least recently used first."""

    def left(self, address: str, now: float) -> float:
        """Attempts that this address has now."""
        left, at = self._left.get(_group(address), (self._burst, now))
        return min(self._burst, left + max(0.0, now - at) / self._every_s)

    def wait_s(self, address: str, now: float) -> float:
        """0 when the address may try now, else the time until it may."""
        return max(0.0, (1.0 - self.left(address, now)) * self._every_s)

    def charge(self, address: str, now: float) -> None:
        """The address has tried."""
        left = max(0.0, self.left(address, now) - 1.0)
        key = _group(address)
        self._left[key] = (left, now)
        self._left.move_to_end(key)
        while len(self._left) > MAX_ADDRESSES:
            self._left.popitem(last=False)


def _group(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
