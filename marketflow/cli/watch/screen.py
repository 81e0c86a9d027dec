"""A terminal that shows the market as long as somebody looks: the whole screen, which is as before at the end."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.live import Live

from marketflow.cli.watch.market import Market
from marketflow.cli.watch.messages import Message
from marketflow.cli.watch.table import Room, render
from marketflow.tasks import cancel

PAINT_SECONDS = 0.2
"""How often what has changed is painted; ages and fading colours change by themselves."""

_QUIT = b"qQ\x04"


async def show(messages: AsyncIterable[Message], url: str, quit: Callable[[], None]) -> None:
    """Show what is told until it is cancelled; `quit` is called when the person types q."""
    market = Market()
    console = Console(highlight=False, emoji=False, markup=False)
    with _keys(quit) as terminal, Live(console=console, screen=True, auto_refresh=False) as live:

        def give_way() -> None:
            """On Ctrl+Z: leave the terminal as it was, and take it again when told to go on."""
            live.stop()
            with terminal():
                os.kill(os.getpid(), signal.SIGSTOP)
            live.start()

        async def paint() -> None:
            while True:
                live.update(render(market, url, Room(*console.size)), refresh=True)
                await asyncio.sleep(PAINT_SECONDS)

        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, give_way)
        painting = asyncio.create_task(paint())
        try:
            async for message in messages:
                market.take(message)
                if painting.done():
                    painting.result()
        finally:
            await cancel(painting)


@contextmanager
def _keys(quit: Callable[[], None]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Take single keys from the terminal, where stdin is one; gives how to leave it as it was for a while."""
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
    def as_before() -> Iterator[None]:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
        yield
        tty.setcbreak(file)

    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield as_before
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)
