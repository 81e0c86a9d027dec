"""Worker processes of the API, forked and supervised by one parent.

uvicorn's own supervisor has all workers accept from one socket, which sends most connections to one of them, leaves
workers behind when it is killed, and knows no service notification. Replicas run by the service manager would each need
a port of their own, and a proxy in front.

Workers are forked before any thread starts, so they share loaded code and inherit one listening socket each. The parent
replaces a worker that ends and keeps its socket open meanwhile. Workers have process groups of their own: Ctrl+C
reaches only the parent, which sends SIGTERM. If the parent is killed, they see the end of a pipe and stop. The parent
notifies the service manager once every worker has reported ready, or alive, by a queued real-time signal.
"""

import os
import signal
import time
from collections.abc import Callable

from loguru import logger

from marketflow import logs
from marketflow.server.hangup import Hangup
from marketflow.server.service_notification import Supervisor

RESTART_SECONDS = 1.0
"""Least time between two starts of a worker: what ended it may do so again."""

STOP_SECONDS = 5.0
"""How long the workers may take to stop."""

FORCE_SECONDS = 1.5
"""The same, once a second signal forces the stop."""


SIGNAL_OF_LIFE = signal.SIGRTMIN
"""Sent by a worker to its parent when it is ready, and periodically while it is alive."""


class Parent(Supervisor):
    """The parent, as its workers notify it.

    Args:
        pid: its process.
        gone: a file descriptor that becomes readable when the parent has ended.
        beat_seconds: interval of liveness notifications.
    """

    def __init__(self, pid: int, gone: int, beat_seconds: float | None) -> None:
        super().__init__(beat_seconds)
        self._pid = pid
        self.gone = gone

    def ready(self, doing: str) -> None:
        """Report that this worker serves."""
        self.beat()

    def beat(self) -> None:
        """Report that this worker is alive."""
        if os.getppid() == self._pid:
            os.kill(self._pid, SIGNAL_OF_LIFE)


class Workers:
    """Runs workers until SIGINT or SIGTERM, or its terminal is closed. For a process without threads.

    SIGHUP is passed to all workers, which read the settings again.

    Args:
        number: of workers.
        work: runs a worker, given its index, until SIGTERM or the end of its parent; returns the exit code.
        supervisor: notified once all workers are ready, and while all are alive.
    """

    def __init__(self, number: int, work: Callable[[int, Parent], int], supervisor: Supervisor) -> None:
        self._work = work
        self._number = number
        self._supervisor = supervisor
        self._ready = False
        self._lively: set[int] = set()  # workers that have reported since all of them had
        self._missing = list(range(number))
        self._alive: dict[int, tuple[int, float]] = {}  # index and start time, by pid
        stops = (signal.SIGINT, signal.SIGTERM)
        self._stop_signals = {each for each in stops if signal.getsignal(each) is not signal.SIG_IGN}
        self._reloads = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as under nohup
        self._hangup = Hangup()
        hangups = {signal.SIGHUP} if self._reloads else set()
        self._awaited = {*self._stop_signals, *hangups, signal.SIGCHLD, SIGNAL_OF_LIFE}

    def run(self) -> None:
        """Run the workers, and return when all have ended."""
        # Blocked, so that they queue until sigtimedwait takes them: nothing here is interrupted.
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
            if got in self._stop_signals or (got == signal.SIGHUP and self._hangup.is_of_terminal):
                return
            if got == signal.SIGHUP:
                self._send(signal.SIGHUP)
            if got == SIGNAL_OF_LIFE:
                self._record_sign_of_life(sender)
            for pid, number, began, how in self._ended():
                self._missing.append(number)
                logger.error("worker {} {}; starting another", pid, how)
                start_at = began + RESTART_SECONDS

    def _end(self) -> None:
        """Send SIGTERM to the workers, once for each stop signal received; kill those that do not end in time."""
        logger.info("stopping")
        self._supervisor.stopping()
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self._alive:
            got, _ = self._next_signal(deadline - time.monotonic())
            if got in self._stop_signals:  # a second one forces them
                self._send(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + FORCE_SECONDS)
            elif got is None:
                logger.warning("{} workers did not end in time and are killed", len(self._alive))
                self._send(signal.SIGKILL)
                deadline = time.monotonic() + STOP_SECONDS
            self._ended()

    def _record_sign_of_life(self, pid: int) -> None:
        """Notify the supervisor once every worker has reported."""
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
            if self._reloads:  # until its server handles it; the settings have just been read
                signal.signal(signal.SIGHUP, lambda *_: None)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._work(number, parent)
        except KeyboardInterrupt:  # stopped before it had begun
            code = 0
        except BaseException as error:  # noqa: BLE001 - it must not return into what the parent was doing
            logger.opt(exception=error).critical("the worker failed")
        finally:
            logs.flush()
            os._exit(code)

    def _next_signal(self, seconds: float) -> tuple[int | None, int]:
        """Return the next signal and its sender; None after `seconds` without any."""
        got = signal.sigtimedwait(self._awaited, max(0.0, seconds))
        return (None, 0) if got is None else (got.si_signo, got.si_pid)

    def _send(self, number: int) -> None:
        for pid in self._alive:
            os.kill(pid, number)  # the process exists until it is reaped

    def _ended(self) -> list[tuple[int, int, float, str]]:
        """Reap workers; return pid, index, start time and reason of each that has ended."""
        ended = []
        for pid in list(self._alive):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                code = os.waitstatus_to_exitcode(status)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                ended.append((pid, *self._alive.pop(pid), how))
        return ended
