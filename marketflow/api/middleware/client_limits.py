"""Rate limits of costly queries and of wrong tokens, per client.

A client is identified by its address; for IPv6 by its /64 network, which one holder usually has whole. Behind trusted
proxies (`http.trusted_proxies`) it is the last address in X-Forwarded-For that is not a trusted proxy: the client can
forge the addresses before it.
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
"""Most clients remembered; the least recent ones are evicted."""

ROWS_A_SECOND = 60_000.0
ROWS_AT_ONCE = 300_000.0
"""Rows of minutes, hours and days that the archive reads for one client: a fifth of a core of PostgreSQL, and the
candles of a month at once. Coalesced and cached queries cost nothing."""

GUESSES_A_SECOND = 0.2
GUESSES_AT_ONCE = 10.0
"""Limits of wrong tokens."""

_PORT = re.compile(r":[0-9]+$")

_client: ContextVar[str] = ContextVar("client", default="")


class TokenBuckets:
    """Token buckets, one a client.

    A bucket that is not empty admits any amount, and owes what it lacks: one query may need nearly all that it holds,
    and would otherwise be refused after a few others. The rate is the same.

    Args:
        a_second: refill rate.
        at_once: capacity.
        monotonic: clock in seconds.
    """

    def __init__(self, a_second: float, at_once: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._a_second = a_second
        self._at_once = at_once
        self._monotonic = monotonic
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how much, and when

    def take(self, client: str, amount: float) -> None:
        """Take an amount, at most the capacity.

        Raises:
            QuotaExceeded: the bucket is empty.
        """
        if wait := self.wait(client):
            raise QuotaExceeded(wait)
        left, now = self._now(client)
        self._left[client] = (left - min(amount, self._at_once), now)
        self._left.move_to_end(client)
        while len(self._left) > CLIENTS_REMEMBERED:
            self._left.popitem(last=False)

    def wait(self, client: str) -> float:
        """Return the seconds until the bucket admits something again."""
        left, _ = self._now(client)
        return max(0.0, (1.0 - left) / self._a_second)

    def _now(self, client: str) -> tuple[float, float]:
        now = self._monotonic()
        left, at = self._left.get(client, (self._at_once, now))
        return min(self._at_once, left + (now - at) * self._a_second), now


class ClientLimits:
    """Identifies clients, and limits each.

    Args:
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-* headers count.
        monotonic: clock in seconds.
    """

    def __init__(self, trusted_proxies: Sequence[str] = (), monotonic: Callable[[], float] = time.monotonic) -> None:
        self._trusted = tuple(ip_network(each, strict=False) for each in trusted_proxies)
        self._rows = TokenBuckets(ROWS_A_SECOND, ROWS_AT_ONCE, monotonic)
        self.guesses = TokenBuckets(GUESSES_A_SECOND, GUESSES_AT_ONCE, monotonic)
        """Wrong tokens."""

    def of(self, scope: Scope) -> str:
        """Return the client of a request."""
        peer: str = (scope.get("client") or ("",))[0]
        if self._trusted and _is_within(peer, self._trusted):
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            addresses: list[str] = forwarded.decode("latin-1").split(",")
            for address in reversed([each for each in addresses if each.strip()]):
                if not (found := _address(address)):  # no trusted proxy vouches for what stands before it
                    break
                peer = found
                if not _is_within(peer, self._trusted):
                    break
        return _network_of(peer)

    def host(self, scope: Scope) -> str:
        """Return the host of a request: what a trusted proxy says, else the Host header; "" for none."""
        trusted = self._trusted and _is_within((scope.get("client") or ("",))[0], self._trusted)
        host = (trusted and _last_of(scope, b"x-forwarded-host")) or _last_of(scope, b"host")
        port = _last_of(scope, b"x-forwarded-port") if trusted else ""
        # The port of an origin is left out where it is that of its scheme, and Host has none where a proxy took it off.
        if host and port.isdecimal() and port not in ("80", "443") and not _PORT.search(host):
            return f"{host}:{port}"
        return host

    def attribute_to(self, scope: Scope) -> None:
        """Charge further reads of this task to the client of a request."""
        _client.set(self.of(scope))

    def exempt(self) -> None:
        """Charge further reads of this task to nobody: it works for several clients."""
        _client.set("")

    def charge(self, rows: float) -> None:
        """Charge rows to the client of this task.

        Raises:
            QuotaExceeded: it has used up its share.
        """
        if client := _client.get():
            self._rows.take(client, rows)


def _last_of(scope: Scope, wanted: bytes) -> str:
    """Return the last item of a header that occurs once, else ""."""
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
    """Return the address in an item of X-Forwarded-For, without its port; "" for none."""
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
