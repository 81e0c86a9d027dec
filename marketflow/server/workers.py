"""Several processes that do the same, and one that sees to them.

Forked before anything has been started, so they share what was loaded and inherit the sockets. A worker that ends is
replaced, and what waits on its socket meanwhile is kept by the parent. They are in process groups of their own: Ctrl+C
reaches the parent alone, which tells them. Should the parent be killed they notice by a pipe that only it holds open,
and end as well. The parent alone speaks to whoever supervises it, and says that it is ready, or alive, when all workers
have told it so, by signals of a kind that queues up.
"""

import os
import signal
import time
from collections.abc import Callable

from loguru import logger

from marketflow import logs
from marketflow.server.service_notification import Supervisor

RESTART_SECONDS = 1.0
"""A worker that lived for less than this is replaced only then: what ended it may do so again."""

STOP_SECONDS = 5.0
"""How long the workers may take to end."""

FORCE_SECONDS = 1.5
"""The same, once told a second time."""


SIGNAL_OF_LIFE = signal.SIGRTMIN
"""What a worker sends to its parent."""


class Parent(Supervisor):
    """The parent of a worker.

    Args:
        pid: its process.
        gone: a descriptor that becomes readable when it has gone.
        beat_seconds: how often it wants a sign of life.
    """

    def __init__(self, pid: int, gone: int, beat_seconds: float | None) -> None:
        super().__init__(beat_seconds)
        self._pid = pid
        self.gone = gone

    def ready(self, doing: str) -> None:
        """It serves."""
        self.beat()

    def beat(self) -> None:
        """A sign of life."""
        if os.getppid() == self._pid:
            os.kill(self._pid, SIGNAL_OF_LIFE)


class Workers:
    """Runs a number of workers until SIGINT, SIGTERM or SIGHUP. To be used in a process without threads.

    Args:
        number: how many.
        work: what each does, by its number from 0 on, until it gets SIGTERM or its parent has gone; gives the exit
            code.
        supervisor: told how all of them do.
    """

    def __init__(self, number: int, work: Callable[[int, Parent], int], supervisor: Supervisor) -> None:
        self._work = work
        self._number = number
        self._supervisor = supervisor
        self._ready = False
        self._lively: set[int] = set()  # the workers that have been heard of since all of them were
        self._missing = list(range(number))
        self._alive: dict[int, tuple[int, float]] = {}  # number, and when it began, by pid
        told = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._told = {each for each in told if signal.getsignal(each) is not signal.SIG_IGN}  # as nohup would have it
        self._awaited = {*self._told, signal.SIGCHLD, SIGNAL_OF_LIFE}

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
            got, sender = self._next_signal(pause if pause > 0 else 3600.0)
            if got in self._told:
                return
            if got == SIGNAL_OF_LIFE:
                self._heard_of(sender)
            for pid, number, began, how in self._ended():
                self._missing.append(number)
                logger.error("worker {} {}; starting another", pid, how)
                start_at = began + RESTART_SECONDS

    def _end(self) -> None:
        """Tell them to end, as often as this process is told; those that do not are killed."""
        logger.info("stopping")
        self._supervisor.stopping()
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self._alive:
            got, _ = self._next_signal(deadline - time.monotonic())
            if got in self._told:
                self._send(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + FORCE_SECONDS)
            elif got is None:
                logger.warning("{} workers did not end in time and are killed", len(self._alive))
                self._send(signal.SIGKILL)
                deadline = time.monotonic() + STOP_SECONDS
            self._ended()

    def _heard_of(self, pid: int) -> None:
        """Pass it on once all workers have been heard of."""
        self._lively.add(pid)
        if self._missing or not self._alive.keys() <= self._lively:
            return
        self._lively.clear()
        if not self._ready:
            self._ready = True
            self._supervisor.ready(f"{self._number} workers answer")
        else:
            self._supervisor.beat()

    def _start(self, number: int) -> None:
        parent = Parent(os.getpid(), self._watched, self._supervisor.beat_seconds)
        if pid := os.fork():
            self._alive[pid] = number, time.monotonic()
            return
        code = 1
        try:
            os.setpgid(0, 0)
            os.close(self._held)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._work(number, parent)
        except KeyboardInterrupt:  # told before it had begun
            code = 0
        except BaseException as error:  # noqa: BLE001 - it must not return into what the parent was doing
            logger.opt(exception=error).critical("the worker failed")
        finally:
            logs.flush()
            os._exit(code)

    def _next_signal(self, seconds: float) -> tuple[int | None, int]:
        """Its number, None after so many seconds without any, and the process that sent it."""
        got = signal.sigtimedwait(self._awaited, max(0.0, seconds))
        return (None, 0) if got is None else (got.si_signo, got.si_pid)

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
