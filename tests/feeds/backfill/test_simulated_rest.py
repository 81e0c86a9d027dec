"""The REST client against simulated venues: whole minutes of trades, and candles that are their fold."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.backfill.minute_trades import BehindStream, trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.backfill.venue_candles import candles_between
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS
from tests.support.venue_server import VenueServer

NOW = milliseconds(system_clock()) // MINUTE_MS * MINUTE_MS + 5_000
MINUTE = NOW - 5_000 - 3 * MINUTE_MS

WITH_TRADES = ("binance", "coinbase", "kraken", "okx")


@contextmanager
def serving(venue: str) -> Iterator[tuple[VenueServer, RestClient, str]]:
    def clock() -> int:
        return NOW * 1_000_000

    with VenueServer(venue, ["BTCUSDT"], limited=True, clock=clock) as server:
        budget = AttemptBudget(10**6, 1.0, time.monotonic)
        client = RestClient(VENUES[venue], server.rest_url, budget, clock)
        (listed,) = client.instruments()
        yield server, client, listed.rest_symbol or listed.symbol
        client.close()


def filled(server: VenueServer, count: int) -> list[Trade]:
    """Three minutes of trades, some at one time."""
    chance = random.Random(7)
    times = sorted(chance.randrange(MINUTE - MINUTE_MS, MINUTE + 2 * MINUTE_MS) for _ in range(count))
    trades = [
        server.make(
            5000 + number,
            price=round(chance.uniform(83_000, 85_000), 1),
            quantity=round(chance.uniform(1e-5, 2), 5),
            at=at - at % 50,
            side="buy" if chance.random() < 0.5 else "sell",
        )
        for number, at in enumerate(times)
    ]
    for trade in trades:
        server.book.add(trade)
    return trades


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_minute_of_a_simulated_venue_is_whole(venue: str) -> None:
    with serving(venue) as (server, client, symbol):
        expected = [trade for trade in filled(server, 1200) if MINUTE <= trade.at < MINUTE + MINUTE_MS]
        found = trades_of_minute(client, symbol, MINUTE, 5000 + 1199)
        singles = [(trade.id, trade.price, trade.quantity, trade.at, trade.side) for trade in found if trade.count == 1]
        assert set(singles) <= {(each.id, each.price, each.quantity, each.at, each.side) for each in expected}
        assert sum(trade.count for trade in found) == len(expected)
        assert sum(trade.quantity for trade in found) == pytest.approx(sum(each.quantity for each in expected))


@pytest.mark.parametrize("venue", VENUES)
def test_candles_of_a_simulated_venue_are_read(venue: str) -> None:
    with serving(venue) as (server, client, symbol):
        trades = [trade for trade in filled(server, 1200) if MINUTE <= trade.at < MINUTE + MINUTE_MS]
        candles = candles_between(client, symbol, MINUTE, MINUTE + MINUTE_MS, NOW)
        values = candles[MINUTE].values
        assert values.close == trades[-1].price
        assert values.volume == pytest.approx(sum(trade.quantity for trade in trades))
        assert values.ticks in (None, len(trades))
        if venue != "bybit":  # opens at the last close
            assert (values.open, values.high) == (trades[0].price, max(trade.price for trade in trades))
        quiet = candles_between(client, symbol, MINUTE + 2 * MINUTE_MS, NOW - 5_000, NOW)
        assert quiet == {}


@pytest.mark.parametrize("venue", ["coinbase", "okx"])
def test_rest_behind_the_stream_is_noticed(venue: str) -> None:
    with serving(venue) as (server, client, symbol):
        filled(server, 100)
        with pytest.raises(BehindStream):
            trades_of_minute(client, symbol, MINUTE + MINUTE_MS, 5200)
