"""Full-screen output of `marketflow watch`; restores the terminal at the end."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.live import Live

from marketflow.api.streaming.events import Snapshot
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.stream_events import WatchEvent
from marketflow.cli.watch.table import Size, render
from marketflow.tasks import cancel

PAINT_SECONDS = 0.2
"""Interval of repaints; ages and fading colours change without events as well."""

_QUIT = b"qQ\x04"


async def show(
    events: AsyncIterable[WatchEvent],
    url: str,
    quit: Callable[[], None],
    keep_volumes: Callable[[ClientState], Coroutine[None, None, None]],
) -> None:
    """Paint the state until cancelled.

    Args:
        events: what changes the state.
        url: as it is shown.
        quit: is called when q is typed.
        keep_volumes: keeps the volumes of the state up to date; begun anew with each snapshot.
    """
    volumes: asyncio.Task[None] | None = None
    state = ClientState()
    console = Console(highlight=False, emoji=False, markup=False)
    with _keys(quit) as terminal, Live(console=console, screen=True, auto_refresh=False) as live:

        def suspend() -> None:
            """On Ctrl+Z: restore the terminal, stop the process, and take the terminal again on SIGCONT."""
            live.stop()
            with terminal():
                os.kill(os.getpid(), signal.SIGSTOP)
            live.start()

        async def paint() -> None:
            while True:
                live.update(render(state, url, Size(*console.size)), refresh=True)
                await asyncio.sleep(PAINT_SECONDS)

        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, suspend)
        painting = asyncio.create_task(paint())
        try:
            async for event in events:
                state.apply(event)
                if isinstance(event, Snapshot):
                    if volumes is not None:
                        await cancel(volumes)
                    volumes = asyncio.create_task(keep_volumes(state))
                if painting.done():
                    painting.result()
        finally:
            for task in (painting, *([volumes] if volumes else [])):
                await cancel(task)


@contextmanager
def _keys(quit: Callable[[], None]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Read single keys if stdin is a terminal; yield a context manager that restores its mode meanwhile."""
    if sys.stdin is None or not sys.stdin.isatty():  # None where it is closed
        yield nullcontext
        return
    loop, file = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(file)

    def read() -> None:
        typed = os.read(file, 1024)
        if not typed:
            loop.remove_reader(file)
        if any(key in _QUIT for key in typed):
            quit()

    @contextmanager
    def restored() -> Iterator[None]:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
        yield
        tty.setcbreak(file)

    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield restored
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)
