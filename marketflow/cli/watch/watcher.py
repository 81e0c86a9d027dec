"""Puts a watch together: who shows what is told, and how it ends."""

import asyncio
import signal
import sys
from contextlib import aclosing, suppress
from dataclasses import dataclass

from rich.console import Console

from marketflow.cli.watch.lines import print_lines
from marketflow.cli.watch.market import Market
from marketflow.cli.watch.messages import Lost, Snapshot
from marketflow.cli.watch.screen import PAINT_SECONDS, show
from marketflow.cli.watch.stream import follow
from marketflow.cli.watch.table import Room, render
from marketflow.errors import SettingsError, StartError
from marketflow.settings import HttpSettings
from marketflow.tasks import cancel
from marketflow.text import host_port, without_credentials


@dataclass(frozen=True)
class Watch:
    """What to watch: of the MarketFlow at a URL, some symbols and exchanges (none: all), once or as long as it runs."""

    url: str
    symbols: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()
    once: bool = False


def url_of(http: HttpSettings) -> str:
    """Where the MarketFlow of these settings answers.

    Raises:
        SettingsError: it takes any free port.
    """
    if http.port == 0:
        raise SettingsError("http.port is 0, any free one: set --url to what MarketFlow said at its start")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)  # noqa: S104 - that is every address
    return f"http://{host_port(host, http.port)}"


def watch(wanted: Watch) -> bool:
    """Show prices until q, SIGINT, SIGTERM or SIGHUP; gives whether it was ended before it was done, as only once can.

    Raises:
        SettingsError: the server knows no such symbol or exchange.
        StartError: what answers at the URL is no MarketFlow, or nothing does and prices are wanted once.
        BrokenPipeError: nobody reads stdout on.
    """
    return asyncio.run(_watch(wanted))


async def _watch(wanted: Watch) -> bool:
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    showing = asyncio.create_task(_show(wanted, told))
    ending = asyncio.create_task(told.wait())
    await asyncio.wait((showing, ending), return_when=asyncio.FIRST_COMPLETED)
    if showing.done():
        await cancel(ending)
        showing.result()
        return False
    showing.cancel()
    with suppress(asyncio.CancelledError):
        await showing
    return wanted.once


async def _show(wanted: Watch, told: asyncio.Event) -> None:
    names = {"symbols": ",".join(wanted.symbols), "exchanges": ",".join(wanted.exchanges)}
    query = {name: value for name, value in names.items() if value}
    shown_url = without_credentials(wanted.url)
    on_screen = not wanted.once and _is_screen()
    async with aclosing(follow(wanted.url, query, PAINT_SECONDS / 2 if on_screen else 0.0)) as messages:
        if wanted.once:
            market = Market()
            async for message in messages:
                if isinstance(message, Lost):
                    raise StartError(f"{shown_url}: {message.reason}")
                market.take(message)
                if isinstance(message, Snapshot):
                    break
            print_once(market, shown_url)
        elif on_screen:
            await show(messages, shown_url, told.set)
        else:
            await print_lines(messages, shown_url)


def print_once(market: Market, url: str) -> None:
    """Print the table; all of it, where stdout is no terminal."""
    terminal = Console(highlight=False, emoji=False, markup=False)
    if terminal.is_terminal:
        terminal.print(render(market, url, Room(terminal.width)))
    else:
        Console(width=10_000, highlight=False, emoji=False, markup=False).print(render(market, url, Room()))


def _is_screen() -> bool:
    """Whether stdout is a terminal that can be painted on."""
    return sys.stdout is not None and sys.stdout.isatty() and not Console().is_dumb_terminal
