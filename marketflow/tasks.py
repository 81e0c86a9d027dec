"""Background tasks of an event loop that end before what they use is closed, timeouts for a loop that is behind,
blocking calls that hold nothing up, and pauses between attempts.
"""

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from marketflow.errors import Unavailable

_T = TypeVar("_T")

CANCEL_SECONDS = 2.0
"""How long a cancelled task may take to end. A stop does not hang with a task that does not."""

CANCEL_AGAIN_SECONDS = 1.0
"""How long until a cancelled task that has not ended is cancelled again, which cuts its cleanup off."""

STEPS = 25
"""Timers in a row that make one timeout: so often at least the loop reads what has come before it gives up."""


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait for their end, without raising what they raise.

    Again those that go on: an error in their cleanup may have taken the place of the cancellation.
    """
    running = [task for task in tasks if not task.done()]
    if running:
        with suppress(TimeoutError):
            async with timeout(CANCEL_SECONDS):
                pending = {*running}
                while pending:
                    for task in pending:
                        task.cancel()
                    _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECONDS)
        for task in running:
            if not task.done():
                from loguru import logger  # lazily: the Python clients, which use this module, have no log

                logger.warning("a cancelled task does not end: task={}", task.get_coro())
            elif not task.cancelled():
                task.exception()  # taken, so that asyncio does not log it as well


def raise_if_cancelled() -> None:
    """End a task that was cancelled and goes on: to be called where it has caught an error of its cleanup instead.

    Closing the connection of a cancelled read may fail. Not for use after a TaskGroup that only waits for its tasks: in
    Python 3.11 one of them that fails leaves the mark of a cancellation.

    Raises:
        CancelledError: the current task was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def log_failure(task: "asyncio.Task[Any]") -> None:
    """Log the exception with which a task ended, if it has."""
    if not task.cancelled() and (error := task.exception()) is not None:
        from loguru import logger

        logger.opt(exception=error).error("a background task failed, which is a bug")


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine while the block runs; cancel it and wait for its end afterwards."""
    task = asyncio.create_task(work)
    task.add_done_callback(log_failure)
    try:
        yield
    finally:
        await cancel(task)


@asynccontextmanager
async def timeout(seconds: float, progress: Callable[[], object] = lambda: None) -> AsyncIterator[None]:
    """Limit what the block awaits, as asyncio.timeout does, by time in which the event loop kept up.

    By the clock a starved loop would miss answers that have long come: its timer is due before they are read. What
    goes on is cancelled again: in Python 3.11 asyncio.wait_for, by which redis-py writes, returns in spite of a
    cancellation that comes when it is done, and the read after that would last until its own timeout.

    Args:
        seconds: the limit.
        progress: a value; each change begins the limit anew.

    Raises:
        TimeoutError: the limit has passed.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "asyncio.timeout needs one, too"
    async with asyncio.timeout(None) as limit:
        left, seen = STEPS, progress()
        cancelled_again = 0
        timer: asyncio.TimerHandle

        def step() -> None:
            nonlocal left, seen, timer
            now = progress()
            left, seen = (STEPS, now) if now != seen else (left - 1, seen)
            if left > 0:
                timer = loop.call_later(seconds / STEPS, step)
            else:
                limit.reschedule(loop.time())
                timer = loop.call_later(min(seconds, CANCEL_AGAIN_SECONDS), cancel_again)

        def cancel_again() -> None:
            nonlocal cancelled_again, timer
            cancelled_again += 1
            task.cancel()
            timer = loop.call_later(min(seconds, CANCEL_AGAIN_SECONDS), cancel_again)

        timer = loop.call_later(seconds / STEPS, step)
        try:
            yield
        finally:
            timer.cancel()
            for _ in range(cancelled_again):  # asyncio.timeout takes its own back, and raises TimeoutError
                task.uncancel()


class SerialCalls:
    """Blocking calls on threads, one at a time: however many wait, they take one thread of the event loop's pool.

    The pool has few threads, and all else that blocks needs them, a stop included.

    Args:
        seconds: how long a call waits for those before it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = asyncio.Lock()

    async def run(self, call: Callable[[], _T]) -> _T:
        """Return what a call returns.

        Raises:
            Unavailable: those before it take too long.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await self._lock.acquire()
        except TimeoutError:
            raise Unavailable("earlier changes are still under way") from None
        try:
            return await asyncio.to_thread(call)
        finally:
            self._lock.release()


async def on_daemon_thread(call: Callable[[], _T]) -> _T:
    """Return what a blocking call returns.

    A cancelled one goes on, and holds up neither the end of the process nor the threads that asyncio shares.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except Exception as caught:  # noqa: BLE001 - handed off
            error = caught
        with suppress(RuntimeError):  # the loop may have ended, and with it the waiting task
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="blocking-call", daemon=True).start()
    return await future


async def connected_socket(host: str, port: int) -> socket.socket:
    """Connect to a host, whose name is looked up on a daemon thread: a lookup cannot be cancelled.

    Raises:
        OSError: it cannot be looked up, or none of its addresses accepts.
    """
    found = await on_daemon_thread(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    failed = OSError("no address")
    for family, kind, protocol, _, address in found:
        connecting = socket.socket(family, kind, protocol)
        connecting.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connecting, address)
        except OSError as error:
            connecting.close()
            failed = error
        except BaseException:
            connecting.close()
            raise
        else:
            return connecting
    raise failed


class LookupLoop(asyncio.SelectorEventLoop):
    """An event loop that ends at once although a lookup of a host name hangs."""

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        """As of asyncio, but on a daemon thread."""
        return await on_daemon_thread(partial(socket.getaddrinfo, host, port, family, type, proto, flags))


class Backoff:
    """Pauses between attempts: doubled from `first` to `cap` seconds, each cut by up to `jitter` of itself.

    Args:
        first: seconds after the first failure.
        cap: seconds at most.
        jitter: greatest random part subtracted, so that many clients do not reconnect at the same moment.
        uniform: returns a random number in [0, 1).
    """

    def __init__(
        self,
        first: float = 1.0,
        cap: float = 30.0,
        jitter: float = 0.2,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._first, self._cap, self._jitter, self._uniform = first, cap, jitter, uniform

    def pause(self, failures: int) -> float:
        """Seconds to wait after this number of failures in a row (at least one)."""
        doublings = min(failures - 1, 60)  # beyond, a float could overflow
        return min(self._cap, self._first * 2.0**doublings) * (1 - self._jitter * self._uniform())
