"""Output of `marketflow watch` to a pipe: a line for each change on stdout, losses of the connection on stderr."""

import sys
from collections.abc import AsyncIterable

from marketflow.api.routes.latest_price import LatestPrice
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.stream_events import Connected, Lost, WatchEvent
from marketflow.text import visible


async def print_lines(events: AsyncIterable[WatchEvent], url: str) -> None:
    """Print time, symbol, exchange and price of each change until cancelled."""
    state = ClientState()
    lost = False
    async for event in events:
        match event:
            case Lost() if not lost:
                lost = True
                print(f"marketflow: {url}: {visible(event.reason)}; trying again", file=sys.stderr, flush=True)
            case Connected() if lost:
                lost = False
                print(f"marketflow: {url}: connected", file=sys.stderr, flush=True)
        if changed := state.apply(event):
            print("\n".join(map(_line, changed)), flush=True)


def _line(price: LatestPrice) -> str:
    return f"{price.timestamp} {visible(price.symbol)} {visible(price.exchange)} {price.price!r}"
