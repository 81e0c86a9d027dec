"""A trade counts once, whenever and however often the venue sends it."""

import sys

from marketflow.feeds.decoder import TradeLine
from marketflow.feeds.venues.trade_ids import EPOCH_TRADES, MOST_GAPS, TradeIds


def trade(number: int | None, at: int = 1000, count: int = 1) -> TradeLine:
    return TradeLine("A", 1.0, at, 1.0, "buy", number, count)


def counted(ids: TradeIds, *trades: TradeLine, symbol: str = "A") -> list[bool]:
    """Whether each counts, one at a time."""
    return [bool(ids.new_of(symbol, [each])) for each in trades]


def new_ids(ids: TradeIds, *numbers: int) -> list[object]:
    """Which count, all at once."""
    return [each.id for each in ids.new_of("A", [*map(trade, numbers)])]


def test_repeated_trade_counts_once() -> None:
    ids = TradeIds()
    assert counted(ids, trade(7), trade(7), trade(7), trade(8), trade(7)) == [True, False, False, True, False]
    assert ids.doubles == 3
    assert ids.doubles_by_symbol({"A": "ours"}) == {"ours": 3}


def test_trades_out_of_order_count() -> None:
    assert counted(TradeIds(), trade(9), trade(7), trade(8), trade(7)) == [True, True, True, False]


def test_batch_is_the_same_as_one_trade_at_a_time() -> None:
    ids = TradeIds()
    assert new_ids(ids, 1, 2, 3) == [1, 2, 3]
    assert new_ids(ids, 4, 5, 5, 9, 7, 2) == [4, 5, 7, 9]
    assert new_ids(ids, 9, 10, 8, 6, 6) == [6, 8, 10]
    assert new_ids(ids, 11, 12) == [11, 12]
    assert new_ids(ids, 11, 12, 13) == [13]
    assert ids.doubles == 2 + 2 + 2


def test_snapshot_replayed_after_a_reconnect_adds_only_the_new() -> None:
    ids = TradeIds()
    new_ids(ids, *range(1, 51))
    assert new_ids(ids, *range(31, 53)) == [51, 52]


def test_symbols_have_ids_of_their_own() -> None:
    ids = TradeIds()
    assert counted(ids, trade(1)) == [True]
    assert counted(ids, trade(1), symbol="B") == [True]


def test_trades_without_ids_always_count() -> None:
    assert counted(TradeIds(), trade(None), trade(None)) == [True, True]


def test_double_of_long_ago_is_still_a_double() -> None:
    ids = TradeIds()
    assert all(counted(ids, *(trade(number, number) for number in range(1, 100_000))))
    assert counted(ids, trade(3, 3), trade(80_000, 80_000)) == [False, False]


def test_trade_that_stands_for_several_leaves_no_gap() -> None:
    ids = TradeIds()
    new_ids(ids, 119, 120)
    assert counted(ids, trade(123, count=3), trade(122), trade(127), trade(125), trade(127)) == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_memory_is_bounded_for_ten_million_ids_with_gaps() -> None:
    ids = TradeIds()
    for number in range(500):
        symbol = f"S{number}"
        for first in range(1, 20_000, 40):  # 20 trades, then a gap of 20
            ids.new_of(symbol, [trade(first + each, first) for each in range(20)])
    states = ids._symbols.values()
    assert len(states) == 500
    assert all(len(each.gaps) <= MOST_GAPS for each in states)
    assert sum(sys.getsizeof(each.gaps) + 64 * len(each.gaps) for each in states) < 10_000_000


def test_ids_that_begin_anew_are_taken_after_some_trades() -> None:
    ids = TradeIds()
    counted(ids, *(trade(100_000 + number, number) for number in range(10)))
    again = counted(ids, *(trade(number, 1_000 + number) for number in range(1, 30)))
    assert again == [False] * (EPOCH_TRADES - 1) + [True] * (30 - EPOCH_TRADES)
    assert ids.epochs == 1


def test_newest_id_of_a_heartbeat_proves_that_nothing_is_missing() -> None:
    ids = TradeIds()
    counted(ids, trade(5))
    assert ids.has("A", 5)
    assert not ids.has("A", 6)
    assert not ids.has("B", 1)
