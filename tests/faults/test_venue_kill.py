"""MarketFlow on a venue, killed again and again: the venue's trades by REST make every minute exact."""

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from marketflow.feeds.venues.venue import Side, Trade
from marketflow.model import MINUTE_MS, Mode, Series, Slot, minute_start
from tests.faults.conftest import seconds_until
from tests.support.application import Application, now_ms, wait_until_over
from tests.support.oracle import Rows
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

SYMBOLS = ("BTCUSDT", "ETHUSDT")

RATE = 500
"""Trades a second."""

RATES = {"okx": 100}
"""Of venues whose REST is too slow for more: OKX gives pages of 100 trades, five of them a second."""

NOT_SENT = 797
"""Every trade whose number this divides is never sent."""

KILLING_SECONDS = 60
"""Time after which no further kill begins; on an idle machine all of them take half of it."""

SIDES: tuple[Side, Side] = ("buy", "sell")


class Trading:
    """Trades of a venue at a steady rate, kept for REST and sent to the last connection."""

    def __init__(self, server: VenueServer, rate: int = RATE) -> None:
        self._server, self._rate = server, rate
        self._random = random.Random(7)
        self._numbers = dict.fromkeys(SYMBOLS, 1_000_000)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.trades: defaultdict[tuple[str, int], list[Trade]] = defaultdict(list)
        """By our symbol and the start of their minute."""
        for symbol, number in self._numbers.items():  # a venue has older trades, by which a minute is known to be whole
            server.book.add(server.make(number, symbol, 100.0, 1.0, now_ms() - 3 * MINUTE_MS, "buy"))

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join(5)

    def _run(self) -> None:
        due = monotonic()
        while not self._ended.wait(max(0.0, due - monotonic())):
            due += 0.01
            for _ in range(self._rate // 100):
                self._trade(self._random.choice(SYMBOLS))

    def _trade(self, symbol: str) -> None:
        number = self._numbers[symbol] = self._numbers[symbol] + 1
        price, quantity = round(self._random.uniform(90, 110), 2), round(self._random.uniform(0.001, 2), 5)
        side = self._random.choice(SIDES)
        trade = self._server.make(number, symbol, price, quantity, now_ms(), side)
        self.trades[symbol, minute_start(trade.at)].append(trade)
        self._server.book.add(trade)
        if number % NOT_SENT and self._server.connections and self._server.received[-1]:
            with suppress(ConnectionClosed):
                self._server.send(self._server.dialect.trade(trade))


def row_of(trades: Sequence[Trade]) -> dict[str, float]:
    """The row of all trades of a minute, which ascend by id; sums by their decimal digits."""
    prices = [trade.price for trade in trades]

    def total(side: str | None, worth: bool) -> float:
        of_side = [each for each in trades if side in (None, each.side)]
        amounts = [Decimal(str(each.quantity)) * (Decimal(str(each.price)) if worth else 1) for each in of_side]
        return float(sum(amounts, Decimal()))

    return {
        "open_price": prices[0],
        "max_price": max(prices),
        "min_price": min(prices),
        "close_price": prices[-1],
        "tick_count": len(trades),
        "volume": total(None, worth=False),
        "turnover": total(None, worth=True),
        "buy_volume": total("buy", worth=False),
        "buy_turnover": total("buy", worth=True),
    }


Expected = Mapping[Slot, Mapping[str, float]]


def expected_rows(trading: Trading, venue: str, minutes: Sequence[int]) -> Expected:
    """Return the expected rows of these minutes, which are over."""
    return {
        Slot(Series(Mode.LIVE, venue, symbol), start): row_of(trading.trades[symbol, start])
        for symbol in SYMBOLS
        for start in minutes
    }


def wrong_rows(rows: Rows, expected: Expected) -> list[str]:
    """Describe the wrong rows."""
    found = {slot: {name: rows.get(slot, {}).get(name) for name in row} for slot, row in expected.items()}
    return [f"{slot}: {found[slot]} and not {row}" for slot, row in expected.items() if found[slot] != row]


def venue_settings(server: VenueServer, venue: str) -> dict[str, object]:
    return {
        "MODE": "live",
        "EXCHANGES": f'[{{name="{venue}",venue="{venue}",url="{server.url}",rest_url="{server.rest_url}"}}]',
        "SYMBOLS": f"[{','.join(repr(symbol) for symbol in SYMBOLS)}]",
    }


def kill_soon(application: Application, server: VenueServer, seconds: float) -> None:
    """Kill it some seconds after it has subscribed."""
    wait_until(lambda: server.connections and server.received[-1])
    threading.Event().wait(seconds)
    application.kill()


def read(application: Application, path: str, **query: str) -> Any:
    """Return the first good answer: on a busy machine PostgreSQL may answer too late for a request."""
    return wait_until(lambda: application.find(path, **query))


def all_holes(application: Application) -> list[dict[str, Any]]:
    holes: list[dict[str, Any]] = read(application, "/holes", limit="1000")["holes"]
    return holes


def states_of_holes(application: Application, until: int) -> set[str]:
    holes = all_holes(application)
    return {hole["state"] for hole in holes if datetime.fromisoformat(hole["to"]).timestamp() * 1000 < until}


def has_more(server: VenueServer, connections: int) -> bool:
    return len(server.connections) > connections


def killed_again_and_again(
    application: Application, server: VenueServer, kills: int, chance: random.Random
) -> list[int]:
    """Kill and start it repeatedly; return the minutes from the first kill on, once the last one is over.

    Less often on a machine so busy that starts take long, but twice within a minute.
    """
    killed: list[int] = []
    until = monotonic() + KILLING_SECONDS
    while len(killed) < kills and (monotonic() < until or max(Counter(killed).values()) < 2):
        connections = len(server.connections)
        kill_soon(application, server, chance.uniform(0.1, 1.5))
        killed.append(minute_start(now_ms()))
        application.start()
        wait_until(partial(has_more, server, connections))
    assert max(Counter(killed).values()) >= 2  # most often nearly all
    minutes = [*range(killed[0], minute_start(now_ms()) + 1, MINUTE_MS)]
    wait_until_over(minutes[-1] + MINUTE_MS)
    return minutes


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("venue", "kills", "seconds"), [("binance", 10, 25), ("coinbase", 10, 25), ("kraken", 4, 90), ("okx", 4, 90)]
)
def test_kills_within_a_minute_leave_rows_exact(
    server_folder: Path, servers: dict[str, object], rows: Callable[[], Rows], venue: str, kills: int, seconds: float
) -> None:
    """The pages of a minute take half a minute of what Kraken and OKX allow."""
    with VenueServer(venue, SYMBOLS) as server:
        trading = Trading(server, RATES.get(venue, RATE))
        with trading.running():
            wait_until(lambda: now_ms() % MINUTE_MS > 57_000, timeout=90)
            with Application(server_folder, servers | venue_settings(server, venue)) as application:
                minutes = killed_again_and_again(application, server, kills, random.Random(3))
                expected = expected_rows(trading, venue, minutes)
                with suppress(AssertionError):
                    seconds_until(lambda: not wrong_rows(rows(), expected), seconds)
                assert not wrong_rows(rows(), expected), application.log[-4000:]
                over = minutes[-1] + MINUTE_MS
                seconds_until(lambda: states_of_holes(application, over) == {"filled"}, 60)


@pytest.mark.timeout(300)
def test_kills_on_a_venue_without_older_trades_are_marked(
    server_folder: Path, servers: dict[str, object], rows: Callable[[], Rows]
) -> None:
    """Bybit gives its newest 60 trades: what a kill loses is a hole, and a candle that is not whole says so."""
    with VenueServer("bybit", SYMBOLS) as server:
        trading = Trading(server)
        with trading.running():
            wait_until(lambda: now_ms() % MINUTE_MS > 57_000, timeout=90)
            with Application(server_folder, servers | venue_settings(server, "bybit")) as application:
                minutes = killed_again_and_again(application, server, 4, random.Random(3))
                expected = expected_rows(trading, "bybit", minutes)
                with suppress(AssertionError):
                    seconds_until(lambda: not unmarked(application, rows(), expected), 45)
                assert not unmarked(application, rows(), expected), application.log[-4000:]
                assert wrong_rows(rows(), expected)
                seconds_until(lambda: "given_up" in states_of_holes(application, minutes[-1] + MINUTE_MS), 60)


def unmarked(application: Application, rows: Rows, expected: Expected) -> list[str]:
    """Return the rows that are wrong, and neither marked as incomplete nor the venue's own."""
    found = []
    for slot, row in expected.items():
        if not wrong_rows(rows, {slot: row}):
            continue
        at = datetime.fromtimestamp(slot.start / 1000, UTC).isoformat()
        until = datetime.fromtimestamp((slot.start + MINUTE_MS) / 1000, UTC).isoformat()
        path = f"/candles/{slot.series.exchange}/{slot.series.symbol}"
        candles = read(application, path, **{"interval": "1m", "from": at, "to": until})["candles"]
        if not any(each["complete"] is False or each["source"] == "venue" for each in candles):
            found.append(f"{slot}: {candles}")
    return found
