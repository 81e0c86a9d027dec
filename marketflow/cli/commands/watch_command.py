"""`marketflow watch`: live prices in the terminal."""

from itertools import chain
from pathlib import Path

import click

from marketflow.cli.command import Command
from marketflow.cli.exit_codes import INTERRUPTED
from marketflow.cli.options import BaseUrl, ExchangeNames, Symbols, config_option, option


@click.command(
    "watch",
    cls=Command,
    short_help="Show live prices in the terminal.",
    epilog="Where stdout is no terminal each change is a line: time, symbol, exchange, price. While MarketFlow is"
    " unreachable, watch reconnects after 1, 2, 4 ... at most 10 s. Exit code 0: ended by q or a signal, 1: there is"
    " no MarketFlow at the URL, 2: an argument or a setting is wrong, 130: --once was interrupted.",
)
@click.argument("symbols", metavar="[SYMBOL]...", nargs=-1, type=Symbols())
@option("--exchange", "exchanges", metavar="E", multiple=True, type=ExchangeNames(), help="Exchanges, E,E.  [all]")
@option("--url", metavar="URL", type=BaseUrl(), help="URL of MarketFlow.  [by http.host and http.port]")
@option("--once", is_flag=True, help="Print the current prices, and end.")
@config_option()
def command(
    symbols: tuple[tuple[str, ...], ...],
    exchanges: tuple[tuple[str, ...], ...],
    url: str | None,
    once: bool,
    config: Path | None,
) -> int:
    """Show the newest prices of a running MarketFlow as they change.

    A row is a symbol and a column an exchange; with the age of each price, the gap between the exchanges (in basis
    points, and on which to buy and to sell) and, where it is known, the volume of 24 hours in the base currency.

    Keys on a terminal, which the last line shows: arrows select a symbol and move between exchanges, s and r sort,
    Enter shows the candles of the symbol (i: their interval), q ends it. Arguments such as BTCUSDT ETHUSDT are the
    symbols to show, all of them by default.
    """
    from marketflow import logs, settings

    loaded = settings.load(config)
    logs.setup("CRITICAL", loaded.log.format)  # the screen shows the state of the connection

    from marketflow.cli.stdout import readable_output
    from marketflow.cli.watch import Watch, url_of, watch

    symbol_names, exchange_names = (tuple(chain.from_iterable(names)) for names in (symbols, exchanges))
    interrupted = False
    with readable_output():
        interrupted = watch(Watch(url or url_of(loaded.http), symbol_names, exchange_names, once))
    return INTERRUPTED if interrupted else 0
