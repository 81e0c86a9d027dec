"""Words for what is wrong with a feed, and its rows, from what the parts of the process know."""

from collections.abc import Mapping
from typing import Any

import pytest

from marketflow.cluster.messages import FeedsQuery, FeedsReport
from marketflow.feeds.feed import FeedReport
from marketflow.feeds.trade_statistics import TradeStatistics
from marketflow.model import FeedState, HoleState, Mode, Series, Slot, Tick, candle_of
from marketflow.pipeline.instrumentation import ConnectionFailure, PipelineCounters
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.runtime.feed_status import FeedStatus
from marketflow.settings.shards import ShardMap
from tests.pipeline.world import BTC, START_MS, ScriptedFeed

REFUSED = ConnectionFailure("451: refused by the venue for this location", START_MS - 1000, START_MS + 299_000)


class Feed(ScriptedFeed):
    """A feed in any state."""

    def __init__(self, state: FeedState, refusals: Mapping[str, str], **known: Any) -> None:
        super().__init__(Mode.TEST)
        self.state = state
        self._refusals = refusals
        self.absent = known.get("absent", ())
        self._halted = known.get("halted", {})
        self.decoder.last_received = known.get("last_received")
        self.decoder.ticks = self.decoder.timestamps_replaced = known.get("dated_by_receipt", 0)

    @property
    def refusals(self) -> Mapping[str, str]:
        return self._refusals

    def report(self) -> FeedReport:
        return FeedReport(halted=self._halted)

    def doubles_by_symbol(self) -> dict[str, int] | None:  # type: ignore[override]
        return {"BTCUSDT": 3}


class Known:
    """A status of one feed, and what it is made of."""

    def __init__(
        self, state: FeedState, failure: ConnectionFailure | None = None, refusals: Any = None, **known: Any
    ) -> None:
        self.feed = Feed(state, refusals or {}, **known)
        self.counters = PipelineCounters()
        if failure is not None:
            self.counters.failures[self.feed] = failure
        self.statistics, self.window = TradeStatistics(), WindowState(2000)
        self.holes: dict[Series, dict[HoleState, int]] = {}
        self.unsent: tuple[str, ...] = ()
        self.status = FeedStatus(
            {Mode.TEST: [self.feed], Mode.LIVE: []},
            lambda: Mode.TEST,
            self.counters,
            self.statistics,
            self.window,
            lambda: self.holes,
            15.0,
            lambda: START_MS * 1_000_000,
            lambda exchange: self.unsent,
            known.get("ownership"),
        )

    def error(self) -> tuple[str | None, str | None]:
        found = self.status.problems()["exchange1"]
        return found.error, found.error_at


def test_stream_that_is_confirmed_and_silent_is_named() -> None:
    known = Known(FeedState.CONNECTED)
    assert known.status.problems() == {}
    known.unsent = ("BTCUSDT",)
    assert known.error() == ("the venue sends no trades of BTCUSDT, though it has some", None)
    report = known.status.report(FeedsQuery(100))
    assert {row.symbol: row.state for row in report.series} == {"BTCUSDT": "unsent", "ETHUSDT": "connected"}


FAILED_AT = "2025-11-21T01:53:59.000Z"


@pytest.mark.parametrize(
    ("known", "error", "at"),
    [
        (Known(FeedState.CONNECTING), None, None),
        (Known(FeedState.CONNECTING, REFUSED), REFUSED.text, FAILED_AT),
        (Known(FeedState.STALE, REFUSED), REFUSED.text, FAILED_AT),
        (Known(FeedState.STALE), "connected, but no good tick for over 15 s", None),
        (
            Known(FeedState.STALE, REFUSED, last_received=START_MS * 1_000_000),
            "connected, but no good tick for over 15 s",
            None,
        ),
        (Known(FeedState.CONNECTED, REFUSED, absent=["ETHUSDT"]), "the venue does not trade ETHUSDT", None),
        (
            Known(FeedState.CONNECTED, refusals={"ETHUSDT": "60018: no such"}, absent=["BTCUSDT"]),
            "the venue does not trade BTCUSDT; the venue refuses ETHUSDT: 60018: no such",
            None,
        ),
        (
            Known(FeedState.HALTED, REFUSED, halted={"BTCUSDT": "HALT", "ETHUSDT": "HALT", "SOLUSDT": "BREAK"}),
            "the venue has halted BTCUSDT, ETHUSDT (HALT); the venue has halted SOLUSDT (BREAK)",
            None,
        ),
    ],
)
def test_problem_of_a_feed_is_said_in_words(known: Known, error: str | None, at: str | None) -> None:
    assert known.error() == (error, at)


@pytest.mark.parametrize("state", [FeedState.CONNECTED, FeedState.GENERATED])
def test_feed_that_is_fine_has_no_problem(state: FeedState) -> None:
    assert Known(state, REFUSED).status.problems() == {}


def test_halted_symbol_has_a_state_of_its_own() -> None:
    known = Known(FeedState.CONNECTED, halted={"ETHUSDT": "HALT"})
    assert known.status.problems()["exchange1"].halted == ("ETHUSDT",)
    report = known.status.report(FeedsQuery(100))
    assert report.exchanges[0].halted == ("ETHUSDT",)
    assert {row.symbol: row.state for row in report.series} == {"BTCUSDT": "connected", "ETHUSDT": "halted"}


def test_many_refusals_are_quoted_in_part() -> None:
    known = Known(FeedState.CONNECTED, refusals={f"S{number}": "no" for number in range(50)})
    found = known.status.problems()["exchange1"]
    assert len(found.absent) == 50
    assert len(found.error or "") < 200


def test_series_have_ticks_doubles_and_holes() -> None:
    known = Known(FeedState.CONNECTED, REFUSED, absent=["ETHUSDT"])
    batch = {Slot(BTC, START_MS - 100): candle_of(Tick(5.5, START_MS - 90, (START_MS - 50) * 1_000_000))}
    known.window.observe(batch)
    known.statistics.observe(batch, START_MS)
    known.holes = {BTC: {HoleState.OPEN: 2}, BTC._replace(mode=Mode.LIVE): {HoleState.OPEN: 9}}
    report = known.status.report(FeedsQuery(limit=10))
    (exchange,), (bitcoin, ether) = report.exchanges, report.series
    assert (exchange.doubles, exchange.holes, exchange.error) == (3, {HoleState.OPEN: 2}, REFUSED.text)
    assert exchange.next_try_at is None
    assert (bitcoin.price, bitcoin.at) == (5.5, START_MS - 90)
    assert bitcoin.delay_p50_ms == pytest.approx(40, rel=0.16)
    assert (bitcoin.doubles, bitcoin.holes, bitcoin.state) == (3, {HoleState.OPEN: 2}, "connected")
    assert (ether.price, ether.doubles, ether.holes, ether.state) == (None, 0, {}, "absent")


def test_delay_is_unknown_while_all_ticks_are_dated_by_receipt() -> None:
    known = Known(FeedState.CONNECTED, dated_by_receipt=7)
    batch = {Slot(BTC, START_MS): candle_of(Tick(5.5, START_MS, START_MS * 1_000_000))}
    known.statistics.observe(batch, START_MS)
    row = known.status.report(FeedsQuery(limit=10)).series[0]
    assert (row.delay_p50_ms, row.ticks_per_second) == (None, 1.0)


def test_series_of_a_standby_are_reported_by_their_owner() -> None:
    parts = ShardMap({"exchange1": 2})
    known = Known(FeedState.CONNECTED, ownership=(ownership := Ownership(parts, ())))
    every = [series.symbol for series in sorted(known.feed.decoder.series)]
    found = []
    for shard in parts.names:
        ownership.take([shard])
        report = known.status.report(FeedsQuery(limit=10))
        found += [each.symbol for each in report.series]
        assert report.total == len(report.series)
        assert len(report.exchanges) == bool(report.series)
    assert sorted(found) == every
    ownership.take(())
    assert known.status.report(FeedsQuery(limit=10)) == FeedsReport(Mode.TEST, (), (), 0)
