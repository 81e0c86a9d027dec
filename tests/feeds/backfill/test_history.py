"""History: which minutes are fetched, in which order, how often, and what becomes of failures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import pytest
from loguru import logger

from marketflow.errors import Unavailable
from marketflow.feeds.backfill.history import BEGIN_PAUSE_SECONDS, SETTLED_MS, STORE_PAUSE_SECONDS, History
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.backfill.steps import BUDGET_PAUSE_SECONDS, Step
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.model import MINUTE_MS, Amounts, Candle, Candles, Mode, Series, Slot, TimeRange, minute_start
from tests.support.market import MINUTE
from tests.support.rest_server import Asked, Reply, RestServer
from tests.support.venue_pages import Row, VenuePages

HOUR_MS = 60 * MINUTE_MS
NOW = MINUTE + 30_000
WITHOUT_TRADES = 7
"""Each minute whose number is a multiple of it has none."""


class MemoryStore:
    """Keeps fetched minutes as PostgreSQL does."""

    def __init__(self) -> None:
        self.rows: Candles = {}
        self.complete: dict[Series, set[int]] = {}
        self.down = False

    def _check(self) -> None:
        if self.down:
            raise Unavailable("down")

    def incomplete(self, series: Iterable[Series], since: int, until: int) -> dict[Series, list[TimeRange]]:
        self._check()
        found: dict[Series, list[TimeRange]] = {}
        for each in series:
            for start in range(since, until, MINUTE_MS):
                if start in self.complete.get(each, ()):
                    continue
                parts = found.setdefault(each, [])
                if parts and parts[-1].until == start:
                    parts[-1] = TimeRange(parts[-1].since, start + MINUTE_MS)
                else:
                    parts.append(TimeRange(start, start + MINUTE_MS))
        return found

    def missing(self, series: Series, since: int, until: int) -> Sequence[int]:
        self._check()
        return [start for start in range(since, until, MINUTE_MS) if Slot(series, start) not in self.rows]

    def store(self, series: Series, minutes: Candles, complete: TimeRange | None) -> None:
        self._check()
        self.rows |= minutes
        if complete is not None:
            self.complete.setdefault(series, set()).update(range(complete.since, complete.until, MINUTE_MS))


class World:
    """A venue with candles until now, a store, and the histories of runs that follow each other."""

    def __init__(self, venue: str, stack: ExitStack, hours: float = 24) -> None:
        self.venue = VENUES[venue]
        self.now = NOW
        self.seconds = 0.0
        self.store = MemoryStore()
        self.span_ms = round(hours * HOUR_MS)
        first = minute_start(NOW) - self.span_ms - 5 * MINUTE_MS
        starts = range(first, minute_start(NOW) + 1, MINUTE_MS)
        self.pages = VenuePages(venue, candles=[row(start) for start in starts])
        self.pages.now = NOW
        self.server = stack.enter_context(RestServer(self.pages))
        self.budget = AttemptBudget(10**6, 1.0, lambda: self.seconds)
        self.names: Mapping[str, str] = {"BTCUSDT": "BTCUSD"}
        self._stack = stack
        self.restart()

    def restart(self) -> None:
        client = RestClient(self.venue, self.server.url, self.budget, lambda: self.now * 1_000_000, self.monotonic)
        self._stack.callback(client.close)
        self.history = History(
            "one",
            client,
            lambda: self.names,
            self.span_ms,
            self.store,
            24 * HOUR_MS,
            lambda: self.now * 1_000_000,
            self.monotonic,
        )

    def monotonic(self) -> float:
        return self.seconds

    def pass_time(self, minutes: int) -> None:
        self.pages.candles += [row(self.pages.candles[-1].start + n * MINUTE_MS) for n in range(1, minutes + 1)]
        self.now += minutes * MINUTE_MS
        self.pages.now = self.now

    def steps(self, most: int = 200) -> Iterator[Step]:
        """Steps until there is nothing to do."""
        for _ in range(most):
            step = self.history.step()
            self.seconds += step.pause_seconds
            yield step
            if not self.history._remaining and self.history._begun:
                return

    def fetch(self) -> Candles:
        emitted: Candles = {}
        for step in self.steps():
            emitted |= step.minutes
        return emitted

    @property
    def calls(self) -> list[Asked]:
        return self.server.asked

    def expected(self, series: Series, since: int, until: int) -> set[Slot]:
        return {Slot(series, each.start) for each in self.pages.candles if since <= each.start < until and each.ticks}


def row(start: int) -> Row:
    number = start // MINUTE_MS
    if number % WITHOUT_TRADES == 0:
        return Row(start, "100.0", "100.0", "100.0", "100.0", "0.0", 0)
    price = 100 + number % 50
    return Row(start, f"{price}.5", f"{price + 2}.0", f"{price}.0", f"{price + 1}.0", "2.5", 12)


def series(symbol: str = "BTCUSDT") -> Series:
    return Series(Mode.LIVE, "one", symbol)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda venue="binance", **more: World(venue, stack, **more)


@pytest.mark.parametrize("venue", ["binance", "coinbase", "okx", "bybit"])
def test_all_minutes_before_the_start_are_fetched(world: Callable[..., World], venue: str) -> None:
    w = world(venue)
    emitted = w.fetch()
    begin = minute_start(NOW) - 24 * HOUR_MS
    assert w.store.rows.keys() == w.expected(series(), begin, minute_start(NOW))
    assert emitted == {slot: each for slot, each in w.store.rows.items() if slot.start >= NOW - 24 * HOUR_MS}
    assert {each.source for each in emitted.values()} == {"venue"}


def test_pipeline_is_passed_the_last_day_alone(world: Callable[..., World]) -> None:
    w = world("binance", hours=240)
    most = 0
    emitted: Candles = {}
    for step in w.steps():
        most = max(most, len(step.minutes))
        emitted |= step.minutes
    assert most <= 1000
    assert emitted.keys() == w.expected(series(), NOW - 24 * HOUR_MS, minute_start(NOW))
    assert len(w.store.rows) > 9 * len(emitted)


def test_minute_has_what_the_venue_says_of_it(world: Callable[..., World]) -> None:
    w = world("binance", hours=1)
    w.fetch()
    start = minute_start(NOW) - MINUTE_MS
    theirs = row(start)
    open_, high, low, close = (float(each) for each in theirs[1:5])
    assert w.store.rows[Slot(series(), start)] == Candle(
        *(open_, high, low, close, 1.0 * 12, 12),
        *(start, start + MINUTE_MS - 1, start, start, 0, 0),
        amounts=Amounts(2.5, 2.5, 0.0, 0.0),
        source="venue",
    )


def test_count_that_is_not_said_is_unknown(world: Callable[..., World]) -> None:
    w = world("okx", hours=1)
    w.fetch()
    assert {(each.ticks, each.total, each.average) for each in w.store.rows.values()} == {(0, 0.0, None)}


def test_newest_minutes_of_all_symbols_come_first(world: Callable[..., World]) -> None:
    w = world("okx", hours=24)
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    ends = [max(slot.start for slot in step.minutes) for step in w.steps() if step.minutes]
    assert ends == sorted(ends, reverse=True)
    newest = ends[0]
    assert ends.count(newest) == 2
    assert newest >= minute_start(NOW) - 2 * MINUTE_MS


def test_restart_asks_only_for_what_came_later(world: Callable[..., World]) -> None:
    w = world(hours=48)
    w.fetch()
    before = len(w.calls)
    w.pass_time(30)
    w.restart()
    w.fetch()
    (call,) = w.calls[before:]
    settled = minute_start(NOW) - SETTLED_MS
    assert settled <= int(call.query["startTime"]) < minute_start(NOW) + WITHOUT_TRADES * MINUTE_MS
    assert w.store.rows.keys() >= w.expected(series(), minute_start(NOW), minute_start(w.now))


def test_minutes_without_trades_are_asked_for_once_more_at_most(world: Callable[..., World]) -> None:
    w = world(hours=24)
    w.fetch()
    for _ in range(3):
        w.pass_time(20)
        w.restart()
        w.fetch()
    before = len(w.calls)
    w.restart()
    w.fetch()
    assert all(int(each.query["startTime"]) >= w.now - SETTLED_MS - 2 * MINUTE_MS for each in w.calls[before:])
    assert len(w.calls) - before <= 1


def test_minute_whose_candle_was_late_is_asked_for_again(world: Callable[..., World]) -> None:
    w = world(hours=2)
    whole = w.pages.candles
    late = whole[-2]
    assert late.ticks
    w.pages.candles = [each for each in whole if each is not late]
    w.fetch()
    assert Slot(series(), late.start) not in w.store.rows
    w.pages.candles = whole
    w.pass_time(30)
    w.restart()
    w.fetch()
    assert Slot(series(), late.start) in w.store.rows


def test_killed_history_goes_on_where_it_was(world: Callable[..., World]) -> None:
    w = world("okx", hours=24)
    for number, _ in enumerate(w.steps()):
        if number == 2:
            break
    done = len(w.calls)
    w.restart()
    w.fetch()
    assert w.store.rows.keys() == w.expected(series(), minute_start(NOW) - 24 * HOUR_MS, minute_start(NOW))
    assert len(w.calls) - done <= 24 * 60 / 300 - done + 2


def test_stored_minutes_are_neither_asked_for_nor_replaced(world: Callable[..., World]) -> None:
    w = world(hours=24)
    begin, end = minute_start(NOW) - 24 * HOUR_MS, minute_start(NOW)
    ours = Candle(1.0, 1.0, 1.0, 1.0, 1.0, 1, begin, begin, begin, begin, 0, 0)
    w.store.rows = {Slot(series(), start): ours for start in range(begin, end, MINUTE_MS)}
    gap = range(end - 3 * HOUR_MS, end - 2 * HOUR_MS, 2 * MINUTE_MS)
    for start in gap:
        del w.store.rows[Slot(series(), start)]
    emitted = w.fetch()
    (call,) = w.calls
    assert (int(call.query["startTime"]), int(call.query["endTime"])) == (gap[0], gap[-1] + MINUTE_MS - 1)
    wanted = {slot for slot in w.expected(series(), gap[0], gap[-1] + MINUTE_MS) if slot.start in gap}
    assert emitted.keys() == wanted
    assert sum(each is ours for each in w.store.rows.values()) == 24 * 60 - len(gap)


def test_venue_that_keeps_less_is_named_once(world: Callable[..., World], log: list[str]) -> None:
    w = world("kraken", hours=24)
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.pages.candles = w.pages.candles[-720:]
    w.fetch()
    found = {slot.start for slot in w.store.rows if slot.series == series()}
    assert minute_start(NOW) - min(found) >= 11.9 * HOUR_MS
    assert max(found) >= minute_start(NOW) - 2 * MINUTE_MS
    (line,) = [each for each in log if "shorter" in each]
    assert "12 hours are the history that the venue gives" in line
    assert len(w.calls) == 2


def test_other_range_than_asked_for_is_no_history(world: Callable[..., World], log: list[str]) -> None:
    w = world("binance", hours=24)
    klines = w.pages
    w.server.answer = lambda asked: Reply(klines(Asked(asked.path, asked.query | {"startTime": "0"}, {})).body)
    first = w.pages.candles[0].start
    w.pages.candles = [each for each in w.pages.candles if each.start < first + 4 * MINUTE_MS]
    assert w.fetch() == {}
    assert w.store.rows == {}
    assert w.store.complete == {}
    assert any("older minutes of BTCUSDT are not fetched" in each for each in log)


def test_refusal_pauses_all_and_loses_nothing(world: Callable[..., World], log: list[str]) -> None:
    w = world("okx", hours=24)
    answers = iter([Reply(status=429, headers={"Retry-After": "40"}), Reply(status=503), Reply(b"<html>")])
    w.server.answer = lambda asked: next(answers, None) or w.pages(asked)
    w.fetch()
    assert w.store.rows.keys() == w.expected(series(), minute_start(NOW) - 24 * HOUR_MS, minute_start(NOW))
    assert w.seconds >= 40
    assert sum("history of one cannot be fetched" in each for each in log) <= 2


def test_failing_symbol_does_not_hold_up_the_others(world: Callable[..., World]) -> None:
    w = world("okx", hours=24)
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.server.answer = lambda asked: Reply(b"{}", 400) if asked.query["instId"] == "BTCUSD" else w.pages(asked)
    for _ in range(60):
        w.seconds += w.history.step().pause_seconds
    whole = w.expected(series("ETHUSDT"), minute_start(NOW) - 24 * HOUR_MS, minute_start(NOW))
    assert w.store.rows.keys() == whole


def test_nothing_is_asked_while_the_archive_is_down(world: Callable[..., World]) -> None:
    w = world(hours=24)
    w.store.down = True
    assert [w.history.step() for _ in range(3)] == [Step({}, BEGIN_PAUSE_SECONDS)] * 3
    w.store.down = False
    w.history.step()
    asked = len(w.calls)
    w.store.down = True
    assert w.history.step() == Step({}, STORE_PAUSE_SECONDS)
    assert len(w.calls) == asked
    w.store.down = False
    w.fetch()
    assert w.store.rows.keys() == w.expected(series(), minute_start(NOW) - 24 * HOUR_MS, minute_start(NOW))


def test_half_of_the_budget_is_left_to_others(world: Callable[..., World]) -> None:
    w = world("okx", hours=24)
    w.budget = AttemptBudget(10, 2.0, w.monotonic)
    w.restart()
    w.budget.take(5)
    assert w.history.step() == Step({}, BUDGET_PAUSE_SECONDS)
    assert w.calls == []
    w.seconds += 2.0
    assert w.history.step().minutes
    assert len(w.calls) == 1


def test_symbol_that_is_listed_later_gets_its_history(world: Callable[..., World]) -> None:
    w = world(hours=2)
    w.names = {}
    w.history.step()
    assert w.calls == []
    w.names = {"BTCUSDT": "BTCUSD"}
    w.fetch()
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.fetch()
    assert {slot.series.symbol for slot in w.store.rows} == {"BTCUSDT", "ETHUSDT"}


def test_symbol_that_is_traded_no_more_ends_its_history(world: Callable[..., World], log: list[str]) -> None:
    w = world("okx", hours=24)
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.server.answer = lambda asked: Reply(b"{}", 400) if asked.query["instId"] == "BTCUSD" else w.pages(asked)
    for _ in range(3):
        w.seconds += w.history.step().pause_seconds
    w.names = {"ETHUSDT": "ETHUSD"}
    w.fetch()
    assert {slot.series.symbol for slot in w.store.rows} == {"ETHUSDT"}
    assert any("history of one is fetched again" in each for each in log)
    w.server.answer = w.pages
    w.names = {"BTCUSDT": "BTCUSD", "ETHUSDT": "ETHUSD"}
    w.fetch()
    assert {slot.series.symbol for slot in w.store.rows} == {"BTCUSDT", "ETHUSDT"}


def test_progress_is_logged_at_begin_every_half_minute_and_end(world: Callable[..., World], log: list[str]) -> None:
    w = world("okx", hours=240)
    for _ in w.steps():
        w.seconds += 10.0
    w.history.step()
    w.history.step()
    lines = [each.split(" {")[0].strip() for each in log if each.startswith("history")]
    assert lines[0].startswith("history begins: minutes of the last 240 h that are missing symbols=1")
    assert len(lines) in (2 + (w.seconds - 20) // 30, 3 + (w.seconds - 20) // 30)
    assert lines[1].startswith("history goes on done=")
    assert lines[-1].startswith("history is fetched minutes=")


def test_start_with_nothing_to_fetch_is_logged_for_debugging_alone(world: Callable[..., World], log: list[str]) -> None:
    w = world("okx", hours=1)
    w.pages.candles = [each if each.ticks else each._replace(volume="1.0", ticks=3) for each in w.pages.candles]
    w.fetch()
    w.restart()
    log.clear()
    shown: list[str] = []
    handler = logger.add(shown.append, level="INFO", format="{message}")
    w.history.step()
    w.history.step()
    logger.remove(handler)
    assert [each.split(" ")[1] for each in log if each.startswith("history")] == ["is"]
    assert shown == []


def test_end_of_the_process_is_no_failure_of_the_history(world: Callable[..., World], log: list[str]) -> None:
    w = world("okx", hours=1)
    w.history.step()
    w.history._client.close()
    w.history.step()
    assert not [each for each in log if "cannot be fetched" in each], log
