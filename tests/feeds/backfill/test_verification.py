"""Closed minutes against the venue's own candles: what is verified, what differs, and what is done about it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from marketflow.feeds.backfill import verification
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.backfill.steps import BUDGET_PAUSE_SECONDS, Step
from marketflow.feeds.backfill.verification import COMPARED_AFTER_MS, UNKNOWN_AFTER_MS, Verification
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, Series, Slot
from tests.support.market import MINUTE
from tests.support.rest_server import Asked, Reply, RestServer
from tests.support.venue_pages import Row, VenuePages, plain

START = MINUTE + 20_000
"""When the run begins."""

BTC, ETH = (Series(Mode.LIVE, "one", symbol) for symbol in ("BTCUSDT", "ETHUSDT"))
BYBIT = "bybit"
ALL = ["binance", "coinbase", "kraken", "okx", BYBIT]


def at(number: int) -> int:
    return MINUTE + number * MINUTE_MS


def trades_in(number: int, count: int = 5) -> list[Trade]:
    """Trades of a minute, with ids that go on from those of the minute before."""
    first = 10_000 + number * 100
    sides: list[Any] = ["buy", "sell"]
    return [Trade("BTCUSD", 100.0 + n, 1.0, at(number) + n * 1000, first + n, sides[n % 2]) for n in range(count)]


def row(number: int, trades: list[Trade], **changes: Any) -> Row:
    """The venue's candle of these trades."""
    prices = [trade.price for trade in trades]
    opening, high, low, closing = map(plain, (prices[0], max(prices), min(prices), prices[-1]))
    volume = plain(sum(trade.quantity for trade in trades))
    turnover = plain(sum(trade.price * trade.quantity for trade in trades))
    return Row(at(number), opening, high, low, closing, volume, len(trades), turnover=turnover)._replace(**changes)


class World:
    """A venue with trades and candles, and the verification of it. Minute 0 is the one in which the run begins."""

    def __init__(self, venue: str, stack: ExitStack, fills_seam: bool = True) -> None:
        self.venue = VENUES[venue]
        self.now = START
        self.trades = {number: trades_in(number) for number in range(-5, 40)}
        self.pages = VenuePages(venue, [trade for each in self.trades.values() for trade in each])
        self.pages.candles = [row(number, trades) for number, trades in self.trades.items()]
        self.server = stack.enter_context(RestServer(self._answer))
        self.answer: Callable[[Asked], Reply | None] = lambda _: None
        self.budget = AttemptBudget(10**6, 1.0, lambda: self.now / 1000)
        self.names: Mapping[str, str] = {"BTCUSDT": "BTCUSD"}
        client = RestClient(
            self.venue, self.server.url, self.budget, lambda: self.now * 1_000_000, lambda: self.now / 1000
        )
        stack.callback(client.close)
        self.asked_again: list[str] = []
        self.verification = Verification(
            "one",
            client,
            lambda: self.names,
            lambda: self.now * 1_000_000,
            fills_seam,
            monotonic=lambda: self.now / 1000,
            on_unsent=self.asked_again.append,
        )

    def _answer(self, asked: Asked) -> Reply:
        self.pages.now = self.now
        own = self.pages.candles
        self.pages.candles = [each for each in own if each.start <= self.now]
        try:
            return self.answer(asked) or self.pages(asked)
        finally:
            self.pages.candles = own

    def change(self, number: int, **changes: Any) -> None:
        """Change the venue's candle of a minute."""
        self.pages.candles = [
            each._replace(**changes) if each.start == at(number) else each for each in self.pages.candles
        ]

    def remove(self, *numbers: int) -> None:
        self.pages.candles = [each for each in self.pages.candles if each.start not in map(at, numbers)]

    def close(self, *numbers: int, lost: int = 0, series: Series = BTC) -> dict[int, Candle]:
        """Close minutes as the pipeline does, without the last `lost` trades of each."""
        made = {}
        for number in numbers:
            trades = self.trades[number]
            made[number] = minute_candle(trades[: len(trades) - lost])
        self.verification.note({Slot(series, at(number)): candle for number, candle in made.items()})
        return made

    def run_until(self, until_ms: int, closes_again: bool = True) -> Candles:
        """Step as time passes; give what was emitted, which the pipeline closes again where it is more complete."""
        emitted: Candles = {}
        while self.now < until_ms:
            step = self.verification.step()
            emitted |= step.minutes
            if closes_again:
                self.verification.note(step.minutes)
            self.now += max(1, round(step.pause_seconds * 1000))
        return emitted

    @property
    def results(self) -> dict[str, int]:
        """Of the minutes that came."""
        return {result: count for result, count in self.verification.results.items() if result != "missing"}

    @property
    def missing(self) -> int:
        return self.verification.results["missing"]

    @property
    def candle_calls(self) -> list[Asked]:
        words = ("klines", "candles", "OHLC", "kline")
        return [each for each in self.server.asked if each.path.endswith(words)]

    @property
    def trade_calls(self) -> int:
        return len(self.server.asked) - len(self.candle_calls)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda venue="okx", **more: World(venue, stack, **more)


def minute_of(emitted: Candles, number: int, series: Series = BTC) -> Candle:
    return emitted[Slot(series, at(number))]


@pytest.mark.parametrize("venue", ALL)
def test_minutes_that_equal_the_venue_s_are_verified(world: Callable[..., World], venue: str) -> None:
    w = world(venue)
    made = w.close(0, 1)
    emitted = w.run_until(at(5))
    assert {number: minute_of(emitted, number) for number in (0, 1)} == {
        number: msgspec.structs.replace(candle, verified=True) for number, candle in made.items()
    }
    assert w.results == {"verified": 2}
    assert w.trade_calls == 0


def test_minute_is_compared_between_75_and_135_s_after_its_end(world: Callable[..., World]) -> None:
    w = world()
    w.close(0, 1, 2)
    for number in (1, 2):
        end = at(number + 1)
        assert Slot(BTC, at(number)) not in w.run_until(end + COMPARED_AFTER_MS)
        assert Slot(BTC, at(number)) in w.run_until(end + COMPARED_AFTER_MS + 61_000)


def test_many_symbols_are_compared_several_minutes_a_call(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "SYMBOL_SECONDS", 30.0)
    w = world()
    w.names = {f"S{number}": f"S{number}" for number in range(5)}
    w.run_until(at(20))
    calls = [each for each in w.candle_calls if each.query["instId"] == "S3"]
    assert 6 <= len(calls) <= 8
    asked = [int(each.query["after"]) for each in calls]
    assert max(b - a for a, b in pairwise(asked)) >= 2 * MINUTE_MS
    assert [int(each.query["before"]) + 1 for each in calls[1:]] == asked[:-1]


@pytest.mark.parametrize("venue", ["binance", "coinbase", "kraken", "okx"])
def test_lost_trades_are_fetched_and_the_minute_is_verified(world: Callable[..., World], venue: str) -> None:
    w = world(venue)
    w.close(0)
    w.close(1, lost=2)
    emitted = w.run_until(at(6))
    again = minute_of(emitted, 1)
    assert (again.ticks, again.verified, again.venue) == (5, True, None)
    assert again == msgspec.structs.replace(minute_candle(w.trades[1]), verified=True)
    assert w.results == {"verified": 2}


def test_minute_that_still_differs_has_the_venue_s_values(world: Callable[..., World], log: list[str]) -> None:
    w = world("kraken")
    w.close(0, 1)
    w.change(1, volume="8.0", ticks=6)
    emitted = w.run_until(at(8))
    found = minute_of(emitted, 1)
    assert found.verified is False
    assert found.venue is not None
    assert (found.venue.volume, found.venue.ticks, found.venue.close) == (8.0, 6, 104.0)
    assert found.amounts is not None
    assert found.amounts.volume == 5.0
    assert w.results == {"verified": 1, "different": 1}
    assert w.trade_calls == 1
    (line,) = [each for each in log if "differs" in each]
    assert "BTCUSDT 2025-11-21T01:55Z: ticks 5 instead of 6, volume 5.0 instead of 8.0" in line


def test_candle_that_was_late_verifies_at_the_next_pass(world: Callable[..., World]) -> None:
    w = world("coinbase")
    w.close(0, 1)
    w.change(1, close="103.0", volume="4.0")
    w.run_until(at(2) + COMPARED_AFTER_MS + 61_000)
    w.change(1, close="104.0", volume="5.0")
    emitted = w.run_until(at(8))
    assert minute_of(emitted, 1).verified is True
    assert w.results == {"verified": 2}


def test_minute_with_more_trades_than_the_venue_is_kept(world: Callable[..., World]) -> None:
    w = world("kraken")
    fewer = w.trades[1][:3]
    w.pages.trades = [trade for trade in w.pages.trades if trade not in w.trades[1][3:]]
    made = w.close(1)[1]
    w.pages.candles = [row(1, fewer) if each.start == at(1) else each for each in w.pages.candles]
    found = minute_of(w.run_until(at(8)), 1)
    assert (found.ticks, found.verified) == (5, False)
    assert msgspec.structs.replace(found, verified=None, venue=None) == made


def test_minute_before_bybit_s_newest_trades_differs_at_once_more(world: Callable[..., World]) -> None:
    w = world(BYBIT)
    w.close(1, lost=1)
    found = minute_of(w.run_until(at(8)), 1)
    assert found.verified is False
    assert w.trade_calls == 1


def test_bybit_opens_at_the_close_before(world: Callable[..., World]) -> None:
    w = world(BYBIT)
    w.close(1)
    w.change(1, open="99.0", low="99.0")
    assert minute_of(w.run_until(at(5)), 1).verified is True


def test_forming_candle_is_not_compared(world: Callable[..., World]) -> None:
    w = world("okx")
    w.close(0, 1)
    w.change(1, close="1000.0", high="1000.0", confirm=False)
    assert Slot(BTC, at(1)) not in w.run_until(at(5))
    w.change(1, close="104.0", high="104.0", confirm=True)
    assert minute_of(w.run_until(at(8)), 1).verified is True


def test_minute_without_a_candle_stays_unverified(world: Callable[..., World]) -> None:
    w = world("coinbase")
    w.close(1)
    w.remove(1)
    emitted = w.run_until(at(1) + UNKNOWN_AFTER_MS + 3 * MINUTE_MS)
    assert Slot(BTC, at(1)) not in emitted
    assert w.results == {"no_candle": 1}


@pytest.mark.parametrize("venue", ALL)
def test_minute_that_never_came_is_the_venue_s_and_missing(world: Callable[..., World], venue: str) -> None:
    w = world(venue)
    w.close(0, 2)
    emitted = w.run_until(at(5))
    assert minute_of(emitted, 1).source == "venue"
    assert w.missing == 1


def test_symbol_that_is_traded_and_not_sent_is_named_until_it_comes(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(0)
    w.run_until(at(4))
    assert w.verification.unsent == {"BTCUSDT"}
    assert 1 <= len(w.asked_again) <= 2
    w.close(4)
    assert w.verification.unsent == frozenset()
    w.asked_again.clear()
    w.run_until(at(5))
    assert w.asked_again == []


def test_symbol_with_one_missing_minute_is_not_unsent(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(0, 2, 3)
    w.run_until(at(5))
    assert w.missing == 1
    assert w.verification.unsent == frozenset()


def test_minute_without_trades_is_not_missing(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(0, 2)
    w.change(1, ticks=0, volume="0.0")
    assert Slot(BTC, at(1)) not in w.run_until(at(5))
    assert w.missing == 0


@pytest.mark.parametrize("fills_seam", [True, False])
def test_last_minutes_before_the_start_are_filled(world: Callable[..., World], fills_seam: bool) -> None:
    w = world("okx", fills_seam=fills_seam)
    w.close(0)
    emitted = w.run_until(at(3))
    before = {slot.start for slot in emitted if slot.start < at(0)}
    assert before == ({at(-3), at(-2), at(-1)} if fills_seam else set())
    assert w.missing == 0


def test_minute_that_changes_later_is_compared_again(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(1, lost=2)
    w.change(1, volume="3.0", close="102.0", high="102.0", ticks=3)
    assert minute_of(w.run_until(at(5)), 1).verified is True
    w.pages.candles = [row(number, trades) for number, trades in w.trades.items()]
    w.close(1)
    again = minute_of(w.run_until(at(10)), 1)
    assert (again.ticks, again.verified) == (5, True)


def test_change_during_the_comparison_is_compared_for_itself(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(1, lost=1)
    w.pages.candles = [row(1, w.trades[1][:4]) if each.start == at(1) else each for each in w.pages.candles]

    def change(asked: Asked) -> None:
        if asked.path.endswith("OHLC") and w.now > at(2) + COMPARED_AFTER_MS:
            w.close(1)
            w.answer = lambda _: None

    w.answer = change
    w.run_until(at(4), closes_again=False)
    assert w.verification.results["verified"] == 1
    w.pages.candles = [row(number, trades) for number, trades in w.trades.items()]
    assert minute_of(w.run_until(at(8)), 1).ticks == 5


def test_minutes_of_others_are_not_compared(world: Callable[..., World]) -> None:
    w = world()
    w.close(1, series=BTC._replace(exchange="two"))
    w.close(1, series=BTC._replace(mode=Mode.TEST))
    w.verification.note({Slot(BTC, at(0)): msgspec.structs.replace(minute_candle(w.trades[0]), source="venue")})
    w.verification.note({Slot(BTC, at(1)): msgspec.structs.replace(minute_candle(w.trades[1]), verified=True)})
    w.run_until(at(3) + COMPARED_AFTER_MS)
    assert w.results == {}
    assert w.missing == 0


def test_outage_of_rest_delays_and_loses_nothing(world: Callable[..., World], log: list[str]) -> None:
    w = world("kraken")
    w.answer = lambda _: Reply(status=503) if w.now < at(9) else None
    for number in range(13):
        w.run_until(at(number + 1) + 2_000)
        w.close(number)
    before = len(w.server.asked)
    assert before < 30
    w.run_until(at(15))
    assert [*w.results] == ["verified"]
    assert w.verification.results["verified"] >= 12
    assert w.missing == 0
    assert sum("cannot be compared" in each for each in log) <= 2


def test_ban_is_obeyed(world: Callable[..., World]) -> None:
    w = world("okx")
    w.close(0, 1)
    w.answer = lambda _: Reply(status=429, headers={"Retry-After": "300"}) if len(w.server.asked) == 1 else None
    w.run_until(at(6))
    assert len(w.server.asked) == 1
    w.run_until(at(9))
    assert w.results == {"verified": 2}


def test_failing_symbol_does_not_hold_up_the_others(world: Callable[..., World]) -> None:
    w = world("okx")
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.close(0, 1)
    w.close(0, 1, series=ETH)
    w.answer = lambda asked: Reply(b"{}", 400) if asked.query["instId"] == "BTCUSD" else None
    emitted = w.run_until(at(6))
    assert [minute_of(emitted, number, ETH).verified for number in (0, 1)] == [True, True]


def test_half_of_the_budget_is_left_to_repairs(world: Callable[..., World]) -> None:
    w = world("okx")
    w.close(0, 1)
    w.now = at(4)
    w.budget = w.verification._client.budget = AttemptBudget(10, 1.0, lambda: w.now / 1000)
    w.budget.take(5)
    assert w.verification.step() == Step({}, BUDGET_PAUSE_SECONDS)
    w.now += 1_000
    assert w.verification.step().minutes


def test_candles_older_than_kraken_keeps_are_not_asked_for(world: Callable[..., World]) -> None:
    w = world("kraken")
    w.close(0)
    w.now = at(0) + 13 * 3_600_000
    w.pages.candles = [row(number, w.trades[1]) for number in range(60, 60 * 13)]
    w.run_until(w.now + 5_000)
    assert w.verification.results["no_candle"] == 1
    assert w.missing > 700


def test_hours_without_minutes_are_caught_up_at_once(world: Callable[..., World]) -> None:
    w = world("okx")
    w.close(0)
    w.now = at(0) + 12 * 3_600_000
    w.pages.candles = [row(number, w.trades[1])._replace(start=at(number)) for number in range(-5, 60 * 12)]
    w.run_until(w.now + 5_000)
    assert len(w.candle_calls) == 3  # of 300 minutes at most
    assert w.missing > 700


def test_end_of_the_process_is_no_failure_of_verification(world: Callable[..., World], log: list[str]) -> None:
    w = world(BYBIT)
    w.close(1)
    w.verification._client.close()
    w.run_until(at(5))
    assert not [each for each in log if "cannot be" in each], log
