"""Prices for a pipe: a line for each change. What becomes of the connection is told on stderr."""

import sys
from collections.abc import AsyncIterable

from marketflow.cli.watch.market import Market
from marketflow.cli.watch.messages import Connected, Lost, Message, Price
from marketflow.text import rfc3339, visible


async def print_lines(messages: AsyncIterable[Message], url: str) -> None:
    """Print time, symbol, exchange and price of each change until it is cancelled."""
    market = Market()
    lost = False
    async for message in messages:
        match message:
            case Lost() if not lost:
                lost = True
                print(f"marketflow: {url}: {visible(message.reason)}; trying again", file=sys.stderr, flush=True)
            case Connected() if lost:
                lost = False
                print(f"marketflow: {url}: connected", file=sys.stderr, flush=True)
        if news := market.take(message):
            print("\n".join(map(_line, news)), flush=True)


def _line(news: Price) -> str:
    at = rfc3339(news.timestamp)
    return f"{at} {visible(news.symbol)} {visible(news.exchange)} {news.price!r}"
