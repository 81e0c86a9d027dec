"""Full-screen output of `marketflow watch`; restores the terminal at the end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterable, Callable, Coroutine

from rich.console import Console, RenderableType
from rich.live import Live

from marketflow.api.streaming.events import Snapshot
from marketflow.cli.watch.candle_client import CandlePanel, keep_candles
from marketflow.cli.watch.candle_table import render_candles
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.keyboard import Key, keys
from marketflow.cli.watch.stream_events import WatchEvent
from marketflow.cli.watch.table import Size, render
from marketflow.cli.watch.view import View
from marketflow.tasks import cancel
from marketflow.text import without_credentials

PAINT_SECONDS = 0.2
"""Interval of repaints; ages and fading colours change without events as well. A key repaints at once."""


async def show(
    events: AsyncIterable[WatchEvent],
    url: str,
    quit: Callable[[], None],
    keep_volumes: Callable[[ClientState], Coroutine[None, None, None]],
) -> None:
    """Paint the state until cancelled.

    Args:
        events: what changes the state.
        url: URL of the application; it is shown without credentials.
        quit: is called when q is typed.
        keep_volumes: keeps the volumes of the state up to date; begun anew with each snapshot.
    """
    volumes: asyncio.Task[None] | None = None
    console = Console(highlight=False, emoji=False, markup=False)
    state, view, panel = ClientState(), View(ascii=console.options.ascii_only), CandlePanel()
    pressed, chosen = asyncio.Event(), asyncio.Event()

    def press(key: Key) -> None:
        if key is Key.QUIT:
            quit()
        before = view.candles
        view.press(key, state)
        pressed.set()
        if view.candles != before:
            chosen.set()

    def frame() -> RenderableType:
        shown_url, size = without_credentials(url), Size(*console.size)
        if view.candles is None:
            return render(state, shown_url, size, view)
        return render_candles(state, shown_url, size, view, view.candles, panel)

    with keys(press) as terminal, Live(console=console, screen=True, auto_refresh=False) as live:

        def suspend() -> None:
            """On Ctrl+Z: restore the terminal, stop the process, and take the terminal again on SIGCONT."""
            live.stop()
            with terminal():
                os.kill(os.getpid(), signal.SIGSTOP)
            live.start()

        async def paint() -> None:
            while True:
                pressed.clear()
                live.update(frame(), refresh=True)
                try:
                    await asyncio.wait_for(pressed.wait(), PAINT_SECONDS)
                except TimeoutError:
                    continue

        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, suspend)
        painting = asyncio.create_task(paint())
        candles = asyncio.create_task(keep_candles(panel, url, lambda: view.candles, chosen))
        try:
            async for event in events:
                state.apply(event)
                if isinstance(event, Snapshot):
                    if volumes is not None:
                        await cancel(volumes)
                    volumes = asyncio.create_task(keep_volumes(state))
                for task in (painting, candles):
                    if task.done():
                        task.result()
        finally:
            for task in (painting, candles, *([volumes] if volumes else [])):
                await cancel(task)
