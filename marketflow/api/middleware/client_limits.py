"""Who a client is, and how much of what is costly one client may ask for.

A client is its address; of IPv6 the network of 64 bits, since a holder of one address has all of those. Behind proxies
that are trusted (`http.trusted_proxies`) it is the last address in X-Forwarded-For that is none of theirs: what stands
before it the client could have made up.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

from marketflow.errors import QuotaExceeded

CLIENTS_REMEMBERED = 4096
"""How many clients a bucket remembers, those that asked last: strangers cannot make it grow."""

ROWS_A_SECOND = 60_000.0
ROWS_AT_ONCE = 300_000.0
"""How many minutes, hours and days of the archive one client may have read for it: a fifth of a core of PostgreSQL, and
the candles of a month at once. What others have just asked for costs nothing."""

GUESSES_A_SECOND = 0.2
GUESSES_AT_ONCE = 10.0
"""How many wrong tokens a client may send."""

_PORT = re.compile(r":[0-9]+$")

_asking: ContextVar[str] = ContextVar("asking", default="")


class TokenBuckets:
    """A token bucket for each client.

    Args:
        a_second: how much comes back a second.
        at_once: how much there is at most.
        monotonic: seconds.
    """

    def __init__(self, a_second: float, at_once: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._a_second = a_second
        self._at_once = at_once
        self._monotonic = monotonic
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how much, and when

    def take(self, client: str, amount: float) -> None:
        """Take that much, or what is left where it is more than there could ever be.

        Raises:
            QuotaExceeded: there is not that much left.
        """
        if wait := self.wait(client, amount):
            raise QuotaExceeded(wait)
        left, now = self._now(client)
        self._left[client] = (left - min(amount, self._at_once), now)
        self._left.move_to_end(client)
        while len(self._left) > CLIENTS_REMEMBERED:
            self._left.popitem(last=False)

    def wait(self, client: str, amount: float = 1.0) -> float:
        """Seconds until there is that much."""
        left, _ = self._now(client)
        return max(0.0, (min(amount, self._at_once) - left) / self._a_second)

    def _now(self, client: str) -> tuple[float, float]:
        now = self._monotonic()
        left, at = self._left.get(client, (self._at_once, now))
        return min(self._at_once, left + (now - at) * self._a_second), now


class ClientLimits:
    """Tells clients apart, and holds each to its share.

    Args:
        trusted_proxies: addresses and networks of proxies whose word is taken for who the client is.
        monotonic: seconds.
    """

    def __init__(self, trusted_proxies: Sequence[str] = (), monotonic: Callable[[], float] = time.monotonic) -> None:
        self._trusted = tuple(ip_network(each, strict=False) for each in trusted_proxies)
        self._rows = TokenBuckets(ROWS_A_SECOND, ROWS_AT_ONCE, monotonic)
        self.guesses = TokenBuckets(GUESSES_A_SECOND, GUESSES_AT_ONCE, monotonic)
        """Wrong tokens."""

    def of(self, scope: Scope) -> str:
        """The client of a request."""
        peer: str = (scope.get("client") or ("",))[0]
        if self._trusted and _is_within(peer, self._trusted):
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            addresses: list[str] = forwarded.decode("latin-1").split(",")
            for address in reversed([each for each in addresses if each.strip()]):
                if not (found := _address(address)):  # what stands before it nobody vouches for
                    break
                peer = found
                if not _is_within(peer, self._trusted):
                    break
        return _network_of(peer)

    def host(self, scope: Scope) -> str:
        """The host that a client has addressed: what a trusted proxy says, else the Host header; "" for none."""
        trusted = self._trusted and _is_within((scope.get("client") or ("",))[0], self._trusted)
        host = (trusted and _last_of(scope, b"x-forwarded-host")) or _last_of(scope, b"host")
        port = _last_of(scope, b"x-forwarded-port") if trusted else ""
        # The port of an origin is left out where it is that of its scheme, and Host has none where a proxy took it off.
        if host and port.isdecimal() and port not in ("80", "443") and not _PORT.search(host):
            return f"{host}:{port}"
        return host

    def asks(self, scope: Scope) -> None:
        """Let what is read from now on by this task be for the client of a request."""
        _asking.set(self.of(scope))

    def charge(self, rows: float) -> None:
        """Have so many rows read for the client that asks.

        Raises:
            QuotaExceeded: it has had its share.
        """
        if client := _asking.get():
            self._rows.take(client, rows)


def _last_of(scope: Scope, wanted: bytes) -> str:
    """The last item of a header that is there once; "" for none."""
    values: list[bytes] = [value for name, value in scope["headers"] if name == wanted]
    return values[0].decode("latin-1").rpartition(",")[2].strip() if len(values) == 1 else ""


@lru_cache(maxsize=1024)
def _is_within(address: str, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return any(found in network for network in networks)


def _address(text: str) -> str:
    """The address in an item of X-Forwarded-For, which may have a port; "" where there is none."""
    text = text.strip().strip('"')
    text = text.partition("]")[0].strip("[") if text.startswith("[") else text
    for candidate in (text, text.rpartition(":")[0]):
        try:
            return str(ip_address(candidate))
        except ValueError:
            continue
    return ""


@lru_cache(maxsize=1024)
def _network_of(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address or "unknown"
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(IPv6Network((int(found) >> 64 << 64, 64)))
