"""All trades of a minute, each once, by the pages of each venue; or an error that says why there are none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal

import pytest

from marketflow.feeds.backfill import minute_trades
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.minute_trades import BehindStream, NotFillable, trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Trade
from tests.support.rest_server import Asked, Reply, RestServer
from tests.support.venue_pages import VenuePages

MINUTE = 1_790_667_420_000
END = MINUTE + 60_000
SYMBOL = {"binance": "BTCUSDT", "coinbase": "BTC-USD", "kraken": "XBTUSD", "okx": "BTC-USDT", "bybit": "BTCUSDT"}
WITH_TRADES = ("binance", "coinbase", "kraken", "okx")
DAY_MS = 86_400_000
IGNORED = {
    "binance": {"startTime": str(MINUTE - 3 * DAY_MS), "endTime": str(MINUTE - 3 * DAY_MS + 60_000)},
    "kraken": {"since": str(10**18)},
}
"""What a venue does that ignores the time that is asked for."""


def trade(venue: str, number: int, at: int, price: float = 84_035.5, quantity: float = 0.00000035) -> Trade:
    return Trade(SYMBOL[venue], price, quantity, at, number, "buy" if number % 2 else "sell")


def steady(venue: str, count: int, every_ms: int, begin: int, first_id: int = 1) -> list[Trade]:
    return [trade(venue, first_id + number, begin + number * every_ms) for number in range(count)]


@contextmanager
def serving(
    venue: str, answer: Callable[[Asked], Reply], now_ms: int = MINUTE + 3_600_000
) -> Iterator[tuple[RestServer, RestClient]]:
    with RestServer(answer) as server:
        budget = AttemptBudget(10**6, 1.0, lambda: 0.0)
        client = RestClient(VENUES[venue], server.url, budget, lambda: now_ms * 1_000_000)
        try:
            yield server, client
        finally:
            client.close()


def whole_minute(venue: str, answer: Callable[[Asked], Reply], newest_id: int | None) -> list[Trade]:
    with serving(venue, answer) as (_, client):
        return trades_of_minute(client, SYMBOL[venue], MINUTE, newest_id)


# Pages


@pytest.mark.parametrize("newest_id", [6_000, 3_502, 2_000, None])
@pytest.mark.parametrize("venue", WITH_TRADES)
def test_minute_over_several_pages_is_whole(venue: str, newest_id: int | None) -> None:
    trades = steady(venue, 6_000, 20, MINUTE - 10_000)
    expected = [each for each in trades if MINUTE <= each.at < END]
    assert len(expected) == 3000
    assert whole_minute(venue, VenuePages(venue, trades), newest_id) == expected


@pytest.mark.parametrize("venue", WITH_TRADES)
@pytest.mark.parametrize("page", [2, 3, 7, 100])
def test_edges_of_minute_and_pages_fall_anywhere(venue: str, page: int) -> None:
    times = [MINUTE - 1500, MINUTE - 1, MINUTE, MINUTE, MINUTE + 1, END - 1, END - 1, END, END + 1, END + 5000]
    trades = [trade(venue, 70 + number, at) for number, at in enumerate(times)]
    answer = VenuePages(venue, trades, page=page)
    assert [each.id for each in whole_minute(venue, answer, 79)] == [72, 73, 74, 75, 76]


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_first_trades_of_a_listing_have_nothing_before_them(venue: str) -> None:
    trades = steady(venue, 5, 1_000, MINUTE + 30_000)
    assert whole_minute(venue, VenuePages(venue, trades), 5) == trades
    assert whole_minute(venue, VenuePages(venue, trades), None) == trades


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_minute_without_trades_is_empty(venue: str) -> None:
    around = [trade(venue, 7, MINUTE - 5_000), trade(venue, 8, END + 1_700_000)]
    assert whole_minute(venue, VenuePages(venue, around), 8) == []
    assert whole_minute(venue, VenuePages(venue), None) == []


def test_binance_looks_for_the_next_trade_hour_by_hour() -> None:
    trades = [trade("binance", 7, MINUTE - 5_000), trade("binance", 8, MINUTE + 9_000_000)]
    with serving("binance", VenuePages("binance", trades), MINUTE + 10_000_000) as (server, client):
        assert trades_of_minute(client, "BTCUSDT", MINUTE, 8) == []
        spans = [int(each.query["endTime"]) - int(each.query["startTime"]) for each in server.asked]
        assert len(spans) == 3
        assert max(spans) < 3_600_000


def test_coinbase_hole_of_2500_ids_takes_three_pages() -> None:
    """`before` gives the newest page, so the walk goes back with `after` from the first id after the hole."""
    trades = steady("coinbase", 2_500, 20, MINUTE, 1_001)
    known = [trade("coinbase", 1_000, MINUTE - 2_000), trade("coinbase", 3_501, END)]
    newer = steady("coinbase", 5_000, 100, END + 1_000, 3_502)
    with serving("coinbase", VenuePages("coinbase", [known[0], *trades, known[1], *newer])) as (server, client):
        assert trades_of_minute(client, "BTC-USD", MINUTE, 3_501) == trades
        assert [each.query for each in server.asked] == [
            {"limit": "1000", "after": after} for after in ("3502", "2502", "1502")
        ]
        assert {each.path for each in server.asked} == {"/products/BTC-USD/trades"}


@pytest.mark.parametrize("page", [17, 18, 20, 25])
def test_kraken_page_boundary_inside_17_trades_of_one_time(page: int) -> None:
    trades = steady("kraken", 15, 100, MINUTE)
    trades += [trade("kraken", 16 + number, MINUTE + 2_000) for number in range(17)]
    trades += steady("kraken", 15, 4_000, MINUTE + 3_000, 33)
    expected = [each for each in trades if each.at < END]
    assert whole_minute("kraken", VenuePages("kraken", trades, page=page), 47) == expected


def test_kraken_last_equal_to_since_ends_the_pages() -> None:
    trades = [trade("kraken", number, MINUTE + 2_000) for number in range(1, 18)]
    with serving("kraken", VenuePages("kraken", trades, page=5)) as (server, client):
        with pytest.raises(BehindStream):
            trades_of_minute(client, "XBTUSD", MINUTE, 17)
        assert len(server.asked) == 2


def test_kraken_since_is_in_nanoseconds_and_pairs_have_other_names() -> None:
    with serving("kraken", VenuePages("kraken", steady("kraken", 3, 1_000, MINUTE))) as (server, client):
        assert len(trades_of_minute(client, "XBTUSD", MINUTE, 3)) == 3
        assert server.asked[0].query == {"pair": "XBTUSD", "since": f"{MINUTE - 1_001}999999", "count": "1000"}


def test_okx_rest_gives_single_trades_where_the_stream_aggregates() -> None:
    """121 to 123 came as one trade of count 3: by REST each is there once, and no double of 123."""
    trades = steady("okx", 4, 1_000, MINUTE + 1_000, 120)
    found = whole_minute("okx", VenuePages("okx", [trade("okx", 119, MINUTE - 2_000), *trades]), 123)
    assert [(each.id, each.count) for each in found] == [(120, 1), (121, 1), (122, 1), (123, 1)]


def test_binance_aggregates_stand_for_all_their_trades() -> None:
    rows = [
        {"a": 1, "p": "9039.74000000", "q": "0.50000000", "f": 100, "l": 102, "T": MINUTE, "m": True, "M": True},
        {"a": 2, "p": "0", "q": "0", "f": -1, "l": -1, "T": MINUTE + 1, "m": False, "M": True},
        {"a": 3, "p": "9040.00000000", "q": "0.10000000", "f": 103, "l": 103, "T": MINUTE + 2, "m": False, "M": True},
    ]
    found = whole_minute("binance", lambda asked: Reply([] if "fromId" in asked.query else rows), 103)
    assert found == [
        Trade("BTCUSDT", 9039.74, 0.5, MINUTE, 102, "sell", 3),
        Trade("BTCUSDT", 9040.0, 0.1, MINUTE + 2, 103, "buy", 1),
    ]


def test_coinbase_side_by_rest_is_that_of_the_taker() -> None:
    row = {"trade_id": "7", "side": "buy", "size": "0.00007448", "price": "73271.63000000"}
    older = row | {"trade_id": 6, "time": "2026-09-29T07:00:00Z"}
    rows = [row | {"time": "2026-09-29T07:37:33.786450Z"}, older]
    (found,) = whole_minute("coinbase", lambda asked: Reply(rows), 7)
    assert found == Trade("BTC-USD", 73271.63, 0.00007448, 1_790_667_453_786, 7, "sell")


# What cannot be filled


def test_newest_60_trades_of_bybit_fill_a_quiet_minute() -> None:
    trades = steady("bybit", 80, 2_000, MINUTE - 60_000)
    assert whole_minute("bybit", VenuePages("bybit", trades[:70]), 70) == trades[30:60]
    assert whole_minute("bybit", VenuePages("bybit", trades[29:40]), 40) == trades[30:40]  # all that there are


def test_minute_before_bybit_s_newest_trades_is_not_filled() -> None:
    trades = steady("bybit", 200, 500, MINUTE - 10_000)
    with pytest.raises(NotFillable, match="bybit gives the 60 newest trades only"):
        whole_minute("bybit", VenuePages("bybit", trades), 200)


def test_okx_trades_of_over_three_months_ago_are_not_filled() -> None:
    with serving("okx", VenuePages("okx"), MINUTE + 91 * DAY_MS) as (server, client):
        with pytest.raises(NotFillable, match="okx gives no trades from over 89 days ago"):
            trades_of_minute(client, "BTC-USDT", MINUTE, 7)
        assert server.asked == []


# What ends in an error, and never in a loop


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_page_behind_the_stream_is_an_error_until_it_has_come(venue: str) -> None:
    trades = [trade(venue, 1, MINUTE - 5_000), *steady(venue, 9, 5_000, MINUTE + 1_000, 2)]
    pages = VenuePages(venue, trades[:-2])
    with serving(venue, pages) as (_, client):
        with pytest.raises(BehindStream, match=f"{venue} gives trades of {SYMBOL[venue]} up to 8 only, the stream 10"):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 10)
        pages.trades = trades
        assert trades_of_minute(client, SYMBOL[venue], MINUTE, 10) == trades[1:]


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_empty_pages_do_not_stand_for_an_empty_minute(venue: str) -> None:
    with serving(venue, VenuePages(venue)) as (server, client):
        with pytest.raises(BehindStream, match="up to none only"):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 10)
        assert len(server.asked) <= 2


@pytest.mark.parametrize("venue", ["coinbase", "okx"])
def test_empty_page_in_the_middle_is_an_error(venue: str) -> None:
    pages = VenuePages(venue, steady(venue, 3_000, 20, MINUTE - 1_000), page=50)

    def answer(asked: Asked) -> Reply:
        return pages(asked) if len(server.asked) < 3 else VenuePages(venue)(asked)

    with serving(venue, answer) as (server, client):
        with pytest.raises(RestFailed, match=f"{venue} gives no trades of {SYMBOL[venue]} before 2951"):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 3_000)
        assert len(server.asked) == 3


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_page_that_comes_again_and_again_ends_the_walk(venue: str) -> None:
    first: list[Reply] = []
    pages = VenuePages(venue, steady(venue, 3_000, 10, MINUTE), page=50)

    def answer(asked: Asked) -> Reply:
        first[:] = first or [pages(asked)]
        return first[0]

    with serving(venue, answer) as (server, client):
        with pytest.raises(RestFailed):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 4_000)
        assert len(server.asked) <= 3


@pytest.mark.parametrize("venue", WITH_TRADES)
def test_pages_without_end_are_bounded(venue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minute_trades, "MAX_PAGES", 20)
    pages = VenuePages(venue, steady(venue, 3_000, 20, MINUTE), page=2)
    with serving(venue, pages) as (server, client):
        with pytest.raises(RestFailed, match=f"over 20 pages of {venue} for one minute"):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 3_000)
        assert len(server.asked) == 20


@pytest.mark.parametrize("venue", ["binance", "kraken"])
def test_trades_of_another_time_than_asked_are_an_error(venue: str) -> None:
    old = VenuePages(venue, steady(venue, 5, 1_000, MINUTE - 3 * DAY_MS))
    with pytest.raises(RestFailed, match="from before the time that is asked for"):
        whole_minute(venue, lambda asked: old(asked._replace(query=asked.query | IGNORED[venue])), None)


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        (Reply(b"", 429, {"Retry-After": "30"}), VenueRefusal, "429"),
        (Reply(b"", 418), VenueRefusal, "418"),
        (Reply(b"<html>", 503), OSError, "503: the venue cannot answer"),
        (Reply(b"<html>maintenance</html>"), RestFailed, "cannot be read"),
        (Reply(b'[{"a":', cut=True), RestFailed, "request to .* failed: "),
    ],
    ids=["429", "418", "503", "html", "cut"],
)
@pytest.mark.parametrize("venue", WITH_TRADES)
def test_failure_between_pages_ends_the_walk_at_once(
    venue: str, reply: Reply, error: type[Exception], text: str
) -> None:
    pages = VenuePages(venue, steady(venue, 3_000, 20, MINUTE - 1_000), page=50)

    def answer(asked: Asked) -> Reply:
        return pages(asked) if len(server.asked) < 3 else reply

    with serving(venue, answer) as (server, client):
        with pytest.raises(error, match=text):
            trades_of_minute(client, SYMBOL[venue], MINUTE, 3_000)
        assert len(server.asked) == 3


# Numbers, times, ids


def row_of(price: object, quantity: object = "1", at: object = MINUTE) -> dict[str, object]:
    return {"a": 1, "p": price, "q": quantity, "f": 7, "l": 7, "T": at, "m": False}


def binance_rows(*rows: dict[str, object]) -> Callable[[Asked], Reply]:
    return lambda asked: Reply([] if "fromId" in asked.query else list(rows))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-8", 1e-8), ("1E+3", 1000.0), ("0.00000001", 1e-8), ("9.669E-05", 9.669e-5), (84035.0, 84035.0)],
)
def test_numbers_of_every_spelling_are_exact(text: object, value: float) -> None:
    (found,) = whole_minute("binance", binance_rows(row_of(text, text)), None)
    assert (found.price, found.quantity) == (value, value)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e400", "", "-0", "-1", "0", "abc", None, [], True])
def test_number_that_is_none_is_an_error_of_the_minute(text: object) -> None:
    """Not dropped: a minute without this trade would stand for the whole one."""
    for rows in ([row_of(text)], [row_of("1", text)]):
        with pytest.raises(RestFailed):
            whole_minute("binance", binance_rows(*rows), None)


@pytest.mark.parametrize("at", [MINUTE // 1000, MINUTE * 1000, MINUTE * 1_000_000, 0, -MINUTE, 4_102_444_800_000])
def test_time_in_another_unit_is_an_error(at: int) -> None:
    with pytest.raises(RestFailed, match="not dated in the unit expected"):
        whole_minute("binance", binance_rows(row_of("1", "1", at)), None)


def test_ids_above_53_and_63_bits_stay_exact() -> None:
    big = [2**53 + 1, 2**63 + 3, 1931506477151671992419320033]
    trades = [trade("okx", number, MINUTE + index) for index, number in enumerate(big)]
    before = [trade("okx", 9, MINUTE - 2_000)]
    with serving("okx", lambda asked: pages(asked)) as (_, client):
        pages = VenuePages("okx", before + trades)
        found = trades_of_minute(client, "BTC-USDT", MINUTE, big[-1])
    assert [each.id for each in found] == big


def test_sums_of_many_digits_equal_those_in_decimal() -> None:
    prices = ["0.00000638", "0.000005123", "0.00000639", "0.1"]
    quantities = ["12345678.12345678", "1000000000", "0.00000001", "3"]
    rows = [
        {"tradeId": str(20 + number), "px": prices[number % 4], "sz": quantities[number % 4]}
        | {"side": "buy" if number % 3 else "sell", "ts": str(MINUTE + number), "instId": "SHIB-USDT"}
        for number in range(90)
    ]
    rows.append(rows[0] | {"tradeId": "19", "ts": str(MINUTE - 5_000)})
    trades = whole_minute("okx", lambda asked: Reply({"code": "0", "msg": "", "data": rows[::-1]}), None)
    candle = minute_candle(trades)
    exact = [(Decimal(row["px"]), Decimal(row["sz"]), row["side"] == "buy") for row in rows[:-1]]
    assert candle.amounts is not None
    assert candle.ticks == 90
    assert candle.total == float(sum(price for price, _, _ in exact))
    assert candle.amounts.volume == float(sum(size for _, size, _ in exact))
    assert candle.amounts.buy_volume == float(sum(size for _, size, bought in exact if bought))
    assert candle.amounts.turnover == pytest.approx(float(sum(p * size for p, size, _ in exact)), rel=1e-15)


def test_open_and_close_of_one_time_follow_the_ids() -> None:
    """Coinbase gives the newest first."""
    trades = [
        trade("coinbase", 1, MINUTE - 2_000),
        trade("coinbase", 2, MINUTE, 10.0),
        trade("coinbase", 3, MINUTE, 20.0),
    ]
    candle = minute_candle(whole_minute("coinbase", VenuePages("coinbase", trades), 3))
    assert (candle.open, candle.close) == (10.0, 20.0)
    assert (candle.first_at, candle.last_at) == (MINUTE, MINUTE)
