"""Entry point of `marketflow watch`: chooses the output, and ends on signals."""

import asyncio
import signal
import sys
from contextlib import aclosing, suppress
from dataclasses import dataclass

from rich.console import Console

from marketflow.api.streaming.events import Snapshot
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.day_volumes import keep_volumes, put_volumes
from marketflow.cli.watch.lines import print_lines
from marketflow.cli.watch.screen import PAINT_SECONDS, show
from marketflow.cli.watch.stream_client import follow
from marketflow.cli.watch.stream_events import Lost
from marketflow.cli.watch.table import Size, render
from marketflow.errors import SettingsError, StartError
from marketflow.settings import HttpSettings
from marketflow.tasks import cancel
from marketflow.text import host_port, without_credentials


@dataclass(frozen=True)
class Watch:
    """Arguments of `marketflow watch`.

    Args:
        url: the MarketFlow to connect to.
        symbols: symbols of the subscription; all if empty.
        exchanges: exchanges of the subscription; all if empty.
        once: whether to print one table and exit.
    """

    url: str
    symbols: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()
    once: bool = False


def url_of(http: HttpSettings) -> str:
    """Return the URL of the MarketFlow that runs with these settings.

    Raises:
        SettingsError: the port is 0, that is any free one.
    """
    if http.port == 0:
        raise SettingsError("http.port is 0, any free one: set --url to the URL that MarketFlow logged at its start")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)  # noqa: S104 - a client needs one address
    return f"http://{host_port(host, http.port)}"


def watch(arguments: Watch) -> bool:
    """Show prices until q, SIGINT, SIGTERM or SIGHUP; return whether `once` was interrupted before it was done.

    Raises:
        SettingsError: the server does not know a symbol or an exchange.
        StartError: the URL is no MarketFlow, or is unreachable with `once`.
        BrokenPipeError: the reader of stdout has closed it.
    """
    return asyncio.run(_watch(arguments))


async def _watch(arguments: Watch) -> bool:
    quit = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, quit.set)
    showing = asyncio.create_task(_show(arguments, quit))
    quitting = asyncio.create_task(quit.wait())
    await asyncio.wait((showing, quitting), return_when=asyncio.FIRST_COMPLETED)
    if showing.done():
        await cancel(quitting)
        showing.result()
        return False
    showing.cancel()
    with suppress(asyncio.CancelledError):
        await showing
    return arguments.once


async def _show(arguments: Watch, quit: asyncio.Event) -> None:
    names = {"symbols": ",".join(arguments.symbols), "exchanges": ",".join(arguments.exchanges)}
    query = {name: value for name, value in names.items() if value}
    shown_url = without_credentials(arguments.url)
    on_screen = not arguments.once and _is_screen()
    async with aclosing(follow(arguments.url, query, PAINT_SECONDS / 2 if on_screen else 0.0)) as events:
        if arguments.once:
            state = ClientState()
            async for event in events:
                if isinstance(event, Lost):
                    raise StartError(f"{shown_url}: {event.reason}")
                state.apply(event)
                if isinstance(event, Snapshot):
                    break
            await put_volumes(state, arguments.url, arguments.exchanges)
            print_once(state, shown_url)
        elif on_screen:
            await show(
                events, arguments.url, quit.set, lambda state: keep_volumes(state, arguments.url, arguments.exchanges)
            )
        else:
            await print_lines(events, shown_url)


def print_once(state: ClientState, url: str) -> None:
    """Print the table, cut to the width of the terminal if stdout is one."""
    terminal = Console(highlight=False, emoji=False, markup=False)
    if terminal.is_terminal:
        terminal.print(render(state, url, Size(terminal.width)))
    else:
        Console(width=10_000, highlight=False, emoji=False, markup=False).print(render(state, url, Size()))


def _is_screen() -> bool:
    """Return whether stdout is a terminal with cursor control."""
    return sys.stdout is not None and sys.stdout.isatty() and not Console().is_dumb_terminal
