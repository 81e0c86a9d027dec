"""The venue's names of our symbols, for its stream and for its REST calls."""

from collections.abc import Callable, Mapping

import pytest

from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.venues.instruments import Names, look_up
from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from tests.support.rest_server import Asked, Reply, RestServer


def named(venue: str, answer: Callable[[Asked], Reply], symbols: list[str], given: Mapping[str, str] = {}) -> Names:
    with RestServer(answer) as server:
        client = RestClient(VENUES[venue], server.url)
        try:
            return look_up(client, symbols, given)
        finally:
            client.close()


def kraken_pair(base: str, quote: str, status: str = "online") -> dict[str, str]:
    return {"altname": f"{base}{quote}", "wsname": f"{base}/{quote}", "status": status}


PAIRS = {
    "XXBTZUSD": kraken_pair("XBT", "USD"),
    "XBTUSDT": kraken_pair("XBT", "USDT"),
    "XDGUSD": kraken_pair("XDG", "USD"),
    "XETHZUSD": kraken_pair("ETH", "USD", "cancel_only"),
    "ADAUSD.d": {"altname": "ADAUSD.d", "status": "online"},
}


def test_kraken_names_for_rest_are_the_legacy_ones() -> None:
    symbols = ["BTCUSD", "BTCUSDT", "dogeusd", "ETHUSD", "NOPEUSD"]
    names = named("kraken", lambda asked: Reply({"error": [], "result": PAIRS}), symbols)
    assert names.native == {"BTCUSD": "BTC/USD", "BTCUSDT": "BTC/USDT", "dogeusd": "DOGE/USD"}
    traded = {"BTCUSD": "XBTUSD", "BTCUSDT": "XBTUSDT", "dogeusd": "XDGUSD"}
    assert names.rest == traded | {"ETHUSD": "ETHUSD"}
    assert names.absent == {"NOPEUSD"}
    assert names.halted == {"ETHUSD": "cancel_only"}


def test_instrument_that_trades_counts_for_more_than_a_halted_one() -> None:
    """A relisted symbol: base and quote of a delisted one, under another name."""
    pairs = {"A": kraken_pair("LUNA", "USD", "delisted") | {"altname": "LUNAUSD1"}, "B": kraken_pair("LUNA", "USD")}
    for listed in (pairs, dict(reversed(pairs.items()))):
        names = named("kraken", lambda asked: Reply({"error": [], "result": listed}), ["LUNAUSD"])  # noqa: B023
        assert (names.rest, names.halted) == ({"LUNAUSD": "LUNAUSD"}, {})


def test_configured_name_needs_no_list_of_instruments() -> None:
    given = {"BTCUSD": "BTC/USD", "DOGEUSD": "DOGE/USD", "ETHUSD": "ETH/USD"}
    names = named("kraken", lambda asked: Reply(b"", 500), [*given], given)
    assert names == Names(given, {"BTCUSD": "XBTUSD", "DOGEUSD": "XDGUSD", "ETHUSD": "ETHUSD"}, frozenset())


@pytest.mark.parametrize("venue", ["binance", "coinbase", "okx", "bybit"])
def test_names_for_rest_are_those_of_the_stream_elsewhere(venue: str) -> None:
    given = {"BTCUSDT": {"coinbase": "BTC-USDT", "okx": "BTC-USDT"}.get(venue, "BTCUSDT")}
    names = named(venue, lambda asked: Reply(b"", 500), ["BTCUSDT"], given)
    assert names.rest == names.native == given


def test_one_bad_symbol_costs_itself_alone() -> None:
    """Binance fails a call that names an unknown symbol, so none is named."""
    listed = [
        {"symbol": f"S{number}USDT", "status": "TRADING", "baseAsset": f"S{number}", "quoteAsset": "USDT"}
        for number in range(20)
    ]
    listed[6]["status"] = "BREAK"

    def answer(asked: Asked) -> Reply:
        assert not {"symbol", "symbols"} & asked.query.keys()
        return Reply({"symbols": listed})

    names = named("binance", answer, [f"S{number}USDT" for number in range(21)])
    assert len(names.native) == 19
    assert names.absent == {"S20USDT"}
    assert names.halted == {"S6USDT": "BREAK"}


def test_names_that_cannot_be_read_are_an_error_in_words() -> None:
    with pytest.raises(VenueRefusal, match="451: refused by the venue for this location"):
        named("binance", lambda asked: Reply(b"", 451), ["BTCUSDT"])
    with pytest.raises(RestFailed, match="kraken answers with an error: EGeneral:Internal error"):
        named("kraken", lambda asked: Reply({"error": ["EGeneral:Internal error"]}), ["BTCUSD"])
    with pytest.raises(RestFailed, match="binance answers with an error: the list of instruments is empty"):
        named("binance", lambda asked: Reply({"symbols": []}), ["BTCUSDT"])
