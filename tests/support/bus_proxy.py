"""Partitions of the cluster bus of Redis: a proxy in front of the bus port of each node, by which the others reach it.

Clients and replication are not affected: the node answers both as long as it takes itself for a master.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.support.servers import HOST

_SENDER = slice(40, 80)
"""Where a message of the bus has the name of the node that sends it (struct clusterMsg)."""


class BusProxy:
    """Passes messages to the bus port of a node, but for those of nodes from which it is cut off.

    Args:
        target: port of the bus.
        is_cut: returns whether the node is cut off from the one with a name.
    """

    def __init__(self, target: int, is_cut: Callable[[str], bool]) -> None:
        self._target = target
        self._is_cut = is_cut
        self._links: dict[socket.socket, str] = {}
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Refuse everybody, and cut all links."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._is_cut = lambda _: True
        self.cut_links()

    def cut_links(self) -> None:
        """Cut the links of nodes from which it is cut off."""
        for link, name in list(self._links.items()):
            if self._is_cut(name):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._pass, args=(self._listener.accept()[0],), daemon=True).start()

    def _pass(self, link: socket.socket) -> None:
        with suppress(OSError), link, socket.create_connection((HOST, self._target)) as node:
            begin = b""
            while len(begin) < _SENDER.stop and (data := link.recv(65536)):
                begin += data
            name = begin[_SENDER].decode(errors="replace")
            self._links[link] = name
            if self._is_cut(name):
                return
            node.sendall(begin)
            threading.Thread(target=_pass_on, args=(node, link), daemon=True).start()
            _pass_on(link, node)
        self._links.pop(link, None)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
