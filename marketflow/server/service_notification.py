"""Notifications to the service manager: ready, status, alive, stopping.

systemd, for one, starts what depends on a unit of Type=notify once that is ready, and restarts a unit that has been
silent for WatchdogSec. It listens on a datagram socket (sd_notify(3)); other service managers use the same protocol.
"""

import asyncio
import os
import socket
from collections.abc import Callable

from loguru import logger

from marketflow.logs import RateLimit

SEND_SECONDS = 1.0
"""Timeout of a notification: nothing here may hang with the service manager."""

BEATS = 3
"""Liveness notifications per watchdog interval."""


class Supervisor:
    """Receives notifications about this process; the base class ignores them.

    Args:
        beat_seconds: interval of liveness notifications; None for none.
    """

    def __init__(self, beat_seconds: float | None = None) -> None:
        self.beat_seconds = beat_seconds
        self._limit = RateLimit(60.0)

    def ready(self, doing: str) -> None:
        """Notify that the process is ready, and what it does. May be repeated with another status."""

    def beat(self) -> None:
        """Notify that the process is alive."""

    def stopping(self) -> None:
        """Notify that the process is stopping."""

    async def beat_while(self, alive: Callable[[], bool]) -> None:
        """Notify periodically while the event loop runs and `alive` returns true, until cancelled."""
        while self.beat_seconds is not None:
            self.beat_if(alive)
            await asyncio.sleep(self.beat_seconds)

    def beat_if(self, alive: Callable[[], bool]) -> None:
        """Notify if `alive` returns true; an exception counts as false, and the next call tries again."""
        try:
            if alive():
                self.beat()
        except Exception as error:  # noqa: BLE001 - the end of this task would have a live process restarted
            self._limit.log_bug("the liveness check failed", error)


class ServiceManager(Supervisor):
    """systemd, or another service manager with its protocol.

    Args:
        address: of the socket: a path, or a name in the abstract namespace that begins with @.
        beat_seconds: as in Supervisor.
    """

    def __init__(self, address: str, beat_seconds: float | None = None) -> None:
        super().__init__(beat_seconds)
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self, doing: str) -> None:
        """Send READY=1 and the status that `systemctl status` shows."""
        self._send(f"READY=1\nSTATUS={doing}")

    def beat(self) -> None:
        """Send WATCHDOG=1, if the watchdog is on."""
        if self.beat_seconds is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Send STOPPING=1."""
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning("the service manager cannot be notified of {!r}: {}", message, error)


def supervisor() -> Supervisor:
    """Return the service manager that the environment names, and remove its variables from the environment.

    Children must not inherit them: an embedded PostgreSQL, for one, would notify that it is ready.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    microseconds = os.environ.pop("WATCHDOG_USEC", "")
    for_us = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address.startswith(("/", "@")):  # none, or a socket of another kind, as for a virtual machine
        return Supervisor()
    watched = for_us and microseconds.isdecimal() and int(microseconds) > 0
    return ServiceManager(address, int(microseconds) / 1e6 / BEATS if watched else None)
