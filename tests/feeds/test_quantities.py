"""What was traded: quantities, sides and counts of ticks in the candles that the decoder folds."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.model import Amounts, Candle, Mode, merge, merge_all
from tests.feeds.test_decoder import NOW, NOW_MS, Rejected, make_decoder, only


def line(**fields: object) -> bytes:
    return json.dumps({"symbol": "BTCUSDT", "price": 10.0, "timestamp": NOW_MS, **fields}).encode() + b"\n"


def test_quantity_and_side_make_volume_turnover_and_their_bought_parts() -> None:
    chunk = line(quantity=2, side="buy") + line(price=20.0, quantity=0.5, side="sell")
    candle = only(make_decoder(), chunk)
    assert candle.amounts == Amounts(2.5, 30.0, 2.0, 20.0)
    assert candle.vwap == 12.0


@pytest.mark.parametrize("quantity", [2, 2.0, "2", "2.0", "2e0"])
def test_quantity_may_be_a_numeric_string(quantity: object) -> None:
    assert only(make_decoder(), line(quantity=quantity, side="buy")).amounts == Amounts(2.0, 20.0, 2.0, 20.0)


@pytest.mark.parametrize("quantity", [-1, "-0.5", "x", None, True, [], 1e101, "NaN", "Infinity"])
def test_price_counts_with_a_quantity_that_is_none(quantity: object) -> None:
    decoder = make_decoder()
    candle = only(decoder, line(quantity=quantity, side="buy"))
    assert (candle.ticks, candle.amounts, decoder.rejected.total()) == (1, None, 0)


@pytest.mark.parametrize("side", [None, "BUY", 5, ""])
def test_unknown_side_leaves_the_bought_parts_unknown(side: object) -> None:
    assert only(make_decoder(), line(quantity=2, side=side)).amounts == Amounts(2.0, 20.0, None, None)


def test_quantity_of_zero_is_known() -> None:
    assert only(make_decoder(), line(quantity=0, side="buy")).amounts == Amounts(0.0, 0.0, 0.0, 0.0)
    assert only(make_decoder(), line(quantity=0, side="buy")).vwap is None


def test_one_tick_without_a_quantity_makes_the_volume_unknown() -> None:
    candle = only(make_decoder(), line(quantity=2, side="buy") + line())
    assert (candle.ticks, candle.amounts) == (2, None)


def test_line_that_stands_for_several_trades_counts_as_many() -> None:
    trades = [
        TradeLine("BTCUSDT", 10.0, NOW_MS, 5.0, "buy", 123, count=3),
        TradeLine("BTCUSDT", 20.0, NOW_MS, 1.0, "sell", 124),
    ]
    candle = only_of(make_decoder(), trades)
    assert (candle.ticks, candle.total, candle.average) == (4, 50.0, 12.5)
    assert candle.amounts == Amounts(6.0, 70.0, 5.0, 50.0)


def test_count_is_no_field_of_a_line() -> None:
    assert only(make_decoder(), line(quantity=1, count=7)).ticks == 1


def test_out_of_order_quantities_stay_with_their_prices() -> None:
    chunk = line(price=20.0, timestamp=NOW_MS + 1, quantity=3, side="sell") + line(quantity=1, side="buy")
    candle = only(make_decoder(), chunk)
    assert (candle.open, candle.close, candle.amounts) == (10.0, 20.0, Amounts(4.0, 70.0, 1.0, 10.0))


amounts = st.none() | st.builds(
    lambda volume, turnover, bought: Amounts(volume, turnover, bought, None if bought is None else bought * 2),
    st.integers(0, 1000).map(float),
    st.integers(0, 1000).map(float),
    st.none() | st.integers(0, 1000).map(float),
)
candles = st.builds(
    lambda traded, verified: Candle(1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, traded, "ticks", verified),
    amounts,
    st.sampled_from([None, True, False]),
)


@given(candles, candles, candles)
def test_merging_amounts_is_associative_and_commutative(a: Candle, b: Candle, c: Candle) -> None:
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, b) == merge(b, a)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**6)), min_size=1, max_size=40))
def test_volume_of_decimals_is_exact_to_twelve_digits(rows: list[tuple[int, int]]) -> None:
    decoder = make_decoder()
    candles = merge_all(
        decoder.fold([TradeLine("BTCUSDT", price / 1000, NOW_MS, quantity / 10**6, "buy")]) for price, quantity in rows
    )
    (candle,) = candles.values()
    assert candle.amounts is not None
    exact = sum(Fraction(quantity, 10**6) for _, quantity in rows)
    assert candle.amounts.volume == pytest.approx(float(exact), rel=1e-13)


def only_of(decoder: Decoder, lines: list[TradeLine]) -> Candle:
    (candle,) = decoder.fold(lines).values()
    return candle


def test_quantity_in_a_slow_line_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are decoded one by one, because another one of the chunk is bad."""
    decoder = Decoder(Mode.LIVE, "exchange1", ["BTCUSDT"], lambda: NOW, 5000, Rejected())
    candle = only(
        decoder, line(quantity="0.25", side="sell") + b"{\n" + line(quantity=1, side="buy", timestamp=str(NOW_MS))
    )
    assert candle.amounts == Amounts(1.25, 12.5, 1.0, 10.0)
    assert decoder.rejected == {"malformed": 1}


def with_ids() -> Decoder:
    ids = TradeIds(reports_missing=False, epoch_trades=1)
    return Decoder(Mode.LIVE, "exchange1", ["BTCUSDT"], lambda: NOW, 5000, Rejected(), ids=ids)


@pytest.mark.parametrize("name", ["number", "text", "word", "big"])
def test_trade_with_an_id_counts_once_over_all_chunks(name: str) -> None:
    ids: dict[str, list[object]] = {
        "number": [7, 8],
        "text": ["7", "8"],
        "word": ["a7", "a8"],
        "big": [1931506477151671992419320033, 1931506477151671992419320034],
    }
    first, second = (line(quantity=1, id=each) for each in ids[name])
    decoder = with_ids()
    assert only(decoder, first + first + second).ticks == 2
    assert decoder.decode(second.replace(b"BTC", b"btc") + first) == {}
    assert decoder.decode(line(quantity="1", id=ids[name][1])) == {}
    assert decoder.ids is not None
    assert decoder.ids.doubles == 4
    assert decoder.ticks == 2


def test_trades_of_one_time_open_and_close_by_id() -> None:
    candle = only(with_ids(), b"".join(line(quantity=1, id=each, price=10.0 * each) for each in (3, 1, 2)))
    assert (candle.open, candle.close, candle.ticks) == (10.0, 30.0, 3)


def test_lines_without_ids_always_count() -> None:
    decoder = with_ids()
    assert only(decoder, line(quantity=1) + line(quantity=1) + line(quantity=1, id=4)).ticks == 3
    assert only(decoder, line(id=4) + line(id=4)).ticks == 2  # what has no quantity is not looked at


def test_exchange_that_begins_its_ids_anew_loses_nothing() -> None:
    decoder = with_ids()
    assert only(decoder, line(quantity=1, id=900)).ticks == 1
    again = b"".join(line(quantity=1, id=number, timestamp=NOW_MS + number) for number in range(1, 4))
    assert only(decoder, again).ticks == 3


def test_line_with_a_bad_price_takes_no_id() -> None:
    decoder = with_ids()
    assert only(decoder, line(quantity=1, id=7, price=-1) + line(quantity=1, id=7)).ticks == 1
