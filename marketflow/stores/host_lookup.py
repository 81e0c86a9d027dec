"""Lookups of the hosts of stores with a time limit: the resolver's own is up to a minute, and nothing can interrupt it.

A client that looks a name up by itself would hold its thread for as long, and with it writes, the start and the stop.
"""

import socket
import threading
from concurrent.futures import Future
from ipaddress import ip_address

_lock = threading.Lock()
_running: dict[str, "Future[None]"] = {}
"""One lookup of a host at a time."""


def await_lookup(host: str, seconds: float) -> None:
    """Wait until the resolver has answered about a host, whatever it says; at once for an address or a path.

    Raises:
        TimeoutError: it has not within `seconds`.
    """
    if not host or host.startswith("/") or _is_address(host):
        return
    with _lock:
        if (lookup := _running.get(host)) is None:
            lookup = _running[host] = Future()
            threading.Thread(target=_look_up, args=(host, lookup), name="lookup", daemon=True).start()
    try:
        lookup.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"{host} cannot be looked up: no answer within {seconds:g} s") from None


def _look_up(host: str, lookup: "Future[None]") -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        pass  # the client gets the same
    finally:
        with _lock:
            del _running[host]
        lookup.set_result(None)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
