"""What whoever supervises this process is told: that it is ready, what it does, that it is alive, that it ends.

systemd, for one, starts what depends on a unit of Type=notify once that is ready, and restarts one that has been
silent for WatchdogSec. It listens on a datagram socket (sd_notify(3)); other supervisors speak the same way.
"""

import asyncio
import os
import socket
from collections.abc import Callable

from loguru import logger

from marketflow.logs import RateLimit

SEND_SECONDS = 1.0
"""How long a message may take. The service manager is alive nearly always, and nothing here may hang with it."""

BEATS = 3
"""How many signs of life there are in the time within which one is expected."""


class Supervisor:
    """Whoever wants to know; this one does not.

    Args:
        beat_seconds: how often to give a sign of life, None where none is expected.
    """

    def __init__(self, beat_seconds: float | None = None) -> None:
        self.beat_seconds = beat_seconds
        self._limit = RateLimit(60.0)

    def ready(self, doing: str) -> None:
        """It does what it was started for, or stands by for it. May be said again, as things change."""

    def beat(self) -> None:
        """A sign of life."""

    def stopping(self) -> None:
        """It is about to end."""

    async def beat_while(self, alive: Callable[[], bool]) -> None:
        """Give signs of life for as long as there is life: the event loop that runs this, and what is asked."""
        while self.beat_seconds is not None:
            self.beat_if(alive)
            await asyncio.sleep(self.beat_seconds)

    def beat_if(self, alive: Callable[[], bool]) -> None:
        """Give a sign of life if there is life; what cannot be asked has none, and is asked again."""
        try:
            if alive():
                self.beat()
        except Exception as error:  # noqa: BLE001 - one that asked no more would have a live process restarted
            if self._limit.admit("alive") is not None:
                logger.opt(exception=error).error("no sign of life can be given, which is a bug")


class ServiceManager(Supervisor):
    """systemd, or another that listens on a socket like its.

    Args:
        address: of the socket: a path, or a name in the abstract namespace that begins with @.
        beat_seconds: as above.
    """

    def __init__(self, address: str, beat_seconds: float | None = None) -> None:
        super().__init__(beat_seconds)
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self, doing: str) -> None:
        """READY=1, and what `systemctl status` shows."""
        self._send(f"READY=1\nSTATUS={doing}")

    def beat(self) -> None:
        """WATCHDOG=1, where it is expected."""
        if self.beat_seconds is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """STOPPING=1."""
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning("the service manager cannot be told {!r}: {}", message, error)


def supervisor() -> Supervisor:
    """Whoever the environment says, and nobody for children of this process: the variables are taken out of it.

    An embedded PostgreSQL, for one, would say by itself that it is ready.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    microseconds = os.environ.pop("WATCHDOG_USEC", "")
    for_us = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address.startswith(("/", "@")):  # nobody, or a socket of another kind, as for a virtual machine
        return Supervisor()
    watched = for_us and microseconds.isdecimal() and int(microseconds) > 0
    return ServiceManager(address, int(microseconds) / 1e6 / BEATS if watched else None)
