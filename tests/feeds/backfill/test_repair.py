"""Minutes that miss trades are made again, whole, by REST. Time is the test's, the venue a real server."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
import pytest

from marketflow.errors import Unavailable
from marketflow.feeds.backfill import repair
from marketflow.feeds.backfill.hole_book import HoleBook
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.repair import GIVE_UP_SECONDS, MOST_MINUTES, Repairs, count_after_earlier_run
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.simulated.rest_side import RestAnswer
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import Side, Trade
from marketflow.model import MINUTE_MS, Candles, Hole, HoleState, Mode, Series, Slot, minute_start
from marketflow.tasks import Backoff
from tests.support.market import MINUTE
from tests.support.venue_server import VenueServer

SYMBOL = "BTCUSDT"
OTHER = Series(Mode.LIVE, "another", SYMBOL)
WITH_TRADES = ("binance", "coinbase", "kraken", "okx")


class MemoryHoles:
    """Keeps holes as PostgreSQL does."""

    def __init__(self) -> None:
        self.rows: dict[tuple[Series, int], Hole] = {}
        self.history: list[HoleState] = []
        self.down = False

    def write(self, holes: Iterable[Hole]) -> None:
        if self.down:
            raise Unavailable("down")
        for hole in holes:
            held = self.rows.get((hole.series, hole.after_id))
            if held is None or hole.changed_at >= held.changed_at:
                self.rows[hole.series, hole.after_id] = hole
                self.history.append(hole.state)

    def open_holes(self) -> list[Hole]:
        if self.down:
            raise Unavailable("down")
        return [hole for hole in self.rows.values() if hole.state is HoleState.OPEN]


class MemoryMarks:
    """Keeps until when everything is complete, as Redis does."""

    def __init__(self) -> None:
        self.until: dict[str, int] = {}
        self.down = False

    def complete_until(self, exchange: str) -> Mapping[str, int]:
        if self.down:
            raise Unavailable("down")
        return dict(self.until)

    def put_complete_until(self, exchange: str, until: Mapping[str, int]) -> None:
        if self.down:
            raise Unavailable("down")
        self.until |= until


class World:
    """A venue whose trades come by stream or not, and the runs of MarketFlow that follow each other."""

    def __init__(self, venue: str, stack: ExitStack) -> None:
        self.venue = venue
        self.now = MINUTE + 30_000
        self.clock_step_ms = 0
        """How far the clock of this machine was set, after the start."""
        self.server = stack.enter_context(VenueServer(venue, [SYMBOL], clock=self.clock))
        self.number = 1_000
        self.server.book.add(self.server.make(self.number, at=MINUTE - 90_000))
        self.traded: list[Trade] = []
        self.holes, self.marks = MemoryHoles(), MemoryMarks()
        self.emitted: list[Candles] = []
        self.exchange, self.symbols = venue, (SYMBOL,)
        self.connected = True
        self.absent: set[str] = set()
        self._stack = stack
        self.restart()

    def restart(self, newest_at: int | None = None) -> None:
        """Another run, of which the one before has left slices until a time."""
        budget = AttemptBudget(10**6, 1.0, self.seconds)
        self.rest = RestClient(VENUES[self.venue], self.server.rest_url, budget, self.clock, self.seconds)
        self._stack.callback(self.rest.close)
        (listed,) = self.rest.instruments()
        self.rest_names: Mapping[str, str] = {SYMBOL: listed.rest_symbol or listed.symbol}
        self.ids = TradeIds(monotonic=self.seconds, clock=self.local_clock)
        left = {} if newest_at is None else {self.series: newest_at}
        count_after_earlier_run([self], left, self.now)
        self.book = HoleBook(self.holes, lambda holes: self.repairs.take_over(holes))
        self.book.take_over([self.series])
        backoff = Backoff(3.0, 120.0, jitter=0.0)
        self.repairs = Repairs(self, self.book, self.marks, self.local_clock, self.seconds, backoff)

    @property
    def series(self) -> Series:
        return Series(Mode.LIVE, self.venue, SYMBOL)

    def clock(self) -> int:
        return self.now * 1_000_000

    def local_clock(self) -> int:
        return (self.now + self.clock_step_ms) * 1_000_000

    def seconds(self) -> float:
        return self.now / 1000

    def is_connected(self, symbol: str) -> bool:
        return self.connected

    def trade(self, count: int = 1, streamed: bool = True, kept: bool = True, every_ms: int = 100) -> None:
        """Trades from now on, each of them a while after the one before."""
        for _ in range(count):
            self.number += 1
            self.now += every_ms
            side: Side = "buy" if self.number % 3 else "sell"
            made = self.server.make(self.number, price=100.0 + self.number % 7, quantity=0.1, at=self.now, side=side)
            self.traded.append(made)
            if kept:
                self.server.book.add(made)
            if streamed:
                self.ids.is_new(SYMBOL, self.number, self.now)

    def steps(self, seconds: float = 0.0) -> None:
        """All steps that are due within a time."""
        until = self.now + seconds * 1000
        while True:
            self.book.step()
            made = self.repairs.step()
            if made.minutes:
                self.emitted.append(made.minutes)
            elif self.now >= until:
                return
            self.now += round(max(made.pause_seconds, 0.001) * 1000)

    def to_next_minute(self, seconds: float = 6.0) -> None:
        self.steps((minute_start(self.now) + MINUTE_MS - self.now) / 1000 + seconds)

    def made(self) -> Candles:
        return {slot: candle for each in self.emitted for slot, candle in each.items()}

    def expected(self, *starts: int) -> Candles:
        return {
            Slot(self.series, start): minute_candle([each for each in self.traded if minute_start(each.at) == start])
            for start in starts
        }

    @property
    def rows(self) -> list[tuple[int, int, HoleState, str]]:
        rows = sorted(self.holes.rows.values(), key=lambda hole: hole.after_id)
        return [(hole.after_id, hole.before_id, hole.state, hole.reason) for hole in rows]

    @property
    def pages(self) -> list[str]:
        return [path for path in self.server.rest_requests if "rade" in path or "history" in path]


@pytest.fixture
def world_of() -> Iterator[Callable[[str], World]]:
    with ExitStack() as stack:
        yield lambda venue: World(venue, stack)


@pytest.fixture
def world(world_of: Callable[[str], World]) -> World:
    return world_of("binance")


def begun(world: World) -> World:
    """After the first minute, which the start has made."""
    world.trade(5)
    closed(world, MINUTE, world.traded)
    world.to_next_minute(25 if world.venue == "bybit" else 6)
    world.emitted.clear()
    return world


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_minute_in_which_a_run_begins_is_made_whole(world_of: Callable[[str], World], venue: str) -> None:
    world = world_of(venue)
    world.now = MINUTE - MINUTE_MS + 50_000
    world.trade(300, streamed=False)
    assert MINUTE < world.now < MINUTE + 30_000
    world.restart()
    world.trade(20)
    world.to_next_minute(4.0)
    assert world.made() == {}
    world.steps(2)
    assert world.made() == world.expected(MINUTE)
    assert world.rows == []


@pytest.mark.parametrize("is_restarted", [False, True])
def test_hole_is_filled_though_the_clock_was_set_back(world: World, is_restarted: bool) -> None:
    """Of two versions of a hole PostgreSQL keeps the one that was changed later."""
    begun(world)
    start = minute_start(world.now)
    world.trade(10)
    world.trade(5, streamed=False)
    late, names = world.traded[-1], world.rest_names
    world.to_next_minute(50)
    world.rest_names = {}  # nothing can be fetched yet
    world.ids.is_new(SYMBOL, world.number, late.at)
    world.steps(3)
    assert world.rows == [(world.number - 5, world.number, HoleState.OPEN, "")]
    world.clock_step_ms = -30_000
    if is_restarted:
        world.restart()
    world.rest_names = names
    world.steps(8)
    assert world.made()[Slot(world.series, start)] == world.expected(start)[Slot(world.series, start)]
    assert world.rows == [(world.number - 5, world.number, HoleState.FILLED, "")]


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_hole_is_filled_once_its_minute_is_over(world_of: Callable[[str], World], venue: str) -> None:
    world = begun(world_of(venue))
    start = minute_start(world.now)
    world.trade(10)
    world.trade(4, streamed=False)
    world.trade(10)
    after = world.number - 14
    world.steps(3)
    assert world.rows == [(after, after + 5, HoleState.OPEN, "")]
    assert world.made() == {}
    world.to_next_minute()
    assert world.made() == world.expected(start)
    assert world.rows == [(after, after + 5, HoleState.FILLED, "")]


def test_trades_of_the_same_millisecond_as_their_neighbours_are_filled(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    world.trade(1)
    world.trade(1, streamed=False, every_ms=0)
    world.trade(1, streamed=False, every_ms=2000)
    world.trade(1, every_ms=0)
    world.to_next_minute()
    assert world.made() == world.expected(start)


def test_hole_over_several_minutes_makes_each_of_them(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    world.trade(3)
    world.trade(40, streamed=False, every_ms=5_000)
    world.trade(3)
    world.to_next_minute()
    starts = range(start, minute_start(world.traded[-1].at) + 1, MINUTE_MS)
    assert len(starts) == 4
    assert world.made() == world.expected(*starts)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]


def test_minute_with_a_start_and_a_hole_is_fetched_once(world: World) -> None:
    world.trade(10)
    world.trade(4, streamed=False)
    world.trade(10)
    world.to_next_minute()
    assert world.made() == world.expected(MINUTE)
    assert [(row[1] - row[0], row[2]) for row in world.rows] == [(5, HoleState.FILLED)]
    assert len(world.pages) == len({*world.pages}) == 2


def test_late_trade_within_the_grace_costs_no_call(world: World) -> None:
    begun(world)
    calls = len(world.server.rest_requests)
    world.trade(1)
    world.trade(1, streamed=False)
    late = world.traded[-1]
    world.trade(1)
    assert world.ids.is_new(SYMBOL, late.id or 0, late.at)
    world.to_next_minute()
    assert (world.rows, world.made(), len(world.server.rest_requests)) == ([], {}, calls)


def test_ids_that_the_venue_lacks_are_absent(world: World) -> None:
    begun(world)
    world.trade(3)
    world.trade(2, streamed=False, kept=False)
    world.trade(1, streamed=False)
    world.trade(3)
    world.to_next_minute()
    assert [row[2:] for row in world.rows] == [(HoleState.ABSENT, "the venue has 1 of 3 trades")]
    calls = len(world.server.rest_requests)
    world.steps(120)
    assert len(world.server.rest_requests) == calls


def test_many_gaps_of_a_minute_are_one_row(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    for _ in range(20):
        world.trade(2)
        world.trade(1, streamed=False)
    world.trade(1)
    world.to_next_minute()
    assert [row[2] for row in world.rows] == [HoleState.FILLED]
    assert world.made() == world.expected(start)


def test_aggregated_trades_cover_the_ids_of_a_hole(world_of: Callable[[str], World]) -> None:
    world = begun(world_of("okx"))
    start = minute_start(world.now)
    world.trade(3)
    world.trade(6, streamed=False)
    world.ids.is_new(SYMBOL, world.number, world.now, 3)  # the last three came as one
    assert world.number == world.traded[-1].id
    world.to_next_minute()
    assert world.made() == world.expected(start)
    assert [row[1] - row[0] - 1 for row in world.rows] == [3]
    assert world.rows[0][2] is HoleState.FILLED


def test_rest_behind_the_stream_is_asked_again(world_of: Callable[[str], World]) -> None:
    world = begun(world_of("coinbase"))
    start = minute_start(world.now)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3, kept=False)
    world.to_next_minute()
    assert world.made() == {}
    for trade in world.traded:
        world.server.book.add(trade)
    world.steps(4)
    assert world.made() == world.expected(start)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]


def overlapping(answer: Callable[[str], RestAnswer]) -> Callable[[str], RestAnswer]:
    """Pages of Binance with five trades, each of which begins with the last three of the one before."""

    def pages(target: str) -> RestAnswer:
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        if "fromId" in query:
            query["fromId"] = str(int(query["fromId"]) - 3)
        return answer(f"{parts.path}?{urlencode(query | {'limit': '5'})}")

    return pages


def test_pages_that_overlap_and_are_behind_give_each_trade_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(world)
    monkeypatch.setattr(world.server.rest, "answer", overlapping(world.server.rest.answer))
    start = minute_start(world.now)
    world.trade(5)
    world.trade(2, streamed=False)
    world.trade(1, streamed=False, kept=False)
    world.trade(4, kept=False)
    world.to_next_minute()
    assert world.made() == {}
    assert [row[2] for row in world.rows] == [HoleState.OPEN]
    for late in world.traded[-5:]:
        world.server.book.add(late)
    world.steps(4)
    assert world.made() == world.expected(start)
    assert [(row[1] - row[0], row[2]) for row in world.rows] == [(4, HoleState.FILLED)]
    assert sum("fromId" in page for page in world.pages) >= 4


FAILURES = {
    "429": RestAnswer(b"", 429, {"Retry-After": "7"}),
    "500": RestAnswer(b"<html>", 500),
    "html": RestAnswer(b"<html>no</html>"),
    "418": RestAnswer(b"", 418),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_rest_is_not_asked_in_a_loop(world: World, failure: str) -> None:
    begun(world)
    start = minute_start(world.now)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.server.rest_answers.extend([FAILURES[failure]] * 4)
    calls = len(world.pages)
    world.to_next_minute()
    assert world.made() == {}
    assert len(world.pages) == calls + 1
    world.steps(30)
    assert len(world.pages) <= calls + 4
    world.steps(600)
    assert world.made() == world.expected(start)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]


def test_end_of_the_process_is_no_failure_of_a_repair(world: World, log: list[str]) -> None:
    world.trade(3)
    world.rest.close()
    world.to_next_minute()
    assert not [each for each in log if "cannot be fetched" in each], log


def test_hole_is_given_up_after_a_stated_time_of_failures(world: World) -> None:
    begun(world)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.server.rest_answers.extend([RestAnswer(b"", 503)] * 1000)
    calls = len(world.pages)
    world.steps(GIVE_UP_SECONDS + 200)
    ((_, _, state, reason),) = world.rows
    assert state is HoleState.GIVEN_UP
    assert reason.startswith("in vain for 15 minutes: 503")
    assert len(world.pages) - calls < 20
    assert world.marks.until[SYMBOL] > MINUTE


def test_downtime_is_made_again_from_the_mark_on(world: World) -> None:
    begun(world)
    world.trade(10)
    world.steps(20)
    world.trade(300)
    killed_at = world.now
    mark = world.marks.until[SYMBOL]
    assert mark == minute_start(killed_at)
    world.trade(100, streamed=False, every_ms=1000)
    world.restart(newest_at=killed_at)
    world.trade(5)
    world.to_next_minute()
    starts = range(mark, minute_start(world.traded[-1].at) + 1, MINUTE_MS)
    assert len(starts) >= 2
    assert world.made() == world.expected(*starts)


def test_minute_that_is_over_does_not_wait_for_the_running_one(world: World) -> None:
    begun(world)
    world.trade(10)
    world.steps(20)
    world.trade(10)
    killed_at = world.now
    world.now = minute_start(world.now) + MINUTE_MS + 6_000
    world.restart(newest_at=killed_at)
    world.trade(3)
    world.steps(1)
    assert world.made() == world.expected(minute_start(killed_at))
    world.to_next_minute()
    assert world.made() == world.expected(minute_start(killed_at), minute_start(killed_at) + MINUTE_MS)


def test_minute_is_made_again_by_the_run_after_a_run_that_was_too_short(world: World) -> None:
    begun(world)
    world.trade(10)
    world.steps(11)
    mark, killed_at = world.marks.until[SYMBOL], world.now
    for _ in range(12):  # seconds each, over the end of the minute: none lives until what it makes is stored
        world.trade(30)
        world.restart(newest_at=killed_at)
        world.trade(10)
        world.repairs.step()
        killed_at = world.now
    assert minute_start(world.now) > mark
    assert world.marks.until[SYMBOL] == mark
    world.restart(newest_at=killed_at)
    world.trade(1)
    world.to_next_minute()
    assert set(world.made()) == {Slot(world.series, start) for start in range(mark, world.now - 60_000, MINUTE_MS)}
    assert world.made() == world.expected(*(slot.start for slot in world.made()))


def test_long_downtime_is_left_to_the_history(world: World) -> None:
    begun(world)
    world.trade(10)
    world.steps(20)
    killed_at = world.now
    world.trade(60, streamed=False, every_ms=60_000)
    world.restart(newest_at=killed_at)
    world.trade(5)
    world.to_next_minute()
    assert len(world.made()) == MOST_MINUTES + 1
    assert max(world.made()).start == minute_start(world.traded[-1].at)


def test_double_after_a_restart_counts_once(world: World) -> None:
    begun(world)
    world.trade(10)
    last = world.traded[-1]
    assert last.id is not None
    world.restart(newest_at=last.at)
    assert not world.ids.is_new(SYMBOL, last.id, last.at)
    world.trade(1)
    assert not world.ids.is_new(SYMBOL, last.id, last.at)
    assert world.ids.doubles == 2


def test_old_trade_on_connecting_is_not_counted(world: World) -> None:
    assert not world.ids.is_new(SYMBOL, 900, MINUTE - 1)
    assert world.ids.is_new(SYMBOL, 901, MINUTE)


def test_quiet_symbol_is_made_again_without_a_trade(world: World) -> None:
    world.trade(3, streamed=False)
    world.connected = False
    world.steps(30)
    assert world.made() == {}
    world.connected = True
    world.steps(90)
    assert world.made() == world.expected(MINUTE)
    assert world.marks.until[SYMBOL] >= MINUTE + MINUTE_MS


def test_open_hole_of_an_earlier_run_is_filled(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.steps(3)
    assert [row[2] for row in world.rows] == [HoleState.OPEN]
    world.now += 5 * MINUTE_MS
    world.restart()
    world.steps(2)
    assert world.made() == world.expected(start)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]


def test_holes_are_taken_over_once_and_of_the_series_that_are_to_be(world: World) -> None:
    begun(world)
    mine, foreign = (Hole(series, 5, 9, world.now, world.now, world.now, world.now) for series in (world.series, OTHER))
    world.holes.write([mine, foreign])
    taken: list[Hole] = []
    book = HoleBook(world.holes, taken.extend)
    book.step()
    assert taken == []
    book.take_over([world.series])
    world.holes.down = True
    book.step()
    world.holes.down = False
    book.step()
    book.step()
    assert taken == [mine]
    book.put(msgspec.structs.replace(mine, state=HoleState.FILLED))  # and not yet written
    book.take_over([world.series, OTHER])
    book.step()
    assert taken == [mine, foreign]


def test_old_hole_is_given_up_where_trades_come_from_the_newest_back(world_of: Callable[[str], World]) -> None:
    world = begun(world_of("okx"))
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.steps(3)
    world.now += 60 * MINUTE_MS
    world.restart()
    world.trade(1)
    calls = len(world.pages)
    world.steps(2)
    assert [row[2:] for row in world.rows] == [(HoleState.GIVEN_UP, "over 30 minutes old")]
    assert len(world.pages) - calls < 3 * MOST_MINUTES


@pytest.mark.parametrize(("venue", "made"), [("kraken", MOST_MINUTES), ("coinbase", MOST_MINUTES - 1)])
def test_hole_of_an_hour_is_made_again_in_part(world_of: Callable[[str], World], venue: str, made: int) -> None:
    world = begun(world_of(venue))
    start = minute_start(world.now)
    world.trade(3)
    world.trade(60, streamed=False, every_ms=60_000)
    world.trade(3)
    world.to_next_minute(20)
    assert len(world.made()) == made
    assert (Slot(world.series, start) in world.made()) is (venue == "kraken")
    assert [row[2:] for row in world.rows] == [(HoleState.GIVEN_UP, "longer than 15 minutes")]


def test_hole_of_a_symbol_that_is_traded_no_more_is_given_up(world: World) -> None:
    begun(world)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.rest_names, world.absent = {}, {SYMBOL}
    world.steps(GIVE_UP_SECONDS)
    assert [row[2] for row in world.rows] == [HoleState.OPEN]
    world.steps(70)
    assert [row[2:] for row in world.rows] == [(HoleState.GIVEN_UP, "the venue does not trade it any more")]


def test_old_hole_of_an_earlier_run_waits_for_the_names_of_symbols(world: World) -> None:
    """A start reads its holes before it has asked the venue which symbols there are."""
    begun(world)
    start = minute_start(world.now)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    hole = Hole(world.series, world.number - 5, world.number - 2, start, world.now, world.now, world.now)
    world.holes.rows[world.series, hole.after_id] = hole
    world.now += 40 * MINUTE_MS
    world.restart()
    names, world.rest_names = world.rest_names, {}
    world.steps(5)
    assert [row[2] for row in world.rows] == [HoleState.OPEN]
    world.rest_names = names
    world.steps(5)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]
    assert world.made() == world.expected(start)


def test_hole_waits_for_the_archive_and_is_filled_meanwhile(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    world.holes.down = True
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    world.to_next_minute()
    assert world.made() == world.expected(start)
    assert (world.rows, world.book.pending) == ([], 1)
    world.holes.down = False
    world.steps(3)
    assert [row[2] for row in world.rows] == [HoleState.FILLED]
    assert world.book.pending == 0


def test_nothing_is_marked_complete_beyond_a_hole(world: World) -> None:
    begun(world)
    world.trade(3)
    world.trade(2, streamed=False)
    world.trade(3)
    hole_start = minute_start(world.now)
    world.server.rest_answers.extend([RestAnswer(b"", 503)] * 3)
    for _ in range(4):
        world.trade(100)
        world.steps(6)
        assert world.marks.until[SYMBOL] <= hole_start
    world.trade(400)
    world.steps(20)
    world.trade(100)
    world.steps(6)
    assert world.marks.until[SYMBOL] > hole_start


def test_start_without_a_cache_reaches_as_far_back_as_it_can(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "MARKS_WAIT_SECONDS", 3.0)
    world.now -= 10 * MINUTE_MS
    world.trade(40, streamed=False, every_ms=15_000)
    world.marks.down = True
    world.restart()
    world.trade(3)
    world.steps(2)
    assert world.made() == {}
    world.to_next_minute()
    assert len(world.made()) >= 10
    world.marks.down = False
    world.steps(6)
    assert world.marks.until


def closed(world: World, start: int, trades: Iterable[Trade]) -> None:
    of_minute = [trade for trade in trades if minute_start(trade.at) == start]
    world.repairs.note({Slot(world.series, start): minute_candle(of_minute)} if of_minute else {})


def test_jump_of_ids_is_no_hole_where_the_venue_s_candle_agrees(world_of: Callable[[str], World]) -> None:
    world = begun(world_of("bybit"))
    start = minute_start(world.now)
    world.trade(3)
    world.number += 500
    world.trade(3)
    closed(world, start, world.traded)
    world.to_next_minute(25)
    assert (world.rows, world.made()) == ([], {})


def test_hole_of_500_ids_of_bybit_is_given_up(world_of: Callable[[str], World]) -> None:
    """The venue gives its 60 newest trades; its candle says how much is missing."""
    world = begun(world_of("bybit"))
    start = minute_start(world.now)
    world.trade(3)
    world.trade(500, streamed=False, every_ms=20)
    world.trade(3)
    closed(world, start, [*world.traded[-3:], *world.traded[-506:-503]])
    world.to_next_minute(25)
    ((after, before, state, reason),) = world.rows
    assert (before - after, state) == (501, HoleState.GIVEN_UP)
    assert reason == "bybit gives the 60 newest trades only; its candles have 50 more volume"
    assert world.made() == {}


def test_hole_within_the_newest_trades_of_bybit_is_filled(world_of: Callable[[str], World]) -> None:
    world = begun(world_of("bybit"))
    start = minute_start(world.now)
    world.trade(3)
    world.trade(20, streamed=False)
    world.trade(3)
    closed(world, start, [*world.traded[-3:], *world.traded[-26:-23]])
    world.to_next_minute(25)
    assert [(row[1] - row[0], row[2]) for row in world.rows] == [(21, HoleState.FILLED)]
    assert world.made() == world.expected(start)


def test_first_minute_that_cannot_be_made_is_marked(world_of: Callable[[str], World]) -> None:
    world = world_of("bybit")
    world.trade(80, streamed=False, every_ms=50)
    world.trade(3)
    closed(world, MINUTE, world.traded[-3:])
    world.to_next_minute(25)
    reason = "bybit gives the 60 newest trades only; its candles have 8 more volume"
    assert [row[2:] for row in world.rows] == [(HoleState.GIVEN_UP, reason)]
    (hole,) = world.holes.rows.values()
    assert (hole.from_ms, minute_start(hole.to_ms)) == (MINUTE, MINUTE)


def test_first_minute_without_a_loss_is_not_marked(world_of: Callable[[str], World]) -> None:
    world = world_of("bybit")
    world.trade(3)
    closed(world, MINUTE, world.traded)
    world.to_next_minute(25)
    assert world.rows == []


def test_trade_that_came_too_late_to_count_is_fetched(world: World) -> None:
    begun(world)
    start = minute_start(world.now)
    world.trade(3)
    world.trade(3, streamed=False)
    for held_up in world.traded[-3:]:
        assert held_up.id is not None
        assert world.ids.is_new(SYMBOL, held_up.id, held_up.at)
        world.ids.lose(SYMBOL, held_up.id, held_up.at)  # by then the decoder has rejected it for its time
    world.trade(3)
    world.to_next_minute()
    assert world.made() == world.expected(start)
    assert [(row[1] - row[0], row[2]) for row in world.rows] == [(4, HoleState.FILLED)]
