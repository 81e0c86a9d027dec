"""A trade counts once, whenever and however often the venue sends it."""

from marketflow.feeds.venues.trade_ids import EPOCH_TRADES, REMEMBERED, TradeIds
from marketflow.feeds.venues.venue import Trade


def trade(number: int | None, at: int = 1000, symbol: str = "A") -> Trade:
    return Trade(symbol, 1.0, 1.0, at, number, "buy")


def counted(ids: TradeIds, *trades: Trade) -> list[bool]:
    return [ids.is_new(each) for each in trades]


def test_repeated_trade_counts_once() -> None:
    ids = TradeIds()
    assert counted(ids, trade(7), trade(7), trade(7), trade(8), trade(7)) == [True, False, False, True, False]
    assert ids.doubles == 3


def test_trades_out_of_order_count() -> None:
    assert counted(TradeIds(), trade(9), trade(7), trade(8), trade(7)) == [True, True, True, False]


def test_symbols_have_ids_of_their_own() -> None:
    assert counted(TradeIds(), trade(1), trade(1, symbol="B")) == [True, True]


def test_trades_without_ids_always_count() -> None:
    assert counted(TradeIds(), trade(None), trade(None)) == [True, True]


def test_memory_is_bounded_and_old_trades_are_doubles() -> None:
    ids = TradeIds()
    assert all(counted(ids, *(trade(number, number) for number in range(10 * REMEMBERED))))
    assert len(ids._symbols["A"].seen) == REMEMBERED
    assert counted(ids, trade(3, 3), trade(8 * REMEMBERED, 8 * REMEMBERED)) == [False, False]


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
