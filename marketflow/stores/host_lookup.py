"""Lookups of the hosts of stores with a time limit: the resolver's own is up to a minute, and nothing can interrupt it.

A client that looks a name up by itself would hold its thread for as long, and with it writes, the start and the stop.
"""

import socket
import threading
from concurrent.futures import Future
from functools import partial
from ipaddress import ip_address

from marketflow.tasks import on_daemon_thread

LOOKUP_SECONDS = 1.0
"""Limit for PostgreSQL: a resolver that answers does so in a fraction of it, and a stop may wait for it."""

_lock = threading.Lock()
_running: dict[str, "Future[None]"] = {}
"""One lookup of a host at a time."""


def await_lookup(host: str, seconds: float) -> None:
    """Wait until the resolver has answered about a host, whatever it says; at once for an address or a path.

    Raises:
        TimeoutError: it has not within `seconds`.
    """
    if not _is_name(host):
        return
    with _lock:
        if (lookup := _running.get(host)) is None:
            lookup = _running[host] = Future()
            threading.Thread(target=_look_up, args=(host, lookup), name="lookup", daemon=True).start()
    try:
        lookup.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"{host} cannot be looked up: no answer within {seconds:g} s") from None


async def await_lookup_aside(host: str, seconds: float) -> None:
    """The same for an event loop, whose own lookups would hold up the end of the process.

    Raises:
        TimeoutError: there is no answer within `seconds`.
    """
    if _is_name(host):
        await on_daemon_thread(partial(await_lookup, host, seconds))


def _look_up(host: str, lookup: "Future[None]") -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        pass  # the client gets the same
    finally:
        with _lock:
            del _running[host]
        lookup.set_result(None)


def _is_name(host: str) -> bool:
    """Return whether a host is neither an address nor the path of a socket."""
    if not host or host.startswith("/"):
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False
