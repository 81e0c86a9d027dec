"""All trades of a minute, each once, by the pages of each venue; or an error that says why there are none."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from marketflow.feeds.backfill.minute_trades import NotFillable, trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Trade
from tests.support.rest_server import RestServer
from tests.support.venue_pages import VenuePages

MINUTE = 1_790_667_420_000
SYMBOL = {"binance": "BTCUSDT", "coinbase": "BTC-USD", "kraken": "XBTUSD", "okx": "BTC-USDT", "bybit": "BTCUSDT"}
WITH_TRADES = ("binance", "coinbase", "kraken", "okx")


def trade(venue: str, number: int, at: int) -> Trade:
    return Trade(SYMBOL[venue], 84_035.5 + number % 7, 0.00000035, at, number, "buy" if number % 2 else "sell")


def steady(venue: str, count: int, every_ms: int, begin: int) -> list[Trade]:
    return [trade(venue, 1 + number, begin + number * every_ms) for number in range(count)]


def client_of(server: RestServer, venue: str) -> RestClient:
    budget = AttemptBudget(10**6, 1.0, lambda: 0.0)
    return RestClient(VENUES[venue], server.url, budget, lambda: (MINUTE + 3_600_000) * 1_000_000)


@contextmanager
def serving(venue: str, trades: list[Trade], page: int = 0) -> Iterator[tuple[RestServer, RestClient]]:
    with RestServer(VenuePages(venue, trades, page=page)) as server:
        client = client_of(server, venue)
        yield server, client
        client.close()


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_minute_over_several_pages_is_whole(venue: str) -> None:
    trades = steady(venue, 6_000, 20, MINUTE - 10_000)
    expected = [each for each in trades if MINUTE <= each.at < MINUTE + 60_000]
    assert len(expected) == 3000
    with serving(venue, trades) as (_, client):
        assert trades_of_minute(client, SYMBOL[venue], MINUTE, 6_000) == expected
        assert trades_of_minute(client, SYMBOL[venue], MINUTE, None) == expected


def test_bybit_has_no_trades_to_fill_with() -> None:
    with serving("bybit", []) as (server, client), pytest.raises(NotFillable, match="bybit gives no trades"):
        trades_of_minute(client, "BTCUSDT", MINUTE, 7)
    assert server.asked == []
