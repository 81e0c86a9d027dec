"""Subscriptions that are not answered, or refused, are asked for again; in virtual time."""

import pytest

from marketflow.feeds.simulated.dialects import DIALECTS, parsed
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Acknowledged, Refused
from marketflow.feeds.venues.websocket.subscriptions import Subscriptions


class Asking:
    """The requests of one connection over time."""

    def __init__(self, venue: str, count: int) -> None:
        self.now = 0.0
        self.symbols = [DIALECTS[venue].native(f"S{number}USDT") for number in range(count)]
        self.refused: dict[str, str] = {}
        self.subscriptions = Subscriptions(
            VENUES[venue], self.symbols, lambda: self.now, self.refused.__setitem__, self._accept
        )
        self._dialect = DIALECTS[venue]

    def _accept(self, symbol: str) -> None:
        del self.refused[symbol]

    def ask(self) -> list[list[str]]:
        """The symbols of each request that is due now."""
        return [self._dialect.requested(parsed(frame)) for frame in self.subscriptions.due()]

    def until(self, end: float) -> list[tuple[float, list[str]]]:
        """Time and symbols of each request until a time."""
        asked = []
        while (at := max(self.subscriptions.next_at, self.now)) <= end:
            self.now = at
            asked += [(at, symbols) for symbols in self.ask()]
        self.now = end
        return asked


@pytest.mark.parametrize(("venue", "sizes"), [("bybit", [10, 10, 5]), ("binance", [25]), ("okx", [25])])
def test_requests_stay_within_the_symbols_a_frame(venue: str, sizes: list[int]) -> None:
    asking = Asking(venue, 25)
    asked = asking.ask()
    assert [len(symbols) for symbols in asked] == sizes
    assert [symbol for symbols in asked for symbol in symbols] == asking.symbols


def test_requests_are_paced_as_the_venue_takes_them() -> None:
    asking = Asking("binance", 1_000)
    times = [at for at, _ in asking.until(5.0)]
    assert len(times) == 10
    assert max(times.count(at) for at in set(times)) <= 3


@pytest.mark.parametrize("venue", VENUES)
def test_unanswered_subscription_is_asked_again_in_ten_seconds(venue: str) -> None:
    asking = Asking(venue, 3)
    asking.ask()
    asking.subscriptions.on_trades(asking.symbols[:1])
    if venue not in ("binance", "bybit"):
        asking.subscriptions.on_answer(Acknowledged((asking.symbols[1],)))
    again = asking.until(10.0)
    assert [symbol for _, symbols in again for symbol in symbols][-1] == asking.symbols[2]
    assert asking.symbols[0] not in [symbol for _, symbols in again for symbol in symbols]
    later = asking.until(3_600.0)
    assert 5 < len(later) < 15


def test_answers_in_any_order_are_matched_by_their_number() -> None:
    asking = Asking("bybit", 20)
    asking.ask()
    asking.subscriptions.on_answer(Acknowledged((), 2))
    assert asking.until(9.0) == [(8.0, asking.symbols[:10])]
    asking.subscriptions.on_answer(Acknowledged((), 3))
    assert not asking.subscriptions.has_open


def test_refused_symbol_of_twenty_is_asked_alone_ever_more_rarely() -> None:
    asking = Asking("okx", 20)
    asking.ask()
    bad = asking.symbols[6]
    asking.subscriptions.on_answer(Refused("60018: no such instrument", bad))
    asking.subscriptions.on_answer(Acknowledged(tuple(symbol for symbol in asking.symbols if symbol != bad)))
    assert asking.refused == {bad: "60018: no such instrument"}
    times: list[float] = []
    while asking.now < 7_200.0 and len(times) < 6:
        ((at, symbols),) = asking.until(asking.subscriptions.next_at)
        assert symbols == [bad]
        times.append(at)
        asking.subscriptions.on_answer(Refused("60018: no such instrument", bad))
    assert times == [60.0, 180.0, 420.0, 900.0, 1500.0, 2100.0]
    asking.until(asking.subscriptions.next_at)
    asking.subscriptions.on_answer(Acknowledged((bad,)))
    assert asking.refused == {}
    assert not asking.subscriptions.has_open


@pytest.mark.parametrize("venue", ["bybit", "coinbase"])
def test_others_of_a_refused_request_are_asked_again_at_once(venue: str) -> None:
    asking = Asking(venue, 5)
    asking.ask()
    asking.subscriptions.on_answer(Refused("no such symbol", asking.symbols[2], 1))
    assert asking.subscriptions.has_urgent
    others = [symbol for symbol in asking.symbols if symbol != asking.symbols[2]]
    assert asking.until(2.0) == [(1.0, others)]


def test_request_refused_without_a_name_is_asked_one_by_one() -> None:
    asking = Asking("binance", 4)
    asking.ask()
    asking.subscriptions.on_answer(Refused("Invalid request", None, 1))
    asked = asking.until(3.0)
    assert [symbols for _, symbols in asked] == [[symbol] for symbol in asking.symbols]
    for number in (2, 3, 5):
        asking.subscriptions.on_answer(Acknowledged((), number))
    asking.subscriptions.on_answer(Refused("Invalid request", None, 4))
    assert [*asking.refused] == [asking.symbols[2]]


def test_subscription_that_lasts_is_no_refusal() -> None:
    asking = Asking("kraken", 1)
    asking.ask()
    asking.subscriptions.on_answer(Refused("Already subscribed to trade", None))
    assert not asking.subscriptions.has_open
    assert asking.refused == {}


def test_symbol_whose_trades_are_missing_is_asked_again() -> None:
    asking = Asking("coinbase", 2)
    asking.ask()
    asking.subscriptions.on_answer(Acknowledged(tuple(asking.symbols)))
    asking.now = 30.0
    asking.subscriptions.ask_again(asking.symbols[0])
    assert asking.ask() == [asking.symbols[:1]]


@pytest.mark.parametrize("venue", VENUES)
def test_frames_of_a_full_connection_stay_within_the_limits(venue: str) -> None:
    limits = VENUES[venue]
    symbols = [DIALECTS[venue].native(f"{'LONGNAME'}{number:03}USDT") for number in range(limits.symbols_a_connection)]
    frames = limits.subscribe(symbols)
    assert max(map(len, frames)) < 64_000
    if venue == "bybit":
        assert sum(len(f"publicTrade.{symbol}") for symbol in symbols) < 21_000
    if venue == "okx":
        assert sum(map(len, frames)) < 64_000
