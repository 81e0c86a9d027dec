"""What simulated venues answer by REST: pages, candles and limits as each venue documents them."""

import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from marketflow.feeds.simulated import trade_book
from marketflow.feeds.simulated.dialects import DIALECTS, kraken_ns
from marketflow.feeds.simulated.rest_registry import RESTS
from marketflow.feeds.simulated.rest_side import VenueRest
from marketflow.feeds.simulated.simulated_market import MarketTrades, PriceHistory
from marketflow.feeds.simulated.simulated_venue import MarketSource
from marketflow.feeds.simulated.trade_book import KEPT_MINUTES, TradeBook
from marketflow.feeds.venues.venue import Side, Trade
from marketflow.model import MINUTE_MS

START = 1_790_667_420_000  # 2026-09-29T07:37:00Z

Candle = tuple[Decimal, Decimal, Decimal, Decimal, Decimal]
"""Open, high, low, close, volume."""


class Venue:
    """A venue's REST side at a time that tests set."""

    def __init__(self, name: str, symbols: Sequence[str] = ("BTCUSDT", "ETHUSDT"), limited: bool = False) -> None:
        dialect = DIALECTS[name]
        self.name = name
        self.symbol = dialect.native(symbols[0])
        listed = [dialect.listed(symbol) for symbol in symbols]
        self.seconds = 0.0
        self.now_ms = START + 10 * MINUTE_MS
        self.book = TradeBook((each.native for each in listed), monotonic=lambda: self.seconds)
        self.rest: VenueRest = RESTS[name](
            listed, self.book, lambda: self.now_ms * 1_000_000, lambda: self.seconds, limited
        )
        self.headers: Mapping[str, str] = {}
        self.status = 0

    def get(self, target: str) -> Any:
        answer = self.rest.answer(target)
        self.headers, self.status = answer.headers, answer.status
        return msgspec.json.decode(answer.body)

    def add(self, *numbers: int, at: int | None = None, price: float = 100.0, quantity: float = 0.5) -> None:
        for number in numbers:
            self.book.add(Trade(self.symbol, price, quantity, START + number if at is None else at, number, "buy"))

    def candles(self) -> dict[int, Candle]:
        """All candles of the market's ten minutes, by start."""
        begin, end = START, START + 10 * MINUTE_MS
        match self.name:
            case "binance":
                rows = self.get(f"/api/v3/klines?symbol={self.symbol}&interval=1m&startTime={begin}&limit=1000")
                return {row[0]: _decimals(row[1:6]) for row in rows if row[8]}
            case "coinbase":
                ends = f"start={begin // 1000}&end={end // 1000}"
                rows = self.get(f"/products/{self.symbol}/candles?granularity=60&{ends}")
                return {start * 1000: _decimals([opened, high, low, *rest]) for start, low, high, opened, *rest in rows}
            case "kraken":
                rows = self.get("/0/public/OHLC?pair=XBTUSDT&interval=1")["result"]["XBTUSDT"]
                return {row[0] * 1000: _decimals([*row[1:5], row[6]]) for row in rows if row[7]}
            case "okx":
                rows = self.get(f"/api/v5/market/candles?instId={self.symbol}&bar=1m&limit=300")["data"]
                return {int(row[0]): _decimals(row[1:6]) for row in rows if float(row[5])}
        rows = self.get(f"/v5/market/kline?category=spot&symbol={self.symbol}&interval=1&start={begin}&limit=1000")
        return {int(row[0]): _decimals(row[1:6]) for row in rows["result"]["list"] if float(row[5])}


def _decimals(values: Sequence[object]) -> Any:
    return tuple(Decimal(str(value)) for value in values)


def made(symbol: str, seed: int = 7, count: int = 2_000) -> list[Trade]:
    """Trades of nine minutes, one of them without any; several of one time; ascending by id."""
    chance = random.Random(seed)
    times = sorted(chance.randrange(START, START + 9 * MINUTE_MS) for _ in range(count))
    sides: tuple[Side, Side] = ("buy", "sell")
    return [
        Trade(
            symbol,
            round(chance.uniform(90, 110), 2),
            round(chance.uniform(1e-5, 2), 5),
            at,
            1000 + i,
            chance.choice(sides),
        )
        for i, at in enumerate(times)
        if not START + 3 * MINUTE_MS <= at < START + 4 * MINUTE_MS
    ]


def folded(trades: Sequence[Trade]) -> dict[int, Candle]:
    candles: dict[int, Candle] = {}
    for trade in sorted(trades, key=lambda each: each.id or 0):
        start = trade.at // MINUTE_MS * MINUTE_MS
        price, quantity = Decimal(str(trade.price)), Decimal(str(trade.quantity))
        opened, high, low, _, volume = candles.get(start, (price, price, price, price, Decimal(0)))
        candles[start] = (opened, max(high, price), min(low, price), price, volume + quantity)
    return candles


@pytest.mark.parametrize("venue", ["binance", "coinbase", "kraken", "okx"])
def test_candles_equal_the_fold_of_the_trades(venue: str) -> None:
    server = Venue(venue)
    trades = made(server.symbol)
    for trade in random.Random(1).sample(trades, len(trades)) + trades[:50]:
        server.book.add(trade)
    assert len(folded(trades)) == 8
    assert server.candles() == folded(trades)


def test_bybit_candles_open_at_the_last_close() -> None:
    server = Venue("bybit")
    trades = made(server.symbol)
    for trade in trades:
        server.book.add(trade)
    candles, expected = server.candles(), folded(trades)
    assert candles.keys() == expected.keys()
    first, *others = sorted(expected)
    assert candles[first] == expected[first]
    close = expected[first][3]
    for start in others:
        _, high, low, last, volume = expected[start]
        assert candles[start] == (close, max(high, close), min(low, close), last, volume)
        close = last


def test_binance_candle_has_all_columns() -> None:
    server = Venue("binance")
    server.add(1, 2, 3, price=100.5)
    server.book.add(Trade(server.symbol, 101.0, 1.0, START + 50, 4, "sell"))
    row = server.get("/api/v3/klines?symbol=BTCUSDT&interval=1m&limit=11")[0]
    assert row[:6] == [START, "100.50000000", "101.00000000", "100.50000000", "101.00000000", "2.50000000"]
    assert row[6:] == [START + 59_999, "251.75000000", 4, "1.50000000", "150.75000000", "0"]


def test_minutes_without_trades_differ_by_venue() -> None:
    rows: dict[str, Any] = {}
    for venue in RESTS:
        server = Venue(venue)
        server.add(1)
        server.add(2, at=START + 2 * MINUTE_MS, price=200.0)
        match venue:
            case "coinbase":
                rows[venue] = server.get(f"/products/BTC-USDT/candles?start={START // 1000}&end={START // 1000 + 120}")
            case "kraken":
                rows[venue] = server.get("/0/public/OHLC?pair=XBTUSDT")["result"]["XBTUSDT"][:3]
            case "okx":
                rows[venue] = server.get("/api/v5/market/history-candles?instId=BTC-USDT")["data"][-2:-1]
            case "bybit":
                rows[venue] = server.get("/v5/market/kline?category=spot&symbol=BTCUSDT&interval=1")["result"]["list"][
                    -2:-1
                ]
            case _:
                rows[venue] = server.get(f"/api/v3/klines?symbol=BTCUSDT&interval=1m&startTime={START + 1}")[:1]
    flat = "100.00000000"
    assert [row[0] * 1000 for row in rows["coinbase"]] == [START + 2 * MINUTE_MS, START]
    assert rows["kraken"][1][1:] == [flat, flat, flat, flat, "0.0", "0.00000000", 0]
    assert rows["okx"][0][1:] == [flat] * 4 + ["0.00000000"] * 3 + ["1"]
    assert rows["bybit"][0][1:] == [flat] * 4 + ["0.00000000"] * 2
    assert rows["binance"][0][1:6] == [flat] * 4 + ["0.00000000"]
    assert rows["binance"][0][8] == 0


def test_forming_minute_is_served_as_the_venue_does() -> None:
    for venue in ("binance", "kraken", "okx"):
        server = Venue(venue)
        server.add(1)
        server.now_ms = START + 30_000
        assert list(server.candles()) == [START]
    okx = Venue("okx")
    okx.add(1)
    okx.now_ms = START + 30_000
    assert okx.get("/api/v5/market/candles?instId=BTC-USDT")["data"][0][-1] == "0"
    assert okx.get("/api/v5/market/history-candles?instId=BTC-USDT")["data"] == []


def test_kraken_answers_the_newest_720_candles_alone() -> None:
    server = Venue("kraken", ["BTCUSD"])
    for number in range(800):
        server.add(number, at=START + number * MINUTE_MS)
    server.now_ms = START + 799 * MINUTE_MS + 5
    answer = server.get(f"/0/public/OHLC?pair=XBTUSD&interval=1&since={START // 1000}")
    rows = answer["result"]["XXBTZUSD"]
    assert answer["error"] == []
    assert len(rows) == 720
    assert [rows[0][0], rows[-1][0]] == [(START + number * MINUTE_MS) // 1000 for number in (80, 799)]
    assert server.get(f"/0/public/OHLC?pair=XBTUSD&since={rows[-2][0]}")["result"]["XXBTZUSD"] == rows[-1:]


def test_kraken_vwap_is_cut() -> None:
    server = Venue("kraken")
    server.add(1, price=1.0, quantity=1.0)
    server.add(2, price=2.0, quantity=2.0)
    assert server.get("/0/public/OHLC?pair=XBTUSDT")["result"]["XBTUSDT"][0][5] == "1.66666666"


def test_binance_trades_go_on_from_an_id() -> None:
    server = Venue("binance")
    server.add(*range(1, 2501))
    ids, start = [], 1
    while page := server.get(f"/api/v3/historicalTrades?symbol=BTCUSDT&fromId={start}&limit=1000"):
        ids += [row["id"] for row in page]
        start = ids[-1] + 1
    assert ids == [*range(1, 2501)]
    assert [row["id"] for row in server.get("/api/v3/trades?symbol=BTCUSDT&limit=2")] == [2499, 2500]
    assert len(server.get("/api/v3/trades?symbol=BTCUSDT&limit=5000")) == 1000


def test_binance_aggregates_hold_the_trades_of_an_order() -> None:
    server = Venue("binance")
    server.add(5, 6, 7, at=START, quantity=0.1)
    server.add(8, at=START + 1)
    first, second = server.get(f"/api/v3/aggTrades?symbol=BTCUSDT&startTime={START}&endTime={START + 1}")
    assert (first["f"], first["l"], first["q"], first["T"], first["m"]) == (5, 7, "0.30000000", START, False)
    assert (second["f"], second["l"]) == (8, 8)
    assert server.get(f"/api/v3/aggTrades?symbol=BTCUSDT&fromId={first['a'] + 1}") == [second]
    assert server.get(f"/api/v3/aggTrades?symbol=BTCUSDT&startTime={START + 1}") == [second]
    assert server.get("/api/v3/aggTrades?symbol=BTCUSDT&limit=1") == [second]


def test_coinbase_pages_walk_down_with_after() -> None:
    server = Venue("coinbase")
    server.add(*range(1, 2601))
    ids: list[int] = []
    pages, cursor = 0, "2601"
    while not ids or ids[-1] > 101:
        page = server.get(f"/products/BTC-USDT/trades?limit=1000&after={cursor}")
        ids += [row["trade_id"] for row in page]
        assert server.headers["CB-BEFORE"] == str(page[0]["trade_id"])
        cursor = server.headers["CB-AFTER"]
        pages += 1
    assert pages == 3
    assert ids[:2500] == [*range(2600, 100, -1)]
    newest = server.get("/products/BTC-USDT/trades?limit=10&before=100")
    assert [row["trade_id"] for row in newest] == [*range(2600, 2590, -1)]
    assert newest[0]["side"] == "sell"  # the maker's


def test_kraken_pages_end_within_trades_of_one_time() -> None:
    server = Venue("kraken", ["BTCUSD"])
    server.add(*range(1, 996))
    server.add(*range(996, 1013), at=START + 5_000)
    server.add(1013, at=START + 6_000)
    answer = server.get(f"/0/public/Trades?pair=XBTUSD&since={kraken_ns(START)}&count=1000")["result"]
    rows, last = answer["XXBTZUSD"], answer["last"]
    assert set(answer) == {"XXBTZUSD", "last"}
    assert [row[6] for row in rows] == [*range(1, 1001)]
    assert last == str(kraken_ns(START + 5_000))
    assert rows[-1][2] == pytest.approx((START + 5_000) / 1000, abs=0.001)
    rest = server.get(f"/0/public/Trades?pair=XBTUSD&since={last}")["result"]
    assert [row[6] for row in rest["XXBTZUSD"]] == [1013]  # the rest of that time is lost to who goes on from `last`
    back = server.get(f"/0/public/Trades?pair=XBTUSD&since={int(last) - 10**9}")["result"]
    assert [row[6] for row in back["XXBTZUSD"]] == [*range(996, 1014)]
    end = server.get(f"/0/public/Trades?pair=XBTUSD&since={rest['last']}")["result"]
    assert end == {"XXBTZUSD": [], "last": rest["last"]}
    oldest = server.get(f"/0/public/Trades?pair=XBTUSD&since={START // 1000}")["result"]["XXBTZUSD"]
    assert oldest[0][6] == 1  # seconds are taken for the nanoseconds of 1970


def test_okx_pages_hold_single_trades() -> None:
    server = Venue("okx")
    server.add(*range(1, 121))
    server.book.add(Trade(server.symbol, 100.0, 5.0, START + 200, 123, "buy", 3))
    page = server.get("/api/v5/market/history-trades?instId=BTC-USDT&type=1&after=124&limit=500")["data"]
    assert [int(row["tradeId"]) for row in page] == [*range(123, 23, -1)]
    assert sum(Decimal(row["sz"]) for row in page[:3]) == 5
    assert page[0].keys() == {"instId", "side", "sz", "px", "tradeId", "ts"}
    newest = server.get("/api/v5/market/history-trades?instId=BTC-USDT&before=20&limit=5")["data"]
    assert [int(row["tradeId"]) for row in newest] == [*range(123, 118, -1)]
    by_time = server.get(f"/api/v5/market/history-trades?instId=BTC-USDT&type=2&after={START + 3}")["data"]
    assert [int(row["tradeId"]) for row in by_time] == [2, 1]
    assert len(server.get("/api/v5/market/trades?instId=BTC-USDT&limit=500")["data"]) == 123


def test_bybit_gives_the_sixty_newest_trades_alone() -> None:
    server = Venue("bybit")
    server.add(*range(1, 501))
    rows = server.get("/v5/market/recent-trade?category=spot&symbol=BTCUSDT&limit=1000")["result"]["list"]
    assert [int(row["execId"]) for row in rows] == [*range(500, 440, -1)]
    assert server.get("/v5/market/recent-trade?symbol=BTCUSDT")["retCode"] == 10001  # the category is linear


def test_unknown_symbols_and_paths_are_refused_as_documented() -> None:
    assert Venue("binance").get("/api/v3/klines?symbol=NO&interval=1m") == {"code": -1121, "msg": "Invalid symbol."}
    assert Venue("coinbase").get("/products/NO-USD/trades") == {"message": "NotFound"}
    assert Venue("kraken").get("/0/public/Trades?pair=NO") == {"error": ["EQuery:Unknown asset pair"]}
    assert Venue("okx").get("/api/v5/market/trades?instId=NO-USDT")["code"] == "51001"
    assert Venue("bybit").get("/v5/market/kline?category=spot&symbol=NO&interval=1")["retCode"] == 10001
    for venue in RESTS:
        assert Venue(venue).rest.answer("/nothing").body
    assert Venue("binance").get("/api/v3/exchangeInfo?symbols=%5B%22BTCUSDT%22,%22NO%22%5D")["code"] == -1121
    assert Venue("binance").get("/api/v3/trades?symbol=BTCUSDT&limit=many")["code"] == -1100


def test_binance_counts_weight_refuses_and_bans() -> None:
    server = Venue("binance", limited=True)
    for _ in range(240):
        server.get("/api/v3/historicalTrades?symbol=BTCUSDT")
    assert (server.status, server.headers["X-MBX-USED-WEIGHT-1M"]) == (200, "6000")
    server.seconds = 20.0
    server.get("/api/v3/time")
    assert (server.status, server.headers["Retry-After"]) == (429, "40")
    for _ in range(10):
        server.get("/api/v3/time")
    assert (server.status, server.headers["Retry-After"]) == (418, "120")
    server.seconds = 61.0
    server.get("/api/v3/time")
    assert (server.status, server.headers["X-MBX-USED-WEIGHT-1M"]) == (200, "1")


@pytest.mark.parametrize(
    ("venue", "target", "allowed", "seconds"),
    [
        ("coinbase", "/time", 15, 1.0),
        ("kraken", "/0/public/Time", 10, 10.0),
        ("okx", "/api/v5/market/history-trades?instId=BTC-USDT", 20, 2.0),
        ("bybit", "/v5/market/time", 600, 600.0),
    ],
)
def test_limits_of_requests_are_kept(venue: str, target: str, allowed: int, seconds: float) -> None:
    server = Venue(venue, limited=True)
    good = server.rest.answer(target)
    assert [server.rest.answer(target) for _ in range(allowed - 1)] == [good] * (allowed - 1)
    refused = server.rest.answer(target)
    assert refused != good
    server.seconds = seconds / 2
    if venue != "bybit":
        assert server.rest.answer(target) == refused
    server.seconds = seconds + 0.001
    assert server.rest.answer(target) == good


def test_rest_lags_behind_the_stream() -> None:
    server = Venue("binance")
    server.book.lag_seconds = 3.0
    server.add(4, 5)
    assert server.get("/api/v3/trades?symbol=BTCUSDT") == []
    server.seconds = 3.0
    assert [row["id"] for row in server.get("/api/v3/trades?symbol=BTCUSDT")] == [4, 5]


def test_ids_ascend_by_one_and_beyond_those_of_an_earlier_start() -> None:
    listed = [DIALECTS["okx"].listed(symbol) for symbol in ("BTCUSDT", "ETHUSDT")]
    market = MarketTrades(listed, 100_000.0, 7, START)
    trades = [trade for _ in range(3) for trade in market.due(START)]
    for each in listed:
        ids = [trade.id for trade in trades if trade.symbol == each.native]
        assert ids == [*range(ids[0] or 0, (ids[0] or 0) + len(ids))]
    later = MarketTrades(listed, 100_000.0, 7, START + 1000)
    assert (later.due(START + 1000)[0].id or 0) > max(trade.id or 0 for trade in trades)


def test_trades_before_the_start_lead_up_to_those_after_it() -> None:
    listed = [DIALECTS["okx"].listed(symbol) for symbol in ("BTCUSDT", "ETHUSDT")]
    seconds = 1000.0
    market = MarketTrades(listed, 50.0, 7, START + 30_000, 90_000, 0, lambda: seconds)
    live = []
    for _ in range(4):
        seconds += 0.5
        live += market.due(START + 30_000 + round(1000 * (seconds - 1000)))
    for each in listed:
        of_symbol = [trade for trade in market.earlier + live if trade.symbol == each.native]
        ids = [trade.id or 0 for trade in of_symbol]
        assert ids == [*range(ids[0], ids[0] + len(ids))]
        times = [trade.at for trade in of_symbol]
        assert times == sorted(times)
        assert START - MINUTE_MS <= times[0] < START - MINUTE_MS + 100
        assert times[-1] <= START + 32_000
    assert len(market.earlier + live) == pytest.approx(50 * 92, abs=5)
    assert len(live) < 50 * 3


def test_candles_and_trades_of_the_start_join_without_a_seam() -> None:
    dialect = DIALECTS["binance"]
    source = MarketSource(dialect, ["BTCUSDT"], 10.0, 7)
    book = source.book()
    rest = RESTS["binance"](source.listed, book, source.now)
    rows = msgspec.json.decode(rest.answer("/api/v3/klines?symbol=BTCUSDT&interval=1m&limit=1000").body)
    assert [row[0] for row in rows] == [rows[0][0] + number * MINUTE_MS for number in range(1000)]
    assert all(row[8] for row in rows[:-1])  # the last one may just have begun
    since = rows[-6][0]
    target = f"/api/v3/aggTrades?symbol=BTCUSDT&startTime={since}&endTime={since + MINUTE_MS - 1}&limit=1000"
    orders = msgspec.json.decode(rest.answer(target).body)
    volume = sum(Decimal(order["q"]) for order in orders)
    assert volume in (Decimal(rows[-6][5]), 0)  # a minute may begin in the middle of this test
    assert sum(order["l"] - order["f"] + 1 for order in orders) in (rows[-6][8], 0)


def test_history_is_the_same_at_each_start_with_a_seed() -> None:
    listed = [DIALECTS["kraken"].listed("BTCUSDT")]

    def minute(seed: int, began: int, start: int) -> object:
        return PriceHistory(listed, seed, began, KEPT_MINUTES * MINUTE_MS, 100.0).minute("BTC/USDT", start)

    assert minute(7, START, START - MINUTE_MS) == minute(7, START + 9 * MINUTE_MS, START - MINUTE_MS) is not None
    assert minute(7, START, START - MINUTE_MS) != minute(8, START, START - MINUTE_MS)
    assert minute(7, START, START) is None
    assert minute(7, START, START - (KEPT_MINUTES + 1) * MINUTE_MS) is None


def test_history_and_own_minutes_are_one_row_of_candles() -> None:
    dialect = DIALECTS["okx"]
    listed = [dialect.listed("BTCUSDT")]
    history = PriceHistory(listed, 7, START, 100 * MINUTE_MS, 100.0)
    book = TradeBook(["BTC-USDT"], history.minute, START - 100 * MINUTE_MS)
    book.add(Trade("BTC-USDT", 67_000.0, 1.0, START + 5, 1, "buy"))
    rest = RESTS["okx"](listed, book, lambda: (START + 1000) * 1_000_000)
    rows = msgspec.json.decode(rest.answer("/api/v5/market/candles?instId=BTC-USDT&bar=1m&limit=300").body)["data"]
    assert [int(row[0]) for row in rows] == [START - number * MINUTE_MS for number in range(101)]
    assert all(float(row[3]) <= min(float(row[1]), float(row[4])) for row in rows)
    assert all(float(row[2]) >= max(float(row[1]), float(row[4])) for row in rows)


def test_kept_trades_are_bounded_by_number_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade_book, "KEPT_TRADES", 5_000)
    server = Venue("binance", ["BTCUSDT"])
    server.add(*range(10_000), at=START)
    book = server.book.of("BTCUSDT")
    assert book is not None
    assert 5_000 <= len(book.last(10**9)) <= 6_000
    server.add(*range(10_000, 10_200), at=START + 2 * 3_600_000)
    assert len(book.last(10**9)) < 2_000
    for number in range(KEPT_MINUTES + 100):
        server.add(20_000 + number, at=START + number * MINUTE_MS)
    assert len(book.minutes(START, START + 2 * KEPT_MINUTES * MINUTE_MS)) == KEPT_MINUTES
