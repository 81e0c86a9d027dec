"""The venue's own candles: closed minutes alone, none where nothing was traded, and never of another time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from functools import partial

import pytest

from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.backfill.venue_candles import RangeNotHonoured, candles_between, venue_minute
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from marketflow.model import MINUTE_MS, Amounts, VenueValues
from tests.support.rest_server import Asked, Reply, RestServer
from tests.support.venue_pages import Row, VenuePages

NOON = 1_790_596_800_000
SYMBOL = {"binance": "BTCUSDT", "coinbase": "BTC-USD", "kraken": "XBTUSD", "okx": "BTC-USDT", "bybit": "BTCUSDT"}
HAS_COUNT = ("binance", "kraken")
DAY_MS = 86_400_000


def minute(number: int) -> int:
    return NOON + number * MINUTE_MS


def row(number: int, volume: str = "0.50000000", ticks: int = 7, confirm: bool = True) -> Row:
    return Row(minute(number), "100.5", "101.25", "99.75", "100.25", volume, ticks, confirm)


def quiet(number: int) -> Row:
    """A minute without trades, as venues have it that do not leave it out: the close before, volume and count 0."""
    return Row(minute(number), "100.25", "100.25", "100.25", "100.25", "0", 0)


@contextmanager
def serving(venue: str, answer: Callable[[Asked], Reply]) -> Iterator[tuple[RestServer, RestClient]]:
    with RestServer(answer) as server:
        client = RestClient(VENUES[venue], server.url, AttemptBudget(10**6, 1.0, lambda: 0.0))
        try:
            yield server, client
        finally:
            client.close()


def pages_of(venue: str, rows: Sequence[Row], now: int) -> VenuePages:
    pages = VenuePages(venue, candles=rows)
    pages.now = now
    return pages


def starts(venue: str, answer: Callable[[Asked], Reply], since: int, until: int, now: int) -> list[int]:
    with serving(venue, answer) as (_, client):
        found = candles_between(client, SYMBOL[venue], minute(since), minute(until), now)
    return [(start - NOON) // MINUTE_MS for start in found]


@pytest.mark.parametrize("venue", VENUES)
def test_closed_minutes_have_the_values_of_the_venue(venue: str) -> None:
    pages = pages_of(venue, [row(number) for number in range(6)], minute(5))
    with serving(venue, pages) as (_, client):
        found = candles_between(client, SYMBOL[venue], minute(1), minute(4), minute(5))
    turnover = 0.5 if venue in ("binance", "okx", "bybit") else None
    ticks = 7 if venue in HAS_COUNT else None
    values = VenueValues(100.5, 101.25, 99.75, 100.25, 0.5, turnover, ticks)
    assert {start: row.values for start, row in found.items()} == dict.fromkeys(map(minute, (1, 2, 3)), values)
    assert [*found] == [minute(1), minute(2), minute(3)]


@pytest.mark.parametrize("venue", VENUES)
def test_minutes_without_trades_are_absent_at_every_venue(venue: str) -> None:
    rows = [row(0), quiet(1), row(2), quiet(3), quiet(4), row(5), row(6)]
    assert starts(venue, pages_of(venue, rows, minute(7)), 0, 6, minute(7)) == [0, 2, 5]


@pytest.mark.parametrize("venue", VENUES)
def test_range_without_any_trades_is_an_answer(venue: str) -> None:
    rows = [row(0), *[quiet(number) for number in range(1, 6)], row(6)]
    assert starts(venue, pages_of(venue, rows, minute(7)), 1, 6, minute(7)) == []


@pytest.mark.parametrize("venue", VENUES)
def test_forming_candle_is_never_taken_for_a_closed_one(venue: str) -> None:
    rows = [row(0), row(1), row(2, confirm=False)]
    now = minute(2) + 59_999
    assert starts(venue, pages_of(venue, rows, now), 0, 9, now) == [0, 1]


@pytest.mark.parametrize("venue", VENUES)
def test_clock_ahead_of_the_venue_takes_no_forming_candle(venue: str) -> None:
    """The venue's time is 12:01:58; this machine's is five seconds ahead."""
    venue_now = minute(1) + 58_000
    pages = pages_of(venue, [row(0), row(1, confirm=False)], venue_now)

    def answer(asked: Asked) -> Reply:
        return pages(asked)._replace(headers={"Date": formatdate(venue_now / 1000, usegmt=True)})

    assert starts(venue, answer, 0, 9, venue_now + 5_000) == [0]


@pytest.mark.parametrize("venue", ["kraken", "okx", "bybit"])
def test_mark_of_a_forming_candle_counts_for_more_than_the_clock(venue: str) -> None:
    """Kraken's last row, OKX's confirm, the time in Bybit's answer; this machine's clock is minutes ahead."""
    pages = pages_of(venue, [row(0), row(1), row(2, confirm=False)], minute(2) + 30_000)
    assert starts(venue, pages, 0, 9, minute(9)) == [0, 1]


def test_stale_row_of_a_minute_does_not_overwrite_another() -> None:
    """One start twice, high and volume alike, another close: nobody knows which holds."""
    kline = [NOON, "1", "2", "1", "2", "5", NOON + 59_999, "7", 3, "0", "0", "0"]
    stale = [*kline[:4], "1.5", *kline[5:]]
    assert starts("binance", lambda asked: Reply([kline, kline]), 0, 5, minute(9)) == [0]
    with pytest.raises(RestFailed, match="binance gives two candles of BTCUSDT for one minute"):
        starts("binance", lambda asked: Reply([kline, stale]), 0, 5, minute(9))


@pytest.mark.parametrize("venue", VENUES)
def test_long_range_is_asked_for_in_pages(venue: str) -> None:
    count = 700 if venue == "kraken" else 2_500
    rows = [row(number) for number in range(count)] + [row(count)]
    most = VENUES[venue].rest.candles_a_call
    with serving(venue, pages_of(venue, rows, minute(count + 1))) as (server, client):
        found = candles_between(client, SYMBOL[venue], NOON, minute(count), minute(count + 1))
        assert [*found] == [minute(number) for number in range(count)]
        assert len(server.asked) == -(-count // most)


@pytest.mark.parametrize("venue", ["binance", "coinbase", "okx", "bybit"])
def test_venue_that_gives_fewer_rows_is_asked_again_for_the_rest(venue: str) -> None:
    pages = pages_of(venue, [row(number) for number in range(250)], minute(251))

    def newest_100(asked: Asked) -> Reply:
        full = pages(asked)
        if venue == "binance":
            return Reply(full.body[-100:])  # type: ignore[index]
        if venue == "coinbase":
            return Reply(full.body[:100])  # type: ignore[index]
        body = dict(full.body)  # type: ignore[call-overload]
        if venue == "okx":
            return Reply(body | {"data": body["data"][:100]})
        return Reply(body | {"result": body["result"] | {"list": body["result"]["list"][:100]}})

    assert starts(venue, newest_100, 0, 250, minute(251)) == [*range(250)]


# Another time than asked for


def test_kraken_range_older_than_720_minutes_is_refused() -> None:
    rows = [row(number) for number in range(-720, 1)]
    pages = pages_of("kraken", rows, minute(0))
    with serving("kraken", pages) as (server, client):
        with pytest.raises(RangeNotHonoured, match="kraken gives candles of the last 12 hours only"):
            candles_between(client, "XBTUSD", NOON - 3 * DAY_MS, NOON, NOON)
        assert server.asked == []


def test_kraken_answer_that_begins_after_since_is_not_honoured() -> None:
    """By this machine's clock the range is young enough; the answer says that it is not."""
    pages = pages_of("kraken", [row(number) for number in range(60, 781)], minute(780))
    with pytest.raises(
        RangeNotHonoured, match=f"candles of XBTUSD from {minute(61)} to {minute(780)}, not from {NOON}"
    ):
        starts("kraken", pages, 0, 600, minute(720))


def test_coinbase_rows_from_before_the_start_are_left_out() -> None:
    """Its documents say that some candles may precede the start, which the others do not take for an answer."""
    pages = pages_of("coinbase", [row(number) for number in range(-40, 1)], minute(9))

    def answer(asked: Asked) -> Reply:
        return pages(asked._replace(query=asked.query | {"start": "2000-01-01T00:00:00Z"}))

    assert starts("coinbase", answer, 0, 5, minute(9)) == [0]
    assert starts("coinbase", answer, 1, 5, minute(9)) == []


def test_kraken_listing_has_no_candles_before_it() -> None:
    pages = pages_of("kraken", [row(number) for number in range(100, 131)], minute(131))
    assert starts("kraken", pages, 0, 130, minute(131)) == [*range(100, 130)]
    assert starts("kraken", pages, 0, 90, minute(131)) == []


@pytest.mark.parametrize("venue", ["binance", "coinbase", "okx", "bybit"])
def test_candles_of_another_time_are_an_error(venue: str) -> None:
    newest = pages_of(venue, [row(number) for number in range(9_000, 9_010)], minute(9_020))

    def answer(asked: Asked) -> Reply:
        wide = {"startTime": "0", "start": "0", "before": "0"}
        late = {"endTime": str(10**15), "end": str(10**15), "after": str(10**15)}
        if venue == "coinbase":
            wide, late = {"start": "2000-01-01T00:00:00Z"}, {"end": "2100-01-01T00:00:00Z"}
        return newest(asked._replace(query=asked.query | wide | late))

    with pytest.raises(RangeNotHonoured, match=f"{venue} gives candles of {SYMBOL[venue]} from {minute(9_000)}"):
        starts(venue, answer, 0, 30, minute(9_020))


def test_okx_days_of_utc_plus_8_are_refused() -> None:
    """Rows of 1D start at 16:00 UTC; what is asked for is minutes, from which days are made in UTC."""
    days = [Row(NOON + 4 * 3_600_000 - number * DAY_MS, "1", "2", "1", "2", "5", 7) for number in range(3)]
    with serving("okx", lambda asked: pages_of("okx", days, minute(300))(asked)) as (server, client):
        assert candles_between(client, "BTC-USDT", NOON, minute(200), minute(300)) == {}
        assert {each.query["bar"] for each in server.asked} == {"1m"}
    wide = {"before": "0", "after": str(10**15)}
    with pytest.raises(RangeNotHonoured):
        starts(
            "okx",
            lambda asked: pages_of("okx", days, minute(300))(asked._replace(query=asked.query | wide)),
            0,
            200,
            minute(300),
        )


@pytest.mark.parametrize("start", [NOON + 1, NOON // 1000, NOON * 1000])
def test_candle_in_another_unit_of_time_is_an_error(start: int) -> None:
    kline = [start, "1", "2", "1", "2", "5", start + 59_999, "7", 3, "0", "0", "0"]
    with pytest.raises(RestFailed):
        starts("binance", lambda asked: Reply([kline]), 0, 5, minute(9))


# Numbers


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e400", "", "-1", "abc", None])
def test_candle_whose_numbers_are_none_is_an_error(text: str | None) -> None:
    for column in range(1, 6):
        kline: list[object] = [NOON, "1", "2", "1", "2", "5", NOON + 59_999, "7", 3, "0", "0", "0"]
        kline[column] = text
        with pytest.raises(RestFailed):
            starts("binance", lambda asked: Reply([kline]), 0, 5, minute(9))  # noqa: B023 - asked at once


@pytest.mark.parametrize("venue", VENUES)
def test_small_prices_and_great_volumes_keep_their_digits(venue: str) -> None:
    tiny = Row(NOON, "0.00000638", "0.00000639", "0.000005123", "0.00000637", "12345678.12345678", 3)
    pages = pages_of(venue, [tiny, row(1)], minute(2))
    with serving(venue, pages) as (_, client):
        ((_, values, *_),) = candles_between(client, SYMBOL[venue], NOON, minute(1), minute(2)).values()
    assert [values.open, values.high, values.low, values.close] == [0.00000638, 0.00000639, 0.000005123, 0.00000637]
    assert values.volume == 12345678.12345678


# What only some venues say


def test_klines_of_binance_say_what_the_takers_bought() -> None:
    kline = Row(NOON, "100.5", "101.25", "99.75", "100.25", "0.5", 7, True, "50.25", bought=("0.125", "12.5"))
    with serving("binance", pages_of("binance", [kline, row(1)], minute(2))) as (_, client):
        minute_of_it = venue_minute(candles_between(client, "BTCUSDT", NOON, minute(1), minute(2))[NOON])
    assert minute_of_it.amounts == Amounts(0.5, 50.25, 0.125, 12.5)
    assert (minute_of_it.ticks, minute_of_it.average) == (7, 100.5)


def test_candles_of_kraken_say_count_and_mean_but_no_turnover() -> None:
    said = Row(NOON, "100.5", "101.2", "99.7", "100.2", "0.5", 7, vwap="100.4")
    with serving("kraken", pages_of("kraken", [said, row(1)], minute(2))) as (_, client):
        minute_of_it = venue_minute(candles_between(client, "XBTUSD", NOON, minute(1), minute(2))[NOON])
    assert minute_of_it.ticks == 7
    assert minute_of_it.average == pytest.approx(100.4, rel=1e-15)
    assert minute_of_it.amounts == Amounts(0.5, None, None, None)


# Requests and failures


def test_okx_asks_for_old_candles_at_another_path() -> None:
    with serving("okx", pages_of("okx", [], minute(5))) as (server, client):
        candles_between(client, "BTC-USDT", minute(-60), minute(0), minute(5))
        candles_between(client, "BTC-USDT", minute(-3_000), minute(-2_900), minute(5))
        assert [each.path.rpartition("/")[2] for each in server.asked] == ["candles", "history-candles"]


@pytest.mark.parametrize("venue", VENUES)
def test_failure_of_a_page_is_the_failure_of_the_whole(venue: str) -> None:
    pages = pages_of(venue, [row(number) for number in range(1_500)], minute(1_501))

    def answer(asked: Asked) -> Reply:
        return pages(asked) if len(server.asked) < 2 else Reply(b"", 429)

    since = minute(781 + 60) if venue == "kraken" else NOON
    with serving(venue, answer) as (server, client):
        ask = partial(candles_between, client, SYMBOL[venue], since, minute(1_500), minute(1_501))
        if venue == "kraken":  # a single page
            ask()
        with pytest.raises(VenueRefusal, match="429"):
            ask()
        assert len(server.asked) == 2
