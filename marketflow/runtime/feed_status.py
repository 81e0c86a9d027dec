"""Status of the feeds: their problems for /health, and the rows of /feeds."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from marketflow import text
from marketflow.clock import Clock, milliseconds
from marketflow.cluster.messages import ExchangeReport, FeedsQuery, FeedsReport, SeriesReport
from marketflow.feeds.feed import Feed
from marketflow.feeds.trade_statistics import TradeStatistics
from marketflow.health import FeedProblem
from marketflow.model import FINE_STATES, FeedState, HoleState, Mode, Series
from marketflow.pipeline.instrumentation import ConnectionFailure, PipelineCounters
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import HoleCounts
from marketflow.stores.postgres.rows import to_datetime

MOST_WORDS = 4
"""Refused subscriptions that are quoted at most."""


class FeedStatus:
    """Reads the feeds of the current mode, and what was counted of them; from any thread, without blocking.

    Args:
        feeds: of both modes; may change.
        mode: returns the current one.
        counters: reconnects and failures.
        statistics: rates and delays.
        newest: the newest ticks.
        holes: returns the number of holes.
        stale_after_seconds: silence after which a feed is stale.
        clock: wall-clock time.
        unsent: returns the symbols of an exchange that are traded there and of which it sends nothing.
        ownership: only series that are owned are reported.
    """

    def __init__(
        self,
        feeds: Mapping[Mode, Sequence[Feed]],
        mode: Callable[[], Mode],
        counters: PipelineCounters,
        statistics: TradeStatistics,
        newest: WindowState,
        holes: Callable[[], HoleCounts],
        stale_after_seconds: float,
        clock: Clock,
        unsent: Callable[[str], Collection[str]] = lambda exchange: (),
        ownership: Ownership | None = None,
    ) -> None:
        self._unsent = unsent
        self._ownership = Ownership() if ownership is None else ownership
        self._feeds = feeds
        self._mode = mode
        self._counters = counters
        self._statistics = statistics
        self._newest = newest
        self._holes = holes
        self._stale_after_seconds = stale_after_seconds
        self._clock = clock
        self._sorted: dict[Feed, tuple[frozenset[Series], list[Series]]] = {}

    def problems(self) -> dict[str, FeedProblem]:
        """Return the problems of feeds, by exchange: their state, missing symbols, failed calls by REST."""
        found = {}
        for feed in self._feeds[self._mode()]:
            state, absent, report = feed.state, _lacking(feed), feed.report()
            lacks = absent or report.halted or report.rest_error or self._unsent(feed.exchange)
            if state not in FINE_STATES or lacks:
                failure = self._failure(feed, state)
                error = failure.text if failure else self._without_failure(feed, state)
                failed_at = rfc3339(failure.at) if failure else None
                next_try_at = rfc3339(failure.next_try_at) if failure else None
                halted = tuple(sorted(report.halted))
                found[feed.exchange] = FeedProblem(state, feed.place, error, failed_at, next_try_at, absent, halted)
        return found

    def report(self, query: FeedsQuery) -> FeedsReport:
        """Return the exchanges and series that a query selects."""
        mode, now_ms, holes = self._mode(), milliseconds(self._clock()), self._holes()
        feeds = [feed for feed in self._feeds[mode] if query.exchange in (None, feed.exchange) and self._series(feed)]
        wanted = [
            (feed, series) for feed in feeds for series in self._series(feed) if query.symbol in (None, series.symbol)
        ]
        page = groupby(wanted[query.offset : query.offset + query.limit], key=itemgetter(0))
        return FeedsReport(
            mode,
            tuple(self._exchange(feed, holes, now_ms) for feed in feeds),
            tuple(row for feed, rows in page for row in self._rows(feed, [each for _, each in rows], holes, now_ms)),
            len(wanted),
        )

    def _series(self, feed: Feed) -> list[Series]:
        """Return the owned series of a feed, in order. Sorted once: there may be tens of thousands."""
        series = feed.decoder.series
        if (known := self._sorted.get(feed)) is None or known[0] is not series:
            present = {each for of_mode in self._feeds.values() for each in of_mode}
            self._sorted = {each: of for each, of in self._sorted.items() if each in present}
            known = self._sorted[feed] = series, sorted(series)
        if self._ownership.everything:
            return known[1]
        owned, shard_of = self._ownership.owned, self._ownership.shards.of
        return [each for each in known[1] if shard_of(each) in owned]

    def _failure(self, feed: Feed, state: FeedState) -> ConnectionFailure | None:
        """Return the failed connection that a feed's state is due to; None if it has another reason."""
        failure = self._last_failure(feed)
        if failure is None or state in FINE_STATES:
            return None
        received = feed.decoder.last_received
        came_back = received is not None and milliseconds(received) > failure.at
        return None if state is FeedState.STALE and came_back else failure

    def _last_failure(self, feed: Feed) -> ConnectionFailure | None:
        """Return the last failure of a feed's connections."""
        failures = [self._counters.failures.get(connection) for connection in feed.connections]
        return max((failure for failure in failures if failure), key=lambda failure: failure.at, default=None)

    def _without_failure(self, feed: Feed, state: FeedState) -> str | None:
        """Describe the problems of a feed that is connected."""
        if state is FeedState.STALE:
            return f"connected, but no good tick for over {self._stale_after_seconds:g} s"
        words = [f"the venue refuses {symbol}: {text}" for symbol, text in sorted(feed.refusals.items())]
        if feed.absent:
            words.insert(0, f"the venue does not trade {', '.join(sorted(feed.absent))}")
        if unsent := self._unsent(feed.exchange):
            words.insert(0, f"the venue sends no trades of {', '.join(sorted(unsent))}, though it has some")
        words[:0] = _halts(feed.report().halted)
        if error := feed.report().rest_error:
            words.insert(0, f"what comes by REST is late: {error}")
        return "; ".join(words[:MOST_WORDS]) or None

    def _exchange(self, feed: Feed, holes: HoleCounts, now_ms: int) -> ExchangeReport:
        report, failure, doubles = feed.report(), self._last_failure(feed), feed.doubles_by_symbol()
        weight = report.rest_weight
        return ExchangeReport(
            exchange=feed.exchange,
            state=feed.state,
            address=feed.place,
            ticks_per_second=sum(self._statistics.rate(each, now_ms) for each in self._series(feed)),
            doubles=None if doubles is None else sum(doubles.values()),
            holes=None if doubles is None else hole_counts_of(feed.exchange, self._mode(), holes),
            reconnects=self._counters.reconnects.get(feed.exchange, 0),
            clock_offset_ms=report.clock_offset_ms,
            rest_weight_used=None if weight is None else weight[0],
            rest_weight_limit=None if weight is None else weight[1],
            error=None if failure is None else failure.text,
            error_at=None if failure is None else failure.at,
            next_try_at=None if failure is None or feed.state in FINE_STATES else failure.next_try_at,
            absent=_lacking(feed),
            halted=tuple(sorted(report.halted)),
        )

    def _rows(self, feed: Feed, wanted: Sequence[Series], holes: HoleCounts, now_ms: int) -> list[SeriesReport]:
        state, doubles = feed.state, feed.doubles_by_symbol()
        lacking = dict.fromkeys(self._unsent(feed.exchange), "unsent") | dict.fromkeys(feed.report().halted, "halted")
        lacking |= dict.fromkeys(_lacking(feed), "absent")
        newest = self._newest.newest_of(wanted)
        dated_by_receipt = bool(feed.decoder.ticks) and feed.decoder.timestamps_replaced >= feed.decoder.ticks
        reports = []
        for series in wanted:
            tick, statistics = newest.get(series), self._statistics.of(series, now_ms)
            reports.append(
                SeriesReport(
                    exchange=series.exchange,
                    symbol=series.symbol,
                    state=lacking.get(series.symbol, state.value),
                    price=None if tick is None else tick.price,
                    at=None if tick is None else tick.at,
                    delay_p50_ms=None if dated_by_receipt else statistics.delay_p50_ms,
                    delay_p99_ms=None if dated_by_receipt else statistics.delay_p99_ms,
                    ticks_per_second=statistics.ticks_per_second,
                    doubles=None if doubles is None else doubles.get(series.symbol, 0),
                    holes=None if doubles is None else holes.get(series, {}),
                )
            )
        return reports


def _lacking(feed: Feed) -> tuple[str, ...]:
    return tuple(sorted({*feed.absent, *feed.refusals}))


def _halts(halted: Mapping[str, str]) -> list[str]:
    """Describe which symbols are halted, by the status that the venue gives."""
    by_halt: dict[str, list[str]] = {}
    for symbol, halt in sorted(halted.items()):
        by_halt.setdefault(halt, []).append(symbol)
    return [f"the venue has halted {', '.join(symbols)} ({halt})" for halt, symbols in by_halt.items()]


def hole_counts_of(exchange: str, mode: Mode, counts: HoleCounts) -> dict[HoleState, int]:
    """Return the number of holes of an exchange in a mode, by state."""
    found: dict[HoleState, int] = {}
    for series, of_series in counts.items():
        if (series.mode, series.exchange) == (mode, exchange):
            for state, count in of_series.items():
                found[state] = found.get(state, 0) + count
    return found


def rfc3339(unix_ms: int) -> str:
    """Return a time in Unix ms as RFC 3339."""
    return text.rfc3339(to_datetime(unix_ms))
