"""Listening sockets, bound before anything else starts; `marketflow check` binds without loading a server."""

import socket

from marketflow.errors import StartError
from marketflow.text import host_port

BACKLOG = 2048
"""Connections that may wait to be accepted; fewer if the limit of open files is below four times as many."""


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """Return a listening socket; `shared` sockets may listen on one port (SO_REUSEPORT).

    Raises:
        StartError: the address cannot be resolved or bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"http.host = {host!r}: {error.strerror or error}") from error
    try:
        # On shared sockets as well: connections in TIME_WAIT would keep the next start from the port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        # Listen at once: a port that is only bound may be bound by another process as well.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port} (http.host, http.port): {error.strerror}") from error
    return listener


def bind_each(host: str, port: int, number: int) -> list[socket.socket]:
    """Return `number` listening sockets, over which the kernel distributes the connections.

    With one socket for all processes, 16 simultaneous connections often end in one process: the one that is awake
    accepts them all, and serves them while the others idle.

    Raises:
        StartError: the address cannot be resolved or bound.
    """
    # The first socket listens before it becomes shared, so that it fails on a port that another start shares.
    # It stays open, so that any other start finds the port taken.
    listeners = [bind(host, port)]
    try:
        listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = listeners[0].getsockname()[1]
        for _ in range(number - 1):
            listeners.append(bind(host, port, shared=True))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def place_of(listener: socket.socket) -> str:
    """Return host and port of a listener, as in a URL."""
    host, port = listener.getsockname()[:2]
    return host_port(host, port)
