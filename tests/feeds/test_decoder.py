"""What a feed may send, and what becomes of it."""

import json
from collections.abc import Callable
from functools import reduce
from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketflow.feeds.decoder import UNDECODABLE, Decoder, Line, TradeLine, _decode_lines
from marketflow.feeds.line_framing import MAX_LINE_BYTES
from marketflow.model import SLICE_MS, Candle, Candles, Mode, Series, Tick, merge, merge_into
from tests.support.oracle import assert_same, candles_of_ticks

NOW_MS = 1_763_690_000_000
NOW = NOW_MS * 1_000_000
SYMBOLS = ("BTCUSDT", "ETHUSDT")
GOOD = b'{"symbol":"BTCUSDT","price":67123.45,"timestamp":%d}\n' % NOW_MS


class Rejected:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str, count: int, example: object) -> None:
        self.reasons += [reason] * count


def make_decoder(rejected: Callable[[str, int, object], None] | None = None) -> Decoder:
    return Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: NOW, 5000, rejected or Rejected())


def line(**fields: object) -> bytes:
    return json.dumps({"symbol": "BTCUSDT", "price": 1.5, "timestamp": NOW_MS} | fields).encode() + b"\n"


def only(decoder: Decoder, chunk: bytes) -> Candle:
    (candle,) = decoder.decode(chunk).values()
    return candle


def test_a_good_line_becomes_a_candle_of_one_in_its_slice() -> None:
    ((slot, candle),) = make_decoder().decode(GOOD).items()
    assert slot.series == Series(Mode.LIVE, "exchange1", "BTCUSDT")
    assert slot.start == NOW_MS
    assert (candle.close, candle.ticks, candle.last_at, candle.last_sequence) == (67123.45, 1, NOW_MS, NOW)


HOSTILE = {
    "no JSON": (b"hello\n", "malformed"),
    "half a line": (b'{"symbol":"BTCUSDT","pri\n', "malformed"),
    "an array": (b"[1,2]\n", "malformed"),
    "a number": (b"5\n", "malformed"),
    "bad UTF-8": (b'{"symbol":"BTC\xff","price":1}\n', "malformed"),
    "bad UTF-8 in an unknown field": (b'{"symbol":"BTCUSDT","price":1,"x":"\xff"}\n', "malformed"),
    "thousands of brackets": (b'{"symbol":"BTCUSDT","price":1,"x":' + b"[" * 5000 + b"]" * 5000 + b"}\n", "malformed"),
    "NaN": (b'{"symbol":"BTCUSDT","price":NaN}\n', "malformed"),
    "Infinity": (b'{"symbol":"BTCUSDT","price":-Infinity}\n', "malformed"),
    "two records on a line": (GOOD[:-1] + GOOD, "malformed"),
    "no symbol": (b'{"price":1}\n', "no_symbol"),
    "symbol is a number": (line(symbol=5), "no_symbol"),
    "symbol is null": (line(symbol=None), "no_symbol"),
    "price missing": (b'{"symbol":"BTCUSDT"}\n', "bad_price"),
    "price zero": (line(price=0), "bad_price"),
    "price negative": (line(price=-5), "bad_price"),
    "price a word": (line(price="much"), "bad_price"),
    "price a hexadecimal string": (line(price="0x10"), "bad_price"),
    "price a string that is NaN": (line(price="nan"), "bad_price"),
    "price a negative string": (line(price="-1.5"), "bad_price"),
    "timestamp too old": (line(timestamp=NOW_MS - 5001), "stale"),
    "timestamp of hours ago": (line(timestamp=NOW_MS - 7_200_000), "stale"),
    "timestamp ahead": (line(timestamp=NOW_MS + 5001), "ahead"),
    "timestamp absurd": (line(timestamp=10**23), "ahead"),
    "timestamp negative": (line(timestamp=-1), "stale"),
    "price null": (line(price=None), "bad_price"),
    "price true": (line(price=True), "bad_price"),
    "price too large for a float": (b'{"symbol":"BTCUSDT","price":1e999}\n', "bad_price"),
    "price that no sum could hold": (line(price=1.5e308), "bad_price"),
    "price of 400 digits": (b'{"symbol":"BTCUSDT","price":' + b"9" * 400 + b"}\n", "bad_price"),
    "unknown symbol": (line(symbol="SHIBUSDT"), "unknown_symbol"),
    "NUL in the symbol": (line(symbol="BTCUSDT\0"), "unknown_symbol"),
    "empty symbol": (line(symbol=""), "unknown_symbol"),
    "over 64 KiB": (line(x="y" * MAX_LINE_BYTES), "too_long"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_line_is_rejected_and_counted_alone(name: str) -> None:
    bad, reason = HOSTILE[name]
    rejected = Rejected()
    decoder = make_decoder(rejected)
    assert only(decoder, GOOD + bad + GOOD).ticks == 2
    assert decoder.rejected == {reason: 1}
    assert rejected.reasons == [reason]
    assert decoder.ticks == 2


def test_prices_whose_sum_overflows_are_bad_prices() -> None:
    decoder = make_decoder()
    assert only(decoder, line(price=1.5e308) * 3 + GOOD).ticks == 1
    assert decoder.rejected == {"bad_price": 3}


def test_all_bad_lines_at_once_leave_the_good_ones() -> None:
    decoder = make_decoder()
    chunk = b"".join(bad + GOOD for bad, _ in HOSTILE.values())
    assert only(decoder, chunk).ticks == len(HOSTILE)
    assert decoder.rejected.total() == len(HOSTILE)


def test_a_record_broken_over_two_lines_is_two_bad_lines() -> None:
    decoder = make_decoder()
    assert decoder.decode(b'{"symbol":"BTCUSDT",\n"price":1}\n') == {}
    assert decoder.rejected == {"malformed": 2}


def test_records_that_share_a_line_are_rejected() -> None:
    decoder = make_decoder()
    assert only(decoder, GOOD[:-1] + GOOD + b"\n" + GOOD).ticks == 1
    assert only(decoder, GOOD + b'{"symbol":"BTCUSDT",\n"price":1}' + GOOD).ticks == 1
    assert decoder.rejected == {"malformed": 3}


def test_heartbeat_over_64_kib_is_too_long_whole_or_in_pieces() -> None:
    decoder = make_decoder()
    assert decoder.decode(b" " * (MAX_LINE_BYTES + 1) + b"\n") == {}
    assert decoder.rejected == {"too_long": 1}


def test_unknown_symbols_by_the_hundred_thousand_create_nothing() -> None:
    decoder = make_decoder()
    chunk = b"".join(b'{"symbol":"S%d","price":1}\n' % i for i in range(100_000))
    assert decoder.decode(chunk) == {}
    assert decoder.rejected == {"unknown_symbol": 100_000}


def test_heartbeats_and_line_ends_of_windows_are_no_bad_lines() -> None:
    decoder = make_decoder()
    assert only(decoder, b"\n" + GOOD.replace(b"\n", b"\r\n") + b" \n\r\n").ticks == 1
    assert not decoder.rejected


@pytest.mark.parametrize(
    "timestamp",
    [None, "yesterday", True, []],
)
def test_a_timestamp_that_is_no_number_becomes_the_time_of_receipt(timestamp: object) -> None:
    decoder = make_decoder()
    assert only(decoder, line(timestamp=timestamp)).last_at == NOW_MS
    assert decoder.timestamps_replaced == 1
    assert not decoder.rejected


@pytest.mark.parametrize(
    "timestamp", [NOW_MS + 0.0, NOW_MS + 0.9, str(NOW_MS), f"{NOW_MS}.0", f"{NOW_MS}.75", f"+{NOW_MS}", f"{NOW_MS}e0"]
)
def test_numeric_form_of_a_timestamp_is_taken(timestamp: object) -> None:
    decoder = make_decoder()
    assert only(decoder, line(timestamp=timestamp)).last_at == NOW_MS
    assert (decoder.timestamps_replaced, decoder.rejected.total()) == (0, 0)


@pytest.mark.parametrize("price", ["67123.45", "67123.450", "6712345e-2", 67123.45])
@pytest.mark.parametrize("symbol", ["BTCUSDT", "btcusdt", "BtcUsdt"])
def test_numeric_string_is_a_price_and_symbols_have_no_case(price: object, symbol: str) -> None:
    decoder = make_decoder()
    ((slot, candle),) = decoder.decode(line(price=price, symbol=symbol)).items()
    assert (slot.series.symbol, candle.close, decoder.rejected.total()) == ("BTCUSDT", 67123.45, 0)


def test_optional_fields_reject_no_line() -> None:
    decoder = make_decoder()
    for extra in ({"quantity": 1.5, "side": "buy", "id": 7}, {"quantity": "x", "side": 5, "id": "abc"}):
        assert only(decoder, line(**extra)).ticks == 1


@pytest.mark.parametrize(("unit", "name"), [(1 / 1000, "seconds"), (1000, "microseconds"), (1_000_000, "nanoseconds")])
def test_feed_in_another_unit_is_converted_and_logged_once(unit: float, name: str) -> None:
    said: list[str] = []
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: NOW, 5000, Rejected(), said.append)
    for _ in range(3):
        timestamp = NOW_MS * unit if unit < 1 else NOW_MS * int(unit)
        assert only(decoder, line(timestamp=timestamp)).last_at == NOW_MS
    assert decoder.rejected.total() == 0
    assert said == [f"timestamps are in {name}, they are converted to milliseconds"]


def test_feed_whose_clock_is_wrong_is_dated_by_receipt() -> None:
    said: list[str] = []
    now_ms = NOW_MS
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: now_ms * 1_000_000, 5000, Rejected(), said.append)
    for number in range(60):
        now_ms = NOW_MS + number * 100
        decoder.decode(line(timestamp=now_ms + 3_600_000))
    assert decoder.rejected == {"ahead": 20}
    assert (decoder.ticks, decoder.timestamps_replaced) == (40, 40)
    assert decoder.clock_offset_ms == 3_600_000
    assert said == ["the clock of the exchange is 3600.0 s ahead of this machine's, its ticks are dated by receipt"]
    now_ms += 100
    assert only(decoder, line(timestamp=now_ms)).last_at == now_ms
    assert said[1:] == ["the clock of the exchange is right again"]


def test_old_trades_on_connecting_are_dropped_and_date_nothing() -> None:
    decoder = make_decoder()
    old = b"".join(line(timestamp=NOW_MS - 3_600_000 + n) for n in range(500))
    assert only(decoder, old + GOOD).ticks == 1
    assert decoder.rejected == {"stale": 500}
    assert decoder.clock_offset_ms == 0


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("unit", [1, 1 / 1000])
def test_tick_that_waited_here_before_it_was_read_is_not_stale(settled: bool, unit: float) -> None:
    rejected = Rejected()
    decoder = make_decoder(rejected)
    if settled:
        decoder.decode(line(timestamp=int(NOW_MS * unit)))
    lines = [line(symbol=symbol, timestamp=int((NOW_MS - 12_000) * unit)) for symbol in (*SYMBOLS, *SYMBOLS)]
    for chunk in (*lines, b"".join(lines[:2]), b"".join(lines)):
        found = decoder.decode(chunk, 7000)
        assert sum(candle.ticks for candle in found.values()) == chunk.count(b"\n")
        assert {candle.last_at for candle in found.values()} == {NOW_MS - 12_000}
    assert not rejected.reasons
    assert decoder.decode(lines[0], 6999 - 1000) == {}
    assert rejected.reasons == ["stale"]
    assert not decoder.clock_offset_ms


def test_feed_that_lags_does_not_prove_its_clock_wrong() -> None:
    times = iter(range(NOW, NOW + 10**12, 10**8))
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: next(times), 5000, Rejected())
    ticks = 0
    for number in range(50):
        ticks += sum(each.ticks for each in decoder.decode(line(timestamp=NOW_MS - 9000 + 100 * number), 8000).values())
    assert (ticks, decoder.clock_offset_ms, decoder.timestamps_replaced) == (50, 0, 0)


def test_wrong_clock_is_found_where_some_ticks_may_have_waited() -> None:
    times = iter(range(NOW, NOW + 10**12, 10**8))
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: next(times), 5000, Rejected())
    for number in range(60):
        decoder.decode(line(timestamp=NOW_MS - 9000 + 100 * number), 0 if number % 5 else 8000)
    assert -9200 < decoder.clock_offset_ms < -8800
    assert decoder.timestamps_replaced > 20


@pytest.mark.parametrize("prices", [[0.1] * 3, [0.1] * 1000, [0.7] * 7, [1e-9] * 33, [67123.45] * 501])
def test_average_lies_between_the_lowest_and_the_highest(prices: list[float]) -> None:
    decoder = make_decoder()
    at_once = only(decoder, b"".join(line(price=price) for price in prices))
    one_by_one = reduce(merge, (only(decoder, line(price=price)) for price in prices))
    assert at_once.average == one_by_one.average == prices[0]


def test_a_missing_timestamp_becomes_the_time_of_receipt() -> None:
    decoder = make_decoder()
    assert only(decoder, b'{"symbol":"BTCUSDT","price":1}\n').last_at == NOW_MS
    assert decoder.timestamps_replaced == 1


@pytest.mark.parametrize("skew", [-5000, 5000])
def test_a_timestamp_within_the_skew_is_kept(skew: int) -> None:
    decoder = make_decoder()
    assert only(decoder, line(timestamp=NOW_MS + skew)).last_at == NOW_MS + skew
    assert decoder.timestamps_replaced == 0


ROWS = st.lists(
    st.tuples(st.sampled_from(SYMBOLS), st.integers(1, 10**9).map(lambda n: n / 8), st.integers(-5000, 5000)),
    max_size=60,
)


@given(ROWS, st.sampled_from([1, 20, 1000]), st.booleans())
def test_folding_a_chunk_equals_folding_tick_by_tick(
    rows: list[tuple[str, float, int]], fraction: int, in_order: bool
) -> None:
    """The lower the fraction of the skew, the more ticks share a slice, and a millisecond."""
    decoder = make_decoder()
    rows = [(symbol, price, skew // fraction) for symbol, price, skew in rows]
    if in_order:
        rows.sort(key=lambda row: row[2])
    chunk = b"".join(line(symbol=symbol, price=price, timestamp=NOW_MS + skew) for symbol, price, skew in rows)
    arrived = dict.fromkeys(SYMBOLS, 0)
    ticks = []
    for symbol, price, skew in rows:
        ticks.append((Series(Mode.LIVE, "exchange1", symbol), Tick(price, NOW_MS + skew, NOW + arrived[symbol])))
        arrived[symbol] += 1
    assert_same(decoder.decode(chunk), candles_of_ticks(ticks, SLICE_MS))
    assert decoder.ticks == len(rows)


def test_chunk_of_many_pieces_equals_its_lines() -> None:
    lines = [line(symbol=SYMBOLS[n % 2], price=1 + n % 97, timestamp=NOW_MS + n // 100) for n in range(10_000)]
    lines[7000] = HOSTILE["unknown symbol"][0]
    received = count(NOW, 10_000)
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: next(received), 5000, Rejected())
    expected: Candles = {}
    one_by_one = make_decoder()
    for each in lines:
        merge_into(expected, one_by_one.decode(each))
    assert_same(_unnumbered(decoder.decode(b"".join(lines))), _unnumbered(expected))
    assert (decoder.ticks, decoder.rejected) == (9_999, {"unknown_symbol": 1})


PARTS = st.sampled_from(
    [
        *(b"\n", b"\n", b" ", b"\r\n", b"{}", b"{", b"}", b",", b'"', b"}\n{", b"},\n{", b"5", b"null", b"\xff"),
        *(GOOD, GOOD, GOOD[:-1], b"[" + GOOD + b"]", GOOD.replace(b",", b",\n"), GOOD.replace(b",", b"\n")),
        *(GOOD.replace(b'"price"', b'"x":{"y":1}\n,"price"'), GOOD.replace(b"BTC", b"BTC\n"), GOOD[:8], GOOD[8:]),
        *(
            line(x={"symbol": "BTCUSDT"}),
            line(x="}\n{"),
            line(x='}\\n{"symbol":'),
            line(quantity=1, side="buy", id="\n"),
        ),
        *(line(symbol="SHIBUSDT"), line(price="1"), line(timestamp=1.5), b'{"price":1,"symbol":"BTCUSDT"}\n'),
    ]
)


@given(st.lists(PARTS, max_size=12).map(b"".join), st.sampled_from([Line, TradeLine]))
def test_lines_decode_at_once_as_one_by_one(chunk: bytes, kind: type[Line]) -> None:
    """Whatever two records on a line, records over several and lines without any add up to."""
    decoder = msgspec.json.Decoder(kind)
    lines = chunk + b"\n"
    expected: list[Line] | None
    try:
        lines.decode()
        expected = [decoder.decode(each) for each in lines.split(b"\n")[:-1]]
    except UNDECODABLE:
        expected = None
    assert _decode_lines(lines, decoder) == expected


@pytest.mark.parametrize(
    "lines",
    [
        b'{"symbol":"A",\n"price":1}{"symbol":"A","price":1}\n',
        b'{"symbol":"A","price":1}\n\n{"symbol":"A","price":1}{"symbol":"A","price":1}\n',
        b'{"symbol":"A"\n,"price":1}\n{"symbol":"A","price":1}{"symbol":"A","price":1}\n',
        b'\n{"symbol":"A","price":1}{"symbol":"A","price":1}\n',
    ],
)
def test_as_many_records_as_lines_may_be_misplaced(lines: bytes) -> None:
    decoder = msgspec.json.Decoder(Line)
    assert len(decoder.decode_lines(lines)) == lines.count(b"\n")
    assert _decode_lines(lines, decoder) is None


LINES = st.one_of(
    st.builds(
        lambda symbol, price, skew, end: line(symbol=symbol, price=price, timestamp=NOW_MS + skew)[:-1] + end,
        st.sampled_from(SYMBOLS),
        st.integers(1, 10**6).map(lambda n: n / 8),
        st.integers(-6000, 6000),
        st.sampled_from([b"\n", b"\r\n"]),
    ),
    st.sampled_from([bad for bad, _ in HOSTILE.values() if len(bad) < 1000]),
    st.sampled_from([b"\n", b" \n", b'{"symbol":"BTCUSDT","price":2}\n', line(timestamp=None), line(timestamp="now")]),
)


@given(st.lists(LINES, max_size=12), st.booleans())
def test_a_chunk_amounts_to_its_lines_one_by_one(lines: list[bytes], good_first: bool) -> None:
    if good_first:
        lines = [GOOD] * 3 + lines
    at_once, one_by_one = make_decoder(), make_decoder()
    candles: Candles = {}
    for each in b"".join(lines).splitlines(keepends=True):
        merge_into(candles, one_by_one.decode(each))
    assert_same(_unnumbered(at_once.decode(b"".join(lines))), _unnumbered(candles))
    assert at_once.rejected == one_by_one.rejected
    assert (at_once.ticks, at_once.timestamps_replaced) == (one_by_one.ticks, one_by_one.timestamps_replaced)


def _unnumbered(candles: Candles) -> Candles:
    return {
        slot: msgspec.structs.replace(candle, first_sequence=0, last_sequence=0) for slot, candle in candles.items()
    }


@given(st.binary(max_size=300))
def test_no_bytes_at_all_raise(chunk: bytes) -> None:
    decoder = make_decoder()
    decoder.decode(chunk + b"\n" + GOOD)
    assert decoder.ticks == 1
