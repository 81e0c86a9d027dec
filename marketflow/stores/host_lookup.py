"""Lookups of the hosts of stores with a time limit: the resolver's own is up to a minute, and nothing can interrupt it.

A client that looks a name up by itself would hold its thread for as long, and with it writes, the start and the stop.
So it gets addresses: the next lookup may hang although this one was answered.
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
_running: dict[str, "Future[list[str]]"] = {}
"""One lookup of a host at a time."""


def look_up(host: str, seconds: float) -> list[str]:
    """Return the addresses of a host; at once of an address itself, and none of the path of a socket.

    Raises:
        TimeoutError: the resolver has not answered within `seconds`.
        OSError: it has, but not with an address, or it cannot be asked.
    """
    if not _is_name(host):
        return [host] if host and not host.startswith("/") else []
    with _lock:
        if (lookup := _running.get(host)) is None:
            lookup = Future()
            try:
                threading.Thread(target=_look_up, args=(host, lookup), name="lookup", daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads
                raise OSError(f"{host} cannot be looked up: {error}") from None
            _running[host] = lookup
    try:
        return lookup.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"{host} cannot be looked up: no answer within {seconds:g} s") from None


async def look_up_aside(host: str, seconds: float) -> list[str]:
    """The same for an event loop, whose own lookups would hold up the end of the process.

    Raises:
        TimeoutError: the resolver has not answered within `seconds`.
        OSError: it has, but not with an address, or it cannot be asked.
    """
    return await on_daemon_thread(partial(look_up, host, seconds)) if _is_name(host) else look_up(host, seconds)


def _look_up(host: str, lookup: "Future[list[str]]") -> None:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        # The text of a link-local address needs its interface.
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        answer = [socket.getnameinfo(address, numeric)[0] for *_, address in found]
    except Exception as error:  # noqa: BLE001 - handed off
        settle = partial(lookup.set_exception, error)
    else:
        settle = partial(lookup.set_result, answer)
    with _lock:
        del _running[host]
    settle()


def _is_name(host: str) -> bool:
    """Return whether a host is neither an address nor the path of a socket."""
    if not host or host.startswith("/"):
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False
