"""Limits of the system on threads and memory: refused in words at the start where they are too low to run.

Where a thread or memory is lacking later, any code may fail, that of a shutdown included.
"""

import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from marketflow.errors import StartError

BLOCKING_THREADS = 8
"""Threads for the blocking calls of an event loop. All are started at once: a stop needs them, too."""

THREADS = 36
"""Threads and processes that the default settings need; 38 were counted, those of the embedded servers included."""

ADDRESS_SPACE_BYTES = 1_200_000 * 1024
"""What the default settings map, for the stacks and heaps of threads. Of less, libraries crash that get no memory."""

NO_THREAD = "can't start new thread"
"""Text of the RuntimeError of Python."""


def refuse_low_limits() -> None:
    """Refuse a start that would lack threads or address space.

    Raises:
        StartError: a limit is too low; with its name.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < ADDRESS_SPACE_BYTES:
        raise StartError(
            f"the system limits the address space of this process to {allowed // 1024} KiB (ulimit -v);"
            f" {ADDRESS_SPACE_BYTES // 1024} are needed, less than a tenth of them as memory: raise that limit,"
            " or limit the memory of a control group instead (MemoryMax of systemd)"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        _start_all(pool, THREADS)


def blocking_threads() -> ThreadPoolExecutor:
    """Return a pool for the blocking calls of an event loop, with all of its threads running.

    Raises:
        StartError: the system allows too few threads.
    """
    pool = ThreadPoolExecutor(BLOCKING_THREADS, "blocking-call")
    _start_all(pool, BLOCKING_THREADS)
    return pool


@contextmanager
def limits_in_words() -> Iterator[None]:
    """Raise a lack of threads or memory as an error in words.

    Raises:
        StartError: the system gives no more of them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (limit := error_of_limit(error)) is None:
            raise
        raise limit from error


def error_of_limit(error: BaseException) -> StartError | None:
    """Return in words that the system gives no more threads or memory; None where that is not what the error says."""
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return StartError(
            f"the system allows no more threads; MarketFlow and its servers need {THREADS}, more with more exchanges:"
            " raise the limit of the user or the container (ulimit -u, TasksMax of systemd, pids.max)"
        )
    if isinstance(error, MemoryError):
        return StartError("the system gives no more memory")
    return None


def _start_all(pool: ThreadPoolExecutor, count: int) -> None:
    """Start the threads of a pool, which is shut down if one cannot be started."""
    all_run = threading.Barrier(count)
    with limits_in_words():
        try:
            for _ in range(count):
                pool.submit(all_run.wait)
        except BaseException:  # a signal as well: the threads would wait for those that are not started
            all_run.abort()
            pool.shutdown(wait=False)
            raise
