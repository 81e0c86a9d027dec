"""Several processes that do the same, and one that sees to them.

Forked before anything has been started, so they share what was loaded and inherit the sockets. A worker that ends is
replaced, and what waits on its socket meanwhile is kept by the parent. They are in process groups of their own: Ctrl+C
reaches the parent alone, which tells them. Should the parent be killed they notice by a pipe that only it holds open,
and end as well.
"""

import os
import signal
import time
from collections.abc import Callable

from loguru import logger

RESTART_SECONDS = 1.0
"""A worker that lived for less than this is replaced only then: what ended it may do so again."""

STOP_SECONDS = 5.0
"""How long the workers may take to end."""

HURRY_SECONDS = 1.5
"""The same, once told a second time."""


class Workers:
    """Runs a number of workers until SIGINT, SIGTERM or SIGHUP. To be used in a process without threads.

    Args:
        number: how many.
        work: what each does, by its number from 0 on, until it gets SIGTERM or the descriptor that it is given becomes
            readable; gives the exit code.
    """

    def __init__(self, number: int, work: Callable[[int, int], int]) -> None:
        self._work = work
        self._missing = list(range(number))
        self._alive: dict[int, tuple[int, float]] = {}  # number, and when it began, by pid
        told = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._told = {each for each in told if signal.getsignal(each) is not signal.SIG_IGN}  # as nohup would have it
        self._awaited = {*self._told, signal.SIGCHLD}

    def run(self) -> None:
        """Run them, and return when all have ended."""
        # Blocked, so that they wait until they are asked for: nothing here is interrupted.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._awaited)
        self._watched, self._held = os.pipe()
        try:
            self._keep_running()
            self._end()
        finally:
            os.close(self._held)
            os.close(self._watched)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _keep_running(self) -> None:
        start_at = 0.0
        while True:
            pause = start_at - time.monotonic()
            if pause <= 0:
                while self._missing:
                    self._start(self._missing.pop(0))
            if self._next_signal(pause if pause > 0 else 3600.0) in self._told:
                return
            for pid, number, began, how in self._ended():
                self._missing.append(number)
                logger.error("worker {} {}; starting another", pid, how)
                start_at = began + RESTART_SECONDS

    def _end(self) -> None:
        """Tell them to end, as often as this process is told; those that do not are killed."""
        logger.info("stopping")
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self._alive:
            got = self._next_signal(deadline - time.monotonic())
            if got in self._told:
                self._send(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + HURRY_SECONDS)
            elif got is None:
                logger.warning("{} workers did not end in time and are killed", len(self._alive))
                self._send(signal.SIGKILL)
                deadline = time.monotonic() + STOP_SECONDS
            self._ended()

    def _start(self, number: int) -> None:
        if pid := os.fork():
            self._alive[pid] = number, time.monotonic()
            return
        code = 1
        try:
            os.setpgid(0, 0)
            os.close(self._held)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._work(number, self._watched)
        except KeyboardInterrupt:  # told before it had begun
            code = 0
        except BaseException as error:  # noqa: BLE001 - it must not return into what the parent was doing
            logger.opt(exception=error).critical("the worker failed")
        finally:
            os._exit(code)

    def _next_signal(self, seconds: float) -> int | None:
        got = signal.sigtimedwait(self._awaited, max(0.0, seconds))
        return None if got is None else got.si_signo

    def _send(self, number: int) -> None:
        for pid in self._alive:
            os.kill(pid, number)  # it is there until it is reaped

    def _ended(self) -> list[tuple[int, int, float, str]]:
        """The workers that have ended: pid, number, when each began and how it ended."""
        ended = []
        for pid in list(self._alive):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                code = os.waitstatus_to_exitcode(status)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                ended.append((pid, *self._alive.pop(pid), how))
        return ended
